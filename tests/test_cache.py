import time
from collections.abc import Sequence
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache import ENTRY_OVERHEAD, Budget, Cache


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Thing(NamedTuple):
    name: str
    size: int
    born: float


class Names(Cache[Thing]):
    """A cache of things that are told by their names."""

    def __init__(self, max_bytes: int, ttl: float, clock: Clock) -> None:
        super().__init__(Budget(max_bytes), ttl, clock)

    def keep(self, key: bytes, name: str, size: int, *, age: float = 0.0) -> bool:
        return self.put(key, Thing(name, size, self._clock() - age))

    def name(self, key: bytes) -> str | None:
        thing = self.get(key)
        return thing.name if thing is not None else None


@pytest.fixture
def clock() -> Clock:
    return Clock()


def room(entries: int) -> int:
    """A budget for so many entries of 100 bytes."""
    return entries * (100 + ENTRY_OVERHEAD)


def test_the_least_recently_used_makes_room(clock: Clock) -> None:
    cache = Names(room(2), 60, clock)
    assert cache.keep(b"a", "A", 100)
    assert cache.keep(b"b", "B", 100)
    assert cache.name(b"a") == "A"
    assert cache.keep(b"c", "C", 100)
    assert (cache.name(b"a"), cache.name(b"b"), cache.name(b"c")) == ("A", None, "C")
    assert cache.evictions == 1


def test_a_value_expires(clock: Clock) -> None:
    cache = Names(room(2), 60, clock)
    cache.keep(b"a", "A", 100, age=20)
    clock.now += 39.9
    assert cache.name(b"a") == "A"
    clock.now += 0.1
    assert cache.name(b"a") is None
    assert cache.expire(b"a")
    assert not cache.expire(b"a")
    assert (len(cache), cache.stored_bytes, cache.expiries) == (0, 0, 1)


def test_what_is_too_large_or_too_old_changes_nothing(clock: Clock) -> None:
    cache = Names(room(1), 60, clock)
    cache.keep(b"a", "A", 100)
    assert not cache.keep(b"a", "B", 101)
    assert not cache.keep(b"a", "B", 100, age=60)
    assert cache.name(b"a") == "A"


def test_a_ttl_of_zero_keeps_nothing(clock: Clock) -> None:
    cache = Names(room(1), 0, clock)
    assert not cache.keep(b"a", "A", 1)


def test_replacing_counts_once(clock: Clock) -> None:
    cache = Names(room(2), 60, clock)
    cache.keep(b"a", "A", 100)
    cache.keep(b"a", "B", 50)
    assert (len(cache), cache.stored_bytes) == (1, 50 + ENTRY_OVERHEAD)


def test_reservations_take_from_the_same_budget(clock: Clock) -> None:
    cache = Names(room(2), 60, clock)
    cache.keep(b"a", "A", 100)
    cache.keep(b"b", "B", 100)
    assert cache.budget.reserve(room(1))
    assert (cache.name(b"a"), cache.name(b"b")) == (None, "B")
    assert not cache.budget.reserve(room(1) + 1)
    assert cache.name(b"b") == "B"
    assert not cache.keep(b"c", "C", room(1))
    cache.budget.release(room(1))
    assert cache.keep(b"c", "C", 100)


def test_what_must_be_reserved_is_counted_and_later_made_room_for(clock: Clock) -> None:
    cache = Names(room(2), 60, clock)
    assert cache.budget.reserve(room(3), must=True)
    assert not cache.budget.reserve(1)
    assert not cache.keep(b"a", "A", 1)


def test_a_budget_without_a_cache_is_a_bound() -> None:
    budget = Budget(100)
    assert budget.reserve(60)
    assert not budget.reserve(41)
    assert budget.reserve(40)  # to the last byte
    budget.release(30)
    assert budget.reserved_bytes == 70
    assert budget.reserve(30)
    assert budget.make_room(0)
    assert not budget.make_room(1)
    with pytest.raises(RuntimeError, match="no cache"):
        budget.evict()


def test_room_is_made_beside_what_is_reserved(clock: Clock) -> None:
    cache = Names(room(4), 60, clock)
    assert cache.budget.reserve(room(2))
    for key in (b"a", b"b", b"c"):
        assert cache.keep(key, "x", 100)
    assert (len(cache), cache.stored_bytes) == (2, room(2))
    assert cache.budget.make_room(room(1))
    assert (len(cache), cache.name(b"c")) == (1, "x")


def test_what_happened_is_counted_each_time(clock: Clock) -> None:
    cache = Names(room(1), 60, clock)
    assert (cache.evictions, cache.expiries) == (0, 0)
    for key in (b"a", b"b", b"c"):
        assert cache.keep(key, "x", 100)
    assert (cache.evictions, cache.expiries) == (2, 0)
    cache.remove(b"gone")
    assert not cache.expire(b"c")
    for _ in range(2):
        clock.now += 60
        assert cache.expire(b"c")
        assert not cache.expire(b"c")
        assert cache.keep(b"c", "x", 100)
    assert (cache.evictions, cache.expiries) == (2, 2)


def test_a_ttl_goes_on_while_the_machine_sleeps() -> None:
    """A monotonic clock stops then, so the clock is the wall's."""
    cache: Cache[Thing] = Cache(Budget(room(1)), 60)
    assert cache.put(b"a", Thing("A", 100, time.time() - 59))
    assert cache.get(b"a")
    assert not cache.put(b"b", Thing("B", 100, time.time() - 61))


def test_dropping_by_value(clock: Clock) -> None:
    cache = Names(room(3), 60, clock)
    for key, value in ((b"a", "x"), (b"b", "y"), (b"c", "x")):
        cache.keep(key, value, 100)
    assert cache.drop(lambda thing: thing.name == "x") == 2
    assert (len(cache), cache.name(b"b")) == (1, "y")


Step = tuple[str, int, int]
STEPS = st.lists(
    st.tuples(st.sampled_from(["put", "get", "wait"]), st.integers(0, 5), st.integers(0, 900)),
    max_size=60,
)


@given(STEPS)
def test_it_is_the_plain_model_of_an_lru(steps: Sequence[Step]) -> None:
    """The model is a list from the least to the most recently used, searched each time."""
    clock, budget, ttl = Clock(), 3 * ENTRY_OVERHEAD + 1500, 50
    cache = Names(budget, ttl, clock)
    model: list[tuple[bytes, str, float, int]] = []  # key, value, when put, size
    for number, (what, index, amount) in enumerate(steps):
        key = bytes([index])
        if what == "wait":
            clock.now += amount / 20
        elif what == "get":
            fresh = [row for row in model if row[0] == key and clock.now - row[2] < ttl]
            assert cache.name(key) == (fresh[0][1] if fresh else None)
            if fresh:
                model = [row for row in model if row[0] != key] + fresh
        else:
            assert cache.keep(key, str(number), amount)
            model = [row for row in model if row[0] != key]
            model.append((key, str(number), clock.now, amount + ENTRY_OVERHEAD))
            while sum(row[3] for row in model) > budget:
                model.pop(0)
        assert cache.stored_bytes == sum(row[3] for row in model) <= budget
        assert len(cache) == len(model)
