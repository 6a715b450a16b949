"""OllProx's own pages: health, readiness, metrics, the dashboard, and dropping the cache."""

import asyncio
import base64
import hashlib
import json
import pkgutil
import re
from collections.abc import Awaitable, Callable
from urllib.parse import parse_qsl

from access.rights import Key
from answers.flight import Flights
from answers.models import Probe
from answers.notes import JSON
from answers.permits import Permits
from answers.shared import SharedCache
from answers.stored import StoredAnswer
from cache import Cache
from settings import normalize_model
from watch.metrics import Metrics, Viewer
from watch.usage import NOT_KEPT, REPORT_TIMEOUT, Usage, UsageError, parse_query, prefers_csv, shown
from wire.http11 import Head, Headers, HTTPError, Response

_TEXT = b"text/plain; version=0.0.4; charset=utf-8"  # Prometheus's exposition format
_FRESH: Headers = ((b"Cache-Control", b"no-store"),)


class Pages:
    """OllProx's own pages, by the names in the route table.

    Args:
        probe: checks whether upstream answers.
        cache: the stored answers, which `DELETE /cache` drops.
        flights: the answers under way, which `DELETE /cache` grounds.
        metrics: the figures.
        permits: the limits of keys, and the queue.
        usage: the usage by day; None if it is not kept.
        shared: the shared cache, which `DELETE /cache` drops too; None if there is none.

    """

    def __init__(
        self,
        probe: Probe,
        cache: Cache[StoredAnswer],
        flights: Flights,
        metrics: Metrics,
        permits: Permits,
        usage: Usage | None = None,
        shared: SharedCache | None = None,
    ) -> None:
        self._probe = probe
        self._cache = cache
        self._flights = flights
        self._metrics = metrics
        self._permits = permits
        self._shared = shared
        self._dashboard = pkgutil.get_data("watch", "dashboard.html") or b""  # also in a zip
        self._usage = usage
        self._policy = _policy(self._dashboard)
        self._by_name: dict[str, Callable[[Head, Key | None], Awaitable[Response]]] = {
            "health": self._health,
            "ready": self._ready,
            "home": self._home,
            "dashboard": self._page,
            "metrics": self._text,
            "view": self._view,
            "usage": self._report,
            "whoami": self._whoami,
            "drop": self._drop,
        }

    async def answer(self, name: str, head: Head, key: Key | None) -> Response:
        """Return a page; `key` is None on a route that needs none. Raises HTTPError."""
        return await self._by_name[name](head, key)

    def _viewer(self, key: Key | None) -> Viewer:
        """Return what a key may see and do. If it is the only key, it may see everything."""
        assert key is not None, "a page with figures needs a key"
        sees_all = key.admin or key.metrics or len(self._metrics.keys) == 1
        return Viewer(key.label, sees_all, key.admin)

    async def _health(self, head: Head, key: Key | None) -> Response:
        return _json({"status": "ok"})

    async def _ready(self, head: Head, key: Key | None) -> Response:
        if not await self._probe.ready():
            raise HTTPError(503, "Ollama does not answer")
        return _json({"status": "ready"})

    async def _home(self, head: Head, key: Key | None) -> Response:
        """Lead a browser to the dashboard."""
        return Response(302, ((b"Location", b"/dashboard"), (b"Vary", b"Accept")), b"")

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
        await self._probe.look()
        return _json(self._metrics.view(self._viewer(key)), _FRESH)

    async def _whoami(self, head: Head, key: Key | None) -> Response:
        """Return a key's label, its rights, and its use of its limits."""
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

    async def _report(self, head: Head, key: Key | None) -> Response:
        """Report usage: of all keys to admins, and to others of their own label."""
        assert key is not None
        if self._usage is None:
            raise HTTPError(404, NOT_KEPT)
        form = "csv" if prefers_csv((head.get(b"accept") or b"").decode("latin-1")) else "json"
        try:
            query = parse_query(head.query.decode("latin-1"), form)
            if not (key.admin or key.metrics):
                query = query._replace(own=shown(key))
            async with asyncio.timeout(REPORT_TIMEOUT):
                text = await asyncio.wrap_future(self._usage.ask(query))
        except ValueError as error:
            raise HTTPError(400, str(error)) from None
        except UsageError as error:
            raise HTTPError(503, f"USAGE_FILE cannot be read: {error}") from None
        except TimeoutError:
            raise HTTPError(503, f"no report within {REPORT_TIMEOUT:g} s; try again") from None
        kind = JSON if query.form == "json" else b"text/csv; charset=utf-8"
        return Response(200, ((b"Content-Type", kind), *_FRESH), text.encode())

    async def _drop(self, head: Head, key: Key | None) -> Response:
        """Drop all stored answers, or those of `?model=NAME`; ground the answers under way.

        The shared cache is dropped as a whole, and so is what other processes have in memory.
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
    """Return a key's options by name: flags are True, and repeated options are joined."""
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
