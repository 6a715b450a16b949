"""Parts of OllProx, for tests without a process."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, fields, replace
from typing import Any

from client import KEY

from access.credentials import salted_digest
from access.rights import Key
from answers.flight import Flights
from answers.limits import Limits
from answers.models import ModelWatch, Probe
from answers.ollama_api import RouteTable, route_table
from answers.permits import Permits
from answers.schedule import CountedSlots
from answers.stored import StoredAnswer
from answers.turns import Turns, fair_queue
from cache import Budget, Cache
from gate import Gate
from keystore import KeyStore
from proxy import Proxy
from settings import Settings
from wire.http11 import Exchange, Head, Response
from wire.upstream import Upstream


def make_upstream(port: int = 1) -> Upstream:
    """Return an upstream at a port of this machine, where nothing needs to listen."""
    return Upstream(
        "127.0.0.1",
        port,
        f"127.0.0.1:{port}",
        connect_timeout=5,
        first_byte_timeout=5,
        idle_timeout=5,
    )


def make_keys(**labels: str) -> KeyStore:
    """Return a key store with one key for each label, as in `mary="key"`; by default only KEY."""
    store = KeyStore.open(None, b"salt")
    keys: dict[bytes, Key] = {}
    for label, key in (labels or {"tester": KEY}).items():
        store.accept_only(key.encode(), label)
        keys |= store._keys
    store._keys = keys
    return store


@dataclass
class Made:
    """A proxy, and the parts that a test may inspect."""

    proxy: Proxy
    cache: Cache[StoredAnswer]
    flights: Flights
    keys: KeyStore
    upstream: Upstream
    models: ModelWatch
    permits: Permits


def make_proxy(
    upstream: Upstream | None = None,
    *,
    exchange: Exchange | None = None,
    keys: KeyStore | None = None,
    routes: RouteTable | None = None,
    **overrides: Any,
) -> Made:
    """Return a proxy; `overrides` are settings. An `exchange` replaces the upstream."""
    settings = replace(Settings(), **overrides)
    upstream, keys = upstream or make_upstream(), keys or make_keys()
    routes = routes or route_table(settings.max_object_bytes, settings.model_aliases)
    budget = Budget(settings.cache_max_bytes)
    cache: Cache[StoredAnswer] = Cache(budget, settings.cache_ttl)
    slots = CountedSlots(settings.max_generations)
    turns = Turns(slots, settings.queue_max, settings.queue_timeout, budget)
    queued = fair_queue(exchange or upstream.exchange)
    flights = Flights(settings.cache_max_entry_bytes, budget, queued)
    permits = Permits(Limits(), turns)
    models = ModelWatch(Probe(upstream), cache, flights, lambda names: None)

    async def page(name: str, head: Head, key: Key | None) -> Response:
        raise NotImplementedError

    gate = Gate(settings, keys, routes)
    proxy = Proxy(settings, gate, routes, cache, flights, permits, models, page)
    return Made(proxy, cache, flights, keys, upstream, models, permits)


def make_head(keys: KeyStore | None = None, key: str = KEY, **overrides: Any) -> Head:
    """Return the head of a request to `/api/generate` with a key; `overrides` are its fields."""
    salt = keys.salt if keys is not None else b"salt"
    values: dict[str, Any] = {
        "method": b"POST",
        "path": b"/api/generate",
        "query": b"",
        "headers": (),
        "credentials": (salted_digest(salt, key.encode()),),
        "length": 2,
        "chunked": False,
        "keep_alive": True,
        "expects_continue": False,
        "http10": False,
        "has_body": True,
        "names": frozenset(name for name, _ in overrides.get("headers", ())),
    }
    known = {field.name for field in fields(Head)}
    assert known >= values.keys() | overrides.keys()
    return Head(**values | overrides)


class OneBody:
    """A request whose body has arrived."""

    def __init__(self, head: Head, body: bytes) -> None:
        self.head = head
        self._body = body

    async def read(self, limit: int) -> bytes:
        return self._body

    def pieces(self, limit: int = 0) -> AsyncIterator[bytes]:
        raise NotImplementedError
