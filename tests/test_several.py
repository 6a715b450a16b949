"""Several Ollama servers behind the program, as users run it."""

import asyncio
import base64
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from client import Answer, Client, ask, question, request
from conftest import Program, Start
from standin import Script, StandIn

from wire.pool import LOADED_INTERVAL

ADMIN = {"ADMIN_LABELS": "tester"}
ONE = {"llama2:latest": "a" * 64}


@asynccontextmanager
async def standins(*scripts: Script) -> AsyncIterator[list[StandIn]]:
    """Stand-ins for Ollama, listening."""
    found = [StandIn(script) for script in scripts]
    for standin in found:
        await standin.start()
    try:
        yield found
    finally:
        for standin in found:
            standin.script.let_go.set()
            await standin.stop()


def hosts(servers: list[StandIn]) -> str:
    return ",".join(map(name, servers))


def name(standin: StandIn) -> str:
    return f"127.0.0.1:{standin.port}"


async def upstreams(ollprox: Program) -> dict[str, dict[str, Any]]:
    """What the dashboard shows of each server."""
    view = (await ask(ollprox.port, "GET", "/metrics.json")).json()
    return {one["host"]: one for one in view["upstreams"]}


async def metric(ollprox: Program, what: str) -> dict[str, float]:
    """A metric's value for each server."""
    text = (await ask(ollprox.port, "GET", "/metrics")).body.decode()
    found = re.findall(rf'^ollprox_upstream_{what}{{host="(.*?)".*}} (\S+)$', text, re.MULTILINE)
    return {host: float(value) for host, value in found}


async def ask_all(port: int, prefix: str, count: int = 20) -> list[Answer]:
    return await asyncio.gather(
        *(ask(port, "POST", "/call_model", question(f"{prefix}{n}")) for n in range(count))
    )


async def test_two_servers_serve_as_one_and_one_may_die(launch: Start) -> None:
    async with standins(Script(), Script()) as servers:
        ollprox = await launch(OLLAMA_HOST=hosts(servers), MAX_GENERATIONS=2, **ADMIN)
        assert {answer.status for answer in await ask_all(ollprox.port, "a")} == {200}
        assert all(len(standin.asked("/api/generate")) > 3 for standin in servers)
        await servers[0].stop()
        assert {answer.status for answer in await ask_all(ollprox.port, "b")} == {200}
        await ollprox.says(r"WARNING Ollama on 127.0.0.1:\d+ is down")
        up = {name(servers[0]): 0, name(servers[1]): 1}
        assert await metric(ollprox, "up") == up
        assert {host: one["up"] for host, one in (await upstreams(ollprox)).items()} == up
        assert len((await ask(ollprox.port, "GET", "/api/tags")).json()["models"]) == 2
        assert (await ask(ollprox.port, "GET", "/ready")).status == 200
        await servers[0].start(port=servers[0].port)
        await ollprox.says(r"INFO Ollama on 127.0.0.1:\d+ is back")
        assert set((await metric(ollprox, "up")).values()) == {1}
        pulled = await ask(ollprox.port, "POST", "/api/pull", {"model": "m"})
        assert pulled.lines()[-1] == {"status": "success"}
        assert {line.get("host", "") for line in pulled.lines()} == {"", *map(name, servers)}
        text = ollprox.text()
        assert (text.count("is down"), text.count("is back")) == (1, 1)


async def test_all_dead_is_not_ready_until_one_is_back(launch: Start) -> None:
    """The list of models still comes from the last poll, and must not count as a sign of life."""
    async with standins(Script(), Script()) as servers:
        ollprox = await launch(OLLAMA_HOST=hosts(servers), MODEL_REFRESH=0.2)
        assert (await ask(ollprox.port, "GET", "/ready")).status == 200
        for standin in servers:
            await standin.stop()
            await ollprox.says(rf"WARNING Ollama on {name(standin)} is down")
        for _ in range(20):
            assert (await ask(ollprox.port, "GET", "/ready")).status == 503
            assert (await ask(ollprox.port, "GET", "/api/tags")).status == 200
            await asyncio.sleep(0.05)  # some refreshes of the models are in between
        assert (await ask(ollprox.port, "POST", "/call_model", question())).status == 502
        await servers[1].start(port=servers[1].port)
        await ollprox.says(rf"INFO Ollama on {name(servers[1])} is back")
        assert (await ask(ollprox.port, "GET", "/ready")).status == 200
        assert "answer any more" not in ollprox.text()
        assert "answers again" not in ollprox.text()


