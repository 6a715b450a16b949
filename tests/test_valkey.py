"""The circuit breaker, sealed values, shared counters; and random histories of three processes."""

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from access.rights import Key, Limit
from answers.flight import Flights, Source
from answers.limits import LimitReached
from answers.notes import progress_notes
from answers.shared import EPOCH_KEY, MAX_WAITING, Sealer, SharedCache
from answers.shared_limits import BUCKETS, SharedLimits
from answers.stored import StoredAnswer
from cache import Budget, Cache
from wire.http11 import Ask, HTTPError, Lookup, Response
from wire.valkey import MAX_COMMANDS, MAX_ERRORS, RETRY_AFTER, State, Unavailable, Valkey


class RedisError(Exception):
    pass


class ResponseError(RedisError):
    pass


class NoPermissionError(ResponseError):
    pass


class OutOfMemoryError(ResponseError):
    pass


class AuthenticationError(RedisError):
    pass


ERRORS = SimpleNamespace(
    RedisError=RedisError,
    ResponseError=ResponseError,
    NoPermissionError=NoPermissionError,
    OutOfMemoryError=OutOfMemoryError,
    AuthenticationError=AuthenticationError,
)

Store = dict[bytes, bytes]


def execute(store: Store, command: tuple[Any, ...]) -> Any:
    """What a server does with the commands that OllProx sends."""
    match command:
        case "MGET", *names:
            return [store.get(name) for name in names]
        case "SET", name, value, "NX":
            if name in store:
                return None
            store[name] = value if isinstance(value, bytes) else value.encode()
            return b"OK"
        case "SET", name, value, "EX", int():
            store[name] = value
            return b"OK"
        case "DEL", name:
            return int(store.pop(name, None) is not None)
        case "INCRBY", name, amount:
            store[name] = b"%d" % (int(store.get(name, b"0")) + amount)
            return int(store[name])
        case "EXPIRE", _, int():
            return 1
    raise AssertionError(command)


class FakeLink:
    """A connection to a store in memory; `trouble` runs before each reply."""

    def __init__(self, store: Store, trouble: Callable[[], Awaitable[None]]) -> None:
        self.is_connected = False
        self.reply: Any = None
        self.store = store
        self.trouble = trouble

    async def connect(self) -> None:
        self.is_connected = True

    async def disconnect(self, *, nowait: bool = False) -> None:
        self.is_connected = False

    async def send_command(self, *arguments: Any) -> None:
        self.reply = execute(self.store, arguments)

    async def read_response(self) -> Any:
        await self.trouble()
        return self.reply


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


async def nothing() -> None:
    pass


def valkey(
    store: Store | None = None,
    trouble: Callable[[], Awaitable[None]] = nothing,
    clock: Clock | None = None,
    timeout: float = 1.0,
) -> Valkey:
    store = {} if store is None else store
    return Valkey(lambda: FakeLink(store, trouble), ERRORS, timeout, clock or Clock())


# The breaker.


class Trouble:
    """Raises what it is told to."""

    error: Exception | None = None

    async def __call__(self) -> None:
        if self.error is not None:
            raise self.error


async def failures(server: Valkey, count: int) -> None:
    for _ in range(count):
        with pytest.raises(Unavailable):
            await server.call("MGET", b"x")


async def test_errors_in_a_row_leave_the_server_out_until_a_probe_works() -> None:
    trouble, clock = Trouble(), Clock()
    server = valkey(trouble=trouble, clock=clock)
    await server.call("MGET", b"x")
    trouble.error = RedisError()
    await failures(server, MAX_ERRORS - 1)
    states = [server.state]
    await failures(server, 1)
    assert [*states, server.state] == [State.FAILING, State.OUT]
    before = server.errors
    await failures(server, 5)
    assert server.errors == before  # nothing was sent
    clock.now += RETRY_AFTER
    await failures(server, 5)
    assert server.errors == before + 1  # one probe
    trouble.error, clock.now = None, clock.now + RETRY_AFTER
    await server.call("MGET", b"x")
    assert server.state is State.UP


async def test_the_first_error_of_all_leaves_it_out_at_once() -> None:
    trouble = Trouble()
    trouble.error = RedisError()
    server = valkey(trouble=trouble)
    await failures(server, 1)
    assert server.state is State.OUT


@pytest.mark.parametrize("error", [OutOfMemoryError(), NoPermissionError(), ResponseError()])
async def test_a_reply_that_refuses_is_no_outage(error: Exception) -> None:
    trouble = Trouble()
    server = valkey(trouble=trouble)
    trouble.error = error
    await failures(server, 10)
    assert server.state is State.UP


