"""A guard against getting slower that does not depend on the machine: what is called, how often.

OllProx runs in this process, between transports that only take note, so that nothing depends on
how bytes are cut on their way. The numbers below are bounds with room for about a tenth more. A
change that goes beyond one says what it costs; one that makes the work much less lowers it.
"""

import asyncio
import os
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from types import FrameType
from typing import Any

import pytest
from client import KEY
from conftest import SOURCES
from parts import make_proxy, make_upstream

from access.credentials import take_credential
from record import Record
from watch.metrics import Metrics
from watch.telemetry import AccessLog, LineWriter
from wire.http11 import KnownHeads, parse_request_head, parse_response_head
from wire.server import Limits, Server, _Client
from wire.upstream import _Connection, _Stream

# At most so many calls of functions in OllProx's own files, tasks, and timers, for one of each.
# In brackets the calls that were counted when the bound was set.
MOST = {
    "hit": (55, 0, 0),  # (50)
    "miss": (232, 1, 0),  # (211)
    "line": (48, 0, 0),  # (44)
}
OURS = {str(path) for path in SOURCES}
HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n"
    b"Date: Mon, 23 Nov 2026 09:10:20 GMT\r\nTransfer-Encoding: chunked\r\n\r\n"
)
LINE = b'{"model":"llama2","created_at":"2026","response":" sky","done":false}\n'
LAST = b'{"model":"llama2","created_at":"2026","response":"","done":true,"eval_count":2}\n'


def chunk(line: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(line), line)


def request(prompt: str, *, stream: bool = False) -> bytes:
    body = b'{"model":"llama2","prompt":"%b","stream":%b}' % (
        prompt.encode(),
        b"true" if stream else b"false",
    )
    return (
        b"POST /call_model HTTP/1.1\r\nHost: here\r\nAPIKEY: %b\r\nContent-Length: %d\r\n\r\n%b"
    ) % (KEY.encode(), len(body), body)


class Wire(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1)})
        self.written = b""
        self.closed = False

    def write(self, data: Any) -> None:
        self.written += data

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.closed

    def abort(self) -> None:
        pass

    close = pause_reading = resume_reading = abort


class Bench:
    """OllProx between a client and an upstream that are both in this process."""

    def __init__(self) -> None:
        self.upstream = make_upstream()
        made = make_proxy(self.upstream)
        metrics = Metrics("0", made.cache, made.flights, made.keys)
        made.flights.ended = metrics.count_flight
        metrics.set_models(["llama2:latest"])
        self.writer = LineWriter(os.open(os.devnull, os.O_WRONLY))
        access_log = AccessLog(self.writer, "INFO")

        def done(record: Record) -> None:
            metrics.count(record)
            access_log(record)

        proxy = made.proxy
        take = partial(take_credential, made.keys.salt, False)
        parse = partial(parse_request_head, take_credential=take)
        self.server = Server(proxy.handle, proxy.render_error, parse, done, Limits())
        self.server.parse_head = KnownHeads(parse, check=False)
        self.upstream._parse = KnownHeads(parse_response_head, secret=False, check=False)
        self.client = _Client(self.server)
        self.wire = Wire()
        self.client.connection_made(self.wire)
        self.asked = Wire()
        self.reader = _Stream()
        self.reader.set_transport(self.asked)

    def keep_a_connection(self) -> None:
        loop = asyncio.get_running_loop()
        protocol = asyncio.StreamReaderProtocol(self.reader)
        writer = asyncio.StreamWriter(self.asked, protocol, self.reader, loop)
        connection = _Connection(self.reader, writer)
        connection.idle_since = loop.time()
        self.upstream.keep(connection)

    async def ask(self, question: bytes) -> None:
        self.client.data_received(question)
        await settle()

    async def say(self, data: bytes) -> None:
        self.reader.feed_data(data)
        await settle()

    async def stop(self) -> None:
        self.client.task.cancel()
        await asyncio.wait([self.client.task])
        self.wire.closed = self.asked.closed = True
        self.writer.close()


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


class Count:
    """What is called within a `with` block."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.tasks = self.timers = 0

    def __enter__(self) -> "Count":
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event != "call":
            return
        if code.co_filename in OURS and not code.co_name.startswith("<"):  # which 3.12 has less of
            self.calls[code.co_name] += 1
        self.tasks += code.co_name == "create_task" and "base_events" in code.co_filename
        self.timers += code.co_name == "call_at"

    @property
    def numbers(self) -> tuple[int, int, int]:
        return self.calls.total(), self.tasks, self.timers


@pytest.fixture(autouse=True)
def no_profile_is_left() -> Iterator[None]:
    yield
    sys.setprofile(None)


def check(what: str, count: Count) -> None:
    pairs = zip(count.numbers, MOST[what], strict=True)
    assert all(found <= most for found, most in pairs), (
        f"calls, tasks and timers of a {what} were {count.numbers}, at most {MOST[what]}:"
        f" {count.calls}"
    )


async def test_what_a_hit_costs() -> None:
    bench = Bench()
    bench.keep_a_connection()
    await bench.ask(request("same"))
    await bench.say(HEAD + chunk(LINE) * 3 + chunk(LAST) + b"0\r\n\r\n")
    await bench.ask(request("same"))
    assert b"OllProx; hit" in bench.wire.written
    with Count() as count:
        await bench.ask(request("same"))
    assert bench.wire.written.count(b"OllProx; hit") == 2
    await bench.stop()
    check("hit", count)


async def test_what_a_miss_costs() -> None:
    bench = Bench()
    bench.keep_a_connection()
    for number in range(2):  # the second finds all that can be known
        with Count() as count:
            await bench.ask(request(f"question {number}"))
            await bench.say(HEAD + chunk(LINE) * 3 + chunk(LAST) + b"0\r\n\r\n")
        assert bench.wire.written.count(b"OllProx; fwd=miss; stored") == number + 1
    await bench.stop()
    check("miss", count)


async def test_what_a_line_costs() -> None:
    bench = Bench()
    bench.keep_a_connection()
    await bench.ask(request("question", stream=True))
    await bench.say(HEAD + chunk(LINE))
    assert bench.wire.written.endswith(chunk(LINE))
    with Count() as count:
        await bench.say(chunk(LINE))
    assert bench.wire.written.endswith(2 * chunk(LINE))
    await bench.say(chunk(LAST) + b"0\r\n\r\n")
    assert bench.wire.written.endswith(b"0\r\n\r\n")
    await bench.stop()
    check("line", count)
