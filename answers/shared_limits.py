"""Count `rate` and `tokens` for all OllProx processes together, on a Valkey or Redis server.

Each process also counts alone (`answers/limits.py`), and only that counts while the server does
not answer. On the server a window slides in steps: each of its BUCKETS parts is one counter, so a
generation may count for up to one step longer than here, and never shorter.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from access.rights import Key, Limit
from answers.limits import LimitReached
from answers.shared import Sealer
from wire.valkey import Unavailable, Valkey

log = logging.getLogger("ollprox")

BUCKETS = 30  # counters of one window
MAX_WAITING = 10_000  # counts that wait to be sent


class Reservation:
    """A generation that was counted on the server before it may begin."""

    def __init__(self, limits: "SharedLimits", buckets: list[tuple[bytes, Limit]]) -> None:
        self.used = False
        """Whether the generation has begun."""
        self._limits = limits
        self._buckets = buckets

    def refund(self) -> None:
        """Do not count it after all. More calls do nothing."""
        for name, limit in self._buckets:
            self._limits.add_soon(name, limit, -1)
        self._buckets = []


@contextmanager
def refunding(reserved: Reservation | LimitReached | None) -> Iterator[None]:
    """Give a reservation back at the block's end, unless its generation has begun."""
    try:
        yield
    finally:
        if isinstance(reserved, Reservation) and not reserved.used:
            reserved.refund()


class SharedLimits:
    """The counts of all processes.

    Args:
        server: has the counters.
        sealer: makes their names.
        clock: seconds since 1970, which all machines must agree on to about a second.

    """

    def __init__(
        self, server: Valkey, sealer: Sealer, clock: Callable[[], float] = time.time
    ) -> None:
        self.news = asyncio.Event()
        """Set when counts wait to be sent."""
        self._server = server
        self._sealer = sealer
        self._clock = clock
        self._waiting: deque[tuple[bytes, Limit, int]] = deque()

    async def reserve(self, key: Key) -> Reservation:
        """Count a generation that may be about to begin.

        Takes at most as long as one call. If the server does not answer, nothing is checked.

        Raises:
            LimitReached: 429; nothing is counted.

        """
        now = self._clock()
        own = [(self._name(key, "rate", limit, now), limit) for limit in key.rate]
        earlier = [
            (what, limit, age, self._name(key, what, limit, now, age))
            for what, limit in _limits(key)
            for age in range(0 if what == "tokens" else 1, BUCKETS + 1)
        ]
        names = [name for *_, name in earlier]
        ranks, found = await asyncio.gather(
            asyncio.gather(*(self._add(name, limit, 1) for name, limit in own)),
            self._read(names),
        )
        counted = [bucket for bucket, rank in zip(own, ranks, strict=True) if rank is not None]
        reservation = Reservation(self, counted)
        counts: dict[tuple[str, Limit], list[tuple[int, int]]] = {}  # (age, count) of its buckets
        for (what, limit, age, _), count in zip(earlier, found, strict=True):
            counts.setdefault((what, limit), []).append((age, count))
        for (_, limit), rank in zip(own, ranks, strict=True):
            # The rank replaces a read, so that simultaneous requests get different numbers.
            counts["rate", limit].append((0, (rank or 1) - 1))
        for (what, limit), buckets in counts.items():
            if sum(count for _, count in buckets) >= limit.count:
                reservation.refund()
                raise LimitReached(what, limit, _free_in(limit, buckets, now))
        return reservation

    def spend(self, key: Key, tokens: int) -> None:
        """Count the tokens of an answer, soon. Never waits."""
        now = self._clock()
        for limit in key.tokens if tokens else ():
            self.add_soon(self._name(key, "tokens", limit, now), limit, tokens)

    def add_soon(self, name: bytes, limit: Limit, amount: int) -> None:
        """Have an amount added to a counter; drop it if too many wait."""
        if len(self._waiting) < MAX_WAITING:
            self._waiting.append((name, limit, amount))
            self.news.set()

    async def flush(self) -> None:
        """Send the counts that wait, if the server answers. To be called when `news` is set."""
        while self._waiting:
            await self._add(*self._waiting.popleft())

    async def _add(self, name: bytes, limit: Limit, amount: int) -> int | None:
        """Add to a counter; return its value, None if the server does not tell."""
        try:
            value = await self._server.call("INCRBY", name, amount)
            if value == amount:  # it is new
                seconds = limit.seconds + 2 * _step(limit)
                await self._server.call("EXPIRE", name, int(seconds) + 1)
        except Unavailable as error:
            log.debug("a count of a limit is not shared: %s", error)
            return None
        return int(value)

    async def _read(self, names: list[bytes]) -> list[int]:
        """Return the values of counters; 0 for those that are not known."""
        try:
            values = await self._server.call("MGET", *names)
        except Unavailable:
            values = [None] * len(names)
        return [int(value) if _is_count(value) else 0 for value in values]

    def _name(self, key: Key, what: str, limit: Limit, now: float, age: int = 0) -> bytes:
        """Return the name of a key's counter, `age` steps before the current one."""
        number = int(now / _step(limit)) - age
        parts = (b"limit", what.encode(), b"%d" % limit.seconds, key.digest, b"%d" % number)
        return self._sealer.name(*parts)


def _limits(key: Key) -> Iterator[tuple[str, Limit]]:
    for what, limits in (("rate", key.rate), ("tokens", key.tokens)):
        for limit in limits:
            yield what, limit


def _step(limit: Limit) -> float:
    return limit.seconds / BUCKETS


def _is_count(value: bytes | None) -> bool:
    return value is not None and value.isdigit() and len(value) < 19


def _free_in(limit: Limit, buckets: list[tuple[int, int]], now: float) -> float:
    """Return the seconds until one more is within the limit.

    Args:
        limit: that is reached.
        buckets: for each counter, how many steps old it is, and its value.
        now: seconds since 1970.

    """
    step = _step(limit)
    excess = sum(count for _, count in buckets) - limit.count + 1
    for age, count in sorted(buckets, reverse=True):
        excess -= count
        if excess <= 0:
            return (int(now / step) - age + BUCKETS + 1) * step - now
    return float(limit.seconds)