async def test_each_server_is_reported_at_the_start_and_by_check(
    launch: Start, ollama: StandIn
) -> None:
    async with standins(Script()) as (dead,):
        pass
    ollprox = await launch(OLLAMA_HOST=hosts([ollama, dead]))
    for program in (ollprox, await launch("--check", OLLAMA_HOST=hosts([ollama, dead]))):
        await program.says(rf"0.13.5 answers at {name(ollama)}\n")
        await program.says(rf"does not answer yet; .*Ollama at {name(dead)} cannot be")
    await program.process.wait()


async def test_the_start_says_what_is_lost_without_polls(launch: Start, ollama: StandIn) -> None:
    warning = "MODEL_REFRESH is 0, so OllProx does not compare the models"
    async with standins(Script()) as others:
        for polls in (30, 0):
            both = hosts([ollama, *others])
            program = await launch("--check", OLLAMA_HOST=both, MODEL_REFRESH=polls)
            await program.process.wait()
            assert (warning in program.text()) is (polls == 0)
        one = await launch("--check", OLLAMA_HOST=hosts(others), MODEL_REFRESH=0)
        await one.process.wait()
        assert warning not in one.text()


async def test_credentials_reach_their_server_alone_and_are_shown_nowhere(
    launch: Start,
) -> None:
    async with standins(Script(), Script(), Script()) as servers:
        first, second, third = map(name, servers)
        settings = {
            "OLLAMA_HOST": f"http://us%40er:s3cret@{first}*2,{second},{third}",
            "UPSTREAM_API_KEY": f"{second}=t0ken",
            "LOG_LEVEL": "DEBUG",
            **ADMIN,
        }
        ollprox = await launch(**settings)
        own = {"Authorization": "Bearer a-key-for-the-tests", "APIKEY": ""}
        for number in range(12):
            body = question(str(number))
            assert (await ask(ollprox.port, "POST", "/call_model", body, own)).status == 200
        for path in ("/api/tags", "/api/version", "/metrics", "/metrics.json", "/host/x/api/ps"):
            answer = await ask(ollprox.port, "GET", path)
            assert not re.search(rb"s3cret|t0ken|us@er|dXNAZXI", answer.body)
        await ask(ollprox.port, "POST", "/api/pull", {"model": "m"}, own)
        for standin in servers:
            await ask(ollprox.port, "POST", f"/host/{name(standin)}/api/show", question(), own)
        basic = "Basic " + base64.b64encode(b"us@er:s3cret").decode()
        for standin, wanted in zip(servers, (basic, "Bearer t0ken", None), strict=True):
            assert {seen.header("authorization") for seen in standin.seen} == {wanted}
            assert standin.asked("/api/pull", "/api/generate", "/api/show")
        await servers[0].stop()
        await ollprox.says("is down")
        check = await launch("--check", **settings)
        await check.says(f"forwards to +http://{first} .weight 2. with credentials, ")
        await check.process.wait()
        for text in (ollprox.text(), check.text()):
            assert not re.search(r"s3cret|t0ken|us@er|us%40er|dXNAZXI", text)


async def test_a_server_that_refuses_our_credentials_is_out(launch: Start) -> None:
    refusal = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n"

    async def refuse(seen: object, writer: asyncio.StreamWriter) -> None:
        writer.write(refusal)

    async with standins(Script(respond=refuse), Script()) as servers:
        ollprox = await launch(OLLAMA_HOST=hosts(servers))
        await ollprox.says(rf"WARNING Ollama on {name(servers[0])} is down: .*requires credentials")
        assert {answer.status for answer in await ask_all(ollprox.port, "a")} == {200}
        assert servers[0].asked("/api/generate") == []
        servers[0].script.respond = None
        await ollprox.says(rf"INFO Ollama on {name(servers[0])} is back")


