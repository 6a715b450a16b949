"""HTTP/1.1 messages: strict heads, bodies and their framing, for either side.

Every head must match a strict grammar on its raw bytes before h11 parses it, since h11
lets through more than a proxy may: two lengths that agree, Content-Length beside
Transfer-Encoding, bare LF, obs-fold. Chunked bodies are decoded here for the same reason
(h11 takes `3 ` for a chunk size). A head seen before, byte for byte, is not parsed again.
"""

import hashlib
import re
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from typing import Generic, Protocol, TypeVar

import h11

Headers = tuple[tuple[bytes, bytes], ...]
"""Pairs of name and value, in order; a request's names are in lower case."""

Pairs = list[tuple[bytes, bytes]]

TakeCredential = Callable[[bytes, Pairs], tuple[tuple[bytes, ...], bytes, Pairs]]
"""Takes the credentials out of a head's path and headers: their digests, and what is left."""

MAX_KNOWN_HEADS = 1024  # heads remembered, for each side
MAX_KNOWN_HEAD = 2048  # bytes of a head that is remembered; few are longer
MAX_FRAMED = 256  # response heads remembered

# RFC 9110 section 7.6.1, and Proxy-Connection, which some clients still send.
HOP_BY_HOP = frozenset(
    b"connection proxy-connection keep-alive te trailer transfer-encoding upgrade".split()
)

_OURS = frozenset({b"x-request-id"})  # which each response gets anew
TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
# RFC 9112 sections 3 and 5: CRLF only, origin-form, no obs-fold, no NUL or other control.
_REQUEST_LINE = re.compile(rb"(%b) (/[!\"$-~]*) HTTP/1\.([01])" % TOKEN)
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: [\t\x20-\x7e\x80-\xff]*)?")
FIELD_LINE = re.compile(rb"(%b):[\t ]*([\t\x20-\x7e\x80-\xff]*)" % TOKEN)
_HOST = re.compile(rb"(?:[\w.~!$&'()*+,;=%-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?", re.ASCII)
_LENGTH = re.compile(rb"[0-9]{1,18}")
# What can be told to be wrong before a head's end has come.
_HOPELESS = re.compile(rb"\A[^!#$%&'*+\-.^_`|~0-9A-Za-z\r]|(?<!\r)\n|\r(?!\n|\Z)|\x00")


