"""Send requests to one Ollama server over persistent connections.

Upstream may have closed an idle connection. Then the request is sent once more on a new
connection, but only if no byte of a response has arrived.

The end of the connection ends a response without a length, so it matters how the connection ends:
only a FIN counts, or with TLS a close_notify (RFC 9112 section 9.8). A reset, or TLS without its
close_notify, truncates the response. Bytes that arrived before are still used.

A host that vanishes (power, cable, firewall) sends nothing. While OllProx waits for a response,
the kernel's keep-alive probes detect that; while a request is being sent, `sweep` detects that
nothing is acknowledged.
"""

import asyncio
import enum
import math
import re
import secrets
import socket
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any

from wire.bodies import (
    LAST_CHUNK,
    ChunkedDecoder,
    Decoder,
    LengthDecoder,
    frame_chunk,
    read_body,
)
from wire.dial import SILENCE, dial, silence, watch
from wire.http11 import (
    Ask,
    BadHead,
    Headers,
    HTTPError,
    KnownHeads,
    Response,
    ResponseHead,
    Truncated,
    cannot_be_head,
    frame_request,
    parse_response_head,
)

MAX_IDLE = 64  # connections kept for the next request
MAX_IDLE_TIME = 60.0  # seconds; Ollama never closes idle connections
MAX_HEAD = 64 << 10  # bytes of a response's head; Ollama's have about 120
READ_SIZE = 64 << 10  # bytes
MAX_INTERIM = 8  # 1xx heads before the response

# This process's name in Via (RFC 9110 section 7.6.3). It is random, so that one OllProx in front
# of another is not taken for a loop.
PSEUDONYM = b"OllProx-" + secrets.token_hex(8).encode()
VIA: Headers = ((b"Via", b"1.1 " + PSEUDONYM),)
_ASKED: Headers = ((b"Content-Type", b"application/json"), (b"Accept", b"*/*"))
FORWARDED: Headers = (*_ASKED, *VIA)

_BODILESS = frozenset({b"GET", b"HEAD"})  # methods that need no Content-Length: 0
_ORIGIN = re.compile(
    rb"(https?://(?:[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::\d{1,5})?)(?:[/?#].*)?"
)


def sent_by_us(via: bytes) -> bool:
    """Return True if our own name is in a Via header."""
    return any(member.split()[1:2] == [PSEUDONYM] for member in via.split(b","))


def add_via(via: bytes | None) -> Headers:
    """Return the Via header of a forwarded request: the earlier proxies, then us."""
    ((name, ours),) = VIA
    return ((name, b"%b, %b" % (via, ours)),) if via else VIA


def forwarded(via: bytes | None) -> Headers:
    """Return the headers of a cacheable request. Only Via is the client's, to detect loops."""
    return (*_ASKED, *add_via(via)) if via else FORWARDED


class NoAnswer(HTTPError):
    """Upstream sent no byte of a response, so another server may be asked instead.

    Its kind is `unreachable` if there was no connection or the host vanished, else `broken`.
    """


class End(enum.Enum):
    """How the bytes from upstream ended."""

    ORDERLY = "upstream closed the connection"
    BROKEN = "the connection was reset, or TLS ended without close_notify"
    UNANSWERED = "upstream's host has not acknowledged what was sent"
    VANISHED = "upstream's host has the request, but does not answer the kernel's probes"
    LATE = "one of our timeouts has passed"


_GONE = (End.UNANSWERED, End.VANISHED)


class State(enum.Enum):
    """Where a connection is in its exchange."""

    SENDING = "the request's body is being sent; a response may already have begun"
    RECEIVING = "the request is sent"


class _Stream(asyncio.StreamReader):
    """A stream reader that counts its bytes and knows how they ended."""

    fed = 0  # bytes received, read or not
    end: End | None = None

    def finish(self, end: End) -> None:
        """End the stream. Only the first end counts; earlier bytes can still be read."""
        if self.end is None:
            self.end = end
            super().feed_eof()

    def feed_eof(self) -> None:
        """Treat the end as broken, since asyncio calls this after an abort too."""
        self.finish(End.BROKEN)

    def set_exception(self, exc: BaseException) -> None:
        """End the stream after a connection error.

        A vanished host causes ETIMEDOUT, or EHOSTUNREACH if it was on our own network.
        """
        broken = isinstance(exc, ConnectionError | ssl.SSLError)
        self.finish(End.BROKEN if broken else End.VANISHED)

    def feed_data(self, data: Any) -> None:
        self.fed += len(data)
        if self.end is None:
            super().feed_data(data)


