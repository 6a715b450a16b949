"""Hold the API keys that are valid now, and reload the key file when it changes.

With a salt, the file holds salted digests, `sha256(salt + key)` in hex; otherwise plain keys. In
memory there are only salted digests. `python keystore.py` runs the command line, which is in
`access/keytool.py`.
"""

import logging
import os
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from access.credentials import salted_digest
from access.keyfile import Parsed, parse, read_file, reason, slices
from access.rights import Key, Options, make_key

MAX_REPORTED = 10  # lines of a file that are reported one by one; the rest are only counted
CLOCK_TICK = 2.0  # seconds; a file that changed this recently may change again within one mtime
SETTLE_TIME = 1.0  # seconds; a file that changed this recently may be incomplete
MAX_UNSETTLED = 5.0  # seconds; a file that keeps changing for longer is read anyway
MAX_UNFINISHED = 10.0  # seconds; after so long unchanged, a file need not end with a newline


@dataclass(slots=True)
class KeyStore:
    """The keys that are valid now.

    Call `poll` in a thread and `adopt` on the event loop. `poll` reads and parses the file, and
    changes nothing that requests look at. `adopt` swaps in the new keys with one assignment.
    """

    path: Path | None  # None: no key file
    salt: bytes = field(repr=False)
    digests: bool  # the file's lines are salted digests
    admin_labels: tuple[str, ...] = ()
    defaults: Options = field(default_factory=dict)
    refresh: float = 10.0  # seconds between two polls
    reloads: int = 0  # successful reads of the file
    failures: int = 0  # failed ones
    _keys: dict[bytes, Key] = field(default_factory=dict, repr=False)
    _signature: tuple[int, int, int] | None = None
    _again: bool = False  # read the file again even if it looks unchanged
    # The digest of a text without a final newline, and when it was first seen.
    _unfinished: tuple[bytes, float] | None = None
    _failed: bool = False
    _made: bool = False  # the only key is the one from `accept_only`
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
    ) -> "KeyStore":
        """Make one, without reading; without a salt, a random one is made for this run."""
        digests = bool(salt)
        salt = salt or secrets.token_bytes(32)
        return cls(path, salt, digests, admin_labels, defaults or {}, refresh)

    def __len__(self) -> int:
        """Return the number of keys, including expired ones."""
        return len(self._keys)

    def labels(self) -> frozenset[str]:
        """Return the labels in use."""
        return frozenset(key.label for key in self._keys.values() if key.label)

    def find(self, digest: bytes, now: float) -> Key | None:
        """Return the key with this salted digest, or None if there is none or it has expired.

        `now` is in seconds since 1970.
        """
        key = self._keys.get(digest)
        return None if key is None or (key.until is not None and now >= key.until) else key

    def expired(self, digest: bytes, now: float) -> bool:
        """Return true if the key with this salted digest has expired."""
        return digest in self._keys and self.find(digest, now) is None

    def accept_only(self, key: bytes, label: str) -> None:
        """Accept this one key until the file has keys."""
        digest = salted_digest(self.salt, key)
        made = make_key(digest, label.encode(), self.defaults)
        made = replace(made, admin=made.admin or label in self.admin_labels)
        self._keys, self._made = {digest: made}, True

    def poll(self) -> Parsed | OSError | float | None:
        """Read the file if its mtime, size or inode has changed; return None if not.

        Waits until the file has settled, since somebody may still be writing it. A last line
        without a newline may be half a key, so such a file is used only after `refresh` seconds
        without a change (at most `MAX_UNFINISHED`). Until then, returns the seconds after which
        to call `poll` again.
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
        if text[-1:] not in b"\r\n" and (seconds := self._unfinished_for(text, status)) > 0:
            return seconds
        return self._parse(text, status, in_slices=True)

    def _unfinished_for(self, text: bytes, status: os.stat_result) -> float:
        """Return how many more seconds the file, or at least its text, must stay unchanged."""
        now, mark = time.monotonic(), salted_digest(self.salt, text)
        if self._unfinished is None or self._unfinished[0] != mark:
            self._unfinished = mark, now
        age = max(time.time() - status.st_mtime, now - self._unfinished[1])
        return min(self.refresh, MAX_UNFINISHED) - age

    def reload(self) -> Parsed | OSError:
        """Read and parse the file at once. For the start, when no earlier keys could be lost."""
        if self.path is None:
            raise ValueError("there is no key file")
        try:
            return self._parse(*read_file(self.path), in_slices=False)
        except OSError as error:
            self._signature = None
            return error

    def _parse(self, text: bytes, status: os.stat_result, *, in_slices: bool) -> Parsed:
        read_at = time.time()
        parsed = parse(
            text,
            self.salt,
            digests=self.digests,
            admin_labels=self.admin_labels,
            defaults=self.defaults,
            in_slices=in_slices,
        )
        # Compare in the thread: with many keys it takes long.
        parsed.changed = parsed.keys.keys() != self._keys.keys() or any(
            self._keys[digest] != key for digest, key in slices(parsed.keys.items())
        )
        self._signature = _signature(status)
        self._again = read_at - status.st_mtime < CLOCK_TICK
        return parsed

    def adopt(self, result: Parsed | OSError) -> Iterator[tuple[int, str]]:
        """Use the result of `poll` or `reload`; yield log lines with their levels.

        If the file cannot be read, the last keys stay valid. If it is empty, no key is.
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


def read_settled(path: Path) -> tuple[bytes, os.stat_result]:
    """Read a key file after waiting until it has not changed for `SETTLE_TIME`."""
    deadline = time.monotonic() + MAX_UNSETTLED
    while True:
        text, status = read_file(path)
        age = time.time() - status.st_mtime
        # The mtime may be in the future: another host's clock may have set it.
        if abs(age) >= SETTLE_TIME or time.monotonic() > deadline:
            return text, status
        time.sleep(SETTLE_TIME - age)


def _signature(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_mtime_ns, status.st_size, status.st_ino


def shorten(reports: Sequence[str]) -> list[str]:
    """Return the first `MAX_REPORTED` reports, and one that counts the rest."""
    more = len(reports) - MAX_REPORTED
    return [*reports[:MAX_REPORTED], *([f"has {more} more such lines"] if more > 0 else [])]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    from access import keytool  # here, because the server does not need it

    return keytool.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
