"""Answers and limits that several processes share through a real Valkey or Redis server."""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from client import KEY, Answer, Headers, ask, question
from conftest import ROOT, Program, Start
from standin import Script, StandIn
from test_limits import certificate

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

    def put(self, name: bytes, value: bytes) -> None:
        with self.client() as client:
            client.set(name, value)

    async def has(self, count: int) -> dict[bytes, bytes]:
        """Wait until so many answers are shared."""
        while len(found := self.values()) < count:
            await asyncio.sleep(0.02)
        return found


MakeServer = Callable[..., Awaitable[Server]]


@pytest_asyncio.fixture
async def make_server(tmp_path: Path) -> AsyncIterator[MakeServer]:
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
async def server(make_server: MakeServer) -> Server:
    return await make_server()


def settings(server: Server, **more: object) -> dict[str, object]:
    # Tests share the machine with others, so a reply may take longer than by default.
    return {"CACHE_URL": server.url, "CACHE_SECRET": SECRET, "CACHE_TIMEOUT": "0.5", **more}


async def metrics(program: Program, key: str = KEY) -> dict[str, float]:
    text = (await ask(program.port, "GET", "/metrics", None, {"APIKEY": key})).body.decode()
    rows = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in rows}


MISSES = 'ollprox_shared_cache_lookups_total{result="misses"}'
ONLY = {"Cache-Control": "only-if-cached"}


async def used(program: Program, key: str = KEY) -> Program:
    """Wait until a process shares answers: it knows the epoch and the models."""
    before = (await metrics(program, key))[MISSES]
    while True:
        headers = {**ONLY, "APIKEY": key}
        await ask(program.port, "POST", "/api/generate", question("nobody asks"), headers)
        now = await metrics(program, key)
        if now["ollprox_shared_cache_up"] and now[MISSES] > before:
            return program
        await asyncio.sleep(0.05)


Share = Callable[..., Awaitable[list[Program]]]


@pytest.fixture
def share(launch: Start) -> Share:
    """Start processes that share answers, and wait until they do."""

    async def start(server: Server, count: int, key: str = KEY, **more: object) -> list[Program]:
        programs = [await launch(**settings(server, **more)) for _ in range(count)]
        return [await used(program, key) for program in programs]

    return start


async def generate(program: Program, prompt: str = "Why?", **headers: str) -> Answer:
    """Ask for a stream, which must be whole."""
    fields: Headers = {name.replace("_", "-"): value for name, value in headers.items()}
    answer = await ask(program.port, "POST", "/api/generate", question(prompt), fields)
    assert answer.status != 200 or (answer.complete and answer.lines()[-1]["done"])
    return answer


SHARED = "Valkey; hit, OllProx; fwd=miss"

# Sharing.


def test_without_a_url_redis_is_not_imported() -> None:
    code = "import sys, ollprox; print([m for m in sys.modules if m.startswith('redis')])"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT) == b"[]\n"


async def test_a_second_process_answers_from_the_shared_cache(
    share: Share, server: Server, ollama: StandIn
) -> None:
    first, second = await share(server, 2)
    answer = await generate(first)
    assert answer.cache_status == "Valkey; fwd=miss, OllProx; fwd=miss"
    await server.has(1)
    shared = await generate(second)
    assert shared.body == answer.body
    assert shared.cache_status == SHARED
    assert int(shared.headers["age"]) < 60
    assert (await generate(second)).cache_status.startswith("OllProx; hit")
    folded = await ask(second.port, "POST", "/call_model", question())
    assert folded.json()["response"] == "Paris is the capital."
    assert len(ollama.asked()) == 1
    numbers = await metrics(second)
    assert numbers['ollprox_tokens_total{source="generated"}'] == 0
    assert numbers['ollprox_tokens_total{source="cached"}'] == 3 * len(ollama.script.tokens)
    assert numbers['ollprox_requests_total{route="/api/generate",status="200",cache="hit"}'] == 2
    await second.says("cache=hit")


