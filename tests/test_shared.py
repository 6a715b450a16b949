"""One answer, many readers: joining, leaving, falling behind, truncation, fresh answers."""

import asyncio
import contextlib
import json
import random
import time
from pathlib import Path

import pytest
from client import KEY, Answer, Client, ask, question, request
from conftest import Program, Start
from standin import RUNNER_DIED, Seen, StandIn

OTHER_KEY = "another-key-for-tests"
TRACES = Path(__file__).parent / "traces-0.33"


@pytest.fixture
def two_keys(tmp_path: Path) -> Path:
    path = tmp_path / "two-keys.txt"
    path.write_text(f"{KEY}  # tester\n{OTHER_KEY}  # other\n")
    return path


# Collapsed forwarding.


async def test_a_late_reader_gets_the_first_lines_while_the_answer_is_held(
    ollprox: Program, ollama: StandIn
) -> None:
    ollama.script.hold_before = 3
    async with Client(ollprox.port) as early, Client(ollprox.port) as late:
        first = await early.begin("POST", "/api/generate", question())
        early_chunks = early.chunks(first)
        got = b""
        while got.count(b"\n") < 3:
            got += await anext(early_chunks)
        second = await late.begin("POST", "/api/generate", question())
        late_chunks = late.chunks(second)
        assert await anext(late_chunks) == got  # all that is there, at once
        ollama.script.let_go.set()
        assert [chunk async for chunk in early_chunks]
        assert [chunk async for chunk in late_chunks]
    assert first.body == second.body
    assert (first.complete, second.complete) == (True, True)
    assert first.cache_status == "OllProx; fwd=miss"
    assert second.cache_status == "OllProx; fwd=miss; collapsed"
    assert len(ollama.asked()) == 1


async def test_any_mix_of_requests_at_once_makes_one_upstream_request(
    launch: Start, ollama: StandIn, two_keys: Path
) -> None:
    ollprox = await launch(API_KEY_FILE=two_keys)
    ollama.script.hold_head = True
    kinds = [
        ("/call_model", None, KEY),
        ("/call_model", True, OTHER_KEY),
        ("/api/generate", None, OTHER_KEY),
        ("/api/generate", False, KEY),
    ]
    tasks = []
    for number in range(40):
        path, stream, key = kinds[number % 4]
        body = question() if stream is None else question(stream=stream)
        tasks.append(asyncio.create_task(ask(ollprox.port, "POST", path, body, {"APIKEY": key})))
    await ollama.until(lambda: bool(ollama.asked()))
    await settled(ollprox, 40)
    ollama.script.let_go.set()
    answers = await asyncio.gather(*tasks)
    assert len(ollama.asked()) == 1
    assert len({answer.body for answer in answers}) == 2  # the stream, and the object
    statuses = [answer.cache_status.replace("; stored", "") for answer in answers]
    assert sorted(statuses) == ["OllProx; fwd=miss"] + ["OllProx; fwd=miss; collapsed"] * 39


async def settled(ollprox: Program, connections: int) -> None:
    """Wait until OllProx has this many connections and has read everything they sent."""

    def queued() -> list[str]:
        rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        ours = f":{ollprox.port:04X}"
        return [row[4] for row in rows if row[1].endswith(ours) and row[3] == "01"]

    while len(states := queued()) < connections or any(not s.endswith(":00000000") for s in states):
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)  # what was read is handled within the same turn of the loop


# Leaving.


async def test_the_client_that_began_leaves_and_the_rest_get_the_whole_answer(
    ollprox: Program, ollama: StandIn
) -> None:
    ollama.script.hold_before = 2
    async with Client(ollprox.port) as stays:
        async with Client(ollprox.port) as leaves:
            await leaves.begin("POST", "/api/generate", question())
            answer = await stays.begin("POST", "/api/generate", question())
        await ollprox.says("status=499|bytes=.*total")
        assert not ollama.asked()[0].gone
        ollama.script.let_go.set()
        await stays.rest(answer)
    assert answer.complete
    assert len(answer.lines()) == 6
    assert len(ollama.asked()) == 1


