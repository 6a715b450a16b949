"""Request ids, and the log: the same fields as text and as JSON, one line each."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
from client import KEY, Client, ask, question, raw, request
from conftest import Program, Start
from standin import Seen, StandIn

from record import Record
from watch.telemetry import format_as_json, format_record

FIELDS = ["id", "client", "key", "method", "path", "model", "status", "cache", "bytes"]
FIELDS += ["queued", "first_byte", "total"]
MADE = re.compile(r"[0-9a-f]{8}-[0-9a-f]+")  # an id of OllProx's own
ID = "X-Request-ID"


def lines_of(text: str) -> list[dict[str, Any]]:
    """The log's lines; what is said at the start is no part of it."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def accesses(program: Program) -> list[dict[str, Any]]:
    return [line for line in lines_of(program.text()) if line["message"] == "access"]


# Request ids.


@pytest.mark.parametrize(
    "given", ["a", "-", "0af7651916cd43dd8448eb211c80319c", "a.b:c/d=e+f@_", "x" * 128]
)
async def test_a_sane_id_goes_all_the_way(ollprox: Program, ollama: StandIn, given: str) -> None:
    ollama.script.hold_before = 1
    async with Client(ollprox.port) as first, Client(ollprox.port) as second:
        miss = await first.begin("POST", "/api/generate", question(), {ID: given})
        joined = await second.begin("POST", "/api/generate", question(), {ID: f"J{given[1:]}"})
        assert joined.headers["x-request-id"] == f"J{given[1:]}"
        ollama.script.let_go.set()
        await first.rest(miss)
        await second.rest(joined)
    hit = await ask(ollprox.port, "POST", "/call_model", question(), {ID: given})
    listed = await ask(ollprox.port, "GET", "/api/tags", headers={ID: given})
    for answer in (miss, hit, listed):
        assert answer.headers["x-request-id"] == given
        assert answer.head.lower().count(b"x-request-id") == 1
    assert [seen.header(ID) for seen in ollama.asked("/api/generate")] == [given]
    assert ollama.asked("/api/tags")[-1].header(ID) == given
    await ollprox.stop()
    assert ollprox.text().count(f" access id={given} ") == 3


@pytest.mark.parametrize(
    "given",
    [
        None,
        "",
        "x" * 129,
        "two words",
        "a,b",
        'quo"te',
        "back\\slash",
        "{brace}",
        "semi;colon",
        "caf\xe9",
        "tab\there",
        "one\r\nX-Request-ID: two",
        "same\r\nX-Request-ID: same",
        KEY,
        f"before-{KEY}-after",
    ],
)
async def test_an_id_that_is_not_sane_is_replaced(
    ollprox: Program, ollama: StandIn, given: str | None
) -> None:
    headers = {} if given is None else {ID: given}
    answers = [
        await ask(ollprox.port, "POST", "/call_model", question(), headers) for _ in range(2)
    ]
    made = [answer.headers["x-request-id"] for answer in answers]
    assert all(map(MADE.fullmatch, made))
    assert made[0] != made[1]
    (seen,) = ollama.asked()
    assert [value for name, value in seen.headers if name.lower() == ID.lower()] == made[:1]
    await ollprox.stop()
    assert [f"access id={one} " in ollprox.text() for one in made] == [True, True]
    if given:
        assert given not in ollprox.text()


async def test_a_short_key_is_no_id(launch: Start, ollama: StandIn, tmp_path: Path) -> None:
    path = tmp_path / "short-keys.txt"
    path.write_text("mary7\n")
    ollprox = await launch(API_KEY_FILE=path)
    for name, value in (("APIKEY", "mary7"), ("Authorization", "Bearer mary7")):
        headers = {"APIKEY": "", ID: "mary7", "X-Copy": "mary7", name: value}
        answer = await ask(ollprox.port, "GET", "/api/ps", headers=headers)
        assert answer.status == 200
        assert MADE.fullmatch(answer.headers["x-request-id"])
    assert all(b"mary7" not in seen.raw for seen in ollama.seen)
    await ollprox.stop()
    assert "mary7" not in ollprox.text()