async def test_a_shared_answer_is_folded(share: Share, server: Server, ollama: StandIn) -> None:
    first, second = await share(server, 2)
    answer = await ask(first.port, "POST", "/call_model", question())
    await server.has(1)
    shared = await ask(second.port, "POST", "/call_model", question())
    assert shared.json() == answer.json()
    assert shared.cache_status == SHARED
    assert len(ollama.asked()) == 1


async def test_identical_requests_look_once(share: Share, server: Server, ollama: StandIn) -> None:
    first, second = await share(server, 2)
    await generate(first)
    await server.has(1)
    found = await asyncio.gather(*(generate(second) for _ in range(20)))
    assert {answer.status for answer in found} == {200}
    hits = 'ollprox_shared_cache_lookups_total{result="hits"}'
    assert (await metrics(second))[hits] == 1
    assert len(ollama.asked()) == 1


async def test_cache_directives_count_against_the_shared_age(
    share: Share, server: Server, ollama: StandIn
) -> None:
    first, second = await share(server, 2)
    await generate(first)
    await server.has(1)
    while time.time() - server_born(server) < 2.1:
        await asyncio.sleep(0.05)
    fresh = await generate(second, Cache_Control="max-age=1")
    assert fresh.cache_status == "Valkey; fwd=miss, OllProx; fwd=miss"
    assert (await generate(second, "?", Cache_Control="no-store")).cache_status.count("hit") == 0
    assert (await generate(second, Cache_Control="no-cache")).cache_status == "OllProx; fwd=request"
    assert len(ollama.asked()) == 4


def server_born(server: Server) -> float:
    """When the only answer on the server was born: its TTL tells."""
    (name,) = server.values()
    with server.client() as client:
        return time.time() + int(client.pttl(name)) / 1000 - 3600


async def test_only_if_cached_asks_the_shared_cache(
    share: Share, server: Server, ollama: StandIn
) -> None:
    first, second = await share(server, 2)
    assert (await generate(second, **{"Cache-Control": "only-if-cached"})).status == 504
    await generate(first)
    await server.has(1)
    found = await generate(second, **{"Cache-Control": "only-if-cached"})
    assert (found.status, found.cache_status) == (200, SHARED)
    await server.kill()
    third = await generate(second, "other", **{"Cache-Control": "only-if-cached"})
    assert third.status == 504
    assert len(ollama.asked()) == 1


async def test_only_if_cached_does_not_hold_up_who_wants_an_answer(
    share: Share, server: Server
) -> None:
    (program,) = await share(server, 1, CACHE_TIMEOUT="1")
    server.freeze()
    only = asyncio.create_task(generate(program, **{"Cache-Control": "only-if-cached"}))
    wanted = asyncio.create_task(generate(program))
    assert (await only).status == 504
    assert (await wanted).status == 200
    server.thaw()


async def test_answers_for_each_key_stay_apart(
    share: Share, server: Server, key_file: Path, ollama: StandIn
) -> None:
    key_file.write_text(f"{KEY}  # tester\nother-key  # other\nthird-key\n")
    first, second = await share(server, 2, CACHE_PER_KEY="true")
    await generate(first)
    await generate(first, APIKEY="third-key")
    await server.has(2)
    assert "Valkey; hit" not in (await generate(second, APIKEY="other-key")).cache_status
    assert (await generate(second)).cache_status == SHARED
    # A key without a label has one scope in all processes, though no salt is set.
    assert (await generate(second, APIKEY="third-key")).cache_status == SHARED
    assert len(ollama.asked()) == 3


async def test_keys_have_one_scope_in_all_processes_though_each_keeps_usage(
    launch: Start, server: Server, key_file: Path, tmp_path: Path, ollama: StandIn
) -> None:
    """A usage file has a salt of its own, which must not count where processes share."""
    key_file.write_text(f"{KEY}\n")
    programs = [
        await launch(**settings(server, CACHE_PER_KEY="true", USAGE_FILE=tmp_path / f"{number}.db"))
        for number in range(2)
    ]
    first, second = [await used(program) for program in programs]
    await generate(first)
    await server.has(1)
    assert (await generate(second)).cache_status == SHARED
    counted = []
    for program in (first, second):
        report = await ask(program.port, "GET", "/usage", None, {"APIKEY": KEY})
        counted.append(sum(row["generated_tokens"] for row in report.json()["rows"]))
    assert counted[0] > 0
    assert counted[1] == 0  # that process generated nothing


