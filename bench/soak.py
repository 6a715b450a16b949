"""A soak: hits, misses, joins, disconnects, faults and wrong keys at once, each answer checked.

usage: soak.py [--seconds 600] [--seed N] [--clients 40]

The stand-in here fails by plan: a question's number tells its fault, if it has one, and how many
lines its answer has; each line names the question, the attempt and its own number. So whatever a
client gets can be checked: it is one attempt's whole answer, or an error which the question's
own fault explains. At the end files, memory and tasks must be where they began, and what OllProx
has counted must be what the clients and the stand-in have. It exits with 1 and says why if anything
is not so.
"""

import argparse
import asyncio
import collections
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, free_port, resident, wait_for

KEY = "a-key-for-the-soak"
QUESTIONS = 300
FAULTS = ("cut", "reset", "error", "stall", "status", "garbage", "silent end", "slow")
EXPLAINED = {  # what a single object may get, and whether a stream may be cut
    "cut": ({502}, True),
    "reset": ({502}, False),
    "error": ({500}, True),
    "stall": ({502, 504}, True),  # for an object it may wait until the stand-in gives up
    "status": ({503}, False),
    "garbage": ({502}, False),
}
MEMORY = 24 << 20  # bytes that the process may have grown by, for its bounded cache and tables
HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
)


def fault_of(number: int) -> str:
    return FAULTS[number % 16] if number % 16 < len(FAULTS) else ""


def lines_of(number: int) -> int:
    return 1 + number % 23


class Upstream:
    """A stand-in for Ollama that fails as each question says."""

    def __init__(self) -> None:
        self.attempts: collections.Counter[int] = collections.Counter()
        self.requests = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = (OSError, asyncio.IncompleteReadError, asyncio.CancelledError)
        with contextlib.suppress(*ends):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.requests += 1
                length = re.search(rb"(?i)content-length: (\d+)", head)
                body = await reader.readexactly(int(length[1]) if length else 0)
                if head.startswith(b"GET"):
                    writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n{"models":[]}')
                elif not await self.answer(int(json.loads(body)["prompt"]), writer):
                    break
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    async def answer(self, number: int, writer: asyncio.StreamWriter) -> bool:
        """Answer one question; return True if the connection stays open."""
        self.attempts[number] += 1
        attempt, fault, count = self.attempts[number], fault_of(number), lines_of(number)
        if fault == "reset":
            writer.transport.abort()
            return False
        if fault == "garbage":
            writer.write(b"\x00garbage\r\n\r\n")
            return False
        if fault == "status":
            writer.write(b"HTTP/1.1 503 Busy\r\nContent-Length: 16\r\n\r\n" + b'{"error":"busy"}')
            return True
        writer.write(HEAD)
        for index in range(count):
            if fault in {"cut", "stall", "error", "silent end"} and index == count // 2:
                return await self.fail(fault, writer)
            line = {"response": f"{number}.{attempt}.{index} ", "done": False}
            self.write(writer, line)
            await writer.drain()
            await asyncio.sleep(0.02 if fault == "slow" else 0.001 * (number % 5))
        self.write(writer, {"response": "", "done": True, "done_reason": "stop"})
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True

    async def fail(self, fault: str, writer: asyncio.StreamWriter) -> bool:
        if fault == "cut":
            return False
        if fault == "stall":
            await asyncio.sleep(5)
            return False
        if fault == "error":
            self.write(writer, {"error": "boom"})
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True

    @staticmethod
    def write(writer: asyncio.StreamWriter, line: object) -> None:
        data = json.dumps(line).encode() + b"\n"
        writer.write(b"%x\r\n%b\r\n" % (len(data), data))


