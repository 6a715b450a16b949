"""How requests are answered: the program in front of the stand-in, over real sockets."""

import asyncio
import json
import socket
import time
from pathlib import Path

import pytest
from client import KEY, Client, ask, held_stream, question, request, waiting
from conftest import Program, Start
from standin import StandIn

# Calling it.


async def test_call_model_answers_with_one_object(ollprox: Program, ollama: StandIn) -> None:
    answer = await ask(ollprox.port, "POST", "/call_model", question())
    assert answer.headers["content-type"] == "application/json; charset=utf-8"
    assert answer.json()["response"] == "Paris is the capital."
    assert answer.json()["done"] is True
    assert [(s.method, s.path, s.json()["stream"]) for s in ollama.asked()] == [
        ("POST", "/api/generate", True)
    ]


async def test_the_first_line_comes_before_the_second_is_made(
    ollprox: Program, ollama: StandIn
) -> None:
    async with Client(ollprox.port) as client:
        answer = await held_stream(client, ollama, "/call_model", question(stream=True))
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert [line["response"] for line in answer.lines()] == [*ollama.script.tokens, ""]


async def test_generate_streams_by_default(ollprox: Program) -> None:
    stream = await ask(ollprox.port, "POST", "/api/generate", question())
    assert len(stream.lines()) == 6
    whole = await ask(ollprox.port, "POST", "/api/generate", question(stream=False))
    assert whole.json()["response"] == "Paris is the capital."