async def test_an_answer_of_one_of_several_ollamas_alone_is_not_shared(
    share: Share, server: Server, ollama: StandIn
) -> None:
    """That server may have another model of the same name."""
    other = StandIn()
    hosts = f"127.0.0.1:{ollama.port},127.0.0.1:{await other.start()}"
    first, second = await share(server, 2, OLLAMA_HOST=hosts)
    path = f"/host/127.0.0.1:{other.port}/api/generate"
    for program in (first, second):
        answer = await ask(program.port, "POST", path, question(), {"APIKEY": KEY})
        assert answer.status == 200
        assert answer.cache_status == "OllProx; fwd=bypass"
    assert len(other.asked("/api/generate")) == 2
    await generate(first)
    await server.has(1)
    assert (await generate(second)).cache_status == SHARED
    await other.stop()


async def test_an_embedding_is_shared(share: Share, server: Server, ollama: StandIn) -> None:
    first, second = await share(server, 2)
    body = {"model": "llama2", "input": "x"}
    answer = await ask(first.port, "POST", "/api/embed", body)
    await server.has(1)
    shared = await ask(second.port, "POST", "/api/embed", body)
    assert (shared.body, shared.cache_status) == (answer.body, SHARED)


async def test_errors_and_cut_answers_are_not_shared(
    share: Share, server: Server, ollama: StandIn
) -> None:
    (program,) = await share(server, 1)
    ollama.script.break_after = 2
    cut = await ask(program.port, "POST", "/api/generate", question("cut"))
    assert not cut.complete
    ollama.script.break_after = None
    assert (await ask(program.port, "POST", "/api/generate", {"model": "x"})).status == 404
    await generate(program)
    assert len(await server.has(1)) == 1


async def test_a_shared_answer_needs_no_turn(share: Share, server: Server, ollama: StandIn) -> None:
    limits = {"MAX_GENERATIONS": "1", "QUEUE_MAX": "1"}
    (first,) = await share(server, 1)
    (second,) = await share(server, 1, **limits)
    for prompt in ("one", "two"):
        await generate(first, prompt)
    await server.has(2)
    ollama.script.hold_head = True
    asked = len(ollama.asked())
    running = asyncio.create_task(generate(second, "runs"))
    await ollama.until(lambda: len(ollama.asked()) > asked)
    assert (await generate(second, "one")).cache_status == SHARED  # it would have to wait
    queued = asyncio.create_task(generate(second, "waits"))
    while (await metrics(second))["ollprox_queue_depth"] < 1:
        await asyncio.sleep(0.02)
    assert (await generate(second, "two")).cache_status == SHARED  # it would be refused
    assert (await generate(second, "three")).status == 429
    ollama.script.let_go.set()
    assert [(await running).status, (await queued).status] == [200, 200]


# A server in trouble.


async def test_a_frozen_server_costs_a_bounded_wait(
    share: Share, server: Server, ollama: StandIn
) -> None:
    (program,) = await share(server, 1, CACHE_TIMEOUT="0.2")
    server.freeze()
    for number in range(8):
        began = time.monotonic()
        assert (await generate(program, f"{number}")).status == 200
        assert time.monotonic() - began < 1
    await program.says("is not used: no reply within 0.2 s")
    began = time.monotonic()
    assert (await asyncio.gather(*(generate(program, f"at once {n}") for n in range(40))))[0]
    assert time.monotonic() - began < 5
    server.thaw()
    await program.says("is used again")
    await used(program)
    assert program.text().count("is not used") == 1


