"""Limits: each is exceeded, while a normal client at the same address still gets answers."""

import asyncio
import contextlib
import os
import resource
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from client import KEY, Client, ask, question, raw, request
from conftest import Program, Start
from standin import StandIn

from access.credentials import MAX_ADDRESSES, MAX_WRONG, WrongKeys
from wire.server import GUESS_DELAY


@contextlib.asynccontextmanager
async def served(ollprox: Program) -> AsyncIterator[None]:
    """A client with a valid key, from the same address, asks all the while."""
    stop = asyncio.Event()
    answers: list[int] = []

    async def keep_asking() -> None:
        async with Client(ollprox.port) as client:
            while not stop.is_set() or not answers:
                answer = await client.ask("POST", "/call_model", question())
                answers.append(answer.status)
                await asyncio.sleep(0.01)

    task = asyncio.create_task(keep_asking())
    try:
        while not answers:
            await asyncio.sleep(0.01)
        yield
    finally:
        stop.set()
        await task
    assert set(answers) == {200}


async def test_a_head_too_large_is_431(launch: Start) -> None:
    ollprox = await launch(MAX_HEAD_BYTES="2K")
    async with served(ollprox):
        whole = await raw(ollprox.port, request("GET", "/api/tags", headers={"X": "a" * 3000}))
        endless = await raw(ollprox.port, b"GET /" + b"a" * 3000)
    assert whole.startswith(b"HTTP/1.1 431 ")
    assert endless.startswith(b"HTTP/1.1 431 ")
    assert b"2048 bytes" in whole


async def test_a_head_may_be_as_large_as_the_limit_and_not_a_byte_larger(launch: Start) -> None:
    ollprox = await launch(MAX_HEAD_BYTES=1000)
    missing = 1000 - len(request("GET", "/api/tags", headers={"X": "a"}))
    for more, status in ((0, 200), (1, 431)):
        data = request("GET", "/api/tags", headers={"X": "a" * (1 + missing + more)})
        assert len(data) == 1000 + more
        for step in (1, 700, 2000):
            async with Client(ollprox.port) as client:
                for start in range(0, len(data), step):
                    client.writer.write(data[start : start + step])
                    await asyncio.sleep(0)
                assert (await client.head()).status == status, (more, step)


async def test_a_head_may_be_larger_than_what_is_read_ahead(launch: Start) -> None:
    ollprox = await launch(MAX_HEAD_BYTES="256K")
    headers = {f"X-{number}": "a" * 10_000 for number in range(15)}
    async with asyncio.timeout(8), Client(ollprox.port) as client:
        data = request("GET", "/api/tags", headers=headers)
        for start in range(0, len(data), 70_000):
            await client.send(data[start : start + 70_000])
        assert (await client.rest(await client.head())).status == 200


async def test_a_head_too_slow_is_408(launch: Start) -> None:
    ollprox = await launch(HEAD_TIMEOUT=0.2)
    async with served(ollprox):
        reply = await raw(ollprox.port, b"POST /call_model HTTP/1.1\r\nHost: a\r\n")
        silent = await raw(ollprox.port, b"")
    assert reply.startswith(b"HTTP/1.1 408 ")
    assert silent == b""


async def test_dripping_a_head_does_not_prolong_it(launch: Start) -> None:
    ollprox = await launch(HEAD_TIMEOUT=0.5)
    async with Client(ollprox.port) as client:
        with contextlib.suppress(ConnectionError):
            while not client.reader.at_eof():
                await client.send(b"X")
                await asyncio.sleep(0.02)
    await ollprox.says("status=408")


async def test_a_body_too_slow_is_408(launch: Start, ollama: StandIn) -> None:
    ollprox = await launch(BODY_TIMEOUT=0.2)
    for headers in ({"Content-Length": "100"}, {"Transfer-Encoding": "chunked"}):
        async with served(ollprox):
            reply = await raw(ollprox.port, request("POST", "/call_model", b"", headers) + b"1")
        assert reply.startswith(b"HTTP/1.1 408 ")
    assert len(ollama.asked()) == 1


