"""How much memory OllProx uses, and whether a full cache makes it slower.

usage: memory.py [ROUNDS [ENTRIES [CONNECTIONS]]]

- start: from the start of the process to the first good answer of `/health`, beside
  `python -c pass`; and the resident memory 0.3 s later. The byte code is there already.
- idle connections: 10,000 (fewer where less than 20,100 files may be open), each of which has
  got one hit and keeps its connection. By how much the resident memory has grown, for each; the
  kernel's buffers are not in it.
- entries: 100,000 answers of one line, each asked for once by 8 clients, and each with another
  Date in its head, as a model's are. By how much the resident memory has grown for each, less
  the bytes of the answer's two forms (stream and object) and of its head. "Charged" is the same
  for what the cache has counted in its budget, as it is told from inside (`inside.py`). Once.
- longest step: of the event loop, in processor time and told from inside, while the cache is
  filled and in some seconds of hits after. It holds the pauses for the collection of garbage,
  which are also given alone.
- longest wait: the same from outside: the longest latency of hits on a connection of its own,
  begun each millisecond. Here everything counts that stops OllProx or the client, such as other
  programs on this machine; "nothing kept" is the same load with CACHE_TTL=0, for comparison.
- hits: `wrk` over the same 100 questions, where these are all the entries and among 100,000.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from email.utils import formatdate
from pathlib import Path
from socket import socket

import report
from common import (
    BENCH,
    FILES,
    NUMBER,
    Figures,
    ask,
    be_the_load,
    connect,
    is_whole,
    lua_each,
    note,
    ollprox,
    on_core,
    post,
    resident,
    save,
    script,
    wrk,
)
from fast_ollama import DATE, HEAD

Told = dict[str, float]

HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
STARTS = 7
FEW, CLIENTS = 100, 8
GAP = 0.001  # seconds between the beginnings of two hits


def question(number: int) -> bytes:
    """One whose answer has a single line."""
    return post(f"0 {NUMBER + number}")


def measure_start(figures: Figures) -> None:
    for _ in range(STARTS):
        begun = time.perf_counter()
        subprocess.run([*on_core(0), sys.executable, "-c", "pass"], check=True)
        note(figures, "ready, s", "python -c pass", time.perf_counter() - begun)
        begun = time.perf_counter()
        with ollprox(1) as (port, pid), connect(port) as connection:
            ask(connection, HEALTH)
            note(figures, "ready, s", "OllProx", time.perf_counter() - begun)
            time.sleep(0.3)
            note(figures, "idle process, MiB", "OllProx", resident(pid) / (1 << 20))


def measure_connections(figures: Figures, upstream: int, count: int) -> None:
    count = min(count, (FILES - 100) // 2)  # OllProx may want two files for each client
    with (
        ollprox(upstream, MAX_CONNECTIONS=count) as (port, pid),
        contextlib.ExitStack() as held,
    ):
        with connect(port) as connection:  # to warm up
            ask(connection, question(0))
        before = resident(pid)
        for number in range(count):
            # Of several addresses, since one may have too few ports.
            connection = held.enter_context(connect(port, f"127.0.0.{2 + number % 4}"))
            ask(connection, question(0))
        grown = (resident(pid) - before) / count / 1024
        note(figures, "idle connection, KiB", "OllProx", grown)


def longest_wait(port: int, questions: Iterable[bytes], seconds: float = 0.0) -> float:
    """Ask each question once; return the longest wait for a hit meanwhile, in milliseconds."""
    left, waits, begun = iter(questions), [0.0], 0.0
    hit = question(0)
    with selectors.DefaultSelector() as selector, connect(port) as prober:
        ask(prober, hit)
        selector.register(prober, selectors.EVENT_READ)
        for message in (next(left, None) for _ in range(CLIENTS)):
            if message is not None:
                client = connect(port)
                client.sendall(message)
                selector.register(client, selectors.EVENT_READ)
        due = time.perf_counter()
        end = due + seconds
        while len(selector.get_map()) > 1 or time.perf_counter() < end or begun:
            if not begun and time.perf_counter() >= due:
                begun = time.perf_counter()
                due = begun + GAP
                prober.sendall(hit)
            for key, _ in selector.select(GAP):
                connection = key.fileobj
                assert isinstance(connection, socket)
                take(connection)
                if connection is prober:
                    waits.append(1000 * (time.perf_counter() - begun))
                    begun = 0.0
                elif (message := next(left, None)) is not None:
                    connection.sendall(message)
                else:
                    selector.unregister(connection)
                    connection.close()
    return max(waits)


def take(connection: socket) -> None:
    """Read a response that has begun to come; these are small, and come whole."""
    data = connection.recv(1 << 16)
    if not (data.startswith(b"HTTP/1.1 200") and is_whole(data)):
        raise RuntimeError(f"no good response: {data[:300]!r}")


def answer_size(port: int) -> int:
    """Return the bytes of an answer's two forms and of its head, all without framing."""
    with connect(port) as connection:
        single = ask(connection, post(f"0 {NUMBER}"))
        stream = ask(connection, post(f"0 {NUMBER}", stream=True))
    head = HEAD % formatdate(DATE, usegmt=True).encode()
    fields = [line.split(b": ") for line in head.split(b"\r\n")[1:3]]  # all but the framing
    size = sum(len(name) + len(value) for name, value in fields)
    return size + sum(len(data.partition(b"\r\n\r\n")[2]) for data in (single, stream))


