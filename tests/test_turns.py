"""The fair queue: who is next, what is refused, and no leaks."""

import asyncio
import heapq
import os
import statistics
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from answers.schedule import MAX_RETRY_AFTER, CountedSlots, Scheduler, State, Turn
from answers.turns import Refusal, Ticket, Turns, fair_queue
from wire.http11 import HTTPError

HISTORIES = int(os.environ.get("HISTORIES", "150"))


@dataclass(frozen=True)
class Key:
    label: str
    digest: bytes = b""
    weight: float = 1.0
    running: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", self.digest or self.label.encode())


class Hosts:
    """Slots of several hosts: a model runs on those that have it, while they are up."""

    def __init__(self, models: dict[str, str], slots: int) -> None:
        self.models = models  # of each host, each a letter
        self.slots = slots
        self.up = set(models)
        self.taken: Counter[str] = Counter()
        self.total = slots * len(models)

    def free(self, model: str) -> list[str]:
        return [
            h for h in sorted(self.up) if model in self.models[h] and self.taken[h] < self.slots
        ]

    def take(self, model: str) -> object | None:
        for host in self.free(model)[:1]:
            self.taken[host] += 1
            return host
        return None

    def give_back(self, slot: object) -> None:
        assert isinstance(slot, str)
        assert self.taken[slot] > 0
        self.taken[slot] -= 1


class Memory:
    """A budget."""

    def __init__(self, limit: int = 1000) -> None:
        self.limit = limit
        self.used = 0

    def reserve(self, size: int) -> bool:
        if self.used + size > self.limit:
            return False
        self.used += size
        return True

    def release(self, size: int) -> None:
        assert size <= self.used
        self.used -= size


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


A, B, C = Key("a"), Key("b"), Key("c")


# The scheduler, by plain calls.


@dataclass(order=True)
class Event:
    at: float
    number: int
    act: Callable[[], object] = field(compare=False)


class Machine:
    """Runs turns on a simulated clock; each takes as many seconds as its request says."""

    def __init__(self, slots: int = 1) -> None:
        self.scheduler = Scheduler(CountedSlots(slots))
        self.now = 0.0
        self.seconds: dict[Turn, float] = {}
        self.then: dict[Turn, Callable[[], object]] = {}
        self.log: list[Turn] = []  # in the order they began
        self.used: Counter[str] = Counter()
        self.most: Counter[bytes] = Counter()  # turns of a key at once
        self._events: list[Event] = []

    def at(self, when: float, act: Callable[[], object]) -> None:
        heapq.heappush(self._events, Event(when, len(self.seconds) + len(self.log), act))

    def send(
        self,
        key: Key,
        seconds: float = 1.0,
        count: int = 1,
        then: Callable[[], object] | None = None,
    ) -> Turn:
        for _ in range(count):
            turn = self.scheduler.add(key, "m", self.now)
            self.seconds[turn] = seconds
            if then:
                self.then[turn] = then
            self._grant()
        return turn

    def _grant(self) -> None:
        for turn in self.scheduler.grant(self.now):
            self.log.append(turn)
            running, _ = self.scheduler.of_key(turn.key.digest)
            self.most[turn.key.digest] = max(self.most[turn.key.digest], running)
            self.at(self.now + self.seconds[turn], lambda turn=turn: self._end(turn))  # type: ignore[misc]

    def _end(self, turn: Turn) -> None:
        self.used[turn.key.label] += self.seconds[turn]  # type: ignore[assignment]
        self.scheduler.end(turn, self.now)
        self._grant()
        if turn in self.then:
            self.then[turn]()

    def run(self, until: float = float("inf")) -> None:
        while self._events and self._events[0].at <= until:
            event = heapq.heappop(self._events)
            self.now = event.at
            event.act()
        self.now = max(self.now, until) if until < float("inf") else self.now

    def waits(self, label: str) -> list[float]:
        return [(t.began or 0) - t.entered for t in self.log if t.key.label == label]

    def labels(self, first: int = 0) -> str:
        return "".join(turn.key.label for turn in self.log[first:])


