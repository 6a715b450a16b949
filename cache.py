"""Remember values by key until they expire or must make room.

One byte budget holds both: the stored values, and what answers under way have reserved
(`reserve`). Pure: the clock is an argument, nothing here waits.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

ENTRY_OVERHEAD = 590
"""Bytes charged for an entry beside what its value says of its size: the key, the
dictionary's slot and link, and the objects of a stored answer (`bench/memory.py` measures them)."""


class Kept(Protocol):
    """What a value must tell of itself; an entry of the cache's own would cost more memory."""

    @property
    def size(self) -> int:
        """Its bytes, without the overhead of an entry; never another number."""

    @property
    def born(self) -> float:
        """When it was made, on the cache's clock."""


V = TypeVar("V", bound=Kept)


class Cache(Generic[V]):
    """A least-recently-used cache with a byte budget and a TTL.

    Args:
        max_bytes: the budget, in bytes, for values and reservations together.
        ttl: how long a value is kept, in seconds; 0 keeps nothing.
        clock: seconds on a clock that never goes back.

    """

    def __init__(
        self, max_bytes: int, ttl: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.max_bytes = max_bytes
        self.ttl = ttl
        self.stored_bytes = 0
        self.reserved_bytes = 0
        self.puts = 0
        self.evictions = 0
        self.expiries = 0
        self._clock = clock
        self._entries: OrderedDict[bytes, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> V | None:
        """Return what is kept under `key`, now the most recently used; None if nothing."""
        value = self._entries.get(key)
        if value is None or self._clock() - value.born >= self.ttl:
            return None
        self._entries.move_to_end(key)
        return value

    def expire(self, key: bytes) -> bool:
        """Forget `key` if it has expired; True if that was so."""
        value = self._entries.get(key)
        if value is None or self._clock() - value.born < self.ttl:
            return False
        self.expiries += 1
        self.remove(key)
        return True

    def put(self, key: bytes, value: V) -> bool:
        """Keep `value`, evicting the least recently used to make room.

        Args:
            key: what identifies it; an older value under it is replaced.
            value: must not change any more.

        Returns:
            False if it cannot fit or would be expired at once: nothing has changed.

        """
        size = value.size + ENTRY_OVERHEAD
        expired = self._clock() - value.born >= self.ttl
        if expired or size > self.max_bytes - self.reserved_bytes:
            return False
        if key in self._entries:
            self.remove(key)
        self._make_room(size)
        self.puts += 1
        self._entries[key] = value
        self.stored_bytes += size
        return True

    def drop(self, wanted: Callable[[V], bool]) -> int:
        """Forget every value for which `wanted` is true; return how many they were."""
        keys = [key for key, value in self._entries.items() if wanted(value)]
        for key in keys:
            self.remove(key)
        return len(keys)

    def reserve(self, size: int, *, must: bool = False) -> bool:
        """Set `size` bytes of the budget aside, evicting for them.

        Returns:
            False if they do not fit beside what is reserved already. With `must` they are
            only counted: whoever comes next has to make room for them.

        """
        if not must:
            if size > self.max_bytes - self.reserved_bytes:
                return False
            self._make_room(size)
        self.reserved_bytes += size
        return True

    def release(self, size: int) -> None:
        """Give back what `reserve` set aside."""
        self.reserved_bytes -= size

    def _make_room(self, size: int) -> None:
        while self.stored_bytes + self.reserved_bytes + size > self.max_bytes:
            self.evictions += 1
            self.remove(next(iter(self._entries)))

    def remove(self, key: bytes) -> None:
        """Forget `key`, if it is there."""
        if (value := self._entries.pop(key, None)) is not None:
            self.stored_bytes -= value.size + ENTRY_OVERHEAD
