"""Accept clients, and hand their requests one at a time to a handler.

One task a client. What a client may cost is bounded here: the size and the time of a head,
the time of a body, how long it may take to read what is written to it.
"""

import array
import asyncio
import fcntl
import itertools
import logging
import math
import re
import secrets
import socket
import ssl
import struct
import termios
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from record import Record
from wire.bodies import LAST_CHUNK, ChunkedDecoder, frame_chunk
from wire.http11 import (
    BadHead,
    Head,
    HTTPError,
    KnownHeads,
    Request,
    Response,
    Truncated,
    frame_headers,
    frame_start,
    hopeless,
)

log = logging.getLogger("ollprox.server")

Handler = Callable[[Request, Record], Awaitable[Response]]
"""Answers a request."""

RenderError = Callable[[HTTPError, Head | None, Record], Response]
"""Writes an error in the form of the API that was called."""

SLICE = 256 << 10  # bytes written at once; nginx and Go hand on 32 to 128 KiB
MAX_SURPLUS = 256  # clients beyond `max_connections` that are told so; more are cut off
READ_AHEAD = 64 << 10  # bytes taken from a client before they are asked for
LOOK_AGAIN = 0.05  # seconds
TCP_ESTABLISHED = 1  # in the first byte of the kernel's `tcp_info`
GONE = 499  # nginx's status for a client that hung up; logged, never sent


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client may cost: sizes in bytes, times in seconds."""

    max_head: int = 16 << 10
    head_timeout: float = 10.0  # from a head's first byte to its last
    keepalive_timeout: float = 75.0  # between two requests
    body_timeout: float = 60.0  # without a byte of a body
    write_timeout: float = 60.0  # without a byte read by the client
    max_connections: int = 1024  # clients at once; more are refused
    linger_timeout: float = 5.0  # for a client to take an answer that it did not wait for


class Gone(HTTPError):
    """The client hung up, or reads nothing."""

    def __init__(self) -> None:
        super().__init__(GONE, "the client has gone")


class Server:
    """The clients, and how to answer them.

    Args:
        handler: answers requests.
        render_error: writes errors.
        parse_head: parses a raw head; raises BadHead.
        done: is handed each exchange's record at its end.
        limits: what one client may cost.

    """

    def __init__(
        self,
        handler: Handler,
        render_error: RenderError,
        parse_head: Callable[[bytes], Head],
        done: Callable[[Record], None],
        limits: Limits,
    ) -> None:
        self.handler = handler
        self.render_error = render_error
        self.parse_head = KnownHeads(parse_head)
        self.done = done
        self.limits = limits
        self.clients: set[_Client] = set()
        self.handshakes: set[asyncio.Task[None]] = set()
        self.serving = 0  # clients that have a place, of `max_connections`
        self.draining = False
        self.outbox = _Outbox()
        self._listener: asyncio.Server | None = None

    async def listen(self, host: str, port: int, tls: ssl.SSLContext | None = None) -> int:
        """Start to accept clients; return the port. Raises OSError."""
        loop = asyncio.get_running_loop()

        def accept() -> asyncio.Protocol:
            return _Client(self) if tls is None else _Handshake(self, tls)

        self._listener = await loop.create_server(accept, host, port, backlog=1024)
        listening: int = self._listener.sockets[0].getsockname()[1]
        return listening

    def check_deadlines(self, now: float) -> None:
        """Drop the clients that have taken too long; to be called each second."""
        for client in list(self.clients):
            if client.deadline < now:
                client.expire()
            elif client.has_left_unseen():
                client.let_go()

    async def drain(self, seconds: float) -> None:
        """Stop listening, and let exchanges finish for so long.

        Never `wait_closed`: from Python 3.12 on it waits for every client.
        """
        self.draining = True
        self.outbox.flush()
        if self._listener is not None:
            self._listener.close()
        for client in self.clients:
            client.close_if_idle()
        tasks = {client.task for client in self.clients}
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)

    async def abort(self) -> None:
        """Cut off every client and wait for their tasks."""
        for client in list(self.clients):
            client.hang_up()
        for handshake in self.handshakes:
            handshake.cancel()
        if tasks := [*(client.task for client in self.clients), *self.handshakes]:
            await asyncio.wait(tasks)


class _Outbox:
    """What is written once all that is ready to run has had its turn.

    A write wakes who waits at the other end, and that costs more than all else that a hit
    needs. Of many writes in a row only the first does.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[asyncio.Transport, bytes]] = []

    def put(self, transport: asyncio.Transport, data: bytes) -> None:
        """Take what is to be written soon: before the event loop looks at any socket again."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self.flush)
        self._waiting.append((transport, data))

    def flush(self) -> None:
        """Write it now; to be called before a connection is closed."""
        waiting, self._waiting = self._waiting, []
        for transport, data in waiting:
            if not transport.is_closing():
                transport.write(data)


class _Handshake(asyncio.Protocol):
    """A connection that is not a client yet: it has a place of its own kind until it is.

    asyncio's own TLS servers tell nothing of a connection before its handshake is over.
    """

    _task: asyncio.Task[None]

    def __init__(self, server: Server, tls: ssl.SSLContext) -> None:
        self._server = server
        self._tls = tls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, if not too many others have."""
        assert isinstance(transport, asyncio.Transport)
        transport.pause_reading()  # the greeting is for TLS, which is not there yet
        if len(self._server.handshakes) >= self._server.limits.max_connections:
            transport.abort()
            return
        self._task = asyncio.get_running_loop().create_task(self._shake(transport))
        self._server.handshakes.add(self._task)
        self._task.add_done_callback(self._server.handshakes.discard)

    async def _shake(self, transport: asyncio.Transport) -> None:
        client, limits = _Client(self._server, transport), self._server.limits
        try:
            secured = await asyncio.get_running_loop().start_tls(
                transport,
                client,
                self._tls,
                server_side=True,
                ssl_handshake_timeout=limits.head_timeout,
                ssl_shutdown_timeout=limits.linger_timeout,
            )
        except OSError as error:
            log.debug("a TLS handshake failed: %s", getattr(error, "reason", None) or error)
            transport.abort()
        else:
            if secured is not None:  # None: the client has left already
                client.connection_made(secured)


