"""How long people wait while one label floods the GPU, with and without the fair queue.

usage: turns.py

A stand-in for Ollama has 2 slots of 1 s each and serves whoever comes first, as Ollama does. The
label `flood` sends 40 requests at once; `anna` and `omar` then send one each every half second
that they are not waiting for an answer, for as long as the flood lasts. Measured: the seconds
until their answers, the slot's second included; mean and worst. Targets, with the queue: a mean
under 1.5 times a slot's time of waiting, and a worst wait under 3 times.
Limits: the slots only sleep, so this measures the order of turns and not the load of a machine.
"""

import asyncio
import contextlib
import itertools
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

from common import Figures, note, ollprox, save

SLOTS, SECONDS, FLOOD, PAUSE = 2, 1.0, 40, 0.5
LABELS = ("flood", "anna", "omar")
ANSWER = b'{"model":"llama2","response":"x","done":true,"done_reason":"stop","eval_count":1}\n'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nContent-Length: %d\r\n\r\n"


@contextlib.asynccontextmanager
async def ollama() -> AsyncIterator[int]:
    """The stand-in; gives its port."""
    slots = asyncio.Semaphore(SLOTS)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError)
        with contextlib.suppress(*ends):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if head.startswith(b"POST"):
                    length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
                    await reader.readexactly(int(length))
                    async with slots:
                        await asyncio.sleep(SECONDS)
                writer.write(HEAD % len(ANSWER) + ANSWER)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def ask(port: int, label: str, prompt: str) -> float:
    """Ask once; return the seconds until the answer."""
    body = b'{"model":"llama2","prompt":"%b"}' % prompt.encode()
    begun = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /call_model HTTP/1.1\r\nHost: localhost\r\nAPIKEY: key-of-%b-in-bench\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (label.encode(), len(body), body)
    )
    data = await reader.read()
    writer.close()
    if not data.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"no good response: {data[:300]!r}")
    return time.perf_counter() - begun


async def person(port: int, label: str, flood: "asyncio.Future[list[float]]") -> list[float]:
    """Ask again and again while the flood lasts."""
    waits: list[float] = []
    for number in itertools.count():
        await asyncio.sleep(PAUSE)
        if flood.done():
            return waits
        waits.append(await ask(port, label, f"{label} {number}") - SECONDS)
    raise AssertionError


async def measure(figures: Figures, slots: int) -> None:
    who = "fair queue" if slots else "no queue"
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder, "keys")
        keys.write_text("".join(f"key-of-{label}-in-bench  # {label}\n" for label in LABELS))
        async with ollama() as upstream:
            with ollprox(upstream, MAX_GENERATIONS=slots, API_KEY_FILE=keys) as (port, _):
                flood = asyncio.gather(*(ask(port, "flood", f"f {n}") for n in range(FLOOD)))
                people = await asyncio.gather(*(person(port, label, flood) for label in LABELS[1:]))
                flooding = await flood
    waits = [wait for each in people for wait in each]
    note(figures, "mean wait of others, s", who, sum(waits) / len(waits))
    note(figures, "worst wait of others, s", who, max(waits))
    note(figures, "answers to others", who, len(waits))
    note(figures, "last answer to the flood, s", who, max(flooding))


async def main() -> int:
    figures: Figures = {}
    for slots in (0, SLOTS):
        await measure(figures, slots)
    save("turns", figures)
    (mean,) = figures["mean wait of others, s"]["fair queue"]
    (worst,) = figures["worst wait of others, s"]["fair queue"]
    met = mean < 1.5 * SECONDS and worst < 3 * SECONDS
    print("targets met" if met else "TARGETS NOT MET")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