async def test_a_killed_server_comes_back(share: Share, server: Server, ollama: StandIn) -> None:
    first, second = await share(server, 2)
    await generate(first)
    await server.has(1)
    await server.kill()
    assert (await generate(second)).status == 200
    assert (await generate(second)).cache_status.startswith("OllProx; hit")
    for program in (first, second):
        await program.says("is not used")
    await server.start()
    for program in (first, second):
        await program.says("is used again")
        await used(program)
    await generate(first, "after")
    await server.has(1)
    assert (await generate(second, "after")).cache_status == SHARED


async def test_a_start_without_the_server_is_a_warning(
    launch: Start, server: Server, ollama: StandIn
) -> None:
    await server.kill()
    program = await launch(**settings(server))
    await program.says("WARNING the shared cache is not used: ConnectionError")
    assert (await generate(program)).status == 200
    await server.start()
    await used(program)


async def test_a_slow_server_is_waited_for_up_to_the_timeout(
    launch: Start, share: Share, server: Server, ollama: StandIn
) -> None:
    (first,) = await share(server, 1)
    await generate(first)
    await server.has(1)
    delay = [0.05]

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs, ours = await asyncio.open_connection("127.0.0.1", server.port)

        async def copy(source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(1 << 16):
                    await asyncio.sleep(delay[0])
                    to.write(data)
                    await to.drain()
            to.close()
            with contextlib.suppress(OSError):
                await to.wait_closed()

        await asyncio.gather(copy(reader, ours), copy(theirs, writer))

    between = await asyncio.start_server(relay, "127.0.0.1", 0)
    url = f"redis://127.0.0.1:{between.sockets[0].getsockname()[1]}"
    second = await launch(**settings(server, CACHE_URL=url, CACHE_TIMEOUT="1"))
    await used(second)
    assert (await generate(second)).cache_status == SHARED
    delay[0] = 1.5
    began = time.monotonic()
    assert (await generate(second, "other")).status == 200
    assert time.monotonic() - began < 2.5
    await second.stop()
    between.close()
    await asyncio.wait({task for task in asyncio.all_tasks() if "relay" in repr(task.get_coro())})


async def test_a_full_server_is_no_outage(share: Share, server: Server, ollama: StandIn) -> None:
    first, second = await share(server, 2)
    await generate(first)
    await server.has(1)
    with server.client() as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", "1")
    assert (await generate(second)).cache_status == SHARED
    assert (await generate(first, "other")).status == 200
    while not (await metrics(first))["ollprox_shared_cache_dropped_writes_total"]:
        await asyncio.sleep(0.05)
    assert (await metrics(first))["ollprox_shared_cache_up"] == 1
    assert (await ask(first.port, "DELETE", "/cache")).status in {200, 403, 503}
    assert "is not used" not in first.text()


async def test_a_wrong_password_is_a_warning(
    launch: Start, make_server: MakeServer, ollama: StandIn
) -> None:
    server = await make_server("--requirepass", "right")
    url = f"redis://:wr0ng-secret@127.0.0.1:{server.port}"
    program = await launch(**settings(server, CACHE_URL=url, LOG_LEVEL="DEBUG"))
    await program.says("WARNING the shared cache is not used: the server refuses the user")
    assert (await generate(program)).status == 200
    checked = await launch("--check", **settings(server, CACHE_URL=url))
    assert await checked.process.wait() == 0
    where = rf"warn  shared    valkey://127\.0\.0\.1:{server.port}/0 does not answer yet: "
    assert re.search(where + "the server refuses the user", checked.text())
    with server.client(password="right") as client:
        client.config_set("requirepass", "wr0ng-secret")
    await program.says("is used again")
    for text in (program.text(), checked.text()):
        assert "wr0ng-secret" not in text
        assert SECRET not in text


def documented(pattern: str) -> str:
    match = re.search(pattern, (ROOT / "docs" / "scaling.md").read_text(), re.MULTILINE)
    assert match
    return match[1]


async def test_the_documented_acl_suffices(
    share: Share, make_server: MakeServer, key_file: Path, ollama: StandIn
) -> None:
    key_file.write_text(f"{KEY}  # tester\nlimited rate=1/minute tokens=9/hour  # limited\n")
    rules = documented(r"ACL SETUSER ollprox (.*)$").replace("A-PASSWORD", "a%password").split()
    server = await make_server()
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "ollprox", *rules)
    url = f"valkey://ollprox:a%25password@127.0.0.1:{server.port}/0"
    first, second = await share(server, 2, CACHE_URL=url, ADMIN_LABELS="tester")
    await generate(first)
    await server.has(1)
    assert (await generate(second)).cache_status == SHARED
    assert (await generate(first, "one", APIKEY="limited")).status == 200
    assert (await generate(second, "two", APIKEY="limited")).status == 429
    assert (await ask(first.port, "DELETE", "/cache")).status == 200
    for program in (first, second):
        assert "refuses" not in program.text()


