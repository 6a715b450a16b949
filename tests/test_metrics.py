"""The metrics, with exact numbers; Prometheus's own parser reads `/metrics`."""

import asyncio
import contextlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from client import KEY, Client, ask, question, raw, request, waiting
from conftest import Program, Start
from parts import make_proxy
from prometheus_client.parser import text_string_to_metric_families
from standin import USAGE, Seen, StandIn

from access.rights import Limit, make_key
from answers.limits import Standing
from answers.turns import Refusal, Snapshot, Waiting
from record import Outcome, Record
from watch.metrics import MAX_RECENT, Metrics, UpstreamState, Viewer
from watch.telemetry import MAX_SHOWN

BOSS = "the-key-of-an-admin"
OTHER = "the-key-of-another"
GPU = (1997003809 + 4337626101) / 1e9  # seconds of each of the stand-in's answers
LINES, PROMPT, TOKENS = 6, 15, 5  # of each of them: lines, tokens of prompt and answer
OUTCOMES = ("hit", "miss", "collapsed", "bypass", "refused")
KINDS = ("unreachable", "timeout", "broken", "protocol", "status", "reported", "incomplete")


class Numbers:
    """What `/metrics` has said."""

    def __init__(self, text: str) -> None:
        self.values: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        for family in text_string_to_metric_families(text):
            assert family.documentation
            assert family.type in {"counter", "gauge", "histogram"}
            for sample in family.samples:
                index = sample.name, frozenset(sample.labels.items())
                assert index not in self.values, index
                self.values[index] = sample.value

    def __call__(self, name: str, **labels: object) -> float:
        """The sum of a metric's samples that have these labels."""
        name = f"ollprox_{name}"
        wanted = {(key, str(value)) for key, value in labels.items()}
        return sum(v for (n, said), v in self.values.items() if n == name and wanted <= said)

    def by(self, name: str, *labels: str) -> dict[Any, float]:
        """A metric's samples by the values of some labels."""
        found: dict[Any, float] = {}
        for (other, said), value in self.values.items():
            if other == f"ollprox_{name}":
                index = tuple(dict(said)[label] for label in labels)
                found[index if len(labels) > 1 else index[0]] = value
        return found

    def outcomes(self) -> dict[str, float]:
        """How many requests came to what; those that none came to are left out."""
        counts = {outcome: self("requests_total", cache=outcome) for outcome in OUTCOMES}
        assert sum(counts.values()) == self("requests_total")
        for name in ("request_duration", "first_byte"):
            for outcome in OUTCOMES:
                measured = self(f"{name}_seconds_count", cache=outcome)
                assert measured == self(f"{name}_seconds_bucket", cache=outcome, le="+Inf")
                assert measured <= counts[outcome]
                assert measured == counts[outcome] or name == "first_byte"
        return {outcome: count for outcome, count in counts.items() if count}

    def saved(self) -> float:
        """GPU time saved, as a number of the stand-in's answers."""
        return self("gpu_seconds_saved_total") / GPU


async def scrape(port: int, key: str = KEY) -> Numbers:
    answer = await ask(port, "GET", "/metrics", headers={"APIKEY": "", "Authorization": _by(key)})
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return Numbers(answer.body.decode())


def _by(key: str) -> str:
    return f"Bearer {key}"  # what Prometheus's `authorization` sends


async def until(port: int, condition: Callable[[Numbers], bool]) -> Numbers:
    """Scrape until something has been counted."""
    while not condition(numbers := await scrape(port)):
        await asyncio.sleep(0.01)
    return numbers


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, object]:
    path = tmp_path / "three-keys.txt"
    path.write_text(f"{KEY}  # tester\n{BOSS}  # boss\n{OTHER}\n")
    return {"API_KEY_FILE": path, "ADMIN_LABELS": "boss"}


async def known(ollama: StandIn, port: int) -> None:
    """Wait until OllProx has read the list of models."""
    await ollama.until(lambda: bool(ollama.asked("/api/tags")) and not ollama.generating)
    for _ in range(3):  # the list has come by now, so it is read before these are answered
        await ask(port, "GET", "/ready", headers={"APIKEY": ""})


async def read_chunks(client: Client, answer: Any, lines: int) -> None:
    chunks = client.chunks(answer)
    while answer.body.count(b"\n") < lines:
        await anext(chunks)


# Requests.


