"""HTTP/1.1 messages: strict heads and their framing, for clients and upstream.

Every head must match a strict grammar on its raw bytes before h11 parses it, because h11
accepts more than a proxy may: two lengths that agree, Content-Length beside
Transfer-Encoding, bare LF, obs-fold. A head that is known, byte for byte, is not parsed again.

Everything here runs before the API key is checked, so the time to parse a head grows
linearly with its size: no two neighbouring parts of a pattern match the same byte.
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
"""Removes credentials from a head: returns their digests, and the path and headers without them."""

MAX_KNOWN_HEADS = 1024  # heads remembered, for each side
MAX_KNOWN_HEAD = 2048  # bytes of a head that is remembered; few are longer
MAX_FRAMED = 256  # response heads remembered
MAX_FIELDS = 100  # header fields in a head, or trailers; as in Apache
MAX_LENGTH_DIGITS = 18  # digits of a body's length; nobody sends 10**18 bytes

# RFC 9110 section 7.6.1, and Proxy-Connection, which some clients still send.
HOP_BY_HOP = frozenset(
    b"connection proxy-connection keep-alive te trailer transfer-encoding upgrade".split()
)

# The headers of upstream's responses that clients get. Everything else stops here: headers that
# are about OllProx's own address (Location, Alt-Svc, Set-Cookie, Access-Control-*, ...), about
# credentials, or about one connection. Error and rate-limit headers are those that the openai
# and anthropic clients read.
_PASSED_ON = frozenset(
    b"cache-control content-encoding content-language content-type date openai-processing-ms"
    b" retry-after retry-after-ms x-should-retry".split()
)
_PASSED_ON_PREFIXES = (b"x-ratelimit-", b"anthropic-ratelimit-")
# Of those, what is still true when the response is sent again later.
_STORED = frozenset(b"cache-control content-encoding content-language content-type date".split())
TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
# RFC 9112 sections 3 and 5: CRLF only, origin-form, no obs-fold, no NUL or other control.
_REQUEST_LINE = re.compile(rb"(%b) (/[!\"$-~]*) HTTP/1\.([01])" % TOKEN)
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: [\t\x20-\x7e\x80-\xff]*)?")
# No pattern may have two ways to match the same spaces: it would backtrack, in quadratic time.
FIELD_LINE = re.compile(rb"(%b):([\t\x20-\x7e\x80-\xff]*)" % TOKEN)
_HOST = re.compile(rb"(?:[\w.~!$&'()*+,;=%-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?", re.ASCII)
_DIGITS = re.compile(rb"[0-9]+")
# Bytes that no head contains at that place, whatever follows.
_NOT_A_HEAD = re.compile(rb"\A[^!#$%&'*+\-.^_`|~0-9A-Za-z\r]|(?<!\r)\n|\r(?!\n|\Z)|\x00")


class HTTPError(Exception):
    """An error to be sent as the response to a request.

    The message is shown to the client. It says what is wrong and how to fix it, and quotes
    neither keys nor header lines.

    Args:
        status: the response's status.
        message: for people.
        headers: additional headers of the response.
        body: sent unchanged instead of a rendered message.
        kind: the kind of upstream's error, such as `timeout`; a label of a metric.

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
    """A malformed head or body framing; the connection is closed after the error is sent."""


class Truncated(Exception):
    """A body stopped before its end; the client's copy must not look complete."""


@dataclass(frozen=True, slots=True)
class Head:
    """A request's head, without any credential.

    `credentials` are the salted digests of the keys that were sent, in the order to try them.
    `length` is the declared length of the body in bytes, None if none was declared. `has_body` is
    True if bytes of a body follow. `names` are the names of the headers.
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
    basic: bool = False  # a key came as a Basic password, which browsers attach automatically

    def get(self, name: bytes) -> bytes | None:
        """Return a header's values, joined by commas; None if the head does not have it."""
        if name not in self.names:
            return None
        values = [value for other, value in self.headers if other == name]
        return b", ".join(values)


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """A response's head; `headers` are those that clients get, in their order and case.

    `length` is in bytes, None if chunks or the connection's close delimit the body. `storable`
    is False if the response is meant for one client. `location` is where a redirect leads, and
    `server` is what upstream calls itself; clients get neither.
    """

    status: int
    headers: Headers
    length: int | None
    chunked: bool
    keep_alive: bool
    storable: bool = True
    location: bytes = b""
    server: bytes = b""


