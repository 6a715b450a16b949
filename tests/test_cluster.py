"""Three processes behind nginx or HAProxy, with the files of `deploy/`."""

import asyncio
import contextlib
import re
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio
from client import KEY, Answer, Client, ask, question, request
from conftest import Program, Start
from standin import StandIn
from test_deploy import NGINX, PATH, adapted, tool

PROCESSES = 3


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def nginx(folder: Path, port: int, ports: list[int]) -> list[str]:
    """Write nginx's configuration; return its command."""
    changes = {"listen 8000;": f"listen 127.0.0.1:{port};"}
    changes |= {f"127.0.0.1:800{n}": f"127.0.0.1:{p}" for n, p in enumerate(ports, start=1)}
    (folder / "ollprox.conf").write_text(adapted("nginx-cluster.conf", changes))
    (folder / "nginx.conf").write_text(NGINX)
    command = [tool("nginx"), "-p", str(folder), "-c", str(folder / "nginx.conf")]
    return [*command, "-e", str(folder / "error.log")]


def haproxy(folder: Path, port: int, ports: list[int]) -> list[str]:
    """Write HAProxy's configuration; return its command."""
    changes = {"bind :8000": f"bind 127.0.0.1:{port}"}
    changes |= {f"127.0.0.1:800{n}": f"127.0.0.1:{p}" for n, p in enumerate(ports, start=1)}
    (folder / "haproxy.cfg").write_text(adapted("haproxy.cfg", changes))
    return [tool("haproxy"), "-db", "-f", str(folder / "haproxy.cfg")]


class Cluster:
    """Three processes and their front, which listens on `port`."""

    def __init__(self, port: int, programs: list[Program]) -> None:
        self.port = port
        self.programs = programs

    async def ask(self, prompt: str, **headers: str) -> Answer:
        return await ask(self.port, "POST", "/api/generate", question(prompt), headers)

    async def readers(self) -> list[int]:
        """How many clients wait for answers, in each process."""
        return [int(await number(program, "ollprox_readers")) for program in self.programs]


async def number(program: Program, name: str) -> float:
    text = (await ask(program.port, "GET", "/metrics")).body.decode()
    match = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(match[1]) if match else 0.0