async def test_each_request_is_counted_once_by_what_came_of_it(
    ollprox: Program, ollama: StandIn
) -> None:
    await known(ollama, ollprox.port)
    via = ""
    async with Client(ollprox.port) as client:
        for method, path, body, headers, status in (
            ("POST", "/api/generate", question(), {}, 200),  # miss
            ("POST", "/api/generate", question(), {}, 200),  # hit
            ("POST", "/call_model", question(), {}, 200),  # hit
            ("POST", "/call_model", question(), {"Cache-Control": "no-cache"}, 200),  # miss
            ("POST", "/call_model", question(model="no"), {}, 404),  # miss
            ("POST", "/call_model", {**question(), "Model": "x"}, {}, 200),  # bypass
            ("GET", "/api/tags", None, {}, 200),  # bypass
            ("HEAD", "/api/tags", None, {}, 200),  # bypass
            ("GET", "/api/tags", None, {"APIKEY": ""}, 401),  # refused, as is all that follows
            ("GET", "/nope", None, {}, 404),
            ("GET", "/api/generate", None, {}, 405),
            ("OPTIONS", "/api/generate", None, {"APIKEY": ""}, 405),
            ("POST", "/api/copy", None, {}, 403),
            ("POST", "/api/chat", None, {}, 411),
            ("POST", "/api/chat", b"[]", {}, 400),
            ("POST", "/call_model", question("x"), {"Cache-Control": "only-if-cached"}, 504),
            ("GET", "/", None, {"Via": "ours"}, 508),
            ("GET", "/health", None, {"APIKEY": ""}, 200),  # our own pages
            ("GET", "/dashboard", None, {"APIKEY": ""}, 200),
            ("GET", "/metrics.json", None, {}, 200),
            ("GET", "/metrics", None, {"APIKEY": ""}, 401),
            ("DELETE", "/cache", None, {}, 403),
        ):
            sent = {name: via if value == "ours" else value for name, value in headers.items()}
            answer = await client.ask(method, path, body, sent)
            assert answer.status == status, (path, answer.body)
            via = answer.headers.get("via", "")
    assert b" 400 " in await raw(ollprox.port, b"no head\r\n\r\n")
    numbers = await scrape(ollprox.port)
    assert numbers.by("requests_total", "route", "status", "cache") == {
        ("/api/generate", "200", "miss"): 1,
        ("/api/generate", "200", "hit"): 1,
        ("/call_model", "200", "hit"): 1,
        ("/call_model", "200", "miss"): 1,
        ("/call_model", "404", "miss"): 1,
        ("/call_model", "200", "bypass"): 1,
        ("/api/tags", "200", "bypass"): 2,
        ("/api/tags", "401", "refused"): 1,
        ("other", "404", "refused"): 1,
        ("/api/generate", "405", "refused"): 2,
        ("/api/copy", "403", "refused"): 1,
        ("/api/chat", "411", "refused"): 1,
        ("/api/chat", "400", "refused"): 1,
        ("/call_model", "504", "refused"): 1,
        ("/", "508", "refused"): 1,
        ("other", "400", "refused"): 1,
    }
    assert numbers.outcomes() == {"hit": 2, "miss": 3, "bypass": 3, "refused": 10}
    assert numbers.by("own_requests_total", "route", "status") == {
        ("/ready", "200"): 3,
        ("/health", "200"): 1,
        ("/dashboard", "200"): 1,
        ("/metrics.json", "200"): 1,
        ("/metrics", "401"): 1,
        ("/cache", "403"): 1,
    }
    assert numbers("authentication_failures_total") == 2
    assert numbers.by("model_requests_total", "model") == {"llama2": 5, "other": 1}
    assert numbers.by("model_saved_total", "model") == {"llama2": 2, "other": 0}
    assert numbers.by("model_tokens_total", "model") == {"llama2": 3 * TOKENS, "other": 0}
    # Of those for answers: not the one for which no key came.
    assert numbers.by("key_requests_total", "key") == {"tester": 6 + 4}
    assert numbers.by("key_saved_total", "key") == {"tester": 2}
    assert numbers.by("key_tokens_total", "key") == {"tester": 3 * TOKENS}


async def test_what_hits_save_is_what_the_answer_took(ollprox: Program, ollama: StandIn) -> None:
    """The time for prompt and answer; `total_duration` has the loading of the model too."""
    for path, form in (("/api/generate", question()), ("/api/chat", {"model": "llama2"})):
        body = form | ({"messages": [{"role": "user", "content": "a"}]} if "chat" in path else {})
        for stream in (True, False, True):  # a miss, and two hits
            await ask(ollprox.port, "POST", path, {**body, "stream": stream})
    numbers = await scrape(ollprox.port)
    assert numbers.outcomes() == {"miss": 2, "hit": 4}
    assert numbers("gpu_seconds_total") == pytest.approx(2 * GPU)
    assert numbers.saved() == pytest.approx(4)
    sources = {"generated": 2, "cached": 4, "shared": 0}
    assert numbers.by("lines_total", "source") == {s: n * LINES for s, n in sources.items()}
    assert numbers.by("tokens_total", "source") == {s: n * TOKENS for s, n in sources.items()}
    assert numbers("cache_entries") == 2


async def test_joined_readers_after_the_first_save_what_the_answer_took(
    ollprox: Program, ollama: StandIn
) -> None:
    await known(ollama, ollprox.port)
    ollama.script.hold_before = 3
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Client(ollprox.port)) for _ in range(4)]
        for number, client in enumerate(clients):
            path = "/call_model" if number == 1 else "/api/generate"  # one waits for the fold
            await client.send(request("POST", path, question()))
            await until(ollprox.port, lambda n: n("readers") == number + 1)  # noqa: B023
        held = await until(ollprox.port, lambda n: n("connections") == 5)  # with the scrape
        assert held("answers_under_way") == 1
        assert held.outcomes() == {}
        running: dict[str, Any] = {"lines": 0}
        while running["lines"] < 3:
            (running,) = (await ask(ollprox.port, "GET", "/metrics.json")).json()["running"]
        assert (running["model"], running["label"]) == ("llama2", "tester")
        assert (running["lines"], running["readers"]) == (3, 4)
        ollama.script.let_go.set()
        for client in clients:
            answer = await client.rest(await client.head())
            assert answer.complete
    numbers = await scrape(ollprox.port)
    assert numbers.outcomes() == {"miss": 1, "collapsed": 3}
    assert numbers.saved() == pytest.approx(3)
    assert numbers.by("lines_total", "source") == {
        "generated": LINES,
        "cached": 0,
        "shared": 3 * LINES,
    }
    assert numbers("tokens_total", source="shared") == 3 * TOKENS
    assert numbers("answers_under_way") == numbers("readers") == 0
    assert numbers("key_saved_total", key="tester") == 3


NONSENSE: list[tuple[dict[str, object], float, float]] = [
    ({}, 0, 0),
    ({"eval_count": 0, "eval_duration": 0, "prompt_eval_duration": 0}, 0, 0),
    ({"eval_count": 7, "eval_duration": 2_000_000_000}, 7, 2),
    ({"eval_count": -7, "eval_duration": -1, "prompt_eval_duration": 10**9}, 0, 1),
    ({"eval_count": "7", "eval_duration": [1], "prompt_eval_duration": None}, 0, 0),
    ({"eval_count": 1e300, "eval_duration": 2**70, "prompt_eval_duration": 0.5}, 0, 0),
    ({"total_duration": 10**9, "load_duration": 10**9}, 0, 0),
]


