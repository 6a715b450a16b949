"""OllProx's own pages: health, readiness, metrics, the dashboard, and dropping the cache."""

import base64
import hashlib
import json
import re
from collections.abc import Awaitable, Callable
from urllib.parse import parse_qsl

import answers.ollama_api as api
from answers.flight import Flights
from answers.models import Inquiry
from answers.notes import JSON
from answers.stored import StoredAnswer
from cache import Cache
from settings import ROOT
from watch.metrics import Metrics, Viewer
from wire.http11 import Head, Headers, HTTPError, Response

_TEXT = b"text/plain; version=0.0.4; charset=utf-8"  # Prometheus's exposition format
_FRESH: Headers = ((b"Cache-Control", b"no-store"),)


class Pages:
    """The pages, each by its name in the route table.

    Args:
        viewer: returns what the key with a label may see and do.
        inquiry: knows whether upstream answers.
        cache: whose answers `DELETE /cache` drops.
        flights: whose answers are then not stored.
        metrics: the counts.

    """

    def __init__(
        self,
        viewer: Callable[[str], Viewer],
        inquiry: Inquiry,
        cache: Cache[StoredAnswer],
        flights: Flights,
        metrics: Metrics,
    ) -> None:
        self._viewer = viewer
        self._inquiry = inquiry
        self._cache = cache
        self._flights = flights
        self._metrics = metrics
        self._dashboard = (ROOT / "watch" / "dashboard.html").read_bytes()
        self._policy = _policy(self._dashboard)
        self._by_name: dict[str, Callable[[Head, str], Awaitable[Response]]] = {
            "health": self._health,
            "ready": self._ready,
            "dashboard": self._page,
            "metrics": self._text,
            "view": self._view,
            "drop": self._drop,
        }

    async def answer(self, name: str, head: Head, label: str) -> Response:
        """Return a page for the key with this label. Raises HTTPError."""
        return await self._by_name[name](head, label)

    async def _health(self, head: Head, label: str) -> Response:
        return _json({"status": "ok"})

    async def _ready(self, head: Head, label: str) -> Response:
        if not await self._inquiry.ready():
            raise HTTPError(503, "Ollama does not answer")
        return _json({"status": "ready"})

    async def _page(self, head: Head, label: str) -> Response:
        headers = (
            (b"Content-Type", b"text/html; charset=utf-8"),
            (b"Content-Security-Policy", self._policy),
            (b"X-Content-Type-Options", b"nosniff"),
            (b"Referrer-Policy", b"no-referrer"),
            (b"Cache-Control", b"no-cache"),
        )
        return Response(200, headers, self._dashboard)

    async def _text(self, head: Head, label: str) -> Response:
        text = self._metrics.text(self._viewer(label))
        return Response(200, ((b"Content-Type", _TEXT), *_FRESH), text.encode())

    async def _view(self, head: Head, label: str) -> Response:
        return _json(self._metrics.view(self._viewer(label)), _FRESH)

    async def _drop(self, head: Head, label: str) -> Response:
        """Drop all stored answers, or those of `?model=NAME`; answers under way are not stored."""
        wanted = parse_qsl(head.query.decode("latin-1"), keep_blank_values=True)
        names = [value for name, value in wanted if name == "model" and value]
        if len(wanted) > 1 or len(names) != len(wanted):
            raise HTTPError(400, "DELETE /cache takes at most one parameter, ?model=NAME")
        model = api.normalised(names[0]) if names else None
        dropped = self._cache.drop(lambda answer: model in {None, answer.model})
        self._flights.ground(lambda name: model in {None, name})
        return _json({"dropped": dropped})


def _json(value: object, headers: Headers = ()) -> Response:
    body = json.dumps(value, separators=(",", ":")).encode()
    return Response(200, ((b"Content-Type", JSON), *headers), body)


def _policy(page: bytes) -> bytes:
    """Return a Content-Security-Policy that allows only the page's own script and style."""
    script, style = (
        base64.b64encode(hashlib.sha256(found[1]).digest())
        for tag in (b"script", b"style")
        if (found := re.search(rb"<%b>(.*?)</%b>" % (tag, tag), page, re.DOTALL))
    )
    return (
        b"default-src 'none'; script-src 'sha256-%b'; style-src 'sha256-%b'; img-src data:;"
        b" connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ) % (script, style)
