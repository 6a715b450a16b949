"""All routes: which exist, who may use them, and how OllProx behaves as a proxy."""

import asyncio
import base64
import hashlib
import json
import re
from pathlib import Path

import pytest
from client import KEY, Client, ask, question, request
from conftest import SOURCES, Program, Start
from parts import OneBody, make_head, make_proxy, make_upstream
from standin import Seen, StandIn

from answers.ollama_api import Access, Form, Route, Upload, route_table
from answers.questions import PassThrough
from record import Record

ADMIN = "an-admin-key-for-tests"
BOSS = {"APIKEY": ADMIN}
CHAT = {"model": "llama2", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys.txt"
    path.write_text(f"{KEY}  # tester\n{ADMIN}  # boss\n")
    return path


@pytest.fixture
def settings(keys: Path) -> dict[str, object]:
    return {"API_KEY_FILE": keys, "ADMIN_LABELS": "root, boss"}


# The table.


async def test_a_row_is_all_that_a_route_needs() -> None:
    """A row is added to the table, and used; no path stands anywhere else."""
    table = route_table(1 << 20)
    table.rows[b"/api/brand-new"] = Route(
        (b"POST",), b"/api/upstream-of-it", PassThrough("prompt", samples=False), form=Form.OPENAI
    )
    standin = StandIn()

    async def respond(seen: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 17\r\n\r\n" + b'{"embedding":[1]}')

    standin.script.respond = respond
    port = await standin.start()
    made = make_proxy(make_upstream(port), routes=table)
    head = make_head(path=b"/api/brand-new", length=14)
    outcomes = []
    for _ in range(2):
        record = Record("-")
        response = await made.proxy.handle(OneBody(head, b'{"prompt": 1 }'), record)
        assert response.body == b'{"embedding":[1]}'
        outcomes.append(record.outcome)
    assert outcomes == ["miss", "hit"]
    assert [seen.path for seen in standin.seen] == ["/api/upstream-of-it"]
    await made.upstream.close()
    await standin.stop()


def test_no_path_stands_outside_the_table() -> None:
    for file in SOURCES:
        text = file.read_text()
        if file.name != "ollama_api.py":
            for path in ("/api/", "/v1/"):
                assert f'"{path}' not in text, file


async def test_reading_needs_a_key_and_no_more(
    launch: Start, ollama: StandIn, settings: dict[str, object]
) -> None:
    ollprox = await launch(**settings)
    async with Client(ollprox.port) as client:
        for path in ("/", "/api/version", "/api/tags", "/api/ps", "/v1/models"):
            for method in ("GET", "HEAD"):
                answer = await client.ask(method, path)
                assert (answer.status, answer.cache_status) == (200, "OllProx; fwd=bypass")
                assert int(answer.headers["content-length"]) > 0
        for name in ("gemma3:270m", "hf.co%2Fuser%2Fgemma", "me/gemma3"):
            answer = await client.ask("GET", f"/v1/models/{name}")
            assert answer.json()["id"] == name
        answer = await client.ask("POST", "/api/show", {"model": "gemma3:270m"})
        assert answer.status == 200
        assert (await client.ask("GET", "/", headers={"APIKEY": ""})).status == 401


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/",
        "/v1/models/..",
        "/v1/models/../../api/delete",
        "/v1/models/%2e%2e/x",
        "/v1/models//x",
        "/v1/models/a%2F%2E%2E%2Fb",
        "/api/blobs/sha256:zz",
        "/api/blobs/../tags",
        "/api/nope",
        "/V1/models",
        "//v1/models",
    ],
)
async def test_anything_else_is_404(
    launch: Start, ollama: StandIn, settings: dict[str, object], path: str
) -> None:
    ollprox = await launch(**settings)
    answer = await ask(ollprox.port, "GET", path, headers=BOSS)
    assert answer.status == 404
    assert ollama.asked() == []