async def test_durations_that_make_no_sense_count_nothing(
    ollprox: Program, ollama: StandIn
) -> None:
    last: dict[str, object] = {}

    async def respond(seen: Seen, writer: asyncio.StreamWriter) -> None:
        body = json.dumps({"response": "a", "done": True, **last}).encode() + b"\n"
        kind = b"Content-Type: application/x-ndjson\r\nContent-Length: %d" % len(body)
        writer.write(b"HTTP/1.1 200 OK\r\n%b\r\n\r\n%b" % (kind, body))

    ollama.script.respond = respond
    tokens = seconds = 0.0
    for number, (durations, count, took) in enumerate(NONSENSE):
        last.clear()
        last |= durations
        for _ in range(2):
            assert (await ask(ollprox.port, "POST", "/call_model", question(str(number)))).status
        tokens, seconds = tokens + count, seconds + took
        numbers = await scrape(ollprox.port)
        for source in ("generated", "cached"):
            assert numbers("tokens_total", source=source) == tokens, durations
        assert numbers("gpu_seconds_total") == numbers("gpu_seconds_saved_total") == seconds
    assert numbers.outcomes() == {"miss": len(NONSENSE), "hit": len(NONSENSE)}


async def test_two_last_lines_are_one_answer(ollprox: Program, ollama: StandIn) -> None:
    async def respond(seen: Seen, writer: asyncio.StreamWriter) -> None:
        line = b'{"response":"a","done":true,"eval_count":3,"eval_duration":1000000000}\n'
        kind = b"Content-Type: application/x-ndjson\r\nContent-Length: %d" % (2 * len(line))
        writer.write(b"HTTP/1.1 200 OK\r\n%b\r\n\r\n%b" % (kind, 2 * line))

    ollama.script.respond = respond
    for _ in range(3):
        await ask(ollprox.port, "POST", "/call_model", question())
    numbers = await scrape(ollprox.port)
    assert numbers("tokens_total", source="generated") == 3
    assert numbers("tokens_total", source="cached") == 6
    assert numbers("gpu_seconds_saved_total") == 2


async def test_the_openai_form_counts_its_events(ollprox: Program, ollama: StandIn) -> None:
    await known(ollama, ollprox.port)
    body = {"model": "llama2", "messages": [{"role": "user", "content": "a"}]}
    for _ in range(2):
        await ask(ollprox.port, "POST", "/v1/chat/completions", {**body, "stream": True})
        await ask(ollprox.port, "POST", "/v1/chat/completions", body)
    events = len(ollama.script.tokens) + 2  # "stop" and [DONE]
    numbers = await scrape(ollprox.port)
    assert numbers.outcomes() == {"miss": 2, "hit": 2}
    assert numbers("lines_total", source="generated") == events
    assert numbers("lines_total", source="cached") == events
    tokens = len(ollama.script.tokens) + USAGE["completion_tokens"]  # the object says its own
    assert numbers("tokens_total", source="generated") == tokens
    assert numbers("tokens_total", source="cached") == tokens
    assert numbers("model_saved_total", model="llama2") == 2


# What goes wrong.


async def test_upstreams_errors_are_counted_by_kind(
    launch: Start, ollama: StandIn, settings: dict[str, object]
) -> None:
    ollprox = await launch(**settings)
    script = ollama.script
    counted = dict.fromkeys(KINDS, 0.0)

    async def fails(kind: str, status: int, path: str = "/call_model") -> None:
        for _ in range(2):
            answer = await ask(ollprox.port, "POST", path, question(kind + path))
            assert answer.status == status
        counted[kind] += 2
        numbers = await scrape(ollprox.port)
        assert numbers.by("upstream_errors_total", "kind") == counted
        assert numbers("cache_entries") == 0
        assert numbers("upstream_cancelled_total") == 0

    script.break_after = 2
    await fails("broken", 502)
    await fails("broken", 200, "/api/generate")
    script.break_after = None
    script.error_after = 1
    await fails("reported", 500)
    await fails("reported", 200, "/api/generate")
    script.error_after = None
    script.raw = b"HTTP/1.1 503 Busy\r\nContent-Length: 2\r\n\r\n{}"
    await fails("status", 503)
    script.raw = b"\x00 garbage\r\n\r\n"
    await fails("protocol", 502)
    await ollama.stop()
    await fails("unreachable", 502)
    numbers = await scrape(ollprox.port)
    assert numbers.outcomes() == {"miss": 2 * 7}
    # A line with content is a token until the last line tells better.
    assert numbers.by("tokens_total", "source") == {"generated": 12, "cached": 0, "shared": 0}
    # Of the streams that broke; a single line is an error, which is a line all the same.
    assert numbers("lines_total", source="generated") == 4 * 2 + 4 * 2


async def test_what_takes_too_long_is_an_error_of_its_own_kind(
    launch: Start, ollama: StandIn, settings: dict[str, object]
) -> None:
    ollama.script.hold_head = True
    ollprox = await launch(**settings, FIRST_BYTE_TIMEOUT="0.1")
    assert (await ask(ollprox.port, "POST", "/call_model", question())).status == 504
    numbers = await scrape(ollprox.port)
    assert numbers.by("upstream_errors_total", "kind") == dict.fromkeys(KINDS, 0) | {"timeout": 1}


async def test_what_is_refused_is_no_error_of_upstreams(ollprox: Program, ollama: StandIn) -> None:
    """Nor is a 404 of its own."""
    await ask(ollprox.port, "POST", "/call_model", question(model="no"))
    await ask(ollprox.port, "POST", "/call_model", b"{")
    numbers = await scrape(ollprox.port)
    assert numbers("upstream_errors_total") == 0


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [(b"half", {"Content-Length": "8"}, 408), (b"x\r\n", {"Transfer-Encoding": "chunked"}, 400)],
)
async def test_what_a_client_uploads_badly_is_no_error_of_upstreams(
    launch: Start,
    ollama: StandIn,
    settings: dict[str, object],
    body: bytes,
    headers: dict[str, str],
    status: int,
) -> None:
    ollprox = await launch(**settings, BODY_TIMEOUT="0.1")
    headers = {**headers, "APIKEY": BOSS}
    answer = await ask(ollprox.port, "POST", f"/api/blobs/sha256:{0:064}", body, headers)
    assert answer.status == status
    numbers = await scrape(ollprox.port)
    assert numbers.by("requests_total", "route", "status", "cache") == {
        ("/api/blobs/", str(status), "bypass"): 1
    }
    assert numbers("upstream_errors_total") == 0


