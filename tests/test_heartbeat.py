"""HEARTBEAT: comments in the silences of event streams, on the wire of one client."""

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest
from client import KEY, Answer, Client, ask, request
from conftest import Program, Start
from standin import Seen, StandIn

BEAT = b": \n\n"
CHAT = {"model": "llama2", "messages": [{"role": "user", "content": "hi"}], "stream": True}
RESPONSES = {"model": "llama2", "input": "hi", "stream": True}
STREAMS: list[Any] = [
    ("/v1/chat/completions", CHAT),
    ("/v1/completions", {"model": "llama2", "prompt": "hi", "stream": True}),
    ("/v1/responses", RESPONSES),
    ("/v1/messages", {**CHAT, "max_tokens": 9}),
]


async def beats(client: Client, answer: Answer, count: int) -> None:
    """Read chunks until so many comments have come in a row."""
    found = 0
    async for chunk in client.chunks(answer):
        found = found + 1 if chunk == BEAT else 0
        if found == count:
            return


def events(body: bytes) -> list[bytes]:
    """The events of a body; each is whole, and comments stand between them only."""
    assert body.endswith(b"\n\n")
    found = [event for event in body[:-2].split(b"\n\n") if event != b": "]
    assert all(event.startswith((b"data: ", b"event: ")) for event in found)
    return found


@pytest.mark.parametrize(("path", "body"), STREAMS)
async def test_comments_come_before_the_first_event_and_between_events(
    launch: Start, ollama: StandIn, path: str, body: dict[str, object]
) -> None:
    """What is stored, and what another client gets, has none."""
    ollprox = await launch(HEARTBEAT="0.05")
    plain = (await ask(ollama.port, "POST", path, body)).body
    ollama.script.hold_head, ollama.script.hold_before = True, 2
    async with Client(ollprox.port) as client:
        answer = await client.begin("POST", path, body)
        assert (answer.status, answer.headers["content-type"]) == (200, "text/event-stream")
        assert "fwd=miss" in answer.cache_status
        await beats(client, answer, 2)
        assert answer.body == BEAT * 2
        ollama.script.let_go.set()  # the head and two events come, and then silence
        ollama.script.let_go = asyncio.Event()
        await beats(client, answer, 2)
        assert len(events(answer.body)) == 2
        ollama.script.let_go.set()
        await client.rest(answer)
    assert answer.complete
    assert events(answer.body) == events(plain)
    hit = await ask(ollprox.port, "POST", path, body)
    assert "hit" in hit.cache_status
    assert hit.body == plain


