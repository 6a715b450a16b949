"""The start: messages about settings and Ollama; `--check`, `--ping`, SIGHUP; the collector."""

import asyncio
import gc
import re
import shutil
import signal
import socket
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from client import KEY, Client, ask, question
from conftest import Program, Start
from standin import StandIn
from test_limits import certificate, https

from keystore import KeyStore
from settings import load
from startup import describe, tune_collector

HEALTH = b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@asynccontextmanager
async def another_program(answer: bytes) -> AsyncIterator[int]:
    """A program that gives everybody the same answer; yields its port."""

    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(reply, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


def response(status: bytes, body: bytes, server: bytes = b"nginx/1.25") -> bytes:
    head = b"HTTP/1.1 %b\r\nServer: %b\r\nContent-Length: %d\r\n\r\n"
    return head % (status, server, len(body)) + body


# What is at OLLAMA_HOST.

FOREIGN = [
    (
        response(b"404 Not Found", b"<html>\r\n<h1>Not\x1b[31m here"),
        'body "<html> <h1>Not\\\\u001b',
    ),
    (response(b"200 OK", b"<html>welcome"), 'status 200, .*body "<html>welcome"'),
    (response(b"200 OK", b'{"hello": 1}'), "Is that Ollama"),
    (response(b"401 Unauthorized", b"x"), "requires credentials .status 401"),
    (response(b"403 Forbidden", b"x" * 100_000), r"status 403, .*x{80}\.\.\."),
    (response(b"200 OK", b""), "status 200"),
    (response(b"200 OK", b"", server=b"a\x1b[31m"), "HTTP response"),
    (b"SSH-2.0-OpenSSH_9.2\r\n", "HTTP response"),
]


@pytest.mark.parametrize(("answer", "shown"), FOREIGN, ids=range(len(FOREIGN)))
async def test_the_start_says_what_answers_in_ollamas_place(
    launch: Start, answer: bytes, shown: str
) -> None:
    async with another_program(answer) as port:
        ollprox = await launch(OLLAMA_PORT=port, MODEL_REFRESH=0)
        line = (await ollprox.says(r"Ollama does not answer yet.*\n"))[0]
        assert re.search(shown, line), line
        assert f"127.0.0.1:{port}" in line
        assert line.rstrip("\n").isprintable()
        assert line.isascii()
        assert len(line) < 500


async def test_check_says_what_answers_in_ollamas_place(launch: Start) -> None:
    async with another_program(response(b"403 Forbidden", b"go away")) as port:
        check = await launch("--check", OLLAMA_PORT=port)
        assert await check.process.wait() == 0
    assert re.search(r'status 403, server ".*", body "go away"', check.text()), check.text()


async def test_ollprox_is_not_ready_while_another_program_answers(launch: Start) -> None:
    async with another_program(response(b"200 OK", b"<html>welcome")) as port:
        ollprox = await launch(OLLAMA_PORT=port, MODEL_REFRESH=0)
        assert (await ask(ollprox.port, "GET", "/ready")).status == 503


async def test_check_shows_the_version_of_ollama(launch: Start) -> None:
    check = await launch("--check")
    assert await check.process.wait() == 0
    assert re.search(r"(?m)^ok    Ollama    \S+ answers at 127\.0\.0\.1:\d+$", check.text())


async def test_check_passes_while_ollama_is_down(launch: Start) -> None:
    check = await launch("--check", OLLAMA_PORT=free_port())
    assert await check.process.wait() == 0
    assert "warn  Ollama    does not answer yet" in check.text()


async def test_the_start_says_that_ollama_host_leads_back(launch: Start) -> None:
    port = free_port()
    ollprox = await launch(LISTEN_PORT=port, OLLAMA_PORT=port)
    await ollprox.says(rf"OLLAMA_HOST leads back to OllProx.*127\.0\.0\.1:{port}")
    assert (await ask(port, "POST", "/call_model", question())).status == 508
    assert "does not answer" not in ollprox.text()


async def test_listening_on_the_port_of_ollama_is_one_clear_line(
    launch: Start, ollama: StandIn
) -> None:
    ollprox = await launch(fails=True, LISTEN_PORT=ollama.port, API_KEY_FILE="")
    assert await ollprox.process.wait() == 1
    (line,) = ollprox.text().splitlines()
    assert re.match(r"ollprox: port in use: .* probably by Ollama: LISTEN_PORT", line)


@pytest.mark.parametrize(
    ("text", "shown"),
    [("1G", "1G"), ("256M", "256M"), ("1536K", "1536K"), ("1000", "1000 bytes")],
)
def test_sizes_are_shown_as_they_may_be_written(text: str, shown: str) -> None:
    settings = load({"CACHE_MAX_BYTES": text}, Path("/nonexistent/.env"))
    assert f"up to {shown}," in describe(settings, KeyStore.open(None, b""))


# --ping.


async def test_ping_says_that_ollprox_is_alive(launch: Start, ollprox: Program) -> None:
    ping = await launch("--ping", LISTEN_PORT=ollprox.port)
    assert await ping.process.wait() == 0
    assert ping.text() == f"OllProx is alive at http://127.0.0.1:{ollprox.port}\n"


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        (response(b"404 Not Found", b"404 page not found"), 'status 404, .*"404 page not found"'),
        (response(b"200 OK", b"all is well\x1b[31m"), "status 200, server .*u001b"),
        (response(b"200 OK", b"", server=b"a\x1b[31m"), r'server "a\\u001b'),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "no answer from .*SSH-2.0"),
        (b"", "no answer from http://127.0.0.1:"),
    ],
)
async def test_ping_says_what_else_it_found(launch: Start, answer: bytes, shown: str) -> None:
    async with another_program(answer) as port:
        ping = await launch("--ping", LISTEN_PORT=port)
        assert await ping.process.wait() == 1
    (line,) = ping.text().splitlines()
    assert re.search(shown, line), line
    assert line.isprintable()


