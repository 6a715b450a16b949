"""Real clients, each against OllProx and directly against the stand-in.

A client must return the same through OllProx as without it: for a miss, for a hit, and for a
request that joins another. It must also raise the same errors.
"""

import asyncio
import gc
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ollama as ollama_client
import openai
import pytest
import requests
from client import KEY
from conftest import Program, Start
from langchain_ollama import ChatOllama, OllamaEmbeddings, OllamaLLM
from standin import RUNNER_DIED, StandIn

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # clients leave sockets
MODEL = "llama2"
MESSAGES: list[Any] = [{"role": "user", "content": "Say hi."}]
NODE = Path(__file__).parent / "node"
Use = Callable[[str, str], Any]  # takes a base URL and a key; gives what the client gave


def curl(base: str, key: str) -> Any:
    def call(path: str, body: object) -> str:
        command = ["curl", "-sS", "-N", f"{base}{path}", "-H", f"APIKEY: {key}"]
        done = subprocess.run(
            [*command, "-d", json.dumps(body)], stdout=subprocess.PIPE, check=True, timeout=30
        )
        return done.stdout.decode()

    body = {"model": MODEL, "prompt": "Why?"}
    return [call("/api/generate", body), call("/api/generate", {**body, "stream": False})]


def with_requests(base: str, key: str) -> Any:
    headers = {"APIKEY": key}
    body = {"model": MODEL, "prompt": "Why?", "stream": False}
    whole = requests.post(f"{base}/api/generate", headers=headers, json=body, timeout=30)
    with requests.post(
        f"{base}/api/generate",
        headers=headers,
        json={**body, "stream": True},
        stream=True,
        timeout=30,
    ) as stream:
        lines = [json.loads(line) for line in stream.iter_lines()]
    return [whole.json(), lines]


def plain(value: Any) -> Any:
    """Return what a client returned, as plain values that can be compared."""
    if isinstance(value, dict):
        return {name: plain(member) for name, member in value.items()}
    if isinstance(value, list):
        return [plain(member) for member in value]
    return plain(value.model_dump()) if hasattr(value, "model_dump") else value


def ollama_sync(base: str, key: str) -> Any:
    client = ollama_client.Client(host=base, headers={"Authorization": f"Bearer {key}"})
    return plain(
        [
            client.generate(MODEL, "Why?"),
            list(client.generate(MODEL, "Why?", stream=True)),
            client.chat(MODEL, MESSAGES),
            list(client.chat(MODEL, MESSAGES, stream=True)),
            client.embed(MODEL, ["a", "b"]),
            client.list(),
            client.show(MODEL),
            client.ps(),
        ]
    )


def ollama_async(base: str, key: str) -> Any:
    async def use() -> Any:
        client = ollama_client.AsyncClient(host=base, headers={"X-API-Key": key})
        stream = await client.generate(MODEL, "Why?", stream=True)
        chat = await client.chat(MODEL, MESSAGES, stream=True)
        return [
            await client.generate(MODEL, "Why?"),
            [part async for part in stream],
            await client.chat(MODEL, MESSAGES),
            [part async for part in chat],
            await client.embed(MODEL, "a"),
            await client.list(),
        ]

    return plain(asyncio.run(use()))


def ollama_by_environment(base: str, key: str) -> Any:
    """The package takes its key from OLLAMA_API_KEY."""
    code = (
        f"import json, ollama; c = ollama.Client(); answer = c.generate('{MODEL}', 'Why?');"
        "print(json.dumps([answer.model_dump(), c.list().model_dump(mode='json')]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OLLAMA_HOST": base, "OLLAMA_API_KEY": key},
        stdout=subprocess.PIPE,
        check=True,
        timeout=30,
    )
    return json.loads(done.stdout)


def with_openai(base: str, key: str) -> Any:
    with openai.OpenAI(base_url=f"{base}/v1", api_key=key, max_retries=0) as client:
        chat = client.chat.completions
        usage: Any = {"include_usage": True}
        return plain(
            [
                chat.create(model=MODEL, messages=MESSAGES),
                list(chat.create(model=MODEL, messages=MESSAGES, stream=True)),
                list(
                    chat.create(model=MODEL, messages=MESSAGES, stream=True, stream_options=usage)
                ),
                client.completions.create(model=MODEL, prompt="The sky is"),
                client.embeddings.create(model=MODEL, input="a", encoding_format="float"),
                list(client.models.list()),
                client.models.retrieve(MODEL),
            ]
        )


def langchain(base: str, key: str) -> Any:
    headers = {"headers": {"Authorization": f"Bearer {key}"}}
    llm = OllamaLLM(model=MODEL, base_url=base, client_kwargs=headers)
    chat = ChatOllama(model=MODEL, base_url=base, client_kwargs=headers)
    embeddings = OllamaEmbeddings(model=MODEL, base_url=base, client_kwargs=headers)
    said = chat.invoke("Say hi.")
    return [
        llm.invoke("Why?"),
        list(llm.stream("Why?")),
        said.content,
        said.response_metadata["created_at"],
        "".join(str(part.content) for part in chat.stream("Say hi.")),
        embeddings.embed_documents(["a", "b"]),
    ]


def node(client: str) -> Use:
    def use(base: str, key: str) -> Any:
        done = subprocess.run(
            ["node", str(NODE / "clients.mjs"), client, base, key, MODEL],
            stdout=subprocess.PIPE,
            check=True,
            timeout=30,
        )
        return json.loads(done.stdout)

    use.__name__ = f"npm_{client}"
    return use


