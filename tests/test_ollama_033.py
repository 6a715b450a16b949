"""What Ollama 0.33 has beyond 0.13: its routes, by who may use them, and the other APIs' answers.

The answers are recorded ones, from `traces-0.33`.
"""

import asyncio
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from client import KEY, Answer, Client, ask, question, request
from conftest import Program, Start
from standin import Seen, StandIn

TRACES = Path(__file__).parent / "traces-0.33"
ADMIN, LLAMA = "an-admin-key-for-tests", "a-key-for-one-model"
BOSS, ONE = {"APIKEY": ADMIN}, {"APIKEY": LLAMA}


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys.txt"
    path.write_text(f"{KEY}  # tester\n{ADMIN} admin  # boss\n{LLAMA} models=llama2  # one\n")
    return path


def asked(name: str) -> tuple[str, str, bytes]:
    """A recorded request: method, path, body."""
    head, _, body = (TRACES / f"{name}.request").read_bytes().partition(b"\r\n\r\n")
    method, path, _ = head.split(b"\r\n")[0].decode().split(" ")
    return method, path, body


def recorded(name: str) -> tuple[int, bytes, list[bytes]]:
    """A recorded response: status, body, and the parts that the body came in."""
    head, _, rest = (TRACES / f"{name}.response").read_bytes().partition(b"\r\n\r\n")
    parts = [rest]
    if b"Transfer-Encoding: chunked" in head:
        parts = []
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            if part := rest[: int(size, 16)]:
                parts.append(part)
            rest = rest[int(size, 16) + 2 :]
    return int(head.split(b" ")[1]), b"".join(parts), parts


# Who may use the routes.


@pytest.mark.parametrize("name", ["me", "signout", "web-search"])
async def test_the_account_of_the_ollama_server_is_for_admins(
    launch: Start, ollama: StandIn, keys: Path, name: str
) -> None:
    ollprox = await launch(API_KEY_FILE=keys, MODEL_REFRESH=0)
    method, path, body = asked(name)
    for headers in ({}, ONE):
        assert (await ask(ollprox.port, method, path, body, headers)).status == 403
    assert ollama.asked() == []
    ollama.script.raw = (TRACES / f"{name}.response").read_bytes()
    answer = await ask(ollprox.port, method, path, body, BOSS)
    status, said, _ = recorded(name)
    assert (answer.status, answer.body) == (status, said)
    (seen,) = ollama.asked()
    assert (seen.method, seen.path, seen.body) == (method, path, body)
    assert ADMIN.encode() not in seen.raw


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/api/experimental/web_fetch"), ("DELETE", "/api/user/keys/c3NoLWVkMjU1MTk_-w==")],
)
async def test_so_are_pages_of_the_web_and_its_keys(
    launch: Start, ollama: StandIn, keys: Path, method: str, path: str
) -> None:
    ollprox = await launch(API_KEY_FILE=keys)
    for headers in ({}, ONE):
        assert (await ask(ollprox.port, method, path, b"{}", headers)).status == 403
    assert ollama.asked() == []
    assert (await ask(ollprox.port, method, path, b"{}", BOSS)).status == 404  # the stand-in's
    (seen,) = ollama.asked()
    assert (seen.method, seen.path, seen.body) == (method, path, b"{}")


@pytest.mark.parametrize("name", ["status", "model-recommendations", "anthropic-count-tokens"])
async def test_what_any_key_may_ask(launch: Start, ollama: StandIn, keys: Path, name: str) -> None:
    ollprox = await launch(API_KEY_FILE=keys, MODEL_REFRESH=0)
    method, path, body = asked(name)
    ollama.script.raw = (TRACES / f"{name}.response").read_bytes()
    status, said, _ = recorded(name)
    for headers in ({}, BOSS):
        answer = await ask(ollprox.port, method, path, body or None, headers)
        assert (answer.status, answer.body) == (status, said)
        assert answer.cache_status == "OllProx; fwd=bypass"
    none = {"APIKEY": ""}
    assert (await ask(ollprox.port, method, path, body or None, none)).status == 401


async def test_a_restricted_key_counts_tokens_for_its_models(
    launch: Start, ollama: StandIn, keys: Path
) -> None:
    ollprox = await launch(API_KEY_FILE=keys)
    for model, status in (("llama2", 200), ("gemma3:270m", 403)):
        body = {"model": model, "messages": []}
        answer = await ask(ollprox.port, "POST", "/v1/messages/count_tokens", body, ONE)
        assert answer.status == status


# Media: the body is streamed through unread.

