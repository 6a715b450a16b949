"""A stand-in for Ollama that is fast enough not to be the limit.

usage: fast_ollama.py PORT [LINES [PAUSE [dated] [alone]]]

Each POST gets a stream of LINES lines in chunks, one chunk a line, all at once; with PAUSE the
first line comes at once and the next ones after so many seconds each, and `created_at` is the
nanosecond of the monotonic clock in which the line is sent. A prompt that begins with a number
asks for so many lines. With `dated` each head has another Date, as if the answers came seconds
apart, as a model's do. With `alone` each line of a long answer is written by itself, as Ollama
does; else 500 at a time.
"""

import asyncio
import itertools
import re
import sys
import time
from email.utils import formatdate

LINE = (
    b'{"model":"llama2","created_at":"2026-11-23T09:10:20.396168845Z","response":" sky",'
    b'"done":false}\n'
)
STAMPED = LINE.replace(b"2026-11-23T09:10:20.396168845Z", b"%030d")
LAST = (
    b'{"model":"llama2","created_at":"2026-11-23T09:10:24.756379323Z","response":".","done":true,'
    b'"done_reason":"stop","context":[105,2364,107],"total_duration":6569678440,'
    b'"load_duration":193028926,"prompt_eval_count":15,"prompt_eval_duration":1997003809,'
    b'"eval_count":12,"eval_duration":4337626101}\n'
)
HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n"
    b"Date: %b\r\nTransfer-Encoding: chunked\r\n\r\n"
)
DATE = 1795425020  # seconds: the Monday of the lines above
# Of a version and of a list of models at once: an answer to each GET.
ABOUT = b'{"version":"0.13.5","models":[{"name":"llama2:latest","digest":"751f8a18b021"}]}'
_OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
VERSION = _OK % (len(ABOUT), ABOUT)


def chunk(line: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(line), line)


END = chunk(LAST) + b"0\r\n\r\n"


class Upstream(asyncio.Protocol):
    lines = 3
    pause = 0.0
    block = chunk(LINE) * 500  # of a long answer, written at once: 58 KB
    many = 500  # lines in it
    dated = False
    dates = itertools.count(DATE)
    whole: dict[int, bytes] = {}  # noqa: RUF012 - shared by all connections, as are the dates

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.loop = asyncio.get_running_loop()
        self.buffer = bytearray()
        self.size = 0  # of the request under way, once its head is there
        self.left = 0  # lines of a long answer that are still to be written
        transport.set_write_buffer_limits(0)  # more is written when all is gone

    def resume_writing(self) -> None:
        self.write_blocks()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while self.size or self.take_head():
            if len(self.buffer) < self.size:
                return
            request = bytes(self.buffer[: self.size])
            del self.buffer[: self.size]
            self.size = 0
            if request.startswith(b"GET"):
                self.transport.write(VERSION)
                continue
            wanted = re.search(rb'"prompt":\s*"(\d+) ', request)
            self.answer(int(wanted[1]) if wanted else self.lines)

    def take_head(self) -> bool:
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        length = re.search(rb"(?i)\r\ncontent-length: (\d+)", self.buffer[:end])
        self.size = end + 4 + (int(length[1]) if length else 0)
        return True

    def answer(self, lines: int) -> None:
        if self.pause:
            self.transport.write(self.head())
            self.write_line(lines, self.loop.time())
        elif lines > 500:
            self.transport.write(self.head())
            self.left = lines
            self.write_blocks()
        else:
            if lines not in self.whole or self.dated:
                self.whole[lines] = self.head() + chunk(LINE) * lines + END
            self.transport.write(self.whole[lines])

    def head(self) -> bytes:
        date = next(self.dates) if self.dated else DATE
        return HEAD % formatdate(date, usegmt=True).encode()

    def write_line(self, left: int, due: float) -> None:
        """Write one line when it is due; the next ones do not wait for a slow reader."""
        if self.transport.is_closing():
            return
        if left == 0:
            self.transport.write(END)
            return
        self.transport.write(chunk(STAMPED % time.monotonic_ns()))
        due += self.pause
        self.loop.call_at(due, self.write_line, left - 1, due)

    def write_blocks(self) -> None:
        """Write until the connection is full, or all is written."""
        while self.left and not self.transport.get_write_buffer_size():
            many = min(self.many, self.left)
            self.left -= many
            self.transport.write(self.block if many == self.many else chunk(LINE) * many)
            if not self.left:
                self.transport.write(END)


async def main() -> None:
    port, *rest = sys.argv[1:]
    if rest:
        Upstream.lines = int(rest[0])
    if rest[1:]:
        Upstream.pause = float(rest[1])
    Upstream.dated = "dated" in rest[2:]
    if "alone" in rest[2:]:
        Upstream.block, Upstream.many = chunk(LINE), 1
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Upstream, "127.0.0.1", int(port), backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
