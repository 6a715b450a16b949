"""Rights and limits of keys, and turns on the GPU, as callers see them."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from client import Answer, Client, ask, question, request
from conftest import Program, Start
from standin import StandIn

KEYS = {name: f"{name}-key-for-tests" for name in ("anna", "omar", "boss", "demo")}
CHAT = {"model": "llama2", "messages": [{"role": "user", "content": "Hi"}]}
Keys = Callable[..., Path]
EMBED = {"model": "llama2", "input": "Hi"}


def by(name: str, **headers: str) -> dict[str, str]:
    """The headers of a request with somebody's key."""
    return {"APIKEY": KEYS[name], **headers}


@pytest.fixture
def keys(tmp_path: Path) -> Callable[..., Path]:
    """Write a key file: the options of each name."""
    path = tmp_path / "rights.txt"

    def write(**options: str) -> Path:
        lines = (f"{KEYS[name]} {options.get(name, '')}  # {name}\n" for name in KEYS)
        path.write_text("".join(lines))
        return path

    return write


@asynccontextmanager
async def running(ollprox: Program, ollama: StandIn, name: str = "anna") -> AsyncIterator[Client]:
    """Somebody's generation that Ollama works on until `let_go` is set."""
    ollama.script.hold_head = True
    before = len(ollama.asked())
    async with Client(ollprox.port) as client:
        await client.send(request("POST", "/call_model", question(f"held for {name}"), by(name)))
        await ollama.until(lambda: len(ollama.asked()) > before)
        yield client


async def view(ollprox: Program) -> dict[str, Any]:
    answer = await ask(ollprox.port, "GET", "/metrics.json", headers=by("boss"))
    found: dict[str, Any] = answer.json()
    return found


async def until_waiting(ollprox: Program, count: int) -> list[dict[str, Any]]:
    """Wait until this many requests are queued."""
    while len(waiting := (await view(ollprox))["waiting"]) != count:
        await asyncio.sleep(0.01)
    return list(waiting)


# Turns.


async def test_a_request_waits_for_its_turn_and_its_answer_says_how_long(
    launch: Start, ollama: StandIn, keys: Keys
) -> None:
    ollprox = await launch(API_KEY_FILE=keys(boss="admin"), MAX_GENERATIONS=1)
    async with running(ollprox, ollama) as first, Client(ollprox.port) as second:
        await second.send(request("POST", "/call_model", question("next"), by("omar")))
        (waiting,) = await until_waiting(ollprox, 1)
        assert (waiting["label"], waiting["position"]) == ("omar", 1)
        assert len(ollama.asked()) == 1
        ollama.script.let_go.set()
        held = await first.rest(await first.head())
        answer = await second.rest(await second.head())
    assert answer.status == held.status == 200
    milliseconds = float(answer.headers["server-timing"].removeprefix("queue;dur="))
    assert milliseconds > 0
    assert held.headers["server-timing"] == "queue;dur=0.0"
    line = (await ollprox.says(r"key=omar .* queued=(\S+)"))[1]
    assert float(line) == pytest.approx(milliseconds / 1000, abs=0.001)
    text = (await ask(ollprox.port, "GET", "/metrics", headers=by("boss"))).body.decode()
    assert "ollprox_queue_seconds_count 2\n" in text
    assert "ollprox_queue_depth 0\n" in text


async def test_turns_go_by_label_not_by_who_came_first(
    launch: Start, ollama: StandIn, keys: Keys
) -> None:
    ollprox = await launch(API_KEY_FILE=keys(boss="admin"), MAX_GENERATIONS=1)
    async with running(ollprox, ollama, "anna"):
        clients = [Client(ollprox.port) for _ in range(4)]
        for number, (client, name) in enumerate(
            zip(clients, ("anna", "anna", "anna", "omar"), strict=True)
        ):
            await client.__aenter__()
            body = question(f"{name} {number}")
            await client.send(request("POST", "/call_model", body, by(name)))
            await until_waiting(ollprox, number + 1)
        ollama.script.let_go.set()
        for client in clients:
            await client.rest(await client.head())
            await client.__aexit__(None, None, None)
    prompts = [seen.json()["prompt"] for seen in ollama.asked()]
    assert prompts == ["held for anna", "omar 3", "anna 0", "anna 1", "anna 2"]


