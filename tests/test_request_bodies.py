"""Bodies of requests: compressed, missing, with very many values, or streamed through."""

import asyncio
import gzip
import json
import zlib
from pathlib import Path

import pytest
from client import KEY, Client, ask, question, request
from conftest import Program, Start
from standin import StandIn

import wire.codings
from answers.questions import MAX_AT_ONCE, MAX_DIGITS, MAX_VALUES, is_quick
from wire.codings import coding_of, decompress
from wire.http11 import HTTPError

CHAT = {"model": "llama2", "messages": [{"role": "user", "content": "hi"}]}
GZIP = {"Content-Encoding": "gzip"}


def packed(body: object) -> bytes:
    return gzip.compress(json.dumps(body).encode())


# Compressed bodies.


async def test_a_compressed_body_asks_what_the_plain_one_asks(
    ollprox: Program, ollama: StandIn
) -> None:
    path = "/v1/chat/completions"
    miss = await ask(ollprox.port, "POST", path, packed(CHAT), GZIP)
    hit = await ask(ollprox.port, "POST", path, CHAT)
    assert (miss.status, hit.cache_status[:12]) == (200, "OllProx; hit")
    (seen,) = ollama.asked()
    assert (seen.json(), seen.header("content-encoding")) == (CHAT, None)


async def test_a_body_is_decompressed_for_ollama_where_no_answer_is_kept(
    ollprox: Program, ollama: StandIn
) -> None:
    body = {**CHAT, "input": "x"}
    answer = await ask(ollprox.port, "POST", "/v1/responses", packed(body), GZIP)
    assert answer.status == 200
    (seen,) = ollama.asked()
    assert (seen.json(), seen.header("content-encoding")) == (body, None)


@pytest.mark.parametrize(
    ("path", "coding", "says"),
    [
        ("/v1/chat/completions", "deflate", "gzip or zstd"),
        ("/v1/responses", "gzip, gzip", "only one"),
        ("/api/chat", "gzip", "without Content-Encoding"),
        ("/call_model", "zstd", "without Content-Encoding"),
    ],
)
async def test_other_codings_are_415_that_says_what_is_taken(
    ollprox: Program, ollama: StandIn, path: str, coding: str, says: str
) -> None:
    headers = {"Content-Encoding": coding}
    answer = await ask(ollprox.port, "POST", path, packed(CHAT), headers)
    assert answer.status == 415
    assert says in answer.body.decode()
    assert answer.headers["accept-encoding"]
    assert ollama.asked() == []


def test_without_zstd_the_setting_of_the_client_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wire.codings, "_zstd", None)
    with pytest.raises(HTTPError, match="enable_request_compression") as caught:
        coding_of(b"zstd", accepted=True)
    assert caught.value.status == 415


@pytest.mark.parametrize(
    ("value", "coding"), [(None, b""), (b"identity", b""), (b" GZIP ", b"gzip")]
)
def test_a_coding_is_read_in_any_case(value: bytes | None, coding: bytes) -> None:
    assert coding_of(value, accepted=True) == coding


def test_zstd_is_read_where_python_can() -> None:
    zstd = pytest.importorskip("compression.zstd")
    assert coding_of(b"zstd", accepted=True) == b"zstd"
    assert decompress(b"zstd", zstd.compress(b"x" * 1000), 1000) == b"x" * 1000
    with pytest.raises(HTTPError) as caught:
        decompress(b"zstd", zstd.compress(b"x" * 1001), 1000)
    assert caught.value.status == 413


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (gzip.compress(b"x" * 1000, mtime=0), 0),
        (gzip.compress(b"", mtime=0), 0),
        (gzip.compress(b"x" * 1001, mtime=0), 413),
        (gzip.compress(bytes(64 << 20), mtime=0), 413),
        (gzip.compress(b"x" * 100, mtime=0)[:-1], 400),
        (gzip.compress(b"x" * 100, mtime=0) + b"y", 400),
        (gzip.compress(b"x", mtime=0) * 100_000, 400),
        (b"", 400),
        (b"{}", 400),
        (zlib.compress(b"x"), 400),
    ],
)
def test_a_body_is_decompressed_within_a_limit(body: bytes, status: int) -> None:
    if not status:
        assert decompress(b"gzip", body, 1000) == gzip.decompress(body)
        return
    with pytest.raises(HTTPError) as caught:
        decompress(b"gzip", body, 1000)
    assert caught.value.status == status


async def test_a_small_body_that_becomes_large_costs_no_memory(launch: Start) -> None:
    ollprox = await launch(MAX_BODY_BYTES="1M")
    bomb = gzip.compress(bytes(256 << 20), 9)
    before = ollprox.resident("VmHWM")
    answer = await ask(ollprox.port, "POST", "/v1/chat/completions", bomb, GZIP)
    assert answer.status == 413
    assert ollprox.resident("VmHWM") - before < 16 << 20


# Bodies of very many values.


@pytest.mark.parametrize("value", [b"[]", b"{}", b'{"a":[1]}'])
async def test_a_body_of_very_many_values_is_413(
    ollprox: Program, ollama: StandIn, value: bytes
) -> None:
    count = MAX_VALUES + 1
    body = b'{"model":"llama2","prompt":"x","y":[%b]}' % b",".join([value] * count)
    async with Client(ollprox.port) as client:
        answer = await client.ask("POST", "/call_model", body)
        assert (answer.status, "values" in answer.json()["error"]) == (413, True)
        assert (await client.ask("POST", "/call_model", question())).status == 200


