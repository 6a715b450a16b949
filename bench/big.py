"""How long the others wait while a large request is read, parsed and passed on.

usage: big.py [ROUNDS]

A request of 31 MiB, an image in base64 in `/api/chat`, is sent as fast as OllProx takes it. From
its first byte to its answer's last one, another client asks for a hit each millisecond, on a
connection of its own. What counts is the longest of its waits in each round. "Alone" is the same
for a second without the large request. The stand-in and both clients share a core, so a wait of
some milliseconds may be theirs.
"""

import itertools
import json
import sys
import threading
import time
from collections.abc import Callable

import report
from common import KEY, Figures, ask, be_the_load, connect, note, ollprox, post, save, script

SIZE = 31 << 20  # bytes
numbers = itertools.count()


def large() -> bytes:
    message = {"role": "user", "content": f"What is it, {next(numbers)}?", "images": ["iVBO"]}
    body = json.dumps({"model": "llava", "messages": [message], "stream": False}).encode()
    body = body.replace(b"iVBO", b"iVBORw0K" * ((SIZE - len(body)) // 8))
    head = f"POST /api/chat HTTP/1.1\r\nHost: a\r\nAPIKEY: {KEY}\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def longest_wait(port: int, meanwhile: Callable[[], object]) -> float:
    """Return the longest wait for a hit while something is done, in milliseconds."""
    waits, hit = [], post("Why is the sky blue?")
    with connect(port) as connection:
        ask(connection, hit)
        thread = threading.Thread(target=meanwhile)
        thread.start()
        while thread.is_alive():
            begun = time.perf_counter()
            ask(connection, hit)
            waits.append(1000 * (time.perf_counter() - begun))
            time.sleep(max(0.0, begun + 0.001 - time.perf_counter()))
        thread.join()
    return max(waits)


def main() -> int:
    rounds = int(sys.argv[1]) if sys.argv[1:] else 5
    be_the_load()
    figures: Figures = {}
    with script("fast_ollama.py") as upstream, ollprox(upstream) as (port, _):
        for number in range(rounds + 1):
            message = large()
            with connect(port) as connection:
                begun = time.perf_counter()
                wait = longest_wait(port, lambda: ask(connection, message))  # noqa: B023
                took = time.perf_counter() - begun
            if number:  # the first is to warm up
                note(figures, "longest wait, ms", "31 MB", wait)
                note(figures, "from its first byte to its answer, s", "31 MB", took)
                wait = longest_wait(port, lambda: time.sleep(1))
                note(figures, "longest wait, ms", "alone", wait)
    save("big", figures)
    return report.show("big")


if __name__ == "__main__":
    sys.exit(main())