def test_one_label_is_served_in_the_order_it_came() -> None:
    machine = Machine()
    machine.send(A, count=5)
    machine.run()
    assert [turn.number for turn in machine.log] == [1, 2, 3, 4, 5]
    assert [turn.began for turn in machine.log] == [0, 1, 2, 3, 4]


def test_labels_alternate_and_the_newcomer_is_next() -> None:
    machine = Machine()
    machine.send(A, count=4)
    machine.run(0.5)
    machine.send(B, count=3)
    machine.run()
    assert machine.labels() == "abababa"


def test_who_used_less_is_next_though_it_came_later() -> None:
    machine = Machine()
    machine.send(A, 10)
    machine.run()
    machine.send(C, 5)  # holds the slot
    machine.run(12)
    machine.send(A)
    machine.send(B)
    machine.run()
    assert machine.labels() == "acba"


def test_slots_are_shared_by_seconds_and_not_by_turns() -> None:
    machine = Machine()
    machine.send(A, 5, count=100)
    machine.send(B, 1, count=500)
    machine.run(300)
    assert machine.used["a"] == pytest.approx(150, abs=6)
    assert machine.used["b"] == pytest.approx(150, abs=6)


def test_weights_of_two_to_one_get_two_to_one() -> None:
    machine = Machine(2)
    machine.send(Key("a", weight=2), 1.7, count=400)
    machine.send(B, 1, count=400)
    machine.run(300)
    assert machine.used["a"] / machine.used["b"] == pytest.approx(2, rel=0.03)


def test_a_label_weighs_what_its_heaviest_key_weighs() -> None:
    machine = Machine()
    machine.send(Key("a", b"1", weight=1), count=200)
    machine.send(Key("a", b"2", weight=3), count=200)
    machine.send(B, count=400)
    machine.run(200)
    assert machine.used["a"] / machine.used["b"] == pytest.approx(3, rel=0.05)


def test_keys_without_a_label_take_turns_each_on_its_own() -> None:
    machine = Machine()
    one, two = Key("", b"1"), Key("", b"2")
    machine.send(one, count=4)
    machine.run(0.5)
    machine.send(two, count=3)
    assert (machine.scheduler.waiting(one), machine.scheduler.waiting(two)) == (3, 3)
    machine.run()
    assert [turn.key for turn in machine.log] == [one, two, one, two, one, two, one]


def test_a_flood_makes_a_second_caller_wait_for_one_turn_at_most() -> None:
    machine = Machine(2)
    machine.send(A, 3, count=40)
    for when in range(1, 60, 4):
        machine.at(when, lambda: machine.send(B, 3))
    machine.run()
    waits = machine.waits("b")
    assert len(waits) == 15
    assert max(waits) <= 3
    assert statistics.mean(waits) <= 2


def test_two_callers_beside_a_flood_wait_less_than_one_and_a_half_turns_on_average() -> None:
    machine = Machine(2)

    def again(key: Key) -> None:
        if machine.now < 60:
            machine.at(machine.now + 0.5, lambda: machine.send(key, then=lambda: again(key)))

    machine.send(A, count=40)
    again(B)
    again(C)
    machine.run()
    waits = machine.waits("b") + machine.waits("c")
    assert statistics.mean(waits) < 1.5
    assert max(waits) < 3
    assert len(machine.waits("a")) == 40


def test_a_turn_counts_while_it_runs() -> None:
    machine = Machine(2)
    machine.send(A, 100)
    machine.send(B, 10)
    machine.run(10)
    machine.send(C, 5)
    machine.run(11)
    machine.send(A)
    machine.send(B)
    machine.run()
    assert machine.labels() == "abcba"


def test_a_charge_counts_each_second_with_the_weight_of_its_time() -> None:
    scheduler = Scheduler(CountedSlots(0))
    scheduler.add(A, "m", 0)
    scheduler.grant(0)
    heavy = scheduler.add(Key("a", b"2", weight=4), "m", 10)
    scheduler.grant(10)
    assert scheduler.charges(10) == {"a": 10}
    assert scheduler.charges(14) == {"a": 12}
    scheduler.end(heavy, 14)
    assert scheduler.charges(15) == {"a": 13}