class HTTPError(Exception):
    """A request that is answered with an error.

    Its message is shown to the client: it says what is wrong and what would be right, and
    quotes neither keys nor header lines.

    Args:
        status: the status to answer with.
        message: for a person.
        headers: further headers of the answer.
        body: sent as it is in place of a rendered message.
        kind: what upstream did, in a word, to be counted by.

    """

    def __init__(
        self,
        status: int,
        message: str,
        headers: Headers = (),
        body: bytes | None = None,
        kind: str = "",
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.status = status
        self.message = message
        self.headers = headers
        self.body = body


class BadHead(HTTPError):
    """Bytes that are no head as this proxy takes them; the connection ends with it."""


class Truncated(Exception):
    """A body that has ended before its end; what was sent of it must not look whole."""


@dataclass(frozen=True, slots=True)
class Head:
    """A request's head, without any credential.

    `credentials` are the salted digests of the keys that were presented, in the order in which
    they are to be tried; `keystore.take_credential` makes them.
    `length` is the declared length of the body in bytes, None where none is declared;
    `has_body` says whether bytes of it follow. `names` are those of the headers.
    """

    method: bytes
    path: bytes
    query: bytes
    headers: Headers
    credentials: tuple[bytes, ...]
    length: int | None
    chunked: bool
    keep_alive: bool
    expects_continue: bool
    http10: bool
    has_body: bool
    names: frozenset[bytes]
    basic: bool = False  # a credential is a password of Basic, which browsers attach themselves

    def get(self, name: bytes) -> bytes | None:
        """Return the values of a header, joined by commas; None where it is not there."""
        if name not in self.names:
            return None
        values = [value for other, value in self.headers if other == name]
        return b", ".join(values)


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """A response's head; of its headers the end-to-end ones, in their order and case.

    `length` is None where chunks or the connection's close delimit the body.
    """

    status: int
    headers: Headers
    length: int | None
    chunked: bool
    keep_alive: bool


@dataclass(slots=True)
class Response:
    """A response to a client, or one of upstream's; its body is whole or a stream.

    `headers` are end-to-end headers without Content-Length. `length` is the length of a
    body that comes as a stream, in bytes, where it is known. `release` is called once the
    response was sent, or could not be. `born` is when the answer was generated, in seconds since
    1970, if it was kept somewhere; None if it is new. `cache_status` is what another cache on
    the way says of it (a member of `Cache-Status`, RFC 9211).
    """

    status: int
    headers: Headers
    body: bytes | AsyncIterator[bytes]
    length: int | None = None
    release: Callable[[], None] | None = None
    born: float | None = None
    cache_status: bytes = b""


def _nobody() -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Lookup:
    """Which kept answer may be given in place of a new one.

    `cache_key` identifies it, with its scope. It may be `max_age` seconds old. If there is none,
    `refusal` is raised, unless it is None: then a new answer is made.
    """

    cache_key: bytes
    max_age: float
    refusal: HTTPError | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """A request to upstream, with all that whoever carries it out needs to know.

    `headers` are end-to-end headers without Host and length. `body` is encoded only when it is
    sent, so that a request that waits holds its prompt once; an upload is an iterator instead,
    is sent once, and in chunks unless `length` is known. `model` is the normalized name, empty
    if no model is needed. `whole_wanted` returns True while somebody waits for the answer as a
    whole: then a silence in its middle is for the asker to judge. `lookup` is None if only a new
    answer will do.
    """

    method: bytes
    target: bytes
    headers: Headers
    body: Callable[[], bytes] | AsyncIterator[bytes] = bytes
    length: int | None = None
    model: str = ""
    ticket: AbstractAsyncContextManager[object] | None = None
    whole_wanted: Callable[[], bool] = _nobody
    lookup: Lookup | None = None


Exchange = Callable[[Ask], AbstractAsyncContextManager[Response]]
"""Carries out a request; leaving the block before the body's end aborts it.

Exchanges are put around one another: `fair_queue(upstream.exchange)` is one too.
"""


class Request(Protocol):
    """A request to the proxy: its head, and its body on demand."""

    head: Head

    async def read(self, limit: int) -> bytes:
        """Read the whole body, of `limit` bytes at most. Raises HTTPError 413."""

    def pieces(self) -> AsyncIterator[bytes]:
        """Read the body, of any size, as it comes."""


M = TypeVar("M", Head, ResponseHead)


class KnownHeads(Generic[M]):
    """Parse heads, each distinct one once.

    The table's index is the SHA-256 of the whole head: leaving out any part of it would
    let one request take another's length or key. In Python's development mode, as the tests
    have it, each head is parsed all the same, and what is known must be equal.
    """

    def __init__(self, parse: Callable[[bytes], M], *, check: bool = sys.flags.dev_mode) -> None:
        self._parse: Callable[[bytes], M] = parse
        self._check = check
        self._known: dict[bytes, M] = {}

    def __call__(self, raw: bytes) -> M:
        """Return the parsed head. Raises BadHead."""
        index = hashlib.sha256(raw).digest()
        head = self._known.get(index)
        if head is None:
            head = self._parse(raw)
            if len(raw) > MAX_KNOWN_HEAD:
                return head
            if len(self._known) >= MAX_KNOWN_HEADS:
                del self._known[next(iter(self._known))]
            self._known[index] = head
        elif self._check:
            assert head == self._parse(raw), "a known head is another one"
        return head


def hopeless(start: bytes | bytearray, checked: int = 0) -> bool:
    """Whether an unfinished head, fine for `checked` bytes, cannot become a good one."""
    return _HOPELESS.search(start, max(0, checked - 1)) is not None


def parse_request_head(raw: bytes, take_credential: TakeCredential) -> Head:
    """Parse a request's head, which ends in an empty line.

    Raises:
        BadHead: it does not match the strict grammar, or h11 refuses it.

    """
    first, pairs = _split(raw)
    match = _REQUEST_LINE.fullmatch(first)
    if match is None:
        raise BadHead(400, "the request line is not METHOD /path HTTP/1.1")
    method, target, minor = match.groups()
    if method in {b"CONNECT", b"TRACE"}:
        raise BadHead(400, f"OllProx does not serve {method.decode()}")
    _check_host(pairs, minor)
    length, chunked = _framing(pairs, minor)
    try:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=len(raw) + 1)
        connection.receive_data(raw)
        event = connection.next_event()
    except h11.RemoteProtocolError:
        raise BadHead(400, "the request's head is malformed") from None  # h11 quotes it
    if not isinstance(event, h11.Request):
        raise BadHead(400, "the request's head is malformed")
    connection_tokens = _tokens(pairs, b"connection")
    expect = next((value.lower() for name, value in pairs if name == b"expect"), None)
    if expect not in {None, b"100-continue"}:
        raise BadHead(417, "the only expectation that OllProx meets is 100-continue")
    path, _, query = target.partition(b"?")
    credentials, path, headers = take_credential(path, list(event.headers))
    return Head(
        method=method,
        path=path,
        query=query,
        headers=tuple(headers),
        credentials=credentials,
        length=length,
        chunked=chunked,
        keep_alive=b"close" not in connection_tokens
        and (minor == b"1" or b"keep-alive" in connection_tokens),
        expects_continue=expect is not None and minor == b"1",
        http10=minor == b"0",
        has_body=chunked or bool(length),
        names=frozenset(name for name, _ in headers),
        basic=any(n == b"authorization" and v[:6].lower() == b"basic " for n, v in pairs),
    )


