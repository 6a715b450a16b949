"""Count what OllProx does; report it as text for Prometheus and as JSON for the dashboard.

Every number comes from the record of a request at its end, from a flight at its end, or
from a part of the program when somebody looks. Only known models and labels get their own
series, and their number is bounded, so clients cannot add series.
"""

import os
import time
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from answers.flight import Ending, Flight, Flights, Source
from answers.limits import Standing
from answers.shared import Counts as SharedCounts
from answers.turns import Refusal, Snapshot
from cache import Cache
from keystore import KeyStore
from record import Outcome, Record, Usage
from settings import normalize_model
from watch.telemetry import MAX_SHOWN

MAX_NAMES = 1000  # models, and labels, that are counted separately
MAX_LISTED = 100  # answers being generated, and requests waiting, that the page lists
MAX_RECENT = 1000  # requests that are remembered
MAX_SHOWN_REQUESTS = 200  # of these, the newest ones that a key may see
OTHER = "other"  # all models, or labels, beyond MAX_NAMES
HOUR = 3600.0  # seconds that the page looks back by minutes
DAYS = 31  # that it looks back at most
BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)  # seconds
ANSWERED: tuple[Outcome, ...] = tuple(outcome for outcome in Outcome if outcome is not Outcome.PAGE)

# What the parts of the program report when somebody looks.


class Viewer(NamedTuple):
    """Whose key looks at the figures."""

    label: str
    sees_all: bool  # the rows of every label, not only of this one
    admin: bool  # may drop stored answers


class UpstreamState(NamedTuple):
    """One Ollama server."""

    host: str
    up: bool
    running: int  # generations
    waiting: int  # generations
    errors: int  # since the start
    models: Sequence[str] = ()  # loaded
    conflicts: Sequence[str] = ()  # models it is not used for, because of their digest


class UsageState(Protocol):
    """How the usage file is doing."""

    @property
    def failures(self) -> int:
        """How many writes have failed."""

    @property
    def pending(self) -> int:
        """How many rows are in memory and not in the file."""


# Prometheus's text format.

Labels = Mapping[str, object]


class Row(NamedTuple):
    """One metric: `gauge`, `counter` or `histogram`, and one value for each set of labels."""

    kind: str
    name: str
    help: str
    value: "float | Iterable[tuple[Labels, float | Histogram]]"


class Histogram:
    """How often something took how many seconds."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one more."""
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.sum += seconds

    def samples(self, name: str, labels: Labels) -> Iterator[str]:
        """Yield its lines: each bucket counts all that took at most its bound."""
        total = 0
        for bound, count in zip((*BUCKETS, "+Inf"), self.counts, strict=True):
            total += count
            yield _sample(f"{name}_bucket", {**labels, "le": bound}, total)
        yield _sample(f"{name}_sum", labels, self.sum)
        yield _sample(f"{name}_count", labels, total)


def exposition(rows: Iterable[Row]) -> str:
    """Write metrics in Prometheus's text format, version 0.0.4."""
    lines: list[str] = []
    for kind, name, meaning, value in rows:
        lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
        for labels, number in [({}, value)] if isinstance(value, int | float) else value:
            if isinstance(number, Histogram):
                lines += number.samples(name, labels)
            else:
                lines.append(_sample(name, labels, number))
    return "\n".join(lines) + "\n"


def _sample(name: str, labels: Labels, value: float) -> str:
    if not labels:
        return f"{name} {value}"
    pairs = ",".join(f'{label}="{_escaped(str(v))}"' for label, v in labels.items())
    return f"{name}{{{pairs}}} {value}"


def _escaped(value: str) -> str:
    # A model's name may hold half a surrogate pair, which UTF-8 cannot express.
    value = value.encode("utf-8", "backslashreplace").decode()
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def process_rows(started: float) -> Iterator[Row]:
    """Yield the usual metrics of a process, by the names that all Prometheus clients use."""
    cpu = time.process_time()
    yield Row("counter", "process_cpu_seconds_total", "CPU time used, in seconds.", cpu)
    meaning = "Start time, in seconds since 1970."
    yield Row("gauge", "process_start_time_seconds", meaning, started)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        files = len(os.listdir("/proc/self/fd"))
        memory = pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, AttributeError):
        return  # not Linux
    yield Row("gauge", "process_resident_memory_bytes", "Memory in use.", memory)
    yield Row("gauge", "process_open_fds", "Open files and sockets.", files)


