"""What a reload of a large key file costs the event loop and the requests.

usage: reload.py [KEYS]

First the event-loop lag in this process: how late a timer of 1 ms fires, while the loop is idle
(the yardstick) and while a thread reloads a file of KEYS keys with rights, 10,000 unless given,
each of which changes. The status is 1 if the loop was blocked for `BOUND` or longer. Then the
latency of hits, asked one after another: with one key, with KEYS keys, and with KEYS keys that
are reloaded all the time.
Limits: other programs on this machine delay the loop too; the idle row shows by how much.
"""

import asyncio
import contextlib
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from common import KEY, ROOT, median, ollprox, percentile, script
from slow import latencies

sys.path[0] = str(ROOT)

import startup  # noqa: E402
from access.keyfile import Parsed  # noqa: E402
from keystore import KeyStore  # noqa: E402

BOUND = 50.0  # milliseconds
RELOADS = 10
SECONDS = 3.0  # of hits in each row

HEADER = "| {} | {} | median ms | 99 % ms | most ms |\n| --- | --- | --- | --- | --- |"


def write_keys(path: Path, count: int, version: int) -> None:
    """Write a file in which each key has rights that depend on the version."""
    lines = [
        f"key-{n:020d} models=llama{n % 9}*,qwen3 rate={n + 1}/minute running={version}  # l{n}\n"
        for n in range(count)
    ]
    path.write_text("".join([*lines, f"{KEY}  # me\n"]))
    os.utime(path, (version, version))  # so old that it need not settle


def show(name: str, times: list[float]) -> None:
    row = median(times), percentile(times, 0.99), max(times)
    print(f"| {name} | {len(times)} | {row[0]:.2f} | {row[1]:.2f} | {row[2]:.2f} |", flush=True)


async def measure_lag(lags: list[float]) -> None:
    """Note how late each wake-up is, in milliseconds."""
    while True:
        due = time.perf_counter() + 0.001
        await asyncio.sleep(0.001)
        lags.append(1000 * (time.perf_counter() - due))


async def lag(path: Path, count: int) -> float:
    """Return the longest lag of all reloads."""
    write_keys(path, count, 1)
    keys = KeyStore.open(path, b"")
    list(keys.adopt(keys.reload()))
    startup.tune_collector()
    print(HEADER.format("event-loop lag", "wake-ups"))
    idle: list[float] = []
    task = asyncio.create_task(measure_lag(idle))
    await asyncio.sleep(RELOADS * 0.2)
    task.cancel()
    show("idle", idle)
    lags: list[float] = []
    took = []
    for version in range(2, RELOADS + 2):
        write_keys(path, count, version)
        task = asyncio.create_task(measure_lag(lags))
        await asyncio.sleep(0.005)
        begun = time.perf_counter()
        result = await asyncio.to_thread(keys.poll)
        assert isinstance(result, Parsed)
        list(keys.adopt(result))
        took.append(time.perf_counter() - begun)
        await asyncio.sleep(0.005)  # the timer that adopting held up fires
        task.cancel()
    assert keys.reloads == RELOADS + 1
    show(f"reload of {count:,} keys", lags)
    print(f"\na reload took {median(took):.2f} s, the longest {max(took):.2f} s\n")
    return max(lags)


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


def hits(path: Path, count: int) -> None:
    print(HEADER.format("hits", "answers"))
    with script("fast_ollama.py") as upstream:
        for name, keys, reloading in (
            ("1 key", 0, False),
            (f"{count:,} keys", count, False),
            (f"{count:,} keys, reloaded all the time", count, True),
        ):
            write_keys(path, keys, 1)
            change = touched(path) if reloading else contextlib.nullcontext()
            with ollprox(upstream, API_KEY_FILE=path, KEY_REFRESH=0.02) as (port, _), change:
                show(name, latencies(port, SECONDS))


def main() -> int:
    count = int(sys.argv[1]) if sys.argv[1:] else 10_000
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "keys")
        longest = asyncio.run(lag(path, count))
        hits(path, count)
    return longest >= BOUND


if __name__ == "__main__":
    sys.exit(main())
