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
import ssl
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import answers.ollama_api as api
import startup
from access.credentials import take_credential
from answers.flight import Flight, Flights, Timeouts
from answers.limits import Limits
from answers.models import RECHECK_INTERVAL, ModelWatch, PoolProbe, Probe
from answers.permits import Permits
from answers.questions import MAX_DIGITS
from answers.schedule import CountedSlots
from answers.shared import CONFIRM_INTERVAL, EPOCH_KEY, WATCH_INTERVAL, Sealer, SharedCache
from answers.shared_limits import SharedLimits
from answers.stored import StoredAnswer
from answers.turns import Ticket, Turns, fair_queue
from cache import Budget, Cache
from gate import Gate
from keystore import KeyStore
from proxy import Proxy
from record import Record
from settings import COMMAND, Settings, SettingsError, address, load, program_path
from watch.check import Mark, Report, memory, valid_until
from watch.metrics import Metrics, UpstreamState
from watch.pages import Pages, drop
from watch.telemetry import AccessLog, LineWriter, setup_logging
from watch.usage import NOT_KEPT, Opened, Usage, UsageError, earlier, open_file, print_report
from wire.forwarded import behind
from wire.http11 import Ask, Exchange, parse_request_head
from wire.pool import Pool
from wire.roster import Health, Member, Slot
from wire.server import Limits as ClientLimits
from wire.server import Server
from wire.upstream import Upstream

__version__ = "0.2.0"

MAX_LISTED = 10  # models that --check names
LAG_INTERVAL = 0.5  # seconds between two measurements of the event-loop lag

