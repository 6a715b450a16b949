"""Know which API keys are valid now and what each may do; find the keys in a request's head.

The key file has one key a line, `KEY option option ...  # label`; docs/keys.md describes it.
With a salt the lines hold salted digests, `sha256(salt + key)` in hex, otherwise plain keys. In
memory there are only salted digests. Run as a program, this makes keys, digests and salts, and
changes a key file safely.
"""

import argparse
import base64
import contextlib
import fcntl
import hashlib
import logging
import os
import re
import secrets
import stat
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

from settings import REGISTRY, SettingsError, load, normalize_model

MAX_FILE_BYTES = 64 << 20  # a key file; a million keys fit
MIN_KEY_CHARS = 12  # a shorter plain key is warned about
MAX_REPORTED = 10  # lines reported one by one, after that only their number
MAX_NAME_CHARS = 600  # of a model; Ollama takes 350 for the host and 80 for each other part
CLOCK_TICK = 2.0  # seconds; a file changed this recently may change again unseen
SETTLE_TIME = 1.0  # seconds; a file changed this recently may still be being written
MAX_UNSETTLED = 5.0  # seconds; a file that keeps changing for longer is believed anyway

MAX_WRONG = 10  # wrong keys that one address may try in a window
WRONG_WINDOW = 60.0  # seconds
MAX_ADDRESSES = 10_000  # addresses that are remembered for it
MIN_SECRET = 8  # bytes of a credential that are looked for within other headers

NO_SCHEME = b"\n"  # in place of a digest: an Authorization header without a scheme

_KEY_HEADERS = (b"apikey", b"x-api-key", b"api-key", b"authorization")  # in the order of search
_DIGEST = re.compile(rb"[0-9a-fA-F]{64}")
_KEY = re.compile(rb"[\x21-\x7e\x80-\xff]+")
_LABEL = re.compile(rb"(?<!\s)\s+#")  # from the first white space on: linear in the line
_ODD = re.compile(rb"[\"'`#=\[\]{}]")
_KEY_PATH = re.compile(rb"/key/([^/]*)(/.*|)", re.DOTALL)
_BASIC = re.compile(rb"basic +([A-Za-z0-9+/=]+) *", re.IGNORECASE)
_BARE = re.compile(rb"(?!(?:bearer|basic)\Z)\S+", re.IGNORECASE)
_BEARER = re.compile(rb"bearer +(.*)", re.IGNORECASE | re.DOTALL)
_QUOTES = b"\"'`"
_LABEL_SCOPE = b"label".ljust(32)  # with a label after it, longer than any digest
_BOM = b"\xef\xbb\xbf"

Pair = tuple[bytes, bytes]


# What a key may do.


@dataclass(frozen=True, slots=True, order=True)
class Limit:
    """At most `count` in any `seconds`."""

    count: int
    seconds: int

    def __str__(self) -> str:
        """Write it as in the key file."""
        unit = next(unit for unit, seconds in _UNITS.items() if seconds == self.seconds)
        return f"{self.count}/{unit}"