async def test_a_command_that_the_acl_lacks_is_one_warning(
    share: Share, make_server: MakeServer, ollama: StandIn
) -> None:
    server = await make_server()
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "a", "on", ">b", "~*", "+mget", "+set", "+auth")
        client.set("ollprox:1:epoch", "0" * 32)
    url = f"valkey://a:b@127.0.0.1:{server.port}"
    (program,) = await share(server, 1, CACHE_URL=url, ADMIN_LABELS="tester")
    for _ in range(2):
        assert (await ask(program.port, "DELETE", "/cache")).status == 503
    await program.says("refuses DEL")
    assert program.text().count("refuses DEL: its ACL does not allow it") == 1


async def test_tls_verifies_the_server(
    launch: Start, share: Share, make_server: MakeServer, tmp_path: Path, ollama: StandIn
) -> None:
    cert, key = certificate(tmp_path, "valkey")
    port = free_port()
    files = ("--tls-cert-file", str(cert), "--tls-key-file", str(key))
    server = await make_server("--tls-port", str(port), *files, "--tls-auth-clients", "no")
    url = f"rediss://localhost:{port}"
    if not listens(port):
        pytest.skip("needs a server that is built with TLS")
    first, second = await share(server, 2, CACHE_URL=url, CACHE_CA_FILE=cert)
    await generate(first)
    await server.has(1)
    assert (await generate(second)).cache_status == SHARED
    distrustful = await launch(**settings(server, CACHE_URL=url))
    await distrustful.says("is not used: .*certificate|is not used: .*CERTIFICATE")
    assert (await generate(distrustful)).status == 200


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# Values that are not what they should be.


async def test_values_that_do_not_verify_are_misses(
    share: Share, server: Server, ollama: StandIn
) -> None:
    (first,) = await share(server, 1)
    await generate(first, "one")
    (one,) = await server.has(1)
    await generate(first, "two")
    both = await server.has(2)
    (two,) = both.keys() - {one}
    good = both[one]
    wrong = {
        "cut": good[:-1],
        "empty": b"",
        "short": good[:20],
        "longer": good + b"x",
        "flipped at the end": good[:-1] + bytes([good[-1] ^ 1]),
        "flipped in the MAC": good[:10] + bytes([good[10] ^ 1]) + good[11:],
        "of another version": b"OLX\x02" + good[4:],
        "of another name": both[two],
        "no value of ours": b"\x80\x04\x95pickle",
    }
    for what, value in wrong.items():
        server.put(one, value)
        answer = await generate(first, "one", Cache_Control="max-age=0")  # not from memory
        assert answer.status == 200, what
        (program,) = await share(server, 1)
        server.put(one, value)
        answer = await generate(program, "one")
        assert answer.cache_status == "Valkey; fwd=miss, OllProx; fwd=miss", what
        await program.stop()
    with server.client() as client:
        client.delete(one)
        client.lpush(one, "a list")
    (program,) = await share(server, 1)
    assert (await generate(program, "one")).status == 200


async def test_another_secret_reads_nothing(share: Share, server: Server, ollama: StandIn) -> None:
    (first,) = await share(server, 1)
    await generate(first)
    await server.has(1)
    (second,) = await share(server, 1, CACHE_SECRET="another-secret-of-16-bytes")
    assert "hit" not in (await generate(second)).cache_status