log = logging.getLogger("ollprox")


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of the program that are started, stopped, or run in the background."""

    settings: Settings
    keys: KeyStore
    certificate: startup.Certificate | None
    upstream: Upstream | Pool
    probe: Probe
    models: ModelWatch
    flights: Flights
    turns: Turns
    metrics: Metrics
    usage: Usage | None
    server: Server
    shared: SharedCache | None
    shared_limits: SharedLimits | None


def build(
    settings: Settings, keys: KeyStore, writer: LineWriter, opened: Opened | None = None
) -> Parts:
    """Build the parts, without starting anything; `opened` is the usage file.

    Raises:
        SettingsError: a setting cannot be used.

    """
    upstream = _make_upstream(settings)
    budget = Budget(settings.cache_max_bytes)
    cache: Cache[StoredAnswer] = Cache(budget, settings.cache_ttl)
    several = upstream if isinstance(upstream, Pool) else None
    turns = Turns(
        several or CountedSlots(settings.max_generations),
        settings.queue_max,
        settings.queue_timeout,
        budget,
    )
    exchange: Exchange = fair_queue(upstream.exchange)
    limits = Limits(earlier=earlier(opened.kept, time.time())) if opened else Limits()
    shared = shared_limits = None
    if (valkey := startup.cache_server(settings)) is not None:
        sealer = Sealer(startup.secret_bytes(settings.cache_secret))
        shared = SharedCache(
            valkey, sealer, lambda: models, settings.cache_ttl, lambda: drop(cache, flights)
        )
        exchange = shared.before(exchange)
        shared_limits = SharedLimits(valkey, sealer)
        limits.on_spend = shared_limits.spend
    flights = Flights(
        settings.cache_max_entry_bytes,
        budget,
        exchange,
        Timeouts(settings.write_timeout, settings.idle_timeout, settings.first_byte_timeout),
    )
    permits = Permits(limits, turns)
    probe = PoolProbe(upstream) if isinstance(upstream, Pool) else Probe(upstream)
    metrics = Metrics(
        __version__,
        cache,
        flights,
        keys,
        connections=lambda: len(server.clients),
        upstream_requests=lambda: upstream.requests,
        upstreams=lambda: _upstream_states(settings, upstream, probe, turns, metrics),
        queue=turns.snapshot,
        shared=shared.counts if shared is not None else None,
        limits=limits.in_use,
    )
    usage = _make_usage(opened, metrics) if opened else None

    def flight_ended(flight: Flight) -> None:
        metrics.count_flight(flight)
        if usage is not None:
            usage.count_flight(flight)
        if flight.error is not None and flight.error.kind == "unreachable":
            probe.suspect()

    flights.ended = flight_ended
    models = ModelWatch(probe, cache, flights, metrics.set_models)
    pages = Pages(probe, cache, flights, metrics, permits, usage, shared)
    routes = api.route_table(settings.max_object_bytes, settings.model_aliases)
    if several is not None:
        routes.hosts = frozenset(host.name.encode() for host in settings.hosts)
    gate = Gate(settings, keys, routes)
    proxy = Proxy(
        *(settings, gate, routes, cache, flights, permits, models, pages.answer),
        *(shared, shared_limits),
    )
    access_log = AccessLog(writer, settings.log_level)

    def done(record: Record) -> None:
        metrics.count(record)
        if usage is not None:
            usage.count(record)
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
        *(settings, keys, certificate, upstream, probe, models, flights, turns, metrics),
        *(usage, server, shared, shared_limits),
    )


async def serve(parts: Parts) -> int:
    """Serve until a signal; return the exit status."""
    settings, server, keys = parts.settings, parts.server, parts.keys
    if isinstance(parts.upstream, Pool):
        await parts.upstream.tick()  # the first request needs to know which server has its model
    asyncio.get_running_loop().set_exception_handler(startup.LoopErrors())
    tls = parts.certificate.context if parts.certificate else None
    try:
        port = await server.listen(settings.listen_host, settings.listen_port, tls)
    except OSError as error:
        return startup.cannot_listen(settings, error)
    signals = startup.Signals()
    where = f"{settings.listen_scheme}://{address(settings.listen_host, port)}"
    print(f"OllProx {__version__} listens on {where}")
    print(startup.describe(settings, keys))
    print(f"dashboard     {startup.dashboard_url(settings, port)}", flush=True)
    if not len(keys):
        print(startup.make_key(keys, settings.listen_scheme, port), flush=True)
    startup.tune_collector()
    if parts.usage is not None:
        parts.usage.start()
    chores = [asyncio.create_task(chore) for chore in _chores(parts, signals)]
    await signals.first.wait()
    await stop(parts, signals)
    for chore in chores:
        chore.cancel()
    await asyncio.wait(chores)
    if parts.shared is not None:
        await parts.shared.server.close()
    parts.metrics.close()
    if parts.usage is not None:
        parts.usage.close()
    log.debug("%d tasks are left", len(asyncio.all_tasks()) - 1)  # without this one
    return 0


async def stop(parts: Parts, signals: startup.Signals) -> None:
    """Stop: let answers finish until DRAIN_TIMEOUT or the second signal, then abort the rest."""
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
    """Yield the background tasks of the whole run."""
    settings, models = parts.settings, parts.models
    reload = partial(_reload, parts.keys, parts.certificate, signals.reload)
    yield repeat(1.0, partial(_tidy, parts.server, parts.upstream, parts.flights))
    yield repeat(settings.key_refresh, reload, signals.reload)
    yield _watch_lag(parts.metrics)
    yield _report_upstreams(_probes(parts.upstream, parts.probe))
    yield repeat(RECHECK_INTERVAL, parts.probe.recheck, parts.probe.due)
    if settings.model_refresh:
        yield repeat(settings.model_refresh, models.refresh, models.due)
    if (shared := parts.shared) is not None:
        yield repeat(WATCH_INTERVAL, shared.watch)
        yield repeat(CONFIRM_INTERVAL, shared.flush, shared.news)
    if (limits := parts.shared_limits) is not None:
        yield repeat(CONFIRM_INTERVAL, limits.flush, limits.news)
    if isinstance(parts.upstream, Pool):
        parts.upstream.changed = partial(_on_change, parts)
        yield repeat(1.0, partial(_poll, parts.upstream, parts.turns))


def _make_upstream(settings: Settings) -> Upstream | Pool:
    """Return the Ollama server of the settings, or a pool if there are several."""
    tls = startup.upstream_tls(settings)
    upstreams = [
        Upstream(
            host.host,
            host.port,
            host.address,
            connect_timeout=settings.connect_timeout,
            first_byte_timeout=settings.first_byte_timeout,
            idle_timeout=settings.idle_timeout,
            tls=tls if host.tls else None,
            authorization=host.authorization.encode(),
        )
        for host in settings.hosts
    ]
    if len(upstreams) == 1:
        return upstreams[0]
    slots = settings.max_generations
    members = [Member(host.name, host.weight, slots) for host in settings.hosts]
    return Pool(
        dict(zip(members, upstreams, strict=True)),
        api.POOL_API,
        model_refresh=settings.model_refresh,
        slot_of=_slot_of,
    )


def _slot_of(ask: Ask) -> Slot | None:
    """Return the slot that the fair queue took for a request."""
    slot = ask.ticket.slot if isinstance(ask.ticket, Ticket) else None
    return slot if isinstance(slot, Slot) else None


def _make_usage(opened: Opened, metrics: Metrics) -> Usage:
    """Make the usage counter, and restore the metrics of the last days from its file."""
    usage = metrics.usage = Usage(opened, metrics.known)
    for hour in opened.kept.hours:
        metrics.restore(hour)
    metrics.minute_ended = usage.count_minute
    return usage


def _client_limits(settings: Settings) -> ClientLimits:
    return ClientLimits(
        max_head=settings.max_head_bytes,
        head_timeout=settings.head_timeout,
        keepalive_timeout=settings.keepalive_timeout,
        body_timeout=settings.body_timeout,
        write_timeout=settings.write_timeout,
        max_connections=startup.raise_file_limit(settings.max_connections),
    )


def _upstream_states(
    settings: Settings, upstream: Upstream | Pool, probe: Probe, turns: Turns, metrics: Metrics
) -> list[UpstreamState]:
    """Return the state of each server.

    A request in the queue that several servers may answer waits for each of them.
    """
    if isinstance(upstream, Pool):
        conflicts = upstream.conflicts()
        waiting: Counter[str] = Counter()
        for model, count in Counter(row.model for row in turns.snapshot().waiting).items():
            waiting.update(dict.fromkeys(upstream.able(model), count))
        return [
            UpstreamState(
                status.name,
                up=status.health is Health.UP,
                running=status.running,
                waiting=waiting[status.name],
                errors=status.errors,
                models=status.loaded,
                conflicts=[model for name, model in sorted(conflicts) if name == status.name],
            )
            for status in upstream.statuses()
        ]
    return [
        UpstreamState(
            settings.hosts[0].name,
            up=probe.up is not False,
            running=max(0, metrics.running - len(turns)),
            waiting=len(turns),
            errors=metrics.upstream_errors,
            models=probe.loaded,
        )
    ]


async def repeat(
    seconds: float, chore: Callable[[], Awaitable[object]], soon: asyncio.Event | None = None
) -> None:
    """Run a background task now, then every `seconds`, and whenever `soon` is set.

    An exception is logged, and does not stop the next run.
    """
    soon = soon or asyncio.Event()
    while True:
        soon.clear()
        try:
            await chore()
        except Exception:
            log.exception("a background task failed because of a bug in OllProx")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await soon.wait()


async def _run(
    settings: Settings, keys: KeyStore, writer: LineWriter, opened: Opened | None
) -> int:
    return await serve(build(settings, keys, writer, opened))


async def _tidy(server: Server, upstream: Upstream | Pool, flights: Flights) -> None:
    server.check_deadlines(asyncio.get_running_loop().time())
    flights.sweep()
    upstream.sweep()


async def _reload(
    keys: KeyStore, certificate: startup.Certificate | None, again: asyncio.Event
) -> None:
    """Read the key file and the certificate if they have changed; `again` has it called again."""
    if certificate:
        await certificate.poll()
    result = await asyncio.to_thread(keys.poll)
    if result is None:
        return
    if isinstance(result, float):  # the key file is unfinished
        asyncio.get_running_loop().call_later(result, again.set)
        return
    for level, line in keys.adopt(result):
        log.log(level, "%s", line)


async def _watch_lag(metrics: Metrics) -> None:
    """Measure the event-loop lag."""
    while True:
        due = time.monotonic() + LAG_INTERVAL
        await asyncio.sleep(LAG_INTERVAL)
        metrics.tick(max(0.0, time.monotonic() - due))


async def _poll(pool: Pool, turns: Turns) -> None:
    """Poll the servers; give freed slots, such as a recovered server's, to waiting requests."""
    await pool.tick()
    turns.wake()