async def test_a_client_that_leaves_cancels_and_saves_nothing(
    ollprox: Program, ollama: StandIn
) -> None:
    ollama.script.hold_before = 2
    async with Client(ollprox.port) as client:
        answer = await client.begin("POST", "/api/generate", question())
        await read_chunks(client, answer, 2)
    numbers = await until(ollprox.port, lambda n: n("requests_total") == 1)
    await ollama.until(lambda: ollama.asked()[0].gone)
    assert numbers.by("requests_total", "route", "status", "cache") == {
        ("/api/generate", "499", "miss"): 1
    }
    assert numbers("upstream_cancelled_total") == 1
    assert numbers("upstream_errors_total") == 0
    assert numbers("lines_total", source="generated") == 2
    assert numbers("tokens_total", source="generated") == 2
    assert numbers("gpu_seconds_total") == numbers.saved() == 0
    assert numbers("answers_under_way") == numbers("readers") == numbers("cache_entries") == 0


async def test_one_of_two_leaves_and_nothing_is_cancelled_or_saved(
    ollprox: Program, ollama: StandIn
) -> None:
    ollama.script.hold_before = 2
    async with Client(ollprox.port) as stays:
        async with Client(ollprox.port) as leaves:
            first = await leaves.begin("POST", "/api/generate", question())
            second = await stays.begin("POST", "/api/generate", question())
            await read_chunks(leaves, first, 2)
        left = await until(ollprox.port, lambda n: n("readers") == 1)
        assert left.outcomes() == {"miss": 1}
        ollama.script.let_go.set()
        await stays.rest(second)
        assert second.complete
    numbers = await scrape(ollprox.port)
    assert numbers.by("requests_total", "status", "cache") == {
        ("499", "miss"): 1,
        ("200", "collapsed"): 1,
    }
    assert numbers("upstream_cancelled_total") == 0
    assert numbers.saved() == 0  # one answer was made, and one client has got it
    assert numbers("gpu_seconds_total") == pytest.approx(GPU)


async def test_who_leaves_after_the_last_line_has_got_the_answer(
    ollprox: Program, ollama: StandIn
) -> None:
    ollama.script.hold_end = True
    async with Client(ollprox.port) as first, Client(ollprox.port) as second:
        for client in (first, second):
            answer = await client.begin("POST", "/api/generate", question())
            await read_chunks(client, answer, LINES)
    numbers = await until(ollprox.port, lambda n: n("requests_total") == 2)
    assert numbers.outcomes() == {"miss": 1, "collapsed": 1}
    assert numbers.saved() == pytest.approx(1)
    assert numbers("key_saved_total") == 1
    assert numbers("upstream_cancelled_total") == numbers("upstream_errors_total") == 0
    assert numbers("cache_entries") == 1


@pytest.mark.parametrize("path", ["/api/generate", "/call_model"])
@pytest.mark.parametrize("fault", ["break_after", "error_after"])
async def test_those_who_join_what_breaks_have_saved_nothing(
    ollprox: Program, ollama: StandIn, path: str, fault: str
) -> None:
    setattr(ollama.script, fault, 3)
    ollama.script.hold_before = 2
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Client(ollprox.port)) for _ in range(3)]
        for client in clients:
            await client.send(request("POST", path, question()))
        await until(ollprox.port, lambda n: n("readers") == 3)
        ollama.script.let_go.set()
        for client in clients:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                await client.rest(await client.head())
    numbers = await until(ollprox.port, lambda n: n("requests_total") == 3)
    assert numbers.outcomes() == {"miss": 1, "collapsed": 2}
    assert numbers("key_saved_total") == numbers.saved() == 0
    assert numbers("tokens_total", source="shared") == 0
    view = (await ask(ollprox.port, "GET", "/metrics.json")).json()
    assert view["saved"]["answers"] == 0


async def test_leaving_before_the_body_has_come_is_counted_too(
    ollprox: Program, ollama: StandIn
) -> None:
    async with Client(ollprox.port) as client:
        await client.send(request("POST", "/call_model", b"{", {"Content-Length": "100"}))
        await until(ollprox.port, lambda n: n("connections") == 2)
    numbers = await until(ollprox.port, lambda n: n("requests_total") == 1)
    assert numbers.by("requests_total", "status", "cache") == {("499", "refused"): 1}
    assert numbers("upstream_cancelled_total") == 0


async def test_who_leaves_behind_bytes_sent_ahead_has_left_all_the_same(
    ollprox: Program, ollama: StandIn
) -> None:
    async with waiting(ollprox.port, ollama, question()) as client:
        client.writer.write(b"x" * (128 << 10))  # more than is read ahead
        await until(ollprox.port, lambda n: n("readers") == 1)
        client.writer.transport.abort()
    numbers = await until(ollprox.port, lambda n: n("requests_total") == 1)
    assert numbers.by("requests_total", "status", "cache") == {("499", "miss"): 1}
    assert numbers("upstream_cancelled_total") == 1


# Ollama's side.


