"""MODEL_ALIASES: a name that clients are stuck with is answered by another model."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from client import KEY, Client, ask, question
from conftest import Program, Start
from standin import StandIn

from answers.lists import change_list
from answers.ollama_api import route_table
from settings import SettingsError, load
from wire.http11 import HTTPError, Response

ALIASES = "gpt-4o=llama2, small = gemma3:270m"
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("gpt-4o=llama3.3", (("gpt-4o", "llama3.3"),)),
        (" a = b ,c=me/d:1b,", (("a", "b"), ("c", "me/d:1b"))),
        ("a=hf.co/user/model:Q4_K_M", (("a", "hf.co/user/model:Q4_K_M"),)),
    ],
)
def test_aliases_are_read(text: str, pairs: tuple[tuple[str, str], ...]) -> None:
    assert load({"MODEL_ALIASES": text}, Path("/none")).model_aliases == pairs


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("gpt-4o", "names and models"),
        ("=llama2", "names and models"),
        ("gpt-4o=", "names and models"),
        ("a=b=c", "names and models"),
        ("a b=c", "names and models"),
        ("a=../b\n", "names and models"),
        ("a=é", "names and models"),
        ("a=b,b=c", "to an alias"),
        ("b=c,a=B:latest", "to an alias"),
        ("a=a:latest", "to an alias"),
        ("a=b,A:latest=c", "once"),
    ],
)
def test_what_is_no_alias_stops_the_start(text: str, why: str) -> None:
    with pytest.raises(SettingsError, match=f"MODEL_ALIASES must .*{why}"):
        load({"MODEL_ALIASES": text}, Path("/none"))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/generate", {"prompt": "Why?"}),
        ("/api/generate", {"prompt": "Why?", "stream": False}),
        ("/call_model", {"prompt": "Why?"}),
        ("/api/chat", {"messages": MESSAGES}),
        ("/api/embed", {"input": "a"}),
        ("/api/embeddings", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": MESSAGES}),
        ("/v1/chat/completions", {"messages": MESSAGES, "stream": True}),
        ("/v1/completions", {"prompt": "Why?"}),
        ("/v1/embeddings", {"input": "a"}),
        ("/v1/messages", {"messages": MESSAGES}),
    ],
)
async def test_an_alias_and_its_model_share_answers(
    launch: Start, ollama: StandIn, path: str, body: dict[str, object]
) -> None:
    ollprox = await launch(MODEL_ALIASES=ALIASES)
    answers = [
        await ask(ollprox.port, "POST", path, {"model": model, **body})
        for model in ("gpt-4o", "llama2", "GPT-4o:latest")
    ]
    assert [answer.status for answer in answers] == [200] * 3
    (seen,) = ollama.asked()
    assert seen.json()["model"] == "llama2"
    assert [("hit" in answer.cache_status) for answer in answers] == [False, True, True]
    assert {answer.body for answer in answers} == {answers[0].body}
    assert b"gpt-4o" not in answers[0].body
    await ollprox.says("model=llama2")


async def test_a_large_body_is_rewritten_too(launch: Start, ollama: StandIn) -> None:
    ollprox = await launch(MODEL_ALIASES=ALIASES)
    body = {"model": "gpt-4o", "prompt": "x" * 200_000}
    assert (await ask(ollprox.port, "POST", "/api/generate", body)).status == 200
    assert ollama.asked()[0].json()["model"] == "llama2"


async def test_aliases_are_listed_beside_the_models(launch: Start, ollama: StandIn) -> None:
    ollprox = await launch(MODEL_ALIASES=f"{ALIASES},gone=nowhere,gemma3:270m-x=llama2")
    straight = {m["name"]: m for m in (await ask(ollama.port, "GET", "/api/tags")).json()["models"]}
    listed = {m["name"]: m for m in (await ask(ollprox.port, "GET", "/api/tags")).json()["models"]}
    assert set(listed) == {*straight, "gpt-4o", "small", "gemma3:270m-x"}
    real = straight["llama2:latest"]
    assert listed["gpt-4o"] == {**real, "name": "gpt-4o", "model": "gpt-4o"}
    found = (await ask(ollprox.port, "GET", "/v1/models")).json()["data"]
    assert {"gpt-4o", "small", "llama2:latest"} <= {model["id"] for model in found}
    running = (await ask(ollprox.port, "GET", "/api/ps")).json()["models"]
    assert {model["name"] for model in running} == set(straight)
    one = await ask(ollprox.port, "GET", "/v1/models/gpt-4o")
    assert (one.status, one.json()["id"]) == (200, "gpt-4o")
    assert ollama.asked("/v1/models/llama2")
    head = await ask(ollprox.port, "HEAD", "/api/tags")
    assert (head.status, head.body) == (200, b"")


async def test_show_of_an_alias(launch: Start, ollama: StandIn) -> None:
    ollprox = await launch(MODEL_ALIASES=ALIASES)
    for body in ({"model": "small"}, {"name": "small"}):
        assert (await ask(ollprox.port, "POST", "/api/show", body)).status == 200
    shown = [seen.json() for seen in ollama.asked("/api/show")]
    assert shown == [{"model": "gemma3:270m"}, {"name": "gemma3:270m"}]


async def test_rights_go_by_the_real_model(launch: Start, ollama: StandIn, tmp_path: Path) -> None:
    """A key that may use a name may not use what the name points to, and the other way round."""
    keys = tmp_path / "k.txt"
    only_model, only_alias = "a-key-for-llama2-only", "a-key-for-the-alias-only"
    keys.write_text(
        f"{KEY}  # all\n{only_model} models=llama2  # one\n{only_alias} models=gpt-4o  # two\n"
    )
    ollprox = await launch(API_KEY_FILE=keys, MODEL_ALIASES=ALIASES)
    model, alias = {"APIKEY": only_model}, {"APIKEY": only_alias}
    body = question(model="gpt-4o")
    assert (await ask(ollprox.port, "POST", "/call_model", body, model)).status == 200
    assert (await ask(ollprox.port, "POST", "/call_model", body, alias)).status == 403
    assert (await ask(ollprox.port, "GET", "/v1/models/gpt-4o", headers=model)).status == 200
    assert (await ask(ollprox.port, "GET", "/v1/models/gpt-4o", headers=alias)).status == 403
    body = question(model="small")
    assert (await ask(ollprox.port, "POST", "/call_model", body, model)).status == 403
    for headers, names in ((model, {"llama2:latest", "gpt-4o"}), (alias, set[str]())):
        for path, name, field in (("/api/tags", "models", "name"), ("/v1/models", "data", "id")):
            listed = (await ask(ollprox.port, "GET", path, headers=headers)).json()[name]
            assert {entry[field] for entry in listed} == names


async def test_an_alias_joins_its_models_answer(launch: Start, ollama: StandIn) -> None:
    ollprox = await launch(MODEL_ALIASES=ALIASES)
    ollama.script.hold_before = 1
    async with Client(ollprox.port) as one, Client(ollprox.port) as two:
        first = await one.begin("POST", "/api/generate", question(model="llama2"))
        second = await two.begin("POST", "/api/generate", question(model="gpt-4o"))
        assert "collapsed" in second.cache_status
        ollama.script.let_go.set()
        await asyncio.gather(one.rest(first), two.rest(second))
    assert first.body == second.body
    assert len(ollama.asked()) == 1


async def test_without_aliases_a_name_is_only_a_name(ollprox: Program) -> None:
    assert (await ask(ollprox.port, "POST", "/call_model", question(model="gpt-4o"))).status == 404


async def listed(aliases: list[tuple[str, str]], *names: str) -> Any:
    body = json.dumps({"models": [{"name": name} for name in names]}).encode()
    response = Response(200, (), body, len(body))
    await change_list(response, "models", None, aliases)
    assert isinstance(response.body, bytes)
    return [entry["name"] for entry in json.loads(response.body)["models"]]


async def test_an_alias_hides_the_model_of_its_name() -> None:
    assert await listed([("a", "b")], "a:latest", "b:latest", "c:latest") == [
        "b:latest",
        "c:latest",
        "a",
    ]


async def test_an_empty_list_stays_one() -> None:
    assert await listed([("a", "b")]) == []


@pytest.mark.parametrize("body", [b"[]", b'{"models":[1]}', b'{"models":[{"x":1}]}', b"no", b"{}"])
async def test_what_is_no_list_is_502(body: bytes) -> None:
    with pytest.raises(HTTPError, match="cannot be read"):
        await change_list(Response(200, (), body), "models", None, [("a", "b")])


def test_the_path_of_an_alias_asks_for_its_model() -> None:
    table = route_table(1, [("gpt-4o", "hf.co/me/m:1b")])
    for path in (b"/v1/models/gpt-4o", b"/v1/models/GPT-4o%3Alatest"):
        found = table.find(path)
        assert found
        assert found[1] == b"/v1/models/hf.co%2Fme%2Fm:1b"
    blob = b"/api/blobs/sha256:" + b"0" * 64
    assert (table.find(blob) or ("", b""))[1] == blob