BLOB = "sha256:" + "0" * 64


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/pull"),
        ("POST", "/api/push"),
        ("POST", "/api/create"),
        ("POST", "/api/copy"),
        ("DELETE", "/api/delete"),
        ("POST", f"/api/blobs/{BLOB}"),
        ("HEAD", f"/api/blobs/{BLOB}"),
    ],
)
async def test_managing_models_is_for_admins(
    launch: Start, ollama: StandIn, settings: dict[str, object], method: str, path: str
) -> None:
    ollprox = await launch(**settings)
    body = None if method == "HEAD" else b' {"model": "x",  "Model":"y"}'
    answer = await ask(ollprox.port, method, path, body)
    assert answer.status == 403
    assert ollama.asked() == []
    answer = await ask(ollprox.port, method, path, body, BOSS)
    assert answer.status == 200
    (seen,) = ollama.asked()
    assert (seen.method, seen.path, seen.body) == (method, path, body or b"")
    assert ADMIN.encode() not in seen.raw


async def test_an_upload_passes_unbuffered_and_byte_for_byte(
    launch: Start, ollama: StandIn, settings: dict[str, object]
) -> None:
    got = hashlib.sha256()
    sizes = []

    async def swallow(reader: asyncio.StreamReader, size: int | None) -> None:
        while data := await reader.read(1 << 16):
            got.update(data)
            sizes.append(len(data))
            if size is not None and sum(sizes) >= size:
                return

    ollama.script.swallow = swallow
    ollprox = await launch(measured=True, MAX_BODY_BYTES="1K", **settings)
    piece, count = bytes(range(256)) * 256, 640  # 40 MiB
    async with Client(ollprox.port) as client:
        await client.ask("GET", "/health")
        before = ollprox.resident("VmHWM")
        headers = {**BOSS, "Content-Length": str(len(piece) * count)}
        await client.send(request("POST", f"/api/blobs/{BLOB}", b"", headers))
        for _ in range(count):
            await client.send(piece)
        assert (await client.rest(await client.head())).status == 200
        assert ollprox.resident("VmHWM") - before < 8 << 20
    assert got.digest() == hashlib.sha256(piece * count).digest()


async def test_progress_comes_as_it_goes_and_the_digests_are_read_again(
    launch: Start, ollama: StandIn, settings: dict[str, object]
) -> None:
    ollprox = await launch(**settings, MODEL_REFRESH=3600)
    await ollama.until(lambda: any(seen.path == "/api/tags" for seen in ollama.seen))
    await ask(ollprox.port, "POST", "/call_model", question())
    ollama.script.hold_before = 1
    async with Client(ollprox.port) as client:
        answer = await client.begin("POST", "/api/pull", {"model": "llama2"}, BOSS)
        chunks = client.chunks(answer)
        assert json.loads(await anext(chunks)) == {"status": "pulling manifest"}
        ollama.script.models = {"llama2:latest": "c" * 64}
        ollama.script.let_go.set()
        assert [chunk async for chunk in chunks]
    assert answer.complete
    await ollprox.says("2 models have changed|1 models have changed")
    again = await ask(ollprox.port, "POST", "/call_model", question())
    assert "fwd=miss" in again.cache_status


async def test_an_upload_that_ollama_refuses_early(
    launch: Start, ollama: StandIn, settings: dict[str, object]
) -> None:
    async def swallow(reader: asyncio.StreamReader, size: int | None) -> None:
        await reader.read(1)

    ollama.script.swallow = swallow
    ollama.script.raw = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\n\r\nno"
    ollprox = await launch(**settings)
    async with Client(ollprox.port) as client:
        headers = {**BOSS, "Content-Length": str(1 << 30)}
        await client.send(request("POST", f"/api/blobs/{BLOB}", b"x" * 1000, headers))
        answer = await client.rest(await client.head())
    assert (answer.status, answer.body) == (400, b"no")


