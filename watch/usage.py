"""Keep usage: what each key asked of each model on each day, in an SQLite file.

Requests are counted in memory. A thread of its own writes the counts every few seconds and at
the end, so a slow disk cannot hold up the proxy. What could not be written stays in memory, within
a bound, until it can. Prompts and answers are never kept.

The file is kept safe by SQLite's rollback journal, not its write-ahead log: a process that is
killed at any moment leaves the counts of its last commit, in a single file with one mode. Each
write opens the file anew, so one that was moved, restored or repaired is used from then on.
"""

import contextlib
import csv
import io
import json
import logging
import os
import queue
import re
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, fields
from datetime import date, timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar
from urllib.parse import parse_qsl, quote

from access.rights import Key
from answers.flight import Flight, Source
from record import Outcome, Record
from settings import SettingsError
from watch.metrics import ANSWERED, DAYS, OTHER, Span

if TYPE_CHECKING:
    from sqlite3 import Connection

log = logging.getLogger("ollprox")

SCHEMA = 1  # `PRAGMA user_version`
APPLICATION = 0x4F6C6C50  # `PRAGMA application_id`, "OllP": tells our files from foreign ones
WRITE_INTERVAL = 5.0  # seconds between two writes
LOCK_TIMEOUT = 2.0  # seconds that a write waits for another program's lock
CLOSE_TIMEOUT = 5.0  # seconds that the last write may take
REPORT_TIMEOUT = 30.0  # seconds that a report may take
MAX_PENDING = 10_000  # rows in memory that keep their key and model
MAX_ROWS = 100_000  # of one report
PERIOD = 300  # seconds for which the tokens that count against a limit are added up
LONGEST_LIMIT = 86_400  # seconds
SHOWN_DIGITS = 8  # of the digest of a key without a label, as in the log
NOT_KEPT = "usage is not kept: set USAGE_FILE to the path of a file for it"
DIMENSIONS = ("day", "key", "model")

_MAGIC = b"SQLite format 3\0"
_HEADER = 100  # bytes; https://www.sqlite.org/fileformat2.html#the_database_header
_MAX_INTEGER = (1 << 63) - 1  # SQLite's
_FORMULA = re.compile(r"[\t\r\n]|\s*[=+\-@＝＋－＠]")  # noqa: RUF001 - spreadsheets take these too
T = TypeVar("T")


class UsageError(Exception):
    """The file cannot be used; the text says why."""


@dataclass(slots=True)
class Counts:
    """What was counted of some requests for answers. The fields are the columns of a report."""

    requests: int = 0  # all of them, also those below
    hits: int = 0
    joined: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    gpu_seconds: float = 0.0
    gpu_seconds_saved: float = 0.0

    def add(self, other: "Counts") -> None:
        """Add another's counts."""
        for name in COLUMNS:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def values(self) -> list[float]:
        """Return the columns' values; seconds are rounded to microseconds."""
        values = (getattr(self, name) for name in COLUMNS)
        return [round(v, 6) if isinstance(v, float) else min(v, _MAX_INTEGER) for v in values]


COLUMNS = tuple(item.name for item in fields(Counts))
Index = tuple[str, str, str]  # day, key and model