async def test_hits_and_joined_requests_never_wait(
    launch: Start, ollama: StandIn, keys: Keys
) -> None:
    ollprox = await launch(API_KEY_FILE=keys(boss="admin"), MAX_GENERATIONS=1)
    assert (await ask(ollprox.port, "POST", "/call_model", question(), by("omar"))).status == 200
    async with running(ollprox, ollama, "anna") as first, Client(ollprox.port) as joins:
        hit = await ask(ollprox.port, "POST", "/call_model", question(), by("omar"))
        assert "hit" in hit.cache_status
        assert "server-timing" not in hit.headers
        await joins.send(request("POST", "/call_model", question("held for anna"), by("omar")))
        while (await view(ollprox))["running"][0]["readers"] < 2:
            await asyncio.sleep(0.01)
        assert (await view(ollprox))["waiting"] == []
        ollama.script.let_go.set()
        joined = await joins.rest(await joins.head())
        assert joined.body == (await first.rest(await first.head())).body
    assert "collapsed" in joined.cache_status


async def test_a_client_that_leaves_is_out_of_the_queue_at_once(
    launch: Start, ollama: StandIn, keys: Keys
) -> None:
    ollprox = await launch(API_KEY_FILE=keys(boss="admin"), MAX_GENERATIONS=1)
    async with running(ollprox, ollama):
        async with Client(ollprox.port) as leaves:
            await leaves.send(request("POST", "/call_model", question("gone"), by("omar")))
            await until_waiting(ollprox, 1)
            leaves.writer.transport.abort()
        await until_waiting(ollprox, 0)
        ollama.script.let_go.set()
    assert (
        await ask(ollprox.port, "POST", "/call_model", question("on"), by("omar"))
    ).status == 200
    assert [seen.json()["prompt"] for seen in ollama.asked()] == [
        "held for anna",
        "on",
    ]


Message = Callable[[Any], str]
REFUSALS: list[tuple[str, dict[str, Any], Message]] = [
    ("/call_model", question("more"), lambda e: e["error"]),
    ("/api/chat", CHAT, lambda e: e["error"]),
    ("/api/embed", EMBED, lambda e: e["error"]),
    ("/v1/chat/completions", CHAT, lambda e: e["error"]["message"]),
    ("/v1/embeddings", EMBED, lambda e: e["error"]["message"]),
    ("/v1/messages", {**CHAT, "max_tokens": 5}, lambda e: e["error"]["message"]),
]


async def test_beyond_queue_max_a_label_is_refused_in_the_form_of_the_api(
    launch: Start, ollama: StandIn, keys: Keys
) -> None:
    ollprox = await launch(API_KEY_FILE=keys(boss="admin"), MAX_GENERATIONS=1, QUEUE_MAX=1)
    async with running(ollprox, ollama), Client(ollprox.port) as waits:
        await waits.send(request("POST", "/call_model", question("waits"), by("omar")))
        await until_waiting(ollprox, 1)
        for path, body, message in REFUSALS:
            answer = await ask(ollprox.port, "POST", path, body, by("omar"))
            assert answer.status == 429, path
            assert "QUEUE_MAX" in message(answer.json())
            assert 1 <= int(answer.headers["retry-after"]) <= 120
        other = asyncio.create_task(ask(ollprox.port, "POST", "/call_model", CHAT, by("boss")))
        ollama.script.let_go.set()
        assert (await other).status in {200, 400}  # another label still may wait
        assert (await waits.rest(await waits.head())).status == 200
    text = (await ask(ollprox.port, "GET", "/metrics", headers=by("boss"))).body.decode()
    assert f'ollprox_queue_refused_total{{reason="queue full"}} {len(REFUSALS)}' in text