@dataclass(frozen=True, slots=True)
class Key:
    """An API key and its rights.

    `digest` is salted. `scope` tells callers apart where answers are kept for each: the label's
    bytes, or the digest of a key without a label. `models` are patterns of normalized names, None
    for all; `models_also` are those of further lines with the same key, which must match too.
    `rate` counts generations, `tokens` generated tokens, each once for a unit of time. `running`
    bounds the generations at once. `until` is the first second, since 1970 in UTC, at which the
    key does not hold any more. None, or an empty tuple, is no limit.
    """

    digest: bytes = field(repr=False)
    label: str
    scope: bytes = field(repr=False)
    admin: bool = False
    metrics: bool = False
    models: tuple[str, ...] | None = None
    rate: tuple[Limit, ...] = ()
    running: int | None = None
    tokens: tuple[Limit, ...] = ()
    until: float | None = None
    weight: int = 1
    models_also: tuple[tuple[str, ...], ...] = ()

    def may_use(self, model: str) -> bool:
        """Whether the key may use a model, by its normalized name. Linear in the name."""
        if self.models is None:
            return True
        if len(model) > MAX_NAME_CHARS:
            return False
        return all(
            any(_matches(pattern, model) for pattern in patterns)
            for patterns in (self.models, *self.models_also)
        )

    def rights(self) -> list[tuple[str, str]]:
        """Return the options that are set, by name and value as in the key file."""
        lists = [] if self.models is None else [self.models, *self.models_also]
        numbers = {"running": self.running, "weight": self.weight if self.weight > 1 else None}
        found = [(name, "") for name in ("admin", "metrics") if getattr(self, name)]
        found += [("models", ",".join(patterns)) for patterns in lists]
        found += [("rate", str(limit)) for limit in self.rate]
        found += [("tokens", str(limit)) for limit in self.tokens]
        found += [(name, str(number)) for name, number in numbers.items() if number is not None]
        if self.until is not None:
            found.append(("until", str(date.fromordinal(_EPOCH + int(self.until) // _DAY - 1))))
        return found


_UNITS = {"minute": 60, "hour": 3600, "day": 86400}
_DAY = _UNITS["day"]
_EPOCH = date(1970, 1, 1).toordinal()
_FLAGS = frozenset({"admin", "metrics"})
_FORMS = {  # of each option, to show
    "admin": "admin",
    "metrics": "metrics",
    "models": "models=llama2,qwen3:8b,me/* with names of models, where only * is special",
    "rate": "rate=60/minute, or /hour or /day",
    "running": "running=2, at least 1",
    "tokens": "tokens=200000/day, or /hour",
    "until": "until=2027-01-31, a date",
    "weight": "weight=2, at least 1",
}

Options = dict[str, Any]
"""A line's options by name, None for one that is lifted; each is a field of `Key`."""


def parse_options(words: Iterable[str]) -> Options:
    """Read the options of a line.

    Raises:
        ValueError: one is unknown or malformed. Its text says what would be right, and quotes
            nothing but the names of options.

    """
    options: Options = {}
    for word in words:
        name, value = _read_option(word)
        if name in options:
            value = _one_more(name, options[name], value)
        options[name] = value
    return options


def _one_more(name: str, before: Any, value: Any) -> tuple[Limit, ...]:
    """Return the limits of an option that stands twice. Raises ValueError if it must not."""
    if name == "rate" and before and value:
        limits: tuple[Limit, ...] = (*before, *value)
        if len({limit.seconds for limit in limits}) == len(limits):
            return limits
    raise ValueError(f"{name} stands twice")


@lru_cache(maxsize=4096)  # most lines of a large file have the options of others
def _read_option(word: str) -> tuple[str, Any]:
    name, equals, text = word.partition("=")
    if name not in _FORMS:
        raise ValueError(f"there is an unknown option; the options are {', '.join(_FORMS)}")
    if text == "none":
        return name, None
    if name in _FLAGS and not equals:
        return name, True
    try:
        return name, _READ[name](text)
    except (ValueError, KeyError):
        raise ValueError(f"{name} is malformed; write {_FORMS[name]}") from None


def _count(text: str) -> int:
    if not re.fullmatch(r"0*[1-9][0-9]{0,14}", text):
        raise ValueError
    return int(text)


def _limit(text: str, units: Sequence[str]) -> tuple[Limit, ...]:
    count, _, unit = text.partition("/")
    if unit not in units:
        raise ValueError
    return (Limit(_count(count), _UNITS[unit]),)


def _until(text: str) -> float:
    """Return the end of a day, in seconds since 1970 in UTC."""
    if not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
        raise ValueError
    return float((date.fromisoformat(text).toordinal() - _EPOCH + 1) * _DAY)


_READ: dict[str, Callable[[str], Any]] = {  # a flag with a value is a KeyError
    "models": lambda text: tuple(map(_pattern, text.split(","))),
    "rate": lambda text: _limit(text, ("minute", "hour", "day")),
    "running": _count,
    "tokens": lambda text: _limit(text, ("hour", "day")),
    "until": _until,
    "weight": _count,
}


# Patterns of models' names.

_NAMESPACES = (f"{REGISTRY}/library/", f"{REGISTRY}/", "")  # by the slashes in a normalized name


def _pattern(text: str) -> str:
    """Normalize a pattern as a name is. Raises ValueError if no model can match.

    A `*` at the end may stand for a tag too. Where a pattern has a `*` and names the default
    host or namespace, it keeps them: `library/*` does not match `me/llama2`.
    """
    pattern = normalize_model(text)
    if text.endswith("*"):
        pattern = pattern.removesuffix(":latest")
    if "*" in pattern and text.count("/") > pattern.count("/"):
        pattern = _NAMESPACES[pattern.count("/")] + pattern
    if len(pattern) > MAX_NAME_CHARS or not _can_match(pattern):
        raise ValueError
    return pattern


def _matches(pattern: str, name: str) -> bool:
    """Whether a normalized name matches; `*` stands for any characters, also none."""
    if pattern.startswith(REGISTRY):
        name = _NAMESPACES[min(name.count("/"), 2)] + name
    start, *others = pattern.split("*")
    if not others:
        return pattern == name
    *middle, end = others
    if len(name) < len(start) + len(end) or not (name.startswith(start) and name.endswith(end)):
        return False
    position, stop = len(start), len(name) - len(end)
    for part in middle:  # the first place that fits leaves the most for the parts behind
        position = name.find(part, position, stop)
        if position < 0:
            return False
        position += len(part)
    return True


# The grammar of normalized names, [[HOST/]NAMESPACE/]MODEL:TAG, as an automaton: the state after
# each kind of character, `w` for letters, digits and `_`. A small letter is the start of a part,
# a capital one within it.
_GRAMMAR = {
    "h": {"w": "H"},
    "H": {"w": "H", "-": "H", ".": "H", ":": "H", "/": "n"},
    "n": {"w": "N"},
    "N": {"w": "N", "-": "N", "/": "m"},
    "m": {"w": "M"},
    "M": {"w": "M", "-": "M", ".": "M", ":": "t"},
    "t": {"w": "T"},
    "T": {"w": "T", "-": "T", ".": "T"},
}


def _can_match(pattern: str) -> bool:
    """Whether any name that Ollama takes matches a pattern."""
    states = set("hnm")
    for char in pattern:
        if char == "*":
            for _ in _GRAMMAR:  # more steps reach nothing new
                states |= {after for state in states for after in _GRAMMAR[state].values()}
        else:
            kind = "w" if char.isascii() and (char.isalnum() or char == "_") else char
            states = {_GRAMMAR[state][kind] for state in states if kind in _GRAMMAR[state]}
    return "T" in states


def _both(one: Key, two: Key) -> Key:
    """Return a key that stands on two lines: the second's label, and what both allow."""
    lists = [
        patterns
        for key in (one, two)
        if key.models is not None
        for patterns in (key.models, *key.models_also)
    ]
    return replace(
        two,
        admin=one.admin and two.admin,
        metrics=one.metrics and two.metrics,
        models=lists[0] if lists else None,
        models_also=tuple(lists[1:]),
        rate=_smaller(one.rate, two.rate),
        tokens=_smaller(one.tokens, two.tokens),
        running=min((n for n in (one.running, two.running) if n is not None), default=None),
        until=min((t for t in (one.until, two.until) if t is not None), default=None),
        weight=min(one.weight, two.weight),
    )


def _smaller(one: tuple[Limit, ...], two: tuple[Limit, ...]) -> tuple[Limit, ...]:
    """Return the smaller limit for each unit."""
    limits: dict[int, Limit] = {}
    for limit in sorted(one + two, reverse=True):
        limits[limit.seconds] = limit
    return tuple(limits[seconds] for seconds in sorted(limits))


# The key file.


class Line(NamedTuple):
    """A line of a key file that has a key.

    `fault` says why it opens nothing, or is empty; then `digest` may be None. `doubt` says what
    is probably a mistake. Neither quotes a word of the line but an option's name.
    """

    number: int
    digest: bytes | None
    label: bytes
    options: Options
    fault: str
    doubt: str
    looks_salted: bool


def split_line(line: bytes) -> tuple[bytes, list[bytes], bytes]:
    """Split a line of a key file into key, options and label; all empty where there is no key."""
    line = line.strip()
    if not line or line.startswith(b"#"):
        return b"", [], b""
    words, *label = _LABEL.split(line, maxsplit=1)
    key, *options = words.split()
    return key, options, b"".join(label).strip()


def read_lines(text: bytes, salt: bytes, *, digests: bool) -> Iterator[Line]:
    """Read the lines of a key file that have a key; `digests` says that they are salted."""
    for number, line in enumerate(text.removeprefix(_BOM).splitlines(), 1):
        key, words, label = split_line(line)
        if not key:
            continue
        digest, fault = _read_key(key, salt, digests=digests)
        doubt = "" if digests else _mistake(key)
        options: Options = {}
        if words and not fault:
            try:
                options = parse_options([word.decode("ascii", "replace") for word in words])
            except ValueError as error:
                fault = doubt or f"has bad options: {error} ({_LABEL_FORM})"
        if not digests and len(key) < MIN_KEY_CHARS:
            doubt = doubt or _SHORT
        yield Line(number, digest, label, options, fault, doubt, _DIGEST.fullmatch(key) is not None)


def _read_key(key: bytes, salt: bytes, *, digests: bool) -> tuple[bytes | None, str]:
    """Return the salted digest of a line's key, and what is wrong with it."""
    if not _KEY.fullmatch(key):
        return None, "has a control character in its key"
    if not digests:
        return salted_digest(salt, key), ""
    if not _DIGEST.fullmatch(key):
        return None, "is not a salted digest (64 hex digits)"
    digest = bytes.fromhex(key.decode())
    return digest, "is the digest of an empty key" if digest == salted_digest(salt, b"") else ""


_LABEL_FORM = "a label comes after white space and #"
_SHORT = (
    f"has a key shorter than {MIN_KEY_CHARS} characters, which can be guessed:"
    " `python keystore.py new` makes a better one"
)


def _mistake(key: bytes) -> str:
    """Say what is probably wrong with a plain key, without quoting it."""
    if not _ODD.search(key):
        return ""
    name, _, value = key.partition(b"=")
    if key[:1] in b"[]{}":
        return "looks like JSON, but a key file has one key a line"
    if key[:1] in _QUOTES or key[-1:] in _QUOTES:
        return "has quotes around its key, which are taken for a part of it"
    if b"#" in key:
        return f"has a # in its key: {_LABEL_FORM}"
    if b"key" in name.lower() and value.strip(b"="):
        return "looks like a setting, but a key file has the key alone"
    return ""


@dataclass(slots=True)
class Parsed:
    """What a key file says: the keys by salted digest, and reports for the log.

    `strangers` counts the lines that are not digests where a salt is set, `lookalikes` those
    that look like one. `changed` says whether the keys differ from those in force.
    """

    keys: dict[bytes, Key] = field(repr=False)
    reports: list[str]
    strangers: int = 0
    lookalikes: int = 0
    changed: bool = True


def salted_digest(salt: bytes, key: bytes) -> bytes:
    """Return the 32 bytes of SHA-256 over salt and key."""
    return hashlib.sha256(salt + key).digest()


def make_key(digest: bytes, label: bytes, options: Mapping[str, Any]) -> Key:
    """Make a key from its line; options that are None are left out."""
    given = {name: value for name, value in options.items() if value is not None}
    scope = _LABEL_SCOPE + label if label else digest
    return Key(digest, label.decode("utf-8", "replace"), scope, **given)


def parse(
    text: bytes,
    salt: bytes,
    *,
    digests: bool,
    admin_labels: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> Parsed:
    """Read a key file's text.

    Args:
        text: of the file.
        salt: of the digests.
        digests: the lines hold salted digests, not keys.
        admin_labels: keys with these labels may do everything.
        defaults: options of lines that do not say otherwise.

    """
    parsed = Parsed({}, [])
    keys, reports = parsed.keys, parsed.reports
    lines: dict[bytes, int] = {}  # the last good line of each key
    closed: set[bytes] = set()  # keys that a line with a fault has
    for line in read_lines(text, salt, digests=digests):
        parsed.lookalikes += line.looks_salted
        parsed.strangers += digests and not line.looks_salted
        if line.fault or line.doubt:
            opens = ": it opens nothing" if line.fault else ""
            reports.append(f"line {line.number} {line.fault or line.doubt}{opens}")
        if line.digest is None:
            continue
        if line.fault:
            closed.add(line.digest)
            continue
        key = make_key(line.digest, line.label, {**(defaults or {}), **line.options})
        if (earlier := keys.get(line.digest)) is not None:
            key = _both(earlier, key)
            reports.append(
                f"line {line.number} has the same key as line {lines[line.digest]}:"
                " it may do only what both allow"
            )
        keys[line.digest], lines[line.digest] = key, line.number
    for digest in sorted(closed & keys.keys(), key=lines.__getitem__):
        del keys[digest]
        reports.append(
            f"line {lines[digest]} opens nothing, since its key is on a line with a fault too"
        )
    reports[:0] = _give_admin(keys, admin_labels)
    return parsed


def _give_admin(keys: dict[bytes, Key], labels: Sequence[str]) -> list[str]:
    """Give the keys with these labels the right `admin`; report the labels that no key has."""
    if not keys or not labels:
        return []
    found = set()
    for digest, key in keys.items():
        if key.label in labels:
            found.add(key.label)
            keys[digest] = replace(key, admin=True)
    return [  # a label that is missing may be a key, so it is not shown
        f"has no key with the label that is number {number} in ADMIN_LABELS"
        for number, label in enumerate(labels, 1)
        if label not in found
    ]


def read_file(path: Path) -> tuple[bytes, os.stat_result]:
    """Read a key file; return its text and its status.

    Raises:
        OSError: it is not there, cannot be read, or is not a regular file. A FIFO is recognized
            by its kind and never waited for.

    """
    if path.is_dir():
        raise IsADirectoryError(0, "it is a folder, not a file")
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "it is not a regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise OSError(0, f"it is larger than {MAX_FILE_BYTES >> 20} MiB")
        text = file.read(MAX_FILE_BYTES)
    if text.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise OSError(0, "it is UTF-16 text; save it as UTF-8")
    return text, status


def read_settled(path: Path) -> tuple[bytes, os.stat_result]:
    """Read a key file as `read_file` does, once it has not changed for `SETTLE_TIME`."""
    deadline = time.monotonic() + MAX_UNSETTLED
    while True:
        text, status = read_file(path)
        age = time.time() - status.st_mtime
        if (
            abs(age) >= SETTLE_TIME or time.monotonic() > deadline
        ):  # another host's clock may differ
            return text, status
        time.sleep(SETTLE_TIME - age)


def _signature(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_mtime_ns, status.st_size, status.st_ino


@dataclass(slots=True)
class KeyStore:
    """The keys that are valid now.

    `poll` is for a thread: it reads, and changes nothing that others look at; `adopt` puts
    its result in force in one assignment, on the event loop.
    """

    path: Path | None  # None: no key file
    salt: bytes = field(repr=False)
    digests: bool  # the file's lines are salted digests
    admin_labels: tuple[str, ...] = ()
    defaults: Options = field(default_factory=dict)
    refresh: float = 10.0  # seconds between two polls
    reloads: int = 0  # readings that went well
    failures: int = 0  # readings that did not
    _keys: dict[bytes, Key] = field(default_factory=dict, repr=False)
    _signature: tuple[int, int, int] | None = None
    _again: bool = False  # read it again, even if no change shows
    _unfinished: tuple[bytes, float] | None = None  # a text without a last line end, since when
    _failed: bool = False
    _made: bool = False  # the only key is the one made at start
    _reports: list[str] = field(default_factory=list)

    @classmethod
    def open(
        cls,
        path: Path | None,
        salt: bytes,
        *,
        admin_labels: tuple[str, ...] = (),
        defaults: Options | None = None,
        refresh: float = 10.0,
        shared_salt: bytes = b"",
    ) -> "KeyStore":
        """Make one, without reading.

        Without a salt, the digests in memory have `shared_salt`, so that several processes have
        the same; without that, a random one that is made for this run.
        """
        digests = bool(salt)
        salt = salt or shared_salt or secrets.token_bytes(32)
        return cls(path, salt, digests, admin_labels, defaults or {}, refresh)

    def __len__(self) -> int:
        """Count the keys, with those that have expired."""
        return len(self._keys)

    def labels(self) -> frozenset[str]:
        """Return the labels that keys have."""
        return frozenset(key.label for key in self._keys.values() if key.label)

    def find(self, digest: bytes, now: float) -> Key | None:
        """Return the key with a salted digest, if it is valid; `now` is the time since 1970."""
        key = self._keys.get(digest)
        return None if key is None or (key.until is not None and now >= key.until) else key

    def expired(self, digest: bytes, now: float) -> bool:
        """Whether there is a key with this salted digest that has expired."""
        return digest in self._keys and self.find(digest, now) is None

    def admit(self, key: bytes, label: str) -> None:
        """Let this one key in, until the file gets keys."""
        digest = salted_digest(self.salt, key)
        made = make_key(digest, label.encode(), self.defaults)
        made = replace(made, admin=made.admin or label in self.admin_labels)
        self._keys, self._made = {digest: made}, True

    def poll(self) -> Parsed | OSError | None:
        """Read the file if its mtime, size or inode has changed; None for nothing new.

        A file that was changed just now may still be being written, so this waits for it. A last
        line without a line end may be half a key: such a file is left until it has not changed
        for `refresh` seconds.
        """
        if self.path is None:
            return None
        try:
            same = _signature(os.stat(self.path)) == self._signature
            if same and not self._again and not self._failed:
                return None
            text, status = read_settled(self.path)
        except OSError as error:
            self._signature = None
            return error
        if text[-1:] not in b"\r\n" and self._may_go_on(text, status):
            return None
        return self._parse(text, status)

    def _may_go_on(self, text: bytes, status: os.stat_result) -> bool:
        """Whether file or text have changed within `refresh` seconds."""
        now, mark = time.monotonic(), salted_digest(self.salt, text)
        if self._unfinished is None or self._unfinished[0] != mark:
            self._unfinished = mark, now
        age = max(time.time() - status.st_mtime, now - self._unfinished[1])
        return age < self.refresh

    def reload(self) -> Parsed | OSError:
        """Read and parse the file as it stands, for the start; there are no keys to protect."""
        if self.path is None:
            raise ValueError("there is no key file")
        try:
            return self._parse(*read_file(self.path))
        except OSError as error:
            self._signature = None
            return error

    def _parse(self, text: bytes, status: os.stat_result) -> Parsed:
        self._signature = _signature(status)
        self._again = time.time() - status.st_mtime < CLOCK_TICK
        parsed = parse(
            text,
            self.salt,
            digests=self.digests,
            admin_labels=self.admin_labels,
            defaults=self.defaults,
        )
        parsed.changed = parsed.keys != self._keys  # here, as it takes long for many keys
        return parsed

    def adopt(self, result: Parsed | OSError) -> Iterator[tuple[int, str]]:
        """Put a reload's result in force; yield what is to be logged, with its level.

        A file that cannot be read keeps the last keys; an emptied one lets nobody in.
        """
        failed, self._failed = self._failed, isinstance(result, OSError)
        self.failures += self._failed
        self.reloads += not self._failed
        if isinstance(result, OSError):
            if not failed:
                yield (
                    logging.ERROR,
                    f"API_KEY_FILE {self.path} cannot be read ({reason(result)}):"
                    f" the last {len(self)} keys stay valid",
                )
            return
        if failed:
            yield logging.ERROR, f"API_KEY_FILE {self.path} can be read again"
        if result.changed and (result.keys or not self._made):
            self._keys, self._made = result.keys, False
            yield logging.INFO, f"API keys: {len(self)} read from {self.path}"
        if result.reports != self._reports:
            self._reports = result.reports
            yield from ((logging.WARNING, f"API_KEY_FILE {r}") for r in shorten(result.reports))


class WrongKeys:
    """Count the wrong keys that each address tries, to slow down who guesses.

    A valid key is never asked of this: one address may be a whole school.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tried: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def count(self, address: str) -> tuple[int, float]:
        """Count one more; return how many there were in this window, and its seconds left."""
        now = self._clock()
        began, count = self._tried.pop(address, (now, 0))
        if now - began >= WRONG_WINDOW:
            began, count = now, 0
        self._tried[address] = began, count + 1
        if len(self._tried) > MAX_ADDRESSES:
            self._tried.popitem(last=False)
        return count + 1, began + WRONG_WINDOW - now


def reason(error: OSError) -> str:
    """Say why, without the path."""
    return error.strerror or type(error).__name__


def shorten(reports: Sequence[str]) -> list[str]:
    """Bound the reports on a file's lines."""
    more = len(reports) - MAX_REPORTED
    return [*reports[:MAX_REPORTED], *([f"has {more} more such lines"] if more > 0 else [])]


# The keys in a request's head.


def take_credential(
    salt: bytes, in_path: bool, path: bytes, headers: Iterable[Pair]
) -> tuple[tuple[bytes, ...], bytes, list[Pair]]:
    """Take the credentials out of a head, whose headers' names are in lower case.

    Args:
        salt: of the digests.
        in_path: a key in the path counts. It is cut off in any case.
        path: of the request, without its query.
        headers: of the request.

    Returns:
        The salted digests of the keys that were presented, in the order in which they are to be
        tried, at most one for each place; the path without `/key/KEY`; and the headers without
        any that held a key. A header that comes twice with different values presents what no
        key matches, and nothing else counts beside it. An Authorization header without a scheme
        adds `NO_SCHEME`.

    """
    places: dict[bytes, set[bytes]] = {name: set() for name in (b"path", *_KEY_HEADERS)}
    secret: set[bytes] = set()  # what must not pass on in any header
    if (match := _KEY_PATH.fullmatch(path)) is not None:
        path = match[2] or b"/"
        secret = {match[1], unquote_to_bytes(match[1])}
        places[b"path"] = {unquote_to_bytes(match[1])} if in_path else set()
    rest: list[Pair] = []
    for name, value in headers:
        if name not in _KEY_HEADERS:
            rest.append((name, value))
        elif value:
            places[name].add(value)
    for values in places.values():
        if len(values) > 1:  # a key holds no line end, so no key matches two at once
            return (salted_digest(salt, b"\n".join(sorted(values))),), path, []
    keys = [_key_in(name, value) for name, values in places.items() for value in values]
    secret.update(keys, *(value.split()[-1:] for value in places[b"authorization"]))
    digests = [salted_digest(salt, key) if key != NO_SCHEME else key for key in keys if key]
    return tuple(dict.fromkeys(digests)), path, _without(rest, secret - {b"", NO_SCHEME})


def _key_in(name: bytes, value: bytes) -> bytes:
    """Return the key in a header; with Basic (RFC 7617) it is the password.

    Empty for none, and `NO_SCHEME` for what may be a key in an Authorization header.
    """
    if name != b"authorization":
        return value
    if match := _BEARER.fullmatch(value):
        return match[1].strip()
    if match := _BASIC.fullmatch(value):
        with contextlib.suppress(ValueError):
            return base64.b64decode(match[1], validate=True).partition(b":")[2]
    return NO_SCHEME if _BARE.fullmatch(value) else b""


def _without(headers: list[Pair], secret: set[bytes]) -> list[Pair]:
    """Leave out the headers that hold a secret, of which there are a few: linear in the head.

    A short one may stand in a longer value by chance.
    """
    long = [word for word in secret if len(word) >= MIN_SECRET]
    short = secret.difference(long)
    return [
        (name, value)
        for name, value in headers
        if value not in short and not any(word in value for word in long)
    ]


# The command line.


def new_key() -> str:
    """Make a key: 192 random bits, safe in a URL and in a shell."""
    return secrets.token_urlsafe(24)


def _line(key: bytes, options: Iterable[bytes], label: bytes) -> bytes:
    return b" ".join([key, *options]) + (b"  # " + label if label else b"")


class Failure(Exception):
    """What the command line cannot do; its text is the one line to show."""

    status = 1  # of the process


class Misuse(Failure):
    """Arguments or settings that are wrong."""

    status = 2


class Tool:
    """The commands, each a method of its name.

    Args:
        chosen: the arguments.
        salt: of the digests, empty for plain keys.
        path: of the key file, None if none is set.

    """

    def __init__(self, chosen: argparse.Namespace, salt: bytes, path: Path | None) -> None:
        self._chosen = chosen
        self._salt = salt
        self._path = path

    def new(self) -> None:
        """Print a fresh key and its line."""
        key, line = self._make()
        print(f"API key, for its user:          {key}")
        print(f"line to append to the key file: {line.decode(errors='surrogateescape')}")

    def add(self) -> None:
        """Append a fresh key to the key file."""
        key, line = self._make()
        path = self._file()

        def append(text: bytes) -> bytes:
            text += b"" if text[-1:] in b"\r\n" else b"\n"
            return text + line + b"\n"

        change_file(path, append)
        print(f"API key, for its user: {key}")
        print(f"its line was added to {path}")

    def list(self) -> None:
        """Print labels and options, and what is wrong with lines."""
        path = self._file()
        parsed = parse(read_file(path)[0], self._salt, digests=bool(self._salt))
        now = time.time()
        for key in parsed.keys.values():
            label = "".join(c if c.isprintable() else "?" for c in key.label) or "(no label)"
            rights = " ".join(f"{name}={value}" if value else name for name, value in key.rights())
            expired = " (expired)" if key.until is not None and key.until <= now else ""
            print(f"{label:<24} {rights}{expired}".rstrip())
        for report in parsed.reports:
            print(report, file=sys.stderr)

    def revoke(self) -> None:
        """Remove each key of a label from the key file, on all its lines."""
        path, label = self._file(), _label(self._chosen.label)
        if not label:
            raise Misuse("name a label; remove a key without one from the file by hand")
        removed: set[int] = set()

        def remove(text: bytes) -> bytes:
            lines = [*read_lines(text, self._salt, digests=bool(self._salt))]
            named = [line for line in lines if line.label == label]
            digests = {line.digest for line in named} - {None}
            removed.update(line.number for line in named)
            removed.update(line.number for line in lines if line.digest in digests)
            if not removed:
                raise Failure(f"no line of {path} has this label; `list` shows those there are")
            kept = text.splitlines(keepends=True)
            return b"".join(line for n, line in enumerate(kept, 1) if n not in removed)

        change_file(path, remove)
        print(f"{len(removed)} line{'s' * (len(removed) > 1)} removed from {path}")

    def hash(self) -> None:
        """Turn plain keys on standard input into digest lines."""
        if not self._salt:
            raise Misuse(
                "API_KEY_SALT is not set: put API_KEY_SALT=, and what `salt` prints, in .env"
            )
        text = sys.stdin.buffer.read()
        lines = {line.number: line for line in read_lines(text, self._salt, digests=False)}
        written = []
        for number, raw in enumerate(text.removeprefix(_BOM).splitlines(), 1):
            key, options, label = split_line(raw)
            if number in lines and lines[number].looks_salted:
                print(f"line {number} is a digest already: left as it is", file=sys.stderr)
            elif number in lines:
                if lines[number].fault:
                    raise Failure(f"line {number} {lines[number].fault}")
                raw = _line(salted_digest(self._salt, key).hex().encode(), options, label)
            written.append(raw + b"\n")
        sys.stdout.buffer.write(b"".join(written))  # nothing at all if a line has a fault

    def salt(self) -> None:
        """Print a fresh salt."""
        print(secrets.token_hex(16))

    def _make(self) -> tuple[str, bytes]:
        """Make a key and its line."""
        options = self._chosen.options.split()
        try:
            parse_options(options)
        except ValueError as error:
            raise Misuse(f"--options: {error}") from None
        key = new_key()
        word = salted_digest(self._salt, key.encode()).hex() if self._salt else key
        return key, _line(word.encode(), map(str.encode, options), _label(self._chosen.label))

    def _file(self) -> Path:
        path = Path(self._chosen.file) if self._chosen.file else self._path
        if path is None:
            raise Misuse("name the key file, or set API_KEY_FILE in .env")
        return path


def _label(text: str) -> bytes:
    return " ".join(text.split()).encode("utf-8", "surrogateescape")


def change_file(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Replace a file's text by `change` of it, at once and durably; make it if there is none.

    The file that a symbolic link leads to is replaced, with its owner and mode. Changes at the
    same time wait for each other.

    Raises:
        OSError: it cannot be read or written; it is as before.

    """
    path = path.resolve()
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # not the file, which is replaced
        try:
            text, status = read_file(path)
            owner, mode = (status.st_uid, status.st_gid), stat.S_IMODE(status.st_mode)
        except FileNotFoundError:
            text, owner, mode = b"", (-1, -1), 0o640
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with open(descriptor, "wb") as file:
                os.fchown(descriptor, *owner)
                os.fchmod(descriptor, mode)
                file.write(change(text))
                file.flush()
                os.fsync(descriptor)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
        os.fsync(folder)
    finally:
        os.close(folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="keystore.py",
        description="Make API keys, and change key files safely. API_KEY_FILE and API_KEY_SALT"
        " come from the environment or .env.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    line = argparse.ArgumentParser(add_help=False)
    line.add_argument("--label", default="", help="whose key it is; shown in logs")
    line.add_argument("--options", default="", help='what it may do: "rate=5/hour running=2"')
    file = argparse.ArgumentParser(add_help=False)
    file.add_argument("file", nargs="?", metavar="FILE", help="the key file, else API_KEY_FILE")
    commands.add_parser("add", parents=[line, file], help="add a fresh key to the key file")
    commands.add_parser("list", parents=[file], help="list labels and options, but no keys")
    revoke = commands.add_parser("revoke", help="remove each key of a label from the key file")
    revoke.add_argument("label", metavar="LABEL")
    revoke.add_argument("file", nargs="?", metavar="FILE", help="the key file, else API_KEY_FILE")
    commands.add_parser("new", parents=[line], help="print a fresh key and its line")
    commands.add_parser(
        "hash",
        help="turn plain keys on standard input into digest lines, keeping options, labels and"
        " comments",
    )
    commands.add_parser("salt", help="print a fresh salt, for API_KEY_SALT in .env")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    chosen = _parser().parse_args(arguments)
    try:
        settings = load(os.environ)
        path = settings.key_path if settings.api_key_file else None
        salt = settings.api_key_salt.encode("utf-8", "surrogateescape")
        getattr(Tool(chosen, salt, path), chosen.command)()
    except SettingsError as error:
        return _complain(str(error), Misuse.status)
    except Failure as error:
        return _complain(str(error), error.status)
    except OSError as error:
        return _complain(f"{chosen.file or path}: {reason(error)}", Failure.status)
    return 0


def _complain(text: str, status: int) -> int:
    print(f"keystore.py: {text}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