def parse_response_head(raw: bytes) -> ResponseHead:
    """Parse a response's head, which ends in an empty line; to the same grammar.

    Raises:
        BadHead: it does not match the strict grammar, or h11 refuses it.

    """
    first, pairs = _split(raw)
    match = _STATUS_LINE.fullmatch(first)
    if match is None:
        raise BadHead(502, "its status line is malformed")
    length, chunked = _framing(pairs, match[1])
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=len(raw) + 1)
    connection.send(h11.Request(method="GET", target="/", headers=[("Host", "-")]))
    connection.send(h11.EndOfMessage())
    try:
        connection.receive_data(raw)
        event = connection.next_event()
    except h11.RemoteProtocolError:
        raise BadHead(502, "its head is malformed") from None
    if not isinstance(event, h11.Response | h11.InformationalResponse):
        raise BadHead(502, "its head is malformed")
    tokens = _tokens(pairs, b"connection")
    return ResponseHead(
        status=event.status_code,
        headers=end_to_end(tuple(event.headers.raw_items()), without=_OURS),
        length=length,
        chunked=chunked,
        keep_alive=b"close" not in tokens and (match[1] == b"1" or b"keep-alive" in tokens),
    )


def _split(raw: bytes) -> tuple[bytes, Pairs]:
    """Split a head into its first line and its fields, with names in lower case."""
    first, *lines = raw[:-4].split(b"\r\n")
    pairs = []
    for line in lines:
        if (match := FIELD_LINE.fullmatch(line)) is None:
            raise BadHead(400, "a header line is not `Name: value`")
        pairs.append((match[1].lower(), match[2].rstrip(b"\t ")))
    return first, pairs


def _check_host(pairs: Pairs, minor: bytes) -> None:
    hosts = [value for name, value in pairs if name == b"host"]
    if len(hosts) > 1 or (not hosts and minor == b"1"):
        raise BadHead(400, "a request has exactly one Host header")
    if hosts and not _HOST.fullmatch(hosts[0]):
        raise BadHead(400, "the Host header names no host")


def _framing(pairs: Pairs, minor: bytes) -> tuple[int | None, bool]:
    """Tell the body's length and whether it is chunked (RFC 9112 section 6)."""
    lengths = [value for name, value in pairs if name == b"content-length"]
    codings = [value.lower() for name, value in pairs if name == b"transfer-encoding"]
    if lengths and codings:
        raise BadHead(400, "Content-Length and Transfer-Encoding exclude each other")
    if codings and (codings != [b"chunked"] or minor == b"0"):
        raise BadHead(400, "the only Transfer-Encoding is chunked, once, in HTTP/1.1")
    if lengths and (len(lengths) > 1 or not _LENGTH.fullmatch(lengths[0])):
        raise BadHead(400, "Content-Length is one number of digits alone")
    return (int(lengths[0]) if lengths else None), bool(codings)


def _tokens(pairs: Pairs | Headers, wanted: bytes) -> set[bytes]:
    """Return the members of a list header, in lower case."""
    values = [value for name, value in pairs if name.lower() == wanted]
    return {token.strip(b"\t ").lower() for value in values for token in value.split(b",")}


def end_to_end(headers: Headers, *, without: frozenset[bytes] = frozenset()) -> Headers:
    """Drop the headers that are for one connection alone, the body's length, and `without`.

    RFC 9110 section 7.6.1: the hop-by-hop headers and whatever `Connection` names.
    """
    dropped = HOP_BY_HOP | {b"content-length"} | without | _tokens(headers, b"connection")
    return tuple(pair for pair in headers if pair[0].lower() not in dropped)


_REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}


@lru_cache(maxsize=MAX_FRAMED)
def frame_start(status: int, headers: Headers, date: bytes) -> bytes:
    """Write a response's first lines, with a Date unless `headers` have one."""
    lines = [b"HTTP/1.1 %d %b\r\n" % (status, _REASONS.get(status, b"Unknown"))]
    if not any(name.lower() == b"date" for name, _ in headers):
        lines.append(b"Date: %b\r\n" % date)
    return b"".join(lines) + frame_headers(headers)


@lru_cache(maxsize=MAX_FRAMED)
def frame_headers(headers: Headers) -> bytes:
    """Write headers, each with its line's end."""
    return pack(headers) + b"\r\n" if headers else b""


def pack(headers: Headers) -> bytes:
    """Write headers as one object, which takes a fraction of their memory."""
    return b"\r\n".join([b"%b: %b" % pair for pair in headers])


@lru_cache(maxsize=MAX_FRAMED)
def unpack(packed: bytes) -> Headers:
    """Read what `pack` has written."""
    lines = packed.split(b"\r\n") if packed else []
    return tuple((name, value) for name, _, value in (line.partition(b": ") for line in lines))


def frame_request(
    method: bytes, target: bytes, headers: Headers, length: int | None, *, chunked: bool = False
) -> bytes:
    """Write a request's head, for a body of so many bytes, in chunks, or for none."""
    lines = [b"%b %b HTTP/1.1" % (method, target)]
    lines += [b"%b: %b" % pair for pair in headers]
    if chunked:
        lines.append(b"Transfer-Encoding: chunked")
    elif length is not None:
        lines.append(b"Content-Length: %d" % length)
    return b"\r\n".join(lines) + b"\r\n\r\n"