async def test_an_idle_connection_is_closed(launch: Start) -> None:
    ollprox = await launch(KEEPALIVE_TIMEOUT=0.2)
    async with Client(ollprox.port) as client:
        assert (await client.ask("POST", "/call_model", question())).status == 200
        assert await client.reader.read() == b""


async def test_a_reader_that_reads_nothing_is_dropped(launch: Start, ollama: StandIn) -> None:
    ollama.script.tokens = ["x" * 100_000] * 150  # more than the kernel buffers
    ollprox = await launch(
        WRITE_TIMEOUT=0.5,
        CACHE_MAX_ENTRY_BYTES="64M",
    )
    await ask(ollprox.port, "POST", "/api/generate", question("large"))
    ollama.script.tokens = ["small"]
    async with served(ollprox), Client(ollprox.port) as client:
        await client.send(request("POST", "/api/generate", question("large")))
        await ollprox.says("status=499 cache=hit")


async def test_connections_beyond_the_limit_are_told_so(launch: Start) -> None:
    ollprox = await launch(MAX_CONNECTIONS=3)
    async with served(ollprox), Client(ollprox.port) as one, Client(ollprox.port) as two:
        await one.ask("GET", "/api/tags")
        await two.ask("GET", "/api/tags")
        answer = await ask(ollprox.port, "GET", "/health")
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert answer.headers["connection"] == "close"
    async with asyncio.timeout(5):
        while (await ask(ollprox.port, "GET", "/health")).status != 200:
            await asyncio.sleep(0.01)


async def test_a_valid_key_gets_in_while_strangers_hold_all_places(
    launch: Start, ollama: StandIn
) -> None:
    """The oldest stranger makes room: not a caller, and not one whose answer is under way."""
    ollprox = await launch(MAX_CONNECTIONS=5, HEAD_TIMEOUT=60)
    wrong = {"APIKEY": "wrong"}
    ollama.script.hold_before = 1
    async with contextlib.AsyncExitStack() as stack:
        caller, busy, silent, probe, guesser = [
            await stack.enter_async_context(Client(ollprox.port)) for _ in range(5)
        ]
        assert (await caller.ask("GET", "/api/tags")).status == 200
        assert (await caller.ask("GET", "/health")).status == 200  # still a caller
        answer = await busy.begin("POST", "/api/generate", question())
        assert (await probe.ask("GET", "/health")).status == 200
        assert (await guesser.ask("GET", "/api/tags", headers=wrong)).status == 401
        for evicted in (silent, probe, guesser):
            another = await stack.enter_async_context(Client(ollprox.port))
            assert (await another.ask("GET", "/api/tags")).status == 200
            assert await evicted.reader.read() == b""
        assert (await ask(ollprox.port, "GET", "/api/tags")).status == 503
        ollama.script.let_go.set()
        assert (await busy.rest(answer)).complete
        assert (await caller.ask("GET", "/api/tags")).status == 200