class _Client(asyncio.Protocol):
    """One connection: the bytes that came, and the task that answers them."""

    transport: asyncio.Transport
    task: asyncio.Task[None]

    def __init__(self, server: Server, wire: asyncio.Transport | None = None) -> None:
        self._server = server
        self._wire = wire  # what TLS writes to
        self._buffer = bytearray()
        self._waiter: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None  # while the client reads slowly
        self._eof = False
        self._reading = True
        self._answering = False  # between a request's head and the end of its response
        self._unread = False  # bytes of the body under way are still to come
        self._served = False  # a request was answered
        self._lagging = 0  # bytes not read yet when a deadline was put off for them
        self._tls = False
        self.deadline = math.inf
        self._address = "-"
        self._loop = asyncio.get_running_loop()

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin with a client."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        peer = transport.get_extra_info("peername")
        self._address = peer[0] if isinstance(peer, tuple) else "-"
        self._tls = transport.get_extra_info("ssl_object") is not None
        server = self._server
        server.clients.add(self)
        surplus = server.serving >= server.limits.max_connections
        self.task = self._loop.create_task(self._run(surplus=surplus))
        if surplus and len(server.clients) - server.serving > MAX_SURPLUS:
            transport.abort()
        server.serving += not surplus

    def data_received(self, data: bytes) -> None:
        """Take bytes; stop reading while many wait to be taken."""
        self._buffer += data
        if len(self._buffer) > READ_AHEAD and self._reading:
            self._reading = False
            self.transport.pause_reading()
        self._wake()

    def eof_received(self) -> bool:
        """Take the client's end: it counts as gone, but a refusal may still be sent."""
        self._eof = True
        self._wake()
        if self._answering:
            self.task.cancel()
        return not self._tls  # which cannot be half-closed

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of a client."""
        if self not in self._server.clients:
            return  # its handshake failed, so it never was one
        self._server.clients.discard(self)
        self._eof = True
        self._wake()
        self.resume_writing()
        if self._answering:
            self.task.cancel()
        del self.task  # its last exception holds frames, which hold us: a circle

    def pause_writing(self) -> None:
        """Note that the client reads more slowly than we write."""
        self._writable = self._loop.create_future()

    def resume_writing(self) -> None:
        """Note that the client has read most of what was written."""
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._writable = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # What the server calls.

    def expire(self) -> None:
        """End a wait whose deadline has passed; not while the client reads what it was sent."""
        unread = 0 if self._buffer else _unread_bytes(self.transport)
        if unread not in {0, self._lagging}:
            self._lagging = unread
            self.deadline = self._loop.time() + self._server.limits.write_timeout
            return
        self.deadline = math.inf
        if self._buffer and not self._answering and not self.transport.is_closing():
            self._refuse(HTTPError(408, "the request's head took too long to come"))
        self.hang_up()

    def close_if_idle(self) -> None:
        """Close a connection on which no request is under way."""
        if self._answering or self._buffer or self.transport.is_closing():
            return
        if self._tls and _unread_bytes(self.transport):
            self._wake()  # the task ends when that is read
        elif self._tls:
            self.transport.abort()  # a close would wait for the client to agree
        else:
            self.transport.close()

    def has_left_unseen(self) -> bool:
        """Whether the client hung up behind bytes that it sent ahead and that still wait."""
        return self._answering and not self._reading and not _is_connected(self.transport)

    def let_go(self) -> None:
        """Stop answering a client that has hung up."""
        self._eof = True
        self.task.cancel()

    def hang_up(self) -> None:
        """Cut the client off."""
        self.task.cancel()
        self.transport.abort()

    # The way of a request.

    async def _run(self, *, surplus: bool) -> None:
        try:
            if surplus:
                self._refuse(_surplus(self._server.limits.max_connections))
            else:
                while await self._cycle():
                    if self._buffer:
                        await asyncio.sleep(0)  # pipelined requests leave the others a turn
                    if self._eof:
                        break  # what was pipelined is asked for by nobody
                self._server.outbox.flush()
                if self._tls:
                    await self._finish_writing()  # a close gives it but a few seconds
            await self._linger()
        except (Gone, OSError):
            self.transport.abort()
        finally:
            self._server.serving -= not surplus
            if not self.transport.is_closing():
                self.transport.close()
            self.deadline = self._loop.time() + self._server.limits.write_timeout

    async def _cycle(self) -> bool:
        """Answer one request; tell whether another may follow."""
        try:
            raw = await self._next_head()
            if raw is None:
                return False
            head = self._server.parse_head(raw)
        except HTTPError as error:
            self._refuse(error)
            return False
        record = Record(self._address)
        record.request_id = _request_id(head)
        self._answering = True
        self._unread = head.has_body
        try:
            return await self._answer(_Request(self, head), record)
        except (Gone, OSError):
            record.status = GONE
            raise
        except asyncio.CancelledError:
            record.status = GONE if self._eof else record.status
            raise
        finally:
            self._answering = False
            self._served = True
            self._server.done(record)

    async def _answer(self, request: Request, record: Record) -> bool:
        head = request.head
        try:
            response = await self._server.handler(request, record)
            try:
                return await self._send(head, response, record)
            finally:
                if response.release is not None:
                    response.release()
        except (Gone, OSError):
            raise
        except HTTPError as error:
            failure = error
        except Truncated:
            await self._cut(head)
            return False
        except Exception:
            log.exception("a request failed by a fault of OllProx")
            failure = HTTPError(500, "OllProx failed; its log says more")
        if record.status:  # the response has begun, so all that is left is to cut it
            await self._cut(head)
            return False
        return await self._send(head, self._server.render_error(failure, head, record), record)

    async def _next_head(self) -> bytes | None:
        """Wait for a whole head; None if the client leaves before it has sent one.

        Raises:
            BadHead: what has come is no head.

        """
        buffer = self._buffer
        checked = 0
        begun = False  # a byte of the head has come
        skipped = False  # RFC 9112 section 2.2: one empty line may come before a request
        while True:
            if not skipped and buffer.startswith(b"\r\n"):
                del buffer[:2]
                skipped, checked = True, 0
            if buffer and (raw := self._take_head(checked)):
                self.deadline = math.inf
                return raw
            if self._eof or (self._server.draining and not buffer):
                return None
            if not begun:
                begun = skipped or bool(buffer)
                self._set_deadline(begun)
            checked = len(buffer)
            await self._more()

    def _take_head(self, checked: int) -> bytes:
        """Take a whole head off the buffer; empty while its end has not come."""
        buffer, most = self._buffer, self._server.limits.max_head
        end = buffer.find(b"\r\n\r\n", max(0, checked - 3)) + 4
        if 4 <= end <= most:
            raw = bytes(buffer[:end])
            del buffer[:end]
            return raw
        if len(buffer) > most:
            raise BadHead(431, f"the head is larger than {most} bytes (MAX_HEAD_BYTES)")
        if hopeless(buffer, checked) or buffer.startswith(b"\r\n"):
            raise BadHead(400, "the request's head is malformed")
        return b""

    def _set_deadline(self, begun: bool) -> None:
        """Bound the wait for a head, or for its first byte."""
        limits = self._server.limits
        idle = self._served and not begun
        wait = limits.keepalive_timeout if idle else limits.head_timeout
        self.deadline = self._loop.time() + wait

    async def _more(self) -> None:
        """Wait for more bytes, or for the client's end."""
        if not self._reading:
            self._read_on(len(self._buffer))
        self._waiter = self._loop.create_future()
        await self._waiter

    def _read_on(self, most: int = READ_AHEAD) -> None:
        """Read again, once what waited was taken: only so is the client's end seen."""
        if len(self._buffer) <= most:
            self._reading = True
            self.transport.resume_reading()

    async def read(self, head: Head, limit: int) -> bytes:
        """Read the body under way whole; see `Request.read`."""
        length = head.length
        if length is not None and length <= len(self._buffer) and length <= limit:  # it is here
            body = bytes(memoryview(self._buffer)[:length])
            del self._buffer[:length]
            self._unread = False
            if not self._reading:
                self._read_on()
            return body
        too_large = HTTPError(413, f"the body is larger than {limit} bytes (MAX_BODY_BYTES)")
        if length is not None and length > limit:
            raise too_large
        parts, size = [], 0
        async for part in self.pieces(head):
            parts.append(part)
            if (size := size + len(part)) > limit:
                raise too_large
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def pieces(self, head: Head) -> AsyncIterator[bytes]:
        """Read the body under way as it comes; see `Request.pieces`."""
        if head.expects_continue and self._unread and not self._buffer:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        decoder = ChunkedDecoder() if head.chunked else None
        left = head.length or 0
        while self._unread:
            if decoder is not None:
                part = decoder.decode(self._buffer)
                self._unread = not decoder.done
            else:
                part = bytes(memoryview(self._buffer)[:left])
                del self._buffer[: len(part)]
                left -= len(part)
                self._unread = left > 0
            if not self._reading:
                self._read_on()
            if part:
                yield part
            elif self._unread:
                await self._more_body()

    async def _more_body(self) -> None:
        if self._eof:
            raise Gone
        seconds = self._server.limits.body_timeout
        try:
            async with asyncio.timeout(seconds):
                await self._more()
        except TimeoutError:
            raise HTTPError(408, f"no byte of the body came for {seconds:g} s") from None

    # The way of a response.

    async def _send(self, head: Head, response: Response, record: Record) -> bool:
        """Write a response; tell whether the connection can be used again."""
        body, length = response.body, response.length
        bodiless = response.status == 304 or head.method == b"HEAD"
        if isinstance(body, bytes) and (body or not bodiless):
            length = len(body) if length is None else length
        delimited = bodiless or length is not None or not head.http10  # else by the close
        again = head.keep_alive and delimited and not self._unread and not self._server.draining
        chunked = length is None and delimited and not bodiless
        framed = self._frame(
            response, record, length, again=again, chunked=chunked, http10=head.http10
        )
        record.status = response.status
        if self._writable is not None:
            await self._drain()
        if bodiless:
            self._write(framed, b"", record)
        elif not isinstance(body, bytes):
            self._write(framed, b"", record)
            await self._write_stream(body, record, chunked=chunked)
        elif len(body) <= SLICE:
            self._write(framed + body, body, record, soon=again)
        else:
            self._write(framed, b"", record)
            await self._write_slices(body, record)
        if self._writable is not None:
            await self._drain()
        return again

    @staticmethod
    def _frame(
        response: Response,
        record: Record,
        length: int | None,
        *,
        again: bool,
        chunked: bool,
        http10: bool,
    ) -> bytes:
        """Write a response's head."""
        if length is not None and response.status != 204:
            framing = b"Content-Length: %d\r\n" % length
        else:
            framing = b"Transfer-Encoding: chunked\r\n" if chunked else b""
        if not again:
            framing += b"Connection: close\r\n"
        elif http10:
            framing += b"Connection: keep-alive\r\n"
        return b"%bCache-Status: %b\r\nX-Request-ID: %b\r\n%b%b\r\n" % (
            frame_start(response.status, response.headers, http_date()),
            record.cache_status,
            record.request_id,
            frame_headers(record.headers),
            framing,
        )

    async def _write_slices(self, body: bytes, record: Record) -> None:
        """Write a long body as fast as the client takes it."""
        for start in range(0, len(body), SLICE):
            if self._writable is not None:
                await self._drain()
            part = body[start : start + SLICE]
            self._write(part, part, record)

    async def _write_stream(
        self, body: AsyncIterator[bytes], record: Record, *, chunked: bool
    ) -> None:
        async for piece in body:
            if piece:
                self._write(frame_chunk(piece) if chunked else piece, piece, record)
            if self._writable is not None:
                await self._drain()
        if chunked:
            self.transport.write(LAST_CHUNK)

    def _write(self, framed: bytes, body: bytes, record: Record, *, soon: bool = False) -> None:
        if record.first_byte is None:
            record.first_byte = time.monotonic()
        record.bytes_sent += len(body)
        if soon:
            self._server.outbox.put(self.transport, framed)
        else:
            self.transport.write(framed)

    async def _drain(self) -> None:
        """Wait until the client has read most of what was written.

        Raises:
            Gone: it has read nothing for `write_timeout`.

        """
        while self._writable is not None:
            waiting = _unread_bytes(self.transport)
            try:
                async with asyncio.timeout(self._server.limits.write_timeout):
                    await self._writable
            except TimeoutError:
                if _unread_bytes(self.transport) >= waiting:
                    raise Gone from None
                if self._writable is not None:  # it reads, if slowly: wait once more
                    self._writable = self._loop.create_future()
        if self.transport.is_closing():
            raise Gone

    async def _finish_writing(self) -> None:
        """Wait until the kernel has all that was written. Raises Gone."""
        self.transport.set_write_buffer_limits(high=int(self._tls))  # TLS takes 0 as full
        await self._drain()
        try:
            async with asyncio.timeout(self._server.limits.write_timeout):
                # What TLS has handed on: nobody tells when it is written.
                while self._wire is not None and self._wire.get_write_buffer_size():  # noqa: ASYNC110
                    await asyncio.sleep(LOOK_AGAIN)
        except TimeoutError:
            raise Gone from None

    async def _cut(self, head: Head) -> None:
        """End a response that is not whole, so that nobody takes it for a whole one.

        The chunked body is left without its end. Where the close itself would be the end,
        in HTTP/1.0, the connection is reset once its bytes are out.
        """
        if head.http10:
            with suppress(Gone):
                await self._finish_writing()
            sock: Any = self.transport.get_extra_info("socket")
            if sock is not None:
                linger = struct.pack("ii", 1, 0)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.transport.abort()

    def _refuse(self, error: HTTPError) -> None:
        """Answer what is no request; the connection ends with it."""
        record = Record(self._address)
        record.status = error.status
        record.request_id = _request_id(None)
        response = self._server.render_error(error, None, record)
        body = response.body if isinstance(response.body, bytes) else b""
        framed = self._frame(response, record, len(body), again=False, chunked=False, http10=False)
        self._write(framed + body, body, record)
        self._unread = True
        self.deadline = math.inf  # `_linger` has its own
        self._server.done(record)

    async def _linger(self) -> None:
        """Close without a reset that would take the last answer from the client.

        A close with bytes unread resets the connection (RFC 9112 section 9.6), so what
        the client is still sending is thrown away for a while first.
        """
        if not self._unread or self._eof:
            return
        if self.transport.can_write_eof():
            self.transport.write_eof()  # may find the connection reset: an OSError
        loop = asyncio.get_running_loop()
        until = loop.time() + self._server.limits.head_timeout
        with suppress(TimeoutError):
            while not self._eof and loop.time() < until:
                self._buffer.clear()
                async with asyncio.timeout(self._server.limits.linger_timeout):
                    await self._more()


