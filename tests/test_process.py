"""Starting, stopping, and the command line."""

import asyncio
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from client import KEY, Client, ask, question, request
from conftest import DEFAULTS, ROOT, SOURCES, Program, Start
from standin import StandIn


async def test_the_start_says_what_matters(launch: Start, ollama: StandIn, key_file: Path) -> None:
    ollprox = await launch()
    await ollprox.says(r"Ollama 0\.13\.5 answers at 127\.0\.0\.1")
    text = ollprox.text()
    assert f"forwards to   http://127.0.0.1:{ollama.port}" in text
    assert f"1 from {key_file}" in text
    assert "up to 256M, 8M per answer" in text
    assert "for 3600 s" in text


async def test_the_start_says_that_ollama_does_not_answer(launch: Start) -> None:
    ollprox = await launch(OLLAMA_PORT=1)
    await ollprox.says("Ollama does not answer yet")


async def test_a_port_in_use_is_one_clear_line(launch: Start) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ollprox = await launch(fails=True, LISTEN_PORT=port, API_KEY_FILE="")
        assert await ollprox.process.wait() == 1
    (line,) = ollprox.text().splitlines()
    assert "port in use" in line
    assert "LISTEN_PORT" in line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LISTEN_PORT", "http"),
        ("CACHE_TTL", "soon"),
        ("LISTEN_HOST", "203.0.113.1"),
        ("CORS_ORIGINS", "chat.example"),
    ],
)
async def test_a_wrong_setting_is_one_line_and_status_2(
    launch: Start, name: str, value: str
) -> None:
    ollprox = await launch(fails=True, **{name: value})
    assert await ollprox.process.wait() == 2
    (line,) = ollprox.text().splitlines()
    assert line.startswith(f"ollprox: {name}")


async def test_check_refuses_what_the_start_would(launch: Start) -> None:
    ollprox = await launch("--check", LISTEN_HOST="203.0.113.1")
    assert await ollprox.process.wait() == 2
    assert "LISTEN_HOST" in ollprox.text()


async def test_check_says_what_would_be_done(launch: Start) -> None:
    ollprox = await launch("--check", LISTEN_PORT=8765)
    assert await ollprox.process.wait() == 0
    assert "ok    settings  listens on http://127.0.0.1:8765" in ollprox.text()
    assert KEY not in ollprox.text()


@pytest.mark.parametrize(("argument", "text"), [("--version", "OllProx 0."), ("--help", "--check")])
async def test_version_and_help(launch: Start, argument: str, text: str) -> None:
    ollprox = await launch(argument)
    assert await ollprox.process.wait() == 0
    assert text in ollprox.text()


async def test_ping_asks_the_running_one(launch: Start) -> None:
    ollprox = await launch()
    ping = await launch("--ping", LISTEN_PORT=ollprox.port)
    assert await ping.process.wait() == 0
    await ollprox.stop()
    ping = await launch("--ping", LISTEN_PORT=ollprox.port)
    assert await ping.process.wait() == 1


# Going down.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_an_idle_proxy_stops_at_once(ollprox: Program, number: signal.Signals) -> None:
    async with Client(ollprox.port) as client:
        await client.ask("POST", "/call_model", question())
        begun = time.monotonic()
        ollprox.process.send_signal(number)
        assert await client.reader.read() == b""  # the idle connection is closed
        assert await ollprox.process.wait() == 0
    assert time.monotonic() - begun < 5  # far below DRAIN_TIMEOUT


async def test_a_request_under_way_finishes(ollprox: Program, ollama: StandIn) -> None:
    ollama.script.hold_before = 1
    async with Client(ollprox.port) as client:
        answer = await client.begin("POST", "/api/generate", question())
        ollprox.process.terminate()
        await ollprox.says("stopping")
        with pytest.raises(ConnectionError):
            await ask(ollprox.port, "GET", "/health")
        ollama.script.let_go.set()
        await client.rest(answer)
        assert answer.complete
        assert await client.reader.read() == b""
    assert await ollprox.process.wait() == 0


async def test_the_first_request_of_a_connection_is_answered_while_draining(
    ollprox: Program,
) -> None:
    port = ollprox.port
    async with Client(port) as late, Client(port) as silent, Client(port) as blank:
        await ask(ollprox.port, "GET", "/health")  # so the connections have been accepted
        ollprox.process.terminate()
        await ollprox.says("stopping")
        await blank.send(b"\r\n")  # an empty line may come before a request
        answer = await late.ask("POST", "/call_model", question())
        assert answer.status == 200
        assert answer.headers["connection"] == "close"
        assert await silent.reader.read() == b""
        async with asyncio.timeout(5):  # far below the timeout of a head
            assert await blank.reader.read() == b""
    assert await ollprox.process.wait() == 0


