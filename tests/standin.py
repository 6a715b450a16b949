"""A stand-in for Ollama, which answers like the recorded exchanges in `traces/`.

Usable on its own, as `make demo` does: `python tests/standin.py --port 11434`. With
`--traces tests/traces` it replays recorded bytes for requests that it knows. In a test its
`Script` says when lines are held, where a stream breaks, or which raw bytes are sent.
It shares no code with OllProx, so that neither can hide a bug of the other.
"""

import argparse
import asyncio
import contextlib
import json
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DIGEST = "751f8a18b021dc6763503bffd3f2d2b27576618005c29a17509a4a325fa7a3c6"
DATE = "Mon, 23 Nov 2026 09:10:20 GMT"
JSON = "application/json; charset=utf-8"
Object = dict[str, Any]


@dataclass
class Seen:
    """One request that the stand-in received."""

    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes
    raw: bytes
    gone: bool = False  # the client hung up before the answer's end

    def json(self) -> Any:
        return json.loads(self.body)

    def header(self, name: str) -> str | None:
        return {k.lower(): v for k, v in self.headers}.get(name.lower())


class Cut(Exception):
    """The connection ends here, because of the script or because the client has left."""


@dataclass
class Script:
    """How the stand-in behaves; a test may change it at any time."""

    created_at: str = ""  # the same for all lines; empty: the time
    pace: float = 0.0  # seconds between lines
    tokens: list[str] = field(default_factory=lambda: ["Paris", " is", " the", " capital", "."])
    thinking: list[str] = field(default_factory=list)
    tool_calls: list[Object] = field(default_factory=list)
    hold_before: int | None = None  # the index of the line that waits for `let_go`
    hold_end: bool = False  # wait for `let_go` before the body's end
    hold_head: bool = False  # wait for `let_go` before the head
    break_after: int | None = None  # lines after which the connection is cut
    error_after: int | None = None  # lines after which the runner dies
    raw: bytes | None = None  # sent in place of any answer, then the connection is closed
    models: dict[str, str] = field(
        default_factory=lambda: {"gemma3:270m": DIGEST, "llama2:latest": "a" * 64}
    )
    listed: dict[str, str] | None = None  # what is listed, if not `models`
    let_go: asyncio.Event = field(default_factory=asyncio.Event)
    respond: Callable[[Seen, asyncio.StreamWriter], Awaitable[None]] | None = None
    swallow: Callable[[asyncio.StreamReader, int | None], Awaitable[None]] | None = None
    gate: Callable[[], Awaitable[object]] | None = None  # awaited before each line