async def test_running_out_of_files_is_one_line_and_no_end(launch: Start) -> None:
    ollprox = await launch()
    async with served(ollprox):
        used = len(os.listdir(f"/proc/{ollprox.pid}/fd"))
        _, hard = resource.prlimit(ollprox.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(ollprox.pid, resource.RLIMIT_NOFILE, (used + 2, hard))
        clients = [await asyncio.open_connection("127.0.0.1", ollprox.port) for _ in range(8)]
        await ollprox.says("ERROR .*out of system resource")
        resource.prlimit(ollprox.pid, resource.RLIMIT_NOFILE, (hard, hard))
        for _, writer in clients:
            writer.close()
        assert (await ask(ollprox.port, "GET", "/health")).status == 200
    assert ollprox.text().count("ERROR") == 1


async def test_the_limit_of_files_is_raised_at_the_start(ollprox: Program) -> None:
    soft, hard = resource.prlimit(ollprox.pid, resource.RLIMIT_NOFILE)
    assert soft == hard


async def test_wrong_keys_are_slowed_down_and_valid_ones_never(
    ollprox: Program, ollama: StandIn
) -> None:
    async with served(ollprox):
        answers = [
            await ask(ollprox.port, "GET", "/api/tags", headers={"APIKEY": f"wrong {number}"})
            for number in range(MAX_WRONG)
        ]
        assert {a.status for a in answers} == {401}
        guess = request("GET", "/api/tags", headers={"APIKEY": "wrong"})
        for _ in range(2):
            begun = time.monotonic()
            reply = await raw(ollprox.port, guess * 100)
            assert time.monotonic() - begun > GUESS_DELAY * 0.9
            assert reply.count(b"HTTP/1.1 ") == reply.count(b"HTTP/1.1 429 ") == 1
            assert b"Connection: close" in reply
            assert 0 < int(reply.split(b"Retry-After: ")[1].split(b"\r\n")[0]) <= 60
        missing = await ask(ollprox.port, "GET", "/api/tags", headers={"APIKEY": ""})
        assert missing.status == 401
        assert (await ask(ollprox.port, "GET", "/api/tags")).status == 200
    await ollprox.stop()
    assert ollprox.text().count("wrong API keys within a minute") == 1


def test_the_window_of_wrong_keys_ends_and_the_table_is_bounded() -> None:
    now = [0.0]
    wrong = WrongKeys(lambda: now[0])
    assert [wrong.count("a")[0] for _ in range(3)] == [1, 2, 3]
    now[0] = 59.5
    assert wrong.count("a") == (4, 0.5)
    now[0] = 60
    assert wrong.count("a") == (1, 60)
    for number in range(MAX_ADDRESSES + 10):
        wrong.count(f"b{number}")
    assert len(wrong._tried) == MAX_ADDRESSES
    assert wrong.count("a")[0] == 1


async def test_places_are_free_again_though_refused_clients_linger(launch: Start) -> None:
    ollprox = await launch(MAX_CONNECTIONS=2, HEAD_TIMEOUT=20)
    async with contextlib.AsyncExitStack() as refused:
        async with Client(ollprox.port) as one, Client(ollprox.port) as two:
            await one.ask("GET", "/api/tags")
            await two.ask("GET", "/api/tags")
            for _ in range(4):
                client = await refused.enter_async_context(Client(ollprox.port))
                assert (await client.head()).status == 503
        async with asyncio.timeout(3):
            while (await ask(ollprox.port, "GET", "/health")).status != 200:
                await asyncio.sleep(0.01)


async def test_a_client_that_reads_slowly_but_reads_is_not_dropped(
    launch: Start, ollama: StandIn
) -> None:
    ollama.script.tokens = ["x" * 100_000] * 60
    ollprox = await launch(WRITE_TIMEOUT=0.4)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 100_000)
        client.connect(("127.0.0.1", ollprox.port))
        client.sendall(request("POST", "/api/generate", question()))
        for _ in range(20):
            assert await asyncio.to_thread(client.recv, 50_000)
            await asyncio.sleep(0.1)
    await ollprox.says("status=499")
    total = (await ollprox.says(r"status=499 .* total=([\d.]+)"))[1]
    assert float(total) > 1.9  # it was not cut at WRITE_TIMEOUT


