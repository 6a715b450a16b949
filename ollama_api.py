"""All that is known of Ollama's API: routes, cache keys, folds, what is complete, errors.

Pure: nothing here waits or reads a clock. Sources are Ollama's API page (docs/api.md), its
OpenAI compatibility page (docs/openai.md), and recorded exchanges with Ollama 0.13.5.
"""

import enum
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

from http11 import MAX_FRAMED, Headers, HTTPError, Response
from telemetry import NO_USAGE, Usage

JSON = b"application/json; charset=utf-8"  # as Ollama sends it
NDJSON = b"application/x-ndjson"
SSE = b"text/event-stream"

# Go reads JSON names in any case, so these in another case could mean what we do not see.
_KNOWN_NAMES = frozenset(
    [
        "model",
        "prompt",
        "messages",
        "input",
        "stream",
        "keep_alive",
        "options",
        "temperature",
        "seed",
    ]
)
_ERROR = b'{"error"'  # what the line of an error begins with
_LOADS = ("load", "unload")  # `done_reason` of an answer that says nothing


class Access(enum.Enum):
    """Who may use a route."""

    OPEN = "anybody"
    KEY = "whoever has a valid API key"
    ADMIN = "keys whose label is in ADMIN_LABELS"


class Form(enum.Enum):
    """The form of an API's errors."""

    OLLAMA = "ollama"
    OPENAI = "openai"
    ANTHROPIC = "anthropic"

    def body(self, status: int, message: str) -> bytes:
        """Write an error's body."""
        if self is Form.OLLAMA:
            return _dump({"error": message})
        kind = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}.get(
            status, "invalid_request_error" if status < 500 else "api_error"
        )
        if self is Form.ANTHROPIC:
            return _dump({"type": "error", "error": {"type": kind, "message": message}})
        error = {"message": message, "type": kind, "param": None, "code": None}
        return _dump({"error": error})

    def line(self, content_type: bytes, message: str) -> bytes:
        """Write the line, or event, that ends a stream which broke."""
        body = self.body(502, message)
        if not content_type.startswith(SSE):
            return body + b"\n"
        event = b"event: error\n" if self is Form.ANTHROPIC else b""
        return event + b"data: %b\n\n" % body


@dataclass(slots=True)
class Question:
    """What a request asks of a model.

    `key` is the cache key without its scope, None if the answer may not be kept or shared.
    `stream` says that the client wants lines as they come; `relayed` that it gets upstream's
    response as it is, whatever that may be.
    """

    body: Callable[[], bytes]
    """Writes the body for upstream anew."""
    model: str
    key: bytes | None
    stream: bool
    relayed: bool
    deterministic: bool
    folds: bool = field(init=False)
    """Whether the client gets upstream's stream as one object."""

    def __post_init__(self) -> None:
        self.folds = not (self.stream or self.relayed)


class Codec(Protocol):
    """What is known of the bodies of one kind of route."""

    def question(self, body: bytes, route: "Route") -> Question:
        """Read a request's body. Raises HTTPError 400."""

    def notes(self, response: Response) -> "BaseNotes":
        """Begin to note an answer."""


@dataclass(frozen=True, slots=True)
class Route:
    """One route: what we do with it, and what goes upstream.

    `target` is what is sent upstream, None where OllProx answers by itself with what `own`
    names. `codec` is None where the request has no body that must be read. `asks` says
    whether it asks a model for an answer.
    """

    methods: tuple[bytes, ...]
    target: bytes | None
    codec: Codec | None = None
    streams: bool = False  # what a body without "stream" means
    access: Access = Access.KEY
    form: Form = Form.OLLAMA
    rest: bytes = b""  # what may follow the path: a pattern for the name that it ends in
    own: str = ""
    asks: bool = False


def write_anew(value: dict[str, Any]) -> bytes:
    """Write an object in its own order: a schema's order means something to Ollama."""
    return _IN_ORDER.encode(value).encode()


