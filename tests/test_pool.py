"""Several Ollama servers: which one is asked, and what happens when one fails."""

import asyncio
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from standin import Script, StandIn

from answers.ollama_api import POOL_API
from settings import normalize_model
from wire.http11 import Ask, HTTPError, Response
from wire.pool import POLL_TIMEOUT, Pool
from wire.roster import MAX_PROBE, Health, Member, Roster, Slot
from wire.upstream import NoAnswer, Upstream

TRACES = Path(__file__).parent / "traces"


def members(*lists: dict[str, str] | None, **more: int) -> list[Member]:
    return [Member(name, digests=found, **more) for name, found in zip("abcd", lists, strict=False)]  # type: ignore[arg-type]


def choose(roster: Roster, model: str = "m", prompt: bytes = b"", now: float = 0) -> str:
    chosen = roster.choose(model, prompt, now)
    return chosen.name if chosen else "-"


# The choice.


def test_the_digest_is_that_of_most_healthy_servers_and_of_the_first_in_a_tie() -> None:
    a, b, c = members({"m": "1"}, {"m": "2"}, {"m": "2"})
    roster = Roster([a, b, c])
    assert roster.digest("m") == "2"
    assert roster.able("m") == [b, c]
    assert roster.conflicts() == {("a", "m")}
    roster.note_unreachable(c, 0)
    assert roster.digest("m") == "1"
    assert roster.able("m") == [a]
    roster.note_unreachable(a, 0)
    assert roster.digest("m") == "2"  # of those that are healthy
    roster.note_unreachable(b, 0)
    assert roster.digest("m") == "2"  # of all, as none is
    assert roster.able("m") == [b, c]
    assert roster.digests() == {"m": "2"}


def test_a_model_that_nobody_lists_is_asked_of_one_server() -> None:
    roster = Roster(members({"x": "1"}, {"x": "1"}))
    assert choose(roster) in {"a", "b"}
    assert roster.digest("m") is None
    unlisted = Roster(members({"x": "1"}, None))
    assert choose(unlisted) == "b"  # it may have the model: its list is not known yet
    assert choose(unlisted, "x") == "a"  # but its model may be another one of the same name


def test_the_fewest_generations_by_weight_then_a_loaded_model_then_the_prompt_decide() -> None:
    a, b, c = members({"m": "1"}, {"m": "1"}, {"m": "1"})
    roster = Roster([a, b, c])
    prompts = [b"prompt %d" % number for number in range(60)]
    first = [choose(roster, prompt=prompt) for prompt in prompts]
    assert {first.count(name) > 5 for name in "abc"} == {True}
    assert first == [choose(roster, prompt=prompt) for prompt in prompts]
    long = b"x" * 1024
    assert choose(roster, prompt=long + b"a") == choose(roster, prompt=long + b"b")
    b.loaded = frozenset({"m"})
    assert {choose(roster, prompt=prompt) for prompt in prompts} == {"b"}
    b.running = 1
    assert "b" not in {choose(roster, prompt=prompt) for prompt in prompts}
    a.running = c.running = 1
    c.weight = 2
    assert choose(roster) == "c"


def test_the_choice_for_a_prompt_stays_when_another_server_comes() -> None:
    """Or Ollama's prompt cache would be of no use after it."""
    three = members({"m": "1"}, {"m": "1"}, {"m": "1"})
    prompts = [b"prompt %d" % number for number in range(100)]
    before = [choose(Roster(three[:2]), prompt=prompt) for prompt in prompts]
    after = [choose(Roster(three), prompt=prompt) for prompt in prompts]
    assert {new for old, new in zip(before, after, strict=True) if old != new} == {"c"}


