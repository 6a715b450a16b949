"""What OllProx answers by itself: its health, its metrics, the dashboard, and the cache's end."""

import base64
import hashlib
import json
import re
from collections.abc import Awaitable, Callable
from urllib.parse import parse_qsl

from answers.flight import Flights
from answers.models import Probe
from answers.notes import JSON
from answers.stored import StoredAnswer
from cache import Cache
from settings import ROOT, normalize_model
from watch.metrics import Metrics
from wire.http11 import Head, Headers, HTTPError, Response

_TEXT = b"text/plain; version=0.0.4; charset=utf-8"  # Prometheus's exposition format
_FRESH: Headers = ((b"Cache-Control", b"no-store"),)


class Pages:
    """The pages, each by its name in the route table.

    Args:
        admins: the labels of ADMIN_LABELS.
        probe: knows whether upstream answers.
        cache: can be emptied.
        flights: whose answers shall not be stored then.
        metrics: what is counted.

    """

    def __init__(
        self,
        admins: tuple[str, ...],
        probe: Probe,
        cache: Cache[StoredAnswer],
        flights: Flights,
        metrics: Metrics,
    ) -> None:
        self._admins = admins
        self._probe = probe
        self._cache = cache
        self._flights = flights
        self._metrics = metrics
        self._dashboard = (ROOT / "watch" / "dashboard.html").read_bytes()
        self._policy = _policy(self._dashboard)
        self._by_name: dict[str, Callable[[Head, Key | None], Awaitable[Response]]] = {
            "health": self._health,
            "ready": self._ready,
            "dashboard": self._page,
            "metrics": self._text,
            "view": self._view,
            "drop": self._drop,
        }

    async def answer(self, name: str, head: Head, key: Key | None) -> Response:
        """Answer a request for a page, by a key, None on an open route. Raises HTTPError."""
        return await self._by_name[name](head, key)

    async def _health(self, head: Head, key: Key | None) -> Response:
        return _json({"status": "ok"})

    async def _ready(self, head: Head, label: str) -> Response:
        if not await self._probe.ready():
            raise HTTPError(503, "Ollama does not answer")
        return _json({"status": "ready"})

    async def _page(self, head: Head, key: Key | None) -> Response:
        headers = (
            (b"Content-Type", b"text/html; charset=utf-8"),
            (b"Content-Security-Policy", self._policy),
            (b"X-Content-Type-Options", b"nosniff"),
            (b"Referrer-Policy", b"no-referrer"),
            (b"Cache-Control", b"no-cache"),
        )
        return Response(200, headers, self._dashboard)

    async def _text(self, head: Head, key: Key | None) -> Response:
        text = self._metrics.text(by_label=self._metrics.may_see_labels(key))
        return Response(200, ((b"Content-Type", _TEXT), *_FRESH), text.encode())

    async def _view(self, head: Head, key: Key | None) -> Response:
        by_label = self._metrics.may_see_labels(key)
        return _json(self._metrics.view(by_label=by_label), _FRESH)

    async def _drop(self, head: Head, key: Key | None) -> Response:
        """Drop all answers, or with `?model=NAME` one model's, those under way included."""
        wanted = parse_qsl(head.query.decode("latin-1"), keep_blank_values=True)
        names = [value for name, value in wanted if name == "model" and value]
        if len(wanted) > 1 or len(names) != len(wanted):
            raise HTTPError(400, "DELETE /cache takes at most one parameter, ?model=NAME")
        model = normalize_model(names[0]) if names else None
        dropped = self._cache.drop(lambda answer: model in {None, answer.model})
        self._flights.ground(lambda name: model in {None, name})
        return _json({"dropped": dropped})


def _json(value: object, headers: Headers = ()) -> Response:
    body = json.dumps(value, separators=(",", ":")).encode()
    return Response(200, ((b"Content-Type", JSON), *headers), body)


def _policy(page: bytes) -> bytes:
    """Write a Content-Security-Policy that allows a page its own script and style alone."""
    script, style = (
        base64.b64encode(hashlib.sha256(found[1]).digest())
        for tag in (b"script", b"style")
        if (found := re.search(rb"<%b>(.*?)</%b>" % (tag, tag), page, re.DOTALL))
    )
    return (
        b"default-src 'none'; script-src 'sha256-%b'; style-src 'sha256-%b'; img-src data:;"
        b" connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ) % (script, style)
