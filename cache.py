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

    Reservations come first: stored values are evicted to make room for them.

    Args:
        max_bytes: the most that may be in use, in bytes.

    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.stored_bytes = 0
        self.reserved_bytes = 0
        self.evict: Callable[[], None] = _nothing_to_evict

    def make_room(self, size: int) -> bool:
        """Evict stored values until `size` bytes are free; False if they can never be."""
        if size > self.max_bytes - self.reserved_bytes:
            return False
        while self.stored_bytes + self.reserved_bytes + size > self.max_bytes:
            self.evict()
        return True

    def reserve(self, size: int, *, must: bool = False) -> bool:
        """Set `size` bytes aside.

        Returns:
            False if they do not fit beside what is reserved. With `must` they are counted
            even so, and the next reservation has to make room for them.

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
    """What the cache needs to know of a value; wrapping each one would cost more memory."""

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
        budget: what its values share with others. A budget has one cache.
        ttl: how long a value is kept, in seconds; 0 keeps nothing.
        clock: seconds since 1970. It goes on while the machine sleeps, and other machines
            have the same.

    """

    def __init__(self, budget: Budget, ttl: float, clock: Callable[[], float] = time.time) -> None:
        self.budget = budget
        self.ttl = ttl
        self.puts = 0
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
        """Remove `key` if it has expired; return whether it had."""
        value = self._entries.get(key)
        if value is None or self._clock() - value.born < self.ttl:
            return False
        self.expiries += 1
        self.remove(key)
        return True

    def put(self, key: bytes, value: V) -> bool:
        """Store `value`, evicting the least recently used values to make room.

        Args:
            key: what identifies it; an older value under it is replaced.
            value: must not change any more.

        Returns:
            False if it cannot fit or has expired already; then nothing has changed.

        """
        size = value.size + ENTRY_OVERHEAD
        expired = self._clock() - value.born >= self.ttl
        if expired or size > self.budget.max_bytes - self.budget.reserved_bytes:
            return False
        if key in self._entries:
            self.remove(key)
        self.budget.make_room(size)
        self.puts += 1
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