async def test_upstream_requests_are_those_that_ollama_got(
    ollprox: Program, ollama: StandIn
) -> None:
    async def agree() -> None:
        numbers = await scrape(ollprox.port)
        assert numbers("upstream_requests_total") == len(ollama.seen)

    await known(ollama, ollprox.port)
    await ollama.until(lambda: bool(ollama.asked("/api/version")))
    await ask(ollprox.port, "POST", "/call_model", question())
    await ask(ollprox.port, "POST", "/call_model", question())  # a hit
    await ask(ollprox.port, "GET", "/ready", headers={"APIKEY": ""})
    await ask(ollprox.port, "POST", "/v1/embeddings", {"model": "llama2", "input": "a"})
    await agree()
    ollama.script.break_after = 1
    await ask(ollprox.port, "POST", "/call_model", question("broken"))
    await agree()
    ollama.script.raw = b""  # it takes the request, and says nothing
    for _ in range(2):
        await ask(ollprox.port, "GET", "/ready", headers={"APIKEY": ""})  # leaves a connection
        answer = await ask(ollprox.port, "POST", "/call_model", question("closed"))
        assert answer.status == 502
        await agree()
    ollama.script.raw = None
    ollama.script.hold_head = True
    async with Client(ollprox.port) as client:
        await client.send(request("POST", "/call_model", question("left")))
        await ollama.until(lambda: ollama.generating > 0)
    await ollama.until(lambda: ollama.seen[-1].gone)
    await agree()


# Who sees what.


async def test_a_key_sees_its_own_rows_and_an_admin_all(
    launch: Start, ollama: StandIn, settings: dict[str, object]
) -> None:
    ollprox = await launch(**settings)
    await known(ollama, ollprox.port)
    ollama.script.hold_before = 1
    async with Client(ollprox.port) as client:
        answer = await client.begin("POST", "/api/generate", question(), {"APIKEY": BOSS})
        # The last one has no label, and so no rows of its own.
        for key, sees in ((BOSS, True), (KEY, False), (OTHER, False)):
            headers = {"APIKEY": key}
            text = (await ask(ollprox.port, "GET", "/metrics", headers=headers)).body.decode()
            shown = await ask(ollprox.port, "GET", "/metrics.json", headers=headers)
            view = shown.json()
            assert view["rows_by_label"] is sees
            assert view["may_drop"] is sees
            assert view["labels"] == []  # what is under way has no row yet
            (running,) = view["running"]
            assert running["label"] == ("boss" if sees else None)
            assert running["model"] == "llama2"
            assert "boss" not in text
            assert (b"boss" in shown.body) is sees
        ollama.script.let_go.set()
        await client.rest(answer)
    for key in (KEY, OTHER):
        await ask(ollprox.port, "POST", "/call_model", question(), {"APIKEY": key})
    numbers = await scrape(ollprox.port, BOSS)
    assert numbers.by("key_requests_total", "key") == {"boss": 1, "tester": 1, "": 1}
    assert numbers.by("key_saved_total", "key") == {"boss": 0, "tester": 1, "": 1}
    for key in (KEY, OTHER):
        answer = await ask(ollprox.port, "GET", "/metrics", headers={"APIKEY": key})
        numbers = Numbers(answer.body.decode())
        assert numbers.outcomes() == {"miss": 1, "hit": 2}
        assert numbers("gpu_seconds_saved_total") > 0
        own = ["tester"] if key == KEY else []
        assert list(numbers.by("key_requests_total", "key")) == own
        assert b"boss" not in answer.body
        shown = await ask(ollprox.port, "GET", "/metrics.json", headers={"APIKEY": key})
        assert b"boss" not in shown.body
        view = shown.json()
        assert [row["label"] for row in view["labels"]] == own
        assert [row["label"] for row in view["requests"]] == own
    view = (await ask(ollprox.port, "GET", "/metrics.json", headers={"APIKEY": BOSS})).json()
    assert [row["label"] for row in view["requests"]] == ["", "tester", "boss"]
    assert {row["label"] for row in view["labels"]} == {"", "tester", "boss"}


async def test_the_only_key_sees_its_rows_until_there_is_another(
    launch: Start, key_file: Path
) -> None:
    ollprox = await launch(KEY_REFRESH="0.05")
    await ask(ollprox.port, "POST", "/call_model", question())
    numbers = await scrape(ollprox.port)
    assert numbers("keys") == 1
    assert numbers.by("key_requests_total", "key") == {"tester": 1}
    with key_file.open("a") as file:
        file.write(f"{OTHER}  # other\n")
    numbers = await until(ollprox.port, lambda n: n("keys") == 2)
    assert numbers.by("key_requests_total", "key") == {"tester": 1}
    other = (await ask(ollprox.port, "GET", "/metrics.json", headers={"APIKEY": OTHER})).json()
    assert not other["rows_by_label"]
    assert other["labels"] == other["requests"] == []
    reloads = numbers("key_reloads_total")
    key_file.unlink()
    numbers = await until(ollprox.port, lambda n: n("key_reload_failures_total") > 0)
    assert numbers("keys") == 2  # the last ones stay valid
    assert numbers("key_reloads_total") >= reloads


async def test_labels_are_escaped(launch: Start, tmp_path: Path) -> None:
    label = r'a "b" \c\ {d="e",} \n # 鍵'
    path = tmp_path / "odd-labels.txt"
    path.write_text(f"{KEY}  # {label}\n")
    ollprox = await launch(API_KEY_FILE=path)
    await ask(ollprox.port, "POST", "/call_model", question())
    numbers = await scrape(ollprox.port)
    assert numbers.by("key_requests_total", "key") == {label: 1}
    view = (await ask(ollprox.port, "GET", "/metrics.json")).json()
    assert [row["label"] for row in view["labels"]] == [label]


