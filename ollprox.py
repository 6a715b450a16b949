"""OllProx: a proxy for Ollama that checks API keys and answers from its cache.

This wires the parts and runs the process; `proxy.py` says how each request is answered.
`python ollprox.py --help` tells how to start it.
"""

try:
    import h11  # noqa: F401 - to say what to do before anything else fails for lack of it
except ModuleNotFoundError:
    raise SystemExit(
        "ollprox: h11 is not installed: `make run` puts it into .venv and starts OllProx, or"
        " install requirements.txt and start again"
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
from answers.flight import Flights
from answers.models import Inquiry, ModelWatch
from answers.stored import StoredAnswer
from cache import Cache
from keystore import KeyStore, take_credential
from proxy import Proxy
from record import Record
from settings import Settings, SettingsError, address, load
from watch.metrics import Metrics, UpstreamState, Viewer
from watch.pages import Pages
from watch.telemetry import AccessLog, LineWriter, setup_logging, shown
from wire.http11 import parse_request_head
from wire.server import Limits, Server
from wire.upstream import Upstream

__version__ = "0.1.0"

LAG_INTERVAL = 0.5  # seconds between two looks at how late the event loop is

log = logging.getLogger("ollprox")


async def run(settings: Settings, keys: KeyStore, writer: LineWriter) -> int:
    """Serve until a signal; return the exit status."""
    upstream = Upstream(
        settings.ollama_host,
        settings.ollama_port,
        settings.upstream_address,
        connect_timeout=settings.connect_timeout,
        first_byte_timeout=settings.first_byte_timeout,
        idle_timeout=settings.idle_timeout,
        tls=startup.upstream_tls(settings),
    )
    routes = api.route_table(settings.max_object_bytes)
    cache: Cache[StoredAnswer] = Cache(settings.cache_max_bytes, settings.cache_ttl)
    flights = Flights(settings.cache_max_entry_bytes, cache)
    metrics = Metrics(
        __version__,
        cache,
        flights,
        keys,
        connections=lambda: len(server.clients),
        upstream_requests=lambda: upstream.requests,
        upstreams=lambda: [
            UpstreamState(
                upstream.address,
                up=inquiry.up,
                running=metrics.running,
                waiting=len(metrics.queue().waiting),
                errors=metrics.upstream_errors,
            )
        ],
    )
    flights.ended = metrics.count_flight
    inquiry = Inquiry(upstream)
    models = ModelWatch(inquiry, cache, flights, metrics.set_models)

    def viewer(label: str) -> Viewer:
        admin = label in settings.admin_labels
        return Viewer(label, admin or len(keys.labels) == 1, admin)

    pages = Pages(viewer, inquiry, cache, flights, metrics)
    proxy = Proxy(settings, keys, upstream, routes, cache, flights, pages.answer)
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
    if not keys.labels:
        print(startup.make_key(keys, settings.listen_scheme, port), flush=True)
    collector = startup.Collector(cache, metrics.connections)
    chores = [
        asyncio.create_task(_each(1.0, partial(_tidy, server, upstream))),
        asyncio.create_task(_each(settings.key_refresh, lambda: _poll_keys(keys))),
        asyncio.create_task(_watch_lag(metrics)),
        asyncio.create_task(_say_upstream(inquiry, upstream.address)),
        asyncio.create_task(_each(1.0, collector.poll)),
    ]
    if certificate:
        chores.append(asyncio.create_task(_each(settings.key_refresh, certificate.poll)))
    if settings.model_refresh:
        changed = proxy.models_changed
        chores.append(asyncio.create_task(_each(settings.model_refresh, models.refresh, changed)))
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
    seconds: float, chore: Callable[[], Awaitable[None]], soon: asyncio.Event | None = None
) -> None:
    """Do a chore again and again, first at once, and at once when it is due `soon`.

    A fault of it is logged and survived.
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


async def _tidy(server: Server, upstream: Upstream) -> None:
    server.check_deadlines(asyncio.get_running_loop().time())
    upstream.sweep()


async def _poll_keys(keys: KeyStore) -> None:
    result = await asyncio.to_thread(keys.poll)
    if result is None:
        return
    for level, line in keys.adopt(result):
        log.log(level, "%s", line)


async def _watch_lag(metrics: Metrics) -> None:
    """Measure the event loop's lag."""
    while True:
        due = time.monotonic() + LAG_INTERVAL
        await asyncio.sleep(LAG_INTERVAL)
        metrics.tick(max(0.0, time.monotonic() - due))


async def _say_upstream(inquiry: Inquiry, address: str) -> None:
    said = await inquiry.version()
    if isinstance(said, str):
        print(f"Ollama {shown(said)} answers at {address}", flush=True)
    else:
        print(f"Ollama does not answer yet; requests are tried all the same. {said}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="ollprox.py",
        description="A proxy for Ollama that checks API keys and answers from its cache."
        " Settings come from the environment and .env; the README has a table of them.",
    )
    parser.add_argument("--version", action="version", version=f"OllProx {__version__}")
    parser.add_argument("--check", action="store_true", help="check the settings and the key file")
    parser.add_argument(
        "--ping", action="store_true", help="ask the running OllProx if it is alive"
    )
    chosen = parser.parse_args(arguments)
    try:
        settings = load(os.environ)
        if chosen.ping:
            return startup.ping(settings)
        writer = LineWriter(sys.stderr.fileno(), as_json=settings.log_format == "json")
        setup_logging(settings.log_level, writer)
        try:
            keys = startup.open_keys(settings)
            startup.check(settings)
            if chosen.check:
                print(f"would listen on {settings.listen_scheme}://{settings.listen_address}")
                print(startup.describe(settings, keys))
                return 0
            return asyncio.run(run(settings, keys, writer))
        finally:
            writer.close()
    except SettingsError as error:
        startup.complain(str(error))
        return startup.EXIT_SETTINGS


if __name__ == "__main__":
    sys.exit(main())
