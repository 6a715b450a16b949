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

MAX_WRONG = 10  # wrong keys that one address may try in a window
WRONG_WINDOW = 60.0  # seconds
MAX_ADDRESSES = 10_000  # addresses that are remembered for it
MIN_SECRET = 8  # bytes of a credential that are looked for within other headers

NO_SCHEME = b"\n"  # in place of a digest: an Authorization header without a scheme

_KEY_HEADERS = (b"apikey", b"x-api-key", b"api-key", b"authorization")  # in the order of search
_KEY_PATH = re.compile(rb"/key/([^/]*)(/.*|)", re.DOTALL)
_BASIC = re.compile(rb"basic +([A-Za-z0-9+/=]+) *", re.IGNORECASE)
_BARE = re.compile(rb"(?!(?:bearer|basic)\Z)\S+", re.IGNORECASE)
_BEARER = re.compile(rb"bearer +(.*)", re.IGNORECASE | re.DOTALL)

Pair = tuple[bytes, bytes]


def new_key() -> str:
    """Make a key: 192 random bits, safe in a URL and in a shell."""
    return secrets.token_urlsafe(24)


def salted_digest(salt: bytes, key: bytes) -> bytes:
    """Return the 32 bytes of SHA-256 over salt and key."""
    return hashlib.sha256(salt + key).digest()


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
