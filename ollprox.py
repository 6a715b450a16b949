"""OllProx: a proxy for Ollama that checks API keys and caches answers.

This module builds the parts and runs the process; `proxy.py` decides how each request is
answered. `python ollprox.py --help` says how to start it.
"""

try:
    import h11  # noqa: F401 - to print what to do before another import fails
except ModuleNotFoundError:
    raise SystemExit(
        "ollprox: h11 is not installed: `make run` installs it in .venv and starts OllProx;"
        " or install requirements.txt"
    ) from None

import argparse
import asyncio
import contextlib
import logging
import os
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import answers.ollama_api as api
import startup
from answers.flight import Flights, Timeouts
from answers.limits import Limits
from answers.models import ModelWatch, Probe
from answers.permits import Permits
from answers.schedule import CountedSlots
from answers.shared import CONFIRM_INTERVAL, EPOCH_KEY, WATCH_INTERVAL, Codec, SharedCache
from answers.shared_limits import SharedLimits
from answers.stored import StoredAnswer
from answers.turns import Turns, fair_queue
from cache import Budget, Cache
from gate import Gate
from keystore import KeyStore, take_credential
from proxy import Proxy
from record import Record
from settings import Settings, SettingsError, address, load
from watch.metrics import Metrics, UpstreamState
from watch.pages import Pages, drop
from watch.telemetry import AccessLog, LineWriter, setup_logging
from wire.forwarded import behind
from wire.http11 import Exchange, parse_request_head
from wire.server import Limits as ClientLimits
from wire.server import Server
from wire.upstream import Upstream

__version__ = "0.1.0"

LAG_INTERVAL = 0.5  # seconds between two measurements of the event-loop lag

