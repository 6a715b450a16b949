"""`DELETE /cache`: who may drop answers, and which ones it drops."""

import asyncio
from pathlib import Path

import pytest
from client import KEY, Answer, Client, ask, question, request
from conftest import Program, Start
from standin import StandIn

BOSS = "the-key-of-an-admin"
OTHER = "gemma3:270m"  # a model beside llama2


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, object]:
    path = tmp_path / "two-keys.txt"
    path.write_text(f"{KEY}  # tester\n{BOSS}  # boss\n")
    return {
        "API_KEY_FILE": path,
        "ADMIN_LABELS": "boss",
        "API_KEY_IN_PATH": "true",
    }


async def drop(port: int, query: str = "", key: str = BOSS) -> Answer:
    return await ask(port, "DELETE", f"/cache{query}", headers={"APIKEY": key})


async def running(port: int) -> list[int]:
    """How many read each of the answers under way."""
    view = (await ask(port, "GET", "/metrics.json")).json()
    return [flight["readers"] for flight in view["running"]]


async def fill(port: int) -> None:
    """Keep an answer of one model, and two of the other."""
    for body in (question(), question(model=OTHER), question("b", model=OTHER)):
        await ask(port, "POST", "/call_model", body)


async def kept(port: int) -> list[bool]:
    """Which of these are kept."""
    fresh = {"Cache-Control": "only-if-cached"}
    bodies = question(), question(model=OTHER), question("b", model=OTHER)
    answers = [await ask(port, "POST", "/call_model", body, fresh) for body in bodies]
    assert all(answer.status in {200, 504} for answer in answers)
    return [answer.status == 200 for answer in answers]


@pytest.mark.parametrize(
    ("query", "dropped", "left"),
    [
        ("", 3, [False, False, False]),
        ("?", 3, [False, False, False]),
        ("?model=llama2", 1, [False, True, True]),
        ("?model=llama2:latest", 1, [False, True, True]),
        ("?model=LLAMA2", 1, [False, True, True]),
        ("?model=%6clama2%3Alatest", 1, [False, True, True]),
        ("?model=library/llama2", 1, [False, True, True]),
        ("?model=llama2:local", 1, [False, True, True]),
        ("?model=+llama2+", 1, [False, True, True]),
        ("?model=llama2:cloud", 0, [True, True, True]),
        (f"?model={OTHER}", 2, [True, False, False]),
        ("?model=gemma3", 0, [True, True, True]),  # which is gemma3:latest
        ("?model=no-such", 0, [True, True, True]),
        ("?model=%FF%00%0D%0Allama2", 0, [True, True, True]),
        ("?model=llama2;x", 0, [True, True, True]),
        ("?model=llama2%26model=x", 0, [True, True, True]),
    ],
)
async def test_what_is_dropped(
    launch: Start, settings: dict[str, object], query: str, dropped: int, left: list[bool]
) -> None:
    ollprox = await launch(**settings)
    await fill(ollprox.port)
    answer = await drop(ollprox.port, query)
    assert (answer.status, answer.json()) == (200, {"dropped": dropped})
    assert await kept(ollprox.port) == left
    assert (await drop(ollprox.port)).json() == {"dropped": sum(left)}


@pytest.mark.parametrize(
    "query",
    [
        "?model=",
        "?model",
        "?model=&",
        "?=llama2",
        "?Model=llama2",
        "?models=llama2",
        "?model=llama2&model=llama2",
        "?model=llama2&model=",
        "?model=llama2&x",
        "?x=1",
        "?%6dodel2=llama2",
    ],
)
async def test_what_is_not_understood_drops_nothing(
    launch: Start, settings: dict[str, object], query: str
) -> None:
    ollprox = await launch(**settings)
    await fill(ollprox.port)
    answer = await drop(ollprox.port, query)
    assert answer.status == 400
    assert "?model=NAME" in answer.json()["error"]
    assert await kept(ollprox.port) == [True, True, True]