@pytest.mark.parametrize("where", ["before the head", "in the middle"])
@pytest.mark.parametrize("stream", [True, False])
async def test_when_the_last_reader_leaves_ollama_is_told_at_once(
    ollprox: Program, ollama: StandIn, where: str, stream: bool
) -> None:
    if where == "before the head":
        ollama.script.hold_head = True
    else:
        ollama.script.hold_before = 2
    body = question(stream=stream)
    async with Client(ollprox.port) as client:
        await client.send(request("POST", "/api/generate", body))
        await ollama.until(lambda: bool(ollama.asked()))
        if stream and where == "in the middle":
            await client.head()
        begun = time.monotonic()
    await ollama.until(lambda: ollama.asked()[0].gone)
    assert time.monotonic() - begun < 5  # 0.2 s is promised; the machine may be busy
    ollama.script.let_go.set()
    again = await ask(ollprox.port, "POST", "/api/generate", body)
    assert "fwd=miss" in again.cache_status
    assert len(ollama.asked()) == 2


async def test_leaving_after_the_last_line_keeps_the_answer(
    ollprox: Program, ollama: StandIn
) -> None:
    async def all_but_the_end(seen: object, writer: asyncio.StreamWriter) -> None:
        lines = ollama.lines({"model": "llama2"}, chat=False)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n")
        writer.write(b"Transfer-Encoding: chunked\r\n\r\n")
        for line in lines:
            data = json.dumps(line).encode() + b"\n"
            writer.write(b"%x\r\n%b\r\n" % (len(data), data))
        await ollama.script.let_go.wait()

    ollama.script.respond = all_but_the_end
    async with Client(ollprox.port) as client:
        answer = await client.begin("POST", "/api/generate", question())
        async for _ in client.chunks(answer):
            if b'"done": true' in answer.body:
                break
    await ollama.until(lambda: ollama.asked()[0].gone)
    ollama.script.respond = None
    hit = await ask(ollprox.port, "POST", "/api/generate", question())
    assert "hit" in hit.cache_status
    assert hit.body == answer.body


# Falling behind.


async def test_a_stalled_reader_is_dropped_and_the_others_go_on(
    launch: Start, ollama: StandIn
) -> None:
    ollama.script.tokens = ["x" * 20_000] * 300  # 6 MB
    ollprox = await launch(
        CACHE_MAX_ENTRY_BYTES="256K",
        WRITE_TIMEOUT=0.5,
    )
    async with Client(ollprox.port) as stalled, Client(ollprox.port) as reads:
        ollama.script.hold_before = 1
        slow = await stalled.begin("POST", "/api/generate", question())
        answer = await reads.begin("POST", "/api/generate", question())
        ollama.script.let_go.set()
        await reads.rest(answer)  # while the other reads nothing
        assert answer.complete
        assert len(answer.lines()) == 301
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await stalled.rest(slow)
        assert not slow.complete  # visibly truncated
    again = await ask(ollprox.port, "POST", "/api/generate", question())
    assert again.cache_status == "OllProx; fwd=miss"  # it had lost its beginning


async def test_much_for_a_stalled_client_costs_little_memory(
    launch: Start, ollama: StandIn
) -> None:
    ollama.script.tokens = ["x" * 100_000] * 2000  # 200 MB
    ollprox = await launch(measured=True, WRITE_TIMEOUT=2)
    await ask(ollprox.port, "POST", "/call_model", {"model": "llama2"})
    before = ollprox.resident()
    async with Client(ollprox.port) as stalled:
        await stalled.begin("POST", "/api/generate", question())
        await ollama.until(lambda: ollama.asked()[1].gone)  # dropped, so Ollama was told
        assert ollprox.resident("VmHWM") - before < 16 << 20
    await ollprox.says("path=/api/generate .*status=499")


# Breaking.


async def cut(client: Client, answer: Answer) -> None:
    """Read a stream that must not have an end."""
    with contextlib.suppress(asyncio.IncompleteReadError):
        await client.rest(answer)
    assert not answer.complete


async def test_a_stream_that_breaks_ends_in_an_error_line_and_without_an_end(
    ollprox: Program, ollama: StandIn
) -> None:
    ollama.script.hold_before, ollama.script.break_after = 2, 3
    async with Client(ollprox.port) as one, Client(ollprox.port) as two:
        first = await one.begin("POST", "/api/generate", question())
        second = await two.begin("POST", "/api/generate", question())
        single = asyncio.create_task(ask(ollprox.port, "POST", "/call_model", question()))
        await settled(ollprox, 3)
        ollama.script.let_go.set()
        await cut(one, first)
        await cut(two, second)
    assert first.body == second.body
    assert [line.get("response") for line in first.lines()] == ["Paris", " is", " the", None]
    assert f"127.0.0.1:{ollama.port}" in first.lines()[-1]["error"]
    answer = await single
    assert (answer.status, list(answer.json())) == (502, ["error"])
    assert len(ollama.asked()) == 1
    ollama.script.break_after = None
    again = await ask(ollprox.port, "POST", "/api/generate", question())
    assert again.cache_status == "OllProx; fwd=miss"


