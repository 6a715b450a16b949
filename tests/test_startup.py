"""What keeps the garbage collector from stored answers, in this process."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from answers.stored import StoredAnswer
from cache import Budget, Cache
from startup import FREEZE_AFTER, THAW_AFTER, Collector


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A collector, undone at the test's end."""
    before = gc.get_threshold()
    cache: Cache[StoredAnswer] = Cache(Budget(1000), 60)
    yield Collector(cache, lambda: 300)
    gc.set_threshold(*before)
    gc.unfreeze()


class Circle:
    """What only the collector can free."""

    def __init__(self) -> None:
        self.itself = self


async def test_what_was_frozen_and_then_dropped_is_collected_in_the_end(
    collector: Collector,
) -> None:
    """Else each connection that is open at a freeze would stay for ever."""
    circle = Circle()
    freed = weakref.ref(circle)
    cache = collector._cache
    cache.puts += FREEZE_AFTER
    await collector.poll()
    del circle
    gc.collect()
    assert freed() is not None
    for _ in range(1 + THAW_AFTER // 300):
        cache.puts += FREEZE_AFTER
        await collector.poll()
    assert freed() is None
    assert gc.get_freeze_count() > 0