needs_node = pytest.mark.skipif(
    shutil.which("node") is None or not (NODE / "node_modules").exists(),
    reason="needs Node and `npm ci --prefix tests/node`",
)
CLIENTS = [
    pytest.param(curl, marks=pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")),
    with_requests,
    ollama_sync,
    ollama_async,
    ollama_by_environment,
    with_openai,
    langchain,
    pytest.param(node("ollama"), marks=needs_node),
    pytest.param(node("openai"), marks=needs_node),
]


@pytest.fixture(autouse=True)
def _one_moment(ollama: StandIn) -> None:
    """All answers are made at one moment, so that they can be compared."""
    ollama.script.created_at = "2026-11-23T09:10:20.396168845Z"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    yield
    with warnings.catch_warnings():  # and so that none is left for other tests
        warnings.simplefilter("ignore")
        gc.collect()


def at(port: int) -> str:
    return f"http://127.0.0.1:{port}"


@pytest.mark.parametrize("use", CLIENTS)
async def test_a_client_gets_what_it_gets_without_ollprox(
    ollprox: Program, ollama: StandIn, use: Use
) -> None:
    straight = await asyncio.to_thread(use, at(ollama.port), "none")
    before = len(ollama.asked())
    miss = await asyncio.to_thread(use, at(ollprox.port), KEY)
    between = len(ollama.asked())
    hit = await asyncio.to_thread(use, at(ollprox.port), KEY)
    assert miss == straight
    assert hit == straight
    cached = {"/api/generate", "/api/chat", "/api/embed", "/v1/chat/completions"}
    cached |= {"/v1/completions", "/v1/embeddings"}
    assert between > before
    assert not [seen for seen in ollama.asked()[between:] if seen.path in cached]


@pytest.mark.parametrize("use", CLIENTS)
async def test_clients_that_join_each_other_get_the_same(
    launch: Start, ollama: StandIn, use: Use
) -> None:
    straight = await asyncio.to_thread(use, at(ollama.port), "none")
    ollprox = await launch(CACHE_TTL=0)
    before = len(ollama.asked())
    ollama.script.hold_head = True
    tasks = [asyncio.create_task(asyncio.to_thread(use, at(ollprox.port), KEY)) for _ in range(3)]
    await ollama.until(lambda: len(ollama.asked()) > before)
    while ollprox.text().count(" access id=") == 0 and not _waiting(ollprox, 3):
        await asyncio.sleep(0.02)
    ollama.script.hold_head = False
    ollama.script.let_go.set()
    assert await asyncio.gather(*tasks) == [straight] * 3
    await ollprox.says("cache=collapsed")


def _waiting(ollprox: Program, clients: int) -> bool:
    """Whether so many clients are connected."""
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    here = f":{ollprox.port:04X}"
    return len([row for row in rows if row[1].endswith(here) and row[3] == "01"]) >= clients


# What the clients raise.


def raised(use: Callable[[], object]) -> Exception:
    try:
        use()
    except Exception as error:
        return error
    raise AssertionError("it raised nothing")


async def test_a_wrong_key_is_the_clients_own_error(ollprox: Program) -> None:
    base = at(ollprox.port)
    error = await asyncio.to_thread(raised, lambda: ollama_sync(base, "wrong"))
    assert isinstance(error, ollama_client.ResponseError)
    assert error.status_code == 401
    assert "API key is not valid" in str(error)
    error = await asyncio.to_thread(raised, lambda: with_openai(base, "wrong"))
    assert isinstance(error, openai.AuthenticationError)
    assert "API key is not valid" in str(error)


async def test_an_unknown_model_raises_what_it_raises_without_ollprox(
    ollprox: Program, ollama: StandIn
) -> None:
    def native(base: str) -> object:
        headers = {"Authorization": f"Bearer {KEY}"}
        return ollama_client.Client(host=base, headers=headers).generate("nope", "Why?")

    def v1(base: str) -> object:
        with openai.OpenAI(base_url=f"{base}/v1", api_key=KEY, max_retries=0) as client:
            return client.chat.completions.create(model="nope", messages=MESSAGES)

    for use in (native, v1):
        ours, theirs = [
            await asyncio.to_thread(raised, lambda use=use, port=port: use(at(port)))  # type: ignore[misc]
            for port in (ollprox.port, ollama.port)
        ]
        assert (type(ours), str(ours)) == (type(theirs), str(theirs))


@pytest.mark.parametrize("how", ["error_after", "break_after"])
async def test_a_stream_that_breaks_is_an_error_for_the_client(
    ollprox: Program, ollama: StandIn, how: str
) -> None:
    setattr(ollama.script, how, 2)
    headers = {"Authorization": f"Bearer {KEY}"}
    got: list[object] = []

    def native() -> None:
        client = ollama_client.Client(host=at(ollprox.port), headers=headers)
        for part in client.generate(MODEL, "Why?", stream=True):
            got.append(part.response)  # noqa: PERF401 - it ends in an error

    error = await asyncio.to_thread(raised, native)
    assert isinstance(error, ollama_client.ResponseError)
    assert got == ["Paris", " is"]
    if how == "error_after":
        assert str(error).startswith(RUNNER_DIED)
    else:

        def v1() -> None:
            with openai.OpenAI(
                base_url=f"{at(ollprox.port)}/v1", api_key=KEY, max_retries=0
            ) as client:
                list(client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True))

        error = await asyncio.to_thread(raised, v1)
        assert isinstance(error, openai.APIError)


@needs_node
@pytest.mark.parametrize("client", ["ollama", "openai"])
async def test_a_wrong_key_in_javascript(ollprox: Program, client: str) -> None:
    got = await asyncio.to_thread(node(client), at(ollprox.port), "wrong")
    assert got["status"] == 401
    assert "API key is not valid" in got["message"]