def test_an_hour_of_rest_saves_up_nothing() -> None:
    machine = Machine()
    machine.send(B)
    machine.send(A, count=3600)
    machine.run(3000.5)
    begun = len(machine.log)
    machine.send(B, count=100)
    machine.run(3020.5)
    assert 9 <= machine.labels(begun).count("b") <= 11


def test_a_long_turn_lets_nobody_who_came_late_save_up_turns() -> None:
    machine = Machine()
    machine.send(A, 100)
    machine.run(99)
    machine.send(B, count=50)
    machine.send(A, count=50)
    machine.run(120.5)
    assert 9 <= machine.labels(1).count("a") <= 11


def test_a_label_that_contends_keeps_what_it_is_behind() -> None:
    machine = Machine()
    machine.send(A, 10)
    machine.run()
    machine.send(C, 5)
    machine.run(11)
    machine.send(A)
    machine.send(B, count=2)
    machine.run(15.5)
    machine.send(B)
    machine.run()
    assert machine.labels() == "acbbba"


def test_an_hour_alone_is_not_held_against_a_label() -> None:
    machine = Machine()
    machine.send(A, count=3600)
    machine.run()
    begun = len(machine.log)
    machine.send(B, count=100)
    machine.send(A, count=100)
    machine.run(3620.5)
    assert 9 <= machine.labels(begun).count("a") <= 11


def test_an_hour_of_asking_for_little_saves_up_nothing() -> None:
    """Labels b and c keep one slot of ten busy each, a all others; then b floods."""
    machine = Machine(10)

    def again(key: Key) -> None:
        if machine.now < 3600:
            machine.send(key, then=lambda: again(key))

    for _ in range(8):
        machine.send(A, then=lambda: again(A))
    machine.send(B, then=lambda: again(B))
    machine.send(C, 7200)
    machine.run(3600)
    begun = len(machine.log)
    machine.send(A, count=300)
    machine.send(B, count=300)
    machine.run(3619.5)
    assert 85 <= machine.labels(begun).count("a") <= 115


def test_requests_held_by_their_keys_bound_save_up_nothing() -> None:
    """One of b's keys is bounded and always has a line; then its other key floods."""
    machine = Machine(10)
    machine.send(A, count=4000)
    machine.send(Key("b", b"1", running=1), count=400)
    machine.run(300.5)
    begun = len(machine.log)
    machine.send(Key("b", b"2"), count=300)
    machine.run(320)
    assert 85 <= machine.labels(begun).count("a") <= 115


def test_seconds_in_which_nobody_asks_count_for_all() -> None:
    machine = Machine()
    machine.send(A, 10)
    machine.run(25)
    machine.send(C, 1)
    machine.run(25.5)
    machine.send(A)
    machine.send(B)
    machine.run()
    assert machine.labels() == "acab"


@pytest.mark.parametrize("slots", [0, 5])
def test_a_key_runs_no_more_at_once_than_it_may(slots: int) -> None:
    machine = Machine(slots)
    bounded = Key("a", running=2)
    machine.send(bounded, count=6)
    machine.send(B, count=2)
    assert machine.labels() == "aabb"
    assert machine.scheduler.of_key(bounded.digest) == (2, 4)
    machine.run()
    assert machine.most[bounded.digest] == 2
    assert machine.now == 3


def test_a_bounded_key_holds_up_no_other_key_of_its_label() -> None:
    machine = Machine(0)
    machine.send(Key("a", b"1", running=1), count=3)
    machine.send(Key("a", b"2"))
    assert [turn.key.digest for turn in machine.log] == [b"1", b"2"]


def test_a_changed_bound_counts_from_the_next_request_on() -> None:
    machine = Machine(0)
    machine.send(Key("a", running=1), count=3)
    machine.send(Key("a", running=3))
    assert len(machine.log) == 3


def test_a_full_host_holds_up_nobody_who_needs_another() -> None:
    scheduler = Scheduler(Hosts({"one": "x", "two": "y"}, slots=1))
    turns = [
        scheduler.add(key, model, 0) for key, model in [(A, "x"), (A, "x"), (A, "y"), (B, "x")]
    ]
    assert scheduler.grant(0) == [turns[0], turns[2]]
    scheduler.end(turns[0], 1)
    assert scheduler.grant(1) == [turns[3]]
    scheduler.end(turns[3], 2)
    assert scheduler.grant(2) == [turns[1]]