async def test_errors_have_an_id_too(launch: Start, ollama: StandIn) -> None:
    ollprox = await launch(LOG_LEVEL="DEBUG")
    sane = {ID: "mine"}
    ollama.script.break_after = 0
    for method, path, body, headers, status in (
        ("POST", "/call_model", question(), {}, 502),
        ("POST", "/call_model", b"{", {}, 400),
        ("POST", "/call_model", None, {"APIKEY": "wrong"}, 401),
        ("POST", "/api/pull", None, {}, 403),
        ("GET", "/nope", None, {}, 404),
        ("GET", "/health", None, {}, 200),
        ("GET", "/metrics", None, {}, 200),
    ):
        answer = await ask(ollprox.port, method, path, body, {**headers, **sane})
        assert (answer.status, answer.headers["x-request-id"]) == (status, "mine")
    made = []
    for head in (b"no head", b"GET / HTTP/1.1\r\nX-Request-ID: mine", b"GET / HTTP/9\r\nHost: a"):
        reply = await raw(ollprox.port, head + b"\r\n\r\n")
        assert reply.startswith(b"HTTP/1.1 400 ")
        (found,) = re.findall(rb"\r\nX-Request-ID: ([^\r]*)\r\n", reply)
        made.append(found.decode())
    assert all(map(MADE.fullmatch, made))
    assert len(set(made)) == 3
    await ollprox.stop()
    assert ollprox.text().count("access id=mine ") == 7
    assert all(f"access id={one} " in ollprox.text() for one in made)