async def test_whatever_ollama_calls_a_model_can_be_read(launch: Start, ollama: StandIn) -> None:
    names = ["half\ud800", 'a"b\\c\n\x1b[31m{d="e"} 7', "鍵\u2028\r鍵", "x" * 5000]
    listed = json.dumps({"models": [{"name": name, "digest": "0"} for name in names]}).encode()
    line = b'{"response":"a","done":true}\n'

    async def respond(seen: Seen, writer: asyncio.StreamWriter) -> None:
        kind, body = ("x-ndjson", line) if seen.method == "POST" else ("json", listed)
        head = f"Content-Type: application/{kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(b"HTTP/1.1 200 OK\r\n" + head.encode() + body)

    ollama.script.respond = respond
    ollprox = await launch()
    await known(ollama, ollprox.port)
    for name in names:
        body = {"model": name, "prompt": "a"}
        assert (await ask(ollprox.port, "POST", "/call_model", body)).status == 200
    numbers = await scrape(ollprox.port)
    counted = numbers.by("model_requests_total", "model")
    assert counted == {name.replace("\ud800", r"\ud800"): 1 for name in names}
    view = (await ask(ollprox.port, "GET", "/metrics.json")).json()
    assert view["answers"]["miss"] == len(names)


async def test_what_clients_invent_makes_no_series(
    launch: Start, ollama: StandIn, settings: dict[str, object]
) -> None:
    ollprox = await launch(**settings)
    await known(ollama, ollprox.port)

    async def invent(client: Client, name: str) -> None:
        for method, path, body, key in (
            ("POST", "/call_model", question(model=name), KEY),
            ("POST", "/v1/responses", {"model": name}, KEY),
            ("GET", f"/v1/models/{name}", None, KEY),
            ("GET", f"/v1/models/a%2F{name}", None, KEY),
            ("HEAD", f"/api/blobs/sha256:{name:0>64}", None, BOSS),
            ("GET", f"/{name}?{name}", None, KEY),
            ("GET", f"/api/tags/{name}", None, KEY),
            ("GET", f"/key/{name}/api/tags", None, KEY),
            (f"X{name}", "/api/tags", None, KEY),
        ):
            headers = {"APIKEY": key, "X-Request-ID": name, f"X-{name}": name}
            await client.ask(method, path, body, headers)

    wrong = [
        (await ask(ollprox.port, "GET", "/api/tags", headers={"APIKEY": f"a{number}"})).status
        for number in range(12)
    ]
    assert set(wrong) == {401, 429}
    async with Client(ollprox.port) as client:
        for number in range(20):
            await invent(client, f"a{number}")
        await scrape(ollprox.port, BOSS)  # which has a series too
        before = await scrape(ollprox.port, BOSS)
        for number in range(20, 120):
            await invent(client, f"a{number}")
    after = await scrape(ollprox.port, BOSS)
    assert before.values.keys() == after.values.keys()
    assert after("requests_total") == 12 + 120 * 9
    assert after.by("model_requests_total", "model") == {"other": 120 * 2}
    view = (await ask(ollprox.port, "GET", "/metrics.json", headers={"APIKEY": BOSS})).json()
    assert len(view.pop("requests")) == 200  # the only place that shows what clients call things
    assert "a119" not in json.dumps(view)


# Gauges, and the page's view.


async def test_the_cache_counts_what_it_keeps_and_loses(
    launch: Start, ollama: StandIn, settings: dict[str, object]
) -> None:
    ollprox = await launch(**settings, CACHE_TTL="2", CACHE_MAX_BYTES="1M")
    await ask(ollprox.port, "POST", "/call_model", question())
    numbers = await scrape(ollprox.port)
    assert numbers("cache_entries") == 1
    assert 0 < numbers("cache_bytes") < numbers("cache_max_bytes") == 1 << 20
    while "stale" not in (answer := await _ask(ollprox)).cache_status:
        assert answer.status == 200
    numbers = await scrape(ollprox.port)
    assert numbers("cache_expiries_total") == 1
    assert numbers("cache_evictions_total") == 0
    ollama.script.tokens = ["x" * 100_000]
    for number in range(6):  # of 200 KB each
        await ask(ollprox.port, "POST", "/call_model", question(str(number)))
    numbers = await scrape(ollprox.port)
    assert numbers("cache_entries") + numbers("cache_evictions_total") == 1 + 6
    assert numbers("cache_evictions_total") > 0
    assert numbers("cache_bytes") <= 1 << 20


async def _ask(ollprox: Program) -> Any:
    return await ask(ollprox.port, "POST", "/call_model", question())


async def test_buckets_fit_models(ollprox: Program, ollama: StandIn) -> None:
    bounds = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, float("inf")]
    ollama.script.hold_before = 1
    async with Client(ollprox.port) as client:
        answer = await client.begin("POST", "/api/generate", question())
        await asyncio.sleep(0.31)  # this is the time that is measured
        ollama.script.let_go.set()
        await client.rest(answer)
    numbers = await scrape(ollprox.port)
    for name in ("first_byte_seconds", "request_duration_seconds"):
        buckets = numbers.by(f"{name}_bucket", "le")
        assert sorted(map(float, buckets)) == bounds
        counts = [buckets[bound] for bound in sorted(buckets, key=float)]
        assert counts == sorted(counts)
        assert counts[-1] == numbers(f"{name}_count") == 1
    assert numbers("request_duration_seconds_bucket", le="0.3") == 0
    assert numbers("request_duration_seconds_sum") >= 0.31
    assert numbers("first_byte_seconds_sum") <= numbers("request_duration_seconds_sum") - 0.3


async def test_the_process_is_measured(ollprox: Program) -> None:
    values = {name: v for (name, _), v in (await scrape(ollprox.port)).values.items()}
    assert 0.5 < values["process_resident_memory_bytes"] / ollprox.resident() < 2
    assert values["process_cpu_seconds_total"] > 0
    assert values["process_open_fds"] > 3
    assert values["ollprox_loop_lag_seconds"] >= 0


