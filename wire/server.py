"""Accept clients and pass their requests, one at a time, to a handler.

Theory of operation
===================

Each connection is a `_Client`: an asyncio protocol that collects bytes, and one task that
serves requests. The task is sequential code: `_run` serves the connection and `_cycle` one
request, `_next_head` and `read_body` wait for bytes, and `_send` writes. The callbacks only
add bytes, wake the task, or cancel it. `State` says where the task is.

What a client may cost is bounded:

- Connections. There are `max_connections` places. If none is free, a new connection replaces
  the oldest one that has shown no valid API key. If all have shown one, the new connection
  gets a 503 and is closed.
- Bytes. A head has a maximum size; the caller limits the body. Reading pauses at READ_AHEAD.
- Time. The wait for a head has a deadline, checked once a second for all clients. The waits
  for a body and for a slow reader have timeouts. The kernel probes silent connections.
- Wrong keys. The 429 for too many of them is delayed and closes the connection.

A connection ends in one of three ways, always through `end`:

- In order, `CLOSE`: after the last response. If the client is still sending, its bytes are
  first discarded for a while, because a close with unread bytes would reset the connection,
  and the client could lose the response.
- At once, `ABORT`: a deadline has passed, the client reads nothing, its place is needed, or
  the server stops. A chunked body is left without its end.
- With a reset, `RESET`: the response is truncated, and a plain close would look like its end.

A client that has sent FIN has either shut down its sending side (`nc -N`) and waits for its
answer, or closed its socket (Ctrl-C). The two look alike until something is written: only a
closed socket answers data with a reset. So the server writes a byte that the client gets in
any case: before the response the next byte of `HTTP/1.1 `, within a chunked body a leading
zero of the next chunk's size. Further bytes follow at growing intervals, because a reset may take a
few of them through a userland proxy. Some clients would take such a zero, followed by FIN, for
the last chunk; so until the body's end is written, any close is a reset, even if the process is
killed. With TLS, which has no half-close, FIN means gone.
"""

import array
import asyncio
import enum
import itertools
import logging
import math
import re
import secrets
import socket
import ssl
import struct
import sys
import time
from asyncio.sslproto import SSLProtocol
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from email.utils import formatdate
from typing import Any

from record import Record
from wire.bodies import LAST_CHUNK, ChunkedDecoder, LengthDecoder, frame_chunk, read_body
from wire.http11 import (
    BadHead,
    Head,
    HTTPError,
    KnownHeads,
    Request,
    Response,
    Truncated,
    cannot_be_head,
    frame_headers,
    frame_start,
)

try:
    import fcntl
    import termios
except ImportError:  # Windows
    fcntl = termios = None  # type: ignore[assignment]

log = logging.getLogger("ollprox.server")

Handler = Callable[[Request, Record], Awaitable[Response]]
"""Answers a request."""

RenderError = Callable[[HTTPError, Head | None, Record], Response]
"""Renders an error in the form of the API that was called."""

SLICE = 256 << 10  # bytes per write; nginx and Go write 32 to 128 KiB
MAX_SURPLUS = 256  # clients beyond `max_connections` that get a 503; more are cut off
READ_AHEAD = 64 << 10  # bytes read from a client before they are needed
RECHECK_INTERVAL = 0.05  # seconds until a state is checked that no callback reports
FIRST_REQUEST_WAIT = 1.0  # seconds for the first request of a connection, while draining
GUESS_DELAY = 1.0  # seconds before the 429 for too many wrong keys
GONE = 499  # nginx's status for a client that hung up; logged, never sent

# The kernel detects a client that has vanished: after 15 + 3 * 5 seconds if nothing is being
# sent to it; during a stream after `write_timeout`, but not before MIN_USER_TIMEOUT. On Linux,
# sockets inherit these options from the listening socket.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
MIN_USER_TIMEOUT = 30.0  # seconds

# The first byte of the kernel's `tcp_info`.
_TCP_CLOSE, _TCP_CLOSE_WAIT = 7, 8