@dataclass(slots=True)
class Response:
    """A response to a client or from upstream; its body is complete or a stream.

    `headers` are end-to-end headers without Content-Length. `length` is the length of a
    body that is a stream, in bytes, if it is known. `release` is called once the response was
    sent, or could not be sent. `storable` is False if upstream's response is meant
    for one client: it has a cookie, or says `private` or `no-store`. `server` is what upstream
    calls itself, for the operator. `born` is when the answer was generated, in seconds since
    1970, if it was kept somewhere; None if it is new. `cache_status` is what another cache on
    the way says of it (a member of `Cache-Status`, RFC 9211).
    """

    status: int
    headers: Headers
    body: bytes | AsyncIterator[bytes]
    length: int | None = None
    release: Callable[[], None] | None = None
    storable: bool = True
    server: bytes = b""
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


@dataclass(slots=True)
class Ask:
    """A request to upstream, with everything that an exchange needs to know.

    `headers` are end-to-end headers without Host and length. For an upload `body` is an iterator:
    it can be sent only once, in chunks unless `length` is known. `model` is the normalized name,
    empty if no model is needed. `whole_wanted` returns True while a reader waits for the fold:
    then the flight, not upstream, ends silences that are too long. `ticket` is the request's
    place in the queue, None if it takes no turn. `lookup` is None if only a new answer will do.
    """

    method: bytes
    target: bytes
    headers: Headers
    body: bytes | AsyncIterator[bytes] = b""
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
    """A request to OllProx: its head, and its body on demand."""

    head: Head

    async def read(self, limit: int) -> bytes:
        """Return the complete body. Raises HTTPError 413 if it is larger than `limit` bytes."""

    def pieces(self, limit: int = sys.maxsize) -> AsyncIterator[bytes]:
        """Yield the body as it arrives. Raises HTTPError: 413 it is larger than `limit` bytes."""


M = TypeVar("M", Head, ResponseHead)


class KnownHeads(Generic[M]):
    """Parses heads, each distinct one only once.

    Known heads are found by all their bytes: without any part of them, one request could get
    another's length or key. The bytes of a secret head are not kept, only their SHA-256. In
    Python's development mode, which the tests use, known heads are parsed again and compared.
    """

    def __init__(
        self, parse: Callable[[bytes], M], *, secret: bool = True, check: bool = sys.flags.dev_mode
    ) -> None:
        self._parse: Callable[[bytes], M] = parse
        self._secret = secret
        self._check = check
        self._known: dict[bytes, M] = {}

    def __call__(self, raw: bytes) -> M:
        """Return the parsed head. Raises BadHead."""
        index = hashlib.sha256(raw).digest() if self._secret else raw
        head = self._known.get(index)
        if head is None:
            head = self._parse(raw)
            if len(raw) > MAX_KNOWN_HEAD:
                return head
            if len(self._known) >= MAX_KNOWN_HEADS:
                del self._known[next(iter(self._known))]
            self._known[index] = head
        elif self._check:
            assert head == self._parse(raw), "a known head differs"
        return head


def cannot_be_head(start: bytes | bytearray, checked: int = 0) -> bool:
    """Return True if no head can begin with `start`; its first `checked` bytes are checked."""
    return _NOT_A_HEAD.search(start, max(0, checked - 1)) is not None