async def test_chunked_and_expecting_requests_are_read(ollprox: Program) -> None:
    body = json.dumps(question()).encode()
    async with Client(ollprox.port) as client:
        head = request("POST", "/call_model", b"", {"Transfer-Encoding": "chunked"})
        await client.send(head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
        assert (await client.rest(await client.head())).json()["done"] is True
        headers = {"Expect": "100-continue", "Content-Length": str(len(body))}
        await client.send(request("POST", "/call_model", b"", headers))
        assert (await client.head()).status == 100
        await client.send(body)
        assert (await client.rest(await client.head())).json()["done"] is True


async def test_pipelined_requests_are_answered_in_order(ollprox: Program) -> None:
    prompts = [f"number {index}" for index in range(20)]
    async with Client(ollprox.port) as client:
        await client.send(
            b"".join(request("POST", "/call_model", question(prompt)) for prompt in prompts)
            + request("GET", "/health", headers={"APIKEY": ""})
        )
        for _ in prompts:
            assert (await client.rest(await client.head())).json()["done"] is True
        assert (await client.rest(await client.head())).json() == {"status": "ok"}


async def test_http_1_0_gets_a_body_that_ends_with_the_connection(ollprox: Program) -> None:
    async with Client(ollprox.port) as client:
        text = request("POST", "/api/generate", question()).replace(b"HTTP/1.1", b"HTTP/1.0", 1)
        await client.send(text)
        answer = await client.rest(await client.head())
    assert "transfer-encoding" not in answer.headers
    assert answer.headers["connection"] == "close"
    assert len(answer.lines()) == 6


async def test_a_head_request_has_the_length_and_no_body(ollprox: Program) -> None:
    async with Client(ollprox.port) as client:
        answer = await client.ask("HEAD", "/health")
        assert (answer.status, answer.headers["content-length"]) == (200, "15")
        assert (await client.ask("GET", "/health")).json() == {"status": "ok"}


async def test_head_says_no_length_that_upstream_does_not_say(
    ollprox: Program, ollama: StandIn
) -> None:
    async def respond(seen: object, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
        writer.close()

    ollama.script.respond = respond
    async with Client(ollprox.port) as client:
        answer = await client.begin("HEAD", "/api/tags")
        assert "content-length" not in answer.headers
        assert "transfer-encoding" not in answer.headers
        ollama.script.respond = None
        assert (await client.ask("GET", "/api/tags")).status == 200  # it goes on


@pytest.mark.parametrize("path", ["/call_model", "/api/generate", "/api/chat"])
@pytest.mark.parametrize("status", [400, 404, 500, 503])
async def test_ollamas_errors_come_through_unchanged(
    ollprox: Program, ollama: StandIn, path: str, status: int
) -> None:
    body = b'{"error":"server busy, please try again.  maximum pending requests exceeded"}'
    ollama.script.raw = (
        b"HTTP/1.1 %d Whatever\r\nContent-Type: application/json; charset=utf-8\r\n"
        b"X-Own: 1\r\nRetry-After: 3\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)
    )
    asked = question(messages=[{"role": "user", "content": "hi"}])
    for stream in (True, False):
        answer = await ask(ollprox.port, "POST", path, {**asked, "stream": stream})
        assert (answer.status, answer.body) == (status, body)
        assert answer.headers["retry-after"] == "3"
        assert b"X-Own: " not in answer.head  # only known headers pass
    assert len(ollama.asked()) == 2  # nothing of it was stored


async def test_an_unknown_model_is_ollamas_404(ollprox: Program) -> None:
    answer = await ask(ollprox.port, "POST", "/call_model", question(model="nope"))
    assert (answer.status, answer.json()) == (404, {"error": "model 'nope' not found"})


async def test_ollama_comes_up_and_the_next_request_works(launch: Start) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ollprox = await launch(OLLAMA_PORT=port)
    answer = await ask(ollprox.port, "POST", "/call_model", question())
    assert answer.status == 502
    assert f"127.0.0.1:{port}" in answer.json()["error"]
    assert "Check that Ollama runs" in answer.json()["error"]
    standin = StandIn()
    await standin.start(port=port)
    assert (await ask(ollprox.port, "POST", "/call_model", question())).status == 200
    await standin.stop()


async def test_a_connect_that_hangs_is_502_within_its_timeout(launch: Start) -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        fillers = []
        for _ in range(4):  # a backlog that is full makes the next connect wait
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
            fillers.append(filler)
        ollprox = await launch(OLLAMA_PORT=port, CONNECT_TIMEOUT=0.3)
        answer = await ask(ollprox.port, "POST", "/call_model", question())
        assert answer.status == 502
        assert "within 0.3 s" in answer.json()["error"]
        for filler in fillers:
            filler.close()


async def test_an_ollama_that_says_nothing_is_504(launch: Start, ollama: StandIn) -> None:
    ollprox = await launch(FIRST_BYTE_TIMEOUT=0.3, MODEL_REFRESH=0)
    ollama.script.hold_head = True
    answer = await ask(ollprox.port, "POST", "/call_model", question())
    assert answer.status == 504
    assert f"127.0.0.1:{ollama.port}" in answer.json()["error"]
    await ollama.until(lambda: ollama.asked()[0].gone)


async def test_an_ollama_that_stops_in_the_middle_is_504_for_a_single_object(
    launch: Start, ollama: StandIn
) -> None:
    ollprox = await launch(
        IDLE_TIMEOUT=0.3,
        FIRST_BYTE_TIMEOUT=0.5,
        MODEL_REFRESH=0,
    )
    ollama.script.hold_before = 2
    answer = await ask(ollprox.port, "POST", "/call_model", question())
    assert (answer.status, list(answer.json())) == (504, ["error"])


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("POST", "/nope", {}, {}, 404),
        ("POST", "/api/generate/", {}, {}, 404),
        ("POST", "/API/generate", {}, {}, 404),
        ("POST", "/api/%67enerate", {}, {}, 404),
        ("GET", "/call_model", None, {}, 405),
        ("PUT", "/call_model", {}, {}, 405),
        ("POST", "/health", {}, {}, 405),
        ("POST", "/call_model", b"[1]", {}, 400),
        ("POST", "/call_model", b"not json", {}, 400),
        ("POST", "/call_model", b"", {}, 400),
        ("POST", "/call_model", b'{"a": NaN}', {}, 400),
        ("POST", "/call_model", b"[" * 20_000, {}, 400),
        ("POST", "/call_model", b'{"a": %b}' % (b"9" * 5000), {}, 400),
        ("POST", "/call_model", b'{"a": "\xff"}', {}, 400),
        ("POST", "/call_model", None, {}, 411),
        ("POST", "/call_model", b"", {"Content-Length": "999999999999"}, 413),
        ("POST", "/call_model", b"", {"Expect": "a-miracle"}, 417),
    ],
)
async def test_what_is_wrong_is_said_in_json(
    ollprox: Program,
    ollama: StandIn,
    method: str,
    path: str,
    body: object,
    headers: dict[str, str],
    status: int,
) -> None:
    answer = await ask(ollprox.port, method, path, body, headers)
    assert answer.status == status
    assert list(answer.json()) == ["error"]
    assert answer.headers["content-type"].startswith("application/json")
    assert ("allow" in answer.headers) is (status == 405)
    assert ollama.asked() == []