# Bytes that can be written before the rest is known; see "Theory of operation".
_EVERY_RESPONSE = b"HTTP/1.1 "
_EVERY_CHUNK = b"0" * 8  # Go accepts chunk sizes of up to 16 digits


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client may cost: sizes in bytes, times in seconds."""

    max_head: int = 16 << 10
    head_timeout: float = 10.0  # from a head's first byte to its last; a TLS handshake too
    keepalive_timeout: float = 75.0  # between two requests
    body_timeout: float = 60.0  # without a byte of a body
    write_timeout: float = 60.0  # without a byte read by the client
    max_connections: int = 1024  # clients at once
    linger_timeout: float = 5.0  # for a client to stop sending after its last response


class State(enum.Enum):
    """Where a connection is."""

    HANDSHAKE = enum.auto()  # TLS is not set up yet
    IDLE = enum.auto()  # between two requests, or before the first
    HEAD = enum.auto()  # a part of a head has arrived
    ANSWERING = enum.auto()  # from the end of a head to the end of its response
    REFUSED = enum.auto()  # the last response is written; further bytes are discarded
    CLOSING = enum.auto()  # closed on our side; the kernel may still be sending


class End(enum.Enum):
    """How a connection ends."""

    CLOSE = enum.auto()  # once everything is sent
    ABORT = enum.auto()  # at once; unsent bytes are dropped
    RESET = enum.auto()  # at once, and the client's next read fails


class Gone(HTTPError):
    """The client has disconnected, or reads nothing."""

    def __init__(self) -> None:
        super().__init__(GONE, "the client has gone")


class Server:
    """Accepts clients and answers them.

    Args:
        handler: answers requests.
        render_error: renders errors.
        parse_head: parses a raw head; raises BadHead.
        done: called with the record of each request at its end.
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
        self.places = _Places(limits.max_connections)
        self.draining = False
        self.outbox = _Outbox()
        self._listener: asyncio.Server | None = None

    async def listen(self, host: str, port: int, tls: ssl.SSLContext | None = None) -> int:
        """Start to accept clients; return the port. Raises OSError."""
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(
            lambda: _Client(self, tls), host, port, backlog=1024
        )
        for listening in self._listener.sockets:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEP_ALIVE.items():
                if hasattr(socket, option):
                    listening.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        listens_on: int = self._listener.sockets[0].getsockname()[1]
        return listens_on

    def check_deadlines(self, now: float) -> None:
        """Drop clients that took too long or have left. Call it once a second."""
        for client in list(self.clients):
            if client.deadline < now:
                client.expire()
            else:
                client.check_presence()

    async def drain(self, seconds: float) -> None:
        """Stop listening, and give requests this long to finish.

        This does not use `wait_closed`, which waits for every client since Python 3.12.
        """
        self.draining = True
        self.outbox.flush()
        for _ in range(2):  # accept the clients that have connected already
            await asyncio.sleep(0)
        if self._listener is not None:
            self._listener.close()
        self._close_idle(unused=False)
        # The first request of a connection that was just accepted may be on its way.
        later = asyncio.get_running_loop().call_later(FIRST_REQUEST_WAIT, self._close_idle)
        if tasks := {client.task for client in self.clients}:
            await asyncio.wait(tasks, timeout=seconds)
        later.cancel()

    def _close_idle(self, *, unused: bool = True) -> None:
        for client in list(self.clients):
            if unused or client.served:
                client.close_if_idle()

    async def abort(self) -> None:
        """Cut off every client and wait for their tasks."""
        tasks = [client.task for client in self.clients]
        for client in list(self.clients):
            client.end(End.ABORT)
        if tasks:
            await asyncio.wait(tasks)


