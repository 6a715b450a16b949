"""Connections to upstream: hosts that vanish, addresses that fail, and sockets without leaks."""

import asyncio
import contextlib
import ctypes
import os
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from client import Client, ask, question, request
from conftest import Start
from standin import Script, StandIn

import wire.upstream
from wire.http11 import Ask, HTTPError
from wire.upstream import VIA, Upstream, add_via, forwarded, sent_by_us

CLONE_NEWNET = 0x40000000
HOST, OLLAMA = "10.99.0.1", "10.99.0.2"


def make(port: int, host: str = "127.0.0.1", connect_timeout: float = 5) -> Upstream:
    return Upstream(
        host,
        port,
        f"{host}:{port}",
        connect_timeout=connect_timeout,
        first_byte_timeout=5,
        idle_timeout=5,
    )


# Hosts that vanish.


class Hosts:
    """Two hosts with a cable between them; this process is on the first, Ollama on the second."""

    def __init__(self) -> None:
        self.names = [f"ollprox-{os.getpid()}-{side}" for side in "ab"]
        self.home = os.open("/proc/self/ns/net", os.O_RDONLY)

    def make(self) -> None:
        first, second = self.names
        for name in self.names:
            self.ip("netns", "add", name)
            self.ip("-n", name, "link", "set", "lo", "up")
        veth = ("link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", second)
        self.ip("-n", first, *veth)
        for name, address in ((first, HOST), (second, OLLAMA)):
            self.ip("-n", name, "link", "set", "cable", "up")
            self.ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
        self.enter(Path("/run/netns") / first)

    def listen(self) -> socket.socket:
        """Listen on the second host."""
        self.enter(Path("/run/netns") / self.names[1])
        listening = socket.create_server((OLLAMA, 0))
        self.enter(Path("/run/netns") / self.names[0])
        return listening

    def unplug(self) -> None:
        """Let the second host vanish: it answers nothing, and sends nothing."""
        self.ip("-n", self.names[1], "addr", "del", f"{OLLAMA}/24", "dev", "cable")

    def plug_in(self) -> None:
        self.ip("-n", self.names[1], "addr", "add", f"{OLLAMA}/24", "dev", "cable")

    def set_own_link(self, state: str) -> None:
        self.ip("-n", self.names[0], "link", "set", "cable", state)

    def remove(self) -> None:
        self.enter(self.home)
        os.close(self.home)
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    @staticmethod
    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    @staticmethod
    def enter(namespace: Path | int) -> None:
        opened = os.open(namespace, os.O_RDONLY) if isinstance(namespace, Path) else namespace
        if ctypes.CDLL(None, use_errno=True).setns(opened, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns is not permitted")
        if isinstance(namespace, Path):
            os.close(opened)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if shutil.which("ip") is None:
        pytest.skip("iproute2 is not installed")
    made = Hosts()
    try:
        made.make()
        yield made
    except (subprocess.CalledProcessError, OSError) as error:
        pytest.skip(f"network namespaces are not permitted: {error}")
    finally:
        made.remove()


@contextlib.asynccontextmanager
async def far_ollama(hosts: Hosts, script: Script | None = None) -> AsyncIterator[StandIn]:
    standin = StandIn(script)
    listening = hosts.listen()
    standin.port = listening.getsockname()[1]
    standin._server = await asyncio.start_server(standin._serve, sock=listening)
    try:
        yield standin
    finally:
        standin.script.let_go.set()
        await standin.stop()


async def test_a_host_that_vanishes_under_a_request_is_found_within_30_s(
    launch: Start, hosts: Hosts
) -> None:
    """Before its first byte, in mid-stream, and whoever joined."""
    async with far_ollama(hosts, Script(hold_before=1)) as ollama:
        ollprox = await launch(OLLAMA_HOST=f"{OLLAMA}:{ollama.port}", MODEL_REFRESH=0)
        async with Client(ollprox.port) as first, Client(ollprox.port) as streamed:
            answer = await streamed.begin("POST", "/api/generate", question("stream"))
            await anext(streamed.chunks(answer))
            ollama.script.hold_head = True
            await first.send(request("POST", "/call_model", question("wait")))
            await ollama.until(lambda: len(ollama.asked()) == 2)
            async with Client(ollprox.port) as joined:
                await joined.send(request("POST", "/call_model", question("wait")))
                await asyncio.sleep(0.1)  # until the kernel has acknowledged what was read
                hosts.unplug()
                began = time.monotonic()
                async with asyncio.timeout(30):
                    for client in (first, joined):
                        failed = await client.rest(await client.head())
                        assert failed.status == 502
                        assert "vanished" in failed.json()["error"]
                    with contextlib.suppress(asyncio.IncompleteReadError):
                        await streamed.rest(answer)
                assert not answer.complete
                assert "vanished in the middle" in answer.lines()[-1]["error"]
                assert time.monotonic() - began > 10  # a silent host is not a vanished one
        hosts.plug_in()


@pytest.mark.parametrize("own_link", [False, True])
async def test_a_kept_connection_to_a_vanished_host_costs_no_more_than_a_connect(
    launch: Start, hosts: Hosts, own_link: bool
) -> None:
    async with far_ollama(hosts) as ollama:
        ollprox = await launch(
            OLLAMA_HOST=f"{OLLAMA}:{ollama.port}",
            MODEL_REFRESH=0,
            CONNECT_TIMEOUT=2,
        )
        async with asyncio.TaskGroup() as group:  # several connections are kept
            for number in range(3):
                asked = ask(ollprox.port, "POST", "/call_model", question(str(number)))
                group.create_task(asked)
        if own_link:
            hosts.set_own_link("down")
        else:
            hosts.unplug()
        began = time.monotonic()
        failed = await ask(ollprox.port, "POST", "/call_model", question("gone"))
        assert failed.status == 502
        assert "reached" in failed.json()["error"]
        # One timeout for the kept connection, of the three, and one to connect; 1 s to spare.
        assert time.monotonic() - began < 2 + 2 + 1
        if own_link:
            hosts.set_own_link("up")
        else:
            hosts.plug_in()
        async with asyncio.timeout(20):
            while (await ask(ollprox.port, "POST", "/call_model", question("b"))).status != 200:
                pass


async def test_a_peer_that_reads_nothing_has_not_vanished() -> None:
    """Its kernel acknowledges; a slow disk must not end an upload."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        upstream = make(listening.getsockname()[1])
        connection = await upstream._connect()
        peer, _ = listening.accept()
        connection.patience = 0.3
        connection.write(b"x" * (32 << 20))
        began = loop.time()
        while loop.time() - began < 2:
            assert not connection.is_unanswered(time.monotonic())
            await asyncio.sleep(0.02)
        await connection.abort()
        peer.close()


async def test_the_kernel_watches_upstreams_host() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        upstream = make(listening.getsockname()[1])
        connection = await upstream._connect()
        plain = connection._socket
        assert plain is not None
        assert plain.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        for name, value in (
            ("TCP_KEEPIDLE", 10),
            ("TCP_KEEPINTVL", 5),
            ("TCP_KEEPCNT", 2),
            ("TCP_USER_TIMEOUT", 20_000),
        ):
            if hasattr(socket, name):
                assert plain.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) == value
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            connection.watch_host(uploads=True)  # a receiver may read nothing for long
            assert plain.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0
        await connection.abort()
        connection.watch_host(uploads=True)  # no fault, though it is closed


async def test_a_broken_first_address_costs_less_than_a_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    standin = StandIn()
    port = await standin.start()
    loop = asyncio.get_running_loop()
    with socket.socket() as full, contextlib.ExitStack() as stack:
        full.bind(("127.0.0.2", port))
        full.listen(0)
        while True:  # fill its queue: what comes then is not answered
            filler = stack.enter_context(socket.socket())
            filler.settimeout(0.1)
            try:
                filler.connect(("127.0.0.2", port))
            except TimeoutError:
                break

        async def resolve(*_: object, **__: object) -> list[object]:
            return [
                (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
                for address in ("127.0.0.2", "127.0.0.1")
            ]

        monkeypatch.setattr(loop, "getaddrinfo", resolve)
        upstream = make(port, "two-addresses.example", connect_timeout=3)
        began = time.monotonic()
        async with upstream.exchange(Ask(b"GET", b"/api/version", VIA)) as response:
            assert response.status == 200
        assert time.monotonic() - began < 1
        await upstream.close()
    await standin.stop()


# Who owns a socket.


@contextlib.asynccontextmanager
async def early_answer() -> AsyncIterator[tuple[int, asyncio.Event]]:
    """An upstream that answers an upload before it is complete; reports when its client is gone."""
    gone = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while await reader.read(65536):
                pass
        gone.set()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1], gone
    server.close()


async def test_an_upload_cancelled_while_it_ends_closes_its_connection() -> None:
    ending = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        try:
            yield b"piece"
            await asyncio.Event().wait()
        finally:  # as a client's body may take a moment to end
            ending.set()
            await asyncio.sleep(0.1)

    async with early_answer() as (port, gone), asyncio.timeout(5):
        upstream = make(port)
        exchange = upstream.exchange(Ask(b"POST", b"/api/blobs/x", (), body()))
        entering = asyncio.create_task(exchange.__aenter__())
        await ending.wait()
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
        await gone.wait()
        assert not upstream._waiting


async def test_a_connection_whose_upload_was_cut_carries_no_other_request() -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"piece"
        await asyncio.Event().wait()

    async with early_answer() as (port, gone), asyncio.timeout(5):
        upstream = make(port)
        async with upstream.exchange(Ask(b"POST", b"/api/blobs/x", (), body())) as response:
            assert response.status == 200
        assert not upstream._idle
        await gone.wait()


async def test_every_way_out_leaves_no_connection_behind(ollama: StandIn) -> None:
    """Cancel at each step of an exchange; then ask whether anything is left."""
    for steps in range(60):
        upstream = make(ollama.port)

        async def asks(upstream: Upstream = upstream) -> None:
            async with upstream.exchange(
                Ask(b"POST", b"/api/generate", (), b'{"model":"llama2","prompt":"x"}')
            ) as response:
                async for _ in response.body:  # type: ignore[union-attr]
                    pass

        task = asyncio.create_task(asks())
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert not upstream._waiting
        await upstream.close()
    await ollama.until(lambda: ollama.connections == 0)


async def test_a_head_that_comes_byte_by_byte_is_searched_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    searched = 0

    def count(start: bytearray, checked: int = 0) -> bool:
        nonlocal searched
        searched += len(start) - checked
        return False

    monkeypatch.setattr(wire.upstream, "cannot_be_head", count)
    head = b"HTTP/1.1 200 OK\r\nX: " + b"x" * 20_000 + b"\r\nContent-Length: 0\r\n\r\n"
    with socket.create_server(("127.0.0.1", 0)) as listening:
        upstream = make(listening.getsockname()[1])
        connection = await upstream._connect()
        reading = asyncio.create_task(upstream._raw_head(connection, 0))
        for byte in head:
            connection.stream.feed_data(bytes([byte]))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert await reading == head
        assert searched <= len(head)
        await connection.abort()


# Credentials.


async def test_credentials_go_to_their_own_server_alone(ollama: StandIn) -> None:
    behind_a_gateway = Upstream(
        "127.0.0.1",
        ollama.port,
        "gateway",
        connect_timeout=5,
        first_byte_timeout=5,
        idle_timeout=5,
        authorization=b"Basic c2VjcmV0",
    )
    plain = make(ollama.port)
    for upstream, wanted in ((behind_a_gateway, ["Basic c2VjcmV0"]), (plain, ["Bearer client"])):
        headers = ((b"authorization", b"Bearer client"), *VIA)  # as if one had slipped through
        async with upstream.exchange(Ask(b"GET", b"/api/ps", headers)) as response:
            assert response.status == 200
        sent = [v for n, v in ollama.asked("/api/ps")[-1].headers if n.lower() == "authorization"]
        assert sent == wanted
        await upstream.close()
    ollama.script.raw = b"HTTP/1.1 401 X\r\nContent-Length: 0\r\n\r\n"
    with pytest.raises(HTTPError) as caught:
        await behind_a_gateway.exchange(Ask(b"GET", b"/api/ps", VIA)).__aenter__()
    assert "c2VjcmV0" not in caught.value.message


# Small things.


def test_our_own_via_is_told_from_that_of_another_ollprox() -> None:
    ((_, ours),) = VIA
    assert sent_by_us(ours)
    assert sent_by_us(b"1.0 a, " + ours + b" (comment), 1.1 b")
    for other in (b"", b",", b"1.1", b"1.1 OllProx", b"1.1 OllProx-0123456789abcdef", ours + b"0"):
        assert not sent_by_us(other)
    assert add_via(None) == VIA
    assert add_via(b"1.1 a") == ((b"Via", b"1.1 a, " + ours),)
    assert forwarded(b"1.1 a")[-1] == add_via(b"1.1 a")[0]


@pytest.mark.parametrize("status", [401, 407, 302])
async def test_a_refused_response_leaves_no_connection(ollama: StandIn, status: int) -> None:
    ollama.script.raw = b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n" % status
    upstream = make(ollama.port)
    with pytest.raises(HTTPError, match=r"credentials|redirects") as caught:
        await upstream.exchange(Ask(b"GET", b"/api/ps", ())).__aenter__()
    assert caught.value.status == 502
    assert not upstream._waiting
    assert not upstream._idle