async def test_a_chunked_body_that_grows_too_large_is_413(launch: Start) -> None:
    ollprox = await launch(MAX_BODY_BYTES="1K")
    async with Client(ollprox.port) as client:
        await client.send(request("POST", "/call_model", b"", {"Transfer-Encoding": "chunked"}))
        for _ in range(3):
            await client.send(b"200\r\n%b\r\n" % (b" " * 0x200))
        assert (await client.head()).status == 413


async def test_a_large_body_that_is_refused_does_not_lose_the_answer(launch: Start) -> None:
    """A close with bytes unread would reset the connection before the answer is read."""
    ollprox = await launch(MAX_BODY_BYTES="1K")
    async with Client(ollprox.port) as client:
        await client.send(request("POST", "/call_model", b"x" * (16 << 20)))
        answer = await client.rest(await client.head())
    assert (answer.status, answer.headers["connection"]) == (413, "close")


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"llama2","prompt":"Why?","Stream":false}',
        b'{"model":"llama2","prompt":"Why?","stream":"no"}',
    ],
)
async def test_an_odd_body_is_ollamas_to_understand(
    ollprox: Program, ollama: StandIn, body: bytes
) -> None:
    for _ in range(2):
        answer = await ask(ollprox.port, "POST", "/call_model", body)
        assert answer.cache_status == "OllProx; fwd=bypass"
        assert len(answer.lines()) == 6  # relayed as it came
    assert [seen.body for seen in ollama.asked()] == [body, body]


async def test_the_clients_text_never_goes_upstream(ollprox: Program, ollama: StandIn) -> None:
    body = b'{ "prompt" : "Why\\u003f",\n"model":"llama2", "n": 1.50 }'
    await ask(ollprox.port, "POST", "/call_model", body)
    assert ollama.asked()[0].body == b'{"prompt":"Why?","model":"llama2","n":1.5,"stream":true}'


async def test_nothing_of_the_clients_head_goes_upstream(ollprox: Program, ollama: StandIn) -> None:
    headers = {"Cookie": "a=b", "X-Forwarded-For": "10.0.0.1", "Origin": "http://a", "X-Y": KEY}
    await ask(ollprox.port, "POST", "/call_model?key=secret", question(), headers)
    seen = ollama.asked()[0]
    assert (seen.path, seen.header("host")) == ("/api/generate", f"127.0.0.1:{ollama.port}")
    assert KEY.encode() not in seen.raw
    for name in ("apikey", "cookie", "x-forwarded-for", "origin", "x-y"):
        assert seen.header(name) is None


# What is remembered.


@pytest.mark.parametrize("stream", [True, False])
async def test_a_hit_is_byte_for_byte_what_the_miss_gave(
    ollprox: Program, ollama: StandIn, stream: bool
) -> None:
    miss = await ask(ollprox.port, "POST", "/call_model", question(stream=stream))
    hit = await ask(ollprox.port, "POST", "/call_model", question(stream=stream))
    assert miss.body == hit.body
    assert miss.headers["content-type"] == hit.headers["content-type"]
    assert miss.headers["date"] == hit.headers["date"]
    assert "age" not in miss.headers
    assert hit.headers["age"] in {"0", "1"}
    assert miss.cache_status == "OllProx; fwd=miss" + ("" if stream else "; stored")
    assert hit.cache_status.startswith("OllProx; hit; ttl=3")
    assert len(ollama.asked()) == 1