class _Protocol(asyncio.StreamReaderProtocol):
    """A stream protocol that distinguishes an orderly end from a truncation."""

    def __init__(self, stream: _Stream) -> None:
        super().__init__(stream)
        self._stream = stream
        self._tls: ssl.SSLObject | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._tls = transport.get_extra_info("ssl_object")

    def eof_received(self) -> bool | None:
        self._stream.finish(End.ORDERLY if self._is_closed_in_order() else End.BROKEN)
        return super().eof_received()

    def _is_closed_in_order(self) -> bool:
        """Return False for a FIN without close_notify; asyncio reports both in the same way."""
        if self._tls is None:
            return True
        try:
            return self._tls.read(1) == b""
        except ssl.SSLError:  # it needs more bytes, which cannot arrive
            return False


class _Connection:
    """One connection to upstream.

    Args:
        stream: reads from upstream.
        writer: writes to upstream.

    """

    def __init__(self, stream: _Stream, writer: asyncio.StreamWriter) -> None:
        self.stream = stream
        self.writer = writer
        self.buffer = bytearray()
        self.state = State.RECEIVING
        self.idle_since = 0.0
        self.deadline = math.inf  # for the next bytes, on the monotonic clock
        self.sent = 0.0  # when bytes were last sent, on the monotonic clock
        self.patience: float = SILENCE  # seconds for which they may stay unacknowledged
        self.whole_wanted: Callable[[], bool] | None = None  # see `Ask`; while a body is read
        self._taken = 0  # bytes read from the stream
        self._socket: socket.socket | None = writer.get_extra_info("socket")

    def is_usable(self) -> bool:
        """Return True if the connection is open and no unexpected byte has arrived."""
        return (
            self.stream.end is None
            and not self.buffer
            and self.stream.fed == self._taken
            and not self.writer.is_closing()
            and time.monotonic() - self.idle_since < MAX_IDLE_TIME
        )

    def write(self, data: bytes) -> None:
        """Queue bytes to be sent."""
        self.sent = time.monotonic()
        self.writer.write(data)

    async def more(self) -> bool:
        """Wait for bytes and add them to the buffer; False if the stream has ended."""
        data = await self.stream.read(READ_SIZE)
        self._taken += len(data)
        self.buffer += data
        return bool(data)

    def is_unanswered(self, now: float) -> bool:
        """Return True if sent bytes have stayed unacknowledged for too long."""
        if self._socket is None or self.writer.is_closing() or now - self.sent < self.patience:
            return False
        return silence(self._socket) >= self.patience

    def watch_host(self, *, uploads: bool) -> None:
        """Make the kernel detect that upstream's host has vanished; see `dial.watch`."""
        if self._socket is not None and not self.writer.is_closing():
            watch(self._socket, uploads=uploads)

    def drop(self) -> None:
        """Abort the connection."""
        self.writer.transport.abort()

    async def abort(self) -> None:
        """Abort the connection, so that Ollama stops generating, and wait for that."""
        self.drop()
        with suppress(OSError):  # of the stream
            await self.writer.wait_closed()