def test_a_server_without_a_connection_is_out_at_once_and_probed_less_and_less() -> None:
    a, b = members({"m": "1"}, {"m": "1"})
    roster = Roster([a, b])
    roster.note_unreachable(a, 0)
    assert {choose(roster, prompt=bytes([n]), now=math.inf) for n in range(20)} == {"b"}
    pauses = []
    for _ in range(8):
        now = a.probe_at
        roster.note_unreachable(a, now - 0.1)  # a request that was tried all the same
        roster.note_unreachable(a, now)
        pauses.append(a.probe_at - now)
    assert pauses == [2, 4, 8, 16, 30, 30, 30, 30]
    roster.note_reached(a)
    assert a.health is Health.UP
    roster.note_unreachable(a, 1000)
    assert a.probe_at == 1001


def test_three_failures_in_a_row_take_a_server_out_until_a_request_succeeds() -> None:
    a, b = members({"m": "1"}, {"m": "1"})
    roster = Roster([a, b])
    for status in (500, 503, 404, 500, 500):
        roster.note_answer(a, status, 0)
    assert a.health.name == "UP"
    roster.note_answer(a, 500, 0)
    assert a.health.name == "FAILING"
    roster.note_reached(a)
    assert a.health.name == "FAILING"  # a GET says nothing about generations
    assert choose(roster, now=0.9) == "b"
    assert choose(roster, now=1) == "a"  # the probe, however busy it is
    slot = roster.move(Slot(), a)
    assert choose(roster, now=1) == "b"  # one is enough
    roster.note_answer(a, 500, 1)
    roster.give_back(slot)
    assert choose(roster, now=2.9) == "b"
    assert choose(roster, now=3) == "a"
    roster.note_answer(a, 200, 3)
    assert (a.health, a.failures) == (Health.UP, 0)


def test_a_failing_server_that_nobody_asks_is_trusted_again() -> None:
    """Its digest is not the one that counts while it is down, so no request comes to end that."""
    a, b = members({"m": "1"}, {"m": "2"})
    roster = Roster([a, b])
    for _ in range(3):
        roster.note_answer(a, 500, 0)
    assert choose(roster, now=100) == "b"
    roster.trust_again(MAX_PROBE)
    assert a.health is Health.FAILING
    roster.trust_again(MAX_PROBE + 1)
    assert choose(roster, now=100) == "a"
    roster.note_answer(a, 500, 100)
    assert a.health is Health.FAILING


def test_if_all_are_out_all_are_tried() -> None:
    a, b = members({"m": "1"}, {"m": "1"})
    roster = Roster([a, b])
    roster.note_unreachable(a, 0)
    roster.note_unreachable(b, 0)
    first = roster.choose("m", b"", 0)
    assert first is not None
    second = roster.choose("m", b"", 0, [first])
    assert {first, second} == {a, b}
    assert roster.choose("m", b"", 0, [a, b]) is None


def test_slots_are_counted_for_each_server() -> None:
    a, b = members({"m": "1", "only-a": "2"}, {"m": "1"}, slots=2)
    roster = Roster([a, b])
    assert roster.total == 4
    slots = [roster.take("m", 0) for _ in range(4)]
    assert (a.running, b.running) == (2, 2)
    assert roster.take("m", 0) is None
    assert roster.take("only-a", 0) is None
    for slot in slots:
        assert slot is not None
        if slot.member is b:
            roster.give_back(slot)
            roster.give_back(slot)  # once is enough
    assert roster.take("only-a", 0) is None
    assert (a.running, b.running) == (2, 0)
    roster.note_unreachable(b, 0)
    assert roster.take("m", 0) is None  # it waits for a server that is up
    roster.note_unreachable(a, 0)
    assert Roster(members({}, {})).take("m", 0) is not None  # any number


def test_a_request_moves_to_a_server_with_a_free_slot_before_a_less_busy_one() -> None:
    a, b, c = members({"m": "1"}, {"m": "1"}, {"m": "1"}, slots=2)
    roster = Roster([a, b, c])
    b.running, b.weight, c.running = 2, 100, 1
    chosen = roster.choose("m", b"", 0, [a])
    assert chosen is c
    c.running = 2
    assert roster.choose("m", b"", 0, [a]) is b  # one more than its slots, rather than an error
    assert roster.choose("m", b"", 0, [a], free=True) is None