async def test_delete_drops_the_answers_of_all_processes(
    share: Share, server: Server, ollama: StandIn
) -> None:
    first, second, third = await share(server, 3, ADMIN_LABELS="tester")
    await generate(first)
    kept = await server.has(1)
    for program in (second, third):
        await generate(program)
    assert len(ollama.asked()) == 1
    assert (await ask(second.port, "DELETE", "/cache")).json()["dropped"] == 1
    for name, value in kept.items():
        server.put(name, value)  # replayed
    assert "hit" not in (await generate(second)).cache_status
    for program in (first, third):  # each looks every 2 s
        while (await metrics(program))["ollprox_cache_entries"]:
            await asyncio.sleep(0.05)
    await server.kill()
    assert (await ask(first.port, "DELETE", "/cache")).status == 503
    assert (await ask(first.port, "DELETE", "/cache?model=llama2")).status == 503


async def test_a_model_that_was_replaced_is_answered_by_no_process(
    share: Share, server: Server, ollama: StandIn
) -> None:
    programs = await share(server, 3, MODEL_REFRESH="0.2")
    for program in programs[:2]:
        await generate(program)
    await server.has(1)
    ollama.script.models["llama2:latest"] = "b" * 64
    ollama.script.tokens = ["London"]
    seen = len(ollama.asked("/api/tags"))
    await ollama.until(lambda: len(ollama.asked("/api/tags")) > seen + 6)
    for program in programs:
        assert (await generate(program)).lines()[0]["response"] == "London"
    restarted = (await share(server, 1))[0]
    assert (await generate(restarted)).lines()[0]["response"] == "London"


async def test_an_answer_of_a_model_that_was_just_replaced_is_not_shared(
    share: Share, server: Server, ollama: StandIn
) -> None:
    """The process still believes in the old digest when it stores the new model's answer."""
    (program,) = await share(server, 1)
    ollama.script.models["llama2:latest"] = "b" * 64
    ollama.script.tokens = ["London"]
    await generate(program)
    while not (await metrics(program))["ollprox_shared_cache_dropped_writes_total"]:
        await asyncio.sleep(0.05)
    assert not server.values()


async def test_without_digests_nothing_is_shared(
    launch: Start, server: Server, ollama: StandIn
) -> None:
    program = await launch(**settings(server, MODEL_REFRESH="0"))
    await program.says("MODEL_REFRESH=0: the digests of models are not known")
    assert (await generate(program)).cache_status == "OllProx; fwd=miss"
    assert not server.values()


async def test_a_remote_model_is_not_shared(share: Share, server: Server, ollama: StandIn) -> None:
    """Its digest is that of a stub: the model itself may change without it."""
    (program,) = await share(server, 1, MODEL_REFRESH="0.2")
    listed = ollama._models

    def with_remote() -> list[dict[str, Any]]:
        return [{**model, "remote_host": "https://ollama.com:443"} for model in listed()]

    ollama._models = with_remote  # type: ignore[method-assign]
    seen = len(ollama.asked("/api/tags"))
    await ollama.until(lambda: len(ollama.asked("/api/tags")) > seen + 2)
    assert (await generate(program)).cache_status == "OllProx; fwd=miss"
    assert (await generate(program)).cache_status.startswith("OllProx; hit")
    assert not server.values()


# Limits.


async def test_rates_count_in_all_processes(
    share: Share, server: Server, key_file: Path, ollama: StandIn
) -> None:
    key_file.write_text(f"{KEY}  # tester\nlimited rate=2/hour  # limited\n")
    first, second = await share(server, 2)
    assert (await generate(first, "one", APIKEY="limited")).status == 200
    await server.has(1)
    # An answer of the shared cache takes no charge, nor does one in memory.
    for _ in range(3):
        assert (await generate(second, "one", APIKEY="limited")).status == 200
    assert (await generate(second, "two", APIKEY="limited")).status == 200
    for program in (first, second):
        refused = await generate(program, "three", APIKEY="limited")
        assert refused.status == 429
        assert 3000 < int(refused.headers["retry-after"]) <= 3720
    await server.has(2)
    assert (await generate(first, "two", APIKEY="limited")).cache_status == SHARED
    assert "an answer failed" not in first.text()
    await server.kill()
    # While the server is down each process counts alone; each has counted one.
    assert (await generate(first, "four", APIKEY="limited")).status == 200
    assert (await generate(first, "five", APIKEY="limited")).status == 429