async def test_draining_is_bounded(launch: Start, ollama: StandIn) -> None:
    ollama.script.hold_before = 1
    ollprox = await launch(DRAIN_TIMEOUT=0.2)
    async with Client(ollprox.port) as client:
        answer = await client.begin("POST", "/api/generate", question())
        ollprox.process.terminate()
        assert await ollprox.process.wait() == 0
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await client.reader.readuntil(b"0\r\n\r\n")
        assert not answer.complete
    await ollama.until(lambda: ollama.asked()[0].gone)


async def test_a_second_signal_ends_at_once(ollprox: Program, ollama: StandIn) -> None:
    ollama.script.hold_before = 1
    async with Client(ollprox.port) as client:
        await client.begin("POST", "/api/generate", question())
        ollprox.process.terminate()
        await ollprox.says("stopping")
        ollprox.process.terminate()
        begun = time.monotonic()
        assert await ollprox.process.wait() == 0
    assert time.monotonic() - begun < 10


# The access line.


async def test_one_access_line_says_all_and_no_more(ollprox: Program, ollama: StandIn) -> None:
    body = question("a prompt that must not be logged", model="llama2\n\x1b[31m" + "x" * 200)
    await ask(ollprox.port, "POST", "/call_model?q=hidden", body)
    await ask(ollprox.port, "POST", "/call_model", question())
    line = (await ollprox.says(r".* model=llama2 status=200 .*\n"))[0]
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z access id=[0-9a-f]{8}-[0-9a-f]+"
        r" client=127\.0\.0\.1 key=tester method=POST path=/call_model model=llama2"
        r" status=200 cache=miss bytes=\d+ queued=-"
        r" first_byte=\d+\.\d{4} total=\d+\.\d{4}\n",
        line,
    )
    text = ollprox.text()
    assert r'model="llama2\n\u001b[31mxxx' in text
    assert "x" * 100 not in text
    assert "must not be logged" not in text
    assert "hidden" not in text
    assert text.count(" access id=") == 2


@pytest.mark.parametrize(("level", "lines"), [("DEBUG", 2), ("INFO", 1), ("WARNING", 0)])
async def test_probes_are_logged_at_debug_alone(launch: Start, level: str, lines: int) -> None:
    ollprox = await launch(LOG_LEVEL=level)
    await ask(ollprox.port, "GET", "/health")
    await ask(ollprox.port, "POST", "/call_model", question())
    await ollprox.stop()
    assert ollprox.text().count(" access id=") == lines


async def test_a_log_that_nobody_reads_does_not_stop_the_proxy(
    ollama: StandIn, key_file: Path
) -> None:
    read, write = os.pipe()
    environ = {
        **DEFAULTS,
        "PATH": os.environ["PATH"],
        "LISTEN_HOST": "127.0.0.1",
        "LISTEN_PORT": "0",
        "OLLAMA_PORT": str(ollama.port),
        "API_KEY_FILE": str(key_file),
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(ROOT / "ollprox.py")),
        env=environ,
        stdout=asyncio.subprocess.PIPE,
        stderr=write,
    )
    assert process.stdout
    port = int((await process.stdout.readline()).rsplit(b":", 1)[1])
    async with Client(port) as client:
        for _ in range(1500):  # of 150 bytes each: a pipe holds 64 KiB
            await client.send(request("POST", "/call_model", question()))
            assert (await client.rest(await client.head())).status == 200
    os.close(read)
    os.close(write)
    process.terminate()
    assert await process.wait() == 0


async def test_settings_come_from_the_env_file_too(tmp_path: Path) -> None:
    for file in SOURCES:
        copy = tmp_path / file.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(file.read_bytes())
    (tmp_path / ".env").write_text("LISTEN_PORT=8123\nCACHE_TTL=7\n")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(tmp_path / "ollprox.py"), "--check"),
        env={"CACHE_TTL": "8"},
        cwd="/",
        stdout=asyncio.subprocess.PIPE,
    )
    out = (await process.communicate())[0].decode()
    assert ":8123" in out
    assert "for 8 s" in out