class StandIn:
    """A server that speaks Ollama's API."""

    def __init__(self, script: Script | None = None, traces: Path | None = None) -> None:
        self.script = script or Script()
        self.seen: list[Seen] = []
        self.connections = 0
        self.generating = 0  # answers that are being made
        self.port = 0
        self.changed = asyncio.Condition()
        self._traces = load_traces(traces) if traces else {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server

    async def start(
        self, host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None
    ) -> int:
        self._server = await asyncio.start_server(self._serve, host, port, limit=1 << 26, ssl=tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self.port

    async def stop(self) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition of the stand-in becomes true."""
        async with self.changed:
            await self.changed.wait_for(condition)

    def asked(self, *paths: str) -> list[Seen]:
        """Return the requests from clients, without those of OllProx itself."""
        quiet = {"/api/version", "/api/tags", "/api/ps"}
        return [s for s in self.seen if (s.path in paths if paths else s.path not in quiet)]

    async def _notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        self.connections += 1
        try:
            while (seen := await self._read(reader, writer)) is not None:
                self.seen.append(seen)
                await self._notify()
                await self._answer_or_see_leave(seen, reader, writer)
        except (Cut, ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            self.connections -= 1
            writer.close()
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await writer.wait_closed()
            await self._notify()

    async def _read(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> Seen | None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        first, *lines = head[:-4].decode("latin-1").split("\r\n")
        method, path, _ = first.split(" ")
        headers = [(n, v.strip()) for n, _, v in (line.partition(":") for line in lines)]
        named = {name.lower(): value for name, value in headers}
        if named.get("expect") == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = b""
        if self.script.swallow is not None and method == "POST":
            declared = named.get("content-length")
            await self.script.swallow(reader, None if declared is None else int(declared))
        elif named.get("transfer-encoding") == "chunked":
            while size := int((await reader.readline()).strip(), 16):
                body += await reader.readexactly(size)
                await reader.readline()
            await reader.readline()
        else:
            body = await reader.readexactly(int(named.get("content-length", "0")))
        return Seen(method, path, headers, body, head + body)

    async def _answer_or_see_leave(
        self, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Answer, unless the client disconnects first: then stop the generation."""
        self.generating += 1
        try:
            await self._answer_until_it_leaves(seen, reader, writer)
        finally:
            self.generating -= 1
            await self._notify()

    async def _answer_until_it_leaves(
        self, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        answer = asyncio.create_task(self._answer(seen, writer))
        while not answer.done():
            watch = asyncio.create_task(_until_eof(reader, answer))
            await asyncio.wait({answer, watch}, return_when=asyncio.FIRST_COMPLETED)
            left = watch.done() and not watch.cancelled() and watch.result()
            watch.cancel()
            if left and not answer.done():
                seen.gone = True
                answer.cancel()
            await asyncio.wait({answer})
        error = None if answer.cancelled() else answer.exception()
        if isinstance(error, ConnectionError):
            seen.gone = True
        if seen.gone:
            raise Cut
        if error is not None:
            raise error

    async def _answer(self, seen: Seen, writer: asyncio.StreamWriter) -> None:
        script = self.script
        if script.respond is not None:
            await script.respond(seen, writer)
        elif script.raw is not None and seen.path not in {"/api/version", "/api/tags"}:
            writer.write(script.raw)
            await writer.drain()
            raise Cut
        elif (trace := self._traces.get(trace_key(seen.method, seen.path, seen.body))) is not None:
            for pause, part in trace:
                await asyncio.sleep(pause * script.pace)
                writer.write(part)
                await writer.drain()
        else:
            await self._held(seen)
            await self._api(seen, writer)

    async def _held(self, seen: Seen) -> None:
        """Hold the lines where the script says so."""
        if self.script.hold_head and seen.method == "POST" and seen.path not in _MANAGING:
            await self.script.let_go.wait()

    async def _api(  # noqa: C901 - a table, written as a match
        self, seen: Seen, writer: asyncio.StreamWriter
    ) -> None:
        match seen.method, seen.path:
            case (("GET" | "HEAD"), "/"):
                _send(writer, 200, b"Ollama is running", "text/plain; charset=utf-8", seen)
            case (("GET" | "HEAD"), "/api/version"):
                _send_json(writer, 200, {"version": "0.13.5"}, seen)
            case (("GET" | "HEAD"), "/api/tags"):
                _send_json(writer, 200, {"models": self._models()}, seen)
            case (("GET" | "HEAD"), "/api/ps"):
                _send_json(writer, 200, {"models": self._models()}, seen)
            case "POST", "/api/generate" | "/api/chat":
                await self._generate(seen, writer, chat=seen.path == "/api/chat")
            case "POST", "/api/embed" | "/api/embeddings":
                self._embed(seen, writer)
            case "POST", "/api/show":
                _send_json(
                    writer, 200, {"modelfile": "# none", "details": {}, "model_info": {}}, seen
                )
            case _ if seen.path.startswith("/v1/"):
                await self._v1(seen, writer)
            case _ if seen.path.startswith("/api/blobs/") or seen.path in _MANAGING:
                await self._manage(seen, writer)
            case _:
                _send(writer, 404, b"404 page not found", "text/plain", seen)

    async def _manage(self, seen: Seen, writer: asyncio.StreamWriter) -> None:
        if seen.path not in {"/api/pull", "/api/push", "/api/create"}:
            writer.write(f"HTTP/1.1 200 OK\r\nDate: {DATE}\r\nContent-Length: 0\r\n\r\n".encode())
            return
        writer.write(_head(200, "application/x-ndjson", ("Transfer-Encoding", "chunked")))
        steps = ("pulling manifest", "verifying sha256 digest", "success")
        await self._chunks([_dump({"status": step}) + b"\n" for step in steps], writer)

    async def _v1(self, seen: Seen, writer: asyncio.StreamWriter) -> None:
        listed = [
            {"id": name, "object": "model", "created": 1795424298, "owned_by": "library"}
            for name in self.script.models
        ]
        if seen.path == "/v1/models":
            _send_json(writer, 200, {"object": "list", "data": listed}, seen)
        elif (name := seen.path.removeprefix("/v1/models/")) != seen.path:
            _send_json(writer, 200, {**listed[0], "id": name}, seen)
        else:
            asked = seen.json()
            if not self._knows(asked.get("model")):
                message = f"model '{asked.get('model', '')}' not found"
                error = {"message": message, "type": "api_error", "param": None, "code": None}
                _send_json(writer, 404, {"error": error}, seen)
            elif asked.get("stream"):
                writer.write(_head(200, "text/event-stream", ("Transfer-Encoding", "chunked")))
                await self._chunks(self._events(asked, seen.path), writer)
            else:
                _send_json(writer, 200, self._v1_object(asked, seen.path), seen)

    def _events(self, asked: Object, path: str) -> list[bytes]:
        """Return a stream like those in the traces."""
        if path == "/v1/messages":
            return [_event(value) for value in self._message_events(asked)]
        if path == "/v1/responses":
            return [_event(value) for value in self._response_events(asked)]
        chat = path == "/v1/chat/completions"
        common = {
            "id": "chatcmpl-796" if chat else "cmpl-893",
            "object": "chat.completion.chunk" if chat else "text_completion",
            "created": 1795425061,
            "model": asked["model"],
            "system_fingerprint": "fp_ollama",
        }

        def event(text: str, reason: str | None) -> Object:
            said = {"delta": {"role": "assistant", "content": text}} if chat else {"text": text}
            return {**common, "choices": [{"index": 0, **said, "finish_reason": reason}]}

        events = [event(token, None) for token in self.script.tokens] + [event("", "stop")]
        if (asked.get("stream_options") or {}).get("include_usage"):
            events.append({**common, "choices": [], "usage": USAGE})
        return [b"data: %b\n\n" % _dump(e) for e in events] + [b"data: [DONE]\n\n"]

    def _v1_object(self, asked: Object, path: str) -> Object:
        text = "".join(self.script.tokens)
        common = {"created": 1795425064, "model": asked["model"], "usage": USAGE}
        match path:
            case "/v1/chat/completions":
                said: Object = {"message": {"role": "assistant", "content": text}}
                kind, name = "chat.completion", "chatcmpl-914"
            case "/v1/completions":
                said, kind, name = {"text": text}, "text_completion", "cmpl-418"
            case "/v1/embeddings":
                data = [{"object": "embedding", "embedding": [0.25, -0.5], "index": 0}]
                usage = {"prompt_tokens": 1, "total_tokens": 1}
                return {"object": "list", "data": data, "model": asked["model"], "usage": usage}
            case "/v1/responses":
                return self._response(asked, self._output(text))
            case _:
                return {**self._message(asked), "content": self._blocks(), **self._stop()}
        choice = {"index": 0, **said, "finish_reason": "stop"}
        return {"id": name, "object": kind, "choices": [choice], **common}

    # Anthropic's messages: what is said comes in blocks of thinking, text and tool use.

    def _message(self, asked: Object) -> Object:
        return {"id": "msg_1", "type": "message", "role": "assistant", "model": asked["model"]}

    def _stop(self) -> Object:
        reason = "tool_use" if self.script.tool_calls else "end_turn"
        return {"stop_reason": reason, "usage": {"input_tokens": 12, "output_tokens": 5}}

    def _blocks(self) -> list[Object]:
        script = self.script
        blocks = [{"type": "text", "text": "".join(script.tokens)}]
        if script.thinking:
            blocks.insert(0, {"type": "thinking", "thinking": "".join(script.thinking)})
        for index, call in enumerate(script.tool_calls):
            said = {"name": call["function"]["name"], "input": call["function"]["arguments"]}
            blocks.append({"type": "tool_use", "id": f"call_{index}", **said})
        return blocks

    def _message_events(self, asked: Object) -> list[Object]:
        usage = {"input_tokens": 12, "output_tokens": 0}
        start = {**self._message(asked), "content": [], "usage": usage}
        events: list[Object] = [{"type": "message_start", "message": start}]
        for index, block in enumerate(self._blocks()):
            kind, at = block["type"], {"index": index}
            if kind == "tool_use":
                parts = [{"type": "input_json_delta", "partial_json": json.dumps(block["input"])}]
                empty = {**block, "input": {}}
            else:
                said = self.script.tokens if kind == "text" else self.script.thinking
                parts = [{"type": f"{kind}_delta", kind: token} for token in said]
                empty = {"type": kind, kind: ""}
            events.append({"type": "content_block_start", **at, "content_block": empty})
            events += [{"type": "content_block_delta", **at, "delta": part} for part in parts]
            events.append({"type": "content_block_stop", **at})
        stop = self._stop()
        usage = stop.pop("usage")
        last = {"type": "message_delta", "delta": stop, "usage": usage}
        return [*events, last, {"type": "message_stop"}]

    # OpenAI's responses.

    def _output(self, text: str) -> Object:
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        item = {"id": "msg_1", "type": "message", "status": "completed", "role": "assistant"}
        return {**item, "content": [part]}

    def _response(self, asked: Object, *output: Object) -> Object:
        usage = {"input_tokens": 12, "output_tokens": 5, "total_tokens": 17} if output else None
        return {
            "id": "resp_1",
            "object": "response",
            "created_at": 1795895752,
            "status": "completed" if output else "in_progress",
            "model": asked["model"],
            "output": list(output),
            "tools": [],
            "store": False,
            "usage": usage,
        }

    def _response_events(self, asked: Object) -> list[Object]:
        text = "".join(self.script.tokens)
        at = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
        kind, item = "response.output_text", self._output(text)
        deltas = [{"type": f"{kind}.delta", "delta": token, **at} for token in self.script.tokens]
        events: list[Object] = [
            {"type": "response.created", "response": self._response(asked)},
            {
                "type": "response.output_item.added",
                "output_index": 0,
                "item": {**item, "content": []},
            },
            *deltas,
            {"type": f"{kind}.done", "text": text, **at},
            {"type": "response.output_item.done", "output_index": 0, "item": item},
            {"type": "response.completed", "response": self._response(asked, item)},
        ]
        return [{**event, "sequence_number": n} for n, event in enumerate(events)]

    async def _chunks(self, pieces: list[bytes], writer: asyncio.StreamWriter) -> None:
        """Send a stream's pieces, one per chunk, as the script says."""
        script = self.script
        for index, piece in enumerate(pieces):
            if index == script.hold_before:
                await writer.drain()
                await script.let_go.wait()
            if index == script.break_after:
                await writer.drain()
                writer.transport.abort()
                raise Cut
            if script.gate is not None:
                await script.gate()
            await asyncio.sleep(script.pace)
            writer.write(_chunk(piece))
            await writer.drain()
        if script.hold_end:
            await script.let_go.wait()
        writer.write(b"0\r\n\r\n")

    def _models(self) -> list[Object]:
        return [
            {
                "name": name,
                "model": name,
                "modified_at": "2026-11-23T08:58:18.824368656Z",
                "size": 253113832,
                "digest": digest,
                "details": {"parent_model": "", "format": "gguf", "family": "gemma3"},
            }
            for name, digest in (
                self.script.models if self.script.listed is None else self.script.listed
            ).items()
        ]

    def _knows(self, model: object) -> bool:
        name = str(model)
        return name in self.script.models or f"{name}:latest" in self.script.models

    async def _generate(self, seen: Seen, writer: asyncio.StreamWriter, *, chat: bool) -> None:
        try:
            asked = json.loads(seen.body)
        except ValueError:
            message = "unexpected EOF" if seen.body else "missing request body"
            _send_json(writer, 400, {"error": message}, seen)
            return
        if not self._knows(asked.get("model")):
            _send_json(writer, 404, {"error": f"model '{asked.get('model', '')}' not found"}, seen)
            return
        if not asked.get("messages" if chat else "prompt"):
            reason = "unload" if asked.get("keep_alive") == 0 else "load"
            line = self._line(asked, chat, "", {"done": True, "done_reason": reason})
            _send_json(writer, 200, line, seen)
            return
        if asked.get("stream") is False:
            await self._whole(asked, chat, seen, writer)
        else:
            await self._stream(asked, chat, writer)

    def lines(self, asked: Object, chat: bool) -> list[Object]:
        """Return the lines of an answer, in the order and form of the traces."""
        logprobs = [
            {"token": t, "logprob": -1.25, "bytes": list(t.encode())} for t in self.script.tokens
        ]
        lines = [self._line(asked, chat, "", {"done": False}, t) for t in self.script.thinking]
        for index, token in enumerate(self.script.tokens):
            line = self._line(asked, chat, token, {"done": False})
            if asked.get("logprobs"):
                line["logprobs"] = [logprobs[index]]
            lines.append(line)
        for call in self.script.tool_calls:
            line = self._line(asked, chat, "", {"done": False})
            line["message"]["tool_calls"] = [call]
            lines.append(line)
        return [*lines, self._line(asked, chat, "", self._ending(asked, chat))]

    def _ending(self, asked: Object, chat: bool) -> Object:
        count = len(self.script.tokens)
        context = {} if chat or asked.get("raw") else {"context": [105, 2364, 107, count]}
        return {
            "done": True,
            "done_reason": "stop",
            **context,
            "total_duration": 6569678440,
            "load_duration": 193028926,
            "prompt_eval_count": 15,
            "prompt_eval_duration": 1997003809,
            "eval_count": count,
            "eval_duration": 4337626101,
        }

    def _line(
        self, asked: Object, chat: bool, text: str, rest: Object, thinking: str = ""
    ) -> Object:
        line: Object = {"model": asked["model"], "created_at": self.script.created_at or _now()}
        thought = {"thinking": thinking} if thinking else {}
        if chat:
            line["message"] = {"role": "assistant", "content": text, **thought}
        else:
            line |= {"response": text, **thought}
        return line | rest

    async def _stream(self, asked: Object, chat: bool, writer: asyncio.StreamWriter) -> None:
        script = self.script
        writer.write(_head(200, "application/x-ndjson", ("Transfer-Encoding", "chunked")))
        lines = self.lines(asked, chat)
        if script.error_after is not None:
            lines[script.error_after :] = [{"error": RUNNER_DIED}]
        await self._chunks([_dump(line) + b"\n" for line in lines], writer)

    async def _whole(
        self, asked: Object, chat: bool, seen: Seen, writer: asyncio.StreamWriter
    ) -> None:
        script = self.script
        await asyncio.sleep(script.pace * (len(script.tokens) + 1))
        if script.error_after is not None:
            _send_json(writer, 500, {"error": RUNNER_DIED}, seen)
        else:
            _send_json(writer, 200, self.whole(asked, chat), seen)

    def whole(self, asked: Object, chat: bool) -> Object:
        """Return the single object, made from the tokens and not from the lines."""
        script = self.script
        text, thinking = "".join(script.tokens), "".join(script.thinking)
        whole = self._line(asked, chat, text, self._ending(asked, chat), thinking)
        if script.tool_calls:
            whole["message"]["tool_calls"] = script.tool_calls
        if asked.get("logprobs") and script.tokens:
            whole["logprobs"] = [
                {"token": t, "logprob": -1.25, "bytes": list(t.encode())} for t in script.tokens
            ]
        return whole

    def _embed(self, seen: Seen, writer: asyncio.StreamWriter) -> None:
        # No trace shows embeddings that worked; the form is that of Ollama's docs/api.md.
        asked = seen.json()
        if not self._knows(asked.get("model")):
            _send_json(writer, 404, {"error": f"model '{asked.get('model', '')}' not found"}, seen)
        elif seen.path == "/api/embed":
            given = asked.get("input", [])
            count = 1 if isinstance(given, str) else len(given)
            vectors = [[0.010071029, -0.0017594862, 0.05007221]] * count
            answer = {"model": asked["model"], "embeddings": vectors, "total_duration": 14143917}
            _send_json(writer, 200, {**answer, "prompt_eval_count": 8}, seen)
        else:
            _send_json(writer, 200, {"embedding": [0.5670403838157654, 0.009260174]}, seen)


USAGE = {"prompt_tokens": 12, "completion_tokens": 5, "total_tokens": 17}
_MANAGING = {"/api/pull", "/api/push", "/api/create", "/api/copy", "/api/delete"}
RUNNER_DIED = "an error was encountered while running the model: unexpected EOF"


async def _until_eof(reader: asyncio.StreamReader, answer: asyncio.Task[None]) -> bool:
    """Wait until the client disconnects; pipelined bytes stay in the buffer."""
    while not reader.at_eof():
        if reader.exception() is not None:
            return True
        await asyncio.sleep(0.005)
    return True


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()) + f".{time.time_ns() % 10**9:09d}Z"


def _dump(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def _event(value: Object) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (value["type"].encode(), _dump(value))


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


_REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 500: "Internal Server Error"}


def _head(status: int, kind: str, *more: tuple[str, str]) -> bytes:
    fields = [("Content-Type", kind), ("Date", DATE), *more]
    lines = [f"HTTP/1.1 {status} {_REASONS.get(status, 'Other')}"]
    return "\r\n".join([*lines, *(f"{n}: {v}" for n, v in fields), "", ""]).encode()


def _send(writer: asyncio.StreamWriter, status: int, body: bytes, kind: str, seen: Seen) -> None:
    head = _head(status, kind, ("Content-Length", str(len(body))))
    writer.write(head + (b"" if seen.method == "HEAD" else body))


def _send_json(writer: asyncio.StreamWriter, status: int, value: object, seen: Seen) -> None:
    _send(writer, status, _dump(value), JSON, seen)


Trace = list[tuple[float, bytes]]


def trace_key(method: str, path: str, body: bytes) -> tuple[str, str, str]:
    """Return what equal requests have in common, whatever their headers and body order."""
    try:
        canonical = json.dumps(json.loads(body), sort_keys=True)
    except ValueError:
        canonical = body.decode("latin-1")
    return method, path, canonical


def load_traces(folder: Path) -> dict[tuple[str, str, str], Trace]:
    """Read the recorded exchanges; only complete ones can be replayed."""
    traces: dict[tuple[str, str, str], Trace] = {}
    for file in sorted(folder.glob("*.request")):
        head, _, body = file.read_bytes().partition(b"\r\n\r\n")
        timing = json.loads(file.with_suffix(".timing.json").read_text())
        if timing["end"] != "complete" or body.endswith(b"..."):
            continue
        method, path, _ = head.split(b"\r\n")[0].decode().split(" ")
        response = file.with_suffix(".response").read_bytes()
        parts, start, before = [], 0, 0.0
        for at, size in timing["reads"]:
            parts.append((at - before, response[start : start + size]))
            start, before = start + size, at
        traces.setdefault(trace_key(method, path, body), parts)
    return traces


async def _main() -> None:
    parser = argparse.ArgumentParser(description="A stand-in for Ollama.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=11434)
    parser.add_argument("--pace", type=float, default=0.05, help="seconds between two lines")
    parser.add_argument("--traces", type=Path, help="replay the recorded exchanges of a folder")
    chosen = parser.parse_args()
    script = Script(pace=chosen.pace)
    standin = StandIn(script, chosen.traces)
    port = await standin.start(chosen.host, chosen.port)
    print(f"a stand-in for Ollama listens on {chosen.host}:{port}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_main())