def test_idle_labels_are_forgotten_and_none_that_is_ahead() -> None:
    machine = Machine()
    for number in range(100):
        machine.send(Key(f"label{number}"))
    machine.run()
    machine.send(A, 50)
    machine.run()
    assert set(machine.scheduler.charges(machine.now)) == {"a"} | {
        name for name, charge in machine.scheduler.charges(machine.now).items() if charge > 0
    }
    machine.run(machine.now + 51)  # nobody asks, for longer than anybody was ahead
    machine.send(B, 0)
    machine.run()
    assert machine.scheduler.charges(machine.now) == {}


def test_the_order_shown_is_the_order_that_comes() -> None:
    hosts = Hosts({"one": "m"}, slots=1)
    hosts.up = set()
    scheduler = Scheduler(hosts)
    scheduler.turn_seconds = 1
    for key, count in [(A, 3), (Key("b", weight=2), 4), (C, 2)]:
        for _ in range(count):
            scheduler.add(key, "m", 0)
    shown = scheduler.order(0)
    assert "".join(turn.key.label for turn in shown) == "abcbabcba"
    hosts.up = {"one"}
    for now, turn in enumerate(shown):
        assert scheduler.grant(now) == [turn]
        scheduler.end(turn, now + 1)


def test_those_held_by_their_key_are_shown_last() -> None:
    machine = Machine(2)
    machine.send(Key("a", running=1), count=3)
    machine.send(B, count=2)
    assert [turn.key.label for turn in machine.scheduler.order(0)] == ["b", "a", "a"]


def test_the_estimate_counts_who_is_ahead_the_slots_and_recent_turns() -> None:
    machine = Machine(2)
    machine.send(A, 3, count=20)
    machine.run(12)  # nine turns have ended or run; ten and more wait
    assert machine.scheduler.turn_seconds == pytest.approx(3)
    assert machine.scheduler.estimate(A) == 17  # (10 ahead and it) x 3 s / 2
    assert machine.scheduler.estimate(B) == 2  # it is next
    assert machine.scheduler.estimate(Key("b", running=1)) == 3
    machine.send(A, 3, count=400)
    assert machine.scheduler.estimate(A) == MAX_RETRY_AFTER


# Histories.


def retry_after(error: HTTPError) -> int:
    return int(dict(error.headers)[b"Retry-After"])


class CheckedScheduler(Scheduler):
    """Checks each choice against the rules, by a search that is plain and slow."""

    def __init__(self, slots: Hosts) -> None:
        super().__init__(slots)
        self.hosts = slots
        self.line: list[Turn] = []  # those that wait, in the order they came
        self.run: list[Turn] = []
        self.begun: set[int] = set()

    def may_run(self, turn: Turn, free: Hosts) -> bool:
        return not self.held(turn) and bool(free.free(turn.model))

    def held(self, turn: Turn) -> bool:
        running = sum(other.key.digest == turn.key.digest for other in self.run)
        return turn.key.running is not None and running >= turn.key.running

    def add(self, key: Key, model: str, now: float) -> Turn:  # type: ignore[override]
        before = self.charges(now)
        turn = super().add(key, model, now)
        self.line.append(turn)
        after = self.charges(now)
        others = {name: charge for name, charge in after.items() if name != key.label}
        assert others == {name: charge for name, charge in before.items() if name != key.label}
        assert after[key.label] >= before.get(key.label, 0)
        return turn

    def end(self, turn: Turn, now: float) -> None:
        before = self.charges(now)
        super().end(turn, now)
        (self.line if turn in self.line else self.run).remove(turn)
        for name, charge in self.charges(now).items():
            assert charge == pytest.approx(before[name])

    def grant(self, now: float) -> list[Turn]:
        charges = self.charges(now)
        free = Hosts(self.hosts.models, self.hosts.slots)
        free.up, free.taken = set(self.hosts.up), Counter(self.hosts.taken)
        first = next(iter(self.order(now)), None)
        granted = super().grant(now)
        for index, turn in enumerate(granted):
            able = [other for other in self.line if self.may_run(other, free)]
            assert turn in able
            assert charges[turn.key.label] == min(charges[other.key.label] for other in able)
            assert turn is next(other for other in able if other.key.label == turn.key.label)
            if index == 0 and first in able:
                assert turn is first
            assert free.take(turn.model) == turn.slot
            assert turn.number not in self.begun
            self.begun.add(turn.number)
            self.line.remove(turn)
            self.run.append(turn)
        assert not [turn for turn in self.line if self.may_run(turn, free)]
        assert free.taken == self.hosts.taken
        return granted


