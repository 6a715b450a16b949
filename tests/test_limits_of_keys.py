"""Limits of keys: sliding windows, refunds, reloads. Pure; the test sets the clock."""

import math
from dataclasses import dataclass

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from access.rights import Key, Limit
from answers.limits import MAX_EVENTS, SWEEP_EVERY, LimitReached, Limits, SlidingLog, Standing

MINUTE, HOUR, DAY = 60, 3600, 86400


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def key(
    digest: bytes = b"d", *, rate: tuple[Limit, ...] = (), tokens: tuple[Limit, ...] = ()
) -> Key:
    return Key(digest, "mary", digest, rate=rate, tokens=tokens)


def retry_after(error: LimitReached) -> int:
    return int(dict(error.headers)[b"Retry-After"])


def test_a_key_without_limits_is_never_refused() -> None:
    limits = Limits(Clock())
    for _ in range(100):
        limits.admit(key())
    assert limits._rates == {}


def test_the_window_slides() -> None:
    clock = Clock()
    limits, mary = Limits(clock), key(rate=(Limit(2, MINUTE),))
    limits.admit(mary)
    clock.now += 40
    limits.admit(mary)
    clock.now += 10
    with pytest.raises(LimitReached) as refused:
        limits.admit(mary)
    assert retry_after(refused.value) == 10  # the first one is 50 s old
    clock.now += 10
    limits.admit(mary)
    with pytest.raises(LimitReached):
        limits.admit(mary)


def test_a_refused_request_does_not_count() -> None:
    clock = Clock()
    limits, mary = Limits(clock), key(rate=(Limit(1, MINUTE),))
    limits.admit(mary)
    for _ in range(10):
        with pytest.raises(LimitReached):
            limits.admit(mary)
    clock.now += MINUTE
    limits.admit(mary)


def test_a_request_refused_for_its_tokens_does_not_count_for_its_rate() -> None:
    limits = Limits(Clock())
    mary = key(rate=(Limit(2, MINUTE),), tokens=(Limit(10, HOUR),))
    limits.admit(mary)
    limits.spend(mary, 10)
    with pytest.raises(LimitReached, match="tokens=10/hour"):
        limits.admit(mary)
    assert limits.standing(mary)["rate"].used == 1


def test_what_never_began_is_given_back() -> None:
    limits, mary = Limits(Clock()), key(rate=(Limit(1, MINUTE),))
    limits.admit(mary).refund()
    limits.admit(mary)
    with pytest.raises(LimitReached):
        limits.admit(mary)


def test_of_several_limits_each_holds() -> None:
    clock = Clock()
    limits, mary = Limits(clock), key(rate=(Limit(1, MINUTE), Limit(2, HOUR)))
    limits.admit(mary)
    clock.now += MINUTE
    limits.admit(mary)
    clock.now += MINUTE
    with pytest.raises(LimitReached, match="hour") as refused:
        limits.admit(mary)
    assert retry_after(refused.value) == HOUR - 2 * MINUTE


def test_tokens_count_at_the_end_of_an_answer() -> None:
    clock = Clock()
    limits, mary = Limits(clock), key(tokens=(Limit(100, HOUR),))
    limits.admit(mary)
    limits.spend(mary, 60)
    clock.now += 600
    limits.admit(mary)  # 60 of 100: one more may begin, whatever it will need
    limits.spend(mary, 60)
    with pytest.raises(LimitReached) as refused:
        limits.admit(mary)
    assert retry_after(refused.value) == HOUR - 600


def test_counts_survive_a_reload_and_a_changed_limit_holds_at_once() -> None:
    limits = Limits(Clock())
    for _ in range(3):
        limits.admit(key(rate=(Limit(5, MINUTE),)))
    with pytest.raises(LimitReached):
        limits.admit(key(rate=(Limit(3, MINUTE),)))
    limits.admit(key(rate=(Limit(4, MINUTE),)))


def test_keys_with_the_same_label_are_counted_apart() -> None:
    limits = Limits(Clock())
    limits.admit(key(b"1", rate=(Limit(1, MINUTE),)))
    limits.admit(key(b"2", rate=(Limit(1, MINUTE),)))


def test_standing_says_what_is_used_and_when_it_resets() -> None:
    clock = Clock()
    limits, mary = Limits(clock), key(rate=(Limit(1, MINUTE),))
    assert limits.standing(mary)["rate"].resets == 0
    limits.admit(mary)
    clock.now += 15
    standing = limits.standing(mary)["rate"]
    assert (standing.used, standing.resets) == (1, 45)


def test_a_log_is_bounded_and_never_lets_more_through() -> None:
    clock = Clock()
    limits, mary = Limits(clock), key(rate=(Limit(5 * MAX_EVENTS, MINUTE),))
    admitted = 0
    for _ in range(6 * MAX_EVENTS):
        clock.now += 1e-6
        try:
            limits.admit(mary)
        except LimitReached:
            break
        admitted += 1
    assert admitted == 5 * MAX_EVENTS
    assert len(limits._rates[b"d"]._windows[MINUTE]) <= 2 * MAX_EVENTS


@pytest.mark.parametrize("limit", [Limit(1440, DAY), Limit(50_000, DAY)])
def test_who_stays_within_all_limits_is_never_refused(limit: Limit) -> None:
    """However many it sends: what is counted together for the day must not count for the minute."""
    clock = Clock()
    step = DAY / limit.count * 1.1
    limits, mary = Limits(clock), key(rate=(Limit(60, MINUTE), limit))
    for _ in range(3 * limit.count):
        clock.now += step
        limits.admit(mary)
    assert sum(map(len, limits._rates[b"d"]._windows.values())) <= 4 * MAX_EVENTS