def read_object(body: bytes) -> dict[str, Any]:
    """Parse a request's body.

    Raises:
        HTTPError: 400 if it is not one JSON object in UTF-8, or one that Python's `json`
            cannot read: too deep, numbers too long, NaN.

    """
    try:
        value = _STRICT.decode(body.decode())
    except UnicodeDecodeError:
        raise HTTPError(400, "the body must be UTF-8 text: a JSON object") from None
    except json.JSONDecodeError as error:
        where = f"{error.msg}: line {error.lineno} column {error.colno}"
        raise HTTPError(400, f"the body must be a JSON object; it is not JSON: {where}") from None
    except RecursionError:
        raise HTTPError(400, "the body's JSON is nested too deep") from None
    except ValueError as error:
        reason = (
            "NaN or Infinity is no JSON" if "constant" in str(error) else "a number is too long"
        )
        raise HTTPError(400, f"the body must be a JSON object; {reason}") from None
    if not isinstance(value, dict):
        raise HTTPError(400, 'the body must be a JSON object, such as {"model": "llama2"}')
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"constant {name}")


# Made once: `json.loads` and `json.dumps` make one for each call that is out of the ordinary.
_STRICT = json.JSONDecoder(parse_constant=_refuse_constant)
_READER = json.JSONDecoder()
_IN_ORDER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_SORTED = json.JSONEncoder(separators=(",", ":"), allow_nan=False, sort_keys=True)
_AS_TEXT = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)


def cache_key(target: bytes, canonical: bytes) -> bytes:
    """Return the digest that identifies an answer."""
    return hashlib.sha256(target + b"\n" + canonical).digest()


def _canonical(value: dict[str, Any]) -> bytes:
    """Write an object so that the order of names does not matter.

    Raises:
        HTTPError: 400 for what can be read but not written.

    """
    try:
        return _SORTED.encode(value).encode()
    except ValueError:
        raise HTTPError(400, "a number in the body is too large for a JSON number") from None
    except RecursionError:
        raise HTTPError(400, "the body's JSON is nested too deep") from None


def _is_odd(value: dict[str, Any]) -> bool:
    """Whether only Ollama can tell what a body means."""
    try:
        if not isinstance(value.get("stream"), bool | None) or _has_twins(value):
            return True
    except RecursionError:
        raise HTTPError(400, "the body's JSON is nested too deep") from None
    return any(name not in _KNOWN_NAMES and name.casefold() in _KNOWN_NAMES for name in value)


def _has_twins(value: object) -> bool:
    """Whether any object has two names that differ in case alone: for Go, the last one wins."""
    if isinstance(value, list):
        return any(map(_has_twins, value))
    if not isinstance(value, dict):
        return False
    if len({name.casefold() for name in value}) < len(value):
        return True
    return any(map(_has_twins, value.values()))


def is_deterministic(options: object) -> bool:
    """Whether sampling is pinned: `temperature` 0 or a `seed`."""
    if not isinstance(options, dict):
        return False
    temperature, seed = options.get("temperature"), options.get("seed")
    cold = isinstance(temperature, int | float) and temperature == 0
    seeded = isinstance(seed, int) and seed is not False and seed != -1  # -1: a random one
    return (cold and temperature is not False) or seeded


def normalised(model: object) -> str:
    """Write a model's name as Ollama lists it: `llama2` is `llama2:latest`."""
    if not isinstance(model, str) or not model:
        return ""
    name = model.lower()
    if "/" in name:
        name = re.sub(r"\Ahttps?://", "", name)
        name = name.removeprefix("registry.ollama.ai/").removeprefix("library/")
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def digests(body: bytes) -> dict[str, str] | None:
    """Read `/api/tags`: each model's digest by its name; None unless well-formed throughout."""
    try:
        models = json.loads(body)["models"]
        found = {normalised(model["name"]): model["digest"] for model in models}
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    good = all(name and isinstance(digest, str) and digest for name, digest in found.items())
    return found if good and isinstance(models, list) else None


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
        return Usage(self._lines, _count(self._last, "eval_count"), nanoseconds / 1e9)

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
                self.held += len(text) if text.isascii() else len(_dump(text))
        for part in parts if self._chat else ():
            if isinstance(calls := part.get("tool_calls"), list):
                self._tool_calls += calls
                self.held += len(_dump(calls))
        for line in lines:
            if isinstance(logprobs := line.get("logprobs"), list) and logprobs:
                self._logprobs.append(_dump(logprobs)[1:-1].decode())
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
            raise HTTPError(500, str(error), body=_dump({"error": error}))
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
            return _dump(folded)
        folded.pop("logprobs", None)
        return _dump(folded)[:-1] + b',"logprobs":[%b]}' % ",".join(self._logprobs).encode()

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