KEYS = [
    Key("a", b"a1"),
    Key("a", b"a2", running=1),
    Key("b", b"b1", weight=2, running=2),
    Key("c", b"c1", weight=0.5),
    Key("d", b"d1", weight=3, running=1),
]


class Histories(RuleBasedStateMachine):
    """Requests come, run, end and leave; hosts go and come back; then all leave."""

    @initialize(slots=st.integers(1, 3), queue_max=st.integers(0, 4), memory=st.integers(0, 40))
    def begin(self, slots: int, queue_max: int, memory: int) -> None:
        self.clock = Clock()
        self.hosts = Hosts({"one": "xz", "two": "yz"}, slots)
        self.memory = Memory(memory)
        self.queue_max = queue_max
        self.turns = Turns(self.hosts, queue_max, 60, self.memory, self.clock)
        self.scheduler = self.turns._scheduler = CheckedScheduler(self.hosts)
        self.tickets: list[Ticket] = []
        self.drained = False

    @rule(key=st.sampled_from(KEYS), model=st.sampled_from("xyz"), size=st.integers(0, 20))
    def come(self, key: Key, model: str, size: int) -> None:
        waiting = self.scheduler.waiting(key)
        used = self.memory.used
        try:
            self.tickets.append(self.turns.admit(key, model, size))
        except HTTPError as refused:
            error = refused
        else:
            return
        full = waiting >= self.queue_max
        assert 1 <= retry_after(error) <= MAX_RETRY_AFTER
        assert error.status == (429 if full and not self.drained else 503)
        assert self.drained or full or used + size > self.memory.limit

    @precondition(lambda self: self.tickets)
    @rule(which=st.integers(0, 100))
    def leave(self, which: int) -> None:
        ticket = self.tickets.pop(which % len(self.tickets))
        ticket.withdraw()
        ticket.withdraw()
        assert ticket.turn.state is State.ENDED
        assert ticket.waited() >= 0

    @rule(seconds=st.sampled_from([0, 0.25, 1, 3, 1000]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(host=st.sampled_from(["one", "two"]))
    def fail_or_recover(self, host: str) -> None:
        self.hosts.up ^= {host}
        self.turns.wake()

    @precondition(lambda self: not self.drained)
    @rule(chance=st.integers(0, 9))
    def drain(self, chance: int) -> None:
        if chance == 0:
            self.turns.drain()
            self.drained = True
            assert not self.scheduler.line

    @invariant()
    def in_bounds(self) -> None:
        if not hasattr(self, "turns"):
            return
        scheduler = self.scheduler
        states = Counter(ticket.turn.state for ticket in self.tickets)
        assert states[State.WAITING] == len(self.turns) == len(scheduler.line)
        assert states[State.GRANTED] == len(scheduler.run) == self.hosts.taken.total()
        assert states[State.ENDED] == 0 or self.drained
        assert self.memory.used == sum(
            ticket.size for ticket in self.tickets if ticket.turn.state is State.WAITING
        )
        for key in KEYS:
            running, _ = scheduler.of_key(key.digest)
            assert key.running is None or running <= key.running
            assert scheduler.waiting(key) <= self.queue_max
        assert all(count <= self.hosts.slots for count in self.hosts.taken.values())
        snapshot = self.turns.snapshot()
        assert [waiting.position for waiting in snapshot.waiting] == [
            *range(1, len(self.turns) + 1)
        ]
        assert sum(snapshot.running.values()) == len(scheduler.run)

    def teardown(self) -> None:
        if not hasattr(self, "turns"):
            return
        self.hosts.up = set(self.hosts.models)
        self.turns.wake()
        while self.tickets:
            self.in_bounds()
            began = [ticket for ticket in self.tickets if ticket.turn.state is not State.WAITING]
            assert began, "somebody waits, and nobody runs"
            self.clock.now += 1
            for ticket in began:
                assert ticket.had_turn or self.drained
                self.tickets.remove(ticket)
                ticket.withdraw()
        self.check_empty()

    def check_empty(self) -> None:
        scheduler = self.scheduler
        assert not scheduler._uses
        assert not scheduler._labels
        assert not scheduler._waiting
        assert not self.turns._waiting
        assert not self.memory.used
        assert not self.hosts.taken.total()
        self.clock.now += 1e6  # what anybody was ahead is forgotten
        turn = scheduler.add(A, "x", self.clock.now)
        scheduler.grant(self.clock.now)
        scheduler.end(turn, self.clock.now)
        assert not scheduler._labels
        assert not scheduler._idle


Histories.TestCase.settings = settings(
    max_examples=HISTORIES, stateful_step_count=40, deadline=None
)
TestHistories = Histories.TestCase


# In asyncio.


def open_queue(
    slots: int = 1, queue_max: int = 100, queue_timeout: float = 60, memory: int = 1000
) -> tuple[Turns, CountedSlots, Memory]:
    counted, budget = CountedSlots(slots), Memory(memory)
    return Turns(counted, queue_max, queue_timeout, budget), counted, budget


async def spin() -> None:
    """Let all tasks go on until they wait."""
    for _ in range(10):
        await asyncio.sleep(0)


class Request:
    """A task that waits for its turn, and then until it is told to end."""

    def __init__(self, turns: Turns, key: Key = A, size: int = 10) -> None:
        self.ticket = turns.admit(key, "m", size)
        self.finish = asyncio.Event()
        self.runs = False
        self.task = asyncio.create_task(self.live())

    async def live(self) -> str:
        try:
            async with self.ticket:
                self.runs = True
                await self.finish.wait()
            return "done"
        except HTTPError as error:
            return str(error.status)

    async def end(self) -> str:
        self.finish.set()
        return await self.task


def is_empty(turns: Turns, slots: CountedSlots, budget: Memory) -> bool:
    scheduler = turns._scheduler
    return not (len(turns) or scheduler._labels or scheduler._uses or slots.taken or budget.used)


async def test_a_request_with_a_free_slot_waits_for_nothing() -> None:
    turns, slots, budget = open_queue()
    request = Request(turns)
    assert request.ticket.had_turn
    assert not budget.used
    await spin()
    assert slots.taken == 1
    assert await request.end() == "done"
    assert request.ticket.waited() == 0
    assert is_empty(turns, slots, budget)


async def test_a_prompt_is_in_the_budget_only_while_it_waits() -> None:
    turns, slots, budget = open_queue()
    first, second = Request(turns), Request(turns, B, size=70)
    await spin()
    assert [first.runs, second.runs] == [True, False]
    assert budget.used == 70
    await first.end()
    await spin()
    assert second.runs
    assert budget.used == 0
    await second.end()
    assert second.ticket.waited() > 0
    assert is_empty(turns, slots, budget)


async def test_a_full_line_refuses_its_own_label_alone() -> None:
    turns, slots, budget = open_queue(queue_max=2)
    requests = [Request(turns) for _ in range(3)]
    with pytest.raises(HTTPError, match="QUEUE_MAX") as caught:
        turns.admit(A, "m", 10)
    assert caught.value.status == 429
    assert 1 <= retry_after(caught.value) <= MAX_RETRY_AFTER
    requests.append(Request(turns, B))
    assert turns.snapshot().refusals == {Refusal.QUEUE_FULL: 1}
    for request in requests:
        request.finish.set()
    assert [await request.task for request in requests] == ["done"] * 4
    assert is_empty(turns, slots, budget)


async def test_without_memory_to_wait_in_a_request_is_refused() -> None:
    turns, slots, budget = open_queue(memory=50)
    requests = [Request(turns, size=50), Request(turns, size=50)]
    with pytest.raises(HTTPError, match="memory") as caught:
        turns.admit(B, "m", 1)
    assert caught.value.status == 503
    assert 1 <= retry_after(caught.value) <= MAX_RETRY_AFTER
    assert turns.snapshot().refusals == {Refusal.MEMORY: 1}
    assert [await request.end() for request in requests] == ["done"] * 2
    assert is_empty(turns, slots, budget)


async def test_a_request_that_waits_too_long_is_refused_and_out() -> None:
    turns, slots, budget = open_queue(queue_timeout=0.02)
    first, second = Request(turns), Request(turns)
    assert await second.task == "503"
    assert not second.ticket.had_turn
    assert second.ticket.waited() >= 0.02
    assert (len(turns), budget.used) == (0, 0)
    assert turns.snapshot().refusals == {Refusal.TIMEOUT: 1}
    assert await first.end() == "done"
    assert is_empty(turns, slots, budget)


async def test_a_turn_that_comes_at_the_timeout_is_taken() -> None:
    turns, slots, budget = open_queue(queue_timeout=0.02)
    first, second = Request(turns), Request(turns)
    await spin()
    first.finish.set()
    asyncio.get_running_loop().call_later(0.01, turns.leave, first.ticket)
    while turns.clock() < second.ticket.turn.entered + 0.03:
        pass  # so that both timers are due in one round of the loop: the turn, then the timeout
    await asyncio.sleep(0.001)
    await spin()
    assert second.runs
    assert [await first.task, await second.end()] == ["done"] * 2
    assert is_empty(turns, slots, budget)


async def test_a_client_that_leaves_is_out_of_the_queue_at_once() -> None:
    turns, slots, budget = open_queue()
    first, second, third = (Request(turns) for _ in range(3))
    await spin()
    second.task.cancel()
    second.ticket.withdraw()
    assert (len(turns), budget.used) == (1, 10)
    with pytest.raises(asyncio.CancelledError):
        await second.task
    await first.end()
    await spin()
    assert third.runs
    await third.end()
    assert is_empty(turns, slots, budget)


async def test_cancelled_while_it_waits_it_is_out_without_withdrawing() -> None:
    turns, slots, budget = open_queue()
    first, second = Request(turns), Request(turns)
    await spin()
    second.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second.task
    assert (len(turns), budget.used) == (0, 0)
    await first.end()
    assert is_empty(turns, slots, budget)


async def test_cancelled_as_its_turn_comes_it_passes_the_slot_on() -> None:
    turns, slots, budget = open_queue()
    first, second, third = (Request(turns) for _ in range(3))
    await spin()
    turns.leave(first.ticket)  # the second has the slot now, and has not run since
    assert second.ticket.turn.state is State.GRANTED
    second.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second.task
    assert not second.runs
    await spin()
    assert third.runs
    assert [await first.end(), await third.end()] == ["done"] * 2
    assert is_empty(turns, slots, budget)


async def test_cancelled_while_it_runs_it_frees_its_slot() -> None:
    turns, slots, budget = open_queue()
    first, second = Request(turns), Request(turns)
    await spin()
    first.ticket.withdraw()  # its block has the turn, and ends it
    assert slots.taken == 1
    assert second.ticket.turn.state is State.WAITING
    first.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first.task
    await spin()
    assert second.runs
    await second.end()
    assert is_empty(turns, slots, budget)


@pytest.mark.parametrize("before", [0, 1])
async def test_cancelled_before_its_first_step_it_leaves_by_withdrawing(before: int) -> None:
    turns, slots, budget = open_queue()
    others = [Request(turns) for _ in range(before)]
    request = Request(turns)
    request.task.cancel()
    request.ticket.withdraw()
    with pytest.raises(asyncio.CancelledError):
        await request.task
    assert [await other.end() for other in others] == ["done"] * before
    assert is_empty(turns, slots, budget)


async def test_drain_refuses_who_waits_and_who_comes_and_lets_who_runs_finish() -> None:
    turns, slots, budget = open_queue()
    first, second = Request(turns), Request(turns)
    await spin()
    third = Request(turns)  # has not begun to wait
    turns.drain()
    assert (len(turns), budget.used) == (0, 0)
    with pytest.raises(HTTPError, match="stopping") as caught:
        turns.admit(B, "m")
    assert caught.value.status == 503
    assert retry_after(caught.value) >= 1
    assert [await second.task, await third.task] == ["503"] * 2
    assert turns.snapshot().refusals == {Refusal.DRAINING: 3}
    assert await first.end() == "done"
    assert is_empty(turns, slots, budget)


async def test_a_host_that_recovers_wakes_who_waits_for_it() -> None:
    hosts = Hosts({"one": "m"}, slots=1)
    hosts.up = set()
    turns = Turns(hosts, 100, 60, Memory())
    request = Request(turns)
    await spin()
    assert not request.runs
    hosts.up = {"one"}
    turns.wake()
    await spin()
    assert request.runs
    assert request.ticket.slot == "one"
    await request.end()


def test_the_snapshot_says_who_waits_how_long_and_who_is_next() -> None:
    clock = Clock()
    turns = Turns(CountedSlots(1), 100, 60, Memory(), clock)
    tickets = [turns.admit(A, "x"), turns.admit(A, "y"), turns.admit(A, "z")]
    clock.now += 2
    tickets.append(turns.admit(B, "x"))
    clock.now += 3
    snapshot = turns.snapshot()
    assert [(w.label, w.model, w.seconds, w.position) for w in snapshot.waiting] == [
        ("b", "x", 3, 1),
        ("a", "y", 5, 2),
        ("a", "z", 5, 3),
    ]
    assert snapshot.running == {"a": 1}
    assert turns.of_key(A.digest) == (1, 2)
    assert [ticket.waited() for ticket in tickets] == [0, 5, 5, 3]
    for ticket in tickets:
        ticket.withdraw()
    assert turns.snapshot().running == {}


@dataclass(frozen=True)
class Ask:
    ticket: Ticket | None


async def test_a_turn_lasts_until_the_exchange_is_closed() -> None:
    turns, slots, _ = open_queue()
    taken: list[int] = []

    @asynccontextmanager
    async def exchange(ask: Ask) -> AsyncIterator[str]:
        try:
            yield "response"
        finally:
            await asyncio.sleep(0)
            taken.append(slots.taken)

    queued = fair_queue(exchange)
    async with queued(Ask(turns.admit(A, "m"))) as response:
        assert response == "response"
    with suppress(ZeroDivisionError):
        async with queued(Ask(turns.admit(A, "m"))):
            raise ZeroDivisionError
    async with queued(Ask(None)):
        assert slots.taken == 0
    assert taken == [1, 1, 0]
    assert slots.taken == 0


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["come", "come", "finish", "cancel", "withdraw", "spin", "drain"]),
        st.integers(0, 20),
    ),
    max_size=40,
)


