"""Count what each API key uses against its limits: `rate=60/minute`, `tokens=200000/day`.

Windows slide: `rate=60/minute` means at most 60 in any 60 seconds. Counts belong to a key's
digest, so they survive a reload of the key file. No I/O; the clock is an argument.
"""

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from access.rights import Key, Limit
from wire.http11 import HTTPError

MAX_EVENTS = 1024  # per window; after that, events close in time are merged
SWEEP_EVERY = 1024  # new logs between two removals of empty ones


@dataclass(slots=True)
class Event:
    """An amount, and when it was last counted, in seconds.

    It may stand for several, the first of which counted at `began`.
    """

    began: float
    at: float
    amount: int


class SlidingLog:
    """What a key used within the windows of its limits.

    Each window has events of its own, as they are counted together in steps that are short
    beside the window: a step of a day's window is longer than a minute.
    """

    def __init__(self, key: Key) -> None:
        self.key = key  # as of its last request
        self._windows: dict[int, deque[Event]] = {}  # by their seconds

    def __bool__(self) -> bool:
        return any(self._windows.values())

    def fit(self, limits: tuple[Limit, ...]) -> None:
        """Set the windows; new ones begin with what the longest has."""
        wanted = {limit.seconds for limit in limits}
        if wanted == self._windows.keys():
            return
        longest = self._windows.get(max(self._windows, default=0), ())
        self._windows = {
            seconds: self._windows.get(seconds) or deque(map(replace, longest))
            for seconds in wanted
        }

    def add(self, now: float, amount: int) -> tuple[Event, ...]:
        """Count `amount`; return its events, for a refund."""
        return tuple(
            _count(events, now, amount, seconds / MAX_EVENTS)
            for seconds, events in self._windows.items()
        )

    def prune(self, now: float) -> None:
        """Drop events that have left their window."""
        for seconds, events in self._windows.items():
            while events and now - events[0].at >= seconds:
                events.popleft()

    def used(self, limit: Limit, now: float) -> int:
        """Return the amount used in a limit's window."""
        return sum(event.amount for event in self._recent(limit, now))

    def free_in(self, limit: Limit, now: float) -> float:
        """Return the seconds until the limit allows one more; 0 if it does now."""
        excess = self.used(limit, now) - limit.count + 1
        if excess <= 0:
            return 0.0
        for event in self._recent(limit, now):
            if (excess := excess - event.amount) <= 0:
                # Rounding must not make it 0 while the event still counts.
                return max(event.at + limit.seconds - now, sys.float_info.epsilon)
        return limit.seconds  # a limit of 0 never allows any

    def empty_in(self, limit: Limit, now: float) -> float:
        """Return the seconds until no event counts any more."""
        last = max((e.at for e in self._recent(limit, now) if e.amount), default=-math.inf)
        return max(0.0, last + limit.seconds - now)

    def _recent(self, limit: Limit, now: float) -> Iterator[Event]:
        events = self._windows.get(limit.seconds, ())
        return (event for event in events if now - event.at < limit.seconds)


def _count(events: deque[Event], now: float, amount: int, step: float) -> Event:
    """Add an event, or to the last one if there are many and it began within a step."""
    if len(events) >= MAX_EVENTS and now - events[-1].began < step:
        last = events[-1]
        last.at, last.amount = now, last.amount + amount
        return last
    events.append(event := Event(now, now, amount))
    return event


class Reserved(Protocol):
    """A generation that was counted elsewhere too; `answers.shared_limits.Reservation`."""

    used: bool

    def refund(self) -> None:
        """Do not count it after all."""


@dataclass(frozen=True, slots=True)
class Charge:
    """A counted generation, which can be refunded if it never began."""

    _events: tuple[Event, ...]
    _reserved: Reserved | None = None

    def refund(self) -> None:
        """Take the count back. Call it at most once."""
        for event in self._events:
            event.amount -= 1
        if self._reserved is not None:
            self._reserved.refund()


@dataclass(frozen=True, slots=True)
class Standing:
    """A key's use of the limit that it is closest to reaching.

    `used` is the amount in the current window. If nothing more is used, it is 0 in `resets`
    seconds.
    """

    key: Key
    what: str  # the option: `rate` or `tokens`
    limit: Limit
    used: int
    resets: float