async def test_waiting_for_a_connection_is_no_error() -> None:
    hold = asyncio.Event()
    server = valkey(trouble=hold.wait, timeout=0.05)  # type: ignore[arg-type]
    server.state, server._timeout = State.UP, 60
    busy = [asyncio.create_task(server.call("MGET", b"x")) for _ in range(MAX_COMMANDS)]
    await asyncio.sleep(0)
    server._timeout = 0.01
    with pytest.raises(Unavailable, match="busy"):
        await server.call("MGET", b"x")
    assert (server.state, server.errors) == (State.UP, 0)
    hold.set()
    await asyncio.gather(*busy)


async def test_no_reply_is_given_to_another_command() -> None:
    """A command that is cancelled takes its connection with it."""
    store: Store = {b"a": b"of a", b"b": b"of b"}
    hold = asyncio.Event()
    links: list[FakeLink] = []

    def connect() -> FakeLink:
        links.append(FakeLink(store, hold.wait))  # type: ignore[arg-type]
        return links[-1]

    server = Valkey(connect, ERRORS, 60)
    task = asyncio.create_task(server.call("MGET", b"a"))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    hold.set()
    assert await server.call("MGET", b"b") == [b"of b"]
    assert len(links) == 2
    assert not links[0].is_connected


# Sealed values.


def test_a_value_opens_only_for_its_name_epoch_and_secret() -> None:
    sealer = Sealer(b"secret")
    name, other = sealer.name(b"answer", b"a"), sealer.name(b"answer", b"b")
    epoch = b"0" * 32
    value = sealer.seal(name, epoch, b"content")
    assert sealer.open(name, epoch, value) == b"content"
    assert sealer.open(other, epoch, value) is None
    assert sealer.open(name, b"1" * 32, value) is None
    assert Sealer(b"other").open(name, epoch, value) is None
    for cut in range(len(value)):
        assert sealer.open(name, epoch, value[:cut]) is None
    for at in range(len(value)):
        changed = value[:at] + bytes([value[at] ^ 1]) + value[at + 1 :]
        assert sealer.open(name, epoch, changed) is None


def test_parts_of_names_do_not_run_together() -> None:
    sealer = Sealer(b"secret")
    assert len({sealer.name(b"ab", b"c"), sealer.name(b"a", b"bc"), sealer.name(b"abc")}) == 3


# Limits.

KEY = Key(b"d" * 32, "label", b"scope")


async def test_a_window_slides_in_steps_and_never_allows_too_many() -> None:
    clock, random_ = Clock(), random.Random(1)
    server = valkey()
    processes = [SharedLimits(server, Sealer(b"s"), clock) for _ in range(3)]
    key = replace(KEY, rate=(Limit(7, 60),))
    begun: list[float] = []
    for _ in range(600):
        clock.now += random_.random() * 6
        try:
            await random_.choice(processes).reserve(key)
        except LimitReached as error:
            within = [at for at in begun if clock.now - at < 60 + 60 / BUCKETS]
            assert len(within) >= 7  # refused at most one step too long
            wait = int(dict(error.headers)[b"Retry-After"])
            assert 0 < wait <= 60 + 60 / BUCKETS + 1
            for process in processes:
                await process.flush()  # what a refusal gives back
        else:
            begun.append(clock.now)
            assert sum(clock.now - at < 60 for at in begun) <= 7


async def test_a_refused_generation_may_begin_after_retry_after() -> None:
    clock = Clock()
    limits = SharedLimits(valkey(), Sealer(b"s"), clock)
    key = replace(KEY, rate=(Limit(1, 3600),))
    await limits.reserve(key)
    with pytest.raises(LimitReached) as refused:
        await limits.reserve(key)
    await limits.flush()
    clock.now += int(dict(refused.value.headers)[b"Retry-After"])
    await limits.reserve(key)


async def test_what_is_given_back_counts_no_more() -> None:
    limits = SharedLimits(valkey(), Sealer(b"s"), Clock())
    key = replace(KEY, rate=(Limit(1, 60),))
    for _ in range(5):
        reservation = await limits.reserve(key)
        reservation.refund()
        reservation.refund()
        await limits.flush()


async def test_odd_counters_do_not_matter() -> None:
    store: Store = {}
    limits = SharedLimits(valkey(store), Sealer(b"s"), Clock())
    key = replace(KEY, tokens=(Limit(5, 60),))
    limits.spend(key, 5)
    await limits.flush()
    with pytest.raises(LimitReached, match="tokens=5/minute"):
        await limits.reserve(key)
    for odd in (b"", b"-5", b"x", b"9" * 5000):
        store.update(dict.fromkeys(store, odd))
        await limits.reserve(key)


async def test_while_the_server_is_out_nothing_is_refused() -> None:
    trouble = Trouble()
    trouble.error = RedisError()
    limits = SharedLimits(valkey(trouble=trouble), Sealer(b"s"), Clock())
    key = replace(KEY, rate=(Limit(1, 60),), tokens=(Limit(1, 60),))
    for _ in range(5):
        await limits.reserve(key)