class _Request:
    """A client's request; see `http11.Request`."""

    __slots__ = ("_client", "head")

    def __init__(self, client: _Client, head: Head) -> None:
        self._client = client
        self.head = head

    def read(self, limit: int) -> Coroutine[Any, Any, bytes]:
        return self._client.read(self.head, limit)

    def pieces(self) -> AsyncIterator[bytes]:
        return self._client.pieces(self.head)


def _unread_bytes(transport: asyncio.Transport) -> int:
    """Count what is written and not read by the client: our buffer, and the kernel's."""
    sock: Any = transport.get_extra_info("socket")
    count = array.array("i", [0])
    with suppress(OSError, ValueError, AttributeError):
        fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, count)
    return transport.get_write_buffer_size() + count[0]


def _is_connected(transport: asyncio.Transport) -> bool:
    """Whether the kernel has seen no end from the client; True where it does not tell."""
    sock: Any = transport.get_extra_info("socket")
    try:
        state: int = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    except (OSError, AttributeError):
        return True
    return state == TCP_ESTABLISHED


def _surplus(most: int) -> HTTPError:
    return HTTPError(
        503,
        f"OllProx serves {most} connections at once (MAX_CONNECTIONS)",
        ((b"Retry-After", b"1"),),
    )


_PROCESS = secrets.token_hex(4).encode()  # what the ids of this process begin with
_numbers = itertools.count(1)
_SANE_ID = re.compile(rb"[\w.:/+=@-]{1,128}", re.ASCII)


def _request_id(head: Head | None) -> bytes:
    """Return the id that a request came with, if it is sane, or a new one."""
    if head is not None and b"x-request-id" in head.names:
        given = head.get(b"x-request-id")
        if given is not None and _SANE_ID.fullmatch(given):
            return given
    return b"%b-%x" % (_PROCESS, next(_numbers))


_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_date: tuple[int, bytes] = (0, b"")


def http_date() -> bytes:
    """Return the date as HTTP writes it, made once a second."""
    global _date
    now = int(time.time())
    if _date[0] != now:
        parts = time.gmtime(now)
        day, month = _DAYS[parts.tm_wday], _MONTHS[parts.tm_mon - 1]  # in any locale
        _date = now, time.strftime(f"{day}, %d {month} %Y %H:%M:%S GMT", parts).encode()
    return _date[1]
