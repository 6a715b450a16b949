"""Find API keys in a request's head, and count wrong ones."""

import base64
import contextlib
import hashlib
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from urllib.parse import unquote_to_bytes

MAX_WRONG = 10  # wrong keys per address and window
WRONG_WINDOW = 60.0  # seconds
MAX_ADDRESSES = 10_000  # addresses that are counted
MAX_PATH_KEY = 4096  # bytes of a key in the path that are decoded
MIN_SECRET = 8  # bytes; a shorter credential may be part of another header's value by chance

NO_SCHEME = b"\n"  # stands in for a digest if Authorization has no scheme

_KEY_HEADERS = (b"apikey", b"x-api-key", b"api-key", b"authorization")  # tried in this order
_KEY_PATH = re.compile(rb"/key/([^/]*)(/.*|)", re.DOTALL)
_BASIC = re.compile(rb"basic +([A-Za-z0-9+/=]+) *", re.IGNORECASE)
_BARE = re.compile(rb"(?!(?:bearer|basic)\Z)\S+", re.IGNORECASE)
_BEARER = re.compile(rb"bearer +(.*)", re.IGNORECASE | re.DOTALL)

Pair = tuple[bytes, bytes]


def new_key() -> str:
    """Return a new random key: 192 bits, safe in a URL and in a shell."""
    return secrets.token_urlsafe(24)


def salted_digest(salt: bytes, key: bytes) -> bytes:
    """Return the SHA-256 of salt and key, 32 bytes."""
    return hashlib.sha256(salt + key).digest()


def take_credential(
    salt: bytes, in_path: bool, path: bytes, headers: Iterable[Pair]
) -> tuple[tuple[bytes, ...], bytes, list[Pair]]:
    """Find the credentials in a request's head, and remove them from it.

    Args:
        salt: of the digests.
        in_path: accept a key in the path. It is removed in any case.
        path: without the query.
        headers: with names in lower case.

    Returns:
        - The salted digests of the keys in the order to try them, at most one per place. If a
          header comes twice with different values, only a digest that matches no key. An
          Authorization header without a scheme adds `NO_SCHEME`.
        - The path without `/key/KEY`.
        - The headers without those that contain a key.

    """
    places: dict[bytes, set[bytes]] = {name: set() for name in (b"path", *_KEY_HEADERS)}
    secret: set[bytes] = set()  # must not be forwarded in any header
    if (match := _KEY_PATH.fullmatch(path)) is not None:
        path = match[2] or b"/"
        # Decoding many percent signs is slow, and no key is that long.
        key = unquote_to_bytes(match[1]) if len(match[1]) <= MAX_PATH_KEY else match[1]
        secret = {match[1], key}
        places[b"path"] = {key} if in_path else set()
    rest: list[Pair] = []
    for name, value in headers:
        if name not in _KEY_HEADERS:
            rest.append((name, value))
        elif value:
            places[name].add(value)
    for values in places.values():
        if len(values) > 1:  # a key contains no newline, so this matches none
            return (salted_digest(salt, b"\n".join(sorted(values))),), path, []
    keys = [_key_in(name, value) for name, values in places.items() for value in values]
    secret.update(keys, *(value.split()[-1:] for value in places[b"authorization"]))
    digests = [salted_digest(salt, key) if key != NO_SCHEME else key for key in keys if key]
    return tuple(dict.fromkeys(digests)), path, _without(rest, secret - {b"", NO_SCHEME})


def _key_in(name: bytes, value: bytes) -> bytes:
    """Return the key in a header, empty if there is none.

    With Basic (RFC 7617) the key is the password. An Authorization header that is a single word
    may be a key without its scheme: `NO_SCHEME`.
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
    """Return the headers that contain no secret.

    There are only a few secrets, so the time is linear in the head.
    """
    long = [word for word in secret if len(word) >= MIN_SECRET]
    short = secret.difference(long)
    return [
        (name, value)
        for name, value in headers
        if value not in short and not any(word in value for word in long)
    ]


class WrongKeys:
    """Count the wrong keys from each address, to slow down guessing.

    Valid keys are not affected, since many people may share one address.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tried: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def count(self, address: str) -> tuple[int, float]:
        """Count a wrong key; return the count in this window and the seconds until it ends."""
        now = self._clock()
        began, count = self._tried.pop(address, (now, 0))
        if now - began >= WRONG_WINDOW:
            began, count = now, 0
        self._tried[address] = began, count + 1
        if len(self._tried) > MAX_ADDRESSES:
            self._tried.popitem(last=False)
        return count + 1, began + WRONG_WINDOW - now