async def test_who_waits_longer_than_queue_timeout_gets_503(
    launch: Start, ollama: StandIn, keys: Keys
) -> None:
    ollprox = await launch(
        API_KEY_FILE=keys(omar="rate=1/hour"), MAX_GENERATIONS=1, QUEUE_TIMEOUT=0.2
    )
    async with running(ollprox, ollama):
        answer = await ask(ollprox.port, "POST", "/call_model", question("late"), by("omar"))
        assert answer.status == 503
        assert "QUEUE_TIMEOUT" in answer.json()["error"]
        assert 1 <= int(answer.headers["retry-after"]) <= 120
        ollama.script.let_go.set()
    # It never began, so it does not count for the key's rate.
    assert (await ask(ollprox.port, "POST", "/call_model", question("a"), by("omar"))).status == 200


async def test_at_sigterm_those_who_wait_are_refused_and_those_who_run_finish(
    launch: Start, ollama: StandIn, keys: Keys
) -> None:
    ollprox = await launch(API_KEY_FILE=keys(boss="admin"), MAX_GENERATIONS=1)
    async with running(ollprox, ollama) as first, Client(ollprox.port) as second:
        await second.send(request("POST", "/call_model", question("waits"), by("omar")))
        await until_waiting(ollprox, 1)
        ollprox.process.terminate()
        refused = await second.rest(await second.head())
        assert (refused.status, refused.headers["retry-after"]) == (503, "5")
        ollama.script.let_go.set()
        assert (await first.rest(await first.head())).status == 200
    assert await ollprox.process.wait() == 0


async def test_running_bounds_a_key_also_without_a_queue(
    launch: Start, ollama: StandIn, keys: Keys
) -> None:
    ollprox = await launch(API_KEY_FILE=keys(anna="running=1", boss="admin"))
    async with (
        running(ollprox, ollama, "anna"),
        running(ollprox, ollama, "omar"),
        Client(ollprox.port) as more,
    ):
        await more.send(request("POST", "/call_model", question("more"), by("anna")))
        (waiting,) = await until_waiting(ollprox, 1)
        assert waiting["label"] == "anna"
        me = (await ask(ollprox.port, "GET", "/whoami", headers=by("anna"))).json()
        assert (me["used"]["running"], me["used"]["waiting"]) == (1, 1)
        ollama.script.let_go.set()
        assert (await more.rest(await more.head())).status == 200


async def test_unloading_and_looking_take_no_turn_and_loading_does(
    launch: Start, ollama: StandIn, keys: Keys
) -> None:
    ollprox = await launch(API_KEY_FILE=keys(boss="admin"), MAX_GENERATIONS=1)
    async with Client(ollprox.port) as runs:
        ollama.script.hold_before = 1
        stream = await runs.begin("POST", "/api/generate", question("held"), by("anna"))
        await anext(runs.chunks(stream))
        ollama.script.hold_before = None  # for the others
        looks: list[tuple[str, str, object]] = [
            ("GET", "/api/tags", None),
            ("GET", "/api/ps", None),
            ("GET", "/v1/models", None),
            ("POST", "/api/show", {"model": "llama2"}),
            ("POST", "/api/generate", {"model": "llama2", "keep_alive": 0}),
            ("POST", "/api/chat", {"model": "llama2", "keep_alive": "0s", "messages": []}),
        ]
        for method, path, body in looks:
            assert (await ask(ollprox.port, method, path, body, by("boss"))).status == 200, path
        async with Client(ollprox.port) as loads:
            await loads.send(request("POST", "/api/generate", {"model": "llama2"}, by("omar")))
            await until_waiting(ollprox, 1)
            ollama.script.let_go.set()
            assert (await loads.rest(await loads.head())).status == 200