async def test_as_many_begin_at_once_as_the_rate_allows(
    share: Share, server: Server, key_file: Path, ollama: StandIn
) -> None:
    key_file.write_text(f"{KEY}  # tester\nlimited rate=5/hour  # limited\n")
    programs = await share(server, 3)
    tasks = [
        generate(program, f"{number}", APIKEY="limited", **{"Cache-Control": "no-store"})
        for number in range(6)
        for program in programs
    ]
    statuses = sorted(answer.status for answer in await asyncio.gather(*tasks))
    assert statuses == [200] * 5 + [429] * 13


async def test_tokens_count_in_all_processes(
    share: Share, server: Server, key_file: Path, ollama: StandIn
) -> None:
    key_file.write_text(f"{KEY}  # tester\nlimited tokens=5/hour  # limited\n")
    first, second = await share(server, 2)
    assert (await generate(first, "one", APIKEY="limited")).status == 200
    while (await generate(second, "two", APIKEY="limited", Cache_Control="no-store")).status == 200:
        await asyncio.sleep(0.05)
    refused = await generate(second, "three", APIKEY="limited")
    assert "tokens=5/hour" in refused.json()["error"]


# Settings.


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"CACHE_SECRET": ""}, "CACHE_URL needs CACHE_SECRET"),
        ({"CACHE_SECRET": "too-short-by-1."}, "CACHE_SECRET must have 16 bytes or more"),
        ({"CACHE_URL": "http://:s3cret@x"}, "CACHE_URL must be a URL such as valkey://"),
        ({"CACHE_URL": "rediss://:s3cret@x?ssl_cert_reqs=none"}, "CACHE_URL must be"),
        ({"CACHE_URL": "rediss://x", "CACHE_CA_FILE": "/none"}, "CACHE_CA_FILE: /none: No such"),
        ({"TRUSTED_PROXIES": "10.0.0.1/8"}, "TRUSTED_PROXIES must be IP addresses"),
    ],
)
async def test_wrong_settings_stop_the_start_and_show_no_secret(
    launch: Start, changes: dict[str, str], complaint: str
) -> None:
    values = {"CACHE_URL": "redis://127.0.0.1:1", "CACHE_SECRET": SECRET, **changes}
    program = await launch(fails=True, **values)
    assert await program.process.wait() == 2
    assert complaint in program.text()
    assert "s3cret" not in program.text()
    assert "too-short" not in program.text()


async def test_a_missing_redis_py_is_explained(launch: Start, tmp_path: Path) -> None:
    (tmp_path / "redis.py").write_text("raise ModuleNotFoundError('redis')")
    values = {"CACHE_URL": "redis://127.0.0.1:1", "CACHE_SECRET": SECRET}
    program = await launch(fails=True, PYTHONPATH=tmp_path, **values)
    assert await program.process.wait() == 2
    assert "pip install -r requirements-shared.txt" in program.text()


async def test_with_several_ollamas_the_lists_are_read_after_the_answer(
    launch: Start, server: Server, ollama: StandIn
) -> None:
    """The pool's lists of its last poll are older than the answer."""
    other = StandIn(Script())
    await other.start()
    hosts = f"127.0.0.1:{ollama.port},127.0.0.1:{other.port}"
    program = await launch(**settings(server, OLLAMA_HOST=hosts))
    await used(program)
    for each in (ollama, other):
        each.script.models["llama2:latest"] = "b" * 64
        each.script.tokens = ["London"]
    await generate(program)
    while not (await metrics(program))["ollprox_shared_cache_dropped_writes_total"]:
        await asyncio.sleep(0.05)
    assert not server.values()
    await program.stop()
    await other.stop()
