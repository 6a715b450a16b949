"""Slow readers get everything that was sent to them, whatever else ends in the meantime.

The server runs in this process, with small socket buffers.
"""

import asyncio
import contextlib
import math
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import pytest
from test_limits import certificate

from record import Record
from wire.http11 import Head, HTTPError, Request, Response, Truncated, parse_request_head
from wire.server import Limits, Server, _Client

BODY = b"x" * 200_000  # more than all buffers of the kernel
GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
LIMITS = Limits(linger_timeout=0.001)  # so that TLS is given no time at a close


class Setting:
    """A server, and one client that reads on demand."""

    def __init__(self, cert: tuple[Path, Path] | None, limits: Limits = LIMITS) -> None:
        self.answered = asyncio.Event()
        parse = partial(parse_request_head, take_credential=lambda path, pairs: ((), path, pairs))
        self.server = Server(self.answer, self.render, parse, self.done, limits)
        self.cert = cert
        self.client: socket.socket

    async def answer(self, request: Request, record: Record) -> Response:
        return Response(200, (), BODY)

    def render(self, error: HTTPError, head: Head | None, record: Record) -> Response:
        return Response(error.status, (), b"")

    def done(self, record: Record) -> None:
        self.answered.set()

    async def ask(self, request: bytes) -> None:
        """Send a request, and wait until its response is under way."""
        await self.connect(4096)
        await asyncio.to_thread(self._send, request)
        await self.answered.wait()
        await asyncio.sleep(0)  # it is written
        await asyncio.sleep(0)

    async def connect(self, buffers: int) -> socket.socket:
        """Connect a client with buffers of so many bytes."""
        ours, self.client = socket.socketpair()
        for end in (ours, self.client):
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                end.setsockopt(socket.SOL_SOCKET, option, buffers)
        accept: Callable[[], asyncio.Protocol] = partial(_Client, self.server)
        if self.cert is not None:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(*self.cert)
            accept = partial(_Client, self.server, context)
        await asyncio.get_running_loop().connect_accepted_socket(accept, ours)
        return self.client

    def _send(self, request: bytes) -> None:
        if self.cert is not None:
            context = ssl.create_default_context(cafile=self.cert[0])
            self.client = context.wrap_socket(self.client, server_hostname="localhost")
        self.client.sendall(request)

    async def read(self) -> bytes:
        return await asyncio.to_thread(self._read)

    def _read(self) -> bytes:
        """Read a response, or as much of it as there is."""
        came = b""
        with contextlib.suppress(OSError):
            while len(came) < len(BODY) or not came.endswith(BODY):
                if not (part := self.client.recv(65536)):
                    break
                came += part
        return came

    async def end(self) -> None:
        self.client.close()
        await self.server.abort()
        while self.server.clients:
            await asyncio.sleep(0)
        await asyncio.sleep(0.001)  # the transports end


@pytest.fixture(params=["plain", "tls"])
def cert(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path] | None:
    return certificate(tmp_path, "first") if request.param == "tls" else None


async def test_an_idle_client_that_still_reads_is_not_idle(cert: tuple[Path, Path] | None) -> None:
    setting = Setting(cert)
    await setting.ask(GET)
    later = asyncio.get_running_loop().time() + LIMITS.keepalive_timeout + 1
    setting.server.check_deadlines(later)
    assert (await setting.read()).endswith(BODY)
    setting.server.check_deadlines(math.inf)  # it has read all: now it is
    assert await asyncio.to_thread(setting.client.recv, 1) == b""
    await setting.end()


async def test_an_idle_client_that_reads_nothing_is_dropped(cert: tuple[Path, Path] | None) -> None:
    setting = Setting(cert)
    await setting.ask(GET)
    setting.server.check_deadlines(1e12)
    assert setting.server.clients
    setting.server.check_deadlines(1e12)
    assert not (await setting.read()).endswith(BODY)
    await setting.end()