@dataclass(slots=True)
class Batch:
    """What was counted since the last write; bounded, whatever fails for however long."""

    rows: dict[Index, Counts] = field(default_factory=dict)
    tokens: dict[tuple[str, int], int] = field(default_factory=dict)  # by key and period
    hours: dict[int, Span] = field(default_factory=dict)  # by their start

    def row(self, day: str, key: str, model: str) -> Counts:
        """Return the row to count in; beyond the bound, one for all keys and models."""
        index = day, key, model
        if (found := self.rows.get(index)) is not None:
            return found
        if len(self.rows) >= MAX_PENDING:
            index = day, OTHER, OTHER
        return self.rows.setdefault(index, Counts())

    def spend(self, key: str, period: int, tokens: int) -> None:
        """Count tokens against a key's limit; beyond the bound they are not kept."""
        if (key, period) in self.tokens or len(self.tokens) < MAX_PENDING:
            self.tokens[key, period] = self.tokens.get((key, period), 0) + tokens

    def pass_minute(self, minute: Span) -> None:
        """Add a minute, or an hour, to its hour."""
        start = minute.start // 3600 * 3600
        if start not in self.hours and len(self.hours) >= DAYS * 24:
            del self.hours[min(self.hours)]
        self.hours.setdefault(start, Span(start)).add(minute)

    def add(self, other: "Batch") -> None:
        """Add what another batch has."""
        for index, counts in other.rows.items():
            self.row(*index).add(counts)
        for (key, period), tokens in other.tokens.items():
            self.spend(key, period, tokens)
        for hour in other.hours.values():
            self.pass_minute(hour)

    def __bool__(self) -> bool:
        return bool(self.rows or self.tokens or self.hours)


class Query(NamedTuple):
    """What a report is to show."""

    first: str = ""  # the first and the last day, as `2026-11-28`, in UTC
    last: str = "9999-12-31"
    by: tuple[str, ...] = DIMENSIONS
    form: str = "json"
    own: str | None = None  # only this key's rows


def parse_query(text: str, form: str = "json") -> Query:
    """Read the query of `GET /usage`; empty parameters count as left out.

    Args:
        text: such as `from=2026-11-01&to=2026-11-30&by=day,model&format=csv`.
        form: the report's, if there is no `format`.

    Raises:
        ValueError: the message says which parameter is wrong.

    """
    pairs = parse_qsl(text, keep_blank_values=True)
    given = dict(pairs)
    if unknown := given.keys() - {"from", "to", "by", "format"}:
        raise ValueError(f"/usage has no parameter {min(unknown)!r}: it takes from, to, by, format")
    if len(given) < len(pairs):
        raise ValueError("each parameter may be given once")
    first, last = _day("from", given), _day("to", given) or Query().last
    if first > last:
        raise ValueError("from is later than to")
    by = tuple((given.get("by") or ",".join(DIMENSIONS)).split(","))
    if not set(by) <= set(DIMENSIONS) or len(set(by)) < len(by):
        raise ValueError("by takes one or more of day, key, model, as in by=day,key")
    if given.get("format", "") not in {"", "json", "csv"}:
        raise ValueError("format takes json or csv")
    return Query(first, last, by, given.get("format") or form)


def _day(name: str, given: dict[str, str]) -> str:
    text = given.get(name, "")
    with contextlib.suppress(ValueError):
        if not text or date.fromisoformat(text).isoformat() == text:
            return text
    raise ValueError(f"{name} takes a day in UTC, as in {name}=2026-11-28")


def prefers_csv(accept: str) -> bool:
    """Whether an Accept header (RFC 9110 section 12.5.1) ranks CSV above JSON."""
    ranks = {"text/csv": 0.0, "application/json": 0.0}
    for part in accept.lower().split(","):
        kind, *parameters = (item.strip() for item in part.split(";"))
        quality = next((p[2:] for p in parameters if p.startswith("q=")), "1")
        with contextlib.suppress(ValueError):
            ranks[kind] = float(quality)
    return ranks["text/csv"] > ranks["application/json"]


# The file.


class Kept(NamedTuple):
    """What the file tells at the start."""

    salt: bytes  # for digests that stay the same where API_KEY_SALT is not set
    spent: dict[str, list[tuple[int, int]]]  # ends of periods and tokens, by key
    hours: tuple[Span, ...] = ()


