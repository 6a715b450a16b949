"""Log lines: one for each exchange, and the thread that writes them.

Lines are gathered and handed to a thread, so that a terminal or a pipe that nobody reads
cannot hold up the proxy; beyond a bound they are dropped and counted.
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

from record import Record

FLUSH_INTERVAL = 0.1  # seconds that a line may be gathered
MAX_PENDING = 1 << 20  # bytes of lines that wait for the terminal
MAX_SHOWN = 100  # characters shown of what a client chose

_PLAIN = re.compile(r"[\w.:/@+-]+", re.ASCII)


class LineWriter:
    """Write lines to a file descriptor from a thread of its own, as text or as JSON."""

    def __init__(self, descriptor: int, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self._descriptor = descriptor
        self._queue: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._taken = 0  # bytes, counted by the loop's thread alone
        self._written = 0  # bytes, counted by the writing thread alone
        self._dropped = 0  # lines
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lines", daemon=True)
        self._thread.start()

    def write(self, line: bytes) -> None:
        """Take one line, with its newline. Never waits."""
        if self._taken - self._written + len(line) > MAX_PENDING:
            self._dropped += 1
            return
        if self._dropped:
            line = self._line("WARNING", f"{self._dropped} log lines were dropped") + line
            self._dropped = 0
        self._taken += len(line)
        self._queue.put(line)

    def say(self, level: str, message: str) -> None:
        """Take a message: one line, or with a traceback as text several."""
        self.write(self._line(level, message))

    def _line(self, level: str, message: str) -> bytes:
        if self.as_json:
            return as_json(level, message)
        return f"{stamp()} {level} {message}\n".encode("utf-8", "replace")

    def close(self) -> None:
        """Write what is left, for a second at most."""
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
        with suppress(OSError):  # nobody reads; the proxy goes on
            while text:
                text = text[os.write(self._descriptor, text) :]


class LineHandler(logging.Handler):
    """Log through a `LineWriter`, so that all lines keep their order."""

    def __init__(self, writer: LineWriter) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        """Write one log record."""
        self._writer.say(record.levelname, self.format(record))


def setup_logging(level: str, writer: LineWriter) -> None:
    """Send all of OllProx's log lines to `writer`, from `level` on."""
    handler = LineHandler(writer)
    logger = logging.getLogger("ollprox")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(level)
    logging.getLogger("asyncio").handlers = [handler]


class AccessLog:
    """Write one line for each exchange, at its end."""

    def __init__(self, writer: LineWriter, level: str) -> None:
        self._writer = writer
        self._format = format_as_json if writer.as_json else format_record
        self._info = level in {"DEBUG", "INFO"}
        self._debug = level == "DEBUG"

    def __call__(self, record: Record) -> None:
        """Write the record's line, where its level is wanted."""
        if self._debug if record.quiet else self._info:
            self._writer.write(self._format(record, time.monotonic()))


def format_record(record: Record, now: float) -> bytes:
    """Format an access line. What clients chose is escaped and cut."""
    first = "-" if record.first_byte is None else f"{record.first_byte - record.started:.4f}"
    return (
        f"{stamp()} access id={record.request_id.decode()}"
        f" client={record.client} key={shown(record.caller)}"
        f" method={shown(record.method)} path={record.path} model={shown(record.model)}"
        f" status={record.status} cache={record.outcome} bytes={record.bytes_sent}"
        f" first_byte={first} total={now - record.started:.4f}\n"
    ).encode()


def format_as_json(record: Record, now: float) -> bytes:
    """Format the same as a JSON object; times are numbers, what is not there is null."""
    first = record.first_byte
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
        cache=_or_null(record.outcome),
        bytes=record.bytes_sent,
        first_byte=None if first is None else round(first - record.started, 6),
        total=round(now - record.started, 6),
    )


def _or_null(text: str) -> str | None:
    return None if text == "-" else text[:MAX_SHOWN]


def as_json(level: str, message: str, **fields: object) -> bytes:
    """Write a log line as JSON; `time`, `level` and `message` are in every one."""
    return (
        json.dumps({"time": stamp(), "level": level, "message": message, **fields}).encode() + b"\n"
    )


_second = (0, "")


def stamp() -> str:
    """Return the time in UTC, to the millisecond, as in ISO 8601."""
    global _second
    now = time.time()
    if _second[0] != int(now):
        _second = int(now), time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
    return f"{_second[1]}.{int(now * 1000) % 1000:03d}Z"


def shown(text: str) -> str:
    """Escape and cut what a client chose, so that it stays one word of one line."""
    return _shown(text[:MAX_SHOWN])


@lru_cache(maxsize=1024)
def _shown(text: str) -> str:
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
