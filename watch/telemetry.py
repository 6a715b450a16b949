"""Log lines: one for each request, and the thread that writes them.

A thread collects and writes the lines, so a terminal or a pipe that nobody reads cannot
block the proxy. Beyond a limit, lines are dropped and counted.
"""

import json
import logging
import os
import queue
import re
import threading
import time
from contextlib import suppress
from functools import lru_cache

from record import Outcome, Record

FLUSH_INTERVAL = 0.1  # seconds for which lines are collected before they are written
MAX_PENDING = 1 << 20  # bytes of lines waiting to be written
MAX_SHOWN = 100  # characters logged of a value that a client chose

_PLAIN = re.compile(r"[\w.:/@+-]+", re.ASCII)


class LineWriter:
    """Writes lines to a file descriptor in its own thread, as text or as JSON."""

    def __init__(self, descriptor: int, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self._descriptor = descriptor
        self._queue: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._taken = 0  # bytes; only the event loop's thread changes it
        self._written = 0  # bytes; only the writing thread changes it
        self._dropped = 0  # lines
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lines", daemon=True)
        self._thread.start()

    def write(self, line: bytes) -> None:
        """Queue one line, which ends with a newline. Never waits."""
        if self._taken - self._written + len(line) > MAX_PENDING:
            self._dropped += 1
            return
        if self._dropped:
            line = self._line("WARNING", f"{self._dropped} log lines were dropped") + line
            self._dropped = 0
        self._taken += len(line)
        self._queue.put(line)

    def message(self, level: str, message: str) -> None:
        """Queue a message: one line, or several if it is text with a traceback."""
        self.write(self._line(level, message))

    def _line(self, level: str, message: str) -> bytes:
        if self.as_json:
            return as_json(level, message)
        return f"{stamp()} {level} {message}\n".encode("utf-8", "replace")

    def close(self) -> None:
        """Write the remaining lines; give up after a second."""
        self._closing.set()
        self._queue.put(b"")  # wakes the thread
        self._thread.join(timeout=1)

    def _run(self) -> None:
        while not self._closing.is_set():
            lines = [self._queue.get()]
            self._closing.wait(FLUSH_INTERVAL)
            while not self._queue.empty():
                lines.append(self._queue.get())
            text = b"".join(lines)
            self._write_all(text)
            self._written += len(text)

    def _write_all(self, text: bytes) -> None:
        with suppress(OSError):  # nobody reads the lines; keep serving
            while text:
                text = text[os.write(self._descriptor, text) :]


class LineHandler(logging.Handler):
    """Logs through a `LineWriter`, so that messages and access lines stay in order."""

    def __init__(self, writer: LineWriter) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        """Write one log record."""
        self._writer.message(record.levelname, self.format(record))


def setup_logging(level: str, writer: LineWriter) -> None:
    """Send OllProx's log lines of `level` and above to `writer`."""
    handler = LineHandler(writer)
    logger = logging.getLogger("ollprox")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(level)
    logging.getLogger("asyncio").handlers = [handler]


class AccessLog:
    """Writes one line for each request, at its end."""

    def __init__(self, writer: LineWriter, level: str) -> None:
        self._writer = writer
        self._format = format_as_json if writer.as_json else format_record
        self._info = level in {"DEBUG", "INFO"}
        self._debug = level == "DEBUG"

    def __call__(self, record: Record) -> None:
        """Write the record's line, unless LOG_LEVEL is above the line's level."""
        if self._debug if record.quiet else self._info:
            self._writer.write(self._format(record))


def format_record(record: Record) -> bytes:
    """Return an access line. Values chosen by clients are escaped and cut."""
    started, first_byte, queued = record.started, record.first_byte, record.queued
    first = "-" if first_byte is None else f"{first_byte - started:.4f}"
    return (
        f"{stamp()} access id={record.request_id.decode()}"
        f" client={record.client} key={_one_word(record.caller[:MAX_SHOWN])}"
        f" method={record.method} path={record.path}"
        f" model={_one_word(record.model[:MAX_SHOWN])}"
        f" status={record.status} cache={_CACHE.get(record.outcome, '-')}"
        f" bytes={record.bytes_sent} queued={'-' if queued is None else f'{queued:.4f}'}"
        f" first_byte={first} total={record.ended - started:.4f}\n"
    ).encode()


def format_as_json(record: Record) -> bytes:
    """Return an access line as a JSON object; missing values are null."""
    first, queued = record.first_byte, record.queued
    return as_json(
        "DEBUG" if record.quiet else "INFO",
        "access",
        id=record.request_id.decode(),
        client=record.client,
        key=_or_null(record.caller),
        method=_or_null(record.method),
        path=_or_null(record.path),
        model=_or_null(record.model),
        status=record.status,
        cache=_CACHE.get(record.outcome),
        bytes=record.bytes_sent,
        queued=None if queued is None else round(queued, 6),
        first_byte=None if first is None else round(first - record.started, 6),
        total=round(record.ended - record.started, 6),
    )


# `cache` in access lines; other outcomes have none.
_CACHE: dict[Outcome, str] = {
    outcome: outcome.value for outcome in Outcome if outcome not in {Outcome.REFUSED, Outcome.PAGE}
}


def _or_null(text: str) -> str | None:
    return None if text == "-" else text[:MAX_SHOWN]


def as_json(level: str, message: str, **fields: object) -> bytes:
    """Return a log line as JSON; every line has `time`, `level` and `message`."""
    return (
        json.dumps({"time": stamp(), "level": level, "message": message, **fields}).encode() + b"\n"
    )


_second = (0, "")


def stamp() -> str:
    """Return the time in UTC, in ISO 8601 with milliseconds."""
    global _second
    now = time.time()
    if _second[0] != int(now):
        _second = int(now), time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
    return f"{_second[1]}.{int(now * 1000) % 1000:03d}Z"


def shown(text: str) -> str:
    """Return a value chosen by a client as one word, escaped and cut."""
    return _one_word(text[:MAX_SHOWN])


@lru_cache(maxsize=1024)
def _one_word(text: str) -> str:
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
