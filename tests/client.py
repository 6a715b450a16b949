"""A small HTTP client over a raw socket, which shows what real clients hide.

It distinguishes a complete body from a truncated one, and returns each chunk as it arrives.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any

from standin import StandIn

Headers = dict[str, str]
KEY = "a-key-for-the-tests"


class Answer:
    """A response's head, and its body so far."""

    def __init__(self, status: int, headers: Headers, head: bytes) -> None:
        self.status = status
        self.headers = headers
        self.head = head
        self.body = b""
        self.complete = False  # the body's end was seen

    def json(self) -> Any:
        return json.loads(self.body)

    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.body.splitlines()]

    @property
    def cache_status(self) -> str:
        return self.headers.get("cache-status", "")


class Client:
    """One connection to OllProx."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter

    async def __aenter__(self) -> "Client":
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def begin(
        self, method: str, path: str, body: object = None, headers: Headers | None = None
    ) -> Answer:
        """Send a request and read the response's head."""
        await self.send(request(method, path, body, headers))
        return await self.head()

    async def ask(
        self, method: str, path: str, body: object = None, headers: Headers | None = None
    ) -> Answer:
        """Send a request and read the complete response."""
        answer = await self.begin(method, path, body, headers)
        return await self.rest(answer, method)

    async def head(self) -> Answer:
        head = await self.reader.readuntil(b"\r\n\r\n")
        first, *lines = head[:-4].decode("latin-1").split("\r\n")
        pairs = (line.split(": ", 1) for line in lines)
        headers = {name.lower(): value for name, value in pairs}
        return Answer(int(first.split(" ")[1]), headers, head)

    async def chunks(self, answer: Answer) -> AsyncIterator[bytes]:
        """Yield each chunk as it arrives, until the body's end or a truncation."""
        while True:
            size = await self.reader.readline()
            if not size:
                return
            data = await self.reader.readexactly(int(size, 16))
            assert await self.reader.readexactly(2) == b"\r\n"
            if not data:
                answer.complete = True
                return
            answer.body += data
            yield data

    async def rest(self, answer: Answer, method: str = "GET") -> Answer:
        """Read a body to its end."""
        if method == "HEAD" or answer.status == 204:
            answer.complete = True
        elif answer.headers.get("transfer-encoding") == "chunked":
            async for _ in self.chunks(answer):
                pass
        elif (length := answer.headers.get("content-length")) is not None:
            answer.body += await self.reader.readexactly(int(length))
            answer.complete = True
        else:
            answer.body += await self.reader.read()
            answer.complete = True
        return answer


def request(method: str, path: str, body: object = None, headers: Headers | None = None) -> bytes:
    """Return a request with the key; a body other than bytes is sent as JSON."""
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = {"Host": "localhost", "APIKEY": KEY} | (headers or {})
    if body is not None and "Transfer-Encoding" not in fields:
        fields.setdefault("Content-Length", str(len(data)))
    lines = [f"{method} {path} HTTP/1.1", *(f"{n}: {v}" for n, v in fields.items() if v)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + data


async def ask(
    port: int, method: str, path: str, body: object = None, headers: Headers | None = None
) -> Answer:
    """Send one request on a new connection; return the response."""
    async with Client(port) as client:
        return await client.ask(method, path, body, headers)


async def raw(port: int, data: bytes) -> bytes:
    """Send bytes; return everything up to the end of the connection."""
    async with Client(port) as client:
        await client.send(data)
        with contextlib.suppress(ConnectionError):
            return await client.reader.read()
        return b""


def question(prompt: str = "Why?", **more: object) -> dict[str, object]:
    """A body for `/api/generate` and `/call_model`."""
    return {"model": "llama2", "prompt": prompt, **more}


@contextlib.asynccontextmanager
async def waiting(port: int, ollama: StandIn, body: dict[str, object]) -> AsyncIterator[Client]:
    """A client with a request that Ollama holds; it disconnects at the end of the block."""
    ollama.script.hold_head = True
    async with Client(port) as client:
        await client.send(request("POST", "/call_model", body))
        await ollama.until(lambda: bool(ollama.asked()))
        yield client


async def held_stream(
    client: Client, ollama: StandIn, path: str, body: dict[str, object]
) -> Answer:
    """Read a stream whose first line must arrive while Ollama holds the rest."""
    ollama.script.hold_before = 1
    answer = await client.begin("POST", path, body)
    chunks = client.chunks(answer)
    first = await anext(chunks)  # it comes while the stand-in is held
    assert json.loads(first)["response"] == "Paris"
    ollama.script.let_go.set()
    assert [chunk async for chunk in chunks]
    assert answer.complete
    return answer
