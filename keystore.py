"""Know which API keys are valid now, and where a request's head carries one.

The key file has one key a line; `KEY  # label` says whose it is. With a salt the lines
are salted digests, `sha256(salt + key)` in hex, otherwise plain keys. In memory there are
only salted digests. Run as a program, this makes keys, digests and salts.
"""

import argparse
import base64
import hashlib
import logging
import os
import re
import secrets
import stat
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote_to_bytes

from settings import SettingsError, load

MAX_FILE_BYTES = 64 << 20  # a key file; a million keys fit
MIN_KEY_CHARS = 16  # a shorter plain key is warned about
MAX_REPORTED = 10  # lines reported one by one, after that only their number
CLOCK_TICK_NS = 2_000_000_000  # a file changed this recently may change again unseen

MAX_WRONG = 10  # wrong keys that one address may try in a window
WRONG_WINDOW = 60.0  # seconds
MAX_ADDRESSES = 10_000  # addresses that are remembered for it

# In this order the first that carries a key decides.
_KEY_HEADERS = (b"apikey", b"x-api-key", b"authorization")
_DIGEST = re.compile(rb"[0-9a-fA-F]{64}")
_KEY = re.compile(rb"[\x21-\x7e\x80-\xff]+")
_LABEL = re.compile(rb"\s+#")
_KEY_PATH = re.compile(rb"/key/([^/]*)(/.*|)", re.DOTALL)
_BASIC = re.compile(rb"basic +([A-Za-z0-9+/=]+) *", re.IGNORECASE)
_BEARER = re.compile(rb"bearer +(.*)", re.IGNORECASE | re.DOTALL)