log = logging.getLogger("ollprox")


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of the program that are started and stopped; the others are held by these."""

    settings: Settings
    keys: KeyStore
    certificate: startup.Certificate | None
    upstream: Upstream
    probe: Probe
    models: ModelWatch
    flights: Flights
    turns: Turns
    metrics: Metrics
    server: Server
    shared: SharedCache | None
    shared_limits: SharedLimits | None


def build(settings: Settings, keys: KeyStore, writer: LineWriter) -> Parts:
    """Build the parts, without starting anything. Raises SettingsError."""
    upstream = _make_upstream(settings)
    budget = Budget(settings.cache_max_bytes)
    cache: Cache[StoredAnswer] = Cache(budget, settings.cache_ttl)
    turns = Turns(
        CountedSlots(settings.max_generations),
        settings.queue_max,
        settings.queue_timeout,
        budget,
    )
    exchange: Exchange = fair_queue(upstream.exchange)
    limits = Limits()
    shared = shared_limits = None
    if (valkey := startup.cache_server(settings)) is not None:
        codec = Codec(startup.secret_bytes(settings.cache_secret))
        shared = SharedCache(
            valkey, codec, lambda: models, settings.cache_ttl, lambda: drop(cache, flights)
        )
        exchange = shared.before(exchange)
        shared_limits = SharedLimits(valkey, codec)
        limits.on_spend = shared_limits.spend
    flights = Flights(
        settings.cache_max_entry_bytes,
        budget,
        exchange,
        Timeouts(settings.write_timeout, settings.idle_timeout, settings.first_byte_timeout),
    )
    permits = Permits(limits, turns)
    probe = Probe(upstream)
    metrics = Metrics(
        __version__,
        cache,
        flights,
        keys,
        connections=lambda: len(server.clients),
        upstream_requests=lambda: upstream.requests,
        upstreams=lambda: [_upstream_state(upstream, probe, turns, metrics)],
        queue=turns.snapshot,
        shared=shared.counts if shared is not None else None,
    )
    flights.ended = metrics.count_flight
    models = ModelWatch(probe, cache, flights, metrics.set_models)
    pages = Pages(probe, cache, flights, metrics, permits, shared)
    routes = api.route_table(settings.max_object_bytes)
    gate = Gate(settings, keys, routes)
    proxy = Proxy(
        *(settings, gate, routes, cache, flights, permits, models, pages.answer),
        *(shared, shared_limits),
    )
    access_log = AccessLog(writer, settings.log_level)

    def done(record: Record) -> None:
        metrics.count(record)
        access_log(record)

    take = partial(take_credential, keys.salt, settings.api_key_in_path)
    trusted = settings.trusted_proxies
    server = Server(
        behind(proxy.handle, trusted) if trusted else proxy.handle,
        proxy.render_error,
        partial(parse_request_head, take_credential=take),
        done,
        _client_limits(settings),
    )
    certificate = startup.Certificate(settings) if settings.tls_cert_file else None
    return Parts(
        *(settings, keys, certificate, upstream, probe, models, flights, turns, metrics, server),
        *(shared, shared_limits),
    )


async def serve(parts: Parts) -> int:
    """Serve until a signal; return the exit status."""
    settings, server, keys = parts.settings, parts.server, parts.keys
    asyncio.get_running_loop().set_exception_handler(startup.LoopErrors())
    tls = parts.certificate.context if parts.certificate else None
    try:
        port = await server.listen(settings.listen_host, settings.listen_port, tls)
    except OSError as error:
        return startup.cannot_listen(settings, error)
    signals = startup.Signals()
    where = f"{settings.listen_scheme}://{address(settings.listen_host, port)}"
    print(f"OllProx {__version__} listens on {where}")
    print(startup.describe(settings, keys), flush=True)
    if not len(keys):
        print(startup.make_key(keys, settings.listen_scheme, port), flush=True)
    startup.tune_collector()
    chores = [asyncio.create_task(chore) for chore in _chores(parts, signals)]
    await signals.first.wait()
    await stop(parts, signals)
    for chore in chores:
        chore.cancel()
    await asyncio.wait(chores)
    if parts.shared is not None:
        await parts.shared.server.close()
    log.debug("%d tasks are left", len(asyncio.all_tasks()) - 1)  # without this one
    return 0


async def stop(parts: Parts, signals: startup.Signals) -> None:
    """Let the answers under way end, at most until the second signal; then cut what is left."""
    server, seconds = parts.server, parts.settings.drain_timeout
    log.info("stopping: %d clients have %g s to finish", len(server.clients), seconds)
    parts.turns.drain()
    ends = [
        asyncio.create_task(server.drain(seconds)),
        asyncio.create_task(signals.second.wait()),
    ]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    await server.abort()
    for task in ends:
        task.cancel()
    await asyncio.wait(ends)
    await parts.upstream.close()


def _chores(parts: Parts, signals: startup.Signals) -> Iterator[Coroutine[Any, Any, None]]:
    """Return what is done in the background, from the start to the end."""
    settings, models = parts.settings, parts.models
    reload = partial(_reload, parts.keys, parts.certificate)
    yield repeat(1.0, partial(_tidy, parts.server, parts.upstream, parts.flights))
    yield repeat(settings.key_refresh, reload, signals.reload)
    yield _watch_lag(parts.metrics)
    yield _report_upstream(parts.probe, parts.upstream.address)
    if settings.model_refresh:
        yield repeat(settings.model_refresh, models.refresh, models.due)
    if (shared := parts.shared) is not None:
        yield repeat(WATCH_INTERVAL, shared.watch)
        yield repeat(CONFIRM_INTERVAL, shared.flush, shared.news)
    if (limits := parts.shared_limits) is not None:
        yield repeat(CONFIRM_INTERVAL, limits.flush, limits.news)


def _make_upstream(settings: Settings) -> Upstream:
    return Upstream(
        settings.ollama_host,
        settings.ollama_port,
        settings.upstream_address,
        connect_timeout=settings.connect_timeout,
        first_byte_timeout=settings.first_byte_timeout,
        idle_timeout=settings.idle_timeout,
        tls=startup.upstream_tls(settings),
    )


def _client_limits(settings: Settings) -> ClientLimits:
    return ClientLimits(
        max_head=settings.max_head_bytes,
        head_timeout=settings.head_timeout,
        keepalive_timeout=settings.keepalive_timeout,
        body_timeout=settings.body_timeout,
        write_timeout=settings.write_timeout,
        max_connections=startup.raise_file_limit(settings.max_connections),
    )


def _upstream_state(
    upstream: Upstream, probe: Probe, turns: Turns, metrics: Metrics
) -> UpstreamState:
    waiting = len(turns)
    return UpstreamState(
        upstream.address,
        up=probe.up is not False,
        running=max(0, metrics.running - waiting),
        waiting=waiting,
        errors=metrics.upstream_errors,
    )


async def repeat(
    seconds: float, chore: Callable[[], Awaitable[object]], soon: asyncio.Event | None = None
) -> None:
    """Run a chore now, every so many seconds, and whenever `soon` is set.

    An exception of the chore is logged, and the next run is tried.
    """
    soon = soon or asyncio.Event()
    while True:
        soon.clear()
        try:
            await chore()
        except Exception:
            log.exception("a chore failed by a fault of OllProx")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await soon.wait()


async def _run(settings: Settings, keys: KeyStore, writer: LineWriter) -> int:
    return await serve(build(settings, keys, writer))


async def _tidy(server: Server, upstream: Upstream, flights: Flights) -> None:
    server.check_deadlines(asyncio.get_running_loop().time())
    flights.sweep()
    upstream.sweep()


async def _reload(keys: KeyStore, certificate: startup.Certificate | None) -> None:
    """Read the key file and the certificate again if they have changed."""
    if certificate:
        await certificate.poll()
    result = await asyncio.to_thread(keys.poll)
    if result is None:
        return
    for level, line in keys.adopt(result):
        log.log(level, "%s", line)


async def _watch_lag(metrics: Metrics) -> None:
    """Measure the event-loop lag."""
    while True:
        due = time.monotonic() + LAG_INTERVAL
        await asyncio.sleep(LAG_INTERVAL)
        metrics.tick(max(0.0, time.monotonic() - due))


async def _report_upstream(probe: Probe, address: str) -> None:
    print(startup.describe_upstream(await probe.version(), address), flush=True)


async def _check(settings: Settings, keys: KeyStore) -> int:
    """Print what would be done and what answers in Ollama's place; return the exit status."""
    print(f"would listen on {settings.listen_scheme}://{settings.listen_address}")
    print(startup.describe(settings, keys))
    upstream = _make_upstream(settings)
    await _report_upstream(Probe(upstream), upstream.address)
    await upstream.close()
    if (valkey := startup.cache_server(settings)) is not None:
        print(await startup.describe_cache(valkey, EPOCH_KEY))
        await valkey.close()
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="ollprox.py",
        description="A proxy for Ollama that checks API keys and caches answers."
        " Settings come from the environment and .env; the README lists them."
        " SIGHUP reloads the key file and the certificate, SIGTERM drains and stops.",
    )
    parser.add_argument("--version", action="version", version=f"OllProx {__version__}")
    parser.add_argument(
        "--check",
        action="store_true",
        help="check the settings, the key file and Ollama, then exit; the status is 2 if a setting"
        " is wrong, and 0 otherwise, even if Ollama is down",
    )
    parser.add_argument(
        "--ping", action="store_true", help="exit with 0 if OllProx is running with these settings"
    )
    chosen = parser.parse_args(arguments)
    try:
        settings = load(os.environ)
        if chosen.ping:
            return startup.ping(settings)
        writer = LineWriter(sys.stderr.fileno(), as_json=settings.log_format == "json")
        setup_logging(settings.log_level, writer)
        try:
            startup.check(settings)
            keys = startup.open_keys(settings)
            if chosen.check:
                return asyncio.run(_check(settings, keys))
            return asyncio.run(_run(settings, keys, writer))
        finally:
            writer.close()
    except SettingsError as error:
        startup.complain(str(error))
        return startup.EXIT_SETTINGS


if __name__ == "__main__":
    sys.exit(main())