def _on_change(parts: Parts) -> None:
    """Look at the models and the slots again, since a server came, went, or changed its models."""
    parts.models.due.set()
    parts.turns.wake()


def _probes(upstream: Upstream | Pool, probe: Probe) -> list[Probe]:
    """Return a probe for each server: if there is only one, the one that there is."""
    return [Probe(one) for one in upstream.servers] if isinstance(upstream, Pool) else [probe]


async def _report_upstreams(probes: list[Probe]) -> None:
    """Print what answers at each server's address."""
    versions = await asyncio.gather(*(probe.version() for probe in probes))
    for probe, version in zip(probes, versions, strict=True):
        print(startup.describe_upstream(version, probe.address), flush=True)


def _load(say: Callable[[str], None]) -> Settings:
    """Read the settings; in a container, look for Ollama on its host too, and `say` so.

    Raises:
        SettingsError: one of them has a bad value.

    """
    settings = load(os.environ)
    outside = startup.host_of_container(settings) if startup.in_our_container() else None
    if outside is None:
        return settings
    say(f"No Ollama at {settings.upstream_address} in this container: trying {outside}")
    return load({**os.environ, "OLLAMA_HOST": outside})


def _print_usage(settings: Settings, query: str) -> int:
    """Print a table of usage; return the exit status. Raises SettingsError."""
    if not settings.usage_file:
        raise SettingsError(NOT_KEPT)
    try:
        print_report(settings.usage_path, settings.usage_days, query)
    except ValueError as error:
        raise SettingsError(f"--usage: {error}") from None
    except UsageError as error:
        startup.complain(f"USAGE_FILE {settings.usage_path} cannot be read: {error}")
        return startup.EXIT_FAILED
    return 0