# /v1.


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", {**CHAT, "stream": True}),
        (
            "/v1/chat/completions",
            {**CHAT, "stream": True, "stream_options": {"include_usage": True}},
        ),
        ("/v1/completions", question()),
        ("/v1/completions", question(stream=True)),
        ("/v1/embeddings", {"model": "llama2", "input": "a"}),
    ],
)
async def test_v1_is_cached_each_as_it_came(
    ollprox: Program, ollama: StandIn, path: str, body: dict[str, object]
) -> None:
    miss = await ask(ollprox.port, "POST", path, body)
    hit = await ask(ollprox.port, "POST", path, body)
    assert miss.status == 200
    assert miss.body == hit.body
    assert miss.headers["content-type"] == hit.headers["content-type"]
    assert "hit" in hit.cache_status
    assert len(ollama.asked()) == 1
    assert ollama.asked()[0].json() == body
    if body.get("stream"):
        assert miss.body.endswith(b"data: [DONE]\n\n")


RECORDED = Path(__file__).parent / "traces-0.33"


@pytest.mark.parametrize("form", ["stream", "nonstream"])
@pytest.mark.parametrize(
    ("path", "name"),
    [("/v1/responses", "openai-responses"), ("/v1/messages", "anthropic-messages")],
)
async def test_the_other_apis_are_cached_if_complete(
    ollprox: Program, ollama: StandIn, path: str, name: str, form: str
) -> None:
    """What the repeat guard ended is passed on as it is, and asked for again."""
    for trace, stored in ((f"{name}-{form}", True), (f"{name}-repeat-guard-{form}", False)):
        body = (RECORDED / f"{trace}.request").read_bytes().partition(b"\r\n\r\n")[2]
        ollama.script.raw = (RECORDED / f"{trace}.response").read_bytes()
        miss = await ask(ollprox.port, "POST", path, body)
        again = await ask(ollprox.port, "POST", path, body)
        assert (miss.status, miss.complete, again.body) == (200, True, miss.body)
        assert miss.cache_status.startswith("OllProx; fwd=miss")
        assert ("hit" in again.cache_status) is stored


@pytest.mark.parametrize("more", [{"store": True}, {"previous_response_id": "resp_1"}])
async def test_a_response_that_keeps_state_is_only_passed_on(
    ollprox: Program, ollama: StandIn, more: dict[str, object]
) -> None:
    for _ in range(2):
        body = {"model": "llama2", "input": "x", **more}
        answer = await ask(ollprox.port, "POST", "/v1/responses", body)
        assert (answer.status, answer.cache_status) == (200, "OllProx; fwd=bypass")
    assert len(ollama.asked()) == 2


async def test_a_v1_stream_that_broke_is_not_taken_for_whole(
    ollprox: Program, ollama: StandIn
) -> None:
    """The trace: no `finish_reason`, no `[DONE]`, and a clean end of the body."""
    trace = Path(__file__).parent / "traces/openai-chat-stream-runner-killed.response"
    ollama.script.raw = trace.read_bytes()
    body = {**CHAT, "stream": True}
    async with Client(ollprox.port) as client:
        answer = await client.begin("POST", "/v1/chat/completions", body)
        await client.rest(answer)
        assert not answer.complete
    *_, last, end = answer.body.split(b"\n\n")
    assert end == b""
    assert "runner" in json.loads(last.removeprefix(b"data: "))["error"]["message"]
    await ask(ollprox.port, "POST", "/v1/models")
    ollama.script.raw = None
    again = await ask(ollprox.port, "POST", "/v1/chat/completions", body)
    assert again.cache_status == "OllProx; fwd=miss"