async def take_step(turns: Turns, requests: list[Request], step: str, which: int) -> None:
    if step == "come":
        with suppress(HTTPError):
            request = Request(turns, KEYS[which % len(KEYS)])
            request.task.add_done_callback(lambda _: request.ticket.withdraw())
            requests.append(request)
    elif step == "spin":
        await asyncio.sleep(0)
    elif step == "drain":
        if which == 0:
            turns.drain()
    elif requests:
        request = requests[which % len(requests)]
        if step == "finish":
            request.finish.set()
        else:
            request.task.cancel()
            if step == "withdraw":
                request.ticket.withdraw()


async def live(steps: Iterable[tuple[str, int]], slots: int) -> None:
    turns, counted, budget = open_queue(slots, queue_max=3, memory=40)
    requests: list[Request] = []
    for step, which in steps:
        await take_step(turns, requests, step, which)
        running = sum(turns.snapshot().running.values())
        assert counted.taken == running <= (slots or len(requests))
    for request in requests:
        request.finish.set()
    results = await asyncio.gather(*(r.task for r in requests), return_exceptions=True)
    for request, result in zip(requests, results, strict=True):
        assert isinstance(result, asyncio.CancelledError) or result in ("done", "503")
        assert (result == "done") <= request.ticket.had_turn
    assert is_empty(turns, counted, budget)


@settings(max_examples=HISTORIES, deadline=None)
@given(steps=STEPS, slots=st.integers(0, 3))
def test_tasks_that_come_end_and_are_cancelled_leave_nothing(
    steps: list[tuple[str, int]], slots: int
) -> None:
    asyncio.run(live(steps, slots))