# Limits.


async def test_a_prompt_in_another_case_is_not_taken_for_unloading(
    launch: Start, ollama: StandIn, keys: Keys
) -> None:
    """Ollama reads names in any case, so it would generate."""
    ollprox = await launch(API_KEY_FILE=keys(omar="rate=1/hour"))
    unload = {"model": "llama2", "keep_alive": 0}
    for path, names in (("/api/generate", {"Prompt": "Hi"}), ("/api/chat", {"MESSAGES": ["Hi"]})):
        await ask(ollprox.port, "POST", path, unload | names, by("omar"))
    answer = await ask(ollprox.port, "POST", "/api/generate", unload | {"PROMPT": "a"}, by("omar"))
    assert answer.status == 429


async def test_a_used_up_rate_is_429_with_the_true_time_and_hits_are_free(
    launch: Start, ollama: StandIn, keys: Keys
) -> None:
    ollprox = await launch(API_KEY_FILE=keys(omar="rate=1/hour"))
    assert (await ask(ollprox.port, "POST", "/call_model", question(), by("omar"))).status == 200
    for _ in range(3):
        hit = await ask(ollprox.port, "POST", "/api/generate", question(), by("omar"))
        assert "hit" in hit.cache_status
    for path, body, message in REFUSALS:
        answer = await ask(ollprox.port, "POST", path, body, by("omar"))
        assert answer.status == 429, path
        assert "rate=1/hour" in message(answer.json())
        assert 3590 <= int(answer.headers["retry-after"]) <= 3600
    assert (await ask(ollprox.port, "POST", "/call_model", question("x"), by("anna"))).status == 200
    openai = await ask(ollprox.port, "POST", "/v1/chat/completions", CHAT, by("omar"))
    assert openai.json()["error"]["code"] == "rate_limit_exceeded"
    assert openai.headers["x-ratelimit-limit-requests"] == "1"
    assert openai.headers["x-ratelimit-remaining-requests"] == "0"
    assert openai.headers["x-ratelimit-reset-requests"].endswith("s")


async def test_a_refusal_reaches_only_the_caller_whose_limit_is_used_up(
    launch: Start, ollama: StandIn, keys: Keys
) -> None:
    ollprox = await launch(API_KEY_FILE=keys(omar="rate=1/hour", boss="admin"))
    assert (await ask(ollprox.port, "POST", "/call_model", question(), by("omar"))).status == 200
    async with running(ollprox, ollama, "anna") as first, Client(ollprox.port) as joins:
        await joins.send(request("POST", "/call_model", question("held for anna"), by("omar")))
        while (await view(ollprox))["running"][0]["readers"] < 2:
            await asyncio.sleep(0.01)
        ollama.script.let_go.set()
        joined = await joins.rest(await joins.head())
        assert (await first.rest(await first.head())).status == joined.status == 200


async def test_generated_tokens_count_and_a_changed_limit_holds_at_once(
    launch: Start, ollama: StandIn, keys: Keys
) -> None:
    path = keys(omar="tokens=5/day")
    ollprox = await launch(API_KEY_FILE=path, KEY_REFRESH=0.1)
    answer = await ask(ollprox.port, "POST", "/call_model", question(), by("omar"))
    assert answer.json()["eval_count"] == 5
    refused = await ask(ollprox.port, "POST", "/call_model", question("a"), by("omar"))
    assert refused.status == 429
    assert "tokens=5/day" in refused.json()["error"]
    me = (await ask(ollprox.port, "GET", "/whoami", headers=by("omar"))).json()
    assert me["rights"] == {"tokens": "5/day"}
    assert me["used"]["tokens"] == 5
    assert 86390 < me["resets"]["tokens"] <= 86400
    keys(omar="tokens=6/day")
    while (await ask(ollprox.port, "GET", "/whoami", headers=by("omar"))).json()["rights"] != {
        "tokens": "6/day"
    }:
        await asyncio.sleep(0.05)
    assert (await ask(ollprox.port, "POST", "/call_model", question("b"), by("omar"))).status == 200
    assert (await ask(ollprox.port, "POST", "/call_model", question("c"), by("omar"))).status == 429


