"""Every feature of `/api/generate` and `/api/chat`, by real clients: miss, joined and hit.

The stand-in answers with recorded streams, and with the fold of one that is made here. A client
must get through OllProx what it gets straight, and Ollama must be asked the same.
"""

import asyncio
import base64
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ollama as ollama_client
import pytest
import requests
from client import KEY, ask
from conftest import Program
from langchain_ollama import ChatOllama
from standin import Script, Seen, StandIn
from test_clients import NODE, _no_proxy, needs_node, plain  # noqa: F401 - a fixture
from test_ollama_api import TRACES, TRACES_33, response

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # clients leave sockets
PIXEL = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(40)).decode()
SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "string"}}}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


class Case(NamedTuple):
    """What is asked beside model and prompt, and the recorded stream that answers."""

    path: str
    feature: str
    more: dict[str, Any]
    folder: Path
    trace: str  # empty for what has no trace: the stand-in makes it

    @property
    def chat(self) -> bool:
        return self.path == "/api/chat"

    def body(self, *, stream: bool) -> dict[str, Any]:
        asked: dict[str, Any] = {"model": "llama2", "prompt": "Why?", **self.more}
        if self.chat:
            message = {"role": "user", "content": asked.pop("prompt")}
            if images := asked.pop("images", None):
                message["images"] = images
            asked["messages"] = [message]
        return {**asked, "stream": stream, "options": {"seed": 1 + stream, "temperature": 0}}

    def lines(self) -> list[Any]:
        if not self.trace:
            made = StandIn(Script(created_at="2026-11-23T09:10:20.396168845Z"))
            return made.lines(self.body(stream=True), self.chat)
        return [json.loads(line) for line in response(self.trace, self.folder)[2].splitlines()]

    def whole(self) -> Any:
        """The single object, joined from the lines by other means than OllProx's."""
        lines = self.lines()
        said = [line["message"] if self.chat else line for line in lines]
        whole = dict(lines[-1])
        inner = dict(said[-1])
        inner["content" if self.chat else "response"] = "".join(
            part["content" if self.chat else "response"] for part in said
        )
        if thinking := "".join(part.get("thinking", "") for part in said):
            inner["thinking"] = thinking
        if calls := [call for part in said for call in part.get("tool_calls", [])]:
            inner["tool_calls"] = calls
        whole = {**whole, "message": inner} if self.chat else inner
        if logprobs := [entry for line in lines for entry in line.get("logprobs", [])]:
            whole["logprobs"] = logprobs
        return whole


CASES = [
    Case("/api/generate", "images", {"images": [PIXEL]}, TRACES, "generate-stream-default"),
    Case("/api/generate", "thinking", {"think": True}, TRACES_33, "thinking-generate-stream"),
    Case(
        "/api/generate",
        "logprobs",
        {"logprobs": True, "top_logprobs": 2},
        TRACES,
        "generate-logprobs-stream",
    ),
    Case("/api/generate", "format", {"format": SCHEMA}, TRACES, "generate-format-schema"),
    Case("/api/chat", "images", {"images": [PIXEL]}, TRACES, "chat-stream"),
    Case("/api/chat", "tools", {"tools": [WEATHER]}, TRACES_33, "tools-chat-stream"),
    Case("/api/chat", "thinking", {"think": True}, TRACES_33, "thinking-chat-stream"),
    Case("/api/chat", "logprobs", {"logprobs": True}, TRACES, ""),
    Case("/api/chat", "format", {"format": "json"}, TRACES, "chat-stream"),
]

Use = Callable[[str, Case, bool], Any]


