"""Note whether an answer is complete, and fold its lines, while it is recorded.

Pure: no I/O, no clock. The sources are Ollama's API page (docs/api.md), its
OpenAI compatibility page (docs/openai.md), and recorded exchanges with Ollama 0.13.5 and 0.33.
"""

import json
import re
from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Any

from record import Usage
from wire.http11 import MAX_FRAMED, Headers, HTTPError, Response

JSON = b"application/json; charset=utf-8"  # as Ollama sends it
NDJSON = b"application/x-ndjson"
SSE = b"text/event-stream"

REPORTED = "reported"  # the kind of an HTTPError that Ollama itself reported in a stream
MAX_PARSED = 64 << 10  # bytes of the largest object that is parsed; longer ones are searched
MAX_USAGE = 512  # bytes of a `usage` object
MAX_DEPTH = 8  # levels of an object that are searched for text; Ollama uses six
TAIL = 4096  # bytes at the end of an object that contain its numbers
MAX_MATCH = 64  # bytes that `_CONTENT` and `_NO_VECTOR` match at most

_LOADS = ("load", "unload")  # `done_reason` of an answer without content

_READER = json.JSONDecoder()
_AS_TEXT = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)

# A quote in these patterns cannot match inside a JSON string, where it would follow a backslash.
_USAGE = re.compile(rb'"usage": ?\{')
_NUMBER = re.compile(
    rb'"(prompt_tokens|input_tokens|completion_tokens|output_tokens|prompt_eval_count|eval_count'
    rb'|prompt_eval_duration|eval_duration)": ?(\d{1,18})\b'
)
_CONTENT = re.compile(
    rb'"(?:content|text|reasoning|reasoning_content|thinking|delta|partial_json)": ?"(?=[^"])'
    rb'|"tool_calls": ?\[\{|"type": ?"(?:tool_use|function_call)"'
    rb'|"embeddings?": ?(?:"(?=[^"])|\[(?:\[\d|\[-|\d|-))'
)
_NO_VECTOR = (b"[]", b'"embedding":""')  # an empty embedding, as Go writes it
_REASON = re.compile(rb'"finish_reason": ?"(?!")')
_NO_MODEL = re.compile(rb'"model": ?""')
_UNFINISHED = re.compile(rb'"finish_reason": ?null|"done": ?false|"output_tokens": ?0\b')
_ERROR_EVENT = re.compile(rb'\s*\{\s*(?:"type":\s*"error",\s*)?"error"\s*:')


class Notes(ABC):
    """Notes on one answer; feed them complete lines or events.

    Attributes:
        finished: the last line has arrived, so the answer is complete whatever follows.
        error: the error that Ollama reported in the stream.
        too_large: the fold was dropped, because of its size or because nobody can ask for it.
        held: bytes held for the fold.
        lines: number of lines or events so far.

    """

    delimiter = b""
    """The end of a line or an event; empty if the answer has no lines."""

    foldable = False
    """True if its lines can be folded into a single object."""

    def __init__(self) -> None:
        self.finished = False
        self.error: HTTPError | None = None
        self.too_large = False
        self.held = 0
        self.lines = 0

    @abstractmethod
    def feed(self, piece: bytes) -> None:
        """Note complete lines, or any bytes of an answer without lines."""

    @abstractmethod
    def close(self) -> bool:
        """Return True if the answer is complete. Call it at upstream's orderly end.

        Raises:
            HTTPError: the answer is broken, or ended in an error that Ollama reported.

        """

    @property
    def usage(self) -> Usage:
        """The usage so far, as far as it is known."""
        return Usage(self.lines)

    def keeps(self) -> bool:
        """Return True if a complete answer is worth storing."""
        return False

    def is_line(self, rest: bytes) -> bool:
        """Return True if bytes at the end, without a delimiter, are a complete line."""
        return True

    def drop_fold(self) -> None:
        """Give up the fold and free its memory."""
        self.too_large = True

    def fold(self) -> bytes:
        """Return the answer as a single object. Raises HTTPError if there is no fold."""
        raise HTTPError(502, "Ollama's answer is not a stream of JSON lines")


class Relayed(Notes):
    """Notes on an answer whose content does not matter here, such as an error or a list."""

    def feed(self, piece: bytes) -> None:
        """Note nothing."""

    def close(self) -> bool:
        """Accept any orderly end."""
        return True