def parse_request_head(raw: bytes, take_credential: TakeCredential) -> Head:
    """Parse a request's head, including the empty line at its end.

    Raises:
        BadHead: 400 it does not match the strict grammar, or h11 refuses it; 413 the declared
            length is absurd; 417 an unknown expectation; 431 more than MAX_FIELDS fields.

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
        raise BadHead(417, "the only supported value of Expect is 100-continue")
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
        headers=_passed_on(tuple(event.headers.raw_items()), tokens),
        length=length,
        chunked=chunked,
        keep_alive=b"close" not in tokens and (match[1] == b"1" or b"keep-alive" in tokens),
        storable=_is_storable(pairs),
        location=_first(pairs, b"location"),
        server=_first(pairs, b"server"),
    )


def _passed_on(headers: Headers, hop_by_hop: set[bytes]) -> Headers:
    """Return the headers that clients get, without those that `Connection` names."""
    kept = []
    for name, value in headers:
        lower = name.lower()
        if lower in hop_by_hop:
            continue
        if lower in _PASSED_ON or lower.startswith(_PASSED_ON_PREFIXES):
            kept.append((name, value))
    return tuple(kept)


def _first(pairs: Pairs, wanted: bytes) -> bytes:
    """Return the first value of a header; empty if there is none."""
    return next((value for name, value in pairs if name == wanted), b"")


def _is_storable(pairs: Pairs) -> bool:
    """Return True if a response may be sent to other clients (RFC 9111 section 3).

    `no-cache` does not count: Ollama says it on its event streams, to browsers.
    """
    directives = {token.partition(b"=")[0].strip() for token in _tokens(pairs, b"cache-control")}
    personal = directives & {b"private", b"no-store"}
    return not personal and all(name != b"set-cookie" for name, _ in pairs)


@lru_cache(maxsize=MAX_FRAMED)
def stored_headers(headers: Headers) -> Headers:
    """Return the headers that a stored answer keeps: those that are still true later."""
    return tuple(pair for pair in headers if pair[0].lower() in _STORED)


def _split(raw: bytes) -> tuple[bytes, Pairs]:
    """Split a head into its first line and its fields, with names in lower case."""
    first, *lines = raw[:-4].split(b"\r\n")
    if len(lines) > MAX_FIELDS:
        raise BadHead(431, f"the head has more than {MAX_FIELDS} header fields")
    pairs = []
    for line in lines:
        if (match := FIELD_LINE.fullmatch(line)) is None:
            raise BadHead(400, "a header line is not `Name: value`")
        pairs.append((match[1].lower(), match[2].strip(b"\t ")))
    return first, pairs


def _check_host(pairs: Pairs, minor: bytes) -> None:
    hosts = [value for name, value in pairs if name == b"host"]
    if len(hosts) > 1 or (not hosts and minor == b"1"):
        raise BadHead(400, "a request needs exactly one Host header")
    if hosts and not _HOST.fullmatch(hosts[0]):
        raise BadHead(400, "the Host header is not a host name")


def _framing(pairs: Pairs, minor: bytes) -> tuple[int | None, bool]:
    """Return the body's declared length, and whether it is chunked (RFC 9112 section 6)."""
    lengths = [value for name, value in pairs if name == b"content-length"]
    codings = [value.lower() for name, value in pairs if name == b"transfer-encoding"]
    if lengths and codings:
        raise BadHead(400, "Content-Length and Transfer-Encoding exclude each other")
    if codings and (codings != [b"chunked"] or minor == b"0"):
        raise BadHead(400, "the only Transfer-Encoding is chunked, once, in HTTP/1.1")
    if not lengths:
        return None, bool(codings)
    if len(lengths) > 1 or not _DIGITS.fullmatch(lengths[0]):
        raise BadHead(400, "Content-Length must be one number of digits only")
    digits = lengths[0].lstrip(b"0") or b"0"
    if len(digits) > MAX_LENGTH_DIGITS:
        raise BadHead(413, "the declared Content-Length is larger than any body")
    return int(digits), False


def _tokens(pairs: Pairs | Headers, wanted: bytes) -> set[bytes]:
    """Return the members of a list header, in lower case."""
    values = [value.lower() for name, value in pairs if name.lower() == wanted]
    return {token.strip(b"\t ") for value in values for token in value.split(b",")}


def end_to_end(headers: Headers, *, without: frozenset[bytes] = frozenset()) -> Headers:
    """Return the headers without hop-by-hop ones, the body's length, and those in `without`.

    RFC 9110 section 7.6.1: the hop-by-hop headers and whatever `Connection` names.
    """
    dropped = HOP_BY_HOP | {b"content-length"} | without | _tokens(headers, b"connection")
    return tuple(pair for pair in headers if pair[0].lower() not in dropped)


_REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}


@lru_cache(maxsize=MAX_FRAMED)
def frame_start(status: int, headers: Headers, date: bytes) -> bytes:
    """Serialize the start of a response's head, with a Date unless `headers` have one."""
    lines = [b"HTTP/1.1 %d %b\r\n" % (status, _REASONS.get(status, b"Unknown"))]
    if not any(name.lower() == b"date" for name, _ in headers):
        lines.append(b"Date: %b\r\n" % date)
    return b"".join(lines) + frame_headers(headers)


@lru_cache(maxsize=MAX_FRAMED)
def frame_headers(headers: Headers) -> bytes:
    """Serialize headers, each followed by CRLF."""
    return pack(headers) + b"\r\n" if headers else b""


def pack(headers: Headers) -> bytes:
    """Serialize headers as one bytes object, which takes a fraction of their memory."""
    return b"\r\n".join([b"%b: %b" % pair for pair in headers])


@lru_cache(maxsize=MAX_FRAMED)
def unpack(packed: bytes) -> Headers:
    """Return the headers that `pack` serialized."""
    lines = packed.split(b"\r\n") if packed else []
    return tuple((name, value) for name, _, value in (line.partition(b": ") for line in lines))


def frame_request(
    method: bytes, target: bytes, headers: Headers, length: int | None, *, chunked: bool = False
) -> bytes:
    """Serialize a request's head; `length` is the body's, None if there is none or chunked."""
    lines = [b"%b %b HTTP/1.1" % (method, target)]
    lines += [b"%b: %b" % pair for pair in headers]
    if chunked:
        lines.append(b"Transfer-Encoding: chunked")
    elif length is not None:
        lines.append(b"Content-Length: %d" % length)
    return b"\r\n".join(lines) + b"\r\n\r\n"