async def test_a_broken_stream_in_http_1_0_is_reset(ollprox: Program, ollama: StandIn) -> None:
    ollama.script.break_after = 3
    async with Client(ollprox.port) as client:
        text = request("POST", "/api/generate", question()).replace(b"HTTP/1.1", b"HTTP/1.0", 1)
        await client.send(text)
        with pytest.raises(ConnectionResetError):
            await client.rest(await client.head())


async def test_ollamas_own_error_is_passed_on_and_the_stream_is_cut(
    ollprox: Program, ollama: StandIn
) -> None:
    ollama.script.error_after = 2
    async with Client(ollprox.port) as client:
        answer = await client.begin("POST", "/api/generate", question())
        await cut(client, answer)
    assert answer.lines()[-1] == {"error": RUNNER_DIED}
    single = await ask(ollprox.port, "POST", "/call_model", question())
    assert (single.status, single.json()) == (500, {"error": RUNNER_DIED})
    assert len(ollama.asked()) == 2  # neither was stored


ERROR_EVENT = b'data: {"error":{"message":"died","type":"api_error"}}\n\n'


@pytest.mark.parametrize(
    ("path", "body", "kind", "lines"),
    [
        ("/v1/chat/completions", {"messages": [1]}, "text/event-stream", ERROR_EVENT),
        ("/v1/responses", {"input": "a"}, "text/event-stream", ERROR_EVENT),
        ("/api/pull", {}, "application/x-ndjson", b'{"status":"x"}\n{"error":"disk full"}\n'),
    ],
)
async def test_an_error_that_ollama_reports_cuts_every_stream_after_its_line(
    launch: Start,
    ollama: StandIn,
    key_file: Path,
    path: str,
    body: dict[str, object],
    kind: str,
    lines: bytes,
) -> None:
    settings = {"ADMIN_LABELS": "tester", "MODEL_REFRESH": 0}
    ollprox = await launch(OLLAMA_PORT=ollama.port, API_KEY_FILE=key_file, **settings)
    ollama.script.raw = says(lines, kind)
    async with Client(ollprox.port) as client:
        answer = await client.begin("POST", path, {"model": "m", "stream": True, **body})
        await cut(client, answer)
    assert answer.body == lines  # with no second error after it


def says(body: bytes, kind: str) -> bytes:
    """A response that ends in order."""
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head.encode() + (b"%x\r\n%b\r\n" % (len(body), body) if body else b"") + b"0\r\n\r\n"


async def test_an_end_in_order_without_a_last_line_is_passed_on_as_it_came(
    ollprox: Program, ollama: StandIn
) -> None:
    trace = (TRACES / "repeat-guard-generate-stream.response").read_bytes()
    whole = (TRACES / "repeat-guard-generate-nonstream.response").read_bytes()
    ollama.script.raw = trace
    for _ in range(2):
        stream = await ask(ollprox.port, "POST", "/api/generate", question())
        assert stream.complete
        assert len(stream.lines()) == trace.count(b"{")
        assert trace.count(b'"done":false') == len(stream.lines())
        assert "fwd=miss" in stream.cache_status
        assert "stored" not in stream.cache_status
        single = await ask(ollprox.port, "POST", "/call_model", question())
        theirs = json.loads(whole.partition(b"\r\n\r\n")[2])
        assert single.status == 200
        assert single.json() | {"created_at": ""} == theirs | {"created_at": ""}
        assert single.cache_status == "OllProx; fwd=miss"
    assert len(ollama.asked()) == 4
    metrics = (await ask(ollprox.port, "GET", "/metrics")).body.decode()
    assert 'ollprox_upstream_errors_total{kind="broken"} 0' in metrics


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v1/chat/completions", "repeat-guard-openai-chat"),
        ("/v1/messages", "anthropic-messages-repeat-guard"),
        ("/v1/responses", "openai-responses-repeat-guard"),
    ],
)
async def test_what_the_repeat_guard_ended_on_v1_is_passed_on_and_never_stored(
    ollprox: Program, ollama: StandIn, path: str, name: str
) -> None:
    for stream in (True, False):
        kind = "stream" if stream else "nonstream"
        ollama.script.raw = (TRACES / f"{name}-{kind}.response").read_bytes()
        body = {"model": "llama2", "messages": [1], "input": "a", "stream": stream}
        for _ in range(2):
            answer = await ask(ollprox.port, "POST", path, body)
            assert (answer.status, answer.complete) == (200, True)
            assert b" na" in answer.body
            assert b'"error":{' not in answer.body
            assert "hit" not in answer.cache_status
    assert len(ollama.asked()) == 4