class UsageFile:
    """The SQLite file. Its methods wait for the disk; one thread at a time may call them.

    Args:
        path: where it is.
        days: how many days it keeps (USAGE_DAYS).

    Raises:
        UsageError: this Python has no SQLite.

    """

    def __init__(self, path: Path, days: int) -> None:
        try:
            import sqlite3  # not loaded where usage is not kept
        except ImportError:
            raise UsageError("this Python has no module sqlite3") from None
        self._sqlite = sqlite3
        self.path = path
        self._days = days

    def start(self, now: float) -> Kept:
        """Make the file if there is none; return what counts from before. Raises UsageError."""

        def read(connection: "Connection") -> Kept:
            (salt,) = connection.execute("SELECT value FROM meta WHERE name = 'salt'").fetchone()
            kept = Kept(bytes(salt), {}, tuple(_hours(connection, now)))
            since = (now - LONGEST_LIMIT - PERIOD, now)
            tokens = "SELECT key, slot, tokens FROM tokens WHERE slot > ? AND slot <= ?"
            for key, start, count in connection.execute(f"{tokens} ORDER BY slot", since):
                kept.spent.setdefault(key, []).append((start + PERIOD, int(count)))
            return kept

        try:
            return self._run(read, create=True)
        except (TypeError, ValueError):
            raise UsageError("its content is damaged") from None

    def write(self, batch: Batch, now: float) -> None:
        """Add a batch, and drop what is too old; all or nothing. Raises UsageError."""

        def add(connection: "Connection") -> None:
            _upsert(
                *(connection, "usage", DIMENSIONS, COLUMNS),
                ((*index, *counts.values()) for index, counts in batch.rows.items()),
            )
            _upsert(
                *(connection, "tokens", ("key", "slot"), ("tokens",)),
                ((*index, min(count, _MAX_INTEGER)) for index, count in batch.tokens.items()),
            )
            _upsert(
                *(connection, "hours", ("start",), _HOUR),
                ((h.start, *h.outcomes.values(), h.tokens, h.errors) for h in batch.hours.values()),
            )
            first = _day_of(max(0, int(now) // 86_400 - self._days + 1))
            connection.execute("DELETE FROM usage WHERE day < ?", (first,))
            connection.execute("DELETE FROM tokens WHERE slot < ?", (now - LONGEST_LIMIT - PERIOD,))
            connection.execute("DELETE FROM hours WHERE start < ?", (now - DAYS * 86_400,))

        self._run(add, create=True)

    def rows(self, query: Query, *, create: bool = False) -> dict[tuple[str, ...], Counts]:
        """Return the sums by what the query asks for, in order. Raises UsageError, ValueError.

        `create` makes the file if there is none.
        """
        by = ", ".join(query.by)
        sums = ", ".join(f"SUM({name})" for name in COLUMNS)
        where, values = "day BETWEEN ? AND ?", [query.first, query.last]
        if query.own is not None:
            where, values = f"{where} AND key = ?", [*values, query.own]
        select = f"SELECT {by}, {sums} FROM usage WHERE {where} GROUP BY {by} ORDER BY {by}"

        def read(connection: "Connection") -> list[tuple[object, ...]]:
            return connection.execute(f"{select} LIMIT {MAX_ROWS + 1}", values).fetchall()

        found = self._run(read, create=create)
        if len(found) > MAX_ROWS:
            raise ValueError(f"more than {MAX_ROWS} rows: ask for fewer days, or a shorter by=")
        width = len(query.by)
        return {tuple(map(str, r[:width])): Counts(*r[width:]) for r in found}  # type: ignore[arg-type]

    def _run(self, job: Callable[["Connection"], T], *, create: bool) -> T:
        """Do a job in one transaction. Raises UsageError."""
        try:
            self._check(create)
            with contextlib.closing(self._connect()) as connection:
                connection.execute("BEGIN IMMEDIATE" if create else "BEGIN")
                if create:
                    _make_schema(connection)
                result = job(connection)
                connection.execute("COMMIT")  # without it, closing rolls back
                return result
        except self._sqlite.Error as error:
            raise UsageError(str(error)) from None
        except OSError as error:
            raise UsageError(error.strerror or str(error)) from None

    def _connect(self) -> "Connection":
        where = f"file:{quote(os.fsencode(self.path))}?mode=rw"
        return self._sqlite.connect(where, uri=True, timeout=LOCK_TIMEOUT, isolation_level=None)

    def _check(self, create: bool) -> None:
        """Leave a file that is not ours untouched. Raises UsageError, OSError.

        The header is read without SQLite, which might write. No connection may be open: closing
        any descriptor of a file gives up the process's locks on it.
        """
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_CREAT if create else 0)
        descriptor = os.open(self.path, flags, 0o600)
        try:
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                raise UsageError("it is not a regular file")
            header = os.read(descriptor, _HEADER)
            if header:
                _check_header(header)
            elif not create:
                raise UsageError("it is empty")
            if mode & 0o077:
                with contextlib.suppress(PermissionError):  # its owner is somebody else
                    os.fchmod(descriptor, 0o600)
        finally:
            os.close(descriptor)


def _check_header(header: bytes) -> None:
    """Raises UsageError for a file that is not ours, or of a newer OllProx."""
    version, application = (int.from_bytes(header[at : at + 4], "big") for at in (60, 68))
    if header[:16] != _MAGIC or application != APPLICATION:
        raise UsageError("it is not a usage file of OllProx; it is left as it is")
    if version > SCHEMA:
        raise UsageError(f"its schema {version} is of a newer OllProx; it is left as it is")


_HOUR = (*(str(outcome) for outcome in ANSWERED), "tokens", "errors")
_TABLES = (
    "CREATE TABLE usage (day TEXT, key TEXT, model TEXT,"
    f" {', '.join(f'{name} NOT NULL' for name in COLUMNS)},"
    " PRIMARY KEY (day, key, model)) WITHOUT ROWID",
    "CREATE TABLE tokens (key TEXT, slot INTEGER, tokens NOT NULL, PRIMARY KEY (key, slot))"
    " WITHOUT ROWID",
    f"CREATE TABLE hours (start INTEGER PRIMARY KEY, {', '.join(f'{n} NOT NULL' for n in _HOUR)})",
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID",
)


def _make_schema(connection: "Connection") -> None:
    """Make the tables in an empty file, within the transaction that is open."""
    if connection.execute("PRAGMA application_id").fetchone()[0] == APPLICATION:
        return
    for statement in _TABLES:
        connection.execute(statement)
    connection.execute("INSERT INTO meta VALUES ('salt', ?)", (secrets.token_bytes(32),))
    connection.execute(f"PRAGMA application_id = {APPLICATION}")
    connection.execute(f"PRAGMA user_version = {SCHEMA}")


def _upsert(
    connection: "Connection",
    table: str,
    index: tuple[str, ...],
    columns: tuple[str, ...],
    rows: Iterable[tuple[object, ...]],
) -> None:
    """Add rows to a table; the numbers of an index that is there already are added up."""
    marks = ", ".join("?" * (len(index) + len(columns)))
    sums = ", ".join(f"{name} = {name} + excluded.{name}" for name in columns)
    connection.executemany(
        f"INSERT INTO {table} ({', '.join((*index, *columns))}) VALUES ({marks})"
        f" ON CONFLICT ({', '.join(index)}) DO UPDATE SET {sums}",
        rows,
    )


def _hours(connection: "Connection", now: float) -> Iterator[Span]:
    select = f"SELECT start, {', '.join(_HOUR)} FROM hours WHERE start > ? AND start <= ?"
    for row in connection.execute(f"{select} ORDER BY start", (now - DAYS * 86_400, now)):
        start, *counts, tokens, errors = map(int, row)
        yield Span(start, dict(zip(ANSWERED, counts, strict=True)), tokens, errors)


class Opened(NamedTuple):
    """The file at the start; `trouble` says why it cannot be used."""

    file: UsageFile
    kept: Kept
    trouble: str = ""


def open_file(path: Path, days: int, now: float) -> Opened:
    """Open the file, or warn that it cannot be used. Raises SettingsError without SQLite."""
    try:
        file = UsageFile(path, days)
    except UsageError as error:
        raise SettingsError(f"USAGE_FILE: {error}") from None
    try:
        return Opened(file, file.start(now))
    except UsageError as error:
        _warn(path, str(error), "limits on tokens begin anew, and counts stay in memory")
        return Opened(file, Kept(secrets.token_bytes(32), {}), str(error))


# The counts in memory.


class Usage:
    """Counts usage, and has a thread write it.

    Args:
        opened: where it is written.
        name_of: returns the name that a model is counted by.
        clock: seconds since 1970.

    """

    def __init__(
        self,
        opened: Opened,
        name_of: Callable[[str], str] = str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.failures = 0  # writes that failed
        self._file, _, self._trouble = opened  # why the last write failed
        self._name_of = name_of
        self._clock = clock
        self._pending = Batch()
        self._lock = threading.Lock()  # of `_pending`
        # Reports to make, and None to end.
        self._jobs: queue.SimpleQueue[tuple[Query, Future[str]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="usage", daemon=True)

    @property
    def pending(self) -> int:
        """How many rows are in memory and not in the file."""
        return len(self._pending.rows)

    def count(self, record: Record) -> None:
        """Count a request at its end, if it had a valid key and asked for an answer."""
        if record.label is None or not record.generates:
            return
        outcome = record.outcome
        with self._lock:
            row = self._row(record.caller, record.model)
            row.requests += 1
            row.hits += outcome is Outcome.HIT
            row.joined += outcome is Outcome.COLLAPSED
            row.refused += outcome is Outcome.REFUSED
            if outcome is Outcome.HIT or record.shared:
                row.gpu_seconds_saved += record.usage.gpu_seconds

    def count_flight(self, flight: Flight) -> None:
        """Count what an answer took at its end, for the key that began it."""
        if flight.permit is None or flight.source is not Source.GENERATED:
            return
        usage, key = flight.usage, flight.permit.key
        if not (usage.tokens or usage.prompt_tokens or usage.gpu_seconds):
            return
        with self._lock:
            row = self._row(shown(key), flight.model)
            row.prompt_tokens += usage.prompt_tokens
            row.generated_tokens += usage.tokens
            row.gpu_seconds += usage.gpu_seconds
            if key.tokens:
                period = int(self._clock()) // PERIOD * PERIOD
                self._pending.spend(_digits(key), period, usage.tokens)

    def count_minute(self, minute: Span) -> None:
        """Count a minute of all requests at its end."""
        if minute.tokens or minute.errors or any(minute.outcomes.values()):
            with self._lock:
                self._pending.pass_minute(minute)

    def _row(self, key: str, model: str) -> Counts:
        """Return the row of today to count in; the caller holds the lock."""
        day = _day_of(int(self._clock()) // 86_400)
        return self._pending.row(day, _storable(key), _storable(self._name_of(model)))

    # For the event loop.

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def ask(self, query: Query) -> "Future[str]":
        """Return a future for a report; it may fail with UsageError or ValueError."""
        future: Future[str] = Future()
        self._jobs.put((query, future))
        return future

    def close(self) -> None:
        """Write the rest; give up after some seconds."""
        self._jobs.put(None)
        self._thread.join(CLOSE_TIMEOUT)
        if self._thread.is_alive():
            log.warning("USAGE_FILE %s: the last counts could not be written", self._file.path)

    # For the thread.

    def _work(self) -> None:
        due = time.monotonic() + WRITE_INTERVAL
        while True:
            try:
                job = self._jobs.get(timeout=max(0.0, due - time.monotonic()))
            except queue.Empty:
                self._write()
                due = time.monotonic() + WRITE_INTERVAL
                continue
            if job is None:
                self._write()
                return
            query, future = job
            _answer(future, partial(self._report, query))

    def _write(self) -> None:
        """Write what has been counted; what cannot be written stays in memory."""
        with self._lock:
            batch, self._pending = self._pending, Batch()
        if not batch:
            return
        try:
            self._file.write(batch, self._clock())
        except UsageError as error:
            self._keep(batch, str(error))
        except Exception:
            self.failures += 1
            log.exception("counts of usage were lost because of a fault in OllProx")
        else:
            if self._trouble:
                log.info("USAGE_FILE %s is written again", self._file.path)
            self._trouble = ""

    def _keep(self, batch: Batch, trouble: str) -> None:
        """Take a batch back that could not be written."""
        self.failures += 1
        with self._lock:
            batch.add(self._pending)
            self._pending = batch
        if trouble != self._trouble:
            self._trouble = trouble
            _warn(self._file.path, trouble, "counts stay in memory until it can be written")

    def _report(self, query: Query) -> str:
        """Return a report of the file and of what could not be written to it."""
        self._write()
        rows = self._file.rows(query, create=True)
        with self._lock:
            pending = list(self._pending.rows.items())
            for index, counts in pending:
                _merge(rows, query, index, counts)
        return render(query, dict(sorted(rows.items())) if pending else rows)


@lru_cache(maxsize=4)
def _day_of(number: int) -> str:
    """Return a day by its number since 1970, in UTC."""
    return (date(1970, 1, 1) + timedelta(number)).isoformat()


@lru_cache(maxsize=1024)
def _storable(name: str) -> str:
    """Return a name without halves of surrogate pairs, which UTF-8 cannot express."""
    return name.encode("utf-8", "backslashreplace").decode()


def _answer(future: "Future[str]", job: Callable[[], str]) -> None:
    """Do a job for a caller that may have stopped waiting."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(job())
    except Exception as error:
        future.set_exception(error)


def _merge(rows: dict[tuple[str, ...], Counts], query: Query, index: Index, counts: Counts) -> None:
    named = dict(zip(DIMENSIONS, index, strict=True))
    own = query.own is None or query.own == named["key"]
    if own and query.first <= named["day"] <= query.last:
        rows.setdefault(tuple(named[name] for name in query.by), Counts()).add(counts)


def _warn(path: Path, trouble: str, follows: str) -> None:
    log.warning("USAGE_FILE %s cannot be used: %s; %s", path, trouble, follows)


def shown(key: Key) -> str:
    """Return what a key is counted by: its label, or the first digits of its digest."""
    return key.label or _digits(key)


def _digits(key: Key) -> str:
    return key.digest.hex()[:SHOWN_DIGITS]


def earlier(kept: Kept, now: float) -> Callable[[Key], list[tuple[float, int]]]:
    """Return a function that lists when a key spent tokens before the start, and how many.

    Times are on the monotonic clock. Tokens count as of the end of their period, so a limit may
    free them up to `PERIOD` seconds late, and never early.
    """
    offset = time.monotonic() - now
    return lambda key: [
        (min(end, now) + offset, tokens) for end, tokens in kept.spent.get(_digits(key), [])
    ]


# Reports.


def render(query: Query, rows: dict[tuple[str, ...], Counts]) -> str:
    """Write a report as JSON, as CSV (RFC 4180), or as a table for a terminal."""
    header = [*query.by, *COLUMNS]
    lines = [[*index, *counts.values()] for index, counts in rows.items()]
    if query.form == "json":  # row by row, or the event loop's thread would have to wait for all
        objects = (json.dumps(dict(zip(header, line, strict=True))) for line in lines)
        return f'{{"rows": [{", ".join(objects)}]}}'
    if query.form == "table":
        return _table([header, *([str(cell) for cell in line] for line in lines)], len(query.by))
    text = io.StringIO()
    csv.writer(text).writerows([header, *(map(_harmless, line) for line in lines)])
    return text.getvalue()


def _harmless(cell: object) -> object:
    """Return a CSV cell that no spreadsheet takes for a formula."""
    return f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell


def _table(lines: list[list[str]], names: int) -> str:
    """Align cells in columns: names to the left, numbers to the right."""
    lines = [[_printable(cell) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "".join(
        "  ".join(
            cell.ljust(width) if at < names else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        + "\n"
        for line in lines
    )


def _printable(text: str) -> str:
    """Escape what would move a terminal's cursor."""
    return text if text.isprintable() else json.dumps(text)[1:-1]


def print_report(path: Path, days: int, text: str) -> None:
    """Print what a query asks for. Raises UsageError, ValueError."""
    query = parse_query(text, "table")
    print(render(query, UsageFile(path, days).rows(query)), end="")
