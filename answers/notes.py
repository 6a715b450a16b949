"""What OllProx notes of an answer while it is recorded: whether it is complete, and its fold.

Pure: nothing here waits or reads a clock. Sources are Ollama's API page (docs/api.md), its
OpenAI compatibility page (docs/openai.md), and recorded exchanges with Ollama 0.13.5 and 0.33.
"""

import json
from functools import lru_cache
from typing import Any

from record import NO_USAGE, Usage
from wire.http11 import MAX_FRAMED, Headers, HTTPError, Response

JSON = b"application/json; charset=utf-8"  # as Ollama sends it
NDJSON = b"application/x-ndjson"
SSE = b"text/event-stream"

_ERROR = b'{"error"'  # what the line of an error begins with
_LOADS = ("load", "unload")  # `done_reason` of an answer that says nothing

_READER = json.JSONDecoder()
_AS_TEXT = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)


class BaseNotes:
    """Notes on an answer that means nothing to us: an error, or what is only relayed."""

    delimiter = b""
    finished = False
    too_large = False
    reported = False
    held = 0
    usage = NO_USAGE
    folding = False  # whether a fold can be had

    def keeps(self, tape: bytes) -> bool:
        """Whether the whole answer on the tape may be stored, at a complete end."""
        return False

    def is_line(self, rest: bytes) -> bool:
        """Take what is there; there is no knowing."""
        return True

    def feed(self, piece: bytes) -> None:
        """Note nothing."""

    def close(self) -> str | None:
        """Take any clean end."""
        return None

    def forget(self) -> None:
        """Hold nothing, as ever."""

    def recall(self, pieces: list[bytes]) -> None:
        """Hold nothing, as ever."""

    def fold(self) -> bytes:
        """Refuse: there is none."""
        raise HTTPError(502, "Ollama's answer is no stream of JSON lines")


class PlainLines(BaseNotes):
    """Notes on lines that are only relayed, such as the progress of a pull."""

    def __init__(self, delimiter: bytes) -> None:
        self.delimiter = delimiter


class WholeNotes(BaseNotes):
    """Notes on one JSON object, complete with its body's end."""

    def keeps(self, tape: bytes) -> bool:
        """Whether it is an object, and no error."""
        value = _object(tape)
        return value is not None and "error" not in value


class LineNotes(BaseNotes):
    """Notes on a native stream: NDJSON, whose last line has `"done": true`.

    The fold is the last line, with every text joined (see `_joined`), as Ollama's own
    handlers make the single object of `"stream": false`.
    """

    delimiter = b"\n"

    def __init__(self, chat: bool, max_object: int) -> None:
        self._chat = chat
        self._text = "content" if chat else "response"  # the name of what is said
        self._max_object = max_object
        self._lines = 0
        self._last: dict[str, Any] = {}
        self._valid = True
        self._begin_fold()

    def _begin_fold(self) -> None:
        self.folding = True
        self._texts: dict[str, list[str]] = {self._text: [], "thinking": []}
        self._tool_calls: list[Any] = []
        self._logprobs: list[str] = []
        self._object = b""  # the fold, once it was made
        self.held = 0

    def forget(self) -> None:
        """Hold nothing for a fold any more; what is fed is still judged."""
        self._begin_fold()
        self.folding = False

    def recall(self, pieces: list[bytes]) -> None:
        """Note a whole tape again, if it was forgotten."""
        if not self.folding and not self.too_large:
            self._begin_fold()
            self._lines = 0
            for piece in pieces:
                self.feed(piece)

    @property
    def finished(self) -> bool:  # type: ignore[override]  # told by what has come
        """Whether the last line has come."""
        return self._valid and self._last.get("done") is True and not self.reported

    @property
    def usage(self) -> Usage:  # type: ignore[override]  # told by what has come
        """What it has come to, by the last line if there is one."""
        if self._last.get("done") is not True:
            return Usage(self._lines)
        nanoseconds = _count(self._last, "prompt_eval_duration") + _count(
            self._last, "eval_duration"
        )
        prompt_tokens = _count(self._last, "prompt_eval_count")
        return Usage(
            self._lines, prompt_tokens, _count(self._last, "eval_count"), nanoseconds / 1e9
        )

    def keeps(self, tape: bytes) -> bool:
        """Whether it is an answer, and not the loading of a model."""
        loaded = self._last.get("done_reason") in _LOADS
        if not self.finished or loaded or self.too_large:
            return False
        return self.folding or _is_all_answer(tape)  # its lines were not looked at

    def is_line(self, rest: bytes) -> bool:
        """Whether it is an object; half of one is nothing that a client could read."""
        return _object(rest) is not None

    def feed(self, piece: bytes) -> None:
        """Note whole lines."""
        self._object = b""
        self._lines += piece.count(b"\n") or 1
        if self.folding:
            texts = [text for text in piece.split(b"\n") if text]
        else:
            texts = [piece.rstrip(b"\n").rpartition(b"\n")[2]]
        try:
            # One call is faster than many.
            lines = _READER.decode((b"[%b]" % b",".join(texts)).decode())
        except (ValueError, RecursionError):
            self._valid = False
            return
        objects = [line for line in lines if isinstance(line, dict)]
        # Of lines that are no JSON each, a comma between can make what is.
        self._valid = self._valid and len(objects) == len(lines) == len(texts)
        for line in objects:
            if not self.reported:  # after an error nothing counts
                self._last = line
                self.reported = "error" in line
        if self.folding:
            self._note(objects)
            if self.held > self._max_object:
                self.too_large = True
                self.forget()

    def _note(self, lines: list[dict[str, Any]]) -> None:
        """Note what lines say, for the fold."""
        said = [line.get("message") for line in lines] if self._chat else lines
        parts = [part for part in said if isinstance(part, dict)]
        for name, texts in self._texts.items():
            text = "".join([text for part in parts if isinstance(text := part.get(name), str)])
            if text:
                texts.append(text)
                self.held += len(text) if text.isascii() else len(dump(text))
        for part in parts if self._chat else ():
            if isinstance(calls := part.get("tool_calls"), list):
                self._tool_calls += calls
                self.held += len(dump(calls))
        for line in lines:
            if isinstance(logprobs := line.get("logprobs"), list) and logprobs:
                self._logprobs.append(dump(logprobs)[1:-1].decode())
                self.held += len(self._logprobs[-1])

    def close(self) -> str | None:
        """Say what is missing at upstream's clean end."""
        if self.finished or self.reported:
            return None
        return "Ollama ended its answer without a last line. Ask again."

    def fold(self) -> bytes:
        """Return the object of `"stream": false`.

        Raises:
            HTTPError: 500 with Ollama's own error, 502 if it is too large.

        """
        if self.reported:
            error = self._last["error"]
            raise HTTPError(500, str(error), body=dump({"error": error}))
        folded = b"" if self.too_large else self._object or self._folded()
        if self.too_large or len(folded) > self._max_object:
            raise HTTPError(
                502,
                f"the answer is larger than {self._max_object} bytes (MAX_OBJECT_BYTES):"
                ' ask for a stream, with "stream": true',
            )
        self._object = folded  # the same for all that wait for it, and for what is stored
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

    def _joined(self, said: dict[str, Any]) -> dict[str, Any]:
        """Put the joined texts in their places; `thinking` comes after the text."""
        joined: dict[str, Any] = {}
        for name, value in said.items():
            if name != "thinking":
                joined[name] = value
            if name == self._text:
                joined[name] = "".join(self._texts[name])
                if thinking := "".join(self._texts["thinking"]):
                    joined["thinking"] = thinking
        return joined