async def test_who_reads_while_the_server_stops_gets_all(
    cert: tuple[Path, Path] | None,
) -> None:
    setting = Setting(cert)
    await setting.ask(GET)
    drain = asyncio.create_task(setting.server.drain(30))
    await asyncio.sleep(0.01)
    came, _ = await asyncio.gather(setting.read(), drain)
    assert came.endswith(BODY)
    await setting.end()


@pytest.mark.parametrize("size", [0, 60_000, 100_000])  # the last is more than is read ahead
@pytest.mark.parametrize("step", [1, 1000])
async def test_a_request_that_comes_with_the_handshakes_end_is_answered(
    tmp_path: Path, size: int, step: int
) -> None:
    """The client's last flight and its request arrive together; its first flight is cut up."""
    setting = Setting(certificate(tmp_path, "first"))
    bodies = []

    async def answer(request: Request, record: Record) -> Response:
        bodies.append(await request.read(size))
        return Response(200, (), b"")

    setting.server.handler = answer
    loop = asyncio.get_running_loop()
    client = await setting.connect(1 << 20)
    client.setblocking(False)
    assert setting.cert
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.create_default_context(cafile=setting.cert[0])
    tls = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    hello = outgoing.read()
    for start in range(0, len(hello), step):
        await loop.sock_sendall(client, hello[start : start + step])
        await asyncio.sleep(0)
    while tls.version() is None or not outgoing.pending:
        incoming.write(await loop.sock_recv(client, 65536))
        with contextlib.suppress(ssl.SSLWantReadError):
            tls.do_handshake()
    body = b"x" * size
    tls.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (size, body))
    client.send(outgoing.read())
    reply = b""
    async with asyncio.timeout(5):
        while not reply:
            incoming.write(await loop.sock_recv(client, 65536))
            with contextlib.suppress(ssl.SSLWantReadError):
                reply += tls.read(65536)
    assert reply.startswith(b"HTTP/1.1 200 OK")
    assert bodies == [body]
    await setting.end()


async def test_the_kernel_probes_silent_clients() -> None:
    """Accepted sockets inherit it from the listening one."""
    setting = Setting(None)
    server = setting.server
    port = await server.listen("127.0.0.1", 0)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(GET)
    assert await reader.readexactly(1)
    (client,) = server.clients
    sock = client.transport.get_extra_info("socket")
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    for option, seconds in ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5)):
        assert sock.getsockopt(socket.IPPROTO_TCP, option) == seconds
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 3
    assert not sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
    writer.transport.abort()
    await server.drain(1)
    await asyncio.sleep(0.001)


async def test_a_stream_to_a_client_that_vanished_ends() -> None:
    """What is never acknowledged would be sent again for a quarter of an hour."""
    setting = Setting(None)
    server = setting.server
    more = asyncio.Event()

    async def lines() -> AsyncIterator[bytes]:
        yield b"line\n"
        await more.wait()

    async def answer(request: Request, record: Record) -> Response:
        return Response(200, (), lines())

    server.handler = answer
    port = await server.listen("127.0.0.1", 0)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(GET)
    await reader.readuntil(b"line\n")
    (client,) = server.clients
    sock = client.transport.get_extra_info("socket")
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000
    more.set()
    writer.transport.abort()
    await server.drain(1)
    await asyncio.sleep(0.001)


async def test_a_cut_is_seen_at_once(cert: tuple[Path, Path] | None) -> None:
    """Over HTTP/1.0, where the client's end of the connection is the only sign of it."""
    setting = Setting(cert, Limits(write_timeout=3600))

    async def cut() -> AsyncIterator[bytes]:
        yield b"a"
        raise Truncated

    async def answer(request: Request, record: Record) -> Response:
        return Response(200, (), cut())

    setting.server.handler = answer
    await setting.ask(b"GET / HTTP/1.0\r\n\r\n")
    assert len(await setting.read()) < 1000  # or it would wait for an hour
    await setting.end()