# The exchange, with servers that do what a test says.


FAILS = {
    "refuse": NoAnswer(502, "cannot be reached", kind="unreachable"),
    "close": NoAnswer(502, "closed", kind="broken"),
    "late": HTTPError(504, "late", kind="timeout"),
    "garbage": HTTPError(502, "not HTTP", kind="protocol"),
}


class Fake:
    """A server, and what it does with the next requests."""

    def __init__(self, name: str, digests: dict[str, str]) -> None:
        self.name = self.address = name
        self.requests = 0
        self.digests = digests
        self.does = "answer"
        self.asked: list[Ask] = []
        self.on_ask: Callable[[Ask], object] = lambda ask: None
        self.on_act: Callable[[Ask, str], object] = lambda ask, does: None
        self.hold: Callable[[], Awaitable[object]] | None = None

    @asynccontextmanager
    async def exchange(self, ask: Ask) -> AsyncIterator[Response]:
        self.asked.append(ask)
        self.on_ask(ask)
        if self.hold is not None:
            await self.hold()
        self.on_act(ask, self.does)
        if self.does == "refuse":
            raise FAILS[self.does]
        if ask.target == b"/api/tags":
            yield self.list()
        elif self.does in FAILS:
            raise FAILS[self.does]
        elif self.does == "break":
            yield Response(200, (), self.broken())
        elif self.does.isdigit():
            yield Response(int(self.does), (), self.said(b"error of %b" % self.name.encode()))
        else:
            yield Response(200, (), self.said(self.name.encode()))

    def sweep(self) -> None:
        pass

    async def close(self) -> None:
        pass

    def list(self) -> Response:
        models = [{"name": name, "digest": digest} for name, digest in self.digests.items()]
        return Response(200, (), self.said(json.dumps({"models": models}).encode()))

    async def said(self, body: bytes) -> AsyncIterator[bytes]:
        yield body

    async def broken(self) -> AsyncIterator[bytes]:
        yield self.name.encode()
        raise HTTPError(502, "broke off", kind="broken")

    def generations(self) -> int:
        return sum(ask.model != "" for ask in self.asked)


class Fakes:
    """A pool of fakes, and a clock."""

    def __init__(self, *lists: dict[str, str], refresh: float = 30) -> None:
        self.now = 1000.0
        self.changes = 0
        self.fakes = {name: Fake(name, found) for name, found in zip("abcd", lists, strict=False)}
        self.pool = Pool(
            {Member(name): fake for name, fake in self.fakes.items()},
            POOL_API,
            model_refresh=refresh,
            changed=self.change,
            clock=lambda: self.now,
        )

    def change(self) -> None:
        self.changes += 1

    def member(self, name: str) -> Member:
        return next(m for m in self.pool.roster.members if m.name == name)

    async def ask(self, model: str = "m:latest", prompt: bytes = b"p") -> tuple[int, bytes]:
        ask = Ask(b"POST", b"/api/generate", (), prompt, model=model)
        async with self.pool.exchange(ask) as response:
            return response.status, b"".join([piece async for piece in response.body])  # type: ignore[union-attr]

    async def get(self, target: bytes, method: bytes = b"GET") -> bytes:
        async with self.pool.exchange(Ask(method, target, ())) as response:
            assert response.status == 200
            return b"".join([piece async for piece in response.body])  # type: ignore[union-attr]


SAME = {"m:latest": "1"}


@pytest.mark.parametrize("does", ["refuse", "close", "503"])
async def test_another_server_is_asked_while_no_byte_has_come(does: str) -> None:
    fakes = Fakes(SAME, SAME)
    await fakes.pool.tick()
    fakes.fakes["a"].does = does
    for number in range(20):
        assert await fakes.ask(prompt=b"%d" % number) == (200, b"b")
    # A refusal takes it out at once, the others after three.
    assert fakes.fakes["a"].generations() == (1 if does == "refuse" else 3)
    assert {member.running for member in fakes.pool.roster.members} == {0}