def _check() -> int:
    """Report on what a start depends on; return the exit status, 0 if OllProx would start."""
    report = Report()
    with report.section("settings"):
        settings = _load(partial(report.say, Mark.OK))
        startup.check(settings)
        where = f"{settings.listen_scheme}://{settings.listen_address}"
        report.say(Mark.OK, f"listens on {where}, forwards to {startup.describe_hosts(settings)}")
        report.say(Mark.OK, f"cache: {startup.describe_cache(settings)}")
    if report.failed:
        return startup.EXIT_SETTINGS
    with report.section("keys"):
        _check_keys(report, startup.open_keys(settings))
    asyncio.run(_check_ollama(report, _make_upstream(settings)))
    if settings.cache_url:
        with report.section("shared"):
            asyncio.run(_check_shared_cache(report, settings))
    with report.section("TLS"):
        _check_certificate(report, settings)
    with report.section("limits"):
        _check_limits(report, settings)
    return startup.EXIT_SETTINGS if report.failed else 0


def _check_keys(report: Report, keys: KeyStore) -> None:
    if len(keys):
        report.say(Mark.OK, f"{len(keys)} from {keys.path}")
        return
    where = f"none in {keys.path}" if keys.path else "none (API_KEY_FILE is not set)"
    then = f"to make a lasting one: {startup.command()} keys add --label me"
    report.say(Mark.WARN, f"{where}: each start makes one; {then}")