class ProgressLines(Notes):
    """Notes on NDJSON that is not a model's answer, such as the progress of a pull."""

    delimiter = b"\n"

    def feed(self, piece: bytes) -> None:
        """Look for an error."""
        if b'"error"' not in piece:
            return
        for line in piece.split(b"\n"):
            value = _object(line)
            if self.error is None and value is not None and "error" in value:
                self.error = _reported(value["error"])

    def close(self) -> bool:
        """Accept any orderly end, unless an error was reported."""
        if self.error is not None:
            raise self.error
        return True


class WholeNotes(Notes):
    """Notes on a single JSON object, which ends with its body.

    An object of more than `MAX_PARSED` bytes is not parsed, since that would block the event
    loop. Its first bytes, its end, and a search for text are enough.
    """

    def __init__(self) -> None:
        super().__init__()
        self._size = 0
        self._start = b""
        self._end = b""  # the last MAX_PARSED bytes so far
        self._said = b""  # the first thing that it says
        self._lacks_vector = False  # if it has embeddings, one of them is empty
        self._worth_keeping = False

    def feed(self, piece: bytes) -> None:
        """Search what has come, and remember its end."""
        if not self._size:
            self._start = piece[:64].lstrip()
        text = self._end[-MAX_MATCH:] + piece
        if not self._said and (match := _CONTENT.search(text)):
            self._said = match[0]
        self._lacks_vector = self._lacks_vector or any(empty in text for empty in _NO_VECTOR)
        self._size += len(piece)
        self._end = (self._end + piece)[-MAX_PARSED:]
        self.held = len(self._end)

    def close(self) -> bool:
        """Return False if the model was stopped before it had finished."""
        if self._size > MAX_PARSED:
            complete = not _UNFINISHED.search(self._end, self._verdict_start())
            whole = self._start.startswith(b"{") and self._end.rstrip().endswith(b"}")
            error = self._start.startswith(b'{"error"')
            hollow = not self._said or (self._lacks_vector and self._said.startswith(b'"embed'))
            self._worth_keeping = complete and whole and not error and not hollow
            return complete
        value = _object(self._end)
        if value is None:
            return True
        complete = _is_finished(value)
        loads = value.get("done_reason") in _LOADS
        self._worth_keeping = (
            complete and not value.get("error") and not loads and _has_content(value)
        )
        return complete

    def _verdict_start(self) -> int:
        """Return where the end begins that says whether it is finished.

        After its usage an object of `/v1/responses` has metadata, as long as the client chose.
        """
        start = max(0, len(self._end) - MAX_USAGE)
        usage = max((match.start() for match in _USAGE.finditer(self._end)), default=start)
        return min(start, usage)

    @property
    def usage(self) -> Usage:
        """The numbers at the object's end."""
        tail = self._end[-TAIL:]
        start = max((match.start() for match in _USAGE.finditer(tail)), default=0)
        return _usage(self.lines, _numbers(tail[start:]))

    def keeps(self) -> bool:
        """Return True if it is an object with content, and not an error."""
        return self._worth_keeping


def _is_finished(value: dict[str, Any]) -> bool:
    """Return False for an object that Ollama's repeat guard ended."""
    if value.get("done") is False:
        return False
    if value.get("object") == "response":  # it always says "completed"
        usage = value.get("usage")
        return isinstance(usage, dict) and bool(usage.get("output_tokens"))
    if value.get("type") == "message":  # Anthropic's
        return bool(value.get("stop_reason"))
    choices = [choice for choice in _list(value.get("choices")) if isinstance(choice, dict)]
    return all(choice.get("finish_reason") for choice in choices)


def _has_content(value: dict[str, Any]) -> bool:
    """Return True if an object has any text, thinking or tool call, or all its embeddings."""
    for name in ("embeddings", "embedding"):
        if name in value:
            return _is_full(value[name])
    data = _list(value.get("data"))
    if data:
        return all(isinstance(item, dict) and bool(item.get("embedding")) for item in data)
    return _has_text(value, MAX_DEPTH)