# The shared cache.


class FakeModels:
    """A list of models with one digest, read just now."""

    def __init__(self, digest: str) -> None:
        self.listed = digest
        self.listed_at = 0.0

    def digest(self, model: str) -> str:
        return self.listed

    async def refresh(self) -> bool:
        self.listed_at = asyncio.get_running_loop().time()
        return True


def answer_of(digest: str) -> StoredAnswer:
    return StoredAnswer(b"", b"{}\n", b"", "m", digest, time.time(), 1, 0, 0, 0.0)


async def look(shared: SharedCache) -> bytes | None:
    """Look for an answer; None if there is none."""
    lookup = Lookup(b"k", 60, HTTPError(504, "not there"))
    ask = Ask(b"POST", b"/", (), model="m", lookup=lookup)
    try:
        async with shared.before(None)(ask) as response:  # type: ignore[arg-type]
            return b"".join([piece async for piece in response.body])  # type: ignore[union-attr]
    except HTTPError:
        return None


async def test_a_model_that_is_replaced_during_the_lookup_is_a_miss() -> None:
    models, purged = FakeModels("a"), []
    hook: list[Callable[[], None]] = []

    async def trouble() -> None:
        for call in hook:
            call()

    server = valkey(trouble=trouble)
    shared = SharedCache(server, Sealer(b"s"), lambda: models, 60, lambda: purged.append(1))
    await shared.watch()
    shared.store(b"k", answer_of("a"), time.monotonic())
    await shared.flush()
    assert await look(shared) == b"{}\n"
    hook.append(lambda: setattr(models, "listed", "b"))
    assert await look(shared) is None


async def test_an_answer_that_began_before_a_purge_is_not_shared() -> None:
    models, store = FakeModels("a"), Store()
    first, second = (
        SharedCache(valkey(store), Sealer(b"s"), lambda: models, 60, lambda: None) for _ in range(2)
    )
    await first.watch()
    began = time.monotonic()
    await second.purge()
    await first.watch()
    first.store(b"k", answer_of("a"), began)
    await first.flush()
    assert await look(second) is None
    first.store(b"k", answer_of("a"), time.monotonic())
    first._confirm_at = 0.0
    await first.flush()
    assert await look(second) == b"{}\n"


async def test_an_answer_waits_for_a_list_of_models_that_was_read_after_it() -> None:
    models = FakeModels("a")
    shared = SharedCache(valkey(), Sealer(b"s"), lambda: models, 60, lambda: None)
    await shared.watch()
    for _ in range(2):  # the list is not read again at once, so the second waits
        shared.store(b"k", answer_of("a"), time.monotonic())
        await shared.flush()
        assert shared.counts().writes == 1
    models.listed = "b"  # it was replaced since
    shared._confirm_at = 0.0
    await shared.flush()
    assert shared.counts()[4:6] == (1, 1)  # written, dropped