async def test_who_waits_is_shown_at_each_server_that_may_answer(launch: Start) -> None:
    both = Script(hold_head=True, models=ONE)
    only = Script(hold_head=True, models={**ONE, "mine:latest": "b" * 64})
    async with standins(both, only) as servers:
        ollprox = await launch(OLLAMA_HOST=hosts(servers), MAX_GENERATIONS=1)
        first, second = map(name, servers)

        async def settled(running: int, *waiting: int) -> None:
            while True:
                shown = await upstreams(ollprox)
                found = [(shown[host]["running"], shown[host]["waiting"]) for host in shown]
                if found == [(running, count) for count in waiting]:
                    break
                await asyncio.sleep(0.01)
            assert await metric(ollprox, "running") == {first: running, second: running}
            assert await metric(ollprox, "waiting") == dict(
                zip((first, second), waiting, strict=True)
            )

        async with AsyncExitStack() as stack:
            for number, model in enumerate(["llama2", "llama2", "llama2", "mine", "mine"]):
                client = await stack.enter_async_context(Client(ollprox.port))
                body = {"model": model, "prompt": str(number)}
                await client.send(request("POST", "/call_model", body))
            await settled(1, 1, 3)
        await settled(0, 0, 0)


async def test_a_request_that_waits_gets_the_slot_of_a_server_that_comes_back(
    launch: Start,
) -> None:
    async with standins(Script(hold_head=True), Script()) as servers:
        ollprox = await launch(OLLAMA_HOST=hosts(servers), MAX_GENERATIONS=1)
        await servers[1].stop()
        await ollprox.says("is down")
        async with Client(ollprox.port) as held, Client(ollprox.port) as queued:
            await held.send(request("POST", "/call_model", question("held")))
            await servers[0].until(lambda: bool(servers[0].asked("/api/generate")))
            await queued.send(request("POST", "/call_model", question("queued")))
            while (await upstreams(ollprox))[name(servers[0])]["waiting"] != 1:
                await asyncio.sleep(0.01)
            await servers[1].start(port=servers[1].port)
            assert (await queued.rest(await queued.head())).status == 200
            assert len(servers[1].asked("/api/generate")) == 1


async def test_the_models_that_are_loaded_are_polled_and_shown(launch: Start) -> None:
    async with standins(Script(), Script(models=ONE)) as servers:
        ollprox = await launch(OLLAMA_HOST=hosts(servers))
        shown = await upstreams(ollprox)
        assert shown[name(servers[0])]["models"] == ["gemma3:270m", "llama2:latest"]
        assert shown[name(servers[1])]["models"] == ["llama2:latest"]
        assert LOADED_INTERVAL == 5
        # Once at the start, and once more if a slow machine took 5 s for the start.
        assert all(len(standin.asked("/api/ps")) in {1, 2} for standin in servers)
        models = (await ask(ollprox.port, "GET", "/api/ps")).json()["models"]
        assert [model["name"] for model in models] == [
            "gemma3:270m",
            "llama2:latest",
            "llama2:latest",
        ]


async def test_one_server_is_not_polled_for_what_is_loaded(launch: Start, ollama: StandIn) -> None:
    """One host behaves as it always did."""
    ollprox = await launch(OLLAMA_HOST=name(ollama), MODEL_REFRESH=0.1)
    await ollama.until(lambda: len(ollama.asked("/api/tags")) > 12)  # a second has passed
    assert ollama.asked("/api/ps") == []
    ollama.script.models = ONE
    assert len((await ask(ollprox.port, "GET", "/api/tags")).json()["models"]) == 1
    assert list(await upstreams(ollprox)) == ["127.0.0.1"]  # its name, without the port
    assert (await ask(ollprox.port, "GET", "/host/127.0.0.1/api/tags")).status == 404


async def test_a_model_with_another_digest_is_a_warning_and_a_metric(launch: Start) -> None:
    other = Script(models={"llama2:latest": "b" * 64, "mine:latest": "c" * 64})
    async with standins(Script(models=ONE), other, Script(models=ONE)) as servers:
        ollprox = await launch(OLLAMA_HOST=hosts(servers))
        odd = name(servers[1])
        await ollprox.says(rf"WARNING Ollama on {odd} is not used for llama2:latest")
        text = (await ask(ollprox.port, "GET", "/metrics")).body.decode()
        assert f'digest_conflict{{host="{odd}",model="llama2:latest"}} 1\n' in text
        assert text.count("ollprox_upstream_digest_conflict{") == 1
        assert {answer.status for answer in await ask_all(ollprox.port, "a")} == {200}
        assert servers[1].asked("/api/generate") == []
        asked = await ask(ollprox.port, "POST", "/call_model", {"model": "mine", "prompt": "?"})
        assert asked.status == 200