async def test_readers_that_joined_an_incomplete_answer_get_the_same(
    ollprox: Program, ollama: StandIn
) -> None:
    async def respond(seen: Seen, writer: asyncio.StreamWriter) -> None:
        first, second = b'{"response":"a","done":false}\n', b'{"response":"b","done":false}\n'
        writer.write(says(first, "application/x-ndjson").removesuffix(b"0\r\n\r\n"))
        await ollama.script.let_go.wait()
        writer.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(second), second))

    ollama.script.respond = respond
    async with Client(ollprox.port) as one, Client(ollprox.port) as two:
        first = await one.begin("POST", "/api/generate", question())
        second = await two.begin("POST", "/api/generate", question())
        single = asyncio.create_task(ask(ollprox.port, "POST", "/call_model", question()))
        await settled(ollprox, 3)
        ollama.script.let_go.set()
        await one.rest(first)
        await two.rest(second)
    assert (first.complete, second.complete, second.body) == (True, True, first.body)
    assert (await single).json() == {"response": "ab", "done": False}
    assert "collapsed" in second.cache_status


async def test_a_killed_runner_on_v1_is_reported_and_cut(ollprox: Program, ollama: StandIn) -> None:
    ollama.script.raw = (TRACES / "runner-killed-openai-chat-stream.response").read_bytes()
    body = {"model": "llama2", "messages": [1], "stream": True}
    async with Client(ollprox.port) as client:
        answer = await client.begin("POST", "/v1/chat/completions", body)
        await cut(client, answer)
    last = answer.body.rstrip().rpartition(b"\n\n")[2]
    assert "runner" in json.loads(last.removeprefix(b"data: "))["error"]["message"]


async def test_an_answer_that_ends_before_its_first_line_is_no_object(
    ollprox: Program, ollama: StandIn
) -> None:
    ollama.script.raw = says(b"", "application/x-ndjson")
    stream = await ask(ollprox.port, "POST", "/api/generate", question())
    assert (stream.status, stream.complete, stream.body) == (200, True, b"")
    assert (await ask(ollprox.port, "POST", "/call_model", question())).status == 502


async def test_blank_lines_are_passed_on_and_forgiven(ollprox: Program, ollama: StandIn) -> None:
    lines = b'\n{"response":"a","done":false}\n\n \r\n{"response":"b","done":true}\n\n  '
    ollama.script.raw = says(lines, "application/x-ndjson")
    single = await ask(ollprox.port, "POST", "/call_model", question())
    assert single.json() == {"response": "ab", "done": True}
    stream = await ask(ollprox.port, "POST", "/api/generate", question())
    assert ("hit" in stream.cache_status, stream.body) == (True, lines)


@pytest.mark.parametrize(
    ("path", "body", "kind"),
    [
        ("/api/generate", b'{"response":"","done":true,"done_reason":"stop"}\n', "x-ndjson"),
        ("/call_model", b'{"response":"","done":true,"done_reason":"stop"}\n', "x-ndjson"),
        ("/api/embed", b'{"embeddings":[[]]}', "json"),
        ("/v1/embeddings", b'{"data":[{"embedding":[]}]}', "json"),
        ("/v1/completions", b'{"choices":[{"text":"","finish_reason":"stop"}]}', "json"),
    ],
)
async def test_an_answer_that_says_nothing_is_passed_on_and_not_stored(
    ollprox: Program, ollama: StandIn, path: str, body: bytes, kind: str
) -> None:
    ollama.script.raw = says(body, f"application/{kind}")
    for _ in range(2):
        answer = await ask(ollprox.port, "POST", path, question(input="a"))
        assert (answer.status, answer.complete) == (200, True)
        assert answer.json() == json.loads(body)
        assert answer.cache_status == "OllProx; fwd=miss"


# Silence.