async def test_the_view_says_the_same(
    launch: Start, ollama: StandIn, settings: dict[str, object]
) -> None:
    ollprox = await launch(**settings)
    await known(ollama, ollprox.port)
    for body in (question(), question(), question(), question("b"), question(model="no")):
        await ask(ollprox.port, "POST", "/call_model", body)
    await ask(ollprox.port, "GET", "/api/tags")  # no request for an answer
    await ask(ollprox.port, "POST", "/call_model", question(), {"APIKEY": "wrong"})
    headers = {"APIKEY": BOSS}
    view = (await ask(ollprox.port, "GET", "/metrics.json", headers=headers)).json()
    numbers = await scrape(ollprox.port, BOSS)
    assert view["answers"] == {"hit": 2, "miss": 3, "collapsed": 0, "bypass": 0, "refused": 1}
    assert view["saved"]["answers"] == 2
    assert view["saved"]["tokens"] == 2 * TOKENS
    assert view["saved"]["gpu_seconds"] == numbers("gpu_seconds_saved_total")
    assert view["generated"]["tokens"] == 2 * TOKENS
    assert view["generated"]["prompt_tokens"] == 2 * PROMPT
    assert view["generated"]["lines"] == 2 * LINES
    assert view["cache"]["entries"] == numbers("cache_entries") == 2
    assert view["cache"]["bytes"] == numbers("cache_bytes")
    assert view["keys"] == 3
    for outcome, count in view["answers"].items():
        assert sum(minute[outcome] for minute in view["minutes"]) == count
    assert sum(minute["tokens"] for minute in view["minutes"]) == 2 * TOKENS
    tokens = {"prompt_tokens": 2 * PROMPT, "tokens": 2 * TOKENS}
    assert view["models"] == [
        {"model": "llama2", "requests": 4, "saved": 2, **tokens},
        {"model": "other", "requests": 1, "saved": 0, "prompt_tokens": 0, "tokens": 0},
    ]
    assert view["labels"] == [{"label": "tester", "requests": 5, "saved": 2, **tokens}]
    assert view["errors"] == [{"what": "refused with 401", "count": 1}]
    assert view["running"] == view["waiting"] == view["limits"] == []
    assert [(row["outcome"], row["requests"]) for row in view["latency"]] == [
        ("hit", 2),
        ("miss", 3),
    ]
    newest = view["requests"]
    assert [row["outcome"] for row in newest] == [
        "refused",
        "bypass",
        "miss",
        "miss",
        "hit",
        "hit",
        "miss",
    ]
    assert [row["model"] for row in newest] == ["-", None, "no", *["llama2"] * 4]
    assert [row["tokens"] for row in newest] == [0, 0, 0, *[TOKENS] * 4]
    assert [row["label"] for row in newest] == [None, *["tester"] * 6]
    for row in newest:
        assert row["seconds"] >= row["first_byte"] >= 0
        assert abs(row["time"] - view["now"]) < 60
    assert view["upstreams"] == [
        {"host": "127.0.0.1", "up": True, "running": 0, "waiting": 0}
        | {"errors": 0, "models": ["gemma3:270m", "llama2:latest"], "conflicts": []}
    ]