@pytest.mark.parametrize(("polls", "pulled"), [(30, 0), (0, 1)])
async def test_a_stored_answer_is_dropped_when_its_model_is_pulled_by_name(
    launch: Start, polls: int, pulled: int
) -> None:
    """By the time that the client sees the pull's last line; the response may end much later."""
    async with standins(Script(models=ONE), Script(models=ONE)) as servers:
        ollprox = await launch(OLLAMA_HOST=hosts(servers), MODEL_REFRESH=polls, **ADMIN)
        assert (await ask(ollprox.port, "POST", "/call_model", question())).status == 200
        script = servers[pulled].script
        script.models, script.hold_end = {"llama2:latest": "b" * 64}, True
        async with Client(ollprox.port) as client:
            path = f"/host/{name(servers[pulled])}/api/pull"
            answer = await client.begin("POST", path, {"model": "llama2"})
            async for chunk in client.chunks(answer):
                if b'"success"' in chunk:
                    break
            script.hold_end = False  # of other answers
            answer = await ask(ollprox.port, "POST", "/call_model", question())
            assert (answer.status, answer.cache_status) == (200, "OllProx; fwd=miss; stored")


async def test_media_go_to_a_server_that_is_up(launch: Start) -> None:
    async def answer(seen: Any, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    async with standins(Script(), Script(respond=answer)) as servers:
        ollprox = await launch(OLLAMA_HOST=hosts(servers), MAX_GENERATIONS=1)
        await servers[0].stop()
        await ollprox.says("is down")
        for _ in range(2):
            made = await ask(ollprox.port, "POST", "/v1/images/generations", {"model": "m"})
            assert made.status == 200
        assert len(servers[1].asked("/v1/images/generations")) == 2


async def test_one_server_by_name(launch: Start) -> None:
    async with standins(Script(), Script()) as servers:
        ollprox = await launch(
            OLLAMA_HOST=hosts(servers), MAX_GENERATIONS=2, API_KEY_IN_PATH="true", **ADMIN
        )
        path = f"/host/{name(servers[1])}"
        for _ in range(2):  # never from the cache: its model of that name may be another one
            answer = await ask(ollprox.port, "POST", f"{path}/api/generate", question(stream=False))
            assert (answer.status, answer.cache_status) == (200, "OllProx; fwd=bypass")
        pulled = await ask(ollprox.port, "POST", f"{path}/api/pull", {"model": "m"})
        assert pulled.lines()[-1] == {"status": "success"}
        in_path = f"/key/a-key-for-the-tests{path}"  # all that the stock command line can do
        for method, there in (("HEAD", f"{path}/"), ("HEAD", f"{in_path}/")):
            assert (await ask(ollprox.port, method, there)).status == 200
        pulled = await ask(
            ollprox.port, "POST", f"{in_path}/api/pull", {"model": "m"}, {"APIKEY": ""}
        )
        assert pulled.lines()[-1] == {"status": "success"}
        assert servers[0].asked("/api/generate", "/api/pull", "/") == []
        assert len(servers[1].asked("/api/generate", "/api/pull", "/")) == 6
        for wrong in ("/host/nobody/api/tags", f"{path}/health", f"{path}/v1/models", "/host/"):
            assert (await ask(ollprox.port, "GET", wrong)).status == 404


async def test_what_goes_to_the_first_server_says_so(launch: Start) -> None:
    async with standins(Script(), Script()) as servers:
        ollprox = await launch(OLLAMA_HOST=hosts(servers), **ADMIN)
        first = name(servers[0])
        for path in ("/api/create", "/api/push"):
            lines = (await ask(ollprox.port, "POST", path, {"model": "m"})).lines()
            assert {line["host"] for line in lines} == {first}
            assert lines[0]["status"] == f"{first}: pulling manifest"
            assert lines[-1]["status"] == "success"
        blob = f"/api/blobs/sha256:{'0' * 64}"
        for method, path in (("POST", "/api/copy"), ("POST", blob), ("HEAD", blob)):
            assert (await ask(ollprox.port, method, path, {"source": "m"})).status == 200
        assert servers[1].asked("/api/create", "/api/push", "/api/copy", blob) == []
        assert len(servers[0].asked("/api/create", "/api/push", "/api/copy", blob)) == 5