# What is counted.


@dataclass(slots=True)
class Use:
    """The requests and tokens of one label or one model."""

    requests: int = 0
    saved: int = 0  # requests without GPU time: hits, and joined ones that got a complete answer
    prompt_tokens: int = 0
    tokens: int = 0  # generated


@dataclass(slots=True)
class Total:
    """The sum of many answers' usage; see `Usage`."""

    lines: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    gpu_seconds: float = 0.0

    def add(self, usage: Usage, times: int = 1) -> None:
        """Add one answer, `times` times."""
        self.lines += usage.lines * times
        self.prompt_tokens += usage.prompt_tokens * times
        self.tokens += usage.tokens * times
        self.gpu_seconds += usage.gpu_seconds * times


@dataclass(slots=True)
class Span:
    """The requests for answers of one minute, hour or day, in UTC."""

    start: int  # seconds since 1970
    outcomes: dict[Outcome, int] = field(default_factory=lambda: dict.fromkeys(ANSWERED, 0))
    tokens: int = 0  # generated in it; below 0 if earlier minutes counted too many
    errors: int = 0  # answers that Ollama failed to give

    def add(self, other: "Span") -> None:
        """Add what another counts."""
        for outcome, count in other.outcomes.items():
            self.outcomes[outcome] += count
        self.tokens += other.tokens
        self.errors += other.errors

    def row(self) -> dict[str, int]:
        """Return it for JSON."""
        outcomes = {str(outcome): count for outcome, count in self.outcomes.items()}
        tokens = max(0, self.tokens)
        return {"start": self.start, **outcomes, "tokens": tokens, "errors": self.errors}


class Spans:
    """The latest hours, or days, of requests for answers.

    Args:
        seconds: how long each lasts.
        count: how many are kept.

    """

    def __init__(self, seconds: int, count: int) -> None:
        self._seconds, self._count = seconds, count
        self._spans: deque[Span] = deque(maxlen=count)

    def add(self, minute: Span) -> None:
        """Add a minute at its end, to the hour or the day that it is in."""
        start = minute.start // self._seconds * self._seconds
        if not self._spans or self._spans[-1].start < start:
            self._spans.append(Span(start))
        self._spans[-1].add(minute)

    def rows(self, current: Span, now: float) -> list[dict[str, int]]:
        """Return the spans of the time looked back at, with the current minute in the last."""
        copy = Spans(self._seconds, self._count)
        for span in (*self._spans, current):
            copy.add(span)
        since = now - self._seconds * self._count
        return [span.row() for span in copy._spans if span.start > since]