MEDIA = ["/v1/images/generations", "/v1/images/edits", "/v1/audio/transcriptions"]
FORM = {"Content-Type": "multipart/form-data; boundary=x"}


@pytest.mark.parametrize("path", MEDIA)
async def test_media_are_for_keys_without_a_list_of_models(
    launch: Start, ollama: StandIn, keys: Path, path: str
) -> None:
    ollprox = await launch(API_KEY_FILE=keys)
    body = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nllama2\r\n--x--\r\n'
    answer = await ask(ollprox.port, "POST", path, body, {**FORM, **ONE})
    assert (answer.status, answer.json()["error"]["type"]) == (403, "permission_error")
    assert ollama.asked() == []

    async def respond(seen: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    ollama.script.respond = respond
    answer = await ask(ollprox.port, "POST", path, body, FORM)
    assert (answer.status, answer.cache_status) == (200, "OllProx; fwd=bypass")
    seen = ollama.asked(path)[0]
    assert (seen.body, seen.header("content-type")) == (body, FORM["Content-Type"])


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_multipart_upload_passes_while_it_comes_in(
    launch: Start, ollama: StandIn, chunked: bool
) -> None:
    """Ollama has its first bytes before the client has sent the last; nothing is kept."""
    got, arrived = hashlib.sha256(), asyncio.Event()
    sizes: list[int] = []

    async def swallow(reader: asyncio.StreamReader, size: int | None) -> None:
        while size is None or sum(sizes) < size:
            data = await reader.read(1 << 16)
            if size is None:  # what is left of the chunks' framing does not matter here
                arrived.set()
                sizes.append(len(data))
                if data.endswith(b"0\r\n\r\n"):
                    return
                continue
            got.update(data)
            sizes.append(len(data))
            arrived.set()

    ollama.script.swallow = swallow
    ollama.script.raw = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
    ollprox = await launch(measured=True, MAX_BODY_BYTES="64M", MODEL_REFRESH=0)
    piece, count = bytes(range(256)) * 256, 640  # 40 MiB
    framing = (
        {"Transfer-Encoding": "chunked"} if chunked else {"Content-Length": str(len(piece) * count)}
    )
    framed = b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece
    async with Client(ollprox.port) as client:
        await client.ask("GET", "/health")
        before = ollprox.resident("VmHWM")
        await client.send(request("POST", MEDIA[2], b"", {**FORM, **framing}))
        await client.send(framed)
        await arrived.wait()
        for _ in range(count - 1):
            await client.send(framed)
        await client.send(b"0\r\n\r\n" if chunked else b"")
        assert (await client.rest(await client.head())).status == 200
        assert ollprox.resident("VmHWM") - before < 8 << 20
    assert sum(sizes) >= len(piece) * count
    if not chunked:
        assert got.digest() == hashlib.sha256(piece * count).digest()


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("chunked", [False, True])
async def test_media_are_bounded_by_max_body_bytes(
    launch: Start, ollama: StandIn, chunked: bool, more: int
) -> None:
    ollprox = await launch(MAX_BODY_BYTES="1000")

    async def respond(seen: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    ollama.script.respond = respond
    body, headers = b"x" * (1000 + more), FORM
    if chunked:
        half = body[:600], body[600:]
        body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in half) + b"0\r\n\r\n"
        headers = {**FORM, "Transfer-Encoding": "chunked"}
    answer = await ask(ollprox.port, "POST", MEDIA[1], body, headers)
    assert answer.status == (413 if more else 200)
    if more:
        assert "MAX_BODY_BYTES" in answer.json()["error"]["message"]
        await asyncio.sleep(0)
        whole = [seen for seen in ollama.asked(MEDIA[1]) if not seen.gone]
        assert whole == []  # Ollama was not asked, or the request to it was broken off


@pytest.mark.parametrize("path", MEDIA)
async def test_media_take_turns_with_generations(launch: Start, ollama: StandIn, path: str) -> None:
    ollprox = await launch(MAX_GENERATIONS=1)
    ollama.script.hold_head = True
    async with Client(ollprox.port) as one, Client(ollprox.port) as two:
        await one.send(request("POST", "/call_model", question()))
        await ollama.until(lambda: len(ollama.asked()) == 1)
        await two.send(request("POST", path, b'{"model":"llama2"}'))
        while not re.search(rb"ollprox_queue_depth(\{[^}]*\})? 1", await metrics(ollprox)):
            await asyncio.sleep(0.02)
        assert ollama.asked(path) == []
        ollama.script.let_go.set()
        await one.rest(await one.head())
        answer = await two.rest(await two.head())
    assert "queue;dur=" in answer.headers["server-timing"]
    assert len(ollama.asked(path)) == 1


async def metrics(ollprox: Program) -> bytes:
    return (await ask(ollprox.port, "GET", "/metrics")).body


# The answers of /v1/responses and /v1/messages.

STREAMS = [
    "openai-responses-stream",
    "anthropic-messages-stream",
    "thinking-anthropic-messages-stream",
    "thinking-openai-chat-stream",
    "tools-openai-chat-stream",
]
WHOLE = [name.replace("stream", "nonstream") for name in STREAMS]
UNFINISHED = [
    "openai-responses-repeat-guard-stream",
    "anthropic-messages-repeat-guard-stream",
    "runner-killed-openai-responses-stream",
    "runner-killed-anthropic-messages-stream",
]


def play(ollama: StandIn, name: str, *, hold_after: int = -1) -> None:
    """Answer as recorded; after so many parts, wait for `let_go`."""
    status, body, parts = recorded(name)
    stream = len(parts) > 1
    kind = "text/event-stream" if stream else "application/json"

    async def respond(seen: Seen, writer: asyncio.StreamWriter) -> None:
        framing = "Transfer-Encoding: chunked" if stream else f"Content-Length: {len(body)}"
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\n{framing}\r\n\r\n".encode())
        for index, part in enumerate(parts):
            if index == hold_after:
                await writer.drain()
                await ollama.script.let_go.wait()
            writer.write(b"%x\r\n%b\r\n" % (len(part), part) if stream else part)
        writer.write(b"0\r\n\r\n" if stream else b"")

    ollama.script.respond = respond


@pytest.mark.parametrize("name", [*STREAMS, *WHOLE])
async def test_a_hit_is_the_recorded_answer_byte_for_byte(
    launch: Start, ollama: StandIn, name: str
) -> None:
    ollprox = await launch(MODEL_REFRESH=0)
    play(ollama, name)
    method, path, body = asked(name)
    miss, hit = [await ask(ollprox.port, method, path, body) for _ in range(2)]
    assert miss.body == hit.body == recorded(name)[1]
    assert miss.headers["content-type"] == hit.headers["content-type"]
    assert ("fwd=miss" in miss.cache_status, "hit" in hit.cache_status) == (True, True)
    (seen,) = ollama.asked(path)
    assert seen.json() == json.loads(body)


@pytest.mark.parametrize("name", STREAMS)
async def test_a_stream_is_shared_live(launch: Start, ollama: StandIn, name: str) -> None:
    ollprox = await launch(MODEL_REFRESH=0)
    _, whole, parts = recorded(name)
    play(ollama, name, hold_after=2)
    method, path, body = asked(name)
    start = b"".join(parts[:2])

    async def first_parts(client: Client) -> Answer:
        answer = await client.begin(method, path, body)
        async for _ in client.chunks(answer):
            if answer.body == start:
                return answer
        raise AssertionError("it ended")

    async with Client(ollprox.port) as one, Client(ollprox.port) as two:
        answers = [await first_parts(one), await first_parts(two)]  # while Ollama is held
        assert "collapsed" in answers[1].cache_status
        ollama.script.let_go.set()
        await asyncio.gather(one.rest(answers[0]), two.rest(answers[1]))
    assert [(answer.complete, answer.body) for answer in answers] == [(True, whole)] * 2
    assert len(ollama.asked(path)) == 1


@pytest.mark.parametrize("name", WHOLE)
async def test_a_single_object_is_shared(launch: Start, ollama: StandIn, name: str) -> None:
    ollprox = await launch(MODEL_REFRESH=0)
    play(ollama, name, hold_after=0)
    method, path, body = asked(name)
    async with Client(ollprox.port) as one, Client(ollprox.port) as two:
        await one.send(request(method, path, body))
        await ollama.until(lambda: len(ollama.asked(path)) == 1)
        await two.send(request(method, path, body))
        while not re.search(rb"ollprox_readers(\{[^}]*\})? 2", await metrics(ollprox)):
            await asyncio.sleep(0.02)
        ollama.script.let_go.set()
        answers = [await client.rest(await client.head()) for client in (one, two)]
    assert [answer.body for answer in answers] == [recorded(name)[1]] * 2
    assert "collapsed" in answers[1].cache_status


@pytest.mark.parametrize("name", UNFINISHED)
async def test_what_ends_without_its_last_event_is_passed_on_and_not_stored(
    launch: Start, ollama: StandIn, name: str
) -> None:
    """A killed runner and the repeat guard look the same on these routes."""
    ollprox = await launch(MODEL_REFRESH=0)
    play(ollama, name)
    method, path, body = asked(name)
    for _ in range(2):
        answer = await ask(ollprox.port, method, path, body)
        assert (answer.status, answer.body) == (200, recorded(name)[1])
        assert answer.cache_status == "OllProx; fwd=miss"
    assert len(ollama.asked(path)) == 2


@pytest.mark.parametrize(
    "name",
    ["openai-responses-repeat-guard-nonstream", "anthropic-messages-repeat-guard-nonstream"],
)
@pytest.mark.parametrize("size", [0, 100_000])
async def test_the_repeat_guards_object_is_not_stored_whatever_its_size(
    launch: Start, ollama: StandIn, name: str, size: int
) -> None:
    ollprox = await launch(MODEL_REFRESH=0)
    value = recorded(name)[1].replace(b" na na", b" na na" + b"x" * size)
    if size:  # what the client chose comes after the usage
        value = value.replace(b'"metadata":{}', b'"metadata":{"k":"%b"}' % (b"v" * 4000))
    ollama.script.raw = (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
        % (len(value), value)
    )
    method, path, body = asked(name)
    for _ in range(2):
        answer = await ask(ollprox.port, method, path, body)
        assert (answer.body, answer.cache_status) == (value, "OllProx; fwd=miss")


@pytest.mark.parametrize("name", ["openai-responses-unknown-model", "anthropic-unknown-model"])
async def test_an_error_is_passed_on_and_not_stored(
    launch: Start, ollama: StandIn, name: str
) -> None:
    ollprox = await launch(MODEL_REFRESH=0)
    play(ollama, name)
    method, path, body = asked(name)
    for _ in range(2):
        answer = await ask(ollprox.port, method, path, body)
        assert (answer.status, answer.body) == recorded(name)[:2]
        assert answer.cache_status == "OllProx; fwd=miss"


RESPONSE: dict[str, Any] = {"model": "gemma", "input": "hi"}


@pytest.mark.parametrize(
    ("more", "cached"),
    [
        ({}, True),
        ({"store": False}, True),
        ({"store": None, "previous_response_id": None}, True),
        ({"store": True}, False),
        ({"previous_response_id": "resp_1"}, False),
        ({"previous_response_id": "resp_1", "store": False}, False),
        ({"previous_response_id": ""}, False),
    ],
)
async def test_only_what_keeps_state_is_not_cached(
    launch: Start, ollama: StandIn, more: dict[str, object], cached: bool
) -> None:
    ollprox = await launch(MODEL_REFRESH=0)
    play(ollama, "openai-responses-nonstream")
    body = {**RESPONSE, **more}
    answers = [await ask(ollprox.port, "POST", "/v1/responses", body) for _ in range(2)]
    assert ("hit" in answers[1].cache_status) is cached
    assert len(ollama.asked("/v1/responses")) == (1 if cached else 2)
    if not cached:
        assert answers[0].cache_status == "OllProx; fwd=bypass"


@pytest.mark.parametrize(
    ("path", "body", "headers"),
    [
        ("/v1/responses", {**RESPONSE, "store": True, "stream": True}, {}),
        ("/api/generate", {"model": "gemma", "prompt": "hi"}, {"Cache-Control": "no-store"}),
        ("/v1/audio/transcriptions", {"model": "gemma"}, {}),
        ("/api/ps", None, {}),
    ],
)
async def test_what_nobody_can_join_ends_when_its_only_client_leaves(
    launch: Start, ollama: StandIn, path: str, body: object, headers: dict[str, str]
) -> None:
    async def respond(seen: Seen, writer: asyncio.StreamWriter) -> None:
        await ollama.script.let_go.wait()

    ollama.script.respond = respond
    ollprox = await launch(MODEL_REFRESH=0)
    await ollama.until(lambda: bool(ollama.seen))  # the version
    async with Client(ollprox.port) as client:
        await client.send(request("GET" if body is None else "POST", path, body, headers))
        await ollama.until(lambda: bool(ollama.asked(path)))
    await ollama.until(lambda: ollama.asked(path)[0].gone)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
async def test_store_means_nothing_elsewhere(launch: Start, ollama: StandIn, path: str) -> None:
    ollprox = await launch()
    body = {"model": "llama2", "messages": [{"role": "user", "content": "hi"}], "store": True}
    answers = [await ask(ollprox.port, "POST", path, body) for _ in range(2)]
    assert "hit" in answers[1].cache_status