async def test_hanging_up_at_done_keeps_the_answer(ollprox: Program, ollama: StandIn) -> None:
    ollama.script.hold_end = True
    body = {**CHAT, "stream": True}
    async with Client(ollprox.port) as client:
        answer = await client.begin("POST", "/v1/chat/completions", body)
        async for _ in client.chunks(answer):
            if b"[DONE]" in answer.body:
                break
    await ollama.until(lambda: ollama.asked()[0].gone)
    ollama.script.hold_end = False
    hit = await ask(ollprox.port, "POST", "/v1/chat/completions", body)
    assert "hit" in hit.cache_status
    assert hit.body == answer.body


async def test_errors_have_the_form_of_the_api_that_was_called(ollprox: Program) -> None:
    none = {"APIKEY": ""}
    answer = await ask(ollprox.port, "POST", "/v1/chat/completions", CHAT, none)
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    answer = await ask(ollprox.port, "POST", "/v1/nope", CHAT)
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    answer = await ask(ollprox.port, "POST", "/v1/messages", b"no json")
    assert (answer.status, answer.json()["type"]) == (400, "error")
    assert set(answer.json()["error"]) == {"type", "message"}
    answer = await ask(ollprox.port, "POST", "/v1/chat/completions", {**CHAT, "model": "nope"})
    assert answer.json()["error"]["message"] == "model 'nope' not found"


# Every way to send a key.


async def test_every_way_to_send_a_key(
    launch: Start, ollama: StandIn, settings: dict[str, object]
) -> None:
    ollprox = await launch(**settings, API_KEY_IN_PATH="true")
    none = {"APIKEY": ""}
    basic = base64.b64encode(f"anyone:{KEY}".encode()).decode()
    for path, headers in (
        ("/api/tags", {"APIKEY": KEY}),
        ("/api/tags", {"X-API-Key": KEY}),
        ("/api/tags", {"api-key": KEY}),
        ("/api/tags", {"Authorization": f"Bearer {KEY}"}),
        ("/api/tags", {"Authorization": f"Basic {basic}"}),
        (f"/key/{KEY}/api/tags", {}),
        (f"/key/{KEY}/api/tags", {"Authorization": "Bearer dummy", "APIKEY": "wrong"}),
        (f"/key/{KEY}", {}),
        (f"/key/{KEY}/", {}),
    ):
        assert (await ask(ollprox.port, "GET", path, headers=none | headers)).status == 200, path
    beside = await ask(ollprox.port, "GET", "/key/wrong-key/api/tags", headers={"APIKEY": KEY})
    assert beside.status == 200
    answer = await ask(ollprox.port, "POST", f"/key/{KEY}/api/generate", question(), none)
    assert len(answer.lines()) == 6


async def test_a_key_in_the_path_is_cut_off_even_where_it_does_not_count(
    ollprox: Program, ollama: StandIn
) -> None:
    none = {"APIKEY": ""}
    path = f"/key/{KEY}/api/tags"
    assert (await ask(ollprox.port, "GET", path, headers=none)).status == 401
    assert (await ask(ollprox.port, "GET", path)).status == 200
    assert KEY not in ollprox.text()
    assert all(KEY.encode() not in seen.raw for seen in ollama.seen)