@dataclass
class Metrics:
    """The counts since the start.

    Args:
        version: OllProx's own.
        cache, flights, keys: the parts that report figures.
        connections: how many clients are connected.
        upstream_requests: how many requests were sent to Ollama.
        upstreams: the Ollama servers.
        queue: the fair queue; `Turns.snapshot`.
        limits: how much of their limits keys have used; `Limits.in_use`.
        usage: how the usage file is doing; None if there is none.
        shared: what the shared cache has done; None if there is none.

    """

    version: str
    cache: Cache[Any]
    flights: Flights
    keys: KeyStore
    connections: Callable[[], int] = lambda: 0
    upstream_requests: Callable[[], int] = lambda: 0
    upstreams: Callable[[], Sequence[UpstreamState]] = lambda: ()
    queue: Callable[[], Snapshot] = lambda: Snapshot([], {}, {})
    limits: Callable[[], Iterable[Standing]] = lambda: ()
    usage: "UsageState | None" = None
    started: float = field(default_factory=time.time)
    shared: Callable[[], SharedCounts] | None = None

    def __post_init__(self) -> None:
        # By route, status and outcome, and by whether the route generates.
        self._requests: dict[tuple[str, int, Outcome, bool], int] = defaultdict(int)
        self._pages: dict[tuple[str, int], int] = defaultdict(int)
        self._first_byte: dict[Outcome, Histogram] = defaultdict(Histogram)
        self._duration: dict[Outcome, Histogram] = defaultdict(Histogram)
        self._queued = Histogram()
        self._by_label: dict[str, Use] = defaultdict(Use)
        self._by_model: dict[str, Use] = defaultdict(Use)
        self._recent: deque[Record] = deque(maxlen=MAX_RECENT)
        # Separate, so that requests without a valid key cannot displace all others.
        self._without_key: deque[Record] = deque(maxlen=MAX_SHOWN_REQUESTS)
        self._minutes = deque([Span(0)], maxlen=60)
        self._minute_ends = 0.0  # end of the current minute, on the monotonic clock
        self._hours, self._days = Spans(3600, 24), Spans(86_400, DAYS)
        self.minute_ended: Callable[[Span], None] = lambda minute: None
        self._ended_tokens = 0  # of answers that have ended; see `_count_tokens`
        self._counted_tokens = 0  # already added to a minute
        self._lags = deque([0.0], maxlen=120)  # seconds; measured every half second
        self._errors: dict[str, int] = defaultdict(int)  # of upstream, by kind
        self._cancelled = 0
        self._wrong_keys = 0
        self._generated = Total()
        self._from_cache = Total()
        self._shared = Total()
        self._models: frozenset[str] = frozenset()  # in upstream's list

    # What happens.

    def count(self, record: Record) -> None:
        """Count a request at its end."""
        status, outcome = record.status, record.outcome
        self._wrong_keys += record.wrong_key
        if outcome is Outcome.PAGE:
            self._pages[record.route, status] += 1
            return
        self._requests[record.route, status, outcome, record.generates] += 1
        started, first_byte = record.started, record.first_byte
        self._duration[outcome].observe(record.ended - started)
        if first_byte is not None:
            self._first_byte[outcome].observe(first_byte - started)
        if record.queued is not None:
            self._queued.observe(record.queued)
        if len(record.model) > MAX_SHOWN:
            kept = copy(record)  # another place still counts by the full name
            kept.model = record.model[:MAX_SHOWN]
        else:
            kept = record
        (self._recent if record.label is not None else self._without_key).append(kept)
        if record.generates:
            self._count_answer(record)

    def _count_answer(self, record: Record) -> None:
        outcome, now = record.outcome, record.ended
        minute = self._minutes[-1] if now < self._minute_ends else self._minute(now)
        minute.outcomes[outcome] += 1
        hit = outcome is Outcome.HIT
        saved = hit or record.shared
        if (label := record.label) is not None:
            use = self._by_label.get(label) or self._use(self._by_label, label)
            use.requests += 1
            use.saved += saved
        if outcome is Outcome.REFUSED:
            return
        model = self.known(record.model)
        use = self._by_model.get(model) or self._use(self._by_model, model)
        use.requests += 1
        use.saved += saved
        if hit:
            self._from_cache.add(record.usage)

    def count_flight(self, flight: Flight) -> None:
        """Count an answer at its end; its readers will receive all of it."""
        minute = self._minute(time.monotonic())
        if flight.ending is Ending.ABANDONED:
            self._cancelled += 1
        if kind := _error_of(flight):
            self._errors[kind] += 1
            minute.errors += kind != "incomplete"
        usage = flight.usage
        generated = flight.source is Source.GENERATED
        if generated:
            self._generated.add(usage)
        if flight.permit is not None:
            self._ended_tokens += usage.tokens or usage.lines
        received = flight.served + len(flight.readers)
        if flight.ending is Ending.COMPLETE and received > 1:
            self._shared.add(usage, received - 1)
        if generated and (usage.tokens or usage.prompt_tokens):
            self._add_tokens(flight, usage)

    def _add_tokens(self, flight: Flight, usage: Usage) -> None:
        uses = []
        if flight.model:
            uses.append(self._use(self._by_model, self.known(flight.model)))
        if flight.permit is not None:
            uses.append(self._use(self._by_label, flight.permit.key.label))
        for use in uses:
            use.prompt_tokens += usage.prompt_tokens
            use.tokens += usage.tokens

    def tick(self, lag: float) -> None:
        """Note the event loop's lag in seconds, and the tokens since the last call."""
        self._lags.append(lag)
        self._count_tokens()

    def _count_tokens(self) -> None:
        """Add the tokens since the last call to the current minute.

        Until Ollama reports their number, each line counts as one token.
        """
        running = sum(
            (usage := flight.notes.usage).tokens or usage.lines
            for flight in self.flights
            if flight.notes is not None and flight.permit is not None
        )
        now = self._ended_tokens + running
        self._minute(time.monotonic()).tokens += now - self._counted_tokens
        self._counted_tokens = now

    def set_models(self, models: Iterable[str]) -> None:
        """Set the names of the models that upstream has."""
        self._models = frozenset(models)

    @property
    def running(self) -> int:
        """Number of answers that are being generated or wait for a turn."""
        return sum(flight.permit is not None for flight in self.flights)

    @property
    def upstream_errors(self) -> int:
        """Number of answers that upstream failed to give."""
        return sum(self._errors.values())

    def known(self, model: str) -> str:
        """Return the name that a model is counted by: `other` if upstream does not list it."""
        name = normalize_model(model)
        return name.removesuffix(":latest") if name in self._models else OTHER

    def _use(self, table: dict[str, Use], name: str) -> Use:
        return table[name if name in table or len(table) < MAX_NAMES else OTHER]

    def _minute(self, now: float) -> Span:
        """Return the current minute."""
        if now >= self._minute_ends:
            self._end_minute()
            into = time.time() % 60
            self._minutes.append(Span(round(time.time() - into)))
            self._minute_ends = now + 60 - into
        return self._minutes[-1]

    def _end_minute(self) -> None:
        """Add the last minute to its hour and its day."""
        if (minute := self._minutes[-1]).start:
            self.minute_ended(minute)
            self.restore(minute)

    def restore(self, span: Span) -> None:
        """Add a minute, or an hour from before the start, to its hour and its day."""
        self._hours.add(span)
        self._days.add(span)

    def close(self) -> None:
        """End the current minute, so that nothing of it is missing in the usage file."""
        self._count_tokens()
        self._minute_ends = 0.0
        self._minute(time.monotonic())

    # The page's view.

    def view(self, viewer: Viewer) -> dict[str, object]:
        """Return what the page shows to this viewer, for JSON."""
        self._count_tokens()
        now = time.time()
        return {
            "version": self.version,
            "now": now,
            "started": self.started,
            "rows_by_label": viewer.sees_all,
            "may_drop": viewer.admin,
            "answers": self._answers(),
            "saved": {
                "answers": sum(use.saved for use in self._by_label.values()),
                "tokens": self._from_cache.tokens + self._shared.tokens,
                "gpu_seconds": self._from_cache.gpu_seconds + self._shared.gpu_seconds,
            },
            "generated": asdict(self._generated),
            "cache": {
                "entries": len(self.cache),
                "bytes": self.cache.stored_bytes,
                "max_bytes": self.cache.max_bytes,
                "evictions": self.cache.evictions,
                "expiries": self.cache.expiries,
            },
            "shared": self.shared()._asdict() if self.shared is not None else None,
            "keys": len(self.keys),
            "connections": self.connections(),
            "upstreams": [state._asdict() for state in self.upstreams()],
            "running": self._running(viewer),
            **self._waiting(viewer),
            "minutes": [m.row() for m in self._minutes if m.start > now - HOUR],
            "hours": self._hours.rows(self._minutes[-1], now),
            "days": self._days.rows(self._minutes[-1], now),
            "kept": self.usage is not None,
            "latency": self._latency(),
            "models": [{"model": name, **asdict(use)} for name, use in self._by_model.items()],
            "labels": [
                {"label": name, **asdict(use)}
                for name, use in self._by_label.items()
                if _may_see(viewer, name)
            ],
            "limits": [_limit(use) for use in self.limits() if _may_see(viewer, use.key.label)],
            "errors": [{"what": what, "count": count} for what, count in self._failures()],
            "requests": self._requests_of(viewer, now),
        }

    def _running(self, viewer: Viewer) -> list[dict[str, object]]:
        """List the running generations, without the labels that the viewer may not see."""
        running = [flight for flight in self.flights if flight.permit is not None]
        return [
            {
                "id": flight.number,
                "model": self.known(flight.model),
                "label": _label_for(viewer, flight),
                "seconds": time.monotonic() - flight.began,
                "lines": flight.notes.usage.lines if flight.notes is not None else 0,
                "readers": len(flight.readers),
            }
            for flight in running[-MAX_LISTED:]
        ]

    def _waiting(self, viewer: Viewer) -> dict[str, object]:
        """List the queued requests that the viewer may see; the depth counts all."""
        waiting = self.queue().waiting
        seen = [row for row in waiting if _may_see(viewer, row.label)][:MAX_LISTED]
        return {
            "queue_depth": len(waiting),
            "waiting": [
                {
                    "position": row.position,
                    "model": self.known(row.model),
                    "label": row.label,
                    "seconds": row.seconds,
                }
                for row in seen
            ],
        }

    def _latency(self) -> list[dict[str, object]]:
        """Return percentiles by outcome, of the remembered answers of the last hour."""
        since = time.monotonic() - HOUR
        by_outcome: dict[Outcome, list[Record]] = defaultdict(list)
        for request in self._recent:
            if request.generates and request.ended > since and request.first_byte is not None:
                by_outcome[request.outcome].append(request)
        return [
            {
                "outcome": outcome,
                "requests": len(found),
                "first_byte": _percentiles([(r.first_byte or 0) - r.started for r in found]),
                "total": _percentiles([r.ended - r.started for r in found]),
            }
            for outcome in ANSWERED
            if (found := by_outcome.get(outcome))
        ]

    def _requests_of(self, viewer: Viewer, now: float) -> list[dict[str, object]]:
        """List the newest requests that the viewer may see, newest first."""
        seen = [r for r in self._recent if _may_see(viewer, r.label)]
        if viewer.sees_all:
            seen = sorted((*seen, *self._without_key), key=lambda r: r.ended)
        epoch = now - time.monotonic()  # of the monotonic clock, in seconds since 1970
        return [
            {
                "time": round(epoch + r.started, 3),
                "label": r.label,
                "route": r.route,
                "model": r.model if r.generates else None,
                "outcome": r.outcome,
                "status": r.status,
                "queued": r.queued,
                "first_byte": None if r.first_byte is None else round(r.first_byte - r.started, 4),
                "seconds": round(r.ended - r.started, 4),
                "tokens": r.usage.tokens,
            }
            for r in reversed(seen[-MAX_SHOWN_REQUESTS:])
        ]

    def _answers(self) -> dict[Outcome, int]:
        """Count the requests for generated answers by outcome."""
        counts = dict.fromkeys(ANSWERED, 0)
        for (_, _, outcome, generates), count in self._requests.items():
            counts[outcome] += count * generates
        return counts

    def _failures(self) -> Iterator[tuple[str, int]]:
        for kind, count in self._errors.items():
            yield _KINDS.get(kind, kind), count
        by_status: dict[int, int] = defaultdict(int)
        for (_, status, outcome, _), count in self._requests.items():
            if outcome is Outcome.REFUSED:
                by_status[status] += count
        for status, count in sorted(by_status.items()):
            yield f"refused with {status}", count

    # Prometheus's view.

    def text(self, viewer: Viewer) -> str:
        """Return all metrics that this viewer may see, in Prometheus's text format."""
        return exposition(
            (
                *self._request_rows(),
                *self._upstream_rows(),
                *self._queue_rows(),
                *self._usage_rows(),
                *_use_rows("model", self._by_model.items()),
                *self._label_rows(viewer),
                *self._part_rows(),
                *self._usage_file_rows(),
                *self._shared_rows(),
                *process_rows(self.started),
            )
        )

    def _request_rows(self) -> Iterator[Row]:
        build = [({"version": self.version}, 1)]
        yield Row("gauge", "ollprox_build_info", "The version, as a label.", build)
        yield Row(
            "counter",
            "ollprox_requests_total",
            "Requests by route, status and outcome, without OllProx's own pages.",
            [
                ({"route": route, "status": status, "cache": outcome}, count)
                for (route, status, outcome, _), count in self._requests.items()
            ],
        )
        yield Row(
            "counter",
            "ollprox_own_requests_total",
            "Requests for OllProx's own pages, such as this one.",
            [({"route": r, "status": s}, count) for (r, s), count in self._pages.items()],
        )
        for name, meaning, table in (
            ("first_byte", "Seconds until the first byte was sent.", self._first_byte),
            ("request_duration", "Seconds until the request ended.", self._duration),
        ):
            histograms = [({"cache": outcome}, each) for outcome, each in table.items()]
            yield Row("histogram", f"ollprox_{name}_seconds", meaning, histograms)
        under_way = len(self.flights)
        yield Row("gauge", "ollprox_answers_under_way", "Exchanges with Ollama now.", under_way)
        readers = sum(len(flight.readers) for flight in self.flights)
        yield Row("gauge", "ollprox_readers", "Clients waiting for exchanges with Ollama.", readers)

    def _upstream_rows(self) -> Iterator[Row]:
        states = self.upstreams()
        up = [({"host": state.host}, int(state.up)) for state in states]
        yield Row("gauge", "ollprox_upstream_up", "1 if this Ollama answers, else 0.", up)
        for what in ("running", "waiting"):
            values = [({"host": state.host}, getattr(state, what)) for state in states]
            meaning = f"Generations that are {what}, by Ollama server."
            yield Row("gauge", f"ollprox_upstream_{what}", meaning, values)
        conflicts = [
            ({"host": state.host, "model": model}, 1)
            for state in states
            for model in state.conflicts
        ]
        meaning = "1 for a model that this Ollama is not used for, since most have another digest."
        yield Row("gauge", "ollprox_upstream_digest_conflict", meaning, conflicts)
        meaning = "Requests sent to Ollama, including OllProx's own."
        yield Row("counter", "ollprox_upstream_requests_total", meaning, self.upstream_requests())
        errors = [
            ({"kind": kind}, count)
            for kind, count in {**dict.fromkeys(_KINDS, 0), **self._errors}.items()
        ]
        meaning = "Answers that Ollama failed to give, by kind."
        yield Row("counter", "ollprox_upstream_errors_total", meaning, errors)
        meaning = "Answers stopped because no client was waiting any more."
        yield Row("counter", "ollprox_upstream_cancelled_total", meaning, self._cancelled)

    def _queue_rows(self) -> Iterator[Row]:
        queue = self.queue()
        yield Row("gauge", "ollprox_queue_depth", "Requests in the queue.", len(queue.waiting))
        meaning = "Seconds that requests waited for a turn."
        yield Row("histogram", "ollprox_queue_seconds", meaning, [({}, self._queued)])
        refused = [({"reason": why.value}, queue.refusals.get(why, 0)) for why in Refusal]
        meaning = "Requests that the queue refused, by reason."
        yield Row("counter", "ollprox_queue_refused_total", meaning, refused)

    def _usage_rows(self) -> Iterator[Row]:
        generated, cached, shared = self._generated, self._from_cache, self._shared
        sources = {"generated": generated, "cached": cached, "shared": shared}
        for name, what in (
            ("lines", "Lines of answers"),
            ("prompt_tokens", "Tokens of prompts"),
            ("tokens", "Generated tokens"),
        ):
            values = [({"source": s}, getattr(total, name)) for s, total in sources.items()]
            meaning = f"{what}: generated, from the cache, and shared by joined requests."
            yield Row("counter", f"ollprox_{name}_total", meaning, values)
        meaning = "GPU time of generated answers, in seconds."
        yield Row("counter", "ollprox_gpu_seconds_total", meaning, generated.gpu_seconds)
        saved = cached.gpu_seconds + shared.gpu_seconds
        meaning = "GPU time saved by hits and joined requests, in seconds."
        yield Row("counter", "ollprox_gpu_seconds_saved_total", meaning, saved)

    def _label_rows(self, viewer: Viewer) -> Iterator[Row]:
        uses = [item for item in self._by_label.items() if _may_see(viewer, item[0])]
        if uses or viewer.sees_all:
            yield from _use_rows("key", uses)

    def _part_rows(self) -> Iterator[Row]:
        cache, keys = self.cache, self.keys
        connections = self.connections()
        rows: tuple[tuple[str, str, str, float], ...] = (
            ("gauge", "cache_entries", "Stored answers.", len(cache)),
            ("gauge", "cache_bytes", "Memory used by stored answers.", cache.stored_bytes),
            ("gauge", "cache_max_bytes", "The setting CACHE_MAX_BYTES.", cache.max_bytes),
            ("counter", "cache_evictions_total", "Answers evicted for space.", cache.evictions),
            ("counter", "cache_expiries_total", "Answers that expired.", cache.expiries),
            ("gauge", "keys", "Valid API keys.", len(keys)),
            ("counter", "key_reloads_total", "Times the key file was read.", keys.reloads),
            (
                "counter",
                "key_reload_failures_total",
                "Failed reads of the file.",
                keys.failures,
            ),
            (
                "counter",
                "authentication_failures_total",
                "Requests with a wrong API key or none.",
                self._wrong_keys,
            ),
            ("gauge", "connections", "Connected clients.", connections),
            ("gauge", "loop_lag_seconds", "Largest event-loop lag in a minute.", max(self._lags)),
        )
        for kind, name, meaning, value in rows:
            yield Row(kind, f"ollprox_{name}", meaning, value)

    def _shared_rows(self) -> Iterator[Row]:
        if self.shared is None:
            return
        counts = self.shared()
        meaning = "1 if the shared cache is used, else 0."
        yield Row("gauge", "ollprox_shared_cache_up", meaning, int(counts.up))
        found = ("hits", "misses", "unavailable")
        lookups = [({"result": name}, getattr(counts, name)) for name in found]
        meaning = "Lookups in the shared cache, by result."
        yield Row("counter", "ollprox_shared_cache_lookups_total", meaning, lookups)
        meaning = "Answers written to the shared cache."
        yield Row("counter", "ollprox_shared_cache_writes_total", meaning, counts.writes)
        meaning = "Answers that could not be written."
        yield Row("counter", "ollprox_shared_cache_dropped_writes_total", meaning, counts.dropped)
        meaning = "Shared-cache commands that failed."
        yield Row("counter", "ollprox_shared_cache_errors_total", meaning, counts.errors)

    def _usage_file_rows(self) -> Iterator[Row]:
        if (usage := self.usage) is None:
            return
        meaning = "Writes to USAGE_FILE that failed."
        yield Row("counter", "ollprox_usage_write_failures_total", meaning, usage.failures)
        meaning = "Rows of usage in memory that are not in the file."
        yield Row("gauge", "ollprox_usage_pending_rows", meaning, usage.pending)


