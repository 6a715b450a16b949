"""OllProx with measurements from the inside.

usage: inside.py FILE

On SIGUSR1 it writes FILE: the number of entries in the cache, the bytes charged for them, and
since the last signal the longest step of the event loop and the longest garbage collection.
Both are in milliseconds of this thread's processor time, so other programs do not count.
"""

import asyncio
import gc
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

FILE = Path(sys.argv[1])
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import cache  # noqa: E402
import ollprox  # noqa: E402

caches: list["cache.Cache[Any]"] = []
begun = 0.0
longest = {"step": 0.0, "collection": 0.0}


def note_cache(self: "cache.Cache[Any]", *arguments: Any, **named: Any) -> None:
    caches.append(self)
    initialise(self, *arguments, **named)


def note_step(self: asyncio.Handle) -> None:
    start = time.thread_time()
    run(self)
    longest["step"] = max(longest["step"], time.thread_time() - start)


def note_collection(phase: str, _: dict[str, int]) -> None:
    global begun
    if phase == "start":
        begun = time.thread_time()
    else:
        longest["collection"] = max(longest["collection"], time.thread_time() - begun)


def tell(*_: object) -> None:
    told: dict[str, float] = {"entries": len(caches[0]), "charged": caches[0].stored_bytes}
    for what, seconds in longest.items():
        told[what], longest[what] = 1000 * seconds, 0.0
    FILE.with_suffix(".new").write_text(json.dumps(told))
    FILE.with_suffix(".new").replace(FILE)


run = asyncio.Handle._run
asyncio.Handle._run = note_step  # type: ignore
initialise = cache.Cache.__init__
cache.Cache.__init__ = note_cache  # type: ignore[method-assign]
gc.callbacks.append(note_collection)
signal.signal(signal.SIGUSR1, tell)
sys.exit(ollprox.main([]))