async def test_a_marked_key_is_seen_nowhere(launch: Start, ollama: StandIn, tmp_path: Path) -> None:
    marked = "MARKED-key-0123456789"
    path = tmp_path / "marked-keys.txt"
    path.write_text(marked)
    ollprox = await launch(API_KEY_FILE=path, LOG_LEVEL="DEBUG", API_KEY_IN_PATH="1")
    basic = base64.b64encode(f"u:{marked}".encode()).decode()
    ways = [
        ("", f"APIKEY: {marked}"),
        ("", f"X-API-Key: {marked}"),
        ("", f"Authorization: Bearer {marked}"),
        ("", f"Authorization: Basic {basic}"),
        (f"/key/{marked}", "X: y"),
    ]
    replies = b""
    for prefix, header in ways:
        for line, more in (
            (f"GET {prefix}/api/tags HTTP/1.1", ""),
            (f"GET {prefix}/api/tags HTTP/1.1", f"X-Copy: {marked}\r\n"),
            (f"GET {prefix}/nope HTTP/1.1", ""),
            (f"POST {prefix}/api/copy HTTP/1.1", ""),
            (f"POST {prefix}/call_model HTTP/1.1", "Content-Length: 2\r\n"),
            (f"GET {prefix}/api/tags HTTP/1.1", "Host: twice\r\n"),
            (f"GET {prefix}/api/tags HTTP/9", ""),
            (f"GET {prefix}/api/tags", ""),
            (f"GET http://x{prefix}/ HTTP/1.1", ""),
            (f"GET {prefix}/api/tags HTTP/1.1", "bad header\r\n"),
        ):
            text = f"{line}\r\nHost: a\r\n{more}{header}\r\nConnection: close\r\n\r\n[]"
            async with Client(ollprox.port) as client:
                await client.send(text.encode())
                reply = await client.reader.read()
                assert reply.startswith(b"HTTP/1.1 ")
                replies += reply
    await ollprox.stop()
    upstream = b"".join(seen.raw for seen in ollama.seen)
    assert upstream.count(b"GET /api/tags") >= 5
    for seen_of_it in (replies, upstream, ollprox.log.read_bytes()):
        assert b"MARKED" not in seen_of_it
        assert basic.encode() not in seen_of_it


# Browsers.