def _label_for(viewer: Viewer, flight: Flight) -> str | None:
    """Return the label that a flight is charged to, if the viewer may see it."""
    label = flight.permit.key.label if flight.permit is not None else ""
    return label if _may_see(viewer, label) else None


def _may_see(viewer: Viewer, label: str | None) -> bool:
    """Return True if a viewer may see the rows of a label. Keys without a label have none."""
    return viewer.sees_all or (label == viewer.label and label != "")


def _percentiles(seconds: list[float]) -> tuple[float, float]:
    """Return the 50th and the 95th percentile, by nearest rank, of at least one value."""
    seconds.sort()
    p50, p95 = (seconds[-(-len(seconds) * percent // 100) - 1] for percent in (50, 95))
    return round(p50, 4), round(p95, 4)


def _use_rows(what: str, uses: Iterable[tuple[str, Use]]) -> Iterator[Row]:
    """Yield the use of each model, or of each label."""
    uses = list(uses)
    for name, meaning in (
        ("requests", "Requests for answers"),
        ("saved", "Requests answered from the cache or by joining"),
        ("prompt_tokens", "Tokens of prompts"),
        ("tokens", "Generated tokens"),
    ):
        values = [({what: label}, getattr(use, name)) for label, use in uses]
        yield Row("counter", f"ollprox_{what}_{name}_total", f"{meaning}, by {what}.", values)


_KINDS = {
    "unreachable": "Ollama could not be reached",
    "timeout": "Ollama was too slow",
    "broken": "Ollama broke off",
    "protocol": "Ollama sent something that is not HTTP",
    "status": "Ollama answered with status 500 or above",
    "reported": "Ollama reported an error in a stream",
    "incomplete": "Ollama ended an answer without its last line",
}


def _limit(standing: Standing) -> dict[str, object]:
    return {
        "label": standing.key.label,
        "name": f"{standing.what}={standing.limit}",
        "used": standing.used,
        "allowed": standing.limit.count,
        "resets": standing.resets,
    }


def _error_of(flight: Flight) -> str:
    """Return the kind of upstream's error; empty if there is none."""
    if flight.error is not None:
        return flight.error.kind
    if flight.ending is Ending.INCOMPLETE:
        return "incomplete"
    if flight.status >= 500:
        return "status"
    return ""
