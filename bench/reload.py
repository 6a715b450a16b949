"""What a reload of a large key file costs the event loop and the requests.

usage: reload.py [KEYS]

First the event-loop lag in this process: how late a timer of 1 ms fires, while the loop is idle
(the yardstick) and while a thread reloads a file of KEYS keys with rights, 10,000 unless given,
each of which changes. The status is 1 if the longest lag of a reload, in the median of all
reloads, is `BOUND` or more. Then the latency of hits, asked one after another: with one key, with
KEYS keys, and with KEYS keys that are reloaded all the time.
Limits: other programs on this machine delay the loop too; the idle row shows by how much.
"""

import asyncio
import contextlib
import os
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Iterator
from pathlib import Path

from common import KEY, ROOT, median, ollprox, percentile, script
from waits import hits as ask_for_hits

sys.path[0] = str(ROOT)

import startup  # noqa: E402
from access.keyfile import Parsed  # noqa: E402
from keystore import KeyStore  # noqa: E402

BOUND = 50.0  # milliseconds
RELOADS = 10
SECONDS = 3.0  # of hits in each row


def write_keys(path: Path, count: int, version: int) -> None:
    """Write a file in which each key has rights that depend on the version."""
    lines = [
        f"key-{n:020d} models=llama{n % 9}*,qwen3 rate={n + 1}/minute running={version}  # l{n}\n"
        for n in range(count)
    ]
    path.write_text("".join([*lines, f"{KEY}  # me\n"]))
    os.utime(path, (version, version))  # so old that it need not settle


def row(name: str, times: list[float]) -> str:
    figures = median(times), percentile(times, 0.99), max(times)
    return " | ".join([f"| {name}", str(len(times)), *(f"{ms:.2f}" for ms in figures)]) + " |"


async def measure_lag(lags: list[float]) -> None:
    """Note how late each wake-up is, in milliseconds."""
    while True:
        due = time.perf_counter() + 0.001
        await asyncio.sleep(0.001)
        lags.append(1000 * (time.perf_counter() - due))


async def lags_during(work: Awaitable[object]) -> list[float]:
    """Return how late each wake-up was while this was done, in milliseconds."""
    lags: list[float] = []
    task = asyncio.create_task(measure_lag(lags))
    await asyncio.sleep(0.005)
    await work
    await asyncio.sleep(0.005)  # so that a timer that was held up at the end fires
    task.cancel()
    return lags


async def reload(keys: KeyStore, took: list[float]) -> None:
    """Reload as the program does; note how many seconds it took."""
    begun = time.perf_counter()
    result = await asyncio.to_thread(keys.poll)
    assert isinstance(result, Parsed)
    list(keys.adopt(result))
    took.append(time.perf_counter() - begun)


async def lag(path: Path, count: int) -> float:
    """Return how long a reload blocks the loop: the median of each reload's longest lag."""
    write_keys(path, count, 1)
    keys = KeyStore.open(path, b"")
    list(keys.adopt(keys.reload()))
    startup.tune_collector()
    print("| event-loop lag | wake-ups | median ms | 99 % ms | most ms | median of the mosts |")
    print("| --- | --- | --- | --- | --- | --- |")
    idle = [await lags_during(asyncio.sleep(0.2)) for _ in range(RELOADS)]
    show_lag("idle", idle)
    busy: list[list[float]] = []
    took: list[float] = []
    for version in range(2, RELOADS + 2):
        write_keys(path, count, version)
        busy.append(await lags_during(reload(keys, took)))
    assert keys.reloads == RELOADS + 1
    blocked = show_lag(f"reload of {count:,} keys", busy)
    print(f"\na reload took {median(took):.2f} s, the longest {max(took):.2f} s\n")
    return blocked


def show_lag(name: str, runs: list[list[float]]) -> float:
    """Print a row; return the median of each run's longest lag."""
    typical = median([max(run) for run in runs])
    print(row(name, [value for run in runs for value in run]), f"{typical:.2f} |", flush=True)
    return typical


@contextlib.contextmanager
def touched(path: Path) -> Iterator[None]:
    """Let a file change every 20 ms."""
    done = threading.Event()

    def touch() -> None:
        seconds = 1000
        while not done.wait(0.02):
            os.utime(path, (seconds := seconds + 1, seconds))

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def timed(port: int) -> list[float]:
    """Return how long each of the hits of some seconds took, in milliseconds."""
    end = time.monotonic() + SECONDS
    return list(ask_for_hits(port, 0.002, lambda: time.monotonic() < end))


def hits(path: Path, count: int) -> None:
    print("| hits | answers | median ms | 99 % ms | most ms |\n| --- | --- | --- | --- | --- |")
    with script("fast_ollama.py") as upstream:
        for name, keys, reloading in (
            ("1 key", 0, False),
            (f"{count:,} keys", count, False),
            (f"{count:,} keys, reloaded all the time", count, True),
        ):
            write_keys(path, keys, 1)
            change = touched(path) if reloading else contextlib.nullcontext()
            with ollprox(upstream, API_KEY_FILE=path, KEY_REFRESH=0.02) as (port, _), change:
                print(row(name, timed(port)), flush=True)


def main() -> int:
    count = int(sys.argv[1]) if sys.argv[1:] else 10_000
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "keys")
        blocked = asyncio.run(lag(path, count))
        hits(path, count)
    return blocked >= BOUND


if __name__ == "__main__":
    sys.exit(main())
