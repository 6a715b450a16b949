"""Ollama's API: its routes, the form of its errors, and the requests of OllProx itself.

Pure: no I/O, no clock. The sources are Ollama's server/routes.go (0.33), its API
pages (docs/api.md, docs/openai.md), and recorded exchanges with Ollama 0.13.5 and 0.33.0.
`questions.py` reads the bodies of requests.

To add a route, add a row to one of the functions `_..._rows` below.
"""

import difflib
import enum
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from urllib.parse import quote, unquote, unquote_to_bytes

from answers.notes import SSE, dump
from answers.questions import Aliases, Codec, Native, PassThrough
from settings import normalize_model
from wire.pool import HOST, Api

MAX_HINTED = 64  # bytes of an unknown path that gets a "did you mean"


class Access(enum.Enum):
    """Who may use a route."""

    OPEN = "anybody"
    KEY = "any valid API key"
    ANY_MODEL = "API keys that may use every model, since the body is not read"
    ADMIN = "keys with the option admin, or whose label is in ADMIN_LABELS"


class Upload(enum.Enum):
    """How a request's body reaches upstream."""

    NONE = "there is no body, or the route's codec reads and rewrites it"
    LIMITED = "streamed through unread, up to MAX_BODY_BYTES"
    ANY_SIZE = "streamed through unread, of any size"


class Form(enum.Enum):
    """The form of an API's errors."""

    OLLAMA = "ollama"
    OPENAI = "openai"
    ANTHROPIC = "anthropic"

    def body(self, status: int, message: str) -> bytes:
        """Return an error's body."""
        if self is Form.OLLAMA:  # for a 401, Ollama's command line shows only `status`
            return dump({"error": message, **({"status": message} if status == 401 else {})})
        kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "api_error")
        if self is Form.ANTHROPIC:
            return dump({"type": "error", "error": {"type": kind, "message": message}})
        code = "rate_limit_exceeded" if status == 429 else None
        error = {"message": message, "type": kind, "param": None, "code": code}
        return dump({"error": error})

    def line(self, content_type: bytes, message: str) -> bytes:
        """Return the line, or event, that ends a truncated stream."""
        body = self.body(502, message)
        return self.event(body) if content_type.startswith(SSE) else body + b"\n"

    def event(self, body: bytes) -> bytes:
        """Return an error's body, which has no blank line, as an event."""
        name = b"event: error\n" if self is Form.ANTHROPIC else b""
        return name + b"".join(b"data: %b\n" % line for line in body.splitlines()) + b"\n"


@dataclass(frozen=True, slots=True)
class Route:
    """One route: who may use it, and what OllProx does with a request.

    `target` is the path upstream, None for an OllProx page; `page` is then its name in
    `watch/pages.py`. `suffix` is a pattern for the name that clients append to the path. `codec`
    reads the body; without one the answer is never stored.
    """

    methods: tuple[bytes, ...]
    target: bytes | None
    codec: Codec | None = None
    access: Access = Access.KEY
    form: Form = Form.OLLAMA
    suffix: bytes = b""
    upload: Upload = Upload.NONE
    page: str = ""
    generates: bool = False  # a model generates the answer, so the request needs a turn
    manages: bool = False  # it changes models, so stored answers may become wrong
    lists: str = ""  # the field of the answer that lists models
    lists_aliases: bool = False  # that list contains all models, so it gets the aliases too
    streams_events: bool = False  # the answer is SSE if the request wants a stream
    names_model: bool = False  # the suffix is the name of a model

    @property
    def takes_compressed(self) -> bool:
        """True if the body may be compressed, as some clients of OpenAI's API send it."""
        return self.codec is not None and self.form is not Form.OLLAMA


REMOTE = "remote:"


def digests(body: bytes) -> dict[str, str] | None:
    """Return each model's digest in `/api/tags` by its normalized name; None if malformed.

    The digest of a model that runs elsewhere is that of a local stub, and begins with `REMOTE`.
    """
    try:
        models = json.loads(body)["models"]
        found = {normalize_model(model["name"]): model["digest"] for model in models}
        for model in models:
            if model.get("remote_host"):
                found[normalize_model(model["name"])] = f"{REMOTE}{model['digest']}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    good = all(name and isinstance(digest, str) and digest for name, digest in found.items())
    return found if good and isinstance(models, list) else None