# TLS.


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """Make a certificate for localhost, signed by itself."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "2", "-subj", f"/CN={name}", "-keyout", str(key)]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


async def launch_tls(launch: Start, folder: Path, **settings: object) -> tuple[Program, Path, Path]:
    """Start OllProx with its own certificate; return the paths of the certificate and its key."""
    cert, key = certificate(folder, "first")
    return await launch(TLS_CERT_FILE=cert, TLS_KEY_FILE=key, **settings), cert, key


async def https(port: int, trusted: Path, data: bytes) -> tuple[bytes, str]:
    """Ask over TLS; return the response, and whom the certificate names."""
    context = ssl.create_default_context(cafile=trusted)
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", port, ssl=context, server_hostname="localhost"
    )
    subject = writer.get_extra_info("peercert")["subject"][0][0][1]
    writer.write(data)
    reply = await reader.read()
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return reply, subject


async def test_tls_serves_https_and_takes_a_renewed_certificate(
    launch: Start, tmp_path: Path
) -> None:
    ollprox, cert, key = await launch_tls(
        launch,
        tmp_path,
        KEY_REFRESH=0.1,
    )
    assert "listens on https://" in ollprox.text()
    ping = await launch("--ping", LISTEN_PORT=ollprox.port, TLS_CERT_FILE=cert, TLS_KEY_FILE=key)
    assert await ping.process.wait() == 0
    close = {"Connection": "close"}
    reply, subject = await https(
        ollprox.port, cert, request("POST", "/call_model", question(), close)
    )
    assert reply.startswith(b"HTTP/1.1 200 OK")
    assert subject == "first"
    second_cert, second_key = certificate(tmp_path, "second")
    second_key.rename(key)
    second_cert.rename(cert)
    await ollprox.says("the certificate was read again")
    reply, subject = await https(ollprox.port, cert, request("GET", "/health", headers=close))
    assert (reply[:15], subject) == (b"HTTP/1.1 200 OK", "second")
    third_cert, third_key = certificate(tmp_path, "third")
    good = cert.read_text()
    third_cert.rename(cert)  # whose key is not there yet
    await ollprox.says("the renewed certificate cannot be used")
    (tmp_path / "good.pem").write_text(good)
    request_health = request("GET", "/health", headers=close)
    reply, subject = await https(ollprox.port, tmp_path / "good.pem", request_health)
    assert (reply[:15], subject) == (b"HTTP/1.1 200 OK", "second")  # the last stays in force
    third_key.rename(key)
    await ollprox.says("was read again(.|\n)*was read again")
    reply, subject = await https(ollprox.port, cert, request_health)
    assert (reply[:15], subject) == (b"HTTP/1.1 200 OK", "third")


async def test_plain_http_at_the_tls_port_is_told_that_https_is_spoken_here(
    launch: Start, tmp_path: Path
) -> None:
    ollprox, cert, _ = await launch_tls(launch, tmp_path, HEAD_TIMEOUT=1)
    for method in ("GET", "PATCH", "POST"):
        async with Client(ollprox.port) as client:
            await client.send(request(method, "/api/tags"))
            client.writer.write_eof()
            reply = await client.reader.read()
        assert reply.startswith(b"HTTP/1.1 400 Bad Request\r\n")
        assert b"https://" in reply
    for other in (b"\x16\x03\x01\x00\x05hello", b"\x80\x00\x00", b"\x00" * 100):
        with contextlib.suppress(ConnectionError):
            assert b"HTTP" not in await raw(ollprox.port, other)
    close = {"Connection": "close"}
    reply, _ = await https(ollprox.port, cert, request("GET", "/health", headers=close))
    assert reply.startswith(b"HTTP/1.1 200")


async def test_tls_handshakes_that_never_end_do_not_lock_out_a_key(
    launch: Start, tmp_path: Path
) -> None:
    ollprox, cert, _ = await launch_tls(launch, tmp_path, MAX_CONNECTIONS=20, HEAD_TIMEOUT=60)
    silent = [await asyncio.open_connection("127.0.0.1", ollprox.port) for _ in range(40)]
    begun = [await asyncio.open_connection("127.0.0.1", ollprox.port) for _ in range(40)]
    for _, writer in begun:
        writer.write(b"\x16\x03\x01")
    async with asyncio.timeout(10):
        for _ in range(30):
            reply, _ = await https(
                ollprox.port, cert, request("GET", "/api/tags", headers={"Connection": "close"})
            )
            assert reply.startswith(b"HTTP/1.1 200")
    for _, writer in silent + begun:
        writer.transport.abort()


async def test_connections_without_a_handshake_are_cut_off(launch: Start, tmp_path: Path) -> None:
    ollprox, cert, _ = await launch_tls(
        launch,
        tmp_path,
        MAX_CONNECTIONS=20,
        HEAD_TIMEOUT=1,
    )
    silent = [await asyncio.open_connection("127.0.0.1", ollprox.port) for _ in range(100)]
    async with asyncio.timeout(10):
        while len(os.listdir(f"/proc/{ollprox.pid}/fd")) > 60:  # the surplus is cut off
            await asyncio.sleep(0.02)
        for reader, _ in silent:
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""  # and the rest once their time is over
    reply, _ = await https(
        ollprox.port, cert, request("GET", "/health", headers={"Connection": "close"})
    )
    assert reply.startswith(b"HTTP/1.1 200")
    for _, writer in silent:
        writer.close()


async def test_sigterm_with_idle_tls_clients_stops_at_once(launch: Start, tmp_path: Path) -> None:
    ollprox, cert, _ = await launch_tls(launch, tmp_path)
    context = ssl.create_default_context(cafile=cert)

    def connect(headers: dict[str, str] | None) -> ssl.SSLSocket:
        plain = socket.create_connection(("127.0.0.1", ollprox.port))
        client = context.wrap_socket(plain, server_hostname="localhost")
        if headers is not None:
            client.sendall(request("GET", "/health", headers=headers))
            assert client.recv(1000).startswith(b"HTTP/1.1 200")
        return client

    clients = [
        await asyncio.to_thread(connect, headers) for headers in (None, {}, {"Connection": "close"})
    ]
    pending = socket.create_connection(("127.0.0.1", ollprox.port))  # no handshake yet
    begun = time.monotonic()
    ollprox.process.terminate()
    assert await ollprox.process.wait() == 0
    assert time.monotonic() - begun < 8  # far below DRAIN_TIMEOUT
    pending.close()
    for client in clients:
        client.close()


async def test_a_streams_client_over_tls_is_noticed_to_leave(
    launch: Start, ollama: StandIn, tmp_path: Path
) -> None:
    ollprox, cert, _ = await launch_tls(launch, tmp_path)
    ollama.script.hold_head = True
    context = ssl.create_default_context(cafile=cert)
    _, writer = await asyncio.open_connection(
        "127.0.0.1", ollprox.port, ssl=context, server_hostname="localhost"
    )
    writer.write(request("POST", "/call_model", question()))
    await ollama.until(lambda: bool(ollama.asked()))
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    await ollama.until(lambda: ollama.asked()[0].gone)


async def test_upstreams_certificate_is_verified(
    launch: Start, ollama: StandIn, tmp_path: Path
) -> None:
    cert, key = certificate(tmp_path, "upstream")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)
    secure = StandIn()
    port = await secure.start(tls=context)
    for trusted, status in (("", 502), (cert, 200)):
        ollprox = await launch(OLLAMA_HOST=f"https://localhost:{port}", OLLAMA_CA_FILE=trusted)
        answer = await ask(ollprox.port, "POST", "/call_model", question())
        assert answer.status == status
        if status == 502:
            assert "certificate" in answer.json()["error"].lower()
    assert len(secure.asked()) == 1
    await secure.stop()


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"TLS_CERT_FILE": "/nope.pem"}, "TLS_CERT_FILE"),
        ({"TLS_CERT_FILE": "/nope.pem", "TLS_KEY_FILE": "/nope.key"}, "TLS_CERT_FILE"),
        ({"OLLAMA_HOST": "https://x", "OLLAMA_CA_FILE": "/nope.pem"}, "OLLAMA_CA_FILE"),
    ],
)
async def test_certificates_that_cannot_be_used_fail_the_start(
    launch: Start, settings: dict[str, str], name: str
) -> None:
    for start, arguments in (("ollprox: ", ()), ("FAIL  settings  ", ("--check",))):
        ollprox = await launch(*arguments, fails=True, **settings)
        assert await ollprox.process.wait() == 2
        (line,) = ollprox.text().splitlines()
        assert line.startswith(start + name)


async def test_time_to_leave(ollprox: Program) -> None:
    """A client that ends its sending side between two requests is not waited for."""
    async with Client(ollprox.port) as client:
        begun = time.monotonic()
        client.writer.write_eof()
        assert await client.reader.read() == b""
    assert time.monotonic() - begun < 5
    assert KEY not in ollprox.text()


async def test_an_answer_is_there_also_for_who_ends_with_the_request(ollprox: Program) -> None:
    """The client's end comes with the request; what is written soon must come before the close."""
    await ask(ollprox.port, "POST", "/call_model", question())
    reader, writer = await asyncio.open_connection("127.0.0.1", ollprox.port)
    writer.write(request("POST", "/call_model", question()))
    writer.write_eof()
    answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert b"OllProx; hit" in answer
    assert answer.endswith(b"}")
    writer.close()