async def test_a_single_object_may_be_long_in_coming(launch: Start, ollama: StandIn) -> None:
    """Before a tool call Ollama is silent; whoever wants one object would not see a line anyway.

    A reader of lines that joins has its own time: it is neither cut for the silence before it,
    nor lets it the others go on for ever.
    """
    ollprox = await launch(IDLE_TIMEOUT=1, MODEL_REFRESH=0)
    ollama.script.hold_before = 2
    single = asyncio.create_task(ask(ollprox.port, "POST", "/call_model", question()))
    await ollama.until(lambda: bool(ollama.asked()))
    await asyncio.sleep(2.5)
    begun = time.monotonic()
    async with Client(ollprox.port) as client:
        answer = await client.begin("POST", "/api/generate", question())
        assert "collapsed" in answer.cache_status
        await cut(client, answer)
    assert 0.9 < time.monotonic() - begun < 10
    assert "sent nothing more" in answer.lines()[-1]["error"]
    assert not single.done()
    async with Client(ollprox.port) as client:
        answer = await client.begin("POST", "/api/generate", question())
        await anext(client.chunks(answer))
        ollama.script.let_go.set()
        await client.rest(answer)
    assert answer.complete
    assert (await single).json()["response"] == "".join(ollama.script.tokens)
    assert len(ollama.asked()) == 1