@contextlib.contextmanager
def told(upstream: int) -> Iterator[tuple[int, int, Callable[[], Told]]]:
    """OllProx with a way to ask what it knows inside."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "told")
        command = (str(BENCH / "inside.py"), str(file))
        with ollprox(upstream, command=command, CACHE_MAX_BYTES="1G") as (port, pid):

            def tell() -> Told:
                file.unlink(missing_ok=True)
                os.kill(pid, signal.SIGUSR1)
                while not file.exists():
                    time.sleep(0.01)
                found: Told = json.loads(file.read_text())
                return found

            yield port, pid, tell


def measure_entries(figures: Figures, upstream: int, rounds: int, count: int) -> None:
    overhead = "an entry, bytes beside its answer and head"
    step, collection, wait = "longest step, ms", "longest collection, ms", "longest wait, ms"
    with (
        ollprox(upstream, CACHE_TTL=0) as (none, _),
        told(upstream) as (few, _, _),
        told(upstream) as (many, pid, tell),
    ):
        for port in (few, many):
            longest_wait(port, map(question, range(FEW)))
        size, before = answer_size(many), resident(pid)
        tell()  # from here on
        note(figures, wait, "filling", longest_wait(many, map(question, range(FEW, count))))
        note(figures, overhead, "grown", (resident(pid) - before) / (count - FEW) - size)
        inside = tell()
        assert inside["entries"] == count, inside
        note(figures, overhead, "charged", inside["charged"] / count - size)
        note(figures, step, "filling", inside["step"])
        note(figures, collection, "filling", inside["collection"])
        note(figures, wait, "filled", longest_wait(many, (), seconds=3))
        inside = tell()
        note(figures, step, "filled", inside["step"])
        note(figures, collection, "filled", inside["collection"])
        note(figures, wait, "nothing kept", longest_wait(none, map(question, range(count // 4))))
        hits = lua_each(question(0), wrap=FEW)
        for _ in range(2 * rounds + 1):  # more and shorter ones, since the difference is small
            for who, port in (("100 entries", few), ("100,000 entries", many)):
                note(figures, "hits/s", who, wrk(port, hits, seconds=1))


def main() -> int:
    rounds, entries, connections = [
        int(given or default)
        for given, default in zip([*sys.argv[1:], *[""] * 3], (3, 100_000, 10_000), strict=False)
    ]
    be_the_load()
    figures: Figures = {}
    measure_start(figures)
    with script("fast_ollama.py", 0, 0, "dated") as upstream:
        measure_connections(figures, upstream, connections)
        measure_entries(figures, upstream, rounds, entries)
    save("memory", figures)
    return report.show("memory")


if __name__ == "__main__":
    sys.exit(main())
