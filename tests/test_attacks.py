"""Malicious requests, as raw bytes; what counts is what upstream receives."""

import asyncio
import contextlib
import re
import signal

import pytest
from client import KEY, Client, ask, question, raw, request, waiting
from conftest import Program, Start
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from standin import StandIn
from test_http11 import BAD_BODIES, BAD_HEADS, HUGE_CHUNKS, HUGE_LENGTHS

BODY = b'{"model":"llama2","prompt":"Why?"}'
SMUGGLED = request("POST", "/api/generate", question("smuggled"))
STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")


def with_key(head: bytes) -> bytes:
    """Put a valid key into a head, so that only its form can be wrong."""
    line_end = head.find(b"\n") + 1
    return head[:line_end] + f"APIKEY: {KEY}\r\n".encode() + head[line_end:]


async def statuses(port: int, data: bytes) -> list[int]:
    """Send bytes; return the status of each response until the connection closes."""
    return [int(status) for status in STATUS.findall(await raw(port, data))]


async def test_a_malformed_head_is_refused_and_nothing_after_it_is_taken_for_a_request(
    ollprox: Program, ollama: StandIn
) -> None:
    for head in BAD_HEADS:
        for attack in (with_key(head) + SMUGGLED, with_key(head) + BODY + SMUGGLED):
            assert await statuses(ollprox.port, attack) == [400], attack
    assert ollama.asked() == []


async def test_a_malformed_chunked_body_is_refused_likewise(
    ollprox: Program, ollama: StandIn
) -> None:
    head = request("POST", "/call_model", b"", {"Transfer-Encoding": "chunked"})
    for body in BAD_BODIES:
        assert await statuses(ollprox.port, head + body + SMUGGLED) == [400], body
    assert ollama.asked() == []


POST = b"POST /call_model HTTP/1.1\r\nHost: a\r\n"


@pytest.mark.parametrize(
    "attack",
    [
        # CL.TE, TE.CL and TE.TE, in the classic forms.
        POST + b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nG",
        POST + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n5c\r\n",
        POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\nTransfer-encoding: identity\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding:\tchunked, identity\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunk\r\n\r\n0\r\n\r\n",
        POST + b'Transfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n',
        POST + b"Transfer-Encoding\x00: chunked\r\n\r\n0\r\n\r\n",
        POST + b"X: x\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"X: x\r\n\rTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
        POST + b"Content-Length: 0\r\nContent-Length: 34\r\n\r\n",
        POST + b"Content-Length: 34,34\r\n\r\n",
        POST + b"Content-Length: 34;x\r\n\r\n",
        POST + b"Content-Length: 3 4\r\n\r\n",
        POST + b"Content-Length: 34\x0b\r\n\r\n",
        POST + b"Content-Length : 34\r\n\r\n",
    ],
)
async def test_desynchronising_requests(ollprox: Program, ollama: StandIn, attack: bytes) -> None:
    assert await statuses(ollprox.port, with_key(attack) + BODY + SMUGGLED) == [400]
    assert ollama.asked() == []


async def test_a_size_beyond_the_limit_is_refused_before_its_bytes_arrive(
    launch: Start, ollama: StandIn
) -> None:
    ollprox = await launch(MAX_BODY_BYTES=100)
    chunked = request("POST", "/call_model", b"", {"Transfer-Encoding": "chunked"})
    attacks = [with_key(POST + b"Content-Length: " + n + b"\r\n\r\n") for n in HUGE_LENGTHS]
    attacks += [chunked + size + b"\r\n" for size in (b"65", *HUGE_CHUNKS)]
    attacks += [chunked + b"60\r\n" + b" " * 96 + b"\r\n5\r\n"]  # 101 in all
    attacks += [request("POST", "/call_model", b"", {"Content-Length": "101"})]
    for attack in attacks:
        async with asyncio.timeout(5), Client(ollprox.port) as client:
            await client.send(attack)
            assert (await client.head()).status == 413, attack[:200]
    assert ollama.asked() == []


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_may_be_as_large_as_the_limit_and_not_a_byte_larger(
    launch: Start, chunked: bool
) -> None:
    ollprox = await launch(MAX_BODY_BYTES=len(BODY) + 2)
    for spaces, status in ((2, 200), (3, 413)):
        for parts in (1, 2, 7):
            body = BODY + b" " * spaces
            headers = {}
            if chunked:
                step = len(body) // parts + 1
                cut = [body[start : start + step] for start in range(0, len(body), step)]
                body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in cut)
                body += b"0\r\n\r\n"
                headers = {"Transfer-Encoding": "chunked"}
            answer = await ask(ollprox.port, "POST", "/call_model", body, headers)
            assert answer.status == status, (spaces, parts)


