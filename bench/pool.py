"""What a second Ollama gives, and what a bad one costs.

usage: pool.py

Each stand-in for Ollama has 2 slots of 50 ms and lets others wait. Measured: answers a second
from one of them and from two (target: 1.9 times); the share of 1,000 requests of 8 clients that a
server gets that answers 503 at once (target: under 1 %); and what a dead server adds to the median
time to an answer (target: under 1 ms). The slots only sleep, so this measures choices alone.
"""

import asyncio
import contextlib
import itertools
import statistics
import sys
import time
from collections.abc import AsyncIterator

import report
from common import KEY, Figures, free_port, note, ollprox, save

SLOTS, SECONDS, REQUESTS, AT_ONCE = 2, 0.05, 400, 16
TAGS = b'{"models":[{"name":"llama2:latest","model":"llama2:latest","digest":"aa"}]}'
ANSWER = b'{"model":"llama2","response":"x","done":true,"done_reason":"stop","eval_count":1}'
prompts = itertools.count()


class Ollama:
    """A stand-in; counts the generations that it was asked for."""

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.port = 0
        self.asked = 0
        self._slots = asyncio.Semaphore(SLOTS)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                status, body = 200, TAGS
                if head.startswith(b"POST"):
                    length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
                    await reader.readexactly(int(length))
                    self.asked += 1
                    status, body = self.status, ANSWER
                    if status == 200:
                        async with self._slots:
                            await asyncio.sleep(SECONDS)
                writer.write(b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\n" % status)
                writer.write(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        writer.close()


@contextlib.asynccontextmanager
async def running(*ollamas: Ollama) -> AsyncIterator[str]:
    """Start stand-ins; gives OLLAMA_HOST."""
    servers = [await asyncio.start_server(one.serve, "127.0.0.1", 0) for one in ollamas]
    for one, server in zip(ollamas, servers, strict=True):
        one.port = server.sockets[0].getsockname()[1]
    yield ",".join(f"127.0.0.1:{one.port}" for one in ollamas)
    for server in servers:
        server.close()
    await asyncio.sleep(0.1)  # so that they see that their client has gone


async def ask_all(port: int, count: int, at_once: int = AT_ONCE) -> list[float]:
    """Ask different questions, so many at once; return the milliseconds that each took."""
    took: list[float] = []

    async def client(numbers: "itertools.islice[int]") -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in numbers:
            body = b'{"model":"llama2","prompt":"%d","stream":false}' % number
            begun = time.perf_counter()
            writer.write(
                b"POST /api/generate HTTP/1.1\r\nHost: a\r\nAPIKEY: %b\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (KEY.encode(), len(body), body)
            )
            head = await reader.readuntil(b"\r\n\r\n")
            length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
            await reader.readexactly(int(length))
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(head.decode())
            took.append(1000 * (time.perf_counter() - begun))
        writer.close()

    share = [itertools.islice(prompts, count // at_once) for _ in range(at_once)]
    await asyncio.gather(*map(client, share))
    return took


async def answers_a_second(count: int) -> float:
    async with running(*(Ollama() for _ in range(count))) as hosts:
        with ollprox(
            0, OLLAMA_HOST=hosts, OLLAMA_PORT="", MAX_GENERATIONS=SLOTS, MODEL_REFRESH=30
        ) as (port, _):
            begun = time.perf_counter()
            took = await ask_all(port, REQUESTS)
            return len(took) / (time.perf_counter() - begun)


async def share_of_503() -> float:
    good, bad = Ollama(), Ollama(503)
    async with running(bad, good) as hosts:
        with ollprox(0, OLLAMA_HOST=hosts, OLLAMA_PORT="", MODEL_REFRESH=30) as (port, _):
            await ask_all(port, 1000, at_once=8)  # the first 4 go there before one is answered
    return 100 * bad.asked / 1000


async def median_of_one(*, dead: bool) -> float:
    async with running(Ollama()) as hosts:
        if dead:
            hosts = f"127.0.0.1:{free_port()},{hosts}"
        with ollprox(0, OLLAMA_HOST=hosts, OLLAMA_PORT="", MODEL_REFRESH=30) as (port, _):
            return statistics.median(await ask_all(port, 100, at_once=1))


async def main() -> int:
    figures: Figures = {}
    for count in (1, 2):
        note(figures, "answers/s", f"{count} servers", await answers_a_second(count))
    note(figures, "share of 1,000, %", "a server that answers 503", await share_of_503())
    for dead in (False, True):
        who = "one of two is dead" if dead else "one server"
        note(figures, "median, ms", who, await median_of_one(dead=dead))
    save("pool", figures)
    return report.show("pool")


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