async def test_a_reader_that_joins_has_its_own_comments(launch: Start, ollama: StandIn) -> None:
    ollprox = await launch(HEARTBEAT="0.05")
    ollama.script.hold_head = True
    async with Client(ollprox.port) as one, Client(ollprox.port) as two:
        first = await one.begin("POST", STREAMS[0][0], CHAT)
        await beats(one, first, 2)
        second = await two.begin("POST", STREAMS[0][0], CHAT)
        assert "collapsed" in second.cache_status
        await beats(two, second, 1)
        ollama.script.let_go.set()
        await asyncio.gather(one.rest(first), two.rest(second))
    assert events(first.body) == events(second.body)
    assert len(ollama.asked()) == 1


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/chat", CHAT),
        ("/api/generate", {"model": "llama2", "prompt": "hi"}),
        ("/v1/chat/completions", {**CHAT, "stream": False}),
        ("/v1/chat/completions", {**CHAT, "Stream": False}),  # Ollama may read it either way
        ("/v1/embeddings", {"model": "llama2", "input": "a", "stream": True}),
    ],
)
async def test_what_is_no_event_stream_gets_none(
    launch: Start, ollama: StandIn, path: str, body: dict[str, object]
) -> None:
    ollprox = await launch(HEARTBEAT="0.02")
    ollama.script.hold_head = True
    async with Client(ollprox.port) as client:
        await client.send(request("POST", path, body))
        await ollama.until(lambda: len(ollama.asked()) == 1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await client.reader.readexactly(1)
        ollama.script.let_go.set()
        answer = await client.rest(await client.head())
    assert answer.status == 200
    assert b": \n" not in answer.body


async def test_off_by_default(ollprox: Program, ollama: StandIn) -> None:
    ollama.script.hold_before = 1
    async with Client(ollprox.port) as client:
        answer = await client.begin("POST", STREAMS[0][0], CHAT)
        await anext(client.chunks(answer))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await client.reader.readexactly(1)
        ollama.script.let_go.set()


@pytest.mark.parametrize(("path", "body"), STREAMS)
async def test_an_error_after_a_comment_is_an_event(
    launch: Start, ollama: StandIn, path: str, body: dict[str, object]
) -> None:
    ollprox = await launch(HEARTBEAT="0.05")
    straight = await ask(ollama.port, "POST", path, {**body, "model": "nope"})
    assert straight.status == 404
    ollama.script.hold_head = True
    async with Client(ollprox.port) as client:
        answer = await client.begin("POST", path, {**body, "model": "nope"})
        await beats(client, answer, 1)
        ollama.script.let_go.set()
        await client.rest(answer)
    assert (answer.status, answer.complete) == (200, True)
    (error,) = events(answer.body)
    name, _, data = error.rpartition(b"data: ")
    assert name == (b"event: error\n" if path == "/v1/messages" else b"")
    assert data == straight.body
    again = await ask(ollprox.port, "POST", path, {**body, "model": "nope"})
    assert (again.status, again.cache_status) == (404, "OllProx; fwd=miss")


async def test_an_upstream_that_leaves_before_its_head_is_an_error_event(
    launch: Start, ollama: StandIn
) -> None:
    async def respond(seen: Seen, writer: asyncio.StreamWriter) -> None:
        await ollama.script.let_go.wait()
        writer.transport.abort()

    ollama.script.respond = respond
    ollprox = await launch(HEARTBEAT="0.05", MODEL_REFRESH=0)
    async with Client(ollprox.port) as client:
        answer = await client.begin("POST", "/v1/messages", STREAMS[3][1])
        await beats(client, answer, 1)
        ollama.script.let_go.set()
        await client.rest(answer)
    (error,) = events(answer.body)
    value = json.loads(error.removeprefix(b"event: error\ndata: "))
    assert (value["type"], value["error"]["type"]) == ("error", "api_error")


@pytest.mark.parametrize(
    ("status", "kind", "body"),
    [(502, "text/html", b"<h1>no</h1>\n\n<p>"), (200, "application/json", b'{"x":1}')],
)
async def test_what_is_no_event_is_not_sent_as_one(
    launch: Start, ollama: StandIn, status: int, kind: str, body: bytes
) -> None:
    async def respond(seen: Seen, writer: asyncio.StreamWriter) -> None:
        await ollama.script.let_go.wait()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)

    ollama.script.respond = respond
    ollprox = await launch(HEARTBEAT="0.05", MODEL_REFRESH=0)
    async with Client(ollprox.port) as client:
        answer = await client.begin("POST", "/v1/chat/completions", CHAT)
        await beats(client, answer, 1)
        ollama.script.let_go.set()
        await client.rest(answer)
    (error,) = events(answer.body)
    assert "not a stream" in json.loads(error[6:])["error"]["message"]


