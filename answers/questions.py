"""Read a request's body: its model, its cache key, and the body for upstream.

Pure: no I/O, no clock.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from answers.notes import LineNotes, Notes, notes_for
from settings import normalize_model
from wire.codings import decompress
from wire.http11 import HTTPError, Response

MAX_VALUES = 1 << 18  # JSON values in a body; parsing this many numbers takes about 10 ms
CONTAINER = 8  # values that a list or object counts as, for its time and memory
STEP = 64 << 10  # bytes that are searched at once
MAX_DIGITS = 640  # of a whole number: the time to read one is quadratic; Python takes no less
SHORT = 16 << 10  # bytes of a body that is read at once, whatever is in it
MAX_AT_ONCE = 64 << 10  # bytes of the largest body that is read on the event loop
MAX_VALUES_AT_ONCE = 4096  # JSON values of such a body

EXAMPLE = '{"model": "llama2", "prompt": "Hello"}'

# The top-level names that are read here. Go ignores the case of names, so a body that has one of
# these in another case may mean something different to Ollama.
_KNOWN_NAMES = frozenset(
    [
        "model",
        "name",
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


Aliases = Mapping[str, str]
"""The model that answers for an alias, by the alias's normalized name."""


@dataclass(slots=True)
class Question:
    """A parsed request body.

    `model` is the name as the client wrote it, or the model that its alias stands for. `key` is
    the cache key without its scope, None if the answer must be neither stored nor shared.
    `stream` is True if the client wants a stream, `relayed` if it gets upstream's response
    unchanged. `deterministic` is True if asking again gives the same answer. `ambiguous` is True
    if Ollama may read the body differently from OllProx, so that another model than `model` may
    answer.
    """

    body: bytes
    """For upstream."""
    model: str
    key: bytes | None
    stream: bool
    relayed: bool
    deterministic: bool
    ambiguous: bool = False
    unloads: bool = False
    """It only unloads the model, so it needs no turn."""
    folds: bool = field(init=False)
    """The client gets the fold of upstream's stream."""

    def __post_init__(self) -> None:
        self.folds = not (self.stream or self.relayed)


class Codec(Protocol):
    """Reads the requests and answers of one kind of route."""

    def question(self, body: bytes, target: bytes) -> Question:
        """Read a request's body; `target` is part of the cache key. Raises HTTPError 400."""

    def notes(self, response: Response) -> Notes:
        """Return the notes for an answer, given the response's head."""


@dataclass(frozen=True, slots=True)
class Native:
    """Codec of `/api/generate` and `/api/chat`, which asks for a stream and folds it."""

    input_name: str
    """The field without which Ollama only loads the model: `prompt` or `messages`."""
    streams: bool = True
    """The default of the field `stream`."""
    max_object: int = 32 << 20
    """Limit of a fold, in bytes."""
    aliases: Aliases = field(default_factory=dict)

    def question(self, body: bytes, target: bytes) -> Question:
        """Read a request's body. Raises HTTPError 400."""
        value = _read(body, self.aliases)
        ambiguous = _is_ambiguous(value)
        stream = self.streams if value.get("stream") is None else value["stream"] is True
        canonical = _canonical(value, without=("stream", "keep_alive"))
        cacheable = bool(value.get(self.input_name)) and not ambiguous
        if not ambiguous:
            value["stream"] = cacheable or stream
        return Question(
            body=write_object(value),
            model=_name(value),
            key=cache_key(target, canonical) if cacheable else None,
            stream=stream,
            relayed=not cacheable,
            deterministic=is_deterministic(value.get("options")),
            ambiguous=ambiguous,
            unloads=not (ambiguous or value.get(self.input_name))
            and _is_zero(value.get("keep_alive")),
        )

    def notes(self, response: Response) -> Notes:
        """Return the notes for an answer that begins."""
        return notes_for(response, LineNotes(self.input_name == "messages", self.max_object))


