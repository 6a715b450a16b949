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
from typing import Any, Protocol

from answers.notes import (
    SSE,
    BaseNotes,
    EventNotes,
    LineNotes,
    WholeNotes,
    dump,
    notes_for,
    progress_notes,
)
from wire.http11 import Headers, HTTPError, Response
from wire.pool import Api

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
            return dump({"error": message})
        kind = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}.get(
            status, "invalid_request_error" if status < 500 else "api_error"
        )
        if self is Form.ANTHROPIC:
            return dump({"type": "error", "error": {"type": kind, "message": message}})
        error = {"message": message, "type": kind, "param": None, "code": None}
        return dump({"error": error})

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
_IN_ORDER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_SORTED = json.JSONEncoder(separators=(",", ":"), allow_nan=False, sort_keys=True)


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


def fold(codec: Codec | None, headers: Headers, stream: bytes) -> bytes | None:
    """Fold a whole stream that was stored; None if it turns out to be no whole one.

    Raises:
        HTTPError: 502 if it is too large, or nested too deep, for one object.

    """
    assert codec is not None
    notes = codec.notes(Response(200, headers, b""))
    notes.feed(stream)
    return notes.fold() if notes.finished else None


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
        return notes_for(response, lines, BaseNotes())


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
        return notes_for(response, EventNotes(), WholeNotes())


def _name(model: object) -> str:
    return model if isinstance(model, str) else ""


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


POOL_API = Api(
    normalize=normalised,
    tags=TAGS,
    loaded=b"/api/ps",
    models=b"/v1/models",
    pull=b"/api/pull",
    delete=b"/api/delete",
    blobs=b"/api/blobs/",
)