Pair = tuple[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a key file says: labels by salted digest, and reports for the log.

    `strangers` counts the lines that are no digest where a salt is set, `lookalikes`
    those that look like one where none is.
    """

    labels: dict[bytes, str]
    reports: list[str]
    strangers: int
    lookalikes: int


def salted_digest(salt: bytes, key: bytes) -> bytes:
    """Return the 32 bytes of SHA-256 over salt and key."""
    return hashlib.sha256(salt + key).digest()


def split_line(line: bytes) -> tuple[bytes, bytes]:
    """Split a line of a key file into the key and its label; both empty for none."""
    line = line.strip()
    if line.startswith(b"#"):
        return b"", b""
    key, *label = _LABEL.split(line, maxsplit=1)
    return key, b"".join(label).strip()


def parse(text: bytes, salt: bytes, *, digests: bool) -> Parsed:
    """Read a key file's text; `digests` says whether its lines are salted digests."""
    labels: dict[bytes, str] = {}
    reports: list[str] = []
    strangers = lookalikes = 0
    empty = salted_digest(salt, b"")
    for number, line in enumerate(text.removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        key, label = split_line(line)
        if not key:
            continue
        looks = _DIGEST.fullmatch(key) is not None
        lookalikes += looks
        if digests and not looks:
            strangers += 1
            reports.append(f"line {number} is no salted digest (64 hex digits): ignored")
        elif digests and bytes.fromhex(key.decode()) == empty:
            reports.append(f"line {number} is the digest of an empty key: ignored")
        elif not _KEY.fullmatch(key):
            reports.append(
                f"line {number} is no key, which holds no white space: ignored"
                " (a label comes after white space and #)"
            )
        else:
            if not digests and len(key) < MIN_KEY_CHARS:
                reports.append(
                    f"line {number} has a key shorter than {MIN_KEY_CHARS} characters, which"
                    " can be guessed: `python keystore.py new` makes a better one"
                )
            digest = bytes.fromhex(key.decode()) if digests else salted_digest(salt, key)
            labels[digest] = label.decode("utf-8", "replace")
    return Parsed(labels, reports, strangers, lookalikes)


def read_file(path: Path) -> tuple[bytes, tuple[int, int, int]]:
    """Read a key file; return its text and its signature: mtime in ns, size, inode.

    Raises:
        OSError: it is not there, cannot be read, or is not a regular file. A FIFO is told
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
    return text, _signature(status)


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
    labels: dict[bytes, str] = field(default_factory=dict, repr=False)
    _signature: tuple[int, int, int] | None = None
    _young: bool = False  # changed so lately that another change may not show
    _failed: bool = False
    reloads: int = 0  # readings that went well
    failures: int = 0  # readings that did not
    _made: bool = False  # the only key is the one made at start
    _reports: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path | None, salt: bytes) -> "KeyStore":
        """Make one; without a salt of the user's, a random one is made for this run."""
        return cls(path, salt or secrets.token_bytes(32), digests=bool(salt))

    def admit(self, key: bytes, label: str) -> None:
        """Let this one key in, until the file gets keys."""
        self.labels, self._made = {salted_digest(self.salt, key): label}, True

    def poll(self) -> Parsed | OSError | None:
        """Read the file again if its mtime, size or inode has changed; None if not."""
        if self.path is None:
            return None
        try:
            same = _signature(os.stat(self.path)) == self._signature
        except OSError as error:
            return error
        return None if same and not self._young and not self._failed else self.reload()

    def reload(self) -> Parsed | OSError:
        """Read and parse the file."""
        if self.path is None:
            raise ValueError("there is no key file")
        try:
            text, self._signature = read_file(self.path)
        except OSError as error:
            self._signature = None
            return error
        self._young = time.time_ns() - self._signature[0] < CLOCK_TICK_NS
        return parse(text, self.salt, digests=self.digests)

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
                    f" the last {len(self.labels)} keys stay valid",
                )
            return
        if failed:
            yield logging.ERROR, f"API_KEY_FILE {self.path} can be read again"
        if result.labels != self.labels and (result.labels or not self._made):
            self.labels, self._made = result.labels, False
            yield logging.INFO, f"API keys: {len(self.labels)} read from {self.path}"
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


def take_credential(
    salt: bytes, in_path: bool, path: bytes, headers: Iterable[Pair]
) -> tuple[bytes | None, bytes, list[Pair]]:
    """Take the credentials out of a head, whose headers' names are in lower case.

    Args:
        salt: of the digests.
        in_path: a key in the path counts, and decides before any header. It is cut off in
            any case.
        path: of the request, without its query.
        headers: of the request.

    Returns:
        The salted digest of the key that was presented, or None for none; the path without
        `/key/KEY`; and the headers without any that held a key. A header that comes twice
        with different values presents what no key matches.

    """
    found: dict[bytes, set[bytes]] = {}
    rest: list[Pair] = []
    if (match := _KEY_PATH.fullmatch(path)) is not None:
        path = match[2] or b"/"
        if in_path and (key := unquote_to_bytes(match[1])):
            found[b""] = {key}
    for name, value in headers:
        if name in _KEY_HEADERS:
            if key := _key_in(name, value):
                found.setdefault(name, set()).add(key)
        else:
            rest.append((name, value))
    for name in (b"", *_KEY_HEADERS):
        if keys := found.get(name):
            # No key holds a line end, so two at once match none.
            digest = salted_digest(salt, b"\n".join(sorted(keys)))
            everything = set().union(*found.values())
            return digest, path, [pair for pair in rest if not _holds(pair[1], everything)]
    return None, path, rest


def _key_in(name: bytes, value: bytes) -> bytes:
    """Return the key in a header; with Basic (RFC 7617) it is the password."""
    if name != b"authorization":
        return value
    if match := _BEARER.fullmatch(value):
        return match[1].strip()
    if match := _BASIC.fullmatch(value):
        with suppress(ValueError):
            return base64.b64decode(match[1], validate=True).partition(b":")[2]
    return b""


def _holds(value: bytes, keys: set[bytes]) -> bool:
    """Whether a key stands in another header as well, where it must not pass on.

    A short one may stand in a longer value by chance.
    """
    return any(key in value if len(key) >= 8 else key == value for key in keys)


def new_key() -> str:
    """Make a key: 192 random bits, safe in a URL and in a shell."""
    return secrets.token_urlsafe(24)


def _print_new(label: str, salt: bytes) -> None:
    key = new_key()
    line = salted_digest(salt, key.encode()).hex() if salt else key
    print(f"API key, for its user:          {key}")
    print(f"line to append to the key file: {line}{f'  # {label}' if label else ''}")


def _print_hashed(lines: Iterable[bytes], salt: bytes) -> None:
    for number, line in enumerate(lines):
        line = line if number else line.removeprefix(b"\xef\xbb\xbf")
        key, label = split_line(line)
        if _DIGEST.fullmatch(key):
            print(f"line {number + 1} is a digest already: left as it is", file=sys.stderr)
        elif key:
            digest = salted_digest(salt, key).hex().encode()
            line = digest + (b"  # " + label if label else b"")
        sys.stdout.buffer.write(line.rstrip(b"\r\n") + b"\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line tool."""
    parser = argparse.ArgumentParser(
        prog="keystore.py", description="Make API keys, salts, and salted key files."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    new = commands.add_parser("new", help="print a fresh key and its line for the key file")
    new.add_argument("--label", default="", help="whose key it is; shown in logs")
    commands.add_parser(
        "hash",
        help="turn plain keys on standard input into digest lines, keeping labels and"
        " comments; the salt is API_KEY_SALT, from the environment or .env",
    )
    commands.add_parser("salt", help="print a new salt, for API_KEY_SALT in .env")
    chosen = parser.parse_args(arguments)
    try:
        salt = load(os.environ).api_key_salt.encode("utf-8", "surrogateescape")
    except SettingsError as error:
        parser.error(str(error))
    if chosen.command == "hash" and not salt:
        parser.error("API_KEY_SALT is not set: put API_KEY_SALT=, and what `salt` prints, in .env")
    if chosen.command == "salt":
        print(secrets.token_hex(16))
    elif chosen.command == "hash":
        _print_hashed(sys.stdin.buffer, salt)
    else:
        _print_new(" ".join(chosen.label.split()), salt)


if __name__ == "__main__":
    main()