async def test_dropping_is_for_admins(launch: Start, settings: dict[str, object]) -> None:
    ollprox = await launch(**settings)
    await fill(ollprox.port)
    for query in ("", "?model=llama2", "?model="):
        for key, status in ((KEY, 403), ("wrong", 401), ("", 401)):
            assert (await drop(ollprox.port, query, key)).status == status
    for method in ("GET", "HEAD", "POST", "PUT", "OPTIONS"):
        answer = await ask(ollprox.port, method, "/cache", headers={"APIKEY": BOSS})
        assert (answer.status, answer.headers["allow"]) == (405, "DELETE")
    for path in ("/cache/", "/cache/llama2", "/Cache"):
        assert (await ask(ollprox.port, "DELETE", path, headers={"APIKEY": BOSS})).status == 404
    assert (await ask(ollprox.port, "DELETE", f"/key/{KEY}/cache")).status == 403
    assert await kept(ollprox.port) == [True, True, True]
    answer = await ask(ollprox.port, "DELETE", f"/key/{BOSS}/cache", headers={"APIKEY": KEY})
    assert answer.json() == {"dropped": 3}


async def test_without_admins_nobody_may(ollprox: Program) -> None:
    """Not even the only key, which sees all the numbers."""
    assert (await drop(ollprox.port, key=KEY)).status == 403


@pytest.mark.parametrize(
    ("query", "stays"), [("", False), ("?model=llama2", False), (f"?model={OTHER}", True)]
)
async def test_answers_under_way_are_not_stored_afterwards(
    launch: Start, ollama: StandIn, settings: dict[str, object], query: str, stays: bool
) -> None:
    ollprox = await launch(**settings)
    ollama.script.hold_before = 2
    async with Client(ollprox.port) as early, Client(ollprox.port) as late:
        first = await early.begin("POST", "/api/generate", question())
        await anext(early.chunks(first))
        answer = await drop(ollprox.port, query)
        assert answer.json() == {"dropped": 0}
        await late.send(request("POST", "/call_model", question()))
        asked = 1 if stays else 2  # the second joins what will be stored, and nothing else
        while (await running(ollprox.port)) != ([2] if stays else [1, 1]):
            await asyncio.sleep(0.01)
        ollama.script.let_go.set()
        second = await late.rest(await late.head())
        await early.rest(first)
    assert first.complete
    assert len(first.lines()) == 6
    assert ("collapsed" in second.cache_status) is stays
    # What was asked for after the drop is kept, whichever of the two ends last.
    assert (await kept(ollprox.port))[0]
    assert len(ollama.asked()) == asked


async def test_an_answer_that_was_dropped_under_way_is_not_kept(
    launch: Start, ollama: StandIn, settings: dict[str, object]
) -> None:
    ollprox = await launch(**settings)
    ollama.script.hold_before = 2
    async with Client(ollprox.port) as client:
        first = await client.begin("POST", "/api/generate", question())
        await drop(ollprox.port, "?model=llama2")
        ollama.script.let_go.set()
        await client.rest(first)
    assert first.complete
    assert not any(await kept(ollprox.port))


async def test_all_forms_of_a_models_answers_are_dropped(
    launch: Start, settings: dict[str, object]
) -> None:
    ollprox = await launch(**settings)
    message = {"role": "user", "content": "a"}
    for path, body in (
        ("/api/chat", {"messages": [message]}),
        ("/api/embed", {"input": "a"}),
        ("/v1/chat/completions", {"messages": [message]}),
        ("/v1/chat/completions", {"messages": [message], "stream": True}),
        ("/v1/embeddings", {"input": "a"}),
    ):
        for model in ("llama2", OTHER):
            answer = await ask(ollprox.port, "POST", path, {"model": model, **body})
            assert answer.status == 200
    assert (await drop(ollprox.port, "?model=llama2")).json() == {"dropped": 5}
    assert (await drop(ollprox.port)).json() == {"dropped": 5}


async def test_a_drop_with_a_body_is_taken(launch: Start, settings: dict[str, object]) -> None:
    ollprox = await launch(**settings)
    await fill(ollprox.port)
    answer = await ask(ollprox.port, "DELETE", "/cache", b"{}", {"APIKEY": BOSS})
    assert answer.json() == {"dropped": 3}