async def test_the_view_does_not_wait_for_an_ollama_that_does_not_list_its_models(
    ollprox: Program, ollama: StandIn
) -> None:
    async def silent(seen: Seen, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    ollama.script.respond = silent
    async with asyncio.timeout(3):
        answers = await asyncio.gather(*(ask(ollprox.port, "GET", "/metrics.json") for _ in "abc"))
    assert [answer.json()["upstreams"][0]["models"] for answer in answers] == [[]] * 3
    assert len(ollama.asked("/api/ps")) == 1  # they share a request


async def test_tokens_count_in_the_minute_in_which_they_come(
    ollprox: Program, ollama: StandIn
) -> None:
    """While an answer is generated its lines count; then Ollama's own number does."""

    async def counted() -> int:
        view = (await ask(ollprox.port, "GET", "/metrics.json")).json()
        return sum(minute["tokens"] for minute in view["minutes"])

    ollama.script.hold_before = 3
    async with Client(ollprox.port) as client:
        answer = await client.begin("POST", "/api/generate", question())
        await read_chunks(client, answer, 3)
        assert await counted() == 3
        ollama.script.let_go.set()
        await client.rest(answer)
    assert await counted() == TOKENS
    await ask(ollprox.port, "POST", "/call_model", question())  # a hit
    assert await counted() == TOKENS


# What other parts tell, by plain calls.


ADMIN = Viewer("boss", sees_all=True, admin=True)
MARY = Viewer("Mary", sees_all=False, admin=False)
NOBODY = Viewer("", sees_all=False, admin=False)  # a key without a label


def metrics(**parts: Any) -> Metrics:
    proxy = make_proxy()
    made = Metrics("0", proxy.cache, proxy.flights, proxy.keys, **parts)
    made.set_models(["llama2:latest"])
    return made


def record(outcome: Outcome = Outcome.HIT, **values: Any) -> Record:
    made = Record("127.0.0.1")
    decided = {"outcome": outcome, "label": "Mary", "model": "llama2", "generates": True}
    decided |= {"status": 200, "first_byte": made.started, "ended": time.monotonic()}
    for name, value in {**decided, **values}.items():
        setattr(made, name, value)
    return made


def test_the_queue_is_seen_by_admins_whole_and_by_others_in_part() -> None:
    waiting = [Waiting("Bob", "llama2", 3.0, 1), Waiting("", "llama2", 2.0, 2)]
    waiting.append(Waiting("Mary", "unknown", 1.5, 3))
    queue = Snapshot(waiting, {}, {Refusal.QUEUE_FULL: 4, Refusal.TIMEOUT: 0})
    seen = metrics(queue=lambda: queue)
    whole = seen.view(ADMIN)
    assert whole["queue_depth"] == 3
    assert whole["waiting"] == [
        {"position": 1, "model": "llama2", "label": "Bob", "seconds": 3.0},
        {"position": 2, "model": "llama2", "label": "", "seconds": 2.0},
        {"position": 3, "model": "other", "label": "Mary", "seconds": 1.5},
    ]
    own = seen.view(MARY)
    assert own["queue_depth"] == 3
    assert own["waiting"] == [{"position": 3, "model": "other", "label": "Mary", "seconds": 1.5}]
    assert seen.view(NOBODY)["waiting"] == []
    numbers = Numbers(seen.text(NOBODY))
    assert numbers("queue_depth") == 3
    refused = {"queue full": 4, "timeout": 0, "draining": 0, "memory": 0}
    assert numbers.by("queue_refused_total", "reason") == refused


def test_waits_in_the_queue_are_measured() -> None:
    seen = metrics()
    for queued in (None, 0.0, 2.0, 45.0):
        seen.count(record(Outcome.MISS, queued=queued))
    numbers = Numbers(seen.text(ADMIN))
    assert numbers("queue_seconds_count") == 3
    assert numbers("queue_seconds_sum") == 47
    assert numbers("queue_seconds_bucket", le="3.0") == 2
    rows: Any = seen.view(ADMIN)["requests"]
    assert [row["queued"] for row in rows] == [45, 2, 0, None]


def test_limits_are_shown_to_those_whose_they_are() -> None:
    mary, bob = make_key(b"1", b"Mary", {}), make_key(b"2", b"", {})
    limits = [Standing(k, "rate", Limit(5, 3600), 2, 60.0) for k in (mary, bob)]
    seen = metrics(limits=lambda: limits)
    row = {"label": "Mary", "name": "rate=5/hour", "used": 2, "allowed": 5, "resets": 60.0}
    assert seen.view(MARY)["limits"] == [row]
    assert seen.view(NOBODY)["limits"] == []
    everything: Any = seen.view(ADMIN)["limits"]
    assert [row["label"] for row in everything] == ["Mary", ""]


def test_each_ollama_is_up_or_down() -> None:
    states = [UpstreamState("a:1", True, 1, 0, 0, ["llama2"]), UpstreamState("b:1", False, 0, 2, 3)]
    seen = metrics(upstreams=lambda: states)
    numbers = Numbers(seen.text(NOBODY))
    assert numbers.by("upstream_up", "host") == {"a:1": 1, "b:1": 0}
    assert numbers.by("upstream_running", "host") == {"a:1": 1, "b:1": 0}
    assert numbers.by("upstream_waiting", "host") == {"a:1": 0, "b:1": 2}
    rows: Any = seen.view(NOBODY)["upstreams"]
    assert [(row["host"], row["up"]) for row in rows] == [("a:1", True), ("b:1", False)]


def test_requests_are_listed_newest_first_and_within_bounds() -> None:
    seen = metrics()
    for number in range(MAX_RECENT + 10):
        seen.count(record(status=number, label="Mary" if number % 2 else "Bob"))
    seen.count(record(Outcome.PAGE))
    rows: Any = seen.view(ADMIN)["requests"]
    newest = MAX_RECENT + 9
    assert [row["status"] for row in rows] == list(range(newest, newest - 200, -1))
    rows = seen.view(MARY)["requests"]
    assert [row["status"] for row in rows] == list(range(newest, newest - 400, -2))
    assert seen.view(NOBODY)["requests"] == []


def test_requests_without_a_key_push_out_no_others() -> None:
    seen = metrics()
    seen.count(record(status=200))
    for _ in range(MAX_RECENT):
        seen.count(record(Outcome.REFUSED, status=401, label=None))
    rows: Any = seen.view(MARY)["requests"]
    assert [row["status"] for row in rows] == [200]
    rows = seen.view(ADMIN)["requests"]
    assert {row["status"] for row in rows} == {401}


def test_a_long_name_is_not_kept() -> None:
    """Thousands of requests are remembered, and a client chooses the name."""
    seen = metrics()
    seen.count(record(Outcome.MISS, model="m" * 10_000))
    rows: Any = seen.view(ADMIN)["requests"]
    assert rows[0]["model"] == "m" * MAX_SHOWN


def test_percentiles_are_by_nearest_rank() -> None:
    seen = metrics()
    for seconds in range(1, 101):
        done = record(Outcome.MISS)
        done.started -= 1000
        done.first_byte = done.started + seconds
        seen.count(done)
    seen.count(record(Outcome.BYPASS, generates=False))
    rows: Any = seen.view(ADMIN)["latency"]
    assert [(row["outcome"], row["requests"]) for row in rows] == [("miss", 100)]
    assert rows[0]["first_byte"] == (50, 95)


# The page of numbers itself.


async def test_how_the_numbers_may_be_asked_for(
    launch: Start, ollama: StandIn, settings: dict[str, object]
) -> None:
    ollprox = await launch(**settings, API_KEY_IN_PATH="true")
    none = {"APIKEY": ""}
    for path in ("/metrics", "/metrics.json"):
        for method, url, headers, status in (
            ("GET", path, none, 401),
            ("GET", path, {"APIKEY": "wrong"}, 401),
            ("GET", path, {}, 200),
            ("GET", f"{path}?a=b", {}, 200),
            ("GET", f"/key/{KEY}{path}", none, 200),
            ("GET", f"/key/wrong{path}", none, 401),
            ("GET", f"/key/wrong{path}", {}, 200),  # a valid one stands beside it
            ("POST", path, {}, 405),
            ("OPTIONS", path, {}, 405),
            ("GET", f"{path}/", {}, 404),
        ):
            answer = await ask(ollprox.port, method, url, headers=headers)
            assert answer.status == status, (method, url)
        head = await ask(ollprox.port, "HEAD", path)
        assert (head.status, head.headers["cache-control"]) == (200, "no-store")
        assert int(head.headers["content-length"]) > 400


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool")
async def test_promtool_finds_no_fault(ollprox: Program) -> None:
    for body in (question(), question(), question(model="no")):
        await ask(ollprox.port, "POST", "/call_model", body)
    text = (await ask(ollprox.port, "GET", "/metrics")).body
    promtool = await asyncio.create_subprocess_exec(
        *("promtool", "check", "metrics"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await promtool.communicate(text)
    assert (promtool.returncode, out.decode()) == (0, "")
