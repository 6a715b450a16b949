"""Ollama's API: its routes, the form of its errors, and what OllProx asks for itself.

Pure: nothing here waits or reads a clock. Sources are Ollama's server/routes.go (0.33), its API
pages (docs/api.md, docs/openai.md), and recorded exchanges with Ollama 0.13.5 and 0.33.0.
`questions.py` reads the bodies of requests.
"""

import difflib
import enum
import json
import re
from dataclasses import dataclass

from answers.notes import SSE, dump
from answers.questions import Codec, Native, PassThrough
from settings import normalize_model

MAX_HINTED = 64  # bytes of an unknown path for which a similar one is looked for


class Access(enum.Enum):
    """Who may use a route."""

    OPEN = "anybody"
    KEY = "any valid API key"
    ANY_MODEL = "API keys that may use every model, as the body is not read"
    ADMIN = "keys whose label is in ADMIN_LABELS"


class Upload(enum.Enum):
    """How a request's body reaches upstream."""

    NONE = "there is none, or the route's codec reads it and writes it again"
    LIMITED = "streamed through unread, up to MAX_BODY_BYTES"
    ANY_SIZE = "streamed through unread, of any size"


class Form(enum.Enum):
    """The form of an API's errors."""

    OLLAMA = "ollama"
    OPENAI = "openai"
    ANTHROPIC = "anthropic"

    def body(self, status: int, message: str) -> bytes:
        """Return an error's body."""
        if self is Form.OLLAMA:  # of a 401 its command line shows `status` and nothing else
            return dump({"error": message, **({"status": message} if status == 401 else {})})
        kind = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}.get(
            status, "invalid_request_error" if status < 500 else "api_error"
        )
        if self is Form.ANTHROPIC:
            return dump({"type": "error", "error": {"type": kind, "message": message}})
        error = {"message": message, "type": kind, "param": None, "code": None}
        return dump({"error": error})

    def line(self, content_type: bytes, message: str) -> bytes:
        """Return the line, or event, that ends a truncated stream."""
        body = self.body(502, message)
        if not content_type.startswith(SSE):
            return body + b"\n"
        event = b"event: error\n" if self is Form.ANTHROPIC else b""
        return event + b"data: %b\n\n" % body


@dataclass(frozen=True, slots=True)
class Route:
    """One route: who may use it, and what OllProx does with a request.

    `target` is the path upstream; None if OllProx answers by itself, with the page that `page`
    names. `suffix` is a pattern of the name that the client puts behind the path. `codec` reads
    the body; without one the answer is never stored.
    """

    methods: tuple[bytes, ...]
    target: bytes | None
    codec: Codec | None = None
    access: Access = Access.KEY
    form: Form = Form.OLLAMA
    suffix: bytes = b""
    upload: Upload = Upload.NONE
    page: str = ""
    generates: bool = False  # a model works for it, so that it needs a turn
    manages: bool = False  # it changes models, so that stored answers may become wrong
    lists: str = ""  # the name of the list of models in the answer
    names_model: bool = False  # the suffix is the name of a model

    @property
    def takes_compressed(self) -> bool:
        """Whether the body may be compressed, as clients of OpenAI's API send it."""
        return self.codec is not None and self.form is not Form.OLLAMA


REMOTE = "remote:"


def digests(body: bytes) -> dict[str, str] | None:
    """Read `/api/tags`: each model's digest by its normalized name; None if it is malformed.

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


def version(body: bytes) -> str:
    """Read `/api/version`; "unknown" if there is none in it."""
    try:
        found = json.loads(body)["version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return "unknown"
    return found[:40] if isinstance(found, str) else "unknown"


class RouteTable:
    """The routes, by exact path; a few end in a name that the client chooses."""

    def __init__(self, rows: dict[bytes, Route]) -> None:
        self.rows = rows

    def find(self, path: bytes) -> tuple[Route, bytes] | None:
        """Return a path's route and the path to ask upstream for."""
        if (route := self.rows.get(path)) is not None and not route.suffix:
            return route, route.target or path
        for prefix, route in self.rows.items():
            name = path.removeprefix(prefix)
            if route.suffix and name != path and re.fullmatch(route.suffix, name):
                return route, prefix + name
        return None

    def form(self, path: bytes) -> Form:
        """Return the form of errors on a path, known or not."""
        if (found := self.find(path)) is not None:
            return found[0].form
        return Form.OPENAI if path.startswith(_V1) else Form.OLLAMA

    def hint(self, path: bytes) -> str:
        """Return which path an unknown one was probably meant to be, as a question."""
        if len(path) > MAX_HINTED:
            return "see the README for the paths it has"
        plain = re.sub(rb"/+", b"/", path).rstrip(b"/").lower()
        bare = re.sub(rb"\A(?:/(?:api|v1))+(?=/)", b"", plain)  # as a wrong base URL gives them
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
VERSION = b"/api/version"  # what OllProx asks for itself
TAGS = b"/api/tags"
_POST, _GET = (b"POST",), (b"GET", b"HEAD")