async def test_an_object_without_lines_may_be_long_in_coming_too(
    launch: Start, ollama: StandIn
) -> None:
    """Its client sees nothing of it before its end, whatever has come."""
    ollprox = await launch(IDLE_TIMEOUT=0.2, MODEL_REFRESH=0)
    body = b'{"embeddings":[[0.5]]}'

    async def respond(seen: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n")
        writer.write(b"Content-Length: %d\r\n\r\n%b" % (len(body), body[:9]))
        await ollama.script.let_go.wait()
        writer.write(body[9:])

    ollama.script.respond = respond
    asking = asyncio.create_task(ask(ollprox.port, "POST", "/api/embed", question(input="a")))
    await ollama.until(lambda: bool(ollama.asked()))
    await asyncio.sleep(2.5)
    ollama.script.let_go.set()
    answer = await asking
    assert (answer.status, answer.body) == (200, body)


async def test_first_byte_timeout_holds_until_the_object_is_whole(
    launch: Start, ollama: StandIn
) -> None:
    ollprox = await launch(
        IDLE_TIMEOUT=0.1,
        FIRST_BYTE_TIMEOUT=2,
        MODEL_REFRESH=0,
    )
    ollama.script.hold_before = 2
    begun = time.monotonic()
    single = await ask(ollprox.port, "POST", "/call_model", question())
    assert (single.status, 1.9 < time.monotonic() - begun < 10) == (504, True)
    await ollama.until(lambda: ollama.asked()[0].gone)
    metrics = (await ask(ollprox.port, "GET", "/metrics")).body.decode()
    assert 'ollprox_upstream_errors_total{kind="timeout"} 1' in metrics


# Asking for a fresh answer.


async def fresh(port: int, says: str, body: object = None) -> Answer:
    return await ask(port, "POST", "/call_model", body or question(), {"Cache-Control": says})


async def test_what_is_there_is_not_taken_by_a_request_that_wants_a_fresh_answer(
    ollprox: Program, ollama: StandIn
) -> None:
    port = ollprox.port
    assert (await fresh(port, "only-if-cached")).status == 504
    assert ollama.asked() == []
    stored = await fresh(port, "max-age=60")
    assert stored.cache_status == "OllProx; fwd=miss; stored"
    assert "hit" in (await fresh(port, "max-age=60, only-if-cached")).cache_status
    for says in ("no-cache", "max-age=0", "No-Cache, foo=bar"):
        renewed = await fresh(port, says)
        assert renewed.cache_status == "OllProx; fwd=request; stored"
        assert (await fresh(port, "x")).body == renewed.body != stored.body
    private = await fresh(port, "no-store")
    assert private.cache_status == "OllProx; fwd=request"
    assert (await fresh(port, "x")).body == renewed.body
    assert len(ollama.asked()) == 5
    assert (await fresh(port, "no-store, only-if-cached")).status == 504
    pragma = await ask(port, "POST", "/call_model", question(), {"Pragma": "no-cache"})
    assert "fwd=request" in pragma.cache_status


async def test_max_age_takes_nothing_older(ollprox: Program, ollama: StandIn) -> None:
    await ask(ollprox.port, "POST", "/call_model", question())
    await asyncio.sleep(1.1)
    assert "fwd=request" in (await fresh(ollprox.port, "max-age=1")).cache_status
    assert "hit" in (await fresh(ollprox.port, "max-age=1")).cache_status


async def test_flights_that_may_be_joined_and_those_that_may_not(
    ollprox: Program, ollama: StandIn
) -> None:
    ollama.script.hold_before = 1
    body = question(stream=True)
    async with contextlib.AsyncExitStack() as stack:

        async def begin(says: str) -> tuple[Client, Answer]:
            client = await stack.enter_async_context(Client(ollprox.port))
            headers = {"Cache-Control": says} if says else {}
            return client, await client.begin("POST", "/call_model", body, headers)

        begun = [
            await begin(says)
            for says in ("no-store", "", "", "no-cache", "max-age=60", "only-if-cached", "no-store")
        ]
        assert [answer.cache_status for _, answer in begun] == [
            "OllProx; fwd=request",
            "OllProx; fwd=miss",  # the private one cannot be joined
            "OllProx; fwd=miss; collapsed",
            "OllProx; fwd=request",
            "OllProx; fwd=miss; collapsed",  # to the youngest
            "OllProx; fwd=miss; collapsed",
            "OllProx; fwd=request",
        ]
        ollama.script.let_go.set()
        bodies = [(await client.rest(answer)).body for client, answer in begun]
    assert bodies[1] == bodies[2]
    assert bodies[3] == bodies[4] == bodies[5]
    assert len(set(bodies)) == 4
    assert len(ollama.asked()) == 4
    hit = await ask(ollprox.port, "POST", "/call_model", body)
    assert hit.body == bodies[3]  # that of the flight which began last


async def test_with_a_ttl_of_zero_flights_are_still_shared(launch: Start, ollama: StandIn) -> None:
    ollprox = await launch(CACHE_TTL=0)
    ollama.script.hold_head = True
    tasks = [
        asyncio.create_task(ask(ollprox.port, "POST", "/call_model", question())) for _ in range(3)
    ]
    await settled(ollprox, 3)
    ollama.script.let_go.set()
    assert len({answer.body for answer in await asyncio.gather(*tasks)}) == 1
    assert len(ollama.asked()) == 1


# Models that change.


async def test_an_answer_does_not_outlive_its_model(launch: Start, ollama: StandIn) -> None:
    ollprox = await launch(MODEL_REFRESH=0.05)
    other = {"model": "gemma3:270m", "prompt": "Why?"}
    await ollama.until(lambda: any(seen.path == "/api/tags" for seen in ollama.seen))
    for body in (question(), other):
        await ask(ollprox.port, "POST", "/call_model", body)
    ollama.script.hold_before = 1
    async with Client(ollprox.port) as client:
        flying = await client.begin("POST", "/api/generate", question("under way"))
        ollama.script.models = {**ollama.script.models, "llama2:latest": "b" * 64}
        await ollprox.says("1 models have changed: 1 stored answers dropped")
        ollama.script.let_go.set()
        joined = await ask(ollprox.port, "POST", "/api/generate", question("under way"))
        assert joined.cache_status == "OllProx; fwd=miss"  # the flight was grounded
        await client.rest(flying)
        assert flying.complete
    assert "fwd=miss" in (await ask(ollprox.port, "POST", "/call_model", question())).cache_status
    assert "hit" in (await ask(ollprox.port, "POST", "/call_model", other)).cache_status
    ollama.script.models = {"llama2:latest": "b" * 64}
    await ollprox.says("1 models have changed: 1 stored answers dropped\n[^$]*1 models have")
    assert "hit" in (await ask(ollprox.port, "POST", "/call_model", question())).cache_status


async def test_a_list_that_is_not_well_formed_changes_nothing(
    launch: Start, ollama: StandIn
) -> None:
    ollprox = await launch(MODEL_REFRESH=0.05)
    await ollama.until(lambda: any(seen.path == "/api/tags" for seen in ollama.seen))
    await ask(ollprox.port, "POST", "/call_model", question())
    for status, body in ((200, b'{"models":null}'), (500, b'{"models":[]}'), (200, b"")):

        async def respond(
            seen: object, writer: asyncio.StreamWriter, status: int = status, body: bytes = body
        ) -> None:
            writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, len(body)))
            writer.write(body)

        ollama.script.respond = respond
        count = len(ollama.seen)
        await ollama.until(lambda count=count: len(ollama.seen) > count + 1)  # type: ignore[misc]
        hit = await ask(ollprox.port, "POST", "/call_model", question())
        assert "hit" in hit.cache_status


async def test_a_model_that_appears_may_be_another_than_was_asked(
    launch: Start, ollama: StandIn
) -> None:
    """Made again between two readings of the list, or before the first that could be read."""
    ollprox = await launch(MODEL_REFRESH=0.05)

    async def after_a_reading() -> None:
        count = len(ollama.seen)
        await ollama.until(lambda: sum(s.path == "/api/tags" for s in ollama.seen[count:]) > 1)

    await after_a_reading()
    ollama.script.listed = {}
    await after_a_reading()
    await ask(ollprox.port, "POST", "/call_model", question())
    ollama.script.listed = None
    await ollprox.says("models have changed(.|\n)*models have changed: 1 stored")
    assert "fwd=miss" in (await ask(ollprox.port, "POST", "/call_model", question())).cache_status


