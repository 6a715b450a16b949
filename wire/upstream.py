"""Carry one request to Ollama and its response back, over connections kept alive.

A kept connection may have been closed by upstream meanwhile: then the request is sent once
more on a fresh one, but only while no byte of a response has come.
"""

import asyncio
import math
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

from wire.bodies import LAST_CHUNK, ChunkedDecoder, frame_chunk
from wire.http11 import (
    Ask,
    BadHead,
    Headers,
    HTTPError,
    KnownHeads,
    Response,
    ResponseHead,
    cannot_be_head,
    frame_request,
    parse_response_head,
)

MAX_IDLE = 64  # connections kept for the next request
MAX_IDLE_TIME = 60.0  # seconds; Ollama itself keeps them for ever
MAX_HEAD = 64 << 10  # bytes of a response's head; Ollama's have about 120
READ_SIZE = 64 << 10  # bytes
MAX_INTERIM = 8  # 1xx heads before the response

VIA: Headers = ((b"Via", b"1.1 OllProx"),)  # RFC 9110 section 7.6.3
FORWARDED: Headers = ((b"Content-Type", b"application/json"), (b"Accept", b"*/*"), *VIA)

_BODILESS = frozenset({b"GET", b"HEAD"})  # methods that need not say that no body follows


class _CountingReader(asyncio.StreamReader):
    """A stream reader that tells how many bytes have come."""

    fed = 0
    ended = False

    def set_exception(self, exc: BaseException) -> None:
        """Take a reset for an end: what came before it can still be read."""
        self.feed_eof()

    def feed_eof(self) -> None:
        """End, whatever comes yet: a wait may be ended before its connection is."""
        self.ended = True
        super().feed_eof()

    def feed_data(self, data: Any) -> None:
        self.fed += len(data)
        if not self.ended:
            super().feed_data(data)