async def test_ping_says_that_nothing_listens(launch: Start) -> None:
    port = free_port()
    ping = await launch("--ping", LISTEN_PORT=port)
    assert await ping.process.wait() == 1
    assert re.fullmatch(
        rf"ollprox: no answer from http://127\.0\.0\.1:{port}/health: .+\n", ping.text()
    )


# SIGHUP.


async def test_sighup_reloads_the_keys_and_drops_no_connection(
    launch: Start, ollama: StandIn, key_file: Path
) -> None:
    ollprox = await launch(KEY_REFRESH="1h")
    other = "another-key-of-24-characters"
    async with Client(ollprox.port) as client:
        ollama.script.hold_before = 1
        answer = await client.begin("POST", "/api/generate", question())
        key_file.write_text(f"{KEY}  # tester\n{other}\n")
        ollprox.process.send_signal(signal.SIGHUP)
        await ollprox.says("SIGHUP: reading the key file")
        await ollprox.says("API keys: 2 read from")
        ollama.script.let_go.set()
        await client.rest(answer)
        assert answer.complete
        kept = await client.ask("GET", "/api/tags", headers={"APIKEY": other})
        assert kept.status == 200


async def test_sighup_reloads_again_and_again(launch: Start, key_file: Path) -> None:
    ollprox = await launch(KEY_REFRESH="1h")
    for count in (2, 3):
        with key_file.open("a") as file:
            file.write(f"another-key-of-24-characters-{count}\n")
        ollprox.process.send_signal(signal.SIGHUP)
        await ollprox.says(f"API keys: {count} read from")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
async def test_sighup_reloads_the_certificate(launch: Start, tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "first")
    ollprox = await launch(KEY_REFRESH="1h", TLS_CERT_FILE=cert, TLS_KEY_FILE=key)
    trusted = tmp_path / "trusted.pem"
    for name in ("first", "second"):
        if name == "second":
            for old, new in zip((cert, key), certificate(tmp_path, name), strict=True):
                new.replace(old)
            ollprox.process.send_signal(signal.SIGHUP)
            await ollprox.says("the certificate was read again")
        shutil.copy(cert, trusted)
        _, subject = await https(ollprox.port, trusted, HEALTH)
        assert subject == name


# The collector.


@pytest.fixture
def _thresholds() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


class Cycle:
    """Garbage that only the collector can free."""

    def __init__(self) -> None:
        self.itself = self


@pytest.mark.usefixtures("_thresholds")
def test_garbage_made_after_the_start_is_collected() -> None:
    tune_collector()
    assert gc.get_freeze_count() > 0
    assert gc.get_threshold() == (50_000, 20, 100)
    cycle = Cycle()
    freed = weakref.ref(cycle)
    del cycle
    gc.collect()
    assert freed() is None