async def test_no_comment_stands_inside_an_event(launch: Start, ollama: StandIn) -> None:
    """An event that comes in parts is passed on whole; a silence in its middle is before it."""
    first, second = b'data: {"choices":[{"delta":{"content":"a"}', b"}]}\n\n"

    async def respond(seen: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + first)
        await writer.drain()
        await ollama.script.let_go.wait()
        writer.write(second + b"data: [DO")
        await writer.drain()
        await asyncio.sleep(0.2)
        writer.write(b"NE]\n\n")
        await writer.drain()
        writer.close()

    ollama.script.respond = respond
    ollprox = await launch(HEARTBEAT="0.05", MODEL_REFRESH=0)
    async with Client(ollprox.port) as client:
        answer = await client.begin("POST", "/v1/chat/completions", CHAT)
        await beats(client, answer, 2)
        ollama.script.let_go.set()
        await client.rest(answer)
    assert events(answer.body) == [(first + second).rstrip(), b"data: [DONE]"]
    assert answer.body.index(b"data: [DONE]") > answer.body.index(BEAT)


async def test_a_wait_for_a_turn_has_comments_and_is_logged_whole(
    launch: Start, ollama: StandIn
) -> None:
    ollprox = await launch(HEARTBEAT="0.05", MAX_GENERATIONS=1)
    ollama.script.hold_head = True
    async with Client(ollprox.port) as one, Client(ollprox.port) as two:
        await one.send(request("POST", "/api/generate", {"model": "llama2", "prompt": "a"}))
        await ollama.until(lambda: len(ollama.asked()) == 1)
        answer = await two.begin("POST", "/v1/chat/completions", CHAT)
        await beats(two, answer, 4)
        assert len(ollama.asked()) == 1
        ollama.script.hold_head = False
        ollama.script.let_go.set()
        await two.rest(answer)
    assert events(answer.body)[-1] == b"data: [DONE]"
    match = await ollprox.says(r" path=/v1/chat/completions .*queued=([\d.]+)")
    assert float(match[1]) >= 0.15  # not what it was when the first comment came


async def test_a_queue_that_times_out_after_a_comment(launch: Start, ollama: StandIn) -> None:
    ollprox = await launch(HEARTBEAT="0.05", MAX_GENERATIONS=1, QUEUE_TIMEOUT="0.4")
    ollama.script.hold_head = True
    async with Client(ollprox.port) as one, Client(ollprox.port) as two:
        await one.send(request("POST", "/api/generate", {"model": "llama2", "prompt": "a"}))
        await ollama.until(lambda: len(ollama.asked()) == 1)
        answer = await two.ask("POST", "/v1/chat/completions", CHAT)
    assert (answer.status, answer.complete) == (200, True)
    (error,) = events(answer.body)
    assert "QUEUE_TIMEOUT" in json.loads(error[6:])["error"]["message"]


async def test_the_openai_client_reads_comments(
    launch: Start, ollama: StandIn, tmp_path: Path
) -> None:
    ollprox = await launch(HEARTBEAT="0.02")
    ollama.script.pace = 0.07
    base = f"http://127.0.0.1:{ollprox.port}/v1"

    def use() -> list[str]:
        with openai.OpenAI(base_url=base, api_key=KEY, max_retries=0) as client:
            chat = client.chat.completions.create(**CHAT)  # type: ignore[call-overload]
            said = "".join(part.choices[0].delta.content or "" for part in chat)
            response = client.responses.create(**RESPONSES)  # type: ignore[call-overload]
            deltas = [e.delta for e in response if e.type == "response.output_text.delta"]
            return [said, "".join(deltas)]

    assert await asyncio.to_thread(use) == ["Paris is the capital."] * 2

    def fail() -> Exception:
        with openai.OpenAI(base_url=base, api_key=KEY, max_retries=0) as client:
            try:
                list(client.chat.completions.create(**{**CHAT, "model": "nope"}))  # type: ignore[call-overload]
            except openai.APIError as error:
                return error
        raise AssertionError

    ollama.script.hold_head = True
    task = asyncio.create_task(asyncio.to_thread(fail))
    await ollama.until(lambda: any(b"nope" in seen.body for seen in ollama.seen))
    await asyncio.sleep(0.1)  # so that a comment has come
    ollama.script.let_go.set()
    assert "model 'nope' not found" in str(await task)