def _is_all_answer(tape: bytes) -> bool:
    """Whether each line looks like an object, and none like an error."""
    lines = tape.strip(b"\n")
    return (
        lines.startswith(b"{")
        and lines.count(b"}\n{") == lines.count(b"\n")
        and not lines.startswith(_ERROR)
        and b"\n" + _ERROR not in lines
    )


class EventNotes(BaseNotes):
    """Notes on an SSE stream: complete with `data: [DONE]` after a `finish_reason`.

    Ollama ends a stream that broke as it ends a whole one, but for these two.
    """

    delimiter = b"\n\n"

    def __init__(self) -> None:
        self._events = 0
        self._reason = False
        self._done = False

    @property
    def finished(self) -> bool:  # type: ignore[override]  # told by what has come
        """Whether the last event has come."""
        return self._done and not self.reported

    @property
    def usage(self) -> Usage:  # type: ignore[override]  # told by what has come
        """What it has come to: events alone, since few say more."""
        return Usage(self._events)

    def keeps(self, tape: bytes) -> bool:
        """Whether it is a whole answer."""
        return self.finished and self._reason

    def is_line(self, rest: bytes) -> bool:
        """Whether it is the last event."""
        return rest.strip() == b"data: [DONE]"

    def feed(self, piece: bytes) -> None:
        """Note whole events."""
        self._events += piece.count(b"\n\n") or 1
        for event in piece.split(b"\n\n"):
            if not event.startswith(b"data: "):
                continue
            self._done = event[6:].strip() == b"[DONE]"
            self.reported = self.reported or event.startswith(b'data: {"error"')
            if not self._reason and b'"finish_reason":null' not in event:
                self._reason = b'"finish_reason"' in event and _has_reason(event[6:])

    def close(self) -> str | None:
        """Say what is missing at upstream's clean end."""
        if self._done or self.reported:
            return None
        return "Ollama ended its answer without [DONE]. Ask again."


def _object(text: bytes) -> dict[str, Any] | None:
    """Read what upstream said as one JSON object; None if it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _count(line: dict[str, Any], name: str) -> int:
    """Return a number of a last line; 0 for what makes no sense."""
    value = line.get(name)
    return value if isinstance(value, int) and 0 < value < 1 << 60 else 0


def _has_reason(data: bytes) -> bool:
    try:
        choices = json.loads(data)["choices"]
        return any(choice.get("finish_reason") for choice in choices)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


@lru_cache(maxsize=MAX_FRAMED)
def content_type(headers: Headers) -> bytes:
    """Return a response's content type, in lower case."""
    return next((v.lower() for n, v in headers if n.lower() == b"content-type"), b"")


def notes_for(response: Response, streamed: BaseNotes, whole: BaseNotes) -> BaseNotes:
    """Choose the notes by what upstream's head says."""
    if response.status != 200:
        return BaseNotes()
    kind = content_type(response.headers)
    return streamed if kind.startswith((NDJSON, SSE)) else whole


def progress_notes(response: Response) -> BaseNotes:
    """Begin to note what is only relayed: progress, lists, errors."""
    kind = content_type(response.headers)
    if kind.startswith(NDJSON):
        return PlainLines(b"\n")
    return PlainLines(b"\n\n") if kind.startswith(SSE) else BaseNotes()


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