async def test_a_long_prompt_full_of_commas_is_answered(ollprox: Program, ollama: StandIn) -> None:
    body = question("1,2,[3],{4}\n" * MAX_VALUES)
    assert (await ask(ollprox.port, "POST", "/call_model", body)).status == 200
    assert ollama.asked()[0].json() == {**body, "stream": True}


async def test_many_large_bodies_leave_the_threads_that_keys_need(
    launch: Start, ollama: StandIn
) -> None:
    """The default pool resolves names and reads the key file; these bodies have their own."""
    ollprox = await launch(KEY_REFRESH=0.05, measured=True)
    bodies = [question("x" * (4 << 20), n=n) for n in range(40)]
    asked = [asyncio.create_task(ask(ollprox.port, "POST", "/call_model", b)) for b in bodies]
    await ollama.until(lambda: len(ollama.asked()) > 0)
    threads = len(list(Path(f"/proc/{ollprox.pid}/task").iterdir()))
    assert {answer.status for answer in await asyncio.gather(*asked)} == {200}
    assert threads <= 6


async def test_a_number_of_very_many_digits_is_400(ollprox: Program, ollama: StandIn) -> None:
    """To read and write 8,000 numbers of 4,000 digits takes seconds."""
    body = b'{"model":"llama2","prompt":"x","y":%b}'
    for digits, status in ((MAX_DIGITS, 200), (MAX_DIGITS + 1, 400)):
        number = b"-" + b"7" * digits
        answer = await ask(ollprox.port, "POST", "/call_model", body % number)
        assert answer.status == status
    assert "too long" in answer.json()["error"]
    assert ollama.asked()[0].body.endswith(b'7,"stream":true}')


def test_a_body_of_many_values_is_read_by_a_thread() -> None:
    """However few bytes they are: 20,000 lists hold up the event loop for some milliseconds."""
    values = MAX_AT_ONCE // len("[],")
    assert not is_quick(b"[%b]" % b",".join([b"[]"] * values))
    assert not is_quick(b" " * (MAX_AT_ONCE + 1))
    assert is_quick(b"[%b]" % b",".join([b'"text text text text"'] * 2000))


# Missing bodies.


@pytest.mark.parametrize("path", ["/call_model", "/api/chat", "/v1/chat/completions"])
async def test_a_missing_body_is_told_from_a_wrong_one(ollprox: Program, path: str) -> None:
    for body, status, says in (
        (None, 411, "no body: send JSON, as in curl -d"),
        (b"", 400, "the body is empty"),
        (b" \r\n", 400, "the body is empty"),
    ):
        answer = await ask(ollprox.port, "POST", path, body)
        assert answer.status == status
        assert says in answer.body.decode()


async def test_a_model_with_an_encoded_colon_is_found(ollprox: Program, ollama: StandIn) -> None:
    """The trace `openai-model-encoded`."""
    answer = await ask(ollprox.port, "GET", "/v1/models/llama2%3Alatest")
    assert answer.status == 200
    assert ollama.asked()[0].path == "/v1/models/llama2%3Alatest"


# Bodies that are streamed through.

FORM = {"Content-Type": "multipart/form-data; boundary=b"}


@pytest.mark.parametrize(
    "path", ["/v1/audio/transcriptions", "/v1/images/generations", "/v1/images/edits"]
)
async def test_media_pass_byte_for_byte_before_they_are_whole(
    ollprox: Program, ollama: StandIn, path: str
) -> None:
    came = asyncio.Event()
    got = bytearray()

    async def swallow(reader: asyncio.StreamReader, size: int | None) -> None:
        while size is None or len(got) < size:
            got.extend(await reader.read(1 << 16))
            came.set()

    ollama.script.swallow = swallow
    ollama.script.raw = b'HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n{"text":"hi"}'
    body = b"--b\r\n\xff\x00" + bytes(range(256)) * 1000
    async with Client(ollprox.port) as client:
        headers = {**FORM, "Content-Length": str(len(body))}
        await client.send(request("POST", path, b"", headers) + body[:1000])
        await came.wait()
        await client.send(body[1000:])
        answer = await client.rest(await client.head())
    assert (answer.status, answer.json()) == (200, {"text": "hi"})
    assert bytes(got) == body
    assert ollama.asked()[0].header("content-type") == FORM["Content-Type"]
    assert "bypass" in answer.cache_status


@pytest.mark.parametrize(
    "chunks", [b"", b"10001\r\n", b"10000\r\n" + b"x" * (64 << 10) + b"\r\n1\r\n"]
)
@pytest.mark.parametrize("path", ["/v1/audio/transcriptions", "/api/create"])
async def test_a_stream_beyond_the_limit_is_413_when_its_size_is_read(
    launch: Start, ollama: StandIn, tmp_path: Path, path: str, chunks: bytes
) -> None:
    keys = tmp_path / "boss.txt"
    keys.write_text(f"{KEY}  # boss\n")
    ollprox = await launch(API_KEY_FILE=keys, ADMIN_LABELS="boss", MAX_BODY_BYTES="64K")

    async def swallow(reader: asyncio.StreamReader, size: int | None) -> None:
        while await reader.read(1 << 16):
            pass

    ollama.script.swallow = swallow
    async with Client(ollprox.port) as client:
        if chunks:
            head = request("POST", path, b"", {"Transfer-Encoding": "chunked"})
            await client.send(head + chunks)
        else:
            await client.send(request("POST", path, b"", {"Content-Length": "65537"}))
        answer = await client.rest(await client.head())
    assert answer.status == 413
    assert "MAX_BODY_BYTES" in answer.body.decode()
