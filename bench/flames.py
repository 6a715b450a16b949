"""Where the time goes: a flame graph of OllProx under load, by py-spy.

usage: flames.py [SECONDS]

For each of hits, misses and relayed lines it writes `bench/profile-WHAT.svg`, to be opened in a
browser, and prints the ten functions that most samples have ended in. Samples of OllProx's idle
time and of its log's thread are left out. Needs wrk; py-spy may have to be run as root.
"""

import collections
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

from common import BENCH, be_the_load, lua_same, ollprox, script, wrk
from speed import distinct_questions
from streams import LINES, relayed

RATE = 500  # samples a second
SPY = Path(sys.executable).with_name("py-spy")


def spy(pid: int, seconds: int, form: str, file: Path) -> None:
    command = [str(SPY), "record", "-p", str(pid), "-d", str(seconds), "-r", str(RATE)]
    subprocess.run(
        [*command, "-f", form, "-o", str(file)],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def under_load(load: Callable[[], object], work: Callable[[], None]) -> None:
    """Do some work while a load is repeated."""
    over = threading.Event()

    def repeat() -> None:
        while not over.is_set():
            load()

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        work()
    finally:
        over.set()
        thread.join()


def show(what: str, file: Path) -> None:
    """Print the functions in which the samples of OllProx's main thread ended."""
    ends: collections.Counter[str] = collections.Counter()
    for line in file.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        if "ollprox.py" in stack:
            ends[stack.rpartition(";")[2].rpartition(":")[0] + ")"] += int(count)
    print(f"{what}: {sum(ends.values())} samples")
    for name, times in ends.most_common(10):
        print(f"  {100 * times / sum(ends.values()):5.1f} %  {name}")


def loads(port: int) -> dict[str, Callable[[], object]]:
    return {
        "hits": lambda: wrk(port, lua_same(), seconds=1),
        "misses": lambda: wrk(port, distinct_questions(), seconds=1),
        "lines": lambda: relayed(port, LINES),
    }


def main() -> int:
    seconds = int(sys.argv[1]) if sys.argv[1:] else 5
    be_the_load()
    with script("fast_ollama.py") as upstream, ollprox(upstream) as (port, pid):
        for what, load in loads(port).items():
            graph = BENCH / f"profile-{what}.svg"
            raw = graph.with_suffix(".txt")
            under_load(load, partial(spy, pid, seconds, "raw", raw))
            under_load(load, partial(spy, pid, seconds, "flamegraph", graph))
            show(what, raw)
            raw.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