@pytest_asyncio.fixture(params=[nginx, haproxy])
async def cluster(
    request: pytest.FixtureRequest, launch: Start, ollama: StandIn, tmp_path: Path
) -> AsyncIterator[Cluster]:
    configure: Callable[[Path, int, list[int]], list[str]] = request.param
    tool(configure.__name__)
    settings = {"TRUSTED_PROXIES": "127.0.0.1", "KEY_REFRESH": "1"}
    programs = [await launch(**settings) for _ in range(PROCESSES)]
    folder, port = tmp_path / "front", free_port()
    folder.mkdir()
    command = configure(folder, port, [program.port for program in programs])
    with (folder / "output.log").open("wb") as log:
        front = await asyncio.create_subprocess_exec(
            *command,
            env={"PATH": PATH, "HOME": str(folder)},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        while (await answered(port)) != 200:
            assert front.returncode is None, (folder / "output.log").read_text()
            await asyncio.sleep(0.02)
        yield Cluster(port, programs)
    finally:
        if front.returncode is None:
            front.terminate()
        await front.wait()


async def answered(port: int) -> int:
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        return (await ask(port, "GET", "/health")).status
    return 0


@pytest.mark.parametrize("size", [10, 200_000])
async def test_identical_requests_meet_in_one_process(
    cluster: Cluster, ollama: StandIn, size: int
) -> None:
    ollama.script.hold_before = 1
    prompt = "x" * size
    tasks = [asyncio.create_task(cluster.ask(prompt, X_Number="n" * n)) for n in range(30)]
    while sum(await cluster.readers()) < 30:
        await asyncio.sleep(0.05)
    assert sorted(await cluster.readers()) == [0, 0, 30]
    ollama.script.let_go.set()
    answers = await asyncio.gather(*tasks)
    assert len(ollama.asked()) == 1
    assert sum(answer.cache_status.endswith("collapsed") for answer in answers) == 29
    again = await cluster.ask(prompt)
    assert again.cache_status.startswith("OllProx; hit")


async def test_different_requests_are_spread(cluster: Cluster, ollama: StandIn) -> None:
    for n in range(40):
        assert (await cluster.ask(f"{n}")).status == 200
    counts = [len(re.findall(r"POST path=/api/generate", p.text())) for p in cluster.programs]
    while sum(counts) < 40:  # log lines are written a little later
        await asyncio.sleep(0.05)
        counts = [len(re.findall("POST path=/api/generate", p.text())) for p in cluster.programs]
    assert min(counts) >= 4


async def test_a_process_that_is_stopped_loses_nothing(cluster: Cluster, ollama: StandIn) -> None:
    ollama.script.pace = 0.02
    statuses: list[tuple[int, bool]] = []
    stopped = asyncio.Event()

    async def keep_asking(name: int) -> None:
        asked = 0
        while asked < 20 or not stopped.is_set():
            async with Client(cluster.port) as client:
                for _ in range(5):
                    body = question(f"{name} {asked}")
                    answer = await client.ask("POST", "/api/generate", body)
                    asked += 1
                    statuses.append((answer.status, answer.complete))

    clients = [asyncio.create_task(keep_asking(name)) for name in range(6)]
    await ollama.until(lambda: len(ollama.asked()) > 20)
    assert await cluster.programs[0].stop() == 0
    stopped.set()
    await asyncio.gather(*clients)
    assert set(statuses) == {(200, True)}
    assert len(statuses) >= 120


async def test_a_process_that_is_killed_cuts_only_its_own_streams(
    cluster: Cluster, ollama: StandIn
) -> None:
    ollama.script.hold_before = 1
    prompts = [f"{n}" for n in range(18)]
    tasks = [asyncio.create_task(stream(cluster, prompt)) for prompt in prompts]
    while sum(before := await cluster.readers()) < len(prompts):
        await asyncio.sleep(0.05)
    cluster.programs[0].process.kill()
    await cluster.programs[0].process.wait()
    await ollama.until(lambda: sum(seen.gone for seen in ollama.asked()) == before[0])
    ollama.script.let_go.set()
    whole = await asyncio.gather(*tasks)
    assert whole.count(False) == before[0]
    # The others keep their owners, so their answers are still hits.
    for prompt, was_whole in zip(prompts, whole, strict=True):
        again = await cluster.ask(prompt)
        assert again.status == 200
        assert again.cache_status.startswith("OllProx; hit") is was_whole


async def stream(cluster: Cluster, prompt: str) -> bool:
    """Ask; return whether the whole answer came."""
    async with Client(cluster.port) as client:
        await client.send(request("POST", "/api/generate", question(prompt)))
        answer = await client.head()
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await client.rest(answer)
        return answer.complete


async def test_a_revoked_key_is_refused_by_all(
    cluster: Cluster, ollama: StandIn, key_file: Path
) -> None:
    await cluster.ask("Why?")
    key_file.write_text("another-key  # other\n")
    for program in cluster.programs:
        while (await ask(program.port, "POST", "/api/generate", question())).status != 401:
            await asyncio.sleep(0.05)
    for n in range(6):
        assert (await cluster.ask(f"{n}")).status == 401
        assert (await cluster.ask(f"{n}", APIKEY="another-key")).status == 200


async def test_the_log_has_the_clients_address(cluster: Cluster) -> None:
    body = request("POST", "/api/generate", question(), {"X-Forwarded-For": "203.0.113.9"})
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", cluster.port, local_addr=("127.0.0.2", 0)
    )
    writer.write(body)
    await reader.readuntil(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    says = [asyncio.create_task(p.says(r"client=127\.0\.0\.2 ")) for p in cluster.programs]
    done, rest = await asyncio.wait(says, return_when=asyncio.FIRST_COMPLETED)
    for task in rest:
        task.cancel()
    assert done
    assert not any("203.0.113.9" in program.text() for program in cluster.programs)
    assert KEY not in "".join(program.text() for program in cluster.programs)