def _has_text(value: object, depth: int) -> bool:
    """Return True if there is text in the usual places, at most `depth` levels deep."""
    if depth and isinstance(value, list):
        return any(_has_text(member, depth - 1) for member in value)
    if depth and isinstance(value, dict):
        return any(_has_text(value[name], depth - 1) for name in _CONTENT_NAMES if name in value)
    return isinstance(value, str) and value != ""


# The names that lead to an object's content; a tool call has a `name`.
_CONTENT_NAMES = (
    *("response", "message", "choices", "output"),
    *("content", "text", "thinking", "reasoning", "reasoning_content", "image"),
    *("tool_calls", "function", "name"),
)


def _is_full(embedding: object) -> bool:
    """Return True if an embedding has numbers, or each one in a list has."""
    vectors = _list(embedding)
    return bool(vectors) and all(vector != [] for vector in vectors)


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _values(lines: bytes) -> list[Any]:
    """Decode lines together, which takes less time; none if they cannot all be objects."""
    # Two halves of an object can become JSON when joined. The newline stays, for it is invalid
    # in a string; the caller compares the counts.
    if lines.count(b"}\n{") < lines.count(b"\n"):
        return []
    try:
        values: list[Any] = _READER.decode((b"[%b]" % lines.replace(b"\n", b",\n")).decode())
    except (ValueError, RecursionError):
        return []
    return values


def _texts(parts: list[dict[str, Any]], name: str) -> list[str]:
    """Return the texts with this name that are not empty."""
    return [text for part in parts if (text := part.get(name)) and isinstance(text, str)]


def _members(parts: list[dict[str, Any]], name: str) -> list[Any]:
    """Return the members of all lists with this name."""
    return [member for part in parts if name in part for member in _list(part[name])]


