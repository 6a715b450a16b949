"""How long clients wait when something else takes OllProx's time.

usage: waits.py [shared | large | slow]...

By default it runs `shared` and `large`, which have targets. All programs run on this machine.

- shared: 200 clients ask the same question at once; the streamed answer takes a second to
  generate. They should wait no longer than one client alone, apart from the time to write 200
  responses, which is measured as 200 hits of that answer. Three rounds.
- large: a client sends a request of 31 MiB, an image in base64, as fast as OllProx takes it.
  Until its answer is complete, another client asks for a hit each millisecond. The figure is
  the longest of its waits in each of five rounds. "Alone" is the same for a second without the
  large request. The stand-in and both clients share a core, so a few milliseconds may be theirs.
- slow: `slowhttptest` (Debian's package) holds 500 connections that send slow heads, send slow
  bodies, or read slowly. The figures are the latency of hits on one connection meanwhile.
"""

import asyncio
import itertools
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import report
from common import (
    KEY,
    Figures,
    ask,
    be_the_load,
    connect,
    median,
    note,
    ollprox,
    percentile,
    post,
    save,
    script,
)

CLIENTS = 200
LINES, PAUSE = 100, 0.01  # of the shared answer; seconds between two lines
SIZE = 31 << 20  # bytes of the large request
ROUNDS = 5  # of the large request
SECONDS = 10  # of each slow attack
ATTACKS = {
    "alone": [],
    "slow heads": ["-H", "-i", "1", "-p", "2"],
    "slow bodies": ["-B", "-i", "1", "-s", "8192", "-t", "POST"],
    "slow reads": ["-X", "-w", "10", "-y", "20", "-n", "1", "-z", "5", "-k", "3"],
}
HIT = post("Why is the sky blue?")
numbers = itertools.count()


async def read_stream(port: int, prompt: str) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(post(prompt, stream=True, header="Connection: close\r\n"))
    data = await reader.read()
    writer.close()
    assert data.count(b'"done":') == LINES + 1, data[:300]


async def at_once(port: int, prompt: str, clients: int) -> float:
    """Return the seconds until all of these clients have the answer."""
    begun = time.perf_counter()
    await asyncio.gather(*(read_stream(port, prompt) for _ in range(clients)))
    return time.perf_counter() - begun


async def shared(figures: Figures) -> None:
    with script("fast_ollama.py", LINES, PAUSE) as upstream, ollprox(upstream) as (port, _):
        for number in range(3):
            for who, prompt, clients in (
                ("one alone", f"alone {number}", 1),
                (f"{CLIENTS} at once", f"together {number}", CLIENTS),
                (f"{CLIENTS} hits", f"together {number}", CLIENTS),
            ):
                note(figures, "the same question, s", who, await at_once(port, prompt, clients))


def large_request() -> bytes:
    message = {"role": "user", "content": f"What is it, {next(numbers)}?", "images": ["iVBO"]}
    body = json.dumps({"model": "llava", "messages": [message], "stream": False}).encode()
    body = body.replace(b"iVBO", b"iVBORw0K" * ((SIZE - len(body)) // 8))
    head = f"POST /api/chat HTTP/1.1\r\nHost: a\r\nAPIKEY: {KEY}\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def hits(port: int, pause: float, more: Callable[[], bool]) -> Iterator[float]:
    """Ask for hits on one connection; yield how long each took, in milliseconds."""
    with connect(port) as connection:
        ask(connection, HIT)
        while more():
            begun = time.perf_counter()
            ask(connection, HIT)
            yield 1000 * (time.perf_counter() - begun)
            time.sleep(max(0.0, begun + pause - time.perf_counter()))


def longest_wait(port: int, meanwhile: Callable[[], object]) -> float:
    """Return the longest wait for a hit while something is done, in milliseconds."""
    thread = threading.Thread(target=meanwhile)
    thread.start()
    longest = max(hits(port, 0.001, thread.is_alive))
    thread.join()
    return longest


def large(figures: Figures) -> None:
    be_the_load()
    with script("fast_ollama.py") as upstream, ollprox(upstream) as (port, _):
        for number in range(ROUNDS + 1):
            message = large_request()
            with connect(port) as connection:
                begun = time.perf_counter()
                wait = longest_wait(port, lambda: ask(connection, message))  # noqa: B023
                took = time.perf_counter() - begun
            if number:  # the first is to warm up
                note(figures, "longest wait, ms", "31 MB", wait)
                note(figures, "from its first byte to its answer, s", "31 MB", took)
                wait = longest_wait(port, lambda: time.sleep(1))
                note(figures, "longest wait, ms", "alone", wait)


def slow() -> int:
    tool = shutil.which("slowhttptest")
    if tool is None:
        print("slowhttptest is not installed (apt-get install slowhttptest)")
        return 1
    print("| traffic | answers | median ms | 99 % ms | most ms |\n| --- | --- | --- | --- | --- |")
    with script("fast_ollama.py") as upstream, ollprox(upstream) as (port, _):
        for name, options in ATTACKS.items():
            attack = None
            if options:
                command = [tool, *options, "-c", "500", "-r", "200", "-l", str(SECONDS + 2)]
                attack = subprocess.Popen(
                    [*command, "-u", f"http://127.0.0.1:{port}/call_model"],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                time.sleep(2)
            end = time.monotonic() + SECONDS
            times = [*hits(port, 0.002, lambda: time.monotonic() < end)]  # noqa: B023
            if attack is not None:
                attack.terminate()
                attack.wait()
            row = f"{median(times):.2f} | {percentile(times, 0.99):.2f} | {max(times):.2f}"
            print(f"| {name} | {len(times)} | {row} |", flush=True)
    return 0


def main() -> int:
    chosen = sys.argv[1:] or ["shared", "large"]
    figures: Figures = {}
    if "shared" in chosen:
        asyncio.run(shared(figures))
    if "large" in chosen:
        large(figures)
    if figures:
        save("waits", figures)
        report.show("waits")
    return slow() if "slow" in chosen else 0


if __name__ == "__main__":
    sys.exit(main())
