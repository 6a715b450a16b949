"""Upstream fails in every way; clients get the right error, nothing is stored, nothing hangs."""

import asyncio
import contextlib
import json
import os
import re
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from client import KEY, Client, ask, question, raw
from conftest import Program, Start
from standin import Cut, Seen, StandIn
from test_limits import certificate

from wire.upstream import End, _Stream

LINES = [
    b'{"model":"m","response":"a","done":false}\n',
    b'{"model":"m","response":"b","done":false}\n',
    b'{"model":"m","response":"","done":true,"done_reason":"stop"}\n',
]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n"
TAIL = b"Transfer-Encoding: chunked\r\n\r\n"
CHUNKED = HEAD + TAIL


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


WHOLE = CHUNKED + b"".join(map(chunk, LINES)) + b"0\r\n\r\n"
Respond = Callable[[Seen, asyncio.StreamWriter], Awaitable[None]]


def says(data: bytes, *, reset: bool = False, then: bytes | None = None) -> Respond:
    """Send bytes, and close or reset the connection, or say something more on it."""

    async def respond(seen: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()
        if then is not None:
            writer.write(then)
            return
        if reset:
            await asyncio.sleep(0.02)  # so that what was said is not lost with the reset
            linger = struct.pack("ii", 1, 0)  # without it this would be an orderly end
            plain = writer.get_extra_info("socket")
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
        raise Cut

    return respond


# What upstream does; the status for a single object; the status of a stream, and its lines.
FAULTS = {
    "closed before the head": (says(b""), 502, 502, 0),
    "reset before the head": (says(b"", reset=True), 502, 502, 0),
    "closed in the head": (says(HEAD), 502, 502, 0),
    "reset in the head": (says(HEAD, reset=True), 502, 502, 0),
    "garbage": (says(b"\x00\x01garbage\r\n\r\n"), 502, 502, 0),
    "not HTTP": (says(b"SSH-2.0-OpenSSH\r\n\r\n"), 502, 502, 0),
    "a head of 1 MB": (says(HEAD + b"X: " + b"x" * (1 << 20) + b"\r\n\r\n"), 502, 502, 0),
    "bare LF": (says(b"HTTP/1.1 200 OK\nContent-Length: 0\n\n"), 502, 502, 0),
    "length and chunks": (
        says(HEAD + b"Content-Length: 5\r\n" + CHUNKED[len(HEAD) :]),
        502,
        502,
        0,
    ),
    "two lengths": (says(HEAD + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\n"), 502, 502, 0),
    "folded": (says(HEAD + b"X: a\r\n b\r\nContent-Length: 0\r\n\r\n"), 502, 502, 0),
    "switching": (says(b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n"), 502, 502, 0),
    "endless interim": (says(b"HTTP/1.1 100 Continue\r\n\r\n" * 50), 502, 502, 0),
    "no body": (says(CHUNKED), 502, 200, 0),
    "closed in a chunk": (says(CHUNKED + chunk(LINES[0]) + b"50\r\n{"), 502, 200, 1),
    "reset in a chunk": (says(CHUNKED + chunk(LINES[0]) + b"50\r\n{", reset=True), 502, 200, 1),
    "closed between chunks": (says(CHUNKED + chunk(LINES[0])), 502, 200, 1),
    "reset between chunks": (says(CHUNKED + chunk(LINES[0]), reset=True), 502, 200, 1),
    "a bad chunk": (says(CHUNKED + chunk(LINES[0]) + b"zz\r\n"), 502, 200, 1),
    "a lax chunk size": (says(CHUNKED + chunk(LINES[0]) + b"3 \r\nabc\r\n"), 502, 200, 1),
    "a length too long": (says(HEAD + b"Content-Length: 999\r\n\r\n" + LINES[0]), 502, 200, 1),
    "no length, cut in a line": (says(HEAD + b"\r\n" + LINES[0] + b"{"), 502, 200, 1),
    "no JSON": (says(CHUNKED + chunk(b"<html>\n") + b"0\r\n\r\n"), 502, 200, None),
}


@pytest.mark.parametrize("name", FAULTS)
async def test_a_fault_is_answered_not_stored_and_recovered_from(
    ollprox: Program, ollama: StandIn, name: str
) -> None:
    respond, single_status, stream_status, lines = FAULTS[name]
    ollama.script.respond = only_questions(respond, ollama)
    single = await ask(ollprox.port, "POST", "/call_model", question())
    assert (single.status, list(single.json())) == (single_status, ["error"])
    assert f"127.0.0.1:{ollama.port}" in single.json()["error"] or "Ollama" in str(single.json())
    async with Client(ollprox.port) as client:
        stream = await client.begin("POST", "/api/generate", question())
        with contextlib.suppress(asyncio.IncompleteReadError):
            await client.rest(stream)
    assert stream.status == stream_status
    assert stream.complete is (stream_status != 200)
    assert "error" in json.loads(stream.body.splitlines()[-1])
    if lines is not None and stream_status == 200:
        assert stream.body.splitlines(keepends=True)[:-1] == LINES[:lines]
    ollama.script.respond = None
    again = await ask(ollprox.port, "POST", "/call_model", question())
    assert (again.status, again.cache_status) == (200, "OllProx; fwd=miss; stored")


def only_questions(respond: Respond, ollama: StandIn) -> Respond:
    """Leave the readings of versions and models alone."""

    async def chosen(seen: Seen, writer: asyncio.StreamWriter) -> None:
        if seen.method == "GET":
            await ollama._api(seen, writer)
        else:
            await respond(seen, writer)

    return chosen


OKAY = {
    "interim first": b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Hints\r\nLink: x\r\n\r\n"
    + WHOLE,
    "one chunk": CHUNKED + chunk(b"".join(LINES)) + b"0\r\n\r\n",
    "many chunks a line": CHUNKED
    + b"".join(chunk(bytes([byte])) for byte in b"".join(LINES))
    + b"0\r\nX-Trailer: y\r\n\r\n",
    "extensions": CHUNKED
    + b"".join(map(chunk, LINES)).replace(b"\r\n{", b";a=b\r\n{")
    + b"0\r\n\r\n",
    "a length": HEAD + b"Content-Length: %d\r\n\r\n" % len(b"".join(LINES)) + b"".join(LINES),
    "until the close": HEAD + b"\r\n" + b"".join(LINES),
    "HTTP/1.0": HEAD.replace(b"1.1", b"1.0") + b"\r\n" + b"".join(LINES),
    "no last newline": CHUNKED + chunk(b"".join(LINES)[:-1]) + b"0\r\n\r\n",
    "cut after the last line": WHOLE.removesuffix(b"0\r\n\r\n"),
}


@pytest.mark.parametrize("name", OKAY)
async def test_what_is_unusual_and_still_right(
    ollprox: Program, ollama: StandIn, name: str
) -> None:
    ollama.script.respond = only_questions(says(OKAY[name]), ollama)
    stream = await ask(ollprox.port, "POST", "/api/generate", question())
    assert stream.complete
    assert stream.body.rstrip() == b"".join(LINES).rstrip()
    single = await ask(ollprox.port, "POST", "/call_model", question())
    assert single.json()["response"] == "ab"
    assert "hit" in single.cache_status


async def test_bytes_after_a_response_are_not_the_next_one(
    ollprox: Program, ollama: StandIn
) -> None:
    """Response smuggling: the surplus must not answer somebody else's request."""
    surplus = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison"
    for attack in (
        says(WHOLE + surplus, then=b""),
        says(WHOLE, then=surplus),
        says(HEAD + b"Content-Length: 0\r\n\r\n" + surplus, then=b""),
    ):
        ollama.script.respond = only_questions(attack, ollama)
        async with Client(ollprox.port) as client:
            answer = await client.begin("POST", "/api/generate", question(str(id(attack))))
            await client.rest(answer)
        await asyncio.sleep(0.05)  # a surplus that comes late is there by now
        ollama.script.respond = None
        answer = await ask(ollprox.port, "GET", "/api/ps")
        assert b"poison" not in answer.body
        assert answer.json()["models"]


async def test_a_kept_connection_gone_stale_is_retried_once_and_silently(
    ollprox: Program, ollama: StandIn
) -> None:
    await ask(ollprox.port, "POST", "/call_model", question("first"))
    asked: list[int] = []

    async def close_when_asked(seen: Seen, writer: asyncio.StreamWriter) -> None:
        asked.append(id(writer))
        if len(asked) == 1:
            raise Cut  # as if it had been closed while the request was on its way
        await ollama._api(seen, writer)

    ollama.script.respond = only_questions(close_when_asked, ollama)
    answer = await ask(ollprox.port, "POST", "/call_model", question("second"))
    assert answer.status == 200
    assert len(asked) == 2
    asked.clear()

    async def always_close(seen: Seen, writer: asyncio.StreamWriter) -> None:
        asked.append(1)
        raise Cut

    ollama.script.respond = only_questions(always_close, ollama)
    answer = await ask(ollprox.port, "POST", "/call_model", question("third"))
    assert answer.status == 502
    assert len(asked) <= 2


async def test_no_retry_once_a_byte_of_the_response_has_come(
    ollprox: Program, ollama: StandIn
) -> None:
    await ask(ollprox.port, "POST", "/call_model", question("first"))
    count = len(ollama.asked())
    ollama.script.respond = only_questions(says(b"H"), ollama)
    assert (await ask(ollprox.port, "POST", "/call_model", question())).status == 502
    assert len(ollama.asked()) == count + 1


async def test_a_name_that_is_not_resolved_is_502(launch: Start) -> None:
    ollprox = await launch(OLLAMA_HOST="no-such-host.invalid")
    answer = await ask(ollprox.port, "POST", "/call_model", question())
    assert answer.status == 502
    assert "no-such-host.invalid:11434" in answer.json()["error"]


async def test_a_stall_in_the_middle_ends_the_stream(launch: Start, ollama: StandIn) -> None:
    ollprox = await launch(IDLE_TIMEOUT=0.2, MODEL_REFRESH=0)
    ollama.script.hold_before = 2
    async with Client(ollprox.port) as client:
        answer = await client.begin("POST", "/api/generate", question())
        await client.rest(answer)
    assert not answer.complete
    assert "within 0.2 s" in answer.lines()[-1]["error"]
    await ollama.until(lambda: ollama.asked()[0].gone)


async def test_faults_leak_no_files(ollprox: Program, ollama: StandIn) -> None:
    def files() -> int:
        return len(os.listdir(f"/proc/{ollprox.pid}/fd"))

    await ask(ollprox.port, "POST", "/call_model", question("warm"))
    before = files()
    for _ in range(3):
        for respond, *_ in FAULTS.values():
            ollama.script.respond = only_questions(respond, ollama)
            await ask(ollprox.port, "POST", "/call_model", question())
    ollama.script.respond = None
    assert (await ask(ollprox.port, "POST", "/call_model", question())).status == 200
    async with asyncio.timeout(5):
        while files() > before + 1:
            await asyncio.sleep(0.02)


async def test_an_answer_in_one_burst_larger_than_the_window_is_folded_whole(
    launch: Start, ollama: StandIn
) -> None:
    ollprox = await launch(CACHE_MAX_ENTRY_BYTES=20_000)
    texts = [f"<{number:05d}>" for number in range(3000)]
    lines = [b'{"response":"%b","done":false}\n' % text.encode() for text in texts]
    body = b"".join([*lines, LINES[-1]])
    ollama.script.respond = only_questions(says(CHUNKED + chunk(body) + b"0\r\n\r\n"), ollama)
    answer = await ask(ollprox.port, "POST", "/call_model", question())
    assert answer.json()["response"] == "".join(texts)


async def test_an_answer_that_comes_before_the_body_is_taken_is_passed_on(launch: Start) -> None:
    refusal = b'{"error":"too large"}'
    reply = b"HTTP/1.1 413 Too Large\r\nContent-Length: %d\r\n\r\n%b" % (len(refusal), refusal)

    how = ""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        writer.write(reply)
        await writer.drain()
        if head.startswith(b"POST"):  # and not the reading of the version
            if how == "half-closes":
                writer.write_eof()
            await held.wait()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    ollprox = await launch(OLLAMA_PORT=port, MODEL_REFRESH=0)
    held = asyncio.Event()
    for how in ("keeps it open", "half-closes"):  # noqa: B007 - read by `serve`
        async with asyncio.timeout(20):
            answer = await ask(ollprox.port, "POST", "/call_model", question("x" * (20 << 20)))
        assert (answer.status, answer.body) == (413, refusal)
    held.set()
    server.close()
    await server.wait_closed()


async def test_garbage_that_never_ends_is_told_at_once(ollprox: Program, ollama: StandIn) -> None:
    held = asyncio.Event()
    for garbage in (b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 200 OK\nX: y\n\n", b"\x00\x00\x12"):

        async def respond(
            seen: Seen, writer: asyncio.StreamWriter, garbage: bytes = garbage
        ) -> None:
            writer.write(garbage)
            await held.wait()

        ollama.script.respond = only_questions(respond, ollama)
        async with asyncio.timeout(10):
            assert (await ask(ollprox.port, "POST", "/call_model", question())).status == 502
    held.set()


async def test_no_retry_after_an_interim_response(ollprox: Program, ollama: StandIn) -> None:
    await ask(ollprox.port, "POST", "/call_model", question("first"))
    count = len(ollama.asked())
    interim = says(b"HTTP/1.1 102 Processing\r\n\r\n")
    ollama.script.respond = only_questions(interim, ollama)
    assert (await ask(ollprox.port, "POST", "/call_model", question())).status == 502
    assert len(ollama.asked()) == count + 1


async def test_half_a_line_is_not_passed_on(ollprox: Program, ollama: StandIn) -> None:
    half = HEAD + b"Content-Length: %d\r\n\r\n%b" % (len(LINES[0]) + 5, LINES[0] + b'{"mod')
    ollama.script.respond = only_questions(says(half), ollama)
    async with Client(ollprox.port) as client:
        stream = await client.begin("POST", "/api/generate", question())
        await client.rest(stream)
    first, last = stream.body.splitlines(keepends=True)
    assert first == LINES[0]
    assert "error" in json.loads(last)
    assert not stream.complete


async def test_ollamas_own_error_is_kept_even_if_a_reset_follows(
    ollprox: Program, ollama: StandIn
) -> None:
    own = b'{"error":"boom"}\n'
    data = CHUNKED + chunk(LINES[0]) + chunk(own)
    ollama.script.respond = only_questions(says(data, reset=True), ollama)
    single = await ask(ollprox.port, "POST", "/call_model", question())
    assert (single.status, single.json()) == (500, {"error": "boom"})
    async with Client(ollprox.port) as client:
        stream = await client.begin("POST", "/api/generate", question())
        await client.rest(stream)
    assert stream.body == LINES[0] + own
    assert not stream.complete


async def test_bytes_that_come_right_after_their_time_are_no_fault(
    launch: Start, ollama: StandIn
) -> None:
    """An upload is ended in a few steps, in which more of a head that never ends may come."""

    async def respond(seen: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nX: ")
        while not writer.is_closing():
            writer.write(b"a")
            await writer.drain()
            await asyncio.sleep(0.0001)

    ollama.script.respond = respond
    ollprox = await launch(
        ADMIN_LABELS="tester",
        FIRST_BYTE_TIMEOUT=0.1,
    )
    path = "/api/blobs/sha256:" + "a" * 64
    answers = await asyncio.gather(*(ask(ollprox.port, "POST", path, b"blob") for _ in range(8)))
    assert {answer.status for answer in answers} == {504}


async def test_a_wait_that_was_ended_takes_nothing_more() -> None:
    stream = _Stream()
    stream.feed_data(b"in time")
    stream.finish(End.LATE)
    stream.feed_data(b"late")
    stream.set_exception(ConnectionResetError())
    assert await stream.read() == b"in time"
    assert stream.fed == len(b"in time" + b"late")
    assert stream.end is End.LATE


# What passes of a response's head.

FOREIGN = {
    "Set-Cookie": "session=of-the-first-caller",
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Allow-Credentials": "true",
    "Location": "http://10.0.0.1:11434/api/generate",
    "Content-Location": "http://10.0.0.1:11434/x",
    "Proxy-Authenticate": "Basic",
    "Proxy-Authentication-Info": "x",
    "WWW-Authenticate": "Basic",
    "Server": "nginx",
    "X-Powered-By": "x",
    "Alt-Svc": 'h3=":443"',
    "Strict-Transport-Security": "max-age=31536000",
    "Clear-Site-Data": '"*"',
    "Refresh": "0; url=http://10.0.0.1",
    "Link": "<x>; rel=preload",
    "Via": "1.1 inner-gateway",
    "X-Request-Id": "theirs",
    "Cache-Status": "Inner; hit",
    "Age": "7",
    "Content-Security-Policy": "default-src *",
    "Service-Worker-Allowed": "/",
}
READ = {  # by clients, while they are told what happens now
    "Retry-After": "7",
    "retry-after-ms": "7000",
    "x-should-retry": "false",
    "x-ratelimit-remaining-requests": "3",
    "anthropic-ratelimit-tokens-remaining": "4",
    "openai-processing-ms": "5",
}
KEPT = {  # and in a stored answer too
    "Content-Type": "application/x-ndjson",
    "Content-Language": "en",
    "Cache-Control": "no-cache",
    "Date": "Mon, 23 Nov 2026 09:10:20 GMT",
}


def with_headers(headers: dict[str, str], status: int = 200, body: bytes = b"") -> bytes:
    body = body or b"".join(LINES)
    lines = [f"HTTP/1.1 {status} X", *(f"{n}: {v}" for n, v in headers.items())]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


async def test_only_known_headers_of_upstream_reach_clients(
    ollprox: Program, ollama: StandIn
) -> None:
    headers = {name: value for name, value in FOREIGN.items() if name != "Set-Cookie"}
    ollama.script.respond = only_questions(says(with_headers(headers | READ | KEPT)), ollama)
    for wanted, outcome in ((READ | KEPT, "miss; stored"), (KEPT, "hit")):
        answer = await ask(ollprox.port, "POST", "/api/generate", question())
        assert outcome.partition(";")[0] in answer.cache_status
        for name, value in wanted.items():
            assert answer.headers[name.lower()] == value
        for name, value in FOREIGN.items():
            assert answer.headers.get(name.lower()) != value, name
        ours = {"via", "cache-status", "x-request-id", "age", "connection", "x-accel-buffering"}
        framing = {"transfer-encoding", "content-length"}
        assert set(answer.headers) - ours - framing == {name.lower() for name in wanted}


@pytest.mark.parametrize(
    "headers",
    [
        {"Set-Cookie": "a=b"},
        {"Cache-Control": "private"},
        {"Cache-Control": 'max-age=9, Private="x"'},
        {"Cache-Control": "no-cache, NO-STORE"},
    ],
)
async def test_a_response_meant_for_one_client_is_not_stored(
    ollprox: Program, ollama: StandIn, headers: dict[str, str]
) -> None:
    told = with_headers({"Content-Type": "application/x-ndjson"} | headers)
    ollama.script.respond = only_questions(says(told), ollama)
    for _ in range(2):
        answer = await ask(ollprox.port, "POST", "/api/generate", question())
        assert (answer.cache_status, answer.complete) == ("OllProx; fwd=miss", True)
        assert "a=b" not in answer.headers.values()
    assert len(ollama.asked()) == 2


async def test_a_response_meant_for_one_client_is_not_joined(
    ollprox: Program, ollama: StandIn
) -> None:
    more = asyncio.Event()

    async def respond(seen: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"Set-Cookie: a=b\r\n" + TAIL + chunk(LINES[0]))
        await writer.drain()
        await more.wait()
        writer.write(chunk(LINES[2]) + b"0\r\n\r\n")

    ollama.script.respond = only_questions(respond, ollama)
    async with Client(ollprox.port) as first, Client(ollprox.port) as second:
        begun = await first.begin("POST", "/api/generate", question())
        other = await second.begin("POST", "/api/generate", question())
        assert other.cache_status == "OllProx; fwd=miss"
        more.set()
        assert (await first.rest(begun)).complete
        assert (await second.rest(other)).complete


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("https://ollama.example/api/generate?token=secret", "to https://ollama.example. "),
        ("http://[::1]:8080/x", "to http://[::1]:8080. "),
        ("https://user:secret@ollama.example/", "to another path. "),
        ("https://" + "a" * 5000 + "/secret", "to another path. "),
        ("javascript:secret", "to another path. "),
        ("/login?secret", "to another path. "),
        ("", "to another path. "),
    ],
)
async def test_a_redirect_is_502_and_says_where_it_leads(
    ollprox: Program, ollama: StandIn, location: str, shown: str
) -> None:
    for status in (301, 302, 303, 307, 308):
        told = with_headers({"Location": location} if location else {}, status)
        ollama.script.respond = only_questions(says(told), ollama)
        answer = await ask(ollprox.port, "POST", "/api/generate", question())
        assert answer.status == 502
        assert "location" not in answer.headers
        error = answer.json()["error"]
        assert shown in error
        assert "OLLAMA_HOST" in error
        assert "secret" not in error


@pytest.mark.parametrize("status", [401, 407])
async def test_credentials_that_upstream_wants_are_not_asked_of_clients(
    ollprox: Program, ollama: StandIn, status: int
) -> None:
    told = with_headers({"WWW-Authenticate": "Basic", "Proxy-Authenticate": "Basic"}, status)
    ollama.script.respond = only_questions(says(told), ollama)
    for path in ("/api/generate", "/v1/chat/completions"):
        body = {"model": "llama2", "prompt": "x", "messages": []}
        answer = await ask(ollprox.port, "POST", path, body)
        assert answer.status == 502
        assert b"requires credentials" in answer.body
        assert not {"www-authenticate", "proxy-authenticate"} & set(answer.headers)


async def test_not_modified_passes(ollprox: Program, ollama: StandIn) -> None:
    ollama.script.respond = only_the_path("/api/ps", says(b"HTTP/1.1 304 X\r\n\r\n"), ollama)
    async with Client(ollprox.port) as client:
        answer = await client.begin("GET", "/api/ps", headers={"If-None-Match": "x"})
    assert answer.status == 304


def only_the_path(path: str, respond: Respond, ollama: StandIn) -> Respond:
    async def chosen(seen: Seen, writer: asyncio.StreamWriter) -> None:
        await (respond if seen.path == path else ollama._api)(seen, writer)

    return chosen


# Where a response ends.

CUT_BODIES = {  # what looks whole of a body that the connection's end delimits
    "/api/embed": b'{"embeddings":[[0.5]]}',
    "/api/embeddings": b'{"embedding":[0.5]}',
    "/api/show": b'{"modelfile":"x"}',
    "/api/generate": b"".join(LINES[:2]),
    "/call_model": b"".join(LINES[:2]),
    "/v1/responses": b'{"output":[]}',
    "/v1/embeddings": b'{"data":[{"embedding":[0.5]}]}',
    "/v1/models": b'{"data":[]}',
    "/api/ps": b'{"models":[]}',
    "/api/pull": b'{"status":"pulling"}\n',
}


@pytest.mark.parametrize("path", CUT_BODIES)
async def test_a_reset_is_not_the_end_of_a_body_without_a_length(
    launch: Start, ollama: StandIn, path: str
) -> None:
    ollprox = await launch(ADMIN_LABELS="tester")
    body = CUT_BODIES[path]
    lines = path in {"/api/generate", "/call_model", "/api/pull"}
    kind = b"application/x-ndjson" if lines else b"application/json"
    told = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\n\r\n%b" % (kind, body)
    ollama.script.respond = only_the_path(
        "/api/generate" if path == "/call_model" else path, says(told, reset=True), ollama
    )
    get = path in {"/v1/models", "/api/ps"}
    sent = None if get else {**question(), "input": "x"}
    for _ in range(2):  # the second finds nothing stored
        async with Client(ollprox.port) as client:
            answer = await client.begin("GET" if get else "POST", path, sent)
            with contextlib.suppress(asyncio.IncompleteReadError):
                await client.rest(answer)
        assert "hit" not in answer.cache_status
        if answer.status == 200:
            assert not answer.complete
            assert "middle of its answer" in answer.lines()[-1]["error"]
        else:
            assert answer.status == 502
            assert b"in the middle of its answer" in answer.body


@pytest.mark.parametrize("orderly", [True, False])
async def test_tls_that_ends_without_close_notify_is_a_truncation(
    launch: Start, tmp_path: Path, orderly: bool
) -> None:
    """Whoever can cut TCP could otherwise choose where an answer ends."""
    cert, key = certificate(tmp_path, "upstream")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setblocking(False)
    loop = asyncio.get_running_loop()

    def serve(plain: socket.socket) -> None:
        plain.setblocking(True)
        with (
            plain,
            contextlib.suppress(OSError),
            context.wrap_socket(plain, server_side=True) as tls,
        ):
            head = tls.recv(65536)
            if b"/api/ps" in head:
                tls.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{}")
            if orderly:
                tls.unwrap()
            else:
                os.close(tls.detach())  # a FIN alone

    async def accept() -> None:
        while True:
            plain, _ = await loop.sock_accept(listening)
            await asyncio.to_thread(serve, plain)

    server = asyncio.create_task(accept())
    ollprox = await launch(
        OLLAMA_HOST=f"https://localhost:{listening.getsockname()[1]}",
        OLLAMA_CA_FILE=cert,
        MODEL_REFRESH=0,
    )
    answer = await ask(ollprox.port, "GET", "/api/ps")
    if orderly:
        assert (answer.status, answer.body) == (200, b"{}")
    else:
        assert answer.status == 502
        assert "in the middle of its answer" in answer.json()["error"]
    server.cancel()
    listening.close()


# Two OllProx.


@contextlib.asynccontextmanager
async def gateway(ports: list[int]) -> AsyncIterator[int]:
    """Pass requests on to the last of `ports`, with the key of the tests; gives its own port."""
    tasks = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        tasks.add(task)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: (\d+)", head)
            body = await reader.readexactly(int(length[1]) if length else 0)
            added = f"APIKEY: {KEY}\r\nConnection: close\r\n\r\n".encode()
            writer.write(await raw(ports[-1], head[:-2] + added + body))
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()
    if tasks:
        await asyncio.wait(tasks)


async def test_two_ollprox_in_a_row_work(launch: Start, ollama: StandIn) -> None:
    inner = await launch()
    async with gateway([inner.port]) as between:
        outer = await launch(OLLAMA_PORT=between)
        answer = await ask(outer.port, "POST", "/call_model", question())
        assert (answer.status, answer.cache_status) == (200, "OllProx; fwd=miss; stored")
        via = ollama.asked()[0].header("via") or ""
        names = [member.split()[1] for member in via.split(",")]
        assert len(set(names)) == 2
        assert all(name.startswith("OllProx-") for name in names)
        again = await ask(outer.port, "POST", "/call_model", question(), {"Via": "1.1 somebody"})
        assert "hit" in again.cache_status  # whom it came through is no part of the question
        await outer.stop()


async def test_a_loop_of_two_ollprox_is_508(launch: Start) -> None:
    ports: list[int] = []
    async with gateway(ports) as back:
        first = await launch(OLLAMA_PORT=back, MODEL_REFRESH=0)
        async with gateway([first.port]) as forth:
            ports.append(1)
            second = await launch(OLLAMA_PORT=forth, MODEL_REFRESH=0)
            ports.append(second.port)
            async with asyncio.timeout(10):
                answer = await ask(first.port, "POST", "/call_model", question())
            assert answer.status == 508
            await second.stop()
            await first.stop()
