"""A stand-in for Ollama that is fast enough not to be the limit: it says what it was given.

usage: upstream.py PORT [LINES [PAUSE]]

Each POST gets a stream of LINES lines in chunks, one chunk a line, with PAUSE seconds between
them (all at once for 0). A prompt that begins with a number asks for so many lines.
"""

import asyncio
import re
import sys

LINE = (
    b'{"model":"llama2","created_at":"2026-11-23T09:10:20.396168845Z","response":" sky",'
    b'"done":false}\n'
)
LAST = (
    b'{"model":"llama2","created_at":"2026-11-23T09:10:24.756379323Z","response":"","done":true,'
    b'"done_reason":"stop","context":[105,2364,107],"total_duration":6569678440,'
    b'"load_duration":193028926,"prompt_eval_count":15,"prompt_eval_duration":1997003809,'
    b'"eval_count":12,"eval_duration":4337626101}\n'
)
HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n"
    b"Date: Mon, 23 Nov 2026 09:10:20 GMT\r\nTransfer-Encoding: chunked\r\n\r\n"
)
VERSION = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 20\r\n\r\n"
    b'{"version":"0.13.5"}'
)


def chunk(line: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(line), line)


class Upstream(asyncio.Protocol):
    lines = 3
    pause = 0.0
    whole: dict[int, bytes] = {}  # noqa: RUF012 - shared by all connections

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.buffer = b""
        self.resumed = asyncio.Event()
        self.resumed.set()
        self.task: asyncio.Task[None] | None = None

    def pause_writing(self) -> None:
        self.resumed.clear()

    def resume_writing(self) -> None:
        self.resumed.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.resumed.set()
        if self.task:
            self.task.cancel()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            length = re.search(rb"(?i)\r\ncontent-length: (\d+)", self.buffer[:end])
            size = end + 4 + (int(length[1]) if length else 0)
            if len(self.buffer) < size:
                return
            request, self.buffer = self.buffer[:size], self.buffer[size:]
            if request.startswith(b"GET"):
                self.transport.write(VERSION)
                continue
            wanted = re.search(rb'"prompt":\s*"(\d+) ', request)
            self.answer(int(wanted[1]) if wanted else self.lines)

    def answer(self, lines: int) -> None:
        if self.pause or lines > 1000:
            self.task = asyncio.create_task(self.stream(lines))
            return
        if lines not in self.whole:
            self.whole[lines] = HEAD + chunk(LINE) * lines + chunk(LAST) + b"0\r\n\r\n"
        self.transport.write(self.whole[lines])

    async def stream(self, lines: int) -> None:
        self.transport.write(HEAD)
        many = 1 if self.pause else 200
        for _ in range(0, lines, many):
            if self.pause:
                await asyncio.sleep(self.pause)
            self.transport.write(chunk(LINE) * many)
            await self.resumed.wait()
        self.transport.write(chunk(LAST) + b"0\r\n\r\n")


async def main() -> None:
    port, *rest = sys.argv[1:]
    if rest:
        Upstream.lines = int(rest[0])
    if rest[1:]:
        Upstream.pause = float(rest[1])
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Upstream, "127.0.0.1", int(port), backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
