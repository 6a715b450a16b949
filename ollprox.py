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
from collections.abc import Awaitable, Callable
from functools import partial

import answers.ollama_api as api
import startup
from answers.flight import Flights, Timeouts
from answers.models import ModelWatch, Probe
from answers.stored import StoredAnswer
from cache import Budget, Cache
from keystore import KeyStore, take_credential
from proxy import Proxy
from record import Record
from settings import Settings, SettingsError, address, load
from watch.metrics import Metrics
from watch.pages import Pages
from watch.telemetry import AccessLog, LineWriter, setup_logging
from wire.http11 import parse_request_head
from wire.server import Limits, Server
from wire.upstream import Upstream

__version__ = "0.1.0"

LAG_INTERVAL = 0.5  # seconds between two measurements of the event-loop lag

log = logging.getLogger("ollprox")


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


async def run(settings: Settings, keys: KeyStore, writer: LineWriter) -> int:
    """Serve until a signal; return the exit status."""
    upstream = _make_upstream(settings)
    routes = api.route_table(settings.max_object_bytes)
    budget = Budget(settings.cache_max_bytes)
    cache: Cache[StoredAnswer] = Cache(budget, settings.cache_ttl)
    timeouts = Timeouts(settings.write_timeout, settings.idle_timeout, settings.first_byte_timeout)
    flights = Flights(settings.cache_max_entry_bytes, budget, upstream.exchange, timeouts)
    metrics = Metrics(
        __version__, cache, flights, keys, lambda: len(server.clients), lambda: upstream.requests
    )
    flights.ended = metrics.count_flight
    probe = Probe(upstream)
    models = ModelWatch(probe, cache, flights, metrics.know)
    pages = Pages(settings.admin_labels, probe, cache, flights, metrics)
    proxy = Proxy(settings, keys, upstream, routes, cache, flights, models, pages.answer)
    access_log = AccessLog(writer, settings.log_level)

    def done(record: Record) -> None:
        metrics.count(record)
        access_log(record)

    server = Server(
        proxy.handle,
        proxy.render_error,
        partial(
            parse_request_head,
            take_credential=partial(take_credential, keys.salt, settings.api_key_in_path),
        ),
        done,
        Limits(
            max_head=settings.max_head_bytes,
            head_timeout=settings.head_timeout,
            keepalive_timeout=settings.keepalive_timeout,
            body_timeout=settings.body_timeout,
            write_timeout=settings.write_timeout,
            max_connections=startup.raise_file_limit(settings.max_connections),
        ),
    )
    certificate = startup.Certificate(settings) if settings.tls_cert_file else None
    tls = certificate.context if certificate else None
    asyncio.get_running_loop().set_exception_handler(startup.LoopErrors())
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
    reload = partial(_reload, keys, certificate)
    chores = [
        asyncio.create_task(_each(1.0, partial(_tidy, server, upstream, flights))),
        asyncio.create_task(_each(settings.key_refresh, reload, signals.reload)),
        asyncio.create_task(_watch_lag(metrics)),
        asyncio.create_task(_report_upstream(probe, upstream.address)),
    ]
    if settings.model_refresh:
        refresh = _each(settings.model_refresh, models.refresh, models.due)
        chores.append(asyncio.create_task(refresh))
    await signals.first.wait()
    log.info(
        "stopping: %d clients have %g s to finish", len(server.clients), settings.drain_timeout
    )
    drain = asyncio.create_task(server.drain(settings.drain_timeout))
    second = asyncio.create_task(signals.second.wait())
    await asyncio.wait({drain, second}, return_when=asyncio.FIRST_COMPLETED)
    await server.abort()
    for task in (drain, second, *chores):
        task.cancel()
    await asyncio.wait([drain, second, *chores])
    await upstream.close()
    log.debug("%d tasks are left", len(asyncio.all_tasks()) - 1)  # but for this one
    return 0


async def _each(
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
        metrics.note_lag(max(0.0, time.monotonic() - due))


async def _report_upstream(probe: Probe, address: str) -> None:
    print(startup.describe_upstream(await probe.version(), address), flush=True)


async def _check(settings: Settings, keys: KeyStore) -> int:
    """Print what would be done and what answers in Ollama's place; return the exit status."""
    print(f"would listen on {settings.listen_scheme}://{settings.listen_address}")
    print(startup.describe(settings, keys))
    upstream = _make_upstream(settings)
    await _report_upstream(Probe(upstream), upstream.address)
    await upstream.close()
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
            return asyncio.run(run(settings, keys, writer))
        finally:
            writer.close()
    except SettingsError as error:
        startup.complain(str(error))
        return startup.EXIT_SETTINGS


if __name__ == "__main__":
    sys.exit(main())