# What may be shared.


async def test_only_deterministic_requests_are_kept_where_that_is_set(launch: Start) -> None:
    ollprox = await launch(CACHE_ONLY_DETERMINISTIC="true")
    for options, outcome in (({}, "bypass"), ({"temperature": 0}, "hit"), ({"seed": 7}, "hit")):
        for _ in range(2):
            last = await ask(ollprox.port, "POST", "/call_model", question(options=options))
        assert outcome in last.cache_status


async def test_answers_are_kept_apart_by_key_where_that_is_set(
    launch: Start, ollama: StandIn, two_keys: Path
) -> None:
    ollprox = await launch(API_KEY_FILE=two_keys, CACHE_PER_KEY="yes")
    for key in (KEY, OTHER_KEY):
        for outcome in ("miss", "hit"):
            headers = {"APIKEY": key}
            answer = await ask(ollprox.port, "POST", "/call_model", question(), headers)
            assert outcome in answer.cache_status
    assert len(ollama.asked()) == 2


# A hit.


async def test_a_large_hit_is_written_in_slices_and_waits_for_its_reader(
    ollprox: Program, ollama: StandIn
) -> None:
    ollama.script.tokens = ["x" * 10_000] * 300  # 3 MB, within CACHE_MAX_ENTRY_BYTES
    miss = await ask(ollprox.port, "POST", "/api/generate", question())
    async with Client(ollprox.port) as client:
        await client.send(request("POST", "/api/generate", question()))
        await asyncio.sleep(0.2)
        assert (await ask(ollprox.port, "GET", "/health")).status == 200
        hit = await client.rest(await client.head())
    assert "hit" in hit.cache_status
    assert hit.body == miss.body


# All at once.


async def test_a_hundred_clients_join_leave_and_stall(launch: Start, ollama: StandIn) -> None:
    """Of one answer: they join at different lines, half leave at random, one reads nothing."""
    lines = 40
    chance = random.Random(7)
    ollama.script.tokens = [f"token {number} " for number in range(lines)]
    step = asyncio.Semaphore(0)
    ollama.script.gate = step.acquire
    ollprox = await launch()

    async def client(number: int) -> bytes | None:
        leaves_after = chance.randrange(1, lines) if number % 2 else None
        async with Client(ollprox.port) as connection:
            answer = await connection.begin("POST", "/api/generate", question())
            begun.release()
            if number == 50:
                await ended.wait()  # stalled
            async for _ in connection.chunks(answer):
                if leaves_after is not None and answer.body.count(b"\n") >= leaves_after:
                    return None
            assert answer.complete
            return answer.body

    begun, ended = asyncio.Semaphore(0), asyncio.Event()
    tasks = []
    step.release()
    for number in range(100):
        tasks.append(asyncio.create_task(client(number)))
        await begun.acquire()
        if number % 3 == 0:
            step.release()  # one more line
    for _ in range(lines + 2):
        step.release()
    first = await tasks[0]
    ended.set()
    bodies = {body for body in await asyncio.gather(*tasks) if body is not None}
    assert bodies == {first}
    assert first
    assert first.count(b"\n") == lines + 1
    assert len(ollama.asked()) == 1
    assert sum(seen.gone for seen in ollama.seen) == 0


async def test_many_that_wait_for_one_object_share_its_bytes(
    launch: Start, ollama: StandIn
) -> None:
    ollama.script.tokens = ["x" * 10_000] * 200  # 2 MB
    ollprox = await launch(measured=True)
    await ask(ollprox.port, "POST", "/call_model", {"model": "llama2"})
    before = ollprox.resident()
    for path in ("/call_model", "/v1/completions"):
        ollama.script.let_go.clear()
        ollama.script.hold_head = True
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(Client(ollprox.port)) for _ in range(80)]
            for client in clients:
                await client.send(request("POST", path, question(path)))
            await settled(ollprox, 80)
            ollama.script.let_go.set()
            answers = [await client.rest(await client.head()) for client in clients]
            assert len({answer.body for answer in answers}) == 1
    # Copies of their own would be 160 MB each time.
    assert ollprox.resident("VmHWM") - before < 100 << 20