async def test_streams_objects_and_both_paths_share_one_answer(
    ollprox: Program, ollama: StandIn
) -> None:
    whole = await ask(ollprox.port, "POST", "/call_model", question())
    stream = await ask(ollprox.port, "POST", "/api/generate", question(keep_alive=5))
    again = await ask(ollprox.port, "POST", "/api/generate", question(stream=False))
    assert whole.body == again.body
    assert len(stream.lines()) == 6
    assert len(ollama.asked()) == 1


async def test_an_answer_expires(launch: Start, ollama: StandIn) -> None:
    ollprox = await launch(CACHE_TTL=0.2)
    await ask(ollprox.port, "POST", "/call_model", question())
    seen = set()
    while len(ollama.asked()) == 1:
        seen.add((await ask(ollprox.port, "POST", "/call_model", question())).cache_status)
    assert "OllProx; fwd=stale; stored" in seen


async def test_a_ttl_of_zero_stores_nothing(launch: Start, ollama: StandIn) -> None:
    ollprox = await launch(CACHE_TTL=0)
    for _ in range(2):
        answer = await ask(ollprox.port, "POST", "/call_model", question())
        assert answer.cache_status == "OllProx; fwd=miss"
    assert len(ollama.asked()) == 2


async def test_an_answer_too_large_is_delivered_and_not_stored(
    launch: Start, ollama: StandIn
) -> None:
    ollama.script.tokens = ["x" * 400] * 5
    ollprox = await launch(CACHE_MAX_ENTRY_BYTES=1500)
    for _ in range(2):
        answer = await ask(ollprox.port, "POST", "/call_model", question())
        assert answer.json()["response"] == "x" * 2000
    assert len(ollama.asked()) == 2


async def test_a_fold_too_large_is_502_with_advice(launch: Start, ollama: StandIn) -> None:
    ollama.script.tokens = ["x" * 400] * 5
    ollama.script.hold_before = 4  # the client is not kept waiting for the end
    ollprox = await launch(MAX_OBJECT_BYTES=1000)
    answer = await ask(ollprox.port, "POST", "/call_model", question())
    assert answer.status == 502
    assert '"stream": true' in answer.json()["error"]
    await ollama.until(lambda: ollama.asked()[0].gone)


async def test_a_stored_stream_too_large_for_one_object_stays_for_those_who_take_a_stream(
    launch: Start, ollama: StandIn
) -> None:
    ollama.script.tokens = ["x" * 400] * 5
    ollprox = await launch(MAX_OBJECT_BYTES=1000)
    stream = await ask(ollprox.port, "POST", "/api/generate", question())
    answer = await ask(ollprox.port, "POST", "/call_model", question())
    assert answer.status == 502
    assert '"stream": true' in answer.json()["error"]
    again = await ask(ollprox.port, "POST", "/api/generate", question())
    assert ("hit" in again.cache_status, again.body) == (True, stream.body)
    assert len(ollama.asked()) == 1


async def test_the_least_recently_used_answer_makes_room(launch: Start) -> None:
    ollprox = await launch(CACHE_MAX_BYTES="8K")
    for number in range(8):
        await ask(ollprox.port, "POST", "/call_model", question(str(number)))
    last = await ask(ollprox.port, "POST", "/call_model", question("7"))
    assert "hit" in last.cache_status
    first = await ask(ollprox.port, "POST", "/call_model", question("0"))
    assert "fwd=miss" in first.cache_status


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/call_model", {"model": "llama2"}),
        ("/api/generate", {"model": "llama2", "prompt": ""}),
        ("/api/generate", {"model": "llama2", "keep_alive": 0}),
        ("/api/chat", {"model": "llama2", "messages": []}),
    ],
)
async def test_loading_a_model_is_never_cached(
    ollprox: Program, ollama: StandIn, path: str, body: object
) -> None:
    for _ in range(2):
        answer = await ask(ollprox.port, "POST", path, body)
        assert answer.json()["done_reason"] in {"load", "unload"}
        assert answer.cache_status == "OllProx; fwd=bypass"
    assert len(ollama.asked()) == 2


