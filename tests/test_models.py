"""Whether Ollama is up, its list of models, and requests that change models."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Collection
from pathlib import Path

import pytest
from client import KEY, Client, ask, question
from conftest import Start
from standin import DIGEST, Seen, StandIn

import answers.models
from answers.flight import Flights
from answers.models import ModelChange, ModelWatch, Probe
from answers.stored import StoredAnswer
from cache import Budget, Cache
from wire.http11 import HTTPError, Response
from wire.upstream import Upstream

BOSS = {"APIKEY": "an-admin-key-for-tests"}
FROM_CACHE = {"Cache-Control": "only-if-cached"}


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, object]:
    path = tmp_path / "keys.txt"
    path.write_text(f"{KEY}  # tester\n{BOSS['APIKEY']}  # boss\n")
    return {
        "API_KEY_FILE": path,
        "ADMIN_LABELS": "boss",
        "LOG_LEVEL": "INFO",
    }


def tags(ollama: StandIn) -> int:
    """How often the list of models was read."""
    return len(ollama.asked("/api/tags"))


# Managing requests.


@pytest.mark.parametrize("refresh", [3600, 0])
@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("DELETE", "/api/delete", {"model": "llama2"}),
        ("DELETE", "/api/delete", {"name": "LLAMA2:latest"}),
        ("POST", "/api/copy", {"source": "gemma3:270m", "destination": "llama2:local"}),
        ("POST", "/api/create", {"model": " llama2 ", "from": "gemma3:270m"}),
        ("POST", "/api/pull", {"model": "library/llama2"}),
        ("POST", "/api/pull", {"model": "llama2", "stream": False}),
    ],
)
async def test_a_request_after_a_managing_one_is_no_hit(
    launch: Start,
    ollama: StandIn,
    settings: dict[str, object],
    method: str,
    path: str,
    body: dict[str, object],
    listed: bool,
    refresh: int,
) -> None:
    """Whether or not the list of models can be read then."""
    ollprox = await launch(**settings, MODEL_REFRESH=refresh)
    if refresh:
        await ollama.until(lambda: tags(ollama) > 0)
    other = question(model="gemma3:270m")
    async with Client(ollprox.port) as client, Client(ollprox.port) as admin:
        for asked in (question(model="llama2:local"), question(), other):
            await client.ask("POST", "/call_model", asked)
        ollama.script.models = {"gemma3:270m": DIGEST, "llama2:latest": "b" * 64}
        if not listed:
            ollama.script.listed = {"llama2": ""}  # malformed
        answer = await admin.ask(method, path, body, BOSS)
        assert (answer.status, answer.complete) == (200, True)
        for asked, status in (
            (question(), 504),
            (question(model="llama2:local"), 504),
            (other, 200),
        ):
            answer = await client.ask("POST", "/call_model", asked, FROM_CACHE)
            assert answer.status == status


@pytest.mark.parametrize("path", ["/api/create", "/api/copy"])
async def test_a_managing_request_ends_after_the_list_was_read(
    launch: Start, ollama: StandIn, settings: dict[str, object], path: str
) -> None:
    """For some clients a stream ends with `success`, so that waits too."""
    ollprox = await launch(**settings, MODEL_REFRESH=3600)
    await ollama.until(lambda: tags(ollama) == 1)
    await ask(ollprox.port, "POST", "/call_model", question())
    api, let_go = ollama._api, asyncio.Event()

    async def slow(seen: Seen, writer: asyncio.StreamWriter) -> None:
        if seen.path == "/api/tags":
            await let_go.wait()
        await api(seen, writer)

    ollama._api = slow  # type: ignore[method-assign]
    body = {"model": "llama2", "destination": "llama2"}
    ollama.script.models = {"llama2:latest": "b" * 64}
    async with Client(ollprox.port) as admin:
        answer = asyncio.create_task(admin.ask("POST", path, body, BOSS))
        await ollama.until(lambda: tags(ollama) == 2)
        hit = await ask(ollprox.port, "POST", "/call_model", question(), FROM_CACHE)
        assert hit.status == 200
        assert not answer.done()
        let_go.set()
        assert (await answer).complete
    gone = await ask(ollprox.port, "POST", "/call_model", question(), FROM_CACHE)
    assert gone.status == 504


async def test_an_answer_under_way_while_its_model_is_replaced_is_not_stored(
    launch: Start, ollama: StandIn, settings: dict[str, object]
) -> None:
    ollprox = await launch(**settings, MODEL_REFRESH=3600)
    await ollama.until(lambda: tags(ollama) == 1)
    ollama.script.hold_before = 1
    async with Client(ollprox.port) as client:
        answer = await client.begin("POST", "/api/generate", question())
        ollama.script.models = {"llama2:latest": "b" * 64}
        body = {"source": "x", "destination": "llama2"}
        assert (await ask(ollprox.port, "POST", "/api/copy", body, BOSS)).status == 200
        ollama.script.let_go.set()
        assert (await client.rest(answer)).complete
    gone = await ask(ollprox.port, "POST", "/call_model", question(), FROM_CACHE)
    assert gone.status == 504


async def test_an_admin_who_hangs_up_leaves_no_wrong_answers(
    launch: Start, ollama: StandIn, settings: dict[str, object]
) -> None:
    ollprox = await launch(**settings, MODEL_REFRESH=3600)
    await ollama.until(lambda: tags(ollama) == 1)
    await ask(ollprox.port, "POST", "/call_model", question())
    ollama.script.hold_before = 1
    async with Client(ollprox.port) as admin:
        answer = await admin.begin("POST", "/api/create", {"model": "llama2"}, BOSS)
        await anext(admin.chunks(answer))
    await ollama.until(lambda: tags(ollama) == 2)
    gone = await ask(ollprox.port, "POST", "/call_model", question(), FROM_CACHE)
    assert gone.status == 504


async def test_an_update_that_changes_nothing_drops_nothing(
    launch: Start, ollama: StandIn, settings: dict[str, object]
) -> None:
    ollprox = await launch(**settings, MODEL_REFRESH=3600)
    await ollama.until(lambda: tags(ollama) == 1)
    await ask(ollprox.port, "POST", "/call_model", question())
    assert (await ask(ollprox.port, "POST", "/api/pull", {"model": "llama2"}, BOSS)).complete
    hit = await ask(ollprox.port, "POST", "/call_model", question(), FROM_CACHE)
    assert hit.status == 200


class Watched(ModelWatch):
    """A watch whose drops are noted; its Ollama lists what the test says."""

    def __init__(self, digests: Callable[[], object]) -> None:
        self.cache: Cache[StoredAnswer] = Cache(Budget(1 << 20), 60)
        upstream = Upstream("-", 1, "-", connect_timeout=1, first_byte_timeout=1, idle_timeout=1)
        probe = Probe(upstream)

        async def read() -> dict[str, str] | None:
            listed = digests()
            if isinstance(listed, asyncio.Event):
                await listed.wait()
            return listed if isinstance(listed, dict) else None

        probe.digests = read  # type: ignore[method-assign]
        super().__init__(
            probe,
            self.cache,
            Flights(1 << 20, self.cache.budget, upstream.exchange),
            lambda names: None,
        )
        self.dropped: list[Collection[str] | None] = []

    def _drop(self, names: Collection[str] | None) -> int:
        self.dropped.append(names)
        return super()._drop(names)


@pytest.mark.parametrize(
    ("body", "dropped"), [(b'{"model": "m"}', {"m:latest"}), (b"?", None), (b" " * 70_000, None)]
)
@pytest.mark.parametrize("comes", [True, False])
async def test_without_a_list_all_that_may_be_wrong_is_dropped(
    monkeypatch: pytest.MonkeyPatch, body: bytes, dropped: set[str] | None, comes: bool
) -> None:
    """A list that cannot be read, or that does not come, holds nobody up."""
    monkeypatch.setattr(answers.models, "MANAGE_TIMEOUT", 0.01)
    watch = Watched(lambda: None if comes else asyncio.Event())
    change = ModelChange(watch)
    change.note(body)

    async def replay() -> Response:
        return Response(200, (), b"")

    response = await change.settled(replay())
    assert watch.dropped == [dropped]
    assert response.release
    response.release()
    assert watch.dropped == [dropped]
    assert watch.due.is_set()


async def test_a_change_without_an_end_is_taken_for_done() -> None:
    """Upstream may break off, and the client may leave before the response or in its middle."""

    async def breaks() -> Response:
        raise HTTPError(502, "gone")

    async def streams() -> Response:
        async def pieces() -> AsyncIterator[bytes]:
            yield b'{"status":"pulling manifest"}'

        return Response(200, (), pieces())

    for replay in (breaks, streams):
        watch = Watched(lambda: {"m:latest": "1"})
        change = ModelChange(watch)
        change.note(b'{"name":')
        change.note(b'"m"}')
        try:
            response = await change.settled(replay())
        except HTTPError:
            response = None
        if response is not None:
            assert response.release
            response.release()
        assert watch.dropped == [{"m:latest"}]
        assert watch.due.is_set()


# Whether Ollama is there.


async def test_ollama_that_goes_and_comes_back_is_a_warning_and_a_line(
    launch: Start, ollama: StandIn, settings: dict[str, object]
) -> None:
    ollprox = await launch(**settings, MODEL_REFRESH=0.05)
    await ollprox.says("answers at")
    await ollama.until(lambda: tags(ollama) > 0)
    await ollama.stop()
    await ollprox.says("WARNING.*Ollama does not answer any more: .*cannot be reached")
    await ollama.start(port=ollama.port)
    before = tags(ollama)
    await ollprox.says("INFO.*Ollama at .* answers again")
    await ollama.until(lambda: tags(ollama) > before + 2)
    assert len(re.findall("does not answer|answers again", ollprox.text())) == 2


async def test_a_request_that_does_not_reach_ollama_shows_that_it_is_down(
    launch: Start, ollama: StandIn, settings: dict[str, object]
) -> None:
    """At once, not at the next poll; and its return is seen without any request."""
    ollprox = await launch(**settings, MODEL_REFRESH=0)
    await ollprox.says("answers at")
    await ollama.stop()
    assert (await ask(ollprox.port, "POST", "/call_model", question())).status == 502
    await ollprox.says("WARNING.*Ollama does not answer any more: .*cannot be reached")
    metrics = await ask(ollprox.port, "GET", "/metrics")
    assert re.search(rb"\nollprox_upstream_up\{host=\S+\} 0\n", metrics.body)
    await ollama.start(port=ollama.port)
    await ollprox.says("INFO.*Ollama at .* answers again")
    metrics = await ask(ollprox.port, "GET", "/metrics")
    assert re.search(rb"\nollprox_upstream_up\{host=\S+\} 1\n", metrics.body)
    assert len(re.findall("does not answer|answers again", ollprox.text())) == 2


async def test_whether_ollama_is_up_is_unknown_at_first(ollama: StandIn) -> None:
    upstream = Upstream(
        "127.0.0.1", ollama.port, "x", connect_timeout=5, first_byte_timeout=5, idle_timeout=5
    )
    probe = Probe(upstream)
    cache: Cache[StoredAnswer] = Cache(Budget(1 << 20), 60)
    watch = ModelWatch(
        probe, cache, Flights(1 << 20, cache.budget, upstream.exchange), lambda names: None
    )
    assert probe.up is None
    await watch.refresh()
    assert probe.up is True
    await ollama.stop()
    await watch.refresh()
    assert probe.up is False
    assert not await probe.ready()
    await upstream.close()