async def test_the_body_of_a_refused_request_is_never_taken_for_a_request(
    ollprox: Program, ollama: StandIn
) -> None:
    inner = SMUGGLED
    length = {"Content-Length": str(len(inner))}
    chunked = {"Transfer-Encoding": "chunked"}
    framed = b"%x\r\n%b\r\n0\r\n\r\n" % (len(inner), inner)
    ours = (await ask(ollprox.port, "GET", "/api/ps")).headers["via"]
    for method, path, more, status in (
        ("POST", "/call_model", {"APIKEY": "wrong"}, 401),
        ("POST", "/nope", {}, 404),
        ("PUT", "/call_model", {}, 405),
        ("GET", "/api/tags", {}, 200),
        ("POST", "/api/pull", {}, 403),
        ("GET", "/health", {}, 200),
        ("OPTIONS", "/call_model", {}, 405),
        ("POST", "/call_model", {"Via": ours}, 508),
    ):
        for body, framing in ((inner, length), (framed, chunked)):
            data = request(method, path, b"", {**framing, **more}) + body
            assert await statuses(ollprox.port, data) == [status], (method, path)
    assert ollama.asked("/api/generate") == []


async def test_a_body_that_is_read_ends_where_it_says(ollprox: Program, ollama: StandIn) -> None:
    """What follows it is the next request, and no more."""
    async with Client(ollprox.port) as client:
        await client.send(request("POST", "/call_model", BODY + b"  ") + SMUGGLED)
        first = await client.rest(await client.head())
        second = await client.rest(await client.head())
    assert (first.status, second.status) == (200, 200)
    assert [seen.json()["prompt"] for seen in ollama.asked()] == ["Why?", "smuggled"]


async def test_an_upgrade_is_ignored(ollprox: Program, ollama: StandIn) -> None:
    headers = {
        "Connection": "Upgrade, HTTP2-Settings",
        "Upgrade": "h2c",
        "HTTP2-Settings": "AAMAAABkAAQAoAAAAAIAAAAA",
    }
    async with Client(ollprox.port) as client:
        assert (await client.ask("GET", "/api/ps", headers=headers)).status == 200
    assert ollama.asked("/api/ps")[0].header("upgrade") is None
    assert ollama.asked("/api/ps")[0].header("http2-settings") is None
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    assert await statuses(ollprox.port, preface) == [400]


@pytest.mark.parametrize(
    "path",
    [
        "/api/../api/delete",
        "/api/./generate",
        "/api/%2e%2e/api/delete",
        "/api%2Fgenerate",
        "//api//generate",
        "/api/generate/",
        "/API/generate",
        "/api/generate;x",
        "/api/generate%00",
        "/api/generate%20",
        "/api\\generate",
        "/call_model/../api/delete",
    ],
)
async def test_paths_are_looked_up_exactly(ollprox: Program, ollama: StandIn, path: str) -> None:
    async with Client(ollprox.port) as client:
        answer = await client.ask("POST", path, question())
    assert answer.status == 404
    assert "OllProx has no such path; " in answer.json()["error"]
    assert ollama.asked() == []


async def test_bytes_that_are_no_http_are_refused_at_once(
    ollprox: Program, ollama: StandIn
) -> None:
    for data in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS greeting
        b"\x00\x00\x00\x00",
        b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        b"GET / HTTP/1.1\nHost: a\n\n",
        b"\r\n\r\n\r\n",
        b"<xml/>\n",
        b"\xff" * 100,
    ):
        async with asyncio.timeout(5):
            assert await statuses(ollprox.port, data) == [400], data
    assert ollama.asked() == []


GOOD = request("POST", "/call_model", BODY)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(cut=st.integers(1, len(GOOD) - 1), garbage=st.binary(max_size=30))
async def test_a_request_cut_anywhere_is_never_half_taken(
    ollprox: Program, ollama: StandIn, cut: int, garbage: bytes
) -> None:
    """Cut at any byte and closed, it reaches nobody; cut and continued, it is whole."""
    ollama.seen.clear()
    async with Client(ollprox.port) as client:
        await client.send(GOOD[:cut] + garbage)
    async with Client(ollprox.port) as client:
        await client.send(GOOD[:cut])
        await asyncio.sleep(0)
        await client.send(GOOD[cut:])
        answer = await client.rest(await client.head())
    assert answer.status == 200
    for seen in ollama.asked():
        assert seen.json() == {"model": "llama2", "prompt": "Why?", "stream": True}