class Upstream:
    """One Ollama server.

    Args:
        host: its name or IP address.
        port: its port.
        address: both, as in a URL; sent as `Host` and shown in errors.
        connect_timeout: seconds to connect.
        first_byte_timeout: seconds until a response's head is complete.
        idle_timeout: seconds between two pieces of a response.
        tls: verifies its certificate; None for plain HTTP.
        authorization: the value of the `Authorization` header; empty for none.

    """

    def __init__(
        self,
        host: str,
        port: int,
        address: str,
        *,
        connect_timeout: float,
        first_byte_timeout: float,
        idle_timeout: float,
        tls: ssl.SSLContext | None = None,
        authorization: bytes = b"",
    ) -> None:
        self.address = address
        self._host = host
        self._port = port
        self._connect_timeout = connect_timeout
        self._first_byte_timeout = first_byte_timeout
        self._idle_timeout = idle_timeout
        self._tls = tls
        self._host_header = (b"Host", address.encode())
        self._authorization = authorization
        self.requests = 0  # sent so far, including each retry
        self._idle: list[_Connection] = []
        self._waiting: set[_Connection] = set()  # with a request under way
        self._failures = _Failures(self)
        self._parse = KnownHeads(parse_response_head, secret=False)

    def exchange(self, ask: Ask) -> "_Exchange":
        """Send a request; `async with` returns the response. Read its body inside the block.

        Leaving the block before the body's end aborts the connection, which makes Ollama stop
        generating.

        Raises:
            HTTPError: 502 not reachable, not HTTP, closed early, a redirect, or upstream
                requires credentials; 504 too slow. The block raises these too: what reading
                the body raises is translated on leaving it.

        """
        headers = (self._host_header, *ask.headers)
        return _Exchange(self, ask, self._authorized(headers) if self._authorization else headers)

    def _authorized(self, headers: Headers) -> Headers:
        """Return the headers with upstream's credentials in place of any others."""
        others = (pair for pair in headers if pair[0].lower() != b"authorization")
        return (*others, (b"Authorization", self._authorization))

    def sweep(self) -> None:
        """Drop connections that upstream has closed, and end waits that take too long.

        Call it once a second. Checking all deadlines together costs less than many timers.
        """
        for connection in [c for c in self._idle if not c.is_usable()]:
            self._idle.remove(connection)
            connection.drop()
        now = time.monotonic()
        for connection in self._waiting:
            if connection.whole_wanted is not None and connection.whole_wanted():
                # The flight times these silences; a reader of lines has the full timeout after.
                connection.deadline = max(connection.deadline, now + self._idle_timeout)
            if connection.deadline < now:
                connection.stream.finish(End.LATE)
            elif connection.is_unanswered(now):
                connection.stream.finish(End.UNANSWERED)
                self._drop_idle()  # they are to the same host

    async def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            await self._idle.pop().abort()

    async def send(self, message: bytes) -> tuple[_Connection, ResponseHead]:
        """Send a request and wait for the response's head."""
        if (kept := self._take()) is not None:
            # Less than the full timeout, because the check runs once a second.
            kept.patience = min(0.8 * self._connect_timeout, SILENCE)
            try:
                return kept, await self._try(kept, message)
            except _Stale as stale:
                if stale.end is End.VANISHED:  # it has received the request and may have worked
                    raise self._closed(stale.end) from None
        fresh = await self._connect()
        try:
            return fresh, await self._try(fresh, message)
        except _Stale as stale:
            raise self._closed(stale.end) from None

    async def _try(self, connection: _Connection, message: bytes) -> ResponseHead:
        """Send on one connection; abort it unless a head comes.

        Raises:
            _Stale: it ended before any byte of a response.

        """
        self.requests += 1
        self._waiting.add(connection)
        connection.state = State.RECEIVING
        connection.deadline = time.monotonic() + self._first_byte_timeout
        try:
            with self._failures:
                return await self._head(connection, message)
        except BaseException:
            await self.abort(connection)
            raise

    async def upload(
        self, message: bytes, body: AsyncIterator[bytes], *, chunked: bool
    ) -> tuple[_Connection, ResponseHead]:
        """Send a body as it arrives, until it ends or upstream answers."""
        connection = await self._connect()
        self.requests += 1
        self._waiting.add(connection)
        connection.state = State.SENDING
        connection.watch_host(uploads=True)
        try:
            return connection, await self._upload(connection, message, body, chunked=chunked)
        except _Stale as stale:
            await self.abort(connection)
            raise self._closed(stale.end) from None
        except BaseException:
            await self.abort(connection)
            raise

    async def _upload(
        self, connection: _Connection, message: bytes, body: AsyncIterator[bytes], *, chunked: bool
    ) -> ResponseHead:
        """Send and receive at the same time. The caller owns the connection."""
        sending = asyncio.create_task(self._send_body(connection, message, body, chunked=chunked))
        answer = asyncio.create_task(self._head(connection, b""))
        try:
            await asyncio.wait({sending, answer}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()  # raises the client's errors, which are not upstream's
                connection.deadline = time.monotonic() + self._first_byte_timeout
            with self._failures:
                return await answer
        finally:
            sending.cancel()
            answer.cancel()
            await asyncio.gather(sending, answer, return_exceptions=True)

    async def _send_body(
        self, connection: _Connection, message: bytes, body: AsyncIterator[bytes], *, chunked: bool
    ) -> None:
        connection.write(message)
        async for piece in body:
            connection.write(frame_chunk(piece) if chunked else piece)
            if not await self._drain(connection):
                return
        if chunked:
            connection.write(LAST_CHUNK)
        connection.state = State.RECEIVING
        connection.watch_host(uploads=False)

    async def _drain(self, connection: _Connection) -> bool:
        """Wait until upstream accepts more of an upload; False if the connection is lost.

        A response that arrived before can still be read then.

        Raises:
            HTTPError: 504 if it takes too long.

        """
        try:
            async with asyncio.timeout(self._idle_timeout) as timeout:
                await connection.writer.drain()
        except OSError:  # TimeoutError is one, ours and the system's
            if not timeout.expired():
                return False
            what = f"accepted nothing more of the request within {self._idle_timeout:g} s"
            raise self.failure(what, 504) from None
        return True

    async def _head(self, connection: _Connection, message: bytes) -> ResponseHead:
        """Send a message, and read the head of its response, after any interim ones."""
        before = connection.stream.fed
        connection.sent = time.monotonic()
        connection.writer.write(message)  # no drain: upstream may answer before it reads all
        for _ in range(MAX_INTERIM):
            head = self._parse(await self._raw_head(connection, before))
            if head.status >= 200:
                if head.status >= 300:
                    self._check(head)
                connection.patience = SILENCE
                return head
        raise BadHead(502, "it sent too many interim responses")

    async def _raw_head(self, connection: _Connection, before: int) -> bytes:
        """Read a head. Raises _Stale if no byte has arrived since `before`."""
        buffer, checked = connection.buffer, 0
        while (end := buffer.find(b"\r\n\r\n", max(0, checked - 3))) < 0:
            if len(buffer) > MAX_HEAD:
                break
            if not b"HTTP/1.".startswith(buffer[:7]) or cannot_be_head(buffer, checked):
                raise BadHead(502, "it does not begin like HTTP")
            checked = len(buffer)
            if not await connection.more():
                raise self._no_head(connection, before)
        if end < 0 or end > MAX_HEAD:
            raise BadHead(502, f"its head has more than {MAX_HEAD} bytes")
        raw = bytes(buffer[: end + 4])
        del buffer[: end + 4]
        return raw

    def _no_head(self, connection: _Connection, before: int) -> Exception:
        """Return the error for a connection that ended before the head was complete."""
        end = connection.stream.end
        if end is End.LATE:
            return self.failure(f"sent no answer within {self._first_byte_timeout:g} s", 504)
        if connection.stream.fed == before:
            return _Stale(end)
        return BadHead(502, "it ended in the middle of its head")

    def _check(self, head: ResponseHead) -> None:
        """Refuse a response that comes from a gateway in front of Ollama.

        Raises:
            HTTPError: 502 for a redirect, which would lead clients around OllProx, or if
                upstream requires credentials, which clients cannot provide.

        """
        if 300 <= head.status < 400 and head.status != 304:
            match = _ORIGIN.fullmatch(head.location)
            where = match[1].decode() if match else "another path"
            raise HTTPError(
                502,
                f"Ollama at {self.address} redirects to {where}. Set OLLAMA_HOST to the address"
                " at which Ollama itself answers.",
                kind="unreachable",
            )
        if head.status in {401, 407}:
            raise HTTPError(
                502,
                f"Ollama at {self.address} requires credentials (status {head.status}). Check the"
                " credentials for it in OLLAMA_HOST, or run `ollama signin` there if the model"
                " runs on ollama.com. Your API key for OllProx is valid.",
                kind="unreachable",
            )

    async def more(self, connection: _Connection) -> bool:
        """Wait for more of a body; False at the orderly end. Raises HTTPError 502, 504."""
        connection.deadline = time.monotonic() + self._idle_timeout
        more = await connection.more()
        connection.deadline = math.inf
        if not more and connection.stream.end is End.LATE:
            what = f"sent nothing more of its answer within {self._idle_timeout:g} s"
            raise self.failure(what, 504)
        if not more and connection.stream.end is not End.ORDERLY:
            raise self.truncated(connection)
        return more

    def truncated(self, connection: _Connection) -> HTTPError:
        """Return the error for a truncated body."""
        if connection.stream.end in _GONE:
            return self.failure("vanished in the middle of its answer")
        return self.failure("closed the connection in the middle of its answer")

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        stream = _Stream(limit=READ_SIZE)
        protocol = _Protocol(stream)
        name = self._host if self._tls is not None else None
        try:
            with self._failures:
                async with asyncio.timeout(self._connect_timeout):
                    plain = await dial(self._host, self._port)
                    transport, _ = await loop.create_connection(
                        lambda: protocol, sock=plain, ssl=self._tls, server_hostname=name
                    )
        except TimeoutError:
            what = f"could not be reached within {self._connect_timeout:g} s"
            raise self.no_answer(what, kind="unreachable") from None
        writer = asyncio.StreamWriter(transport, protocol, stream, loop)
        connection = _Connection(stream, writer)
        connection.watch_host(uploads=False)
        return connection

    def _take(self) -> _Connection | None:
        """Return the idle connection that was used last, and drop stale ones."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable():
                return connection
            connection.drop()
        return None

    def keep(self, connection: _Connection) -> None:
        """Keep a connection for the next request."""
        self._waiting.discard(connection)
        self._idle.append(connection)
        if len(self._idle) > MAX_IDLE:
            self._idle.pop(0).drop()

    def _drop_idle(self) -> None:
        while self._idle:
            self._idle.pop().drop()

    async def abort(self, connection: _Connection) -> None:
        """Abort a connection, so that Ollama stops generating."""
        self._waiting.discard(connection)
        await connection.abort()

    def _closed(self, end: End | None) -> NoAnswer:
        if end in _GONE:
            return self.no_answer("vanished: its host does not answer", kind="unreachable")
        return self.no_answer("closed the connection without an answer")

    def failure(self, what: str, status: int = 502, *, kind: str = "broken") -> HTTPError:
        """Return an error that says what upstream did, and what to check."""
        return HTTPError(status, self._text(what), kind="timeout" if status == 504 else kind)

    def no_answer(self, what: str, *, kind: str = "broken") -> NoAnswer:
        """Return an error for a request without any byte of a response."""
        return NoAnswer(502, self._text(what), kind=kind)

    def not_http(self, error: BadHead) -> HTTPError:
        """Return the error for a malformed response."""
        what = f"sent something that is not an HTTP response: {error.message}"
        return self.failure(what, kind="protocol")

    def _text(self, what: str) -> str:
        return (
            f"Ollama at {self.address} {what}. Check that Ollama runs there and is not"
            " overloaded, and check OLLAMA_HOST and OLLAMA_PORT."
        )


class _Failures:
    """Translates errors of the connection to upstream into an HTTPError."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if isinstance(error, BadHead):
            raise self._upstream.not_http(error) from error
        if isinstance(error, TimeoutError) and not error.errno:
            return  # one of our own timeouts; the system's have a number
        if isinstance(error, OSError | UnicodeError):  # UnicodeError: an invalid host name
            what = f"cannot be reached ({_reason(error)})"
            raise self._upstream.no_answer(what, kind="unreachable") from error


class _Exchange:
    """One request to upstream, and its response; see `Upstream.exchange`."""

    _connection: _Connection
    _head: ResponseHead
    _decoder: Decoder
    _pieces: AsyncGenerator[bytes, None]

    def __init__(self, upstream: Upstream, ask: Ask, headers: Headers) -> None:
        self._upstream = upstream
        self._ask = ask
        self._headers = headers

    async def __aenter__(self) -> Response:
        upstream, ask, length = self._upstream, self._ask, self._ask.length
        if isinstance(ask.body, bytes):
            length = len(ask.body) if ask.body or ask.method not in _BODILESS else None
            message = frame_request(ask.method, ask.target, self._headers, length) + ask.body
            connection, head = await upstream.send(message)
        else:
            chunked = length is None
            message = frame_request(ask.method, ask.target, self._headers, length, chunked=chunked)
            connection, head = await upstream.upload(message, ask.body, chunked=chunked)
        connection.deadline = math.inf
        connection.whole_wanted = ask.whole_wanted
        self._connection, self._head = connection, head
        if ask.method == b"HEAD" or head.status in {204, 304}:
            self._decoder = LengthDecoder(0)
        else:
            self._decoder = ChunkedDecoder() if head.chunked else LengthDecoder(head.length)
        more = partial(upstream.more, connection)
        self._pieces = read_body(self._decoder, connection.buffer, more)
        return Response(
            head.status,
            head.headers,
            self._pieces,
            head.length,
            storable=head.storable,
            server=head.server,
        )

    async def __aexit__(self, _: object, error: BaseException | None, __: object) -> None:
        upstream, connection = self._upstream, self._connection
        connection.whole_wanted = None
        connection.idle_since = time.monotonic()
        all_sent = not connection.writer.transport.get_write_buffer_size()
        ended = self._decoder.done and all_sent and connection.state is State.RECEIVING
        if ended and self._head.keep_alive and connection.is_usable():
            upstream.keep(connection)
        else:
            await upstream.abort(connection)
        await self._pieces.aclose()  # else the garbage collector would start a task for it
        if isinstance(error, Truncated):
            raise upstream.truncated(connection) from None
        if isinstance(error, BadHead):
            raise upstream.not_http(error) from None


def loop_error() -> HTTPError:
    """Return the error for a forwarding loop."""
    return HTTPError(508, "OLLAMA_HOST leads back to OllProx: give it Ollama's own address")


def _reason(error: OSError | UnicodeError) -> str:
    if isinstance(error, ConnectionError):
        return (
            type(error).__name__.removesuffix("Error").replace("Connection", "connection ").lower()
        )
    return getattr(error, "strerror", None) or str(error)


class _Stale(Exception):
    """The connection ended before the first byte of a response.

    Args:
        end: how the connection ended.

    """

    def __init__(self, end: End | None) -> None:
        super().__init__()
        self.end = end