class _Places:
    """The places for clients.

    If all places are taken, the oldest client without a valid key is evicted: a thousand idle
    strangers must not lock out a caller with a key.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._strangers: dict[_Client, None] = {}  # clients without a valid key, the oldest first
        self._callers: set[_Client] = set()

    def __len__(self) -> int:
        return len(self._strangers) + len(self._callers)

    def take(self, client: "_Client") -> bool:
        """Give a new client a place; return False if there is none."""
        if len(self) >= self.limit and not self._evict():
            return False
        self._strangers[client] = None
        return True

    def free(self, client: "_Client") -> None:
        """Free a client's place."""
        self._strangers.pop(client, None)
        self._callers.discard(client)

    def _evict(self) -> bool:
        """End the oldest client without a valid key; return False if all have shown one."""
        while self._strangers:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            if not oldest.has_shown_key():
                oldest.end(End.ABORT)
                return True
            self._callers.add(oldest)
        return False


class _Outbox:
    """Responses that are written together, after all callbacks that are ready have run.

    A write wakes the reader at the other end, which costs more than the rest of a hit. Of many
    consecutive writes, only the first one wakes it.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[asyncio.Transport, bytes]] = []

    def put(self, transport: asyncio.Transport, data: bytes) -> None:
        """Write soon, after the callbacks that are ready now."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self.flush)
        self._waiting.append((transport, data))

    def flush(self) -> None:
        """Write everything now. Call it before closing a connection."""
        waiting, self._waiting = self._waiting, []
        for transport, data in waiting:
            if not transport.is_closing():
                transport.write(data)


class _Flow:
    """Flow control of one connection: waits for a slow reader."""

    def __init__(self, write_timeout: float) -> None:
        self.paused: asyncio.Future[None] | None = None  # done when the client has read enough
        self._write_timeout = write_timeout

    def pause(self) -> None:
        """Note that the transport's buffer is full."""
        self.paused = asyncio.get_running_loop().create_future()

    def resume(self) -> None:
        """Note that the transport's buffer has room."""
        if self.paused is not None and not self.paused.done():
            self.paused.set_result(None)
        self.paused = None

    async def drain(self, transport: asyncio.Transport) -> None:
        """Wait until most of what was written is sent.

        Raises:
            Gone: the client has read nothing for `write_timeout`, or the connection is lost.

        """
        while self.paused is not None:
            waiting = _undelivered_bytes(transport)
            try:
                async with asyncio.timeout(self._write_timeout):
                    await self.paused
            except TimeoutError:
                if _undelivered_bytes(transport) >= waiting:
                    raise Gone from None
                if self.paused is not None:  # it reads slowly: wait again
                    self.pause()
        if transport.is_closing():
            raise Gone