@dataclass(frozen=True, slots=True)
class PassThrough:
    """Codec of routes whose answers are relayed, and stored, unchanged."""

    input_name: str = ""
    """The field without which there is nothing to answer; empty if no answer is stored."""
    samples: bool = True
    """The answer depends on `temperature` and `seed`; False for embeddings."""
    without: tuple[str, ...] = ()
    """Fields that do not change the answer."""
    may_keep_state: bool = False
    """A request may use or leave a conversation on the server, as on `/v1/responses`."""
    repeats_model: bool = True
    """The answer repeats the model's name as it was sent, so each name has its own cache key."""
    aliases: Aliases = field(default_factory=dict)

    def question(self, body: bytes, target: bytes) -> Question:
        """Read a request's body. Raises HTTPError 400."""
        value = _read(body, self.aliases)
        ambiguous = _is_ambiguous(value)
        model = _name(value)
        keyed = value if self.repeats_model else {**value, "model": normalize_model(model)}
        canonical = _canonical(keyed, without=self.without)
        uncacheable = ambiguous or (self.may_keep_state and _keeps_state(value))
        cacheable = bool(self.input_name and value.get(self.input_name)) and not uncacheable
        return Question(
            body=write_object(value),
            model=model,
            key=cache_key(target, canonical) if cacheable else None,
            stream=value.get("stream") is True,
            relayed=True,
            deterministic=not self.samples or is_deterministic(value),
            ambiguous=ambiguous,
        )

    def notes(self, response: Response) -> Notes:
        """Return the notes for an answer that begins."""
        return notes_for(response)


def is_quick(body: bytes) -> bool:
    """Return whether a body is read so quickly that it need not be left to a thread."""
    return len(body) <= MAX_AT_ONCE and _cost(body) <= MAX_VALUES_AT_ONCE


def large_question(codec: Codec, target: bytes, body: bytes, coding: bytes, limit: int) -> Question:
    """Read a large or compressed body; runs in a thread.

    Args:
        codec: the route's codec.
        target: the path upstream.
        body: as it was received.
        coding: its `Content-Encoding`, empty for none.
        limit: of the decompressed body, in bytes.

    Raises:
        HTTPError: 400, or 413 if it is too large or has too many values.

    """
    plain = decompress(coding, body, limit) if coding else body
    check_values(plain)
    return codec.question(plain, target)


class _RepeatedName(Exception):
    """An object has the same name twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise _RepeatedName
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"constant {name}")


# `json.loads` and `json.dumps` would make a new one for each call with options.
_STRICT = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_object)
_IN_ORDER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


def read_object(body: bytes) -> dict[str, Any]:
    """Parse a request's body.

    Raises:
        HTTPError: 400 if it is not one JSON object in UTF-8, if Python's `json` cannot read it
            (nested too deep, numbers too long, NaN), or if an object repeats a name: Go
            merges or replaces such values, depending on the field.

    """
    if not body.strip():
        raise HTTPError(400, f"the body is empty: send a JSON object, such as {EXAMPLE}")
    try:
        value = _STRICT.decode(body.decode())
    except UnicodeDecodeError:
        raise HTTPError(400, "the body must be a JSON object in UTF-8") from None
    except json.JSONDecodeError as error:
        where = f"{error.msg}: line {error.lineno} column {error.colno}"
        raise HTTPError(400, f"the body must be a JSON object; it is not JSON: {where}") from None
    except _RepeatedName:
        raise HTTPError(400, "the body has the same name twice in one object") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        reason = (
            "JSON has no NaN or Infinity" if "constant" in str(error) else "a number is too long"
        )
        raise HTTPError(400, f"the body must be a JSON object; {reason}") from None
    if not isinstance(value, dict):
        raise HTTPError(400, f"the body must be a JSON object, such as {EXAMPLE}")
    return value


def _read(body: bytes, aliases: Aliases) -> dict[str, Any]:
    """Return the object that a body is, with the model in its alias's place. Raises HTTPError."""
    value = read_object(body)
    if aliases and (model := aliases.get(normalize_model(_name(value)))) is not None:
        value["model" if value.get("model") else "name"] = model
    return value


def write_object(value: dict[str, Any]) -> bytes:
    """Serialize an object without sorting its names: Ollama respects their order in a schema."""
    return _IN_ORDER.encode(value).encode()


def check_values(body: bytes, limit: int = MAX_VALUES) -> None:
    """Refuse a body with too many JSON values.

    Parsing holds the interpreter's lock, in whichever thread it runs. This check is linear and
    takes short steps, so that other threads can run.

    Raises:
        HTTPError: 413 beyond `limit` values.

    """
    steps = (body[start : start + STEP] for start in range(0, len(body), STEP))
    if sum(map(_cost, steps)) <= limit:  # fast: this counts the text in strings too
        return
    cost = 0
    for match in _OUTSIDE_STRINGS.finditer(body):
        cost += _cost(match[1])
        if cost > limit:
            raise HTTPError(413, f"the body has more than {limit} JSON values; send fewer")


