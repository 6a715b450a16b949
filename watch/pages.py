"""OllProx's own pages: health, readiness, metrics, the dashboard, and dropping the cache."""

import base64
import hashlib
import json
import re
from collections.abc import Awaitable, Callable
from urllib.parse import parse_qsl

from answers.flight import Flights
from answers.models import Probe
from answers.notes import JSON
from answers.permits import Permits
from answers.shared import SharedCache
from answers.stored import StoredAnswer
from cache import Cache
from keystore import Key
from settings import ROOT, normalize_model
from watch.metrics import Metrics, Viewer
from wire.http11 import Head, Headers, HTTPError, Response

_TEXT = b"text/plain; version=0.0.4; charset=utf-8"  # Prometheus's exposition format
_FRESH: Headers = ((b"Cache-Control", b"no-store"),)


class Pages:
    """The pages, each by its name in the route table.

    Args:
        probe: knows whether upstream answers.
        cache: whose answers `DELETE /cache` drops.
        flights: whose answers are then not stored.
        metrics: the counts.
        permits: the limits of keys, and the queue.
        shared: the shared cache, which `DELETE /cache` drops too; None if there is none.

    """

    def __init__(
        self,
        probe: Probe,
        cache: Cache[StoredAnswer],
        flights: Flights,
        metrics: Metrics,
        permits: Permits,
        shared: SharedCache | None = None,
    ) -> None:
        self._probe = probe
        self._cache = cache
        self._flights = flights
        self._metrics = metrics
        self._permits = permits
        self._shared = shared
        self._dashboard = (ROOT / "watch" / "dashboard.html").read_bytes()
        self._policy = _policy(self._dashboard)
        self._by_name: dict[str, Callable[[Head, Key | None], Awaitable[Response]]] = {
            "health": self._health,
            "ready": self._ready,
            "dashboard": self._page,
            "metrics": self._text,
            "view": self._view,
            "whoami": self._whoami,
            "drop": self._drop,
        }

    async def answer(self, name: str, head: Head, key: Key | None) -> Response:
        """Return a page for a key, None on an open route. Raises HTTPError."""
        return await self._by_name[name](head, key)

    def _viewer(self, key: Key | None) -> Viewer:
        """Return what a key may see and do. A key that is alone may see everything."""
        assert key is not None, "a page with figures needs a key"
        sees_all = key.admin or key.metrics or len(self._metrics.keys) == 1
        return Viewer(key.label, sees_all, key.admin)

    async def _health(self, head: Head, key: Key | None) -> Response:
        return _json({"status": "ok"})

    async def _ready(self, head: Head, key: Key | None) -> Response:
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
        text = self._metrics.text(self._viewer(key))
        return Response(200, ((b"Content-Type", _TEXT), *_FRESH), text.encode())

    async def _view(self, head: Head, key: Key | None) -> Response:
        return _json(self._metrics.view(self._viewer(key)), _FRESH)

    async def _whoami(self, head: Head, key: Key | None) -> Response:
        """Tell a key's holder its label, its rights, and how it stands against its limits."""
        assert key is not None
        limits, turns = self._permits
        waiting = turns.of_key(key.digest)[1]
        permits = [flight.permit for flight in self._flights if flight.permit is not None]
        running = sum(permit.key.digest == key.digest for permit in permits) - waiting
        standing = limits.standing(key)
        used: dict[str, int | None] = {"running": running, "waiting": waiting}
        resets: dict[str, float | None] = {}
        for name in ("rate", "tokens"):  # None where there is no such limit
            used[name] = standing[name].used if name in standing else None
            resets[name] = round(standing[name].resets, 3) if name in standing else None
        view = {"label": key.label, "rights": _rights(key), "used": used, "resets": resets}
        return _json(view, _FRESH)

    async def _drop(self, head: Head, key: Key | None) -> Response:
        """Drop all stored answers, or those of `?model=NAME`; answers under way are not stored.

        All answers of the shared cache are dropped, and all that other processes have in memory.
        """
        wanted = parse_qsl(head.query.decode("latin-1"), keep_blank_values=True)
        names = [value for name, value in wanted if name == "model" and value]
        if len(wanted) > 1 or len(names) != len(wanted):
            raise HTTPError(400, "DELETE /cache takes at most one parameter, ?model=NAME")
        model = normalize_model(names[0]) if names else None
        dropped = drop(self._cache, self._flights, model)
        if self._shared is not None:
            try:
                await self._shared.purge()
            finally:  # meanwhile old answers may have come from it
                dropped += drop(self._cache, self._flights, model)
        return _json({"dropped": dropped})


def drop(cache: Cache[StoredAnswer], flights: Flights, model: str | None = None) -> int:
    """Drop a model's stored answers, or all, from memory; answers under way are not stored."""
    flights.ground(lambda name: model in {None, name})
    return cache.drop(lambda answer: model in {None, answer.model})


def _rights(key: Key) -> dict[str, object]:
    """Return the options of a key by name: flags are true, and what stands twice is joined."""
    found: dict[str, object] = {}
    for name, value in key.rights():
        if name in found:
            value = f"{found[name]} {value}"
        found[name] = int(value) if value.isdecimal() else value or True
    return found


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
