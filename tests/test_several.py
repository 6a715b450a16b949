"""Several Ollama servers, with the program as users run it."""

import asyncio

from client import ask, question
from conftest import Start
from standin import Script, StandIn


async def test_two_servers_serve_as_one_and_one_may_die(launch: Start) -> None:
    standins = [StandIn(Script()), StandIn(Script())]
    ports = [await standin.start() for standin in standins]
    ollprox = await launch(
        OLLAMA_HOST=",".join(f"127.0.0.1:{port}" for port in ports),
        MAX_GENERATIONS=2,
        ADMIN_LABELS="tester",
    )
    answers = await asyncio.gather(
        *(ask(ollprox.port, "POST", "/call_model", question(str(n))) for n in range(20))
    )
    assert {answer.status for answer in answers} == {200}
    assert all(len(standin.asked("/api/generate")) > 3 for standin in standins)
    await standins[0].stop()
    answers = await asyncio.gather(
        *(ask(ollprox.port, "POST", "/call_model", question(f"b{n}")) for n in range(20))
    )
    assert {answer.status for answer in answers} == {200}
    await ollprox.says(r"WARNING Ollama on 127.0.0.1:\d+ is down")
    assert len((await ask(ollprox.port, "GET", "/api/tags")).json()["models"]) == 2
    assert (await ask(ollprox.port, "GET", "/ready")).status == 200
    await standins[0].start(port=ports[0])
    await ollprox.says(r"INFO Ollama on 127.0.0.1:\d+ is back")
    pulled = await ask(ollprox.port, "POST", "/api/pull", {"model": "m"})
    assert pulled.lines()[-1] == {"status": "success"}
    assert {line.get("host", "") for line in pulled.lines()} == {
        "",
        *(f"127.0.0.1:{p}" for p in ports),
    }
    for standin in standins:
        await standin.stop()


async def test_one_server_by_name(launch: Start) -> None:
    standins = [StandIn(Script()), StandIn(Script())]
    ports = [await standin.start() for standin in standins]
    ollprox = await launch(
        OLLAMA_HOST=",".join(f"127.0.0.1:{port}" for port in ports),
        ADMIN_LABELS="tester",
        MAX_GENERATIONS=2,
    )
    path = f"/host/127.0.0.1:{ports[1]}"
    for _ in range(2):  # never from the cache: its model of that name may be another one
        answer = await ask(ollprox.port, "POST", f"{path}/api/generate", question(stream=False))
        assert (answer.status, answer.cache_status) == (200, "OllProx; fwd=bypass")
    pulled = await ask(ollprox.port, "POST", f"{path}/api/pull", {"model": "m"})
    assert pulled.lines()[-1] == {"status": "success"}
    assert (await ask(ollprox.port, "HEAD", f"{path}/")).status == 200
    assert standins[0].asked("/api/generate", "/api/pull", "/") == []
    assert len(standins[1].asked("/api/generate", "/api/pull", "/")) == 4
    for wrong in ("/host/nobody/api/tags", f"{path}/health", f"{path}/v1/models", "/host/"):
        assert (await ask(ollprox.port, "GET", wrong)).status == 404
    for standin in standins:
        await standin.stop()