def _cost(text: bytes) -> int:
    return text.count(b",") + CONTAINER * (text.count(b"[") + text.count(b"{"))


# Text between two strings, in steps of at most 64 KiB, and the string that follows. Possessive
# quantifiers and the optional closing quote keep it linear for any input.
_OUTSIDE_STRINGS = re.compile(rb'([^"]{0,65536}+)(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"?)?', re.DOTALL)


def cache_key(target: bytes, canonical: bytes) -> bytes:
    """Return the digest that identifies an answer."""
    return hashlib.sha256(target + b"\n" + canonical).digest()


def _canonical(value: dict[str, Any], without: tuple[str, ...]) -> bytes:
    """Serialize an object with its names sorted where Ollama ignores their order.

    That is at the top level and in `options`. Elsewhere the order is part of the question: a
    model fills the properties of a `format` in order, and templates show tools and arguments in
    order.

    Raises:
        HTTPError: 400 if a value can be parsed but not serialized.

    """
    ordered = {name: value[name] for name in sorted(value) if name not in without}
    if isinstance(options := ordered.get("options"), dict):
        ordered["options"] = {name: options[name] for name in sorted(options)}
    try:
        return write_object(ordered)
    except ValueError:
        raise HTTPError(400, "a number in the body is too large for a JSON number") from None
    except RecursionError:
        raise _too_deep() from None


def _is_ambiguous(value: dict[str, Any]) -> bool:
    """Return True if Ollama may read the body differently from OllProx."""
    try:
        if not isinstance(value.get("stream"), bool | None) or _has_case_twins(value):
            return True
    except RecursionError:
        raise _too_deep() from None
    return not _KNOWN_NAMES.intersection(map(str.casefold, value)) <= value.keys()


def _has_case_twins(value: dict[str, Any] | list[Any]) -> bool:
    """Return True if two names in an object differ only in case: in Go, the last one wins."""
    members: Iterable[Any] = value
    if isinstance(value, dict):
        if len(set(map(str.casefold, value))) < len(value):
            return True
        members = value.values()
    for member in members:  # noqa: SIM110 - a generator would take longer
        if isinstance(member, (dict, list)) and _has_case_twins(member):
            return True
    return False


def _keeps_state(value: dict[str, Any]) -> bool:
    """Return True if a request to `/v1/responses` uses or leaves a conversation on the server."""
    return value.get("store") is True or value.get("previous_response_id") is not None


def _is_zero(keep_alive: object) -> bool:
    """Return True for a `keep_alive` that unloads the model: 0 as a number or as a duration."""
    if isinstance(keep_alive, str):
        return re.fullmatch(r"[+-]?0+(?:\.0*)?(?:ns|us|ms|s|m|h)?", keep_alive) is not None
    return type(keep_alive) in {int, float} and keep_alive == 0


def _too_deep() -> HTTPError:
    return HTTPError(400, "the body's JSON is nested too deep")


def is_deterministic(options: object) -> bool:
    """Return True if asking again gives the same answer: `temperature` is 0, or `seed` is set.

    Ollama stores a seed in 32 bits; -1, in which all bits are set, means a random seed.
    """
    if not isinstance(options, dict):
        return False
    temperature, seed = options.get("temperature"), options.get("seed")
    if type(temperature) in {int, float} and temperature == 0:
        return True
    return type(seed) is int and seed != -1 and -(1 << 31) <= seed < (1 << 32) - 1


def managed_models(body: bytes) -> set[str] | None:
    """Return the models that a request to create, copy, delete or pull may change, normalized.

    None if the body names no model.
    """
    names: set[str] = set()

    def note(pairs: list[tuple[str, Any]]) -> None:
        names.update(
            normalize_model(value)
            for name, value in pairs
            if name.casefold() in {"model", "name", "destination"} and isinstance(value, str)
        )

    try:
        json.loads(body, object_pairs_hook=note)
    except (ValueError, RecursionError):
        return None
    return names - {""} or None


def _name(value: dict[str, Any]) -> str:
    """Return the requested model; `name` is the older field, which `/api/show` takes."""
    model = value.get("model") or value.get("name")
    return model if isinstance(model, str) else ""