async def test_requests_byte_by_byte(ollprox: Program) -> None:
    async with Client(ollprox.port) as client:
        for index in range(len(GOOD)):
            await client.send(GOOD[index : index + 1])
        assert (await client.rest(await client.head())).status == 200


async def test_clients_that_leave_reset_or_half_close_at_any_moment(
    ollprox: Program, ollama: StandIn
) -> None:
    ollama.script.pace = 0.005
    for index in range(40):
        reader, writer = await asyncio.open_connection("127.0.0.1", ollprox.port)
        sent = len(GOOD) * (index % 10 + 1) // 10
        writer.write(request("POST", "/api/generate", question(str(index)))[:sent])
        await asyncio.sleep(0.002 * (index % 7))
        if index % 3 == 0:
            writer.transport.abort()
        elif index % 3 == 1:
            writer.write_eof()
            with contextlib.suppress(ConnectionError):
                await reader.read()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    async with Client(ollprox.port) as client:
        assert (await client.ask("POST", "/call_model", question())).status == 200
    await ollama.until(lambda: not ollama.generating)


@pytest.mark.parametrize("size", [66_000, 90_000, 120_000])
async def test_a_client_that_leaves_after_a_large_body_is_noticed(
    ollprox: Program, ollama: StandIn, size: int
) -> None:
    async with waiting(ollprox.port, ollama, question("x" * size)):
        pass
    await ollama.until(lambda: ollama.asked()[0].gone)


async def test_a_client_that_leaves_behind_much_that_it_sent_ahead_is_noticed(
    ollprox: Program, ollama: StandIn
) -> None:
    async with waiting(ollprox.port, ollama, question()) as client:
        await client.send(request("GET", "/health") * 1200)
        client.writer.transport.abort()
    await ollama.until(lambda: ollama.asked()[0].gone)


async def test_what_was_pipelined_by_a_client_that_left_is_given_up(
    ollprox: Program, ollama: StandIn
) -> None:
    ollama.script.hold_head = True
    for first in (request("GET", "/nope"), request("GET", "/health")):
        async with Client(ollprox.port) as client:
            client.writer.write(first + request("POST", "/call_model", question()))
    assert (await ask(ollprox.port, "GET", "/health")).status == 200
    await ollama.until(lambda: all(seen.gone for seen in ollama.asked()))


async def test_what_was_pipelined_before_a_half_close_is_answered(
    ollprox: Program, ollama: StandIn
) -> None:
    once = request("POST", "/call_model", question()) + request("GET", "/health")
    async with Client(ollprox.port) as client:
        client.writer.write(once * 2)
        client.writer.write_eof()
        for _ in range(4):
            assert (await client.rest(await client.head())).status == 200
        assert await client.reader.read() == b""


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_ends_its_sending_side_gets_its_answer(
    ollprox: Program, ollama: StandIn, stream: bool
) -> None:
    """Also if the answer begins so late that the server has begun to wonder."""
    ollama.script.hold_head = True
    async with Client(ollprox.port) as client:
        await client.send(request("POST", "/api/generate", question(stream=stream)))
        client.writer.write_eof()
        assert await client.reader.readexactly(1) == b"H"  # is the client still there?
        assert await client.reader.readexactly(1) == b"T"
        ollama.script.let_go.set()
        rest = await client.reader.read()
        assert rest.startswith(b"TP/1.1 200 OK\r\n")
        assert rest.endswith(b"0\r\n\r\n" if stream else b"}")
    assert not any(seen.gone for seen in ollama.asked())


async def test_nginx_is_asked_to_pass_each_line_on_at_once(
    ollprox: Program, ollama: StandIn
) -> None:
    for path in ("/api/generate", "/v1/completions"):
        stream = await ask(ollprox.port, "POST", path, question(stream=True))
        assert stream.headers["x-accel-buffering"] == "no"
        whole = await ask(ollprox.port, "POST", path, question("whole", stream=False))
        assert (stream.status, whole.status) == (200, 200)
        assert "x-accel-buffering" not in whole.headers


async def test_a_half_closed_clients_stream_stays_valid_while_it_is_probed(
    ollprox: Program, ollama: StandIn
) -> None:
    ollama.script.hold_before = 1
    async with Client(ollprox.port) as client:
        answer = await client.begin("POST", "/api/generate", question())
        chunks = client.chunks(answer)
        await anext(chunks)
        client.writer.write_eof()
        assert await client.reader.readexactly(1) == b"0"  # in front of the next chunk's size
        ollama.script.let_go.set()
        assert [chunk async for chunk in chunks]
        assert answer.complete
        assert answer.lines()[-1]["done"]