async def test_key_defaults_hold_for_keys_that_do_not_say_otherwise(
    launch: Start, ollama: StandIn, keys: Keys
) -> None:
    ollprox = await launch(API_KEY_FILE=keys(omar="rate=none"), KEY_DEFAULTS="rate=1/hour")
    statuses = {}
    for name in ("anna", "omar"):
        for number in range(2):
            body = question(f"{name} {number}")
            answer = await ask(ollprox.port, "POST", "/call_model", body, by(name))
            statuses[name, number] = answer.status
    assert list(statuses.values()) == [200, 429, 200, 200]


# Models.

FORBIDDEN = [
    ("POST", "/call_model", question(model="llama2")),
    ("POST", "/api/generate", question(model="LLAMA2:latest")),
    ("POST", "/api/generate", question(model="registry.ollama.ai/library/llama2")),
    ("POST", "/api/generate", question(model=" llama2:local ")),
    ("POST", "/api/generate", {"model": "llama2"}),
    ("POST", "/api/generate", {"Model": "llama2", "model": "gemma3:270m", "prompt": "x"}),
    ("POST", "/api/generate", {"Model": "llama2", "prompt": "x"}),
    ("POST", "/api/chat", CHAT),
    ("POST", "/api/embed", EMBED),
    ("POST", "/api/embeddings", {"model": "llama2", "prompt": "x"}),
    ("POST", "/api/show", {"model": "llama2"}),
    ("POST", "/api/show", {"name": "llama2"}),
    ("POST", "/api/show", {"model": "llama2", "name": "gemma3:270m"}),
    ("POST", "/v1/chat/completions", CHAT),
    ("POST", "/v1/completions", {"model": "llama2", "prompt": "x"}),
    ("POST", "/v1/embeddings", EMBED),
    ("POST", "/v1/responses", {"model": "llama2", "input": "x"}),
    ("POST", "/v1/messages", {**CHAT, "max_tokens": 5}),
    ("GET", "/v1/models/llama2", None),
    ("GET", "/v1/models/llama2%3Alatest", None),
    ("GET", "/v1/models/library%2Fllama2", None),
    ("POST", "/v1/images/generations", {"model": "gemma3:270m", "prompt": "x"}),
    ("POST", "/v1/audio/transcriptions", b"--x--"),
]


async def test_a_model_that_a_key_may_not_use_is_403_on_every_route(
    launch: Start, ollama: StandIn, keys: Keys
) -> None:
    """Also where another's answer is stored, and for one that is under way."""
    ollprox = await launch(API_KEY_FILE=keys(demo="models=gemma3*"))
    for method, path, body in FORBIDDEN:  # so that answers are stored
        await ask(ollprox.port, method, path, body, by("anna"))
    before = len(ollama.asked())
    for method, path, body in FORBIDDEN:
        answer = await ask(ollprox.port, method, path, body, by("demo"))
        assert answer.status == 403, (path, body)
        error = answer.json()["error"]
        assert isinstance(error, dict) == path.startswith("/v1"), path
    assert len(ollama.asked()) == before
    for path, body in (("/call_model", question(model="gemma3:270m")), ("/api/chat", CHAT)):
        allowed = {**body, "model": "Gemma3:270m"}
        assert (await ask(ollprox.port, "POST", path, allowed, by("demo"))).status in {200, 404}