@pytest.mark.parametrize("path", ["/api/chat", "/api/embed", "/api/embeddings"])
async def test_chats_and_embeddings_are_cached_too(
    ollprox: Program, ollama: StandIn, path: str
) -> None:
    ollama.script.thinking = ["Hm"]
    ollama.script.tool_calls = [{"function": {"name": "f", "arguments": {}}}]
    body = question(messages=[{"role": "user", "content": "hi"}], input=["a", "b"], stream=False)
    miss = await ask(ollprox.port, "POST", path, body)
    hit = await ask(ollprox.port, "POST", path, body)
    assert (miss.status, miss.body) == (200, hit.body)
    assert "hit" in hit.cache_status
    assert len(ollama.asked()) == 1
    if path == "/api/chat":
        message = miss.json()["message"]
        assert message["content"] == "Paris is the capital."
        assert message["thinking"] == "Hm"
        assert message["tool_calls"] == ollama.script.tool_calls
        stream = await ask(ollprox.port, "POST", path, {**body, "stream": True})
        assert len(stream.lines()) == 8


async def test_a_replayed_trace_and_its_fold(launch: Start) -> None:
    """Recorded bytes of a real Ollama, through OllProx."""
    traces = Path(__file__).parent / "traces"
    standin = StandIn(traces=traces)
    await standin.start()
    ollprox = await launch(OLLAMA_PORT=standin.port, MODEL_REFRESH=0)
    asked = (traces / "chat-stream.request").read_bytes().partition(b"\r\n\r\n")[2]
    stream = {**json.loads(asked), "stream": True}
    standin._traces |= {
        (method, path, json.dumps(stream, sort_keys=True)): trace
        for (method, path, body), trace in standin._traces.items()
        if path == "/api/chat" and json.loads(body) == json.loads(asked)
    }
    answer = await ask(ollprox.port, "POST", "/api/chat", asked)
    response = (traces / "chat-stream.response").read_bytes()
    for line in answer.body.splitlines():
        assert line in response
    assert len(answer.lines()) == 12
    folded = await ask(ollprox.port, "POST", "/api/chat", {**stream, "stream": False})
    assert folded.json()["message"]["content"] == "Say hi. mendatanguser\nSay hi. mendatanguser"
    assert "hit" in folded.cache_status
    await standin.stop()


# Health.


async def test_health_and_readiness_need_no_key(launch: Start, ollama: StandIn) -> None:
    ollprox = await launch(MODEL_REFRESH=0)
    async with Client(ollprox.port) as client:
        ready = await client.ask("GET", "/ready", headers={"APIKEY": ""})
        assert (ready.status, ready.json()) == (200, {"status": "ready"})
        for _ in range(20):
            await client.ask("GET", "/ready", headers={"APIKEY": ""})
        assert len(ollama.seen) <= 4  # the probe at the start, and one a second
        await ollama.stop()
        await asyncio.sleep(1.1)  # an answer is believed for a second
        answer = await client.ask("GET", "/ready", headers={"APIKEY": ""})
        assert (answer.status, list(answer.json())) == (503, ["error"])
        assert (await client.ask("GET", "/health", headers={"APIKEY": ""})).status == 200


async def test_a_request_that_waits_is_noticed_to_leave_with_upstream_silent(
    ollprox: Program, ollama: StandIn
) -> None:
    async with waiting(ollprox.port, ollama, question()):
        left = time.monotonic()
    await ollama.until(lambda: ollama.asked()[0].gone)
    assert time.monotonic() - left < 5
    await ollprox.says(r"status=499 cache=miss")