class _Client(asyncio.Protocol):
    """One connection: the bytes received, and the task that answers them."""

    transport: asyncio.Transport  # the TCP connection, or TLS on top of it
    task: asyncio.Task[None]
    head: Head  # of the current request; a client is an `http11.Request`

    def __init__(self, server: Server, tls: ssl.SSLContext | None = None) -> None:
        self._server = server
        self._tls = tls
        self._wire: asyncio.Transport | None = None  # the TCP connection
        self._loop = asyncio.get_running_loop()
        self.state = State.IDLE if tls is None else State.HANDSHAKE
        self.deadline = math.inf
        self._address = "-"
        self._buffer = bytearray()
        self._waiter: asyncio.Future[None] | None = None
        self._flow = _Flow(server.limits.write_timeout)
        # Hash of the last raw head, which most clients repeat; a digest would take longer. It is
        # keyed at random, so nobody can make two heads collide, not even through a shared proxy.
        self._mark: int | None = None
        self._record: Record | None = None  # of the request that is being answered
        self._has_shown_key = False
        self._eof = False  # the client has sent FIN
        self._reading = True  # not paused
        self._unread = False  # bytes of the current body are still to come
        self.served = False  # a request was answered
        self._lagging = 0  # bytes the client had not read when the deadline was extended
        self._ahead = b""  # bytes that can be written before the rest is known
        self._probe_at = -math.inf
        self._probe_wait = 1.0  # seconds; doubles with each probe

    # Called by the transport.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start serving a client. With TLS, this is called again after the handshake."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        if self._wire is not None:
            self.state = State.IDLE
            return
        self._wire = transport
        peer = transport.get_extra_info("peername")
        self._address = peer[0] if isinstance(peer, tuple) else "-"
        server = self._server
        server.clients.add(self)
        placed = server.places.take(self)
        self.task = self._loop.create_task(self._run(placed=placed))
        if not placed and len(server.clients) - len(server.places) > MAX_SURPLUS:
            self.end(End.ABORT)

    def data_received(self, data: bytes) -> None:
        """Buffer bytes; stop reading if there are many."""
        self._buffer += data
        if len(self._buffer) > READ_AHEAD and self._reading:
            self._reading = False
            self.transport.pause_reading()
        self._wake()

    def eof_received(self) -> bool:
        """Note the client's FIN; return True to keep our side open. See "Theory of operation"."""
        self._eof = True
        self._wake()
        if self._is_encrypted():
            if self.state is State.ANSWERING:
                self.task.cancel()
            return False  # TLS cannot be half-closed
        if self.state is State.ANSWERING:
            self._expect_reset()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Remove the client, and cancel the answer to its request."""
        if self not in self._server.clients:
            return  # already called, after a failed handshake
        self._server.clients.discard(self)
        self._server.places.free(self)
        self._eof = True
        self._wake()
        self._flow.resume()
        if self.state is State.ANSWERING:
            self.task.cancel()
        del self.task  # its exception refers to frames, and they to this client: a cycle

    def pause_writing(self) -> None:
        """Note that the client reads more slowly than we write."""
        self._flow.pause()

    def resume_writing(self) -> None:
        """Note that the client has read most of what was written."""
        self._flow.resume()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _is_encrypted(self) -> bool:
        return self.transport is not self._wire

    # Called by the server.

    def has_shown_key(self) -> bool:
        """Return True if a request on this connection had a valid API key."""
        record = self._record
        return self._has_shown_key or (record is not None and record.label is not None)

    def expire(self) -> None:
        """End a wait whose deadline has passed, unless the client is still reading a response."""
        undelivered = 0 if self._buffer else _undelivered_bytes(self.transport)
        if undelivered not in {0, self._lagging}:
            self._lagging = undelivered
            self.deadline = self._loop.time() + self._server.limits.write_timeout
            return
        self.deadline = math.inf
        if self.state is State.HEAD and self._buffer:
            self._refuse(HTTPError(408, "the request's head took too long to arrive"))
        self.end(End.ABORT)

    def close_if_idle(self) -> None:
        """Close the connection if no request is under way."""
        # With no byte of a head, at most the empty line has arrived that may come before one.
        waits = self.state in {State.IDLE, State.HEAD} and not self._buffer
        if self.state is State.HANDSHAKE:
            self.end(End.ABORT)
        elif not waits or self.transport.is_closing():
            return
        elif not self._is_encrypted():
            self.end(End.CLOSE)
        elif _undelivered_bytes(self.transport):
            self._wake()  # the task ends when that is read
        else:
            self.end(End.ABORT)  # a close would wait for the client to agree

    def check_presence(self) -> None:
        """Stop answering a client that has closed its socket, and not only its sending side."""
        if self.state is not State.ANSWERING or (self._reading and not self._eof):
            return  # the transport reports if it leaves
        tcp = _tcp_state(self._wire)
        gone = tcp == _TCP_CLOSE or (self._is_encrypted() and tcp == _TCP_CLOSE_WAIT)
        if gone:
            self._eof = True
            self.end(End.ABORT)
        elif self._eof or tcp == _TCP_CLOSE_WAIT:
            self._probe()

    def _expect_reset(self) -> None:
        """Check now, and soon once more, if a client that has sent FIN is still there."""
        self.check_presence()
        self._loop.call_later(RECHECK_INTERVAL, self.check_presence)

    def _probe(self) -> None:
        """Write a byte that is needed anyway; a closed socket answers it with a reset."""
        now = self._loop.time()
        if self._ahead and now >= self._probe_at and self._flow.paused is None:
            self._server.outbox.flush()
            if self._ahead is _EVERY_CHUNK:
                _reset_at_close(self.transport, True)
            self.transport.write(self._ahead[:1])
            self._ahead = self._ahead[1:]
            self._probe_at = now + self._probe_wait
            self._probe_wait *= 2

    def end(self, how: End) -> None:
        """End the connection, and its task unless that is the caller."""
        if how is End.CLOSE:
            self.transport.close()
        else:
            if how is End.RESET:
                _reset_at_close(self.transport, True)
            self.transport.abort()
        if self.task is not asyncio.current_task():
            self.task.cancel()

    # Requests.

    async def _run(self, *, placed: bool) -> None:
        try:
            if await self._begin(placed=placed):
                while await self._cycle():
                    if self._buffer:
                        await asyncio.sleep(0)  # pipelined requests leave the others a turn
                    if self._eof and _tcp_state(self._wire) == _TCP_CLOSE:
                        raise Gone  # nobody waits for the pipelined requests' answers
                self._server.outbox.flush()
                if self._is_encrypted():
                    await self._finish_writing()  # a close would allow only a few seconds
            await self._linger()
        except (Gone, OSError):
            self.end(End.ABORT)
        finally:
            self.state = State.CLOSING
            self._server.places.free(self)
            if not self.transport.is_closing():
                self.end(End.CLOSE)
            self.deadline = self._loop.time() + self._server.limits.write_timeout

    async def _begin(self, *, placed: bool) -> bool:
        """Set up TLS if it is used; return True if requests can be served."""
        if self._tls is not None:
            if not await self._greets_with_tls():
                return False
            await self._shake_hands(self._tls)
            if not self._is_encrypted():
                return False
        if not placed:
            self._refuse(_surplus(self._server.limits.max_connections))
        return placed

    async def _greets_with_tls(self) -> bool:
        """Wait for the first byte; return False if it does not begin a TLS handshake.

        A client that speaks plain HTTP gets an error in plain HTTP.
        """
        self.deadline = self._loop.time() + self._server.limits.head_timeout
        while not self._buffer:
            if self._eof:
                return False
            await self._more()
        self.deadline = math.inf
        if not cannot_be_head(self._buffer[:1]):
            self._refuse(HTTPError(400, "this port speaks HTTPS: use https:// instead of http://"))
            return False
        return True

    async def _shake_hands(self, context: ssl.SSLContext) -> None:
        """Set up TLS on the connection; a failure ends the connection.

        `loop.start_tls` cannot be used, as there is no way to give it the bytes received so far.
        """
        limits, wire = self._server.limits, self.transport
        hello = bytes(self._buffer)
        self._buffer.clear()
        if not self._reading:
            self._read_on()
        done = self._loop.create_future()
        protocol = SSLProtocol(
            self._loop,
            self,
            context,
            done,
            server_side=True,
            ssl_handshake_timeout=limits.head_timeout,  # type: ignore[arg-type] # a float is fine
            ssl_shutdown_timeout=limits.linger_timeout,
        )
        try:
            wire.set_protocol(protocol)
            protocol.connection_made(wire)
            protocol.get_buffer(len(hello))[: len(hello)] = hello
            protocol.buffer_updated(len(hello))
            await done
        except OSError as error:
            log.debug("a TLS handshake failed: %s", getattr(error, "reason", None) or error)
        finally:
            if not self._is_encrypted():  # then no callback reports the connection's end
                wire.abort()
                self.connection_lost(None)

    async def _cycle(self) -> bool:
        """Answer one request; return True if another may follow."""
        try:
            raw = await self._next_head()
            if raw is None:
                return False
            mark = hash(raw)
            if mark != self._mark:
                self.head, self._mark = self._server.parse_head(raw), mark
        except HTTPError as error:
            self._refuse(error)
            return False
        head = self.head
        self._record = record = Record(self._address)
        record.request_id = _request_id(head)
        self.state = State.ANSWERING
        self._unread = head.has_body
        self._ahead = _EVERY_RESPONSE
        if self._eof:
            self._expect_reset()
        try:
            return await self._answer(head, record)
        except (Gone, OSError):
            record.status = GONE
            raise
        except asyncio.CancelledError:
            record.status = GONE if self._eof else record.status
            raise
        finally:
            self.state = State.IDLE
            self.served = True
            self._has_shown_key |= record.label is not None
            self._record = None
            self._end_record(record)

    async def _answer(self, head: Head, record: Record) -> bool:
        try:
            response = await self._server.handler(self, record)
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
            log.exception("a request failed because of a bug in OllProx")
            failure = HTTPError(500, "OllProx failed; its log has the details")
        if record.status:  # the response has begun, so all that is left is to cut it
            await self._cut(head)
            return False
        if failure.status == 429 and record.label is None:
            await asyncio.sleep(GUESS_DELAY)
            head = replace(head, keep_alive=False)
        return await self._send(head, self._server.render_error(failure, head, record), record)

    async def _next_head(self) -> bytes | None:
        """Wait for a complete head; return None if the client leaves before that.

        Raises:
            BadHead: the bytes are not a head.

        """
        buffer = self._buffer
        checked = 0
        begun = False  # a byte of the head has arrived
        skipped = False  # RFC 9112 section 2.2: one empty line may come before a request
        while True:
            if not skipped and buffer.startswith(b"\r\n"):
                del buffer[:2]
                skipped, checked = True, 0
            if buffer and (raw := self._take_head(checked)):
                self.deadline = math.inf
                return raw
            if self._eof or (self._server.draining and self.served and not buffer):
                return None
            if not begun:
                begun = skipped or bool(buffer)
                self._set_deadline(begun=begun)
            checked = len(buffer)
            await self._more()

    def _take_head(self, checked: int) -> bytes:
        """Take a head from the buffer; return b"" if it is not complete yet. Raises BadHead."""
        buffer, limit = self._buffer, self._server.limits.max_head
        end = buffer.find(b"\r\n\r\n", max(0, checked - 3)) + 4
        if 4 <= end <= limit:
            raw = bytes(buffer[:end])
            del buffer[:end]
            return raw
        if len(buffer) > limit:
            raise BadHead(431, f"the head is larger than {limit} bytes (MAX_HEAD_BYTES)")
        if cannot_be_head(buffer, checked) or buffer.startswith(b"\r\n"):
            raise BadHead(400, "the request's head is malformed")
        return b""

    def _set_deadline(self, *, begun: bool) -> None:
        """Set the deadline for a head, or for its first byte."""
        limits = self._server.limits
        if begun:
            self.state = State.HEAD
        idle = self.served and not begun
        wait = limits.keepalive_timeout if idle else limits.head_timeout
        self.deadline = self._loop.time() + wait

    async def _more(self) -> None:
        """Wait for more bytes, or for the client's FIN."""
        if not self._reading:
            self._read_on(len(self._buffer))
        self._waiter = self._loop.create_future()
        await self._waiter

    def _read_on(self, most: int = READ_AHEAD) -> None:
        """Resume reading if at most `most` bytes are buffered; only then is a FIN noticed."""
        if len(self._buffer) <= most:
            self._reading = True
            self.transport.resume_reading()

    async def read(self, limit: int) -> bytes:
        """Read the complete body of the current request; see `Request.read`."""
        length = self.head.length
        if length is not None and length <= len(self._buffer) and length <= limit:  # it has arrived
            body = bytes(self._buffer[:length])
            del self._buffer[:length]
            self._unread = False
            if not self._reading:
                self._read_on()
            return body
        parts = [part async for part in self.pieces(limit)]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def pieces(self, limit: int = sys.maxsize) -> AsyncIterator[bytes]:
        """Read the body of the current request as it arrives; see `Request.pieces`."""
        head = self.head
        decoder = ChunkedDecoder(limit) if head.chunked else LengthDecoder(head.length or 0, limit)
        if head.expects_continue and self._unread and not self._buffer and not self._eof:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        async for piece in read_body(decoder, self._buffer, self._more_body):
            self._unread = not decoder.done
            if not self._reading:
                self._read_on()
            yield piece
        self._unread = False

    async def _more_body(self) -> bool:
        if self._eof:
            raise Gone
        seconds = self._server.limits.body_timeout
        try:
            async with asyncio.timeout(seconds):
                await self._more()
        except TimeoutError:
            raise HTTPError(408, f"no byte of the body came for {seconds:g} s") from None
        return True

    # Responses.

    async def _send(self, head: Head, response: Response, record: Record) -> bool:
        """Write a response; return True if the connection can be used again."""
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
        if self._flow.paused is not None:
            await self._flow.drain(self.transport)
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
        if self._flow.paused is not None:
            await self._flow.drain(self.transport)
        return again

    def _frame(
        self,
        response: Response,
        record: Record,
        length: int | None,
        *,
        again: bool,
        chunked: bool,
        http10: bool,
    ) -> bytes:
        """Return a response's head, without the bytes that probes have already sent."""
        if length is not None and response.status != 204:
            framing = b"Content-Length: %d\r\n" % length
        else:
            framing = b"Transfer-Encoding: chunked\r\n" if chunked else b""
            if not isinstance(response.body, bytes):
                framing += b"X-Accel-Buffering: no\r\n"  # else nginx would buffer the lines
        if not again:
            framing += b"Connection: close\r\n"
        elif http10:
            framing += b"Connection: keep-alive\r\n"
        framed = b"%bCache-Status: %b\r\nX-Request-ID: %b\r\n%b%b\r\n" % (
            frame_start(response.status, response.headers, http_date()),
            record.cache_status,
            record.request_id,
            frame_headers(record.headers),
            framing,
        )
        if self._ahead is not _EVERY_RESPONSE:  # probes have sent some
            framed = framed[len(_EVERY_RESPONSE) - len(self._ahead) :]
        self._ahead = b""
        return framed

    async def _write_slices(self, body: bytes, record: Record) -> None:
        """Write a long body as fast as the client reads it."""
        for start in range(0, len(body), SLICE):
            if self._flow.paused is not None:
                await self._flow.drain(self.transport)
            part = body[start : start + SLICE]
            self._write(part, part, record)

    async def _write_stream(
        self, body: AsyncIterator[bytes], record: Record, *, chunked: bool
    ) -> None:
        _bound_unacknowledged(self.transport, self._server.limits.write_timeout)
        self._ahead = _EVERY_CHUNK if chunked else b""
        async for piece in body:
            if piece:
                self._write(frame_chunk(piece) if chunked else piece, piece, record)
            if self._flow.paused is not None:
                await self._flow.drain(self.transport)
        if chunked:
            self.transport.write(LAST_CHUNK)
            if self._ahead is not _EVERY_CHUNK:  # it was probed
                await self._finish_writing()
                _reset_at_close(self.transport, False)
        self._ahead = b""

    def _write(self, framed: bytes, body: bytes, record: Record, *, soon: bool = False) -> None:
        if record.first_byte is None:
            record.first_byte = time.monotonic()
        record.bytes_sent += len(body)
        if soon:
            self._server.outbox.put(self.transport, framed)
        else:
            self.transport.write(framed)

    async def _finish_writing(self) -> None:
        """Wait until everything is handed to the kernel. Raises Gone."""
        self.transport.set_write_buffer_limits(high=int(self._is_encrypted()))  # TLS: 0 is full
        await self._flow.drain(self.transport)
        try:
            async with asyncio.timeout(self._server.limits.write_timeout):
                # The bytes that TLS has encrypted: no callback reports when they are sent.
                while self._wire is not None and self._wire.get_write_buffer_size():  # noqa: ASYNC110
                    await asyncio.sleep(RECHECK_INTERVAL)
        except TimeoutError:
            raise Gone from None

    async def _cut(self, head: Head) -> None:
        """End a truncated response so that it cannot look complete.

        A chunked body is left without its last chunk. In HTTP/1.0, a close would mark the body's
        end, so the connection is reset once the bytes are sent.
        """
        if head.http10:
            with suppress(Gone):
                await self._finish_writing()
            self.end(End.RESET)

    def _refuse(self, error: HTTPError) -> None:
        """Answer bytes that are not a request; the connection ends after the answer."""
        self.state = State.REFUSED
        record = Record(self._address)
        record.status = error.status
        record.request_id = _request_id(None)
        response = self._server.render_error(error, None, record)
        body = response.body if isinstance(response.body, bytes) else b""
        self._ahead = _EVERY_RESPONSE
        framed = self._frame(response, record, len(body), again=False, chunked=False, http10=False)
        self._write(framed + body, body, record)
        self._unread = True
        self.deadline = math.inf  # `_linger` has its own
        self._end_record(record)

    def _end_record(self, record: Record) -> None:
        """End the record of a request. It may be remembered, but not its headers."""
        record.ended = time.monotonic()
        record.headers = ()
        self._server.done(record)

    async def _linger(self) -> None:
        """Discard what the client is still sending.

        A close with unread bytes resets the connection, and the client may lose the last
        response (RFC 9112 section 9.6).
        """
        if not self._unread or self._eof:
            return
        if self.transport.can_write_eof():
            self.transport.write_eof()  # raises OSError if the connection was reset
        until = self._loop.time() + self._server.limits.head_timeout
        with suppress(TimeoutError):
            while not self._eof and self._loop.time() < until:
                self._buffer.clear()
                async with asyncio.timeout(self._server.limits.linger_timeout):
                    await self._more()