class Soak:
    """The clients, and what they have found."""

    def __init__(self, port: int, chance: random.Random) -> None:
        self.port = port
        self.chance = chance
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.requests = 0
        self.known: collections.Counter[str] = collections.Counter()  # what came of most of them
        self.wrong: list[str] = []

    async def client(self, until: float) -> None:
        while time.monotonic() < until and len(self.wrong) < 5:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await self.connection(until)

    async def connection(self, until: float) -> None:
        """Ask a few questions on one connection, or leave it in the middle of one."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            for _ in range(self.chance.randrange(1, 6)):
                if time.monotonic() > until or not await self.ask(reader, writer):
                    break
        finally:
            if self.chance.random() < 0.3:
                writer.transport.abort()
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        number = int(QUESTIONS * self.chance.random() ** 2)
        stream, leaves = self.chance.random() < 0.5, self.chance.random() < 0.1
        wrong_key = self.chance.random() < 0.05
        body = json.dumps({"model": "m", "prompt": str(number), "stream": stream}).encode()
        fresh = b"Cache-Control: no-cache\r\n" if self.chance.random() < 0.1 else b""
        writer.write(
            b"POST /call_model HTTP/1.1\r\nHost: a\r\nAPIKEY: %b\r\n%bContent-Length: %d\r\n\r\n%b"
            % (b"wrong" if wrong_key else KEY.encode(), fresh, len(body), body)
        )
        self.requests += 1
        if leaves:
            await asyncio.sleep(self.chance.random() * 0.03)
            self.outcomes["left"] += 1
            return False
        head = await reader.readuntil(b"\r\n\r\n")
        status, complete, data = int(head[9:12]), True, b""
        if b"chunked" in head:
            complete, data = await self.chunks(reader)
        elif length := re.search(rb"Content-Length: (\d+)", head):
            data = await reader.readexactly(int(length[1]))
        if problem := self.check(number, stream, wrong_key, status, complete, data):
            self.wrong.append(f"question {number} ({fault_of(number)}): {problem}: {data[:300]!r}")
        cached = re.search(rb"Cache-Status: OllProx(?:; )?([^\r]*)", head)
        self.known[outcome_of(cached[1] if cached else b"")] += 1
        self.outcomes[
            f"{status} {re.sub(r'=[0-9]+', '', cached[1].decode()) if cached else ''}"
        ] += 1
        return complete and b"Connection: close" not in head

    @staticmethod
    async def chunks(reader: asyncio.StreamReader) -> tuple[bool, bytes]:
        data = b""
        while size := await reader.readline():
            piece = await reader.readexactly(int(size, 16) + 2)
            if len(piece) == 2:
                return True, data
            data += piece[:-2]
        return False, data

    def check(
        self, number: int, stream: bool, wrong_key: bool, status: int, complete: bool, data: bytes
    ) -> str:
        """Return what is wrong with an answer; empty if it is right or explained."""
        if wrong_key:
            return "" if status in {401, 429} else f"a wrong key got {status}"
        errors, may_be_cut = EXPLAINED.get(fault_of(number), (set[int](), False))
        if fault_of(number) == "silent end" and lines_of(number) // 2 == 0:
            errors = {502}  # an object cannot be made of no line; a stream stays empty
        if status != 200:
            return "" if status in errors else f"status {status}"
        lines = [json.loads(line) for line in data.splitlines()]
        last = lines[-1] if lines else {}
        if "error" in last:
            explained = may_be_cut if not complete else fault_of(number) == "error"
            return self.check_text(number, lines[:-1], None) if explained else "an error"
        if fault_of(number) == "silent end" and complete:  # as Ollama's repeat guard leaves it
            return self.check_text(number, lines, None)
        if not complete or last.get("done") is not True:
            return "cut, and no error said so"
        if errors:
            return "a whole answer of a question that has none"
        return self.check_text(number, lines, lines_of(number))

    @staticmethod
    def check_text(number: int, lines: list[dict[str, str]], count: int | None) -> str:
        """Check that all parts are there, in order, and of one attempt."""
        parts = "".join(line["response"] for line in lines).split()
        attempts = {part.split(".")[1] for part in parts}
        wanted = [f"{number}.{a}.{index}" for a in attempts for index in range(len(parts))]
        if len(attempts) > 1 or parts != wanted or (count is not None and len(parts) != count):
            return "not one attempt's answer"
        return ""


def outcome_of(cache_status: bytes) -> str:
    if cache_status.startswith(b"hit"):
        return "hit"
    if b"collapsed" in cache_status:
        return "collapsed"
    return "miss" if cache_status.startswith(b"fwd=") else "refused"


async def miscounted(soak: Soak, upstream: Upstream) -> list[str]:
    """Return the differences between the counts of OllProx and those of clients and stand-in."""
    asked = f"GET /metrics HTTP/1.1\r\nHost: a\r\nAPIKEY: {KEY}\r\nConnection: close\r\n\r\n"
    text, got, left = "", 0, list[float]()
    for _ in range(100):  # until the last ones that left have been seen to
        reader, writer = await asyncio.open_connection("127.0.0.1", soak.port)
        writer.write(asked.encode())
        text = (await reader.read()).decode()
        got = upstream.requests  # OllProx may be asking for the list of models meanwhile
        writer.close()
        await writer.wait_closed()
        left = [
            number(text, f"ollprox_{n}") for n in ("answers_under_way", "readers", "connections")
        ]
        if left == [0, 0, 1] and got == upstream.requests:
            break
        await asyncio.sleep(0.1)
    wrong = []
    counts = {o: number(text, f'ollprox_requests_total{{.*cache="{o}"}}') for o in OUTCOMES}
    print("requests:", *(f"{count:.0f} {outcome}," for outcome, count in counts.items()))
    if not number(text, "ollprox_requests_total{.*}") == sum(counts.values()) == soak.requests:
        wrong.append(f"{soak.requests} requests were counted as {counts}")
    unknown = soak.requests - soak.known.total()
    for outcome, count in counts.items():
        if not soak.known[outcome] <= count <= soak.known[outcome] + unknown:
            known = f"at least {soak.known[outcome]}, of {unknown} that left it is not known"
            wrong.append(f"{count} {outcome} were counted; there were {known}")
    sent = number(text, "ollprox_upstream_requests_total")
    print(f"requests to upstream: {sent:.0f}")
    if sent != got:
        wrong.append(f"{sent} requests to upstream were counted, which got {got}")
    if left != [0, 0, 1]:
        wrong.append(f"answers under way, readers and connections are {left}, not 0, 0 and 1")
    return wrong


def number(text: str, pattern: str) -> float:
    """The sum of the samples whose name and labels match."""
    return sum(map(float, re.findall(rf"^{pattern} (\S+)$", text, re.MULTILINE)))


OUTCOMES = ("hit", "miss", "collapsed", "bypass", "refused")


def files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


async def soak(seconds: float, seed: int, clients: int) -> list[str]:
    """Run it; return what was wrong."""
    upstream, listen = free_port(), free_port()
    standin = Upstream()
    server = await asyncio.start_server(standin.serve, "127.0.0.1", upstream, backlog=1024)
    with tempfile.TemporaryDirectory() as folder:
        keys, log = Path(folder, "keys"), Path(folder, "log")
        keys.write_text(KEY)
        environ = {
            **os.environ,
            "OLLAMA_HOST": "127.0.0.1",
            "OLLAMA_PORT": str(upstream),
            "LISTEN_HOST": "127.0.0.1",
            "LISTEN_PORT": str(listen),
            "API_KEY_FILE": str(keys),
            "API_KEY_SALT": "",
            "CACHE_TTL": "2",
            "CACHE_MAX_BYTES": "100K",
            "IDLE_TIMEOUT": "1",
            "LOG_LEVEL": "DEBUG",
        }
        with log.open("wb") as output:
            command = [sys.executable, str(ROOT / "ollprox.py")]
            process = subprocess.Popen(command, env=environ, stdout=output, stderr=output)
        try:
            await asyncio.to_thread(wait_for, listen)
            soak = Soak(listen, random.Random(seed))
            begun = time.monotonic()
            # Tables and allocator fill first; what is compared is after that.
            await asyncio.gather(*(soak.client(begun + seconds / 4) for _ in range(clients)))
            memory = resident(process.pid)
            await asyncio.gather(*(soak.client(begun + seconds) for _ in range(clients)))
            wrong = [*soak.wrong, *await settled(process.pid, memory)]
            wrong += await miscounted(soak, standin)
        finally:
            process.terminate()
            await asyncio.to_thread(process.wait)
        text = log.read_text()
    server.close()
    for outcome, count in sorted(soak.outcomes.items()):
        print(f"{count:8d}  {outcome}")
    if process.returncode != 0 or re.search("Traceback|never retrieved|was destroyed", text):
        wrong.append(f"it ended with {process.returncode} and said: {text[-2000:]}")
    if "0 tasks are left" not in text:
        wrong.append(f"tasks are left: {re.findall('.*tasks are left', text)}")
    return wrong


async def settled(pid: int, memory: int) -> list[str]:
    """Wait until the files are closed again; compare the memory."""
    for _ in range(100):
        if files(pid) <= IDLE_FILES:
            break
        await asyncio.sleep(0.1)
    wrong = [] if files(pid) <= IDLE_FILES else [f"{files(pid)} files are open"]
    grown = resident(pid) - memory
    print(f"memory has grown by {grown / (1 << 20):.1f} MiB, {files(pid)} files are open")
    return [*wrong, *([f"memory has grown by {grown} bytes"] if grown > MEMORY else [])]


IDLE_FILES = 8 + 64  # of an idle process, and the connections to upstream that it may keep


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--clients", type=int, default=40)
    chosen = parser.parse_args()
    print(f"seed {chosen.seed}", flush=True)
    wrong = asyncio.run(soak(chosen.seconds, chosen.seed, chosen.clients))
    for problem in wrong:
        print(f"WRONG: {problem}")
    print("the soak has found something" if wrong else "the soak has found nothing")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