def loaded(body: bytes) -> tuple[str, ...]:
    """Read `/api/ps`: the names of the models that are loaded; none if it is malformed."""
    try:
        names = [model["name"] for model in json.loads(body)["models"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ()
    return tuple(name[:100] for name in names[:100] if isinstance(name, str))


def version(body: bytes) -> str:
    """Return the version in `/api/version`; "unknown" if there is none."""
    try:
        found = json.loads(body)["version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return "unknown"
    return found[:40] if isinstance(found, str) else "unknown"


class RouteTable:
    """The routes, by exact path; a few end in a name that the client chooses.

    If there are several servers, `hosts` are their names. `/host/NAME` may come before `/`, and
    before those of Ollama's own routes that begin with `/api/`: it selects that server.
    """

    def __init__(self, rows: dict[bytes, Route], aliases: Aliases | None = None) -> None:
        self.rows = rows
        self.hosts: frozenset[bytes] = frozenset()
        self._aliases = aliases or {}

    def find(self, path: bytes) -> tuple[Route, bytes] | None:
        """Return a path's route and its path upstream; None if there is no such path."""
        if (route := self.rows.get(path)) is not None and not route.suffix:
            return route, route.target or path
        if path.startswith(HOST):
            name, slash, rest = path.removeprefix(HOST).partition(b"/")
            if unquote_to_bytes(name) not in self.hosts or (rest and not rest.startswith(b"api/")):
                return None
            found = self.find(slash + rest)
            return None if found is None else (found[0], HOST + name + found[1])
        for prefix, route in self.rows.items():
            name = path.removeprefix(prefix)
            if route.suffix and name != path and re.fullmatch(route.suffix, name):
                return route, prefix + (self._real_name(name) if route.names_model else name)
        return None

    def _real_name(self, name: bytes) -> bytes:
        """Return the end of a path that asks for a model, with the model in an alias's place."""
        model = self._aliases.get(normalize_model(unquote(name.decode())))
        return name if model is None else quote(model, safe=":").encode()

    def form(self, path: bytes) -> Form:
        """Return the form of errors on a path, known or not."""
        if (found := self.find(path)) is not None:
            return found[0].form
        return Form.OPENAI if path.startswith(_V1) else Form.OLLAMA

    def hint(self, path: bytes) -> str:
        """Return a hint for an unknown path: which path was probably meant."""
        if len(path) > MAX_HINTED:
            return "see the README for the paths it has"
        plain = re.sub(rb"/+", b"/", path).rstrip(b"/").lower()
        bare = re.sub(rb"\A(?:/(?:api|v1))+(?=/)", b"", plain)  # a wrong base URL repeats these
        names = {name: None for name, route in self.rows.items() if not route.suffix}
        meant = [known for known in (plain, b"/api" + bare, b"/v1" + bare) if known in names]
        if not meant:
            close = difflib.get_close_matches(
                plain.decode("latin-1"), [name.decode() for name in names], 1, 0.8
            )
            meant = [name.encode() for name in close]
        if not meant:
            return "see the README for the paths it has"
        return f"did you mean {meant[0].decode()}?"


_V1 = b"/v1/"
_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
VERSION = b"/api/version"  # requested by OllProx itself
TAGS = b"/api/tags"
LOADED = b"/api/ps"
_POST, _GET = (b"POST",), (b"GET", b"HEAD")

# A model's name as Ollama allows it; a slash or colon in it may be percent-encoded.
_PART = rb"(?i:[a-z0-9](?:[\w.:@-]|%3a)*)"
_MODEL = _PART + rb"(?:(?:/|(?i:%2f))" + _PART + rb"){0,3}"
_BLOB = rb"sha256[:-][0-9a-f]{64}"
_KEY_NAME = rb"[A-Za-z0-9_=-]{1,1024}"  # a public key in URL-safe Base64


def route_table(max_object: int, aliases: Sequence[tuple[str, str]] = ()) -> RouteTable:
    """Return the route table.

    Args:
        max_object: the limit of a fold, in bytes.
        aliases: names for models, as MODEL_ALIASES has them.

    """
    known = {normalize_model(alias): model for alias, model in aliases}
    return RouteTable(
        _native_rows(max_object, known)
        | _v1_rows(known)
        | _unread_rows()
        | _managing_rows()
        | _page_rows(),
        known,
    )


def _native_rows(max_object: int, aliases: Aliases) -> dict[bytes, Route]:
    """Return the rows of Ollama's own API."""
    generate, chat = b"/api/generate", b"/api/chat"
    native = partial(Native, max_object=max_object, aliases=aliases)
    embeds = partial(PassThrough, samples=False, without=("keep_alive",), aliases=aliases)
    embed, old_embed = embeds("input"), embeds("prompt", repeats_model=False)
    codecs: dict[bytes, Codec] = {
        b"/call_model": native("prompt", streams=False),
        generate: native("prompt"),
        chat: native("messages"),
        b"/api/embed": embed,
        b"/api/embeddings": old_embed,
    }
    reads = (b"/", VERSION, b"/api/status")
    recommendations = b"/api/experimental/model-recommendations"
    return {
        **{
            path: Route(_POST, generate if path == b"/call_model" else path, codec, generates=True)
            for path, codec in codecs.items()
        },
        b"/api/show": Route(_POST, b"/api/show", PassThrough(aliases=aliases)),
        **{path: Route(_GET, path) for path in (*reads, recommendations)},
        TAGS: Route(_GET, TAGS, lists="models", lists_aliases=True),
        LOADED: Route(_GET, LOADED, lists="models"),
    }


def _v1_rows(aliases: Aliases) -> dict[bytes, Route]:
    """Return the rows of the APIs of OpenAI and Anthropic."""
    codec = partial(PassThrough, aliases=aliases)
    openai = partial(Route, _POST, form=Form.OPENAI, generates=True)
    codecs: dict[bytes, Codec] = {
        b"/v1/chat/completions": codec("messages"),
        b"/v1/completions": codec("prompt"),
        b"/v1/responses": codec("input", may_keep_state=True),
    }
    embeddings, models = b"/v1/embeddings", b"/v1/models"
    messages, count = b"/v1/messages", b"/v1/messages/count_tokens"
    return {
        **{path: openai(path, codec, streams_events=True) for path, codec in codecs.items()},
        embeddings: openai(embeddings, codec("input", samples=False)),
        messages: Route(
            _POST,
            messages,
            codec("messages"),
            form=Form.ANTHROPIC,
            generates=True,
            streams_events=True,
        ),
        count: Route(_POST, count, codec(), form=Form.ANTHROPIC),
        models: Route(_GET, models, form=Form.OPENAI, lists="data", lists_aliases=True),
        b"/v1/models/": Route(
            _GET, b"/v1/models/", form=Form.OPENAI, suffix=_MODEL, names_model=True
        ),
    }


def _unread_rows() -> dict[bytes, Route]:
    """Return the rows for images and audio, whose bodies are not read."""
    paths = (b"/v1/images/generations", b"/v1/images/edits", b"/v1/audio/transcriptions")
    return {
        path: Route(
            _POST,
            path,
            access=Access.ANY_MODEL,
            form=Form.OPENAI,
            upload=Upload.LIMITED,
            generates=True,
        )
        for path in paths
    }


def _managing_rows() -> dict[bytes, Route]:
    """Return the rows for admins: they change models or use the Ollama server's account."""
    changing = {
        b"/api/pull": _POST,
        b"/api/create": _POST,
        b"/api/copy": _POST,
        b"/api/delete": (b"DELETE",),
    }
    account = (
        b"/api/push",
        b"/api/me",
        b"/api/signout",
        b"/api/experimental/web_search",
        b"/api/experimental/web_fetch",
    )
    blobs, keys = b"/api/blobs/", b"/api/user/keys/"
    admin, limited = Access.ADMIN, Upload.LIMITED
    return {
        **{
            path: Route(methods, path, access=admin, upload=limited, manages=True)
            for path, methods in changing.items()
        },
        **{path: Route(_POST, path, access=admin, upload=limited) for path in account},
        blobs: Route((b"HEAD", b"POST"), blobs, access=admin, upload=Upload.ANY_SIZE, suffix=_BLOB),
        keys: Route((b"DELETE",), keys, access=admin, upload=limited, suffix=_KEY_NAME),
    }


HOME = Route(_GET, None, access=Access.OPEN, page="home")
"""`GET /` of a browser; that of all others is Ollama's."""


def _page_rows() -> dict[bytes, Route]:
    """Return the rows of OllProx's own pages."""
    return {
        b"/health": Route(_GET, None, access=Access.OPEN, page="health"),
        b"/ready": Route(_GET, None, access=Access.OPEN, page="ready"),
        b"/dashboard": Route(_GET, None, access=Access.OPEN, page="dashboard"),
        b"/metrics": Route(_GET, None, page="metrics"),
        b"/metrics.json": Route(_GET, None, page="view"),
        b"/usage": Route(_GET, None, page="usage"),
        b"/whoami": Route(_GET, None, page="whoami"),
        b"/cache": Route((b"DELETE",), None, access=Access.ADMIN, page="drop"),
    }


POOL_API = Api(
    normalize=normalize_model,
    tags=TAGS,
    loaded=LOADED,
    models=b"/v1/models",
    pull=b"/api/pull",
    delete=b"/api/delete",
    blobs=b"/api/blobs/",
    told=frozenset({b"/api/create", b"/api/push"}),
    openai=_V1,
)