async def test_what_waits_to_be_written_is_bounded() -> None:
    models = FakeModels("a")
    shared = SharedCache(valkey(), Sealer(b"s"), lambda: models, 60, lambda: None)
    await shared.watch()
    large = answer_of("a")._replace(body=b"x" * (MAX_WAITING // 4))
    for _ in range(6):
        shared.store(b"k", large, time.monotonic())
    assert shared.counts().dropped == 2


# Histories. Each answer says which question and which model, by its digest, it belongs to.

HISTORIES = int(os.environ.get("HISTORIES", "300"))
QUESTIONS = [bytes([n]) * 32 for n in range(3)]


class World:
    """One Ollama and one server for three processes; a random history happens to them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.store: Store = {}
        self.digest = "digest-0"
        self.purges = 0
        self.clock = Clock()
        self.processes = [Process(self) for _ in range(3)]
        self.replayed: list[Store] = []

    async def trouble(self) -> None:
        """Delay, fail or lose some of the server's replies."""
        for _ in range(self.random.randrange(4)):
            await asyncio.sleep(0)
        if self.random.random() < 0.05:
            raise RedisError

    async def step(self) -> None:  # noqa: C901 - a table, written as a match
        self.clock.now += 1
        process = self.random.choice(self.processes)
        match self.random.randrange(18):
            case 0:
                self.digest = f"digest-{self.random.randrange(10**9)}"  # a model is replaced
            case 1:
                await process.refresh()
            case 2:
                await process.shared.watch()
            case 3:
                await process.purge()
            case 4:
                self.tamper()
            case 5:
                process.restart()
            case 6 | 7 | 8 | 9:
                if self.random.random() < 0.7:  # else the list may not be read again yet
                    process.shared._confirm_at = 0.0
                await process.shared.flush()
            case _:
                asks = [
                    self.random.choice(self.processes).ask(self.random.choice(QUESTIONS))
                    for _ in range(self.random.randrange(1, 4))
                ]
                await asyncio.gather(*asks)

    def tamper(self) -> None:
        names = [name for name in self.store if name != EPOCH_KEY]
        self.replayed.append({name: self.store[name] for name in names})
        for name in names:
            value = self.store[name]
            self.store[name] = self.random.choice(
                [
                    value,
                    value[: self.random.randrange(len(value) + 1)],
                    self.store[self.random.choice(names)],
                    self.random.choice(self.replayed).get(name, b""),
                ]
            )
        if self.random.random() < 0.2:
            self.store.clear()  # the server has restarted


class Process:
    """The parts of one OllProx that share answers."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.restart()

    def restart(self) -> None:
        world = self.world
        self.listed_at, self.digests = 0.0, {"": ""}
        self.from_shared: set[bytes] = set()  # whose answer in memory came from there
        self.cache: Cache[StoredAnswer] = Cache(Budget(1 << 20), 3600)
        server = valkey(world.store, world.trouble, world.clock, timeout=60)
        self.shared = SharedCache(server, Sealer(b"s"), lambda: self, 3600, self.drop)
        self.flights = Flights(1 << 20, self.cache.budget, self.shared.before(self.upstream))

    def digest(self, model: str) -> str:
        return self.digests.get(model, "")

    async def refresh(self) -> bool:
        asked = asyncio.get_running_loop().time()
        await asyncio.sleep(0)
        found = {"m": self.world.digest}
        await asyncio.sleep(0)
        if found != self.digests:
            self.drop()
        self.digests, self.listed_at = found, asked
        return True

    def drop(self) -> None:
        self.cache.drop(lambda answer: True)
        self.flights.ground(lambda model: True)

    async def purge(self) -> None:
        self.drop()
        try:
            await self.shared.purge()
        except HTTPError:
            return
        finally:
            self.drop()
        self.world.purges += 1

    @asynccontextmanager
    async def upstream(self, ask: Ask) -> AsyncIterator[Response]:
        text = b"%b %b %d\n" % (ask.target, self.world.digest.encode(), self.world.purges)

        async def body() -> AsyncIterator[bytes]:
            yield text[:5]
            await asyncio.sleep(0)
            if self.world.random.random() < 0.2:
                raise HTTPError(502, "cut", kind="broken")
            yield text[5:]

        yield Response(200, ((b"Content-Type", b"application/x-ndjson"),), body())

    async def ask(self, asked: bytes) -> None:
        """Ask; the answer must be whole and of this question.

        One of the shared cache must be of the model that this process believes in, and not have
        been purged before the request.
        """
        before, purges = self.digest("m"), self.world.purges
        if (stored := self.cache.get(asked)) is not None:
            old = asked in self.from_shared
            check(stored.body, asked, {before} if old else None)
            return
        flight = self.flights.find(asked)
        joined = flight is not None
        flight = flight or self.flights.begin(
            asked,
            Ask(b"POST", asked.hex().encode(), (), model="m", lookup=Lookup(asked, 3600)),
            progress_notes,
            lambda flight: self.store(asked, flight),
        )
        reader = flight.join()
        try:
            body = await reader.whole()
        except HTTPError:
            return
        finally:
            reader.leave()
        assert body is not None
        if flight.source is Source.SHARED_CACHE and not joined:
            check(body, asked, {before}, purges)
        else:
            check(body, asked)

    def store(self, asked: bytes, flight: Any) -> bool:
        answer = StoredAnswer(
            *(b"Content-Type: application/x-ndjson", flight.whole(), b"", "m", self.digest("m")),
            *(flight.born, 0, 0, 0, 0.0),
        )
        self.from_shared.add(asked)
        if flight.source is Source.GENERATED:
            self.from_shared.discard(asked)
            self.shared.store(asked, answer, flight.began)
        return self.cache.put(asked, answer)


def check(body: bytes, asked: bytes, digests: set[str] | None = None, purges: int = 0) -> None:
    assert body.endswith(b"\n"), "it is cut"
    question, digest, generation = body.decode().split()
    assert question == asked.hex()
    assert digests is None or digest in digests, "it is of another model"
    assert int(generation) >= purges, "it was purged before this request began"


async def test_no_history_gives_a_wrong_or_partial_answer(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL", "ollprox")
    shared = 0
    for seed in range(HISTORIES):
        world = World(seed)
        for process in world.processes:
            await process.refresh()
        for _ in range(30):
            await world.step()
        shared += sum(process.shared.counts().hits for process in world.processes)
    assert shared > HISTORIES / 10  # else it tells nothing