class _Connection:
    """One connection to upstream."""

    def __init__(self, reader: _CountingReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.buffer = bytearray()
        self.whole = False  # the response under way has come to its end
        self.uploaded = True  # the request's body was sent to its end
        self.idle_since = 0.0
        self.deadline = math.inf  # for the next bytes, on the monotonic clock
        self.late = False  # that deadline has passed
        self.whole_wanted: Callable[[], bool] | None = None  # see `Ask`; while a body is read
        self._taken = 0  # bytes read off the stream

    def usable(self) -> bool:
        """Whether a kept connection can carry a request: open, and not one byte came."""
        return (
            not self.reader.at_eof()
            and not self.buffer
            and self.reader.fed == self._taken
            and not self.writer.is_closing()
            and time.monotonic() - self.idle_since < MAX_IDLE_TIME
        )

    async def more(self) -> bool:
        """Wait for bytes; False at the end of the stream, and when they are late."""
        data = await self.reader.read(READ_SIZE)
        self._taken += len(data)
        self.buffer += data
        return bool(data) and not self.late

    def expire(self) -> None:
        """End a wait whose deadline has passed."""
        self.late = True
        self.reader.feed_eof()

    async def abort(self) -> None:
        """Cut the connection, so that Ollama stops generating."""
        self.writer.transport.abort()
        with suppress(OSError):  # whoever aborts also takes the stream's exception
            await self.writer.wait_closed()


class Upstream:
    """Ollama, as one address.

    Args:
        host: its name or IP address.
        port: its port.
        address: both, as in a URL; sent as `Host` and shown in errors.
        connect_timeout: seconds to connect in.
        first_byte_timeout: seconds until the head of a response is there.
        idle_timeout: seconds between two pieces of a response.
        tls: how to verify its certificate; None for plain HTTP.

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
    ) -> None:
        self.address = address
        self._host = host
        self._port = port
        self._connect_timeout = connect_timeout
        self._first_byte_timeout = first_byte_timeout
        self._idle_timeout = idle_timeout
        self._tls = tls
        self._host_header = (b"Host", address.encode())
        self.requests = 0  # that were sent, each attempt counted
        self._idle: list[_Connection] = []
        self._waiting: set[_Connection] = set()  # that have a deadline
        self._failures = _Failures(self)
        self._parse = KnownHeads(parse_response_head)

    def exchange(self, ask: Ask) -> "_Exchange":
        """Send a request; `async with` gives the response, whose body is read inside the block.

        Leaving the block before the body's end aborts the connection, which is how Ollama
        is told to stop.

        Raises:
            HTTPError: 502 not reachable, not HTTP or closed early; 504 too slow. The body
                raises these as well.

        """
        return _Exchange(self, ask, (self._host_header, *ask.headers))

    def sweep(self) -> None:
        """Drop kept connections that upstream has closed, and end waits that last too long.

        To be called now and then. One look at all deadlines costs less than a timer for each.
        """
        for connection in [c for c in self._idle if not c.usable()]:
            self._idle.remove(connection)
            connection.writer.transport.abort()
        now = time.monotonic()
        for connection in self._waiting:
            if connection.whole_wanted is not None and connection.whole_wanted():
                # Not late; and whoever waits for the next line only then has all of the time.
                connection.deadline = max(connection.deadline, now + self._idle_timeout)
            if connection.deadline < now:
                connection.expire()

    async def close(self) -> None:
        """Close the connections that are kept."""
        while self._idle:
            await self._idle.pop().abort()

    async def send(self, message: bytes) -> tuple[_Connection, ResponseHead]:
        """Send a request and wait for the response's head."""
        if (kept := self._take()) is not None:
            with suppress(_Stale):
                return kept, await self._try(kept, message)
        fresh = await self._connect()
        try:
            return fresh, await self._try(fresh, message)
        except _Stale:
            raise self._closed() from None

    async def _try(self, connection: _Connection, message: bytes) -> ResponseHead:
        """Send on one connection; abort it unless a head comes.

        Raises:
            _Stale: it was closed before any byte of a response.

        """
        self.requests += 1
        self._waiting.add(connection)
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
        """Send a body while it comes, until it ends or upstream answers."""
        connection = await self._connect()
        connection.uploaded = False
        self.requests += 1
        self._waiting.add(connection)
        upload = asyncio.create_task(self._upload(connection, message, body, chunked=chunked))
        answer = asyncio.create_task(self._head(connection, b""))
        try:
            await asyncio.wait({upload, answer}, return_when=asyncio.FIRST_COMPLETED)
            if upload.done():
                upload.result()  # the client's own faults, not upstream's
                connection.deadline = time.monotonic() + self._first_byte_timeout
            with self._failures:
                return connection, await answer
        except _Stale:
            await self.abort(connection)
            raise self._closed() from None
        except BaseException:
            await self.abort(connection)
            raise
        finally:
            upload.cancel()
            answer.cancel()
            await asyncio.gather(upload, answer, return_exceptions=True)

    async def _upload(
        self,
        connection: _Connection,
        message: bytes,
        body: AsyncIterator[bytes],
        *,
        chunked: bool,
    ) -> None:
        """Send a body as it comes."""
        with suppress(ConnectionError):  # what upstream said before may still be read
            connection.writer.write(message)
            async for piece in body:
                connection.writer.write(frame_chunk(piece) if chunked else piece)
                try:
                    async with asyncio.timeout(self._idle_timeout):
                        await connection.writer.drain()
                except TimeoutError:
                    what = f"took nothing more of the request within {self._idle_timeout:g} s"
                    raise self.failure(what, 504) from None
            if chunked:
                connection.writer.write(LAST_CHUNK)
            connection.uploaded = True

    async def _head(self, connection: _Connection, message: bytes) -> ResponseHead:
        connection.writer.write(message)  # not waited for: upstream may answer before it reads
        before = connection.reader.fed
        for _ in range(MAX_INTERIM):
            raw = await self._raw_head(connection, before)
            head = self._parse(raw)
            if head.status == 101:
                raise BadHead(502, "it switched protocols unasked")
            if head.status >= 200:
                return head
        raise BadHead(502, "it sent too many interim responses")

    async def _raw_head(self, connection: _Connection, before: int) -> bytes:
        """Read a head. Raises _Stale if not one byte has come since `before`."""
        buffer = connection.buffer
        while (end := buffer.find(b"\r\n\r\n")) < 0:
            if len(buffer) > MAX_HEAD:
                break
            if not b"HTTP/1.".startswith(buffer[:7]) or cannot_be_head(buffer):
                raise BadHead(502, "it does not begin as one")
            if not await connection.more():
                if connection.late:
                    what = f"sent no answer within {self._first_byte_timeout:g} s"
                    raise self.failure(what, 504)
                if connection.reader.fed == before:
                    raise _Stale
                raise BadHead(502, "it ended in the middle of its head")
        if end < 0 or end > MAX_HEAD:
            raise BadHead(502, f"its head has more than {MAX_HEAD} bytes")
        raw = bytes(buffer[: end + 4])
        del buffer[: end + 4]
        return raw

    async def read(self, connection: _Connection) -> bool:
        """Wait for more of a body; False at the connection's end. Raises HTTPError."""
        connection.deadline = time.monotonic() + self._idle_timeout
        with self._failures:
            more = await connection.more()
        connection.deadline = math.inf
        if connection.late:
            what = f"sent nothing more of its answer within {self._idle_timeout:g} s"
            raise self.failure(what, 504)
        return more

    def decode(self, decoder: ChunkedDecoder, connection: _Connection) -> bytes:
        """Decode what has come of a chunked body. Raises HTTPError."""
        with self._failures:
            piece = decoder.decode(connection.buffer)
        connection.whole = decoder.done
        return piece

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        reader = _CountingReader(limit=READ_SIZE)
        protocol = asyncio.StreamReaderProtocol(reader)
        try:
            with self._failures:
                async with asyncio.timeout(self._connect_timeout):
                    transport, _ = await loop.create_connection(
                        lambda: protocol, self._host, self._port, ssl=self._tls
                    )
        except TimeoutError:
            what = f"could not be reached within {self._connect_timeout:g} s"
            raise self.failure(what, kind="unreachable") from None
        return _Connection(reader, asyncio.StreamWriter(transport, protocol, reader, loop))

    def _take(self) -> _Connection | None:
        """Take the connection that was used last; those that went stale are dropped."""
        while self._idle:
            connection = self._idle.pop()
            if connection.usable():
                return connection
            connection.writer.transport.abort()
        return None

    def keep(self, connection: _Connection) -> None:
        """Keep a connection for the next request."""
        self._waiting.discard(connection)
        self._idle.append(connection)
        if len(self._idle) > MAX_IDLE:
            oldest = self._idle.pop(0)
            oldest.writer.transport.abort()

    async def abort(self, connection: _Connection) -> None:
        """Cut a connection, so that Ollama stops generating."""
        self._waiting.discard(connection)
        await connection.abort()

    def _closed(self) -> HTTPError:
        return self.failure("closed the connection without an answer")

    def failure(self, what: str, status: int = 502, *, kind: str = "broken") -> HTTPError:
        """Say what upstream did, and what to look at."""
        return HTTPError(
            status,
            f"Ollama at {self.address} {what}. Check that Ollama runs there and is not"
            " overloaded, and the OLLAMA_HOST and OLLAMA_PORT settings.",
            kind="timeout" if status == 504 else kind,
        )


class _Failures:
    """Translate what can go wrong on the way to upstream, once, here."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if isinstance(error, BadHead):
            what = f"sent what is no HTTP response: {error.message}"
            raise self._upstream.failure(what, kind="protocol") from error
        if isinstance(error, TimeoutError) and not error.errno:
            return  # a timeout of ours; the system's has a number
        if isinstance(error, OSError | UnicodeError):  # UnicodeError: a name that means nothing
            what = f"cannot be reached ({_reason(error)})"
            raise self._upstream.failure(what, kind="unreachable") from error


class _Exchange:
    """One request to upstream, and its response; see `Upstream.exchange`."""

    _connection: _Connection
    _head: ResponseHead

    def __init__(self, upstream: Upstream, ask: Ask, headers: Headers) -> None:
        self._upstream = upstream
        self._ask = ask
        self._headers = headers

    async def __aenter__(self) -> Response:
        ask, headers, length = self._ask, self._headers, self._ask.length
        method, target = ask.method, ask.target
        if not isinstance(ask.body, AsyncIterator):
            body = ask.body()
            length = len(body) if body or method not in _BODILESS else None
            message = frame_request(method, target, headers, length) + body
            connection, head = await self._upstream.send(message)
        else:
            message = frame_request(method, target, headers, length, chunked=length is None)
            connection, head = await self._upstream.upload(
                message, ask.body, chunked=length is None
            )
        bodiless = method == b"HEAD" or head.status in {204, 304}
        connection.whole = bodiless or head.length == 0
        connection.deadline = math.inf
        connection.whole_wanted = ask.whole_wanted
        self._connection, self._head = connection, head
        pieces = _Body(self._upstream, connection, head)
        return Response(head.status, head.headers, pieces, head.length)

    async def __aexit__(self, *_: object) -> None:
        connection = self._connection
        connection.whole_wanted = None
        connection.idle_since = time.monotonic()
        sent = connection.uploaded and not connection.writer.transport.get_write_buffer_size()
        if connection.whole and sent and self._head.keep_alive and connection.usable():
            self._upstream.keep(connection)
        else:
            await self._upstream.abort(connection)


class _Body:
    """Read a body to its end, a piece for each read: an async iterator.

    It is none of Python's generators, since these cost more than a piece does.
    """

    def __init__(self, upstream: Upstream, connection: _Connection, head: ResponseHead) -> None:
        self._upstream = upstream
        self._connection = connection
        self._decoder = ChunkedDecoder() if head.chunked else None
        self._left = head.length

    def __aiter__(self) -> "_Body":
        return self

    async def __anext__(self) -> bytes:
        connection = self._connection
        while not connection.whole:
            if connection.buffer and (piece := self._take()):
                return piece
            if not connection.whole and not await self._upstream.read(connection):
                if self._left is not None or self._decoder is not None:
                    raise self._upstream.failure(
                        "closed the connection in the middle of its answer"
                    )
                connection.whole = True  # the close was the end
        raise StopAsyncIteration

    def _take(self) -> bytes:
        """Take what can be decoded of what has come."""
        connection = self._connection
        if self._decoder is not None:
            return self._upstream.decode(self._decoder, connection)
        piece = bytes(memoryview(connection.buffer)[: self._left])
        del connection.buffer[: len(piece)]
        if self._left is not None:
            self._left -= len(piece)
            connection.whole = self._left == 0
        return piece


def loop_error() -> HTTPError:
    """Say that requests come back."""
    return HTTPError(508, "OLLAMA_HOST leads back to OllProx: give it Ollama's own address")


def _reason(error: OSError | UnicodeError) -> str:
    if isinstance(error, ConnectionError):
        return (
            type(error).__name__.removesuffix("Error").replace("Connection", "connection ").lower()
        )
    return getattr(error, "strerror", None) or str(error)


class _Stale(Exception):
    """Upstream closed the connection before the first byte of its response."""