async def test_without_cors_a_browser_is_told_nothing(ollprox: Program) -> None:
    headers = {"Origin": "https://chat.example"}
    answer = await ask(ollprox.port, "GET", "/api/tags", headers=headers)
    assert not [name for name in answer.headers if name.startswith("access-control")]
    preflight = {**headers, "APIKEY": "", "Access-Control-Request-Method": "POST"}
    answer = await ask(ollprox.port, "OPTIONS", "/api/generate", headers=preflight)
    assert (answer.status, answer.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize(
    "listed", ["https://other.example, https://chat.example", "https://*.example", "*"]
)
async def test_a_listed_origin_may_ask(
    launch: Start, ollama: StandIn, settings: dict[str, object], listed: str
) -> None:
    ollprox = await launch(**settings, CORS_ORIGINS=listed)
    headers = {"Origin": "https://chat.example", "APIKEY": ""}
    preflight = {
        **headers,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "apikey,x-stainless-os",
    }
    answer = await ask(ollprox.port, "OPTIONS", "/api/generate", headers=preflight)
    assert (answer.status, answer.body) == (204, b"")
    assert answer.headers["access-control-allow-headers"] == "apikey,x-stainless-os"
    assert answer.headers["access-control-allow-methods"] == "POST"
    for path, key, status in (
        ("/api/tags", "", 401),
        ("/nope", KEY, 404),
        ("/api/tags", KEY, 200),
    ):
        answer = await ask(ollprox.port, "GET", path, headers={**headers, "APIKEY": key})
        assert answer.status == status
        assert answer.headers["access-control-allow-origin"] == "https://chat.example"
        assert answer.headers["vary"] == "Origin"
        assert "Cache-Status" in answer.headers["access-control-expose-headers"]
    assert all(seen.header("origin") is None for seen in ollama.seen)


async def test_an_origin_that_is_not_listed_may_not(
    launch: Start, ollama: StandIn, settings: dict[str, object]
) -> None:
    ollprox = await launch(**settings, CORS_ORIGINS="https://chat.example")
    for origin in ("https://evil.example", "null", "https://chat.example.evil"):
        headers = {"Origin": origin}
        answer = await ask(ollprox.port, "GET", "/api/tags", headers=headers)
        assert answer.status == 200
        assert "access-control-allow-origin" not in answer.headers
        preflight = {**headers, "Access-Control-Request-Method": "GET"}
        answer = await ask(ollprox.port, "OPTIONS", "/api/tags", headers=preflight)
        assert answer.status == 405


# A proxy's manners.


async def test_hop_by_hop_headers_stop_here(ollprox: Program, ollama: StandIn) -> None:
    headers = {
        "Connection": "keep-alive, X-Private",
        "X-Private": "1",
        "X-Public": "2",
        "Keep-Alive": "5",
        "TE": "trailers",
        "Upgrade": "h2c",
        "Proxy-Authorization": "Basic eHg=",
        "X-Forwarded-For": "10.0.0.1",
        "X-Forwarded-Host": "evil",
        "Forwarded": "for=10.0.0.1",
        "X-Real-IP": "10.0.0.1",
        "Accept-Encoding": "gzip",
        "Cookie": "session=of-another-service",
        "Via": "1.1 other",
    }

    async def respond(seen: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: X-Secret\r\nX-Secret: 1\r\n"
            b"Keep-Alive: 5\r\nRetry-After: 2\r\n\r\n{}"
        )

    ollama.script.respond = respond
    answer = await ask(ollprox.port, "GET", "/api/ps", headers=headers)
    seen = ollama.asked("/api/ps")[0]
    assert seen.header("host") == f"127.0.0.1:{ollama.port}"
    assert seen.header("x-public") == "2"
    assert seen.header("via") == f"1.1 other, {answer.headers['via']}"
    for name in (set(headers) | {"APIKEY"}) - {"X-Public", "Via"}:
        assert seen.header(name) is None, name
    assert answer.headers["retry-after"] == "2"
    assert re.fullmatch("1.1 OllProx-[0-9a-f]{16}", answer.headers["via"])
    assert "x-secret" not in answer.headers
    assert "keep-alive" not in answer.headers
    assert "client=127.0.0.1" in (await ollprox.says(".* path=/api/ps .*"))[0]


async def test_a_request_that_goes_in_a_circle_is_508(ollprox: Program, ollama: StandIn) -> None:
    ours = (await ask(ollprox.port, "GET", "/api/ps")).headers["via"]
    headers = {"Via": f"1.1 a, {ours}", "APIKEY": ""}
    answer = await ask(ollprox.port, "POST", "/call_model", question(), headers)
    assert answer.status == 508
    assert "OLLAMA_HOST" in answer.json()["error"]
    assert ollama.asked("/call_model", "/api/generate") == []


def test_who_may_what_is_said_by_the_table() -> None:
    rows = route_table(1).rows
    assert {path for path, row in rows.items() if row.access is Access.OPEN} == {
        b"/health",
        b"/ready",
        b"/dashboard",
    }


NAMES = {":digest": "sha256:" + "0" * 64, ":encodedKey": "c3NoLWVk_-", ":model": "me/m:latest"}
ROUTES = [
    line.split()
    for line in (Path(__file__).parent / "ollama-routes.txt").read_text().splitlines()
    if not line.startswith("#")
]


def done_with(row: Route) -> str:
    """What is done with a route, in the words of `ollama-routes.txt`."""
    if row.access is Access.ADMIN:
        return "admin"
    if row.access is Access.ANY_MODEL:
        assert row.upload is Upload.LIMITED
        return "media"
    body = b'{"model":"m","prompt":"p","messages":[1],"input":"p"}'
    if row.codec and row.codec.question(body, b"/").key:
        return "cached"
    return "passed" if row.access is Access.KEY else "open"


@pytest.mark.parametrize(("method", "path", "done"), ROUTES)
def test_each_route_of_ollama_is_in_the_table(method: str, path: str, done: str) -> None:
    for pattern, name in NAMES.items():
        path = path.replace(pattern, name)
    found = route_table(1).find(path.encode())
    assert found
    assert found[1] == path.encode()
    assert method.encode() in found[0].methods
    assert done_with(found[0]) == done


def test_the_table_has_no_routes_but_those_of_ollama_and_its_own() -> None:
    listed = {path.partition(":")[0] for _, path, _ in ROUTES} | {"/call_model"}
    assert {p.decode() for p, row in route_table(1).rows.items() if not row.page} == listed
