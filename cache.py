"""An LRU cache with a TTL, and the byte budget that it shares with answers under way.

Pure: the clock is an argument, and nothing here waits.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

ENTRY_OVERHEAD = 606
"""Bytes charged for an entry beyond the size of its value: the key, the dictionary's slot and
link, and the objects of a stored answer (`bench/memory.py` measures them)."""


class Budget:
    """The bytes that stored answers, tapes and queued requests share.

    Reservations have priority: stored values are evicted to make room for them.

    Args:
        max_bytes: the limit, in bytes.

    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.stored_bytes = 0
        self.reserved_bytes = 0
        self.evict: Callable[[], None] = _nothing_to_evict

    def make_room(self, size: int) -> bool:
        """Evict stored values until `size` bytes are free; False if that is impossible."""
        if size > self.max_bytes - self.reserved_bytes:
            return False
        while self.stored_bytes + self.reserved_bytes + size > self.max_bytes:
            self.evict()
        return True

    def reserve(self, size: int, *, must: bool = False) -> bool:
        """Set `size` bytes aside.

        Returns:
            False if they do not fit beside the other reservations. With `must` they are
            reserved in any case, and the next reservation has to make up for it.

        """
        if not must:
            free = self.max_bytes - self.reserved_bytes - size
            if self.stored_bytes > free and not self.make_room(size):
                return False
        self.reserved_bytes += size
        return True

    def release(self, size: int) -> None:
        """Give back `size` bytes that were reserved."""
        self.reserved_bytes -= size


def _nothing_to_evict() -> None:
    raise RuntimeError("stored bytes are counted, but no cache evicts them")


class Value(Protocol):
    """Interface of cached values. A wrapper around each value would take more memory."""

    @property
    def size(self) -> int:
        """Its size in bytes, without `ENTRY_OVERHEAD`; must not change."""

    @property
    def born(self) -> float:
        """When it was created, on the cache's clock."""


V = TypeVar("V", bound=Value)


class Cache(Generic[V]):
    """A least-recently-used cache with a byte budget and a TTL.

    Args:
        budget: the bytes that stored values share with tapes and the queue; for one cache.
        ttl: how long a value is stored, in seconds; 0 stores nothing.
        clock: seconds since 1970. Unlike a monotonic clock, it advances while the machine
            sleeps, and is the same on other machines.

    """

    def __init__(self, budget: Budget, ttl: float, clock: Callable[[], float] = time.time) -> None:
        self.budget = budget
        self.ttl = ttl
        self.evictions = 0
        self.expiries = 0
        self._clock = clock
        self._entries: OrderedDict[bytes, V] = OrderedDict()
        budget.evict = self._evict

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def max_bytes(self) -> int:
        """The budget, in bytes."""
        return self.budget.max_bytes

    @property
    def stored_bytes(self) -> int:
        """The bytes charged for all entries."""
        return self.budget.stored_bytes

    def get(self, key: bytes) -> V | None:
        """Return the value of `key`, now the most recently used; None if there is none."""
        value = self._entries.get(key)
        if value is None or self._clock() - value.born >= self.ttl:
            return None
        self._entries.move_to_end(key)
        return value

    def expire(self, key: bytes) -> bool:
        """Remove the value of `key` if it has expired; return True if it had."""
        value = self._entries.get(key)
        if value is None or self._clock() - value.born < self.ttl:
            return False
        self.expiries += 1
        self.remove(key)
        return True

    def put(self, key: bytes, value: V) -> bool:
        """Store `value`, evicting the least recently used values to make room.

        Args:
            key: identifies the value; an older value with this key is replaced.
            value: must not change any more.

        Returns:
            False, and changes nothing, if the value does not fit or has already expired.

        """
        size = value.size + ENTRY_OVERHEAD
        expired = self._clock() - value.born >= self.ttl
        if expired or size > self.budget.max_bytes - self.budget.reserved_bytes:
            return False
        if key in self._entries:
            self.remove(key)
        self.budget.make_room(size)
        self._entries[key] = value
        self.budget.stored_bytes += size
        return True

    def drop(self, wanted: Callable[[V], bool]) -> int:
        """Remove every value for which `wanted` is true; return their number."""
        keys = [key for key, value in self._entries.items() if wanted(value)]
        for key in keys:
            self.remove(key)
        return len(keys)

    def remove(self, key: bytes) -> None:
        """Remove `key`, if it is there."""
        if (value := self._entries.pop(key, None)) is not None:
            self.budget.stored_bytes -= value.size + ENTRY_OVERHEAD

    def _evict(self) -> None:
        self.evictions += 1
        self.remove(next(iter(self._entries)))