async def test_an_id_of_upstreams_own_is_not_passed_on(ollprox: Program, ollama: StandIn) -> None:
    async def respond(seen: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nx-request-id: theirs\r\nContent-Length: 2\r\n\r\n{}")

    ollama.script.respond = respond
    answer = await ask(ollprox.port, "GET", "/api/ps", headers={ID: "mine"})
    assert re.findall(rb"(?i)x-request-id: (.*)\r", answer.head) == [b"mine"]


async def test_a_page_may_read_the_id(launch: Start) -> None:
    origin = "https://chat.example"
    ollprox = await launch(CORS_ORIGINS=origin)
    for key, status in ((KEY, 200), ("wrong", 401)):
        headers = {"Origin": origin, "APIKEY": key}
        answer = await ask(ollprox.port, "GET", "/api/ps", headers=headers)
        assert answer.status == status
        exposed = answer.headers["access-control-expose-headers"].split(", ")
        assert "X-Request-ID" in exposed


# The log.


async def use(ollprox: Program, ollama: StandIn) -> None:
    """Requests of many kinds, one after the other."""
    odd = 'evil"\\\n\r\x1b[31m\u2028 status=200 {"id": 1}'
    for method, path, body, headers in (
        ("POST", "/call_model?secret=1", question("a prompt"), {ID: "miss"}),
        ("POST", "/call_model", question("a prompt"), {ID: "hit"}),
        ("POST", "/call_model", question(model=odd), {ID: "odd"}),
        ("POST", "/call_model", question(model=odd + "x" * 1000), {ID: "long"}),
        ("GET", "/api/tags", None, {ID: "bypass"}),
        ("GET", "/nope", None, {ID: "404"}),
        ("BREW", "/api/tags", None, {ID: "brew"}),
        ("GET", "/api/tags", None, {ID: "none", "APIKEY": ""}),
        ("GET", "/api/tags", None, {ID: "wrong", "APIKEY": "a-wrong-key"}),
        ("GET", "/health", None, {ID: "probe"}),
    ):
        await ask(ollprox.port, method, path, body, headers)
    await raw(ollprox.port, b"\r\n\r\nfoo\r\n\r\n")
    ollama.script.hold_head = True
    async with Client(ollprox.port) as client:
        await client.send(request("POST", "/api/chat", question("gone", messages=[1])))
        await ollama.until(lambda: ollama.generating > 0)
    await ollama.until(lambda: ollama.seen[-1].gone)


@pytest.fixture
def awkward_keys(tmp_path: Path) -> Path:
    path = tmp_path / "awkward-keys.txt"
    path.write_text(f'{KEY}  # te"s\\ter 鍵\n')
    return path


async def test_both_formats_have_the_same_fields(
    launch: Start, ollama: StandIn, awkward_keys: Path
) -> None:
    settings = {"API_KEY_FILE": awkward_keys, "LOG_LEVEL": "DEBUG"}
    as_text = await launch(**settings)
    await use(as_text, ollama)
    ollama.script.hold_head = False
    as_json = await launch(**settings, LOG_FORMAT="json")
    await use(as_json, ollama)
    for program in (as_text, as_json):
        await program.stop()
    found = accesses(as_json)
    texts = [
        re.findall(r' ([a-z_]+)=("(?:[^"\\]|\\.)*"|\S+)', line)
        for line in as_text.text().splitlines()
        if " access " in line
    ]
    assert len(found) == len(texts) == 12
    for line, text in zip(found, texts, strict=True):
        assert list(line) == ["time", "level", "message", *FIELDS]
        assert [name for name, _ in text] == FIELDS
        for name, value in text:
            said = json.loads(value) if value.startswith('"') else value
            salted = re.fullmatch("[0-9a-f]{8}", str(line["key"]))  # by a salt of this run
            if name in {"status", "method", "path", "model", "cache", *([] if salted else ["key"])}:
                assert said == ("-" if line[name] is None else str(line[name]))
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
        assert line["level"] == ("DEBUG" if line["path"] == "/health" else "INFO")
        for name in ("status", "bytes"):
            assert type(line[name]) is int
        assert line["total"] >= (line["first_byte"] or 0) >= 0
    by_id = {line["id"]: line for line in found}
    assert by_id["miss"]["key"] == 'te"s\\ter 鍵'
    assert by_id["miss"]["path"] == "/call_model"
    assert {name: line["cache"] for name, line in by_id.items() if line["cache"]} == {
        "miss": "miss",
        "hit": "hit",
        "odd": "miss",
        "long": "miss",
        "bypass": "bypass",
        found[-1]["id"]: "miss",
    }
    assert by_id["odd"]["model"].startswith('evil"\\\n\r\x1b[31m\u2028 status')
    assert len(by_id["long"]["model"]) == 100
    assert by_id["brew"]["method"] == "other"
    assert by_id["404"]["path"] is None
    assert by_id["none"]["key"] is None
    assert re.fullmatch("[0-9a-f]{8}", by_id["wrong"]["key"])
    assert (found[-1]["status"], found[-1]["first_byte"]) == (499, None)
    for program in (as_text, as_json):
        for secret in (KEY, "a-wrong-key", "secret", "a prompt", "\x1b", "\u2028", "\r"):
            assert secret not in program.text()


async def test_polls_are_logged_at_debug_and_wrong_keys_at_info(launch: Start) -> None:
    ollprox = await launch(LOG_FORMAT="json", LOG_LEVEL="DEBUG")
    for path, key in (("/metrics", KEY), ("/metrics.json", KEY), ("/metrics", "a-wrong-key")):
        await ask(ollprox.port, "GET", path, headers={"APIKEY": key})
    await ask(ollprox.port, "DELETE", "/cache")
    await ollprox.stop()
    found = [(line["path"], line["status"], line["level"]) for line in accesses(ollprox)]
    assert found == [
        ("/metrics", 200, "DEBUG"),
        ("/metrics.json", 200, "DEBUG"),
        ("/metrics", 401, "INFO"),
        ("/cache", 403, "INFO"),
    ]


def test_the_seconds_in_the_queue_are_logged() -> None:
    record = Record("127.0.0.1")
    assert b" queued=- " in format_record(record)
    assert json.loads(format_as_json(record))["queued"] is None
    record.queued = 1.25
    assert b" queued=1.2500 " in format_record(record)
    assert json.loads(format_as_json(record))["queued"] == 1.25


async def test_every_line_of_a_json_log_is_an_object(launch: Start, key_file: Path) -> None:
    """Those that are no access lines as well; the start is told on standard output."""
    ollprox = await launch(
        LOG_FORMAT="json",
        LOG_LEVEL="DEBUG",
        KEY_REFRESH="0.05",
    )
    await ollprox.says("answers at")
    key_file.write_text(f"{KEY}\nshort\n")
    await ollprox.says("shorter than")
    key_file.unlink()
    await ollprox.says("cannot be read")
    for _ in range(12):
        await ask(ollprox.port, "GET", "/api/tags", headers={"APIKEY": "wrong"})
    await ollprox.says("wrong API keys")
    await ollprox.stop()
    text = ollprox.text()
    others = [line for line in text.splitlines() if not line.startswith("{")]
    assert len(others) == 6  # what the start says
    lines = lines_of(text)
    assert all(list(line)[:3] == ["time", "level", "message"] for line in lines)
    levels = {line["level"]: line["message"] for line in lines}
    assert set(levels) == {"DEBUG", "INFO", "WARNING", "ERROR"}
    assert "cannot be read" in levels["ERROR"]


async def test_what_ollama_says_of_itself_stays_on_its_line(launch: Start, ollama: StandIn) -> None:
    async def respond(seen: Seen, writer: asyncio.StreamWriter) -> None:
        body = rb'{"version": "1\n2026 \u001b[31m"}'
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
        writer.write(head + body)

    ollama.script.respond = respond
    ollprox = await launch()
    line = (await ollprox.says(r"Ollama .*\n"))[0]
    assert line == rf'Ollama "1\n2026 \u001b[31m" answers at 127.0.0.1:{ollama.port}' + "\n"


async def test_what_ollama_did_wrong_is_a_warning(launch: Start) -> None:
    """The access line has only the status; a client's own fault is no warning."""
    ollprox = await launch(OLLAMA_PORT=1, MODEL_REFRESH=0)
    assert (await ask(ollprox.port, "POST", "/call_model", b"[]")).status == 400
    assert (await ask(ollprox.port, "POST", "/call_model", question())).status == 502
    await ollprox.says(r"WARNING an answer failed: Ollama at 127\.0\.0\.1:1 cannot be reached")
    assert ollprox.text().count("an answer failed") == 1