def _undelivered_bytes(transport: asyncio.Transport) -> int:
    """Count the bytes that the client has not received, in our buffer and the kernel's."""
    sock: Any = transport.get_extra_info("socket")
    count = array.array("i", [0])
    with suppress(OSError, ValueError, AttributeError):  # AttributeError: the module is missing
        fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, count)
    return transport.get_write_buffer_size() + count[0]


def _tcp_state(transport: asyncio.Transport | None) -> int:
    """Return the TCP state of a connection, 0 if it is unknown."""
    sock: Any = transport and transport.get_extra_info("socket")
    try:
        state: int = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    except (OSError, AttributeError):
        return 0
    return state


def _bound_unacknowledged(transport: asyncio.Transport, seconds: float) -> None:
    """Make the kernel drop the connection if the client acknowledges nothing for this long."""
    sock: Any = transport.get_extra_info("socket")
    milliseconds = int(1000 * max(seconds, MIN_USER_TIMEOUT))
    with suppress(OSError, AttributeError, OverflowError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)


def _reset_at_close(transport: asyncio.Transport, reset: bool) -> None:
    """Choose whether a close resets the connection."""
    sock: Any = transport.get_extra_info("socket")
    if sock is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", reset, 0))


def _surplus(most: int) -> HTTPError:
    return HTTPError(
        503,
        f"OllProx serves {most} connections at once (MAX_CONNECTIONS)",
        ((b"Retry-After", b"1"),),
    )


_PROCESS = secrets.token_hex(4).encode()  # the prefix of this process's request ids
_numbers = itertools.count(1)
_SANE_ID = re.compile(rb"[\w.:/+=@-]{1,128}", re.ASCII)


def _request_id(head: Head | None) -> bytes:
    """Return the request's own id if it is well formed, else a new one."""
    if head is not None and b"x-request-id" in head.names:
        given = head.get(b"x-request-id")
        if given is not None and _SANE_ID.fullmatch(given):
            return given
    return b"%b-%x" % (_PROCESS, next(_numbers))


_date: tuple[int, bytes] = (0, b"")


def http_date() -> bytes:
    """Return the current time as an HTTP date, which is formatted once a second."""
    global _date
    now = int(time.time())
    if _date[0] != now:
        _date = now, formatdate(now, usegmt=True).encode()
    return _date[1]