class LineNotes(Notes):
    """Notes on a native stream: NDJSON, whose last line has `"done": true`.

    The fold is the last line with all texts joined. Ollama's own handlers make the single object
    of `"stream": false` in the same way.
    """

    delimiter = b"\n"
    foldable = True

    def __init__(self, chat: bool, max_object: int) -> None:
        super().__init__()
        self._chat = chat
        self._text = "content" if chat else "response"  # the name of the generated text
        self._max_object = max_object
        self._last: dict[str, Any] = {}
        self._valid = True
        self._with_content = 0  # lines
        self._object = b""  # the fold, once it was written
        self._clear()

    def _clear(self) -> None:
        self._texts: list[str] = []
        self._thinking: list[str] = []
        self._tool_calls: list[Any] = []
        self._logprobs: list[str] = []
        self.held = 0

    def drop_fold(self) -> None:
        """Give up the fold and free its memory."""
        super().drop_fold()
        self._clear()

    @property
    def usage(self) -> Usage:
        """The last line's numbers; before it arrives, each line with content counts as a token."""
        last = self._last
        if last.get("done") is not True:
            return Usage(self.lines, tokens=self._with_content)
        nanoseconds = _count(last, "prompt_eval_duration") + _count(last, "eval_duration")
        tokens = _count(last, "prompt_eval_count"), _count(last, "eval_count")
        return Usage(self.lines, *tokens, nanoseconds / 1e9)

    def keeps(self) -> bool:
        """Return True if it has content, and is not the loading of a model."""
        has_content = self._with_content > 0 or bool(self._last.get("image"))
        loads = self._last.get("done_reason") in _LOADS
        return self.finished and has_content and not loads

    def is_line(self, rest: bytes) -> bool:
        """Return True for an object or a blank line."""
        return rest.isspace() or _object(rest) is not None

    def feed(self, piece: bytes) -> None:
        """Note complete lines; blank ones do not count."""
        text = piece.removesuffix(b"\n")
        lines, count = _values(text), text.count(b"\n") + 1
        if len(lines) != count:  # some are blank, or not JSON
            texts = [line.strip(b" \t\r") for line in text.split(b"\n") if line.strip()]
            lines, count = _values(b"\n".join(texts)), len(texts)
        if not count:
            return
        self._object = b""
        self.lines += count
        objects = [line for line in lines if isinstance(line, dict)]
        self._valid = self._valid and len(objects) == len(lines) == count
        if objects and self.error is None:  # lines after an error do not count
            self._note(objects)
        self.finished = self._valid and self.error is None and self._last.get("done") is True
        if self.held > self._max_object:
            self.drop_fold()

    def _note(self, lines: list[dict[str, Any]]) -> None:
        """Note lines together, since a burst has many."""
        errors = [index for index, line in enumerate(lines) if "error" in line]
        if errors:
            self._last = lines[errors[0]]
            self.error = _reported(self._last["error"])
            del lines[errors[0] :]
        else:
            self._last = lines[-1]
        messages = lines
        if self._chat:
            parts = [line.get("message") for line in lines]
            messages = [part for part in parts if isinstance(part, dict)]
        texts = _texts(messages, self._text)
        thinking = _texts(messages, "thinking")
        calls = _members(messages, "tool_calls") if self._chat else []
        logprobs = _members(lines, "logprobs")
        self._with_content += len(texts) + len(thinking) + len(calls)
        if self.too_large:
            return
        self._add(self._texts, "".join(texts))
        self._add(self._thinking, "".join(thinking))
        if logprobs:
            self._add(self._logprobs, dump(logprobs)[1:-1].decode())
        if calls:
            self._tool_calls += calls
            self.held += len(dump(calls))

    def _add(self, texts: list[str], text: str) -> None:
        if text:
            texts.append(text)
            self.held += len(text) if text.isascii() else len(dump(text))

    def close(self) -> bool:
        """Return False if there was no last line, as when Ollama's repeat guard ends an answer."""
        if self.error is not None:
            raise self.error
        if not self._valid:
            message = "Ollama's answer has a line that is not a JSON object. Ask again."
            raise HTTPError(502, message, kind="broken")
        return self.finished

    def fold(self) -> bytes:
        """Return the object of `"stream": false`.

        Raises:
            HTTPError: 500 with Ollama's own error; 502 if it is too large, or there was no line.

        """
        if self.error is not None:
            raise self.error
        if not self._last:
            raise HTTPError(502, "Ollama ended its answer before the first line. Ask again.")
        folded = b"" if self.too_large else self._object or self._folded()
        self.too_large = self.too_large or len(folded) > self._max_object
        if self.too_large:
            raise too_large_error(self._max_object)
        self._object = folded  # shared by all readers and the stored answer
        return folded

    def _folded(self) -> bytes:
        folded = dict(self._last)
        if self._chat:
            message = folded.get("message")
            folded["message"] = self._joined(message if isinstance(message, dict) else {})
            if self._tool_calls:
                folded["message"]["tool_calls"] = self._tool_calls
        else:
            folded = self._joined(folded)
        if not self._logprobs:
            return dump(folded)
        folded.pop("logprobs", None)
        return dump(folded)[:-1] + b',"logprobs":[%b]}' % ",".join(self._logprobs).encode()

    def _joined(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return a message with the joined texts; `thinking` comes after the text."""
        joined: dict[str, Any] = {}
        for name, value in message.items():
            if name != "thinking":
                joined[name] = value
            if name == self._text:
                joined[name] = "".join(self._texts)
                if thinking := "".join(self._thinking):
                    joined["thinking"] = thinking
        return joined


class EventNotes(Notes):
    """Notes on an SSE stream of `/v1`.

    It is complete if it ends with `data: [DONE]` after a `finish_reason`, or on `/v1/responses`
    and `/v1/messages` with their own last events. Ollama's repeat guard ends a stream without
    these. So does a killed runner; on `/v1/chat/completions`, its last event has no model.
    """

    delimiter = b"\n\n"

    def __init__(self) -> None:
        super().__init__()
        self._reason = False
        self._with_content = 0  # events
        self._usage: dict[str, int] = {}
        self._last = b""

    def keeps(self) -> bool:
        """Return True if it is complete and has content."""
        return self.finished and self._reason and self._with_content > 0

    @property
    def usage(self) -> Usage:
        """The numbers of its `usage`; without one, each event with content counts as a token."""
        usage = _usage(self.lines, self._usage)
        return usage if usage.tokens else usage._replace(tokens=self._with_content)

    def feed(self, piece: bytes) -> None:
        """Note complete events."""
        for event in piece.split(b"\n\n"):
            name, found, data = event.partition(b"data:")
            if found:
                self.lines += 1
                self._note(name, data)

    def _note(self, name: bytes, data: bytes) -> None:
        self._last = data
        last = name.startswith(_LAST_EVENTS)
        self._reason = self._reason or last or _REASON.search(data) is not None
        self._note_error(name, data)
        self.finished = self.error is None and (last or data.strip() == b"[DONE]")
        for match in _USAGE.finditer(data):
            numbers = _numbers(data[match.start() : match.start() + MAX_USAGE])
            self._usage = self._usage | numbers
        # Events of /v1/responses other than deltas repeat earlier content.
        repeats = name.startswith(b"event: response.") and b".delta" not in name
        self._with_content += not repeats and _CONTENT.search(data) is not None

    def _note_error(self, name: bytes, data: bytes) -> None:
        if self.error is None and (name.startswith(_ERROR_EVENTS) or _ERROR_EVENT.match(data)):
            value = _object(data) or {}
            error = value.get("error")
            self.error = _reported(error.get("message") if isinstance(error, dict) else error)

    def close(self) -> bool:
        """Return False if there was no last event, as when Ollama's repeat guard ends an answer.

        Raises:
            HTTPError: the model's runner was killed, or Ollama reported an error.

        """
        if self.error is not None:
            raise self.error
        if not self.finished and _NO_MODEL.search(self._last):
            message = "Ollama's runner stopped in the middle of the answer. Ask again."
            raise HTTPError(502, message, kind="broken")
        return self.finished


_LAST_EVENTS = (b"event: response.completed", b"event: message_stop")
_ERROR_EVENTS = (b"event: error", b"event: response.failed")


def too_large_error(limit: int) -> HTTPError:
    """Return the error for a fold larger than `limit` bytes."""
    message = f"the answer is larger than {limit} bytes (MAX_OBJECT_BYTES): ask for a stream"
    return HTTPError(502, f'{message}, with "stream": true')


def _reported(error: object) -> HTTPError:
    """Return Ollama's own error, as its single object would have reported it."""
    return HTTPError(500, str(error), body=dump({"error": error}), kind=REPORTED)


def _object(text: bytes) -> dict[str, Any] | None:
    """Parse one JSON object; None if it is not one."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _count(line: dict[str, Any], name: str) -> int:
    """Return a number from the last line; 0 if it is missing or makes no sense."""
    value = line.get(name)
    return value if type(value) is int and 0 <= value < 1 << 60 else 0


def _numbers(text: bytes) -> dict[str, int]:
    """Find an object's usage numbers by their names; the last occurrence of a name counts."""
    return {name.decode(): int(digits) for name, digits in _NUMBER.findall(text)}


def _usage(lines: int, numbers: dict[str, int]) -> Usage:
    """Return the usage, given numbers by their names in Ollama's, OpenAI's or Anthropic's API."""

    def first(*names: str) -> int:
        return next((numbers[name] for name in names if name in numbers), 0)

    return Usage(
        lines,
        first("prompt_eval_count", "prompt_tokens", "input_tokens"),
        first("eval_count", "completion_tokens", "output_tokens"),
        (first("prompt_eval_duration") + first("eval_duration")) / 1e9,
    )


@lru_cache(maxsize=MAX_FRAMED)
def content_type(headers: Headers) -> bytes:
    """Return a response's content type, in lower case."""
    return next((v.lower() for n, v in headers if n.lower() == b"content-type"), b"")


def notes_for(response: Response, lines: LineNotes | None = None) -> Notes:
    """Return the notes for a model's answer, depending on the response's head.

    Args:
        response: upstream's response; its body is not read.
        lines: notes for NDJSON, on the native routes.

    """
    if response.status != 200:
        return Relayed()
    kind = content_type(response.headers)
    if lines is not None and kind.startswith((NDJSON, SSE)):
        return lines
    if kind.startswith((NDJSON, SSE)):
        return progress_notes(response)
    return WholeNotes()


def progress_notes(response: Response) -> Notes:
    """Return the notes for a response that is only relayed: progress, lists, errors."""
    kind = content_type(response.headers)
    if kind.startswith(NDJSON):
        return ProgressLines()
    return EventNotes() if kind.startswith(SSE) else Relayed()


def dump(value: object) -> bytes:
    """Write JSON. Raises HTTPError if it is nested too deep."""
    try:
        return _AS_TEXT.encode(value).encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return json.dumps(value, separators=(",", ":")).encode()
    except RecursionError:
        raise HTTPError(
            502,
            'the answer is nested too deep for one object: ask for a stream, with "stream": true',
        ) from None