@pytest.mark.parametrize("numbers", [[signal.SIGKILL], [signal.SIGTERM, signal.SIGTERM]])
async def test_a_zero_that_probes_a_half_closed_client_is_never_the_last_chunk(
    ollprox: Program, ollama: StandIn, numbers: list[signal.Signals]
) -> None:
    """Python's http.client takes "0" and the connection's end for a body's end."""
    ollama.script.hold_before = 1
    async with Client(ollprox.port) as client:
        answer = await client.begin("POST", "/api/generate", question())
        await anext(client.chunks(answer))
        client.writer.write_eof()
        assert await client.reader.readexactly(1) == b"0"
        for number in numbers:
            ollprox.process.send_signal(number)
            await asyncio.sleep(0.1)
        with pytest.raises(ConnectionResetError):
            await client.reader.read()


async def test_a_truncated_stream_is_so_for_a_half_closed_client(
    ollprox: Program, ollama: StandIn
) -> None:
    ollama.script.hold_before = 1
    async with Client(ollprox.port) as client:
        answer = await client.begin("POST", "/api/generate", question())
        await anext(client.chunks(answer))
        client.writer.write_eof()
        assert await client.reader.readexactly(1) == b"0"
        await ollama.stop()
        with pytest.raises(ConnectionResetError):
            await client.reader.read()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", [False, True])
async def test_a_client_that_closes_its_socket_frees_the_gpu(
    ollprox: Program, ollama: StandIn, stream: bool, begun: bool
) -> None:
    """With nothing to reset: a plain close sends the same FIN as a half-close."""
    ollama.script.hold_head = not begun
    ollama.script.hold_before = 1
    async with Client(ollprox.port) as client:
        await client.send(request("POST", "/api/generate", question(stream=stream)))
        await ollama.until(lambda: bool(ollama.asked()))
        if begun and stream:
            await anext(client.chunks(await client.head()))
    async with asyncio.timeout(3):
        await ollama.until(lambda: ollama.asked()[0].gone)
    await ollprox.says("status=499")


async def test_a_client_behind_a_userland_proxy_that_closes_frees_the_gpu(
    ollprox: Program, ollama: StandIn
) -> None:
    """Docker's makes a half-close of a close, and needs two writes to see the client's reset."""

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1000):
            writer.write(data)
            await writer.drain()
        writer.write_eof()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        their_reader, their_writer = await asyncio.open_connection("127.0.0.1", ollprox.port)
        with contextlib.suppress(ConnectionError):
            await asyncio.gather(copy(reader, their_writer), copy(their_reader, writer))
        their_writer.close()
        writer.close()
        closed.set()

    closed = asyncio.Event()
    userland = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = userland.sockets[0].getsockname()[1]
    async with waiting(port, ollama, question()):
        pass
    async with asyncio.timeout(8):
        await ollama.until(lambda: ollama.asked()[0].gone)
        await closed.wait()
    userland.close()


async def test_a_client_that_closes_after_its_half_close_frees_the_gpu(
    ollprox: Program, ollama: StandIn
) -> None:
    async with waiting(ollprox.port, ollama, question()) as client:
        client.writer.write_eof()
        assert await client.reader.readexactly(1) == b"H"
    async with asyncio.timeout(5):
        await ollama.until(lambda: ollama.asked()[0].gone)


async def test_empty_lines_are_no_way_to_stay(launch: Start) -> None:
    ollprox = await launch(HEAD_TIMEOUT=0.3)
    for data, status in ((b"\r\n" + GOOD, 200), (b"\r\n\r\n" + GOOD, 400)):
        for step in (1, 2, 1000):
            async with Client(ollprox.port) as client:
                for start in range(0, len(data), step):
                    client.writer.write(data[start : start + step])
                    await asyncio.sleep(0)
                assert (await client.head()).status == status
    async with Client(ollprox.port) as client:
        await client.send(b"\r\n")
        assert (await client.reader.read()) == b""  # it did not begin a request in time


async def test_a_malformed_chunk_of_an_upload_is_the_clients_fault(launch: Start) -> None:
    ollprox = await launch(ADMIN_LABELS="tester")
    head = request("POST", "/api/create", b"", {"Transfer-Encoding": "chunked"})
    assert await statuses(ollprox.port, head + b"5\r\nhello\r\n5 \r\nhello\r\n") == [400]