def _notes(response: Response, streamed: BaseNotes, whole: BaseNotes) -> BaseNotes:
    """Choose the notes by what upstream's head says."""
    if response.status != 200:
        return BaseNotes()
    kind = content_type(response.headers)
    return streamed if kind.startswith((NDJSON, SSE)) else whole


def fold(codec: Codec | None, headers: Headers, stream: bytes) -> bytes | None:
    """Fold a whole stream that was stored; None if it turns out to be no whole one.

    Raises:
        HTTPError: 502 if it is too large, or nested too deep, for one object.

    """
    assert codec is not None
    notes = codec.notes(Response(200, headers, b""))
    notes.feed(stream)
    return notes.fold() if notes.finished else None


def progress_notes(response: Response) -> BaseNotes:
    """Begin to note what is only relayed: progress, lists, errors."""
    kind = content_type(response.headers)
    if kind.startswith(NDJSON):
        return PlainLines(b"\n")
    return PlainLines(b"\n\n") if kind.startswith(SSE) else BaseNotes()


@dataclass(frozen=True, slots=True)
class Native:
    """`/api/generate` and `/api/chat`: always asked for as a stream, and folded."""

    says: str
    """The name whose emptiness makes a request load a model: `prompt` or `messages`."""
    max_object: int = 32 << 20

    def question(self, body: bytes, route: Route) -> Question:
        """Read a request's body. Raises HTTPError 400."""
        value = read_object(body)
        odd = _is_odd(value)
        wants = route.streams if value.get("stream") is None else value["stream"] is True
        key = None
        if not odd and value.get(self.says):
            kept = {n: v for n, v in value.items() if n not in {"stream", "keep_alive"}}
            key = cache_key(route.target or b"", _canonical(kept))
        else:
            _canonical(value)

        def write() -> bytes:
            if odd:
                return write_anew(value)
            return write_anew({**value, "stream": wants if key is None else True})

        return Question(
            body=write,
            model=_name(value.get("model")),
            key=key,
            stream=wants,
            relayed=key is None,
            deterministic=is_deterministic(value.get("options")),
        )

    def notes(self, response: Response) -> BaseNotes:
        """Begin to note an answer."""
        lines = LineNotes(self.says == "messages", self.max_object)
        return _notes(response, lines, BaseNotes())


@dataclass(frozen=True, slots=True)
class AsItCame:
    """Routes whose streams and objects are asked for, and kept, each as they came.

    `says` is the name without which there is nothing to answer; empty: never kept.
    `pinned` says where the sampling options are: "" for the body itself, "*" where nothing
    is sampled.
    """

    says: str = ""
    pinned: str = ""
    sse: bool = False

    def question(self, body: bytes, route: Route) -> Question:
        """Read a request's body. Raises HTTPError 400."""
        value = read_object(body)
        odd = _is_odd(value)
        canonical = _canonical({n: v for n, v in value.items() if self.sse or n != "keep_alive"})
        keyed = not odd and bool(self.says) and bool(value.get(self.says))
        return Question(
            body=lambda: write_anew(value),
            model=_name(value.get("model")),
            key=cache_key(route.target or b"", canonical) if keyed else None,
            stream=value.get("stream") is True,
            relayed=True,
            deterministic=self.pinned == "*" or is_deterministic(value),
        )

    def notes(self, response: Response) -> BaseNotes:
        """Begin to note an answer."""
        if not self.says:
            return progress_notes(response)
        return _notes(response, EventNotes(), WholeNotes())


def _name(model: object) -> str:
    return model if isinstance(model, str) else ""


def _dump(value: object) -> bytes:
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


class RouteTable:
    """The routes, by exact path; a few end in a name that the client chooses."""

    def __init__(self, rows: dict[bytes, Route]) -> None:
        self.rows = rows

    def find(self, path: bytes) -> tuple[Route, bytes] | None:
        """Return a path's route and the path to ask upstream for."""
        if (route := self.rows.get(path)) is not None and not route.rest:
            return route, route.target or path
        for prefix, route in self.rows.items():
            rest = path.removeprefix(prefix)
            if route.rest and rest != path and re.fullmatch(route.rest, rest):
                return route, prefix + rest
        return None

    def form(self, path: bytes) -> Form:
        """Return the form of errors on a path, known or not."""
        if (found := self.find(path)) is not None:
            return found[0].form
        return Form.OPENAI if path.startswith(_V1) else Form.OLLAMA

    def hint(self, path: bytes) -> str:
        """Say which path was meant, where a doubled or trailing slash is the only fault."""
        plain = re.sub(rb"/+", b"/", path)
        for meant in (plain, plain.rstrip(b"/")):
            if meant != path and meant in self.rows:
                return f"; {meant.decode()} is one: take out the slashes that are too many"
        return ""


