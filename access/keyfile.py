"""Read and parse a key file: one key per line, `KEY option option ...  # label`.

docs/keys.md describes the format.
"""

import os
import re
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from access.credentials import salted_digest
from access.rights import Key, Options, both, make_key, parse_options

MAX_FILE_BYTES = 64 << 20  # enough for a million keys
_NO_WAIT = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)  # not on Windows
MIN_KEY_CHARS = 12  # shorter plain keys get a warning
WORK = 0.002  # seconds of processor time that a reload takes before it releases the GIL
REST = 0.001  # seconds that it then sleeps
BOM = b"\xef\xbb\xbf"  # some editors put one at the start of a file

_DIGEST = re.compile(rb"[0-9a-fA-F]{64}")
_KEY = re.compile(rb"[\x21-\x7e\x80-\xff]+")
_LABEL = re.compile(rb"(?<!\s)\s+#")  # the look-behind keeps it linear in the line
_ODD = re.compile(rb"[\"'`#=\[\]{}]")
_QUOTES = b"\"'`"


T = TypeVar("T")


class Line(NamedTuple):
    """A line of a key file that has a key.

    `fault` says why the line is not accepted, or is empty; `digest` is None only if there is a
    fault. `doubt` describes a probable mistake. Neither quotes anything of the line except names
    of options.
    """

    number: int
    digest: bytes | None
    label: bytes
    options: Options
    fault: str
    doubt: str
    looks_salted: bool


def split_line(line: bytes) -> tuple[bytes, list[bytes], bytes]:
    """Split a line into key, options and label. All are empty if it has no key."""
    line = line.strip()
    if not line or line.startswith(b"#"):
        return b"", [], b""
    words, *label = _LABEL.split(line, maxsplit=1)
    key, *options = words.split()
    return key, options, b"".join(label).strip()


def read_lines(text: bytes, salt: bytes, *, digests: bool) -> Iterator[Line]:
    """Parse the lines that have a key. With `digests` they hold salted digests, not keys."""
    for number, line in enumerate(text.removeprefix(BOM).splitlines(), 1):
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
    """Return the salted digest of a line's key, and its fault, if any."""
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
    """Return what is probably wrong with a plain key, without quoting it."""
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
    """The contents of a key file: the keys by salted digest, and reports for the log.

    `strangers` counts lines without a digest although a salt is set, `lookalikes` all lines that
    look like a digest. `changed` is false if the keys are the same as before.
    """

    keys: dict[bytes, Key] = field(repr=False)
    reports: list[str]
    strangers: int = 0
    lookalikes: int = 0
    changed: bool = True


def slices(items: Iterable[T]) -> Iterator[T]:
    """Yield the items, and sleep for `REST` after every `WORK` seconds of processor time.

    A busy thread releases the GIL only every 5 ms, so without this the event loop would wait that
    long after each system call. Time in which other programs run does not count, or a busy machine
    would make a reload sleep after every item.
    """
    end = time.thread_time() + WORK
    for item in items:
        yield item
        if time.thread_time() >= end:
            time.sleep(REST)
            end = time.thread_time() + WORK


def parse(
    text: bytes,
    salt: bytes,
    *,
    digests: bool,
    admin_labels: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
    in_slices: bool = False,
) -> Parsed:
    """Parse a key file.

    Args:
        text: of the file.
        salt: of the digests.
        digests: the lines hold salted digests, not keys.
        admin_labels: labels whose keys get the option `admin`.
        defaults: options for lines that do not set them.
        in_slices: sleep often, so that other threads can run.

    """
    parsed = Parsed({}, [])
    keys, reports = parsed.keys, parsed.reports
    lines: dict[bytes, int] = {}  # the last line without a fault, for each key
    closed: set[bytes] = set()  # keys on a line with a fault
    found = read_lines(text, salt, digests=digests)
    for line in slices(found) if in_slices else found:
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
            key = both(earlier, key)
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
    """Give the keys with these labels the option `admin`; report labels that no key has."""
    if not keys or not labels:
        return []
    found = set()
    for digest, key in keys.items():
        if key.label in labels:
            found.add(key.label)
            keys[digest] = replace(key, admin=True)
    return [  # not by name: somebody may have put a key there
        f"has no key with the label that is number {number} in ADMIN_LABELS"
        for number, label in enumerate(labels, 1)
        if label not in found
    ]


def read_file(path: Path) -> tuple[bytes, os.stat_result]:
    """Return a key file's text and status.

    Raises:
        OSError: it is missing, cannot be read, is too large or not UTF-8, or is not a regular
            file. A FIFO is refused without waiting for a writer.

    """
    if path.is_dir():
        raise IsADirectoryError(0, "it is a folder, not a file")
    descriptor = os.open(path, os.O_RDONLY | _NO_WAIT)
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


def reason(error: OSError) -> str:
    """Return the reason of an error, without the path."""
    return error.strerror or type(error).__name__