async def _check_ollama(report: Report, upstream: Upstream | Pool) -> None:
    versions = []
    with report.section("Ollama"):
        for each in _probes(upstream, Probe(upstream)):
            versions.append(version := await each.version())
            text = startup.describe_upstream(version, each.address).removeprefix("Ollama ")
            report.say(Mark.OK if isinstance(version, str) else Mark.WARN, text)
    with report.section("models"):
        answers = any(isinstance(version, str) for version in versions)
        found = await Probe(upstream).digests() if answers else None
        if found:
            names = [*found][:MAX_LISTED] + ["..."] * (len(found) > MAX_LISTED)
            report.say(Mark.OK, f"{len(found)}: {', '.join(names)}")
        elif answers:
            none = "none yet; to get one: ollama pull llama2"
            report.say(Mark.WARN, "the list cannot be read" if found is None else none)
    await upstream.close()


async def _check_shared_cache(report: Report, settings: Settings) -> None:
    if (valkey := startup.cache_server(settings)) is None:
        return
    problem = await startup.try_cache(valkey, EPOCH_KEY)
    await valkey.close()
    what = f"does not answer yet: {problem}" if problem else "answers"
    report.say(Mark.WARN if problem else Mark.OK, f"{settings.cache_server} {what}")


def _check_certificate(report: Report, settings: Settings) -> None:
    if not settings.tls_cert_file:
        report.say(Mark.OK, "off (TLS_CERT_FILE is not set)")
        return
    file = program_path(settings.tls_cert_file)
    try:
        until = valid_until(startup.Certificate(settings).context, file)
    except ssl.SSLCertVerificationError as error:
        report.say(Mark.WARN, f"clients will not trust {file}: {error.verify_message}")
    else:
        report.say(Mark.OK, f"{file} is valid until {until}")


def _check_limits(report: Report, settings: Settings) -> None:
    clients = startup.raise_file_limit(settings.max_connections)
    if clients == settings.max_connections:
        report.say(Mark.OK, f"{clients} clients at once (MAX_CONNECTIONS)")
    available = memory()
    if available is not None and settings.cache_max_bytes > available // 2:
        size = available >> 20
        report.say(Mark.WARN, f"CACHE_MAX_BYTES is more than half of the memory, {size} MiB")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["keys"]:
        from access import keytool  # here, because the server does not need it

        return keytool.main(arguments[1:], f"{COMMAND} keys")
    parser = argparse.ArgumentParser(
        prog="ollprox",
        description="A proxy for Ollama that checks API keys and caches answers."
        " Settings come from the environment and .env; the README lists them."
        " SIGHUP reloads the key file and the certificate, SIGTERM drains and stops."
        " `keys new|add|list|revoke|hash|salt` makes API keys: see `keys --help`.",
    )
    parser.add_argument("--version", action="version", version=f"OllProx {__version__}")
    parser.add_argument(
        "--check",
        action="store_true",
        help="report on the settings, the key file, Ollama, TLS and the system's limits, then exit;"
        " the status is 2 if a setting is wrong, and 0 otherwise, even if Ollama is down",
    )
    parser.add_argument(
        "--ping", action="store_true", help="exit with 0 if OllProx is running with these settings"
    )
    parser.add_argument(
        "--usage",
        nargs="?",
        const="",
        metavar="QUERY",
        help="print the usage by day, key and model from USAGE_FILE, then exit; QUERY chooses as in"
        " GET /usage, such as 'from=2026-11-01&by=key'",
    )
    chosen = parser.parse_args(arguments)
    sys.set_int_max_str_digits(MAX_DIGITS)
    try:
        if chosen.ping:
            return startup.ping(load(os.environ))
        if chosen.check:
            return _check()
        settings = _load(print)
        if chosen.usage is not None:
            return _print_usage(settings, chosen.usage)
        writer = LineWriter(sys.stderr.fileno(), as_json=settings.log_format == "json")
        setup_logging(settings.log_level, writer)
        try:
            startup.check(settings)
            opened = None
            if settings.usage_file:
                opened = open_file(settings.usage_path, settings.usage_days, time.time())
            keys = startup.open_keys(settings, opened.kept.salt if opened else b"")
            return asyncio.run(_run(settings, keys, writer, opened))
        finally:
            writer.close()
    except SettingsError as error:
        startup.complain(str(error))
        return startup.EXIT_SETTINGS


if __name__ == "__main__":
    sys.exit(main())