async def test_lists_show_only_the_models_that_a_key_may_use(
    launch: Start, ollama: StandIn, keys: Keys
) -> None:
    ollprox = await launch(API_KEY_FILE=keys(demo="models=gemma3:270m", omar="models=none-such"))
    found: dict[str, list[Answer]] = {"anna": [], "demo": [], "omar": []}
    for name, answers in found.items():
        for path in ("/api/tags", "/api/ps", "/v1/models"):
            answers.append(await ask(ollprox.port, "GET", path, headers=by(name)))
            assert answers[-1].status == 200
        head = await ask(ollprox.port, "HEAD", "/api/tags", headers=by(name))
        assert (head.status, head.body) == (200, b"")
    for index, (list_name, model_name) in enumerate(
        (("models", "name"), ("models", "name"), ("data", "id"))
    ):
        names = {
            name: [model[model_name] for model in answers[index].json()[list_name]]
            for name, answers in found.items()
        }
        assert names["demo"] == ["gemma3:270m"]
        assert names["omar"] == []
        assert "llama2:latest" in names["anna"]


async def test_whoami_tells_a_keys_rights(launch: Start, ollama: StandIn, keys: Keys) -> None:
    options = "models=llama2,gemma3* rate=5/minute rate=9/hour running=2 weight=3 until=2099-01-31"
    ollprox = await launch(API_KEY_FILE=keys(omar=options, boss="admin"))
    answer = await ask(ollprox.port, "GET", "/whoami", headers=by("omar"))
    assert answer.headers["cache-control"] == "no-store"
    assert answer.json() == {
        "label": "omar",
        "rights": {
            "models": "llama2:latest,gemma3*",
            "rate": "5/minute 9/hour",
            "running": 2,
            "weight": 3,
            "until": "2099-01-31",
        },
        "used": {"running": 0, "waiting": 0, "rate": 0, "tokens": None},
        "resets": {"rate": 0, "tokens": None},
    }
    boss = (await ask(ollprox.port, "GET", "/whoami", headers=by("boss"))).json()
    assert boss["rights"] == {"admin": True}
    assert (await ask(ollprox.port, "GET", "/whoami", headers={"APIKEY": ""})).status == 401
    assert json.dumps(boss).find(KEYS["boss"]) == -1


async def test_the_length_of_a_list_does_not_tell_of_models_that_a_key_may_not_use(
    launch: Start, ollama: StandIn, keys: Keys
) -> None:
    ollprox = await launch(API_KEY_FILE=keys(demo="models=llama2"))
    for path in ("/api/tags", "/api/ps"):
        answers = [
            await ask(ollprox.port, method, path, headers=by(name))
            for method in ("GET", "HEAD")
            for name in ("anna", "demo")
        ]
        everything, allowed, full, head = (a.headers.get("content-length") for a in answers)
        assert everything == full != allowed
        assert head is None


@pytest.mark.parametrize("size", [9, 100, 1000])
async def test_a_list_is_filtered_however_small_the_cache_is(
    launch: Start, ollama: StandIn, keys: Keys, size: int
) -> None:
    ollprox = await launch(API_KEY_FILE=keys(demo="models=m1", boss="admin"), CACHE_MAX_BYTES=size)
    ollama.script.models = {f"m{number}:latest": "a" * 64 for number in range(5000)}
    answer = await ask(ollprox.port, "GET", "/api/ps", headers=by("demo"))
    assert [model["name"] for model in answer.json()["models"]] == ["m1:latest"]


async def test_a_list_that_cannot_be_read_leaves_nothing_behind(
    launch: Start, ollama: StandIn, keys: Keys
) -> None:
    ollprox = await launch(
        API_KEY_FILE=keys(demo="models=m1", boss="admin"), CACHE_MAX_BYTES=9, MODEL_REFRESH=0
    )
    body = b"1" * (20 << 20)
    ollama.script.raw = b"HTTP/1.1 200 X\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    assert (await ask(ollprox.port, "GET", "/api/ps", headers=by("demo"))).status == 502
    metrics = await ask(ollprox.port, "GET", "/metrics", headers=by("boss"))
    assert "ollprox_answers_under_way 0\n" in metrics.body.decode()