async def test_a_stored_stream_is_there_as_an_object_too(ollprox: Program, ollama: StandIn) -> None:
    """Nobody wanted an object while it came; whoever does later gets the same as ever."""
    stream = await ask(ollprox.port, "POST", "/api/generate", question())
    first, second = [await ask(ollprox.port, "POST", "/call_model", question()) for _ in range(2)]
    assert "hit" in first.cache_status
    assert first.body == second.body
    texts = [line["response"] for line in stream.lines()]
    assert first.json()["response"] == "".join(texts)
    again = await ask(ollprox.port, "POST", "/api/generate", question())
    assert ("hit" in again.cache_status, again.body) == (True, stream.body)
    assert len(ollama.asked()) == 1


async def test_a_stream_with_a_line_that_is_not_json_is_broken_and_not_stored(
    ollprox: Program, ollama: StandIn
) -> None:
    lines = b'{"response":"a","done":false}\n{nonsense}\n{"response":"","done":true}\n'
    ollama.script.raw = says(lines, "application/x-ndjson")
    async with Client(ollprox.port) as client:
        answer = await client.begin("POST", "/api/generate", question())
        await cut(client, answer)
    assert answer.body.startswith(lines)
    ollama.script.raw = None
    answer = await ask(ollprox.port, "POST", "/call_model", question())
    assert (answer.status, answer.cache_status) == (200, "OllProx; fwd=miss; stored")


async def test_an_answer_that_is_too_large_with_its_fold_is_given_and_not_kept(
    launch: Start, ollama: StandIn
) -> None:
    ollama.script.tokens = ["x" * 100] * 100
    ollprox = await launch(CACHE_MAX_ENTRY_BYTES=25_000)
    stream = await ask(ollprox.port, "POST", "/api/generate", question())
    assert len(stream.body) < 25_000
    answer = await ask(ollprox.port, "POST", "/call_model", question())
    assert answer.cache_status == "OllProx; fwd=miss"
    assert answer.json()["response"] == "x" * 10_000
    metrics = await ask(ollprox.port, "GET", "/metrics.json")
    assert metrics.json()["cache"]["bytes"] == 0


async def test_who_wants_an_object_does_not_outrun_who_reads_lines(
    launch: Start, ollama: StandIn
) -> None:
    ollama.script.tokens = ["x" * 20_000] * 300  # 6 MB, of which the window takes a little
    ollprox = await launch(CACHE_MAX_ENTRY_BYTES="100K")
    ollama.script.hold_before = 1
    async with Client(ollprox.port) as client:
        stream = await client.begin("POST", "/api/generate", question())
        single = asyncio.create_task(ask(ollprox.port, "POST", "/call_model", question()))
        await settled(ollprox, 2)
        ollama.script.let_go.set()
        await asyncio.sleep(0.3)  # it reads nothing yet, and is not slow for that
        assert not single.done()
        await client.rest(stream)
    assert stream.complete
    assert len(stream.lines()) == 301
    assert (await single).json()["response"] == "x" * 6_000_000
    assert len(ollama.asked()) == 1


async def test_age_and_ttl_count_from_the_head_of_the_answer(
    launch: Start, ollama: StandIn
) -> None:
    ollprox = await launch(CACHE_TTL=3600)
    ollama.script.hold_before = 1
    async with Client(ollprox.port) as client:
        answer = await client.begin("POST", "/api/generate", question())
        await asyncio.sleep(1.1)
        ollama.script.let_go.set()
        await client.rest(answer)
    hit = await ask(ollprox.port, "POST", "/api/generate", question())
    age = int(hit.headers["age"])
    assert age >= 1
    assert hit.cache_status == f"OllProx; hit; ttl={3600 - age}"


async def test_an_answer_for_a_name_that_no_model_can_have_is_not_stored(
    ollprox: Program, ollama: StandIn
) -> None:
    """The entry would hold the name, which the budget does not count."""

    async def respond(_: Seen, writer: asyncio.StreamWriter) -> None:
        line = b'{"response":"a","done":true}\n'
        head = b"Content-Type: application/x-ndjson\r\nContent-Length: %d\r\n\r\n" % len(line)
        writer.write(b"HTTP/1.1 200 OK\r\n" + head + line)

    ollama.script.respond = respond
    for length, again in ((600, "OllProx; hit"), (601, "OllProx; fwd=miss")):
        body = question(model="m" * (length - len(":latest")))
        await ask(ollprox.port, "POST", "/api/generate", body)
        answer = await ask(ollprox.port, "POST", "/api/generate", body)
        assert answer.cache_status.startswith(again)