def curl(base: str, case: Case, stream: bool) -> Any:
    command = ["curl", "-sS", "-N", f"{base}{case.path}", "-H", f"APIKEY: {KEY}"]
    done = subprocess.run(
        [*command, "-d", json.dumps(case.body(stream=stream))],
        stdout=subprocess.PIPE,
        check=True,
        timeout=30,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def with_requests(base: str, case: Case, stream: bool) -> Any:
    headers, url = {"X-API-Key": KEY}, f"{base}{case.path}"
    body = case.body(stream=stream)
    with requests.post(url, headers=headers, json=body, stream=stream, timeout=30) as answer:
        return [json.loads(line) for line in answer.iter_lines()]


def ollama_sync(base: str, case: Case, stream: bool) -> Any:
    client = ollama_client.Client(host=base, headers={"Authorization": f"Bearer {KEY}"})
    given = (client.chat if case.chat else client.generate)(**case.body(stream=stream))
    return plain(list(given) if stream else given)


def ollama_async(base: str, case: Case, stream: bool) -> Any:
    async def use() -> Any:
        client = ollama_client.AsyncClient(host=base, headers={"Authorization": f"Bearer {KEY}"})
        call: Any = client.chat if case.chat else client.generate
        given = await call(**case.body(stream=stream))
        return [part async for part in given] if stream else given

    return plain(asyncio.run(use()))


def langchain(base: str, case: Case, stream: bool) -> Any:
    """Its chat model: always asks for a stream."""
    headers = {"headers": {"Authorization": f"Bearer {KEY}"}}
    body = case.body(stream=stream)
    content: Any = "Why?"
    if case.feature == "images":
        content = [{"type": "text", "text": "Why?"}, {"type": "image_url", "image_url": PIXEL}]
    model: Any = ChatOllama(
        model="llama2",
        base_url=base,
        client_kwargs=headers,
        seed=body["options"]["seed"],
        format=body.get("format"),
        reasoning=body.get("think"),
        logprobs=body.get("logprobs"),
    )
    model = model.bind_tools(body["tools"]) if "tools" in body else model
    said = (
        list(model.stream([("human", content)])) if stream else [model.invoke([("human", content)])]
    )
    return [
        [
            part.content,
            part.additional_kwargs,
            {**part.response_metadata},
            [(call["name"], call["args"]) for call in part.tool_calls],
        ]
        for part in said
    ]


def node(base: str, case: Case, stream: bool) -> Any:
    method = "chat" if case.chat else "generate"
    done = subprocess.run(
        [
            *("node", str(NODE / "clients.mjs"), "call", base, KEY),
            *(method, json.dumps(case.body(stream=stream))),
        ],
        stdout=subprocess.PIPE,
        check=True,
        timeout=30,
    )
    return json.loads(done.stdout)


def answer_with(ollama: StandIn, case: Case) -> None:
    async def respond(seen: Seen, writer: asyncio.StreamWriter) -> None:
        if seen.path != case.path:
            await ollama._api(seen, writer)
            return
        await ollama.script.let_go.wait()
        if seen.json()["stream"]:
            body = b"".join(json.dumps(line).encode() + b"\n" for line in case.lines())
            kind = b"application/x-ndjson"
        else:
            body, kind = json.dumps(case.whole()).encode(), b"application/json; charset=utf-8"
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n%b"
            % (kind, len(body), body)
        )

    ollama.script.respond = respond


async def joined(ollprox: Program, count: int) -> None:
    """Wait until so many requests share the answer that is being made."""
    while True:
        view = (await ask(ollprox.port, "GET", "/metrics.json")).json()
        if [row["readers"] for row in view["running"]] == [count]:
            return
        await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    "use",
    [
        curl,
        with_requests,
        ollama_sync,
        ollama_async,
        langchain,
        pytest.param(node, marks=needs_node),
    ],
)
async def test_a_client_gets_each_feature_on_each_way(
    ollprox: Program, ollama: StandIn, use: Use
) -> None:
    wanted = [case for case in CASES if case.chat or use is not langchain]
    for case, stream in [(case, stream) for case in wanted for stream in (True, False)]:
        answer_with(ollama, case)
        ollama.script.let_go.set()
        straight = await asyncio.to_thread(use, f"http://127.0.0.1:{ollama.port}", case, stream)
        (theirs,) = ollama.asked(case.path)
        ollama.script.let_go = asyncio.Event()
        ours = f"http://127.0.0.1:{ollprox.port}"
        tasks = [asyncio.create_task(asyncio.to_thread(use, ours, case, stream)) for _ in range(2)]
        await joined(ollprox, 2)
        ollama.script.let_go.set()
        where = (case.path, case.feature, stream)
        assert await asyncio.gather(*tasks) == [straight, straight], where
        assert await asyncio.to_thread(use, ours, case, stream) == straight, where
        asked = ollama.asked(case.path)
        assert len(asked) == 2, where
        assert {**asked[1].json(), "stream": None} == {**theirs.json(), "stream": None}
        ollama.seen.clear()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.path}-{case.feature}")
async def test_an_answer_has_what_the_feature_is_for(ollama: StandIn, case: Case) -> None:
    """The cases show what they say: no client can be pleased with an answer that lacks it."""
    shown = {"thinking": '"thinking"', "tools": '"tool_calls"', "logprobs": '"logprobs"'}
    assert shown.get(case.feature, "done") in json.dumps(case.whole())