class Limits:
    """The use of all keys that have a limit.

    Args:
        clock: seconds on a clock that never goes back.
        earlier: returns when, on that clock, and how many tokens a key spent before the start,
            oldest first.

    """

    on_spend: Callable[[Key, int], None]
    """Called with the tokens of each answer of a key that has a limit."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        earlier: Callable[[Key], Iterable[tuple[float, int]]] = lambda key: (),
    ) -> None:
        self.on_spend = lambda key, tokens: None
        self._clock = clock
        self._earlier = earlier
        self._rates: dict[bytes, SlidingLog] = {}  # by the key's digest
        self._tokens: dict[bytes, SlidingLog] = {}

    def admit(self, key: Key, reserved: Reserved | None = None) -> Charge:
        """Count a generation before it begins.

        Args:
            key: of the caller.
            reserved: that the generation was counted for all processes too.

        Raises:
            LimitReached: 429; nothing was counted.

        """
        now = self._clock()
        for what, table, limits in self._tables(key):
            log = self._log(table, key, limits, now)
            for limit in limits:
                if log is not None and (wait := log.free_in(limit, now)):
                    raise LimitReached(what, limit, wait)
        rates = self._log(self._rates, key, key.rate, now)
        if reserved is not None:
            reserved.used = True
        return Charge(rates.add(now, 1) if rates is not None else (), reserved)

    def spend(self, key: Key, tokens: int) -> None:
        """Count the tokens of an answer at its end."""
        self.on_spend(key, tokens)
        now = self._clock()
        log = self._log(self._tokens, key, key.tokens, now)
        if log is not None and tokens:
            log.add(now, tokens)

    def standing(self, key: Key) -> dict[str, Standing]:
        """Return a key's standing for each option that limits it."""
        now = self._clock()
        found = {}
        for what, table, limits in self._tables(key):
            if (log := self._log(table, key, limits, now)) is not None:
                found[what] = _closest(what, key, log, limits, now)
        return found

    def in_use(self) -> Iterator[Standing]:
        """Yield the standings of keys with current use."""
        now = self._clock()
        for what, table in (("rate", self._rates), ("tokens", self._tokens)):
            for log in table.values():
                limits = log.key.rate if what == "rate" else log.key.tokens
                standing = _closest(what, log.key, log, limits, now)
                if standing.used:
                    yield standing

    def _tables(
        self, key: Key
    ) -> tuple[tuple[str, dict[bytes, SlidingLog], tuple[Limit, ...]], ...]:
        return ("rate", self._rates, key.rate), ("tokens", self._tokens, key.tokens)

    def _log(
        self, table: dict[bytes, SlidingLog], key: Key, limits: tuple[Limit, ...], now: float
    ) -> SlidingLog | None:
        """Return a key's log, pruned; None if the key has no such limit."""
        if not limits:
            return None
        log = table.get(key.digest)
        if log is None:
            if len(table) % SWEEP_EVERY == SWEEP_EVERY - 1:
                self._sweep(table, now)
            log = table[key.digest] = SlidingLog(key)
            log.fit(limits)
            for at, tokens in self._earlier(key) if table is self._tokens else ():
                log.add(at, tokens)
        log.key = key
        log.fit(limits)
        log.prune(now)
        return log

    @staticmethod
    def _sweep(table: dict[bytes, SlidingLog], now: float) -> None:
        """Remove empty logs."""
        for log in table.values():
            log.prune(now)
        for digest in [digest for digest, log in table.items() if not log]:
            del table[digest]


def _closest(
    what: str, key: Key, log: SlidingLog, limits: tuple[Limit, ...], now: float
) -> Standing:
    used = {limit: log.used(limit, now) for limit in limits}
    limit = min(limits, key=lambda limit: (limit.count - used[limit]) / limit.count)
    return Standing(key, what, limit, used[limit], log.empty_in(limit, now))


class LimitReached(HTTPError):
    """A key has reached a limit.

    Sends the headers that OpenAI's clients read; `Retry-After` is the exact time, rounded up.
    """

    def __init__(self, what: str, limit: Limit, wait: float) -> None:
        thing = "requests" if what == "rate" else "tokens"
        seconds = max(1, math.ceil(wait))
        reset = b"%ds" % seconds
        super().__init__(
            429,
            f"this API key has used up its {_UNITS[what]} ({what}={limit}):"
            f" try again in {seconds} s",
            (
                (b"Retry-After", b"%d" % seconds),
                (b"x-ratelimit-limit-%b" % thing.encode(), b"%d" % limit.count),
                (b"x-ratelimit-remaining-%b" % thing.encode(), b"0"),
                (b"x-ratelimit-reset-%b" % thing.encode(), reset),
            ),
            kind=what,
        )


_UNITS = {"rate": "generations", "tokens": "generated tokens"}
