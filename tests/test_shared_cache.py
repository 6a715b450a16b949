"""Answers and limits that several processes share through a real Valkey or Redis server."""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from client import KEY, Client, ask, question
from conftest import Program, Start
from standin import StandIn

redis = pytest.importorskip("redis", reason="needs requirements-shared.txt")

SECRET = "a-secret-of-16-bytes-or-more"
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
PROGRAM = shutil.which("valkey-server", path=PATH) or shutil.which("redis-server", path=PATH)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A Valkey or Redis server as a process, with nothing on disk."""

    def __init__(self, folder: Path, options: tuple[str, ...]) -> None:
        self.port = free_port()
        self.folder = folder
        self.options = options
        self.process: asyncio.subprocess.Process

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    async def start(self) -> None:
        assert PROGRAM is not None
        command = [PROGRAM, "--port", str(self.port), "--bind", "127.0.0.1", "--dir"]
        command += [str(self.folder), "--save", "", "--appendonly", "no", *self.options]
        self.process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.DEVNULL, stdin=asyncio.subprocess.DEVNULL
        )
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                writer.close()
                await writer.wait_closed()
                return
            assert self.process.returncode is None
            await asyncio.sleep(0.01)

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()

    def client(self, **options: Any) -> Any:
        return redis.Redis(port=self.port, **options)

    def values(self) -> dict[bytes, bytes]:
        """The shared answers, by their names on the server."""
        with self.client() as client:
            names = [n for n in client.keys("ollprox:1:*") if n != b"ollprox:1:epoch"]
            found = {name: client.get(name) for name in names}
        return {name: value for name, value in found.items() if value.startswith(b"OLX")}

    async def has(self, count: int) -> dict[bytes, bytes]:
        """Wait until so many answers are shared."""
        while len(found := self.values()) < count:
            await asyncio.sleep(0.02)
        return found


@pytest_asyncio.fixture
async def make_server(tmp_path: Path) -> AsyncIterator[Any]:
    if PROGRAM is None:
        pytest.skip("needs valkey-server or redis-server")
    servers: list[Server] = []

    async def make(*options: str) -> Server:
        server = Server(tmp_path, options)
        servers.append(server)
        await server.start()
        return server

    yield make
    for server in servers:
        await server.kill()


@pytest_asyncio.fixture
async def server(make_server: Any) -> Server:
    return await make_server()


def settings(server: Server, **more: object) -> dict[str, object]:
    # Tests share the machine with others, so a reply may take longer than by default.
    return {"CACHE_URL": server.url, "CACHE_SECRET": SECRET, "CACHE_TIMEOUT": "0.5", **more}


async def ready(program: Program, server: Server) -> Program:
    """Wait until a process knows the models and the epoch."""
    while (await metrics(program))["ollprox_shared_cache_epoch_known"] < 1:
        await asyncio.sleep(0.02)
    return program


async def metrics(program: Program) -> dict[str, float]:
    text = (await ask(program.port, "GET", "/metrics")).body.decode()
    rows = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in rows}


async def test_a_second_process_answers_from_the_shared_cache(
    launch: Start, server: Server, ollama: StandIn
) -> None:
    first = await launch(**settings(server))
    await asyncio.sleep(1)
    answer = await ask(first.port, "POST", "/api/generate", question())
    print(answer.head)
    await server.has(1)
    second = await launch(**settings(server))
    await asyncio.sleep(1)
    again = await ask(second.port, "POST", "/api/generate", question())
    print(again.head)
    print(await metrics(second))
    assert again.body == answer.body
    assert again.cache_status == "Valkey; hit, OllProx; fwd=miss"
    assert len(ollama.asked()) == 1