_V1 = b"/v1/"
VERSION = b"/api/version"  # what OllProx asks for itself
TAGS = b"/api/tags"


def _v1_rows(post: tuple[bytes, ...], get: tuple[bytes, ...]) -> dict[bytes, Route]:
    """The routes of the APIs that Ollama has in common with others."""
    codecs = {
        b"/v1/chat/completions": AsItCame("messages", sse=True),
        b"/v1/completions": AsItCame("prompt", sse=True),
        b"/v1/embeddings": AsItCame("input", "*"),
        b"/v1/responses": AsItCame(),
    }
    return {
        **{
            path: Route(post, path, codec, form=Form.OPENAI, asks=True)
            for path, codec in codecs.items()
        },
        b"/v1/messages": Route(post, b"/v1/messages", AsItCame(), form=Form.ANTHROPIC, asks=True),
        b"/v1/models": Route(get, b"/v1/models", form=Form.OPENAI),
        b"/v1/models/": Route(get, b"/v1/models/", form=Form.OPENAI, rest=_MODEL),
    }


def _admin_rows(post: tuple[bytes, ...]) -> dict[bytes, Route]:
    """The routes that manage models: their bodies pass as they are."""
    blobs = b"/api/blobs/"
    return {
        **{
            path: Route(methods, path, access=Access.ADMIN)
            for path, methods in {
                b"/api/pull": post,
                b"/api/push": post,
                b"/api/create": post,
                b"/api/copy": post,
                b"/api/delete": (b"DELETE",),
            }.items()
        },
        blobs: Route((b"HEAD", b"POST"), blobs, access=Access.ADMIN, rest=_BLOB),
    }


# A model's name as Ollama allows it, with its slashes as they are or as %2F.
_MODEL = rb"(?i:[a-z0-9][\w.:@-]*)(?i:(?:/|%2f)[a-z0-9][\w.:@-]*){0,3}"
_BLOB = rb"sha256[:-][0-9a-f]{64}"


def route_table(max_object: int) -> RouteTable:
    """Make the table. `max_object` bounds a fold, in bytes."""
    post, get = (b"POST",), (b"GET", b"HEAD")
    generate = Native("prompt", max_object)
    chat = Native("messages", max_object)
    return RouteTable(
        {
            b"/call_model": Route(post, b"/api/generate", generate, asks=True),
            b"/api/generate": Route(post, b"/api/generate", generate, streams=True, asks=True),
            b"/api/chat": Route(post, b"/api/chat", chat, streams=True, asks=True),
            b"/api/embed": Route(post, b"/api/embed", AsItCame("input", "*"), asks=True),
            b"/api/embeddings": Route(post, b"/api/embeddings", AsItCame("prompt", "*"), asks=True),
            b"/api/show": Route(post, b"/api/show", AsItCame()),
            b"/": Route(get, b"/"),
            b"/api/version": Route(get, VERSION),
            b"/api/tags": Route(get, TAGS),
            b"/api/ps": Route(get, b"/api/ps"),
            **_v1_rows(post, get),
            **_admin_rows(post),
            b"/health": Route(get, None, access=Access.OPEN, own="health"),
            b"/ready": Route(get, None, access=Access.OPEN, own="ready"),
            b"/dashboard": Route(get, None, access=Access.OPEN, own="dashboard"),
            b"/metrics": Route(get, None, own="metrics"),
            b"/metrics.json": Route(get, None, own="view"),
            b"/cache": Route((b"DELETE",), None, access=Access.ADMIN, own="drop"),
        }
    )


def version(body: bytes) -> str:
    """Read `/api/version`; "unknown" if it says none."""
    try:
        said = json.loads(body)["version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return "unknown"
    return said[:40] if isinstance(said, str) else "unknown"