# A model's name as Ollama allows it; a slash or colon in it may be percent-encoded.
_PART = rb"(?i:[a-z0-9](?:[\w.:@-]|%3a)*)"
_MODEL = _PART + rb"(?:(?:/|(?i:%2f))" + _PART + rb"){0,3}"
_BLOB = rb"sha256[:-][0-9a-f]{64}"
_KEY_NAME = rb"[A-Za-z0-9_=-]{1,1024}"  # a public key in URL-safe Base64


def route_table(max_object: int) -> RouteTable:
    """Return the table. `max_object` is the limit of a fold, in bytes."""
    return RouteTable(
        _native_rows(max_object) | _v1_rows() | _unread_rows() | _managing_rows() | _page_rows()
    )


def _native_rows(max_object: int) -> dict[bytes, Route]:
    """Return the rows of Ollama's own API."""
    generate, chat = b"/api/generate", b"/api/chat"
    embed = PassThrough("input", samples=False, without=("keep_alive",))
    old_embed = PassThrough("prompt", samples=False, without=("keep_alive",), repeats_model=False)
    codecs: dict[bytes, Codec] = {
        b"/call_model": Native("prompt", streams=False, max_object=max_object),
        generate: Native("prompt", max_object=max_object),
        chat: Native("messages", max_object=max_object),
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
        b"/api/show": Route(_POST, b"/api/show", PassThrough()),
        **{path: Route(_GET, path) for path in (*reads, recommendations)},
        **{path: Route(_GET, path, lists="models") for path in (TAGS, b"/api/ps")},
    }


def _v1_rows() -> dict[bytes, Route]:
    """Return the rows of the APIs that Ollama has in common with others."""
    codecs: dict[bytes, Codec] = {
        b"/v1/chat/completions": PassThrough("messages"),
        b"/v1/completions": PassThrough("prompt"),
        b"/v1/embeddings": PassThrough("input", samples=False),
        b"/v1/responses": PassThrough("input", may_keep_state=True),
    }
    messages, count = b"/v1/messages", b"/v1/messages/count_tokens"
    anthropic = PassThrough("messages")
    return {
        **{
            path: Route(_POST, path, codec, form=Form.OPENAI, generates=True)
            for path, codec in codecs.items()
        },
        messages: Route(_POST, messages, anthropic, form=Form.ANTHROPIC, generates=True),
        count: Route(_POST, count, PassThrough(), form=Form.ANTHROPIC),
        b"/v1/models": Route(_GET, b"/v1/models", form=Form.OPENAI, lists="data"),
        b"/v1/models/": Route(
            _GET, b"/v1/models/", form=Form.OPENAI, suffix=_MODEL, names_model=True
        ),
    }


def _unread_rows() -> dict[bytes, Route]:
    """Return the rows of media, whose bodies are large or multipart."""
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
    """Return the rows for admins: they change models, or use the account of the Ollama server."""
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


def _page_rows() -> dict[bytes, Route]:
    """Return the rows of OllProx's own pages."""
    return {
        b"/health": Route(_GET, None, access=Access.OPEN, page="health"),
        b"/ready": Route(_GET, None, access=Access.OPEN, page="ready"),
        b"/dashboard": Route(_GET, None, access=Access.OPEN, page="dashboard"),
        b"/metrics": Route(_GET, None, page="metrics"),
        b"/metrics.json": Route(_GET, None, page="view"),
        b"/whoami": Route(_GET, None, page="whoami"),
        b"/cache": Route((b"DELETE",), None, access=Access.ADMIN, page="drop"),
    }