@pytest.mark.parametrize("does", ["500", "late", "garbage", "break", "404"])
async def test_nothing_is_sent_twice_once_upstream_has_answered(does: str) -> None:
    fakes = Fakes(SAME, SAME)
    await fakes.pool.tick()
    for fake in fakes.fakes.values():
        fake.does = does
    if does.isdigit():
        assert (await fakes.ask())[0] == int(does)
    else:
        with pytest.raises(HTTPError):
            await fakes.ask()
    assert sum(fake.generations() for fake in fakes.fakes.values()) == 1
    assert {member.running for member in fakes.pool.roster.members} == {0}


async def test_the_last_servers_503_is_passed_on() -> None:
    fakes = Fakes(SAME, SAME)
    await fakes.pool.tick()
    fakes.fakes["a"].does = fakes.fakes["b"].does = "503"
    status, body = await fakes.ask()
    assert (status, body[:8]) == (503, b"error of")
    assert [fake.generations() for fake in fakes.fakes.values()] == [1, 1]


async def test_an_upload_is_never_sent_twice() -> None:
    fakes = Fakes(SAME, SAME)
    await fakes.pool.tick()
    fakes.fakes["a"].does = fakes.fakes["b"].does = "close"

    async def body() -> AsyncIterator[bytes]:
        yield b"x"

    ask = Ask(b"POST", b"/api/generate", (), body(), model="m:latest")
    with pytest.raises(NoAnswer):
        await fakes.pool.exchange(ask).__aenter__()
    assert sum(fake.generations() for fake in fakes.fakes.values()) == 1


async def test_a_server_that_answers_503_at_once_gets_less_than_a_hundredth() -> None:
    fakes = Fakes(SAME, SAME)
    await fakes.pool.tick()
    fakes.fakes["a"].does = "503"
    for number in range(1000):
        fakes.now += 0.05
        assert await fakes.ask(prompt=b"%d" % number) == (200, b"b")
    assert fakes.fakes["a"].generations() < 10


async def test_a_server_that_comes_back_is_used_again_with_its_new_list() -> None:
    fakes = Fakes(SAME, SAME)
    await fakes.pool.tick()
    a = fakes.fakes["a"]
    a.does = "refuse"
    while fakes.member("a").health is Health.UP:
        await fakes.ask(prompt=b"%f" % fakes.now)
        fakes.now += 0.001
    a.does, a.digests = "answer", {"m:latest": "2"}
    fakes.now += 1
    await fakes.pool.tick()
    assert fakes.member("a").health is Health.UP
    # In a tie the first one counts; and whoever watches the digests was told.
    assert fakes.pool.digests() == {"m:latest": "2"}
    assert fakes.pool.conflicts() == {("b", "m:latest")}
    assert fakes.changes >= 2
    assert await fakes.ask() == (200, b"a")