def test_a_changed_unit_counts_what_was_used_before() -> None:
    clock = Clock()
    limits = Limits(clock)
    for _ in range(2):
        limits.admit(key(rate=(Limit(2, MINUTE),)))
    clock.now += 30
    with pytest.raises(LimitReached) as refused:
        limits.admit(key(rate=(Limit(2, HOUR), Limit(9, MINUTE))))
    assert retry_after(refused.value) == HOUR - 30


def test_logs_that_have_run_empty_are_forgotten() -> None:
    clock = Clock()
    limits = Limits(clock)
    for number in range(3 * SWEEP_EVERY):
        clock.now += 1
        limits.admit(key(b"%d" % number, rate=(Limit(1, MINUTE),)))
    assert len(limits._rates) <= SWEEP_EVERY + MINUTE


@example([1.5038995514906741, 30.0, 30.0], 1)  # 59.99 s later, which rounds to 60
@given(st.lists(st.floats(0, 30), max_size=60), st.integers(1, 5))
def test_no_window_ever_has_more_than_its_limit(gaps: list[float], most: int) -> None:
    clock = Clock()
    limits, mary = Limits(clock), key(rate=(Limit(most, MINUTE),))
    admitted: list[float] = []
    for gap in gaps:
        clock.now += gap
        try:
            limits.admit(mary)
        except LimitReached as error:
            refused: LimitReached | None = error
        else:
            refused = None
            admitted.append(clock.now)
        recent = [at for at in admitted if clock.now - at < MINUTE]
        assert len(recent) <= most
        if refused is not None:
            assert len(recent) == most
            assert retry_after(refused) == max(1, math.ceil(recent[0] + MINUTE - clock.now))


FULL = Limit(10 * MAX_EVENTS, MAX_EVENTS)  # in so many seconds


def full_log() -> SlidingLog:
    """A log of as many events as are kept apart, one a second; neighbours are a second apart."""
    log = SlidingLog(key())
    log.fit((FULL,))
    for second in range(MAX_EVENTS):
        log.add(second, 1)
    return log


@pytest.mark.parametrize(("later", "apart"), [(0.0, False), (0.999, False), (1.0, True)])
def test_a_full_log_counts_neighbours_together(later: float, apart: bool) -> None:
    log, last = full_log(), MAX_EVENTS - 1
    events = log._windows[FULL.seconds]
    (event,) = log.add(last + later, 5)
    assert len(events) == MAX_EVENTS + apart
    assert events[-1] is event
    assert (event.at, event.amount) == (last + later, 5 if apart else 6)
    assert log.used(FULL, last) == MAX_EVENTS + 5


def test_an_event_counts_until_its_window_is_over() -> None:
    log, limit = SlidingLog(key()), Limit(2, MINUTE)
    log.fit((limit,))
    for at, amount in ((0, 1), (10, 1), (20, 1)):
        log.add(at, amount)
    assert log.used(limit, 59.9) == 3
    assert log.used(limit, 60) == 2
    assert log.free_in(limit, 30) == 40  # when the second is over, not the first
    assert log.free_in(limit, 60) == 10
    assert log.free_in(limit, 70) == 0
    assert log.empty_in(limit, 30) == 50
    log.prune(60)
    assert [event.at for event in log._windows[MINUTE]] == [10, 20]


def test_a_large_event_frees_all_that_it_took() -> None:
    log, limit = SlidingLog(key()), Limit(10, MINUTE)
    log.fit((limit,))
    log.add(0, 1)
    log.add(10, 11)
    assert log.free_in(limit, 20) == 50
    assert log.free_in(limit, 60) == 10


def test_what_is_in_use_is_told_of_each_key_and_limit() -> None:
    clock = Clock()
    limits = Limits(clock)
    mary = key(b"m", rate=(Limit(9, MINUTE), Limit(4, HOUR)), tokens=(Limit(50, HOUR),))
    bob, idle = key(b"b", tokens=(Limit(7, MINUTE),)), key(b"i", rate=(Limit(1, MINUTE),))
    limits.admit(mary)
    clock.now += 30
    limits.spend(mary, 20)
    limits.spend(bob, 3)
    limits.spend(bob, 0)
    limits.admit(idle).refund()
    clock.now += 10
    found = list(limits.in_use())
    assert found == [
        Standing(mary, "rate", Limit(4, HOUR), 1, HOUR - 40),
        Standing(mary, "tokens", Limit(50, HOUR), 20, HOUR - 10),
        Standing(bob, "tokens", Limit(7, MINUTE), 3, MINUTE - 10),
    ]
    assert limits.standing(mary) == {"rate": found[0], "tokens": found[1]}
    assert limits.standing(bob) == {"tokens": found[2]}
    unused = key(b"u", rate=(Limit(2, MINUTE),))
    assert limits.standing(unused) == {"rate": Standing(unused, "rate", Limit(2, MINUTE), 0, 0)}


@pytest.mark.parametrize(("what", "thing"), [("rate", b"requests"), ("tokens", b"tokens")])
def test_a_refusal_says_which_limit_and_until_when(what: str, thing: bytes) -> None:
    error = LimitReached(what, Limit(5, MINUTE), 12.2)
    assert (error.status, error.kind) == (429, what)
    assert f"{what}=5/minute" in error.message
    assert error.headers == (
        (b"Retry-After", b"13"),
        (b"x-ratelimit-limit-" + thing, b"5"),
        (b"x-ratelimit-remaining-" + thing, b"0"),
        (b"x-ratelimit-reset-" + thing, b"13s"),
    )
    assert retry_after(LimitReached(what, Limit(5, MINUTE), 0.01)) == 1