async def test_a_list_that_does_not_come_in_time_counts_as_no_connection(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("wire.pool.POLL_TIMEOUT", 0.05)
    assert POLL_TIMEOUT == 2
    fakes = Fakes(SAME, SAME)
    await fakes.pool.tick()
    caplog.set_level("INFO")
    fakes.now += 30
    fakes.fakes["a"].hold = asyncio.Event().wait
    await fakes.pool.tick()
    assert fakes.member("a").health is Health.UNREACHABLE
    assert await fakes.ask() == (200, b"b")
    fakes.fakes["a"].hold = None
    fakes.now += 1
    await fakes.pool.tick()
    assert fakes.member("a").health is Health.UP
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["Ollama on a is down: no answer within 0.05 s", "Ollama on a is back"]


async def test_each_change_of_health_is_one_line_of_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also when a failing server is trusted again since no request came for it."""
    fakes = Fakes({"m:latest": "1"}, {"m:latest": "2"})
    await fakes.pool.tick()
    caplog.set_level("INFO")
    caplog.clear()
    fakes.fakes["a"].does = "500"
    for _ in range(3):
        assert (await fakes.ask())[0] == 500
    assert await fakes.ask() == (200, b"b")  # the other digest counts meanwhile
    fakes.now += 1 + MAX_PROBE
    await fakes.pool.tick()
    assert (await fakes.ask())[0] == 500
    found = [line.getMessage() for line in caplog.records]
    lines = [line for line in found if "is not used for" not in line]
    down, back = "Ollama on a is down: it failed three times in a row", "Ollama on a is back"
    assert lines == [down, back, down]


async def test_lists_are_those_of_all_servers_from_the_last_poll() -> None:
    fakes = Fakes({"m": "1", "x": "2"}, {"m": "9", "y": "3"})
    await fakes.pool.tick()
    for fake in fakes.fakes.values():
        fake.does = "refuse"
        fake.asked.clear()
    tags = json.loads(await fakes.get(b"/api/tags"))["models"]
    assert sorted((m["name"], m["digest"]) for m in tags) == [("m", "1"), ("x", "2"), ("y", "3")]
    listed = json.loads(await fakes.get(b"/v1/models"))
    assert sorted(model["id"] for model in listed["data"]) == ["m", "x", "y"]
    assert json.loads(await fakes.get(b"/api/ps")) == {"models": []}
    assert await fakes.get(b"/api/tags", b"HEAD") == b""
    assert not any(fake.asked for fake in fakes.fakes.values())


async def test_without_polls_lists_are_passed_through_and_all_servers_are_equal() -> None:
    fakes = Fakes(SAME, {}, refresh=0)
    await fakes.pool.tick()
    assert fakes.pool.digests() is None
    assert json.loads(await fakes.get(b"/api/tags"))["models"]
    assert {(await fakes.ask(prompt=b"%d" % n))[1] for n in range(20)} == {b"a", b"b"}


async def test_one_server_by_name_is_asked_alone() -> None:
    fakes = Fakes(SAME, SAME)
    fakes.fakes["b"].does = "close"
    with pytest.raises(NoAnswer):
        await fakes.pool.exchange(
            Ask(b"POST", b"/host/b/api/generate", (), model="m:latest")
        ).__aenter__()
    assert fakes.fakes["a"].asked == []
    fakes.fakes["b"].does = "answer"
    assert await fakes.get(b"/host/b/api/tags") != await fakes.get(b"/host/a/api/version")
    assert [ask.target for ask in fakes.fakes["a"].asked] == [b"/api/version"]
    with pytest.raises(HTTPError, match="no server of that name"):
        await fakes.get(b"/host/c/api/tags")


async def test_what_leaves_something_behind_goes_to_the_first_server() -> None:
    fakes = Fakes(SAME, SAME)
    fakes.pool.roster.note_unreachable(fakes.member("a"), 0)
    for method, target, name in (
        (b"POST", b"/api/copy", "a"),
        (b"HEAD", b"/api/blobs/sha256:x", "a"),
        (b"GET", b"/api/version", "b"),
    ):
        async with fakes.pool.exchange(Ask(method, target, ())) as response:
            assert b"".join([p async for p in response.body]) == name.encode()  # type: ignore[union-attr]


async def test_a_read_is_asked_of_the_next_server_if_one_does_not_answer() -> None:
    fakes = Fakes(SAME, SAME)
    fakes.fakes["a"].does = "refuse"
    assert await fakes.get(b"/api/version") == b"b"
    assert fakes.member("a").health is Health.UNREACHABLE
    fakes.fakes["b"].does = "refuse"
    with pytest.raises(NoAnswer):
        await fakes.get(b"/api/version")
    assert fakes.pool.address == "a, b"


async def test_a_list_is_read_again_once_a_model_was_managed() -> None:
    fakes = Fakes({"m": "1"}, {"m": "1"})
    await fakes.pool.tick()
    fakes.fakes["b"].digests = {"m": "1", "new": "2"}
    assert b"new" not in await fakes.get(b"/api/tags")
    async with fakes.pool.exchange(Ask(b"POST", b"/api/copy", ())):
        pass
    assert b"new" in await fakes.get(b"/api/tags")
    assert fakes.pool.digests() == {"m:latest": "1", "new:latest": "2"}


async def test_one_model_is_shown_by_a_server_that_has_it() -> None:
    fakes = Fakes({"m": "1"}, {"ns/other:latest": "2"})
    await fakes.pool.tick()
    assert await fakes.get(b"/v1/models/m") == b"a"
    assert await fakes.get(b"/v1/models/ns%2Fother") == b"b"
    assert await fakes.get(b"/v1/models/nobodys") == b"a"


# Real servers.


@asynccontextmanager
async def servers(*scripts: Script) -> AsyncIterator[tuple[Pool, list[StandIn]]]:
    standins = [StandIn(script) for script in scripts]
    upstreams = []
    for standin in standins:
        port = await standin.start()
        upstreams.append(
            Upstream(
                "127.0.0.1",
                port,
                f"127.0.0.1:{port}",
                connect_timeout=5,
                first_byte_timeout=5,
                idle_timeout=5,
            )
        )
    pool = Pool(
        {Member(f"gpu{n}"): upstream for n, upstream in enumerate(upstreams, 1)},
        POOL_API,
        model_refresh=30,
    )
    try:
        yield pool, standins
    finally:
        await pool.close()
        for standin in standins:
            standin.script.let_go.set()
            await standin.stop()


async def asked(
    pool: Pool, method: bytes, target: bytes, body: object, model: str = ""
) -> Response:
    data = json.dumps(body).encode()
    async with pool.exchange(Ask(method, target, (), data, model=model)) as response:
        response.body = b"".join([piece async for piece in response.body])  # type: ignore[union-attr]
    return response


async def test_a_server_that_is_killed_fails_no_request() -> None:
    async with servers(Script(), Script()) as (pool, standins):
        await pool.tick()
        served = [standin.port for standin in standins if standin.asked("/api/tags")]
        assert len(served) == 2
        for number in range(12):
            if number == 6:
                await standins[0].stop()
            question = {"model": "llama2", "prompt": str(number), "stream": False}
            answer = await asked(pool, b"POST", b"/api/generate", question, "llama2:latest")
            assert answer.status == 200
        assert [status.health for status in pool.statuses()] == [Health.UNREACHABLE, Health.UP]
        assert pool.statuses()[0].errors == 1
        await standins[0].start(port=standins[0].port)


async def test_a_pull_goes_to_all_servers_and_says_on_which_it_is() -> None:
    async with servers(Script(), Script()) as (pool, standins):
        answer = await asked(pool, b"POST", b"/api/pull", {"model": "m"})
        assert isinstance(answer.body, bytes)
        lines = [json.loads(line) for line in answer.body.splitlines()]
        assert lines[-1] == {"status": "success"}
        assert lines[0] == {"status": "gpu1: pulling manifest", "host": "gpu1"}
        assert [line.get("host") for line in lines] == ["gpu1"] * 3 + ["gpu2"] * 3 + [None]
        assert [len(standin.asked("/api/pull")) for standin in standins] == [1, 1]
        one = await asked(pool, b"POST", b"/api/pull", {"model": "m", "stream": False})
        assert (one.status, one.body) == (200, b'{"status":"success"}\n')


async def test_a_pull_that_fails_somewhere_ends_in_an_error_that_says_where() -> None:
    async with servers(Script(break_after=1), Script()) as (pool, _):
        answer = await asked(pool, b"POST", b"/api/pull", {"model": "m"})
        assert isinstance(answer.body, bytes)
        lines = [json.loads(line) for line in answer.body.splitlines()]
        assert lines[-1] == {"error": "the pull failed on gpu1; done on gpu2"}
        assert "gpu1: failed: " in answer.body.decode()
        assert sum("error" in line for line in lines) == 1
        one = await asked(pool, b"POST", b"/api/pull", {"model": "m", "stream": False})
        assert one.status == 500


@pytest.mark.parametrize(
    ("raws", "status"),
    [
        ((None, None), 200),
        ((None, 404), 200),
        ((404, 404), 404),
        ((None, 500), 502),
        ((500, 404), 502),
    ],
)
async def test_a_delete_takes_a_404_of_some_for_success(
    raws: tuple[int | None, ...], status: int
) -> None:
    def script(raw: int | None) -> Script:
        head = b"HTTP/1.1 %d X\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
        return Script(raw=None if raw is None else head % raw)

    async with servers(*map(script, raws)) as (pool, standins):
        if status == 502:
            with pytest.raises(HTTPError, match=r"deleted on gpu") as caught:
                await asked(pool, b"DELETE", b"/api/delete", {"model": "m"})
            assert caught.value.status == 502
        else:
            answer = await asked(pool, b"DELETE", b"/api/delete", {"model": "m"})
            assert answer.status == status
        assert [len(standin.asked("/api/delete")) for standin in standins] == [1, 1]


def test_models_are_listed_as_ollama_does() -> None:
    """Its own `/v1/models`, made from its own `/api/tags`."""
    tags = json.loads(_body("tags"))["models"]
    models = json.loads(_body("openai-models"))
    fakes = Fakes({}, {})
    for server in fakes.pool._servers.values():
        server.tags = tags
        server.member.digests = {normalize_model(m["name"]): m["digest"] for m in tags}
    fakes.pool._digests = fakes.pool.roster.digests()
    assert json.loads(fakes.pool.union(b"/api/tags") or b"") == {"models": tags}
    assert json.loads(fakes.pool.union(b"/v1/models") or b"") == models


def _body(trace: str) -> bytes:
    return (TRACES / f"{trace}.response").read_bytes().partition(b"\r\n\r\n")[2]


# A model of it all.

NAMES = ["m:latest", "n:latest"]
RETRIED = {"refuse", "close", "503"}
ACTS = ["answer", *sorted(RETRIED), "500", "late", "break"]
LISTS = st.dictionaries(st.sampled_from(NAMES), st.sampled_from("12"))


class Held:
    """A request that takes its time."""

    def __init__(self, task: "asyncio.Task[tuple[int, bytes]]", gate: asyncio.Event) -> None:
        self.task = task
        self.gate = gate


class Servers(RuleBasedStateMachine):
    """Servers die, recover, are slow and change their models; each request must be right."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.fakes = Fakes()
        self.held: dict[bytes, Held] = {}
        self.sent: dict[bytes, list[Fake]] = {}  # by the request's prompt
        self.acts: dict[bytes, list[str]] = {}
        self.number = 0

    @initialize(lists=st.lists(LISTS, min_size=2, max_size=4))
    def begin(self, lists: list[dict[str, str]]) -> None:
        self.fakes = Fakes(*lists)
        for fake in self.fakes.fakes.values():
            fake.on_ask = lambda ask, fake=fake: self.note(fake, ask)  # type: ignore[misc]
            fake.on_act = self.note_act
        self.tick()

    def teardown(self) -> None:
        for prompt in list(self.held):
            self.leave(prompt)
        self.loop.close()

    def note(self, fake: Fake, ask: Ask) -> None:
        if ask.model:
            assert not isinstance(ask.body, AsyncIterator)
            self.sent.setdefault(ask.body, []).append(fake)
            wanted = self.fakes.pool.roster.digest(ask.model)
            if wanted is not None:
                assert fake.digests.get(ask.model) == wanted, "a server with another digest"

    def note_act(self, ask: Ask, does: str) -> None:
        if ask.model:
            assert not isinstance(ask.body, AsyncIterator)
            self.acts.setdefault(ask.body, []).append(does)

    def run(self, does: Awaitable[object]) -> object:
        async def bounded() -> object:
            async with asyncio.timeout(5):
                return await does

        return self.loop.run_until_complete(bounded())

    @rule()
    def tick(self) -> None:
        self.run(self.fakes.pool.tick())

    @rule(seconds=st.sampled_from([0.5, 1, 5, 31, 100]))
    def wait(self, seconds: float) -> None:
        self.fakes.now += seconds
        self.tick()

    @rule(index=st.integers(0, 3), does=st.sampled_from(ACTS))
    def behave(self, index: int, does: str) -> None:
        fakes = list(self.fakes.fakes.values())
        fakes[index % len(fakes)].does = does

    @rule(index=st.integers(0, 3), digests=LISTS)
    def manage(self, index: int, digests: dict[str, str]) -> None:
        """Models are managed through OllProx, on a server that can be reached."""
        fakes = list(self.fakes.fakes.values())
        fake = fakes[index % len(fakes)]
        if fake.does != "refuse" and self.fakes.member(fake.name).health is not Health.UNREACHABLE:
            fake.digests = digests
            self.fakes.pool.poll_soon()
            self.tick()

    @rule(model=st.sampled_from(NAMES))
    def ask(self, model: str) -> None:
        prompt = self.prompt()
        self.check(prompt, model, self.loop.create_task(self.fakes.ask(model, prompt)))

    @rule(model=st.sampled_from(NAMES))
    def ask_slowly(self, model: str) -> None:
        """Begin a request whose first server takes its time."""
        prompt, gate = self.prompt(), asyncio.Event()
        for fake in self.fakes.fakes.values():
            fake.hold = gate.wait
        task = self.loop.create_task(self.fakes.ask(model, prompt))
        self.run(asyncio.sleep(0))
        self.run(asyncio.sleep(0))
        for fake in self.fakes.fakes.values():
            fake.hold = None
        self.held[prompt] = Held(task, gate)

    @precondition(lambda self: self.held)
    @rule(index=st.integers(0, 9))
    def finish(self, index: int) -> None:
        prompt = list(self.held)[index % len(self.held)]
        held = self.held.pop(prompt)
        held.gate.set()
        self.check(prompt, "", held.task)

    @precondition(lambda self: self.held)
    @rule(index=st.integers(0, 9))
    def cancel(self, index: int) -> None:
        self.leave(list(self.held)[index % len(self.held)])

    def leave(self, prompt: bytes) -> None:
        held = self.held.pop(prompt)
        held.task.cancel()
        self.run(asyncio.wait([held.task]))

    def prompt(self) -> bytes:
        self.number += 1
        return b"%d" % self.number

    def check(self, prompt: bytes, model: str, task: "asyncio.Task[tuple[int, bytes]]") -> None:
        failed, status = None, 0
        try:
            status, _ = self.run(task)  # type: ignore[misc]
        except HTTPError as error:
            failed = error
        sent, (*before, last) = self.sent[prompt], self.acts[prompt]
        assert all(did in RETRIED for did in before), "sent twice after a byte was seen"
        assert len(set(sent)) == len(sent) == len(before) + 1
        if isinstance(failed, NoAnswer) or status == 503:
            able = {member.name for member in self.fakes.pool.roster.able(model)}
            assert not model or able <= {fake.name for fake in sent}, "one was not asked"
        else:
            assert (failed is None) is (last in {"answer", "500"})

    @invariant()
    def what_runs_is_counted(self) -> None:
        members = self.fakes.pool.roster.members
        assert sum(member.running for member in members) == len(self.held)
        assert all(member.pause <= MAX_PROBE for member in members)
        if not self.held:
            assert not any(member.is_probed for member in members)


TestServers = Servers.TestCase
TestServers.settings = hypothesis_settings(max_examples=60, stateful_step_count=30, deadline=None)
