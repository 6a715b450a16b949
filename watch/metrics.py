"""Count what OllProx does, and say it: as text for Prometheus, as JSON for the page.

Every number comes from the record of an exchange, or from a flight at its end. Names of
models and labels that are counted one by one are known ones only, and bounded, so that no
client can make the number of series grow.
"""

import os
import resource
import time
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from answers.flight import Ending, Flight, Flights
from cache import Cache
from keystore import Key, KeyStore
from record import Record, Usage
from settings import normalize_model

MAX_NAMES = 1000  # models, and labels, that are counted one by one
MAX_RUNNING = 100  # answers under way that are listed
OTHER = "other"  # all models, or labels, beyond those
BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)  # seconds

Labels = Mapping[str, object]
Value = float | Iterable[tuple[Labels, float]]
"""One value, or one for each set of labels."""


class Histogram:
    """How often something took how many seconds."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one more."""
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.sum += seconds


class Exposition:
    """Metrics, one after the other; their meaning is for people."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def gauge(self, name: str, meaning: str, value: Value) -> None:
        """Add what goes up and down."""
        self._begin("gauge", name, meaning)
        self._add(name, value)

    def counter(self, name: str, meaning: str, value: Value) -> None:
        """Add what only grows; its name ends in `_total`."""
        self._begin("counter", name, meaning)
        self._add(name, value)

    def histogram(self, name: str, meaning: str, by: str, table: Mapping[str, Histogram]) -> None:
        """Add histograms, by the values of one label."""
        self._begin("histogram", name, meaning)
        for value, histogram in table.items():
            total = 0
            for bound, count in zip((*BUCKETS, "+Inf"), histogram.counts, strict=True):
                total += count
                self._add(f"{name}_bucket", [({by: value, "le": bound}, total)])
            self._add(f"{name}_sum", [({by: value}, histogram.sum)])
            self._add(f"{name}_count", [({by: value}, total)])

    def process(self, started: float) -> None:
        """Add what all Prometheus clients tell of their process, by the names that they use."""
        times = resource.getrusage(resource.RUSAGE_SELF)
        cpu = times.ru_utime + times.ru_stime
        self.counter("process_cpu_seconds_total", "CPU time used.", cpu)
        self.gauge("process_start_time_seconds", "When it started.", started)
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            files = len(os.listdir("/proc/self/fd"))
        except OSError:
            return  # not Linux
        memory = pages * os.sysconf("SC_PAGE_SIZE")
        self.gauge("process_resident_memory_bytes", "Memory in use.", memory)
        self.gauge("process_open_fds", "Files and sockets open.", files)

    def text(self) -> str:
        """Return all that was added."""
        return "\n".join(self._lines) + "\n"

    def _begin(self, kind: str, name: str, meaning: str) -> None:
        self._lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]

    def _add(self, name: str, value: Value) -> None:
        if isinstance(value, int | float):
            self._lines.append(f"{name} {value}")
            return
        for labels, number in value:
            said = ",".join(f'{label}="{_escaped(str(v))}"' for label, v in labels.items())
            self._lines.append(f"{name}{{{said}}} {number}")


def _escaped(value: str) -> str:
    value = value.encode("utf-8", "backslashreplace").decode()  # Ollama may say half a surrogate
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


@dataclass(slots=True)
class Use:
    """What a label or a model has had: requests for answers, and what they were."""

    requests: int = 0
    saved: int = 0  # of these, from the cache, or joined and whole
    tokens: int = 0  # generated for it


@dataclass(slots=True)
class Total:
    """What many answers have come to; see `Usage`."""

    lines: int = 0
    tokens: int = 0
    gpu_seconds: float = 0.0

    def add(self, usage: Usage, times: int = 1) -> None:
        """Add one answer's, or that of one answer so many times."""
        self.lines += usage.lines * times
        self.tokens += usage.tokens * times
        self.gpu_seconds += usage.gpu_seconds * times


@dataclass(slots=True)
class Minute:
    """One minute of requests for answers."""

    start: int  # seconds since 1970
    answers: int = 0
    hits: int = 0
    tokens: int = 0  # of answers that ended in it


@dataclass
class Metrics:
    """The counts since the start, and where the rest can be read.

    `connections` and `upstream_requests` are asked for when they are wanted.
    """

    version: str
    cache: Cache[Any]
    flights: Flights
    keys: KeyStore
    connections: Callable[[], int] = lambda: 0
    upstream_requests: Callable[[], int] = lambda: 0
    started: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self._requests: dict[tuple[str, int, str], int] = defaultdict(int)
        self._own: dict[tuple[str, int], int] = defaultdict(int)
        self._answers = dict.fromkeys(("hit", "miss", "collapsed", "bypass", "refused"), 0)
        self._first_byte: dict[str, Histogram] = defaultdict(Histogram)
        self._duration: dict[str, Histogram] = defaultdict(Histogram)
        self._by_label: dict[str, Use] = defaultdict(Use)
        self._by_model: dict[str, Use] = defaultdict(Use)
        self._minutes = deque([Minute(0)], maxlen=60)
        self._minute_over = 0.0  # when the last of them is, on the monotonic clock
        self._lags = deque([0.0], maxlen=120)  # seconds, each half a second
        self._errors: dict[str, int] = defaultdict(int)  # of upstream's, by kind
        self._saved = 0  # answers: from the cache, or joined and whole
        self._refused_keys = 0
        self._cancelled = 0
        self._generated = Total()
        self._from_cache = Total()
        self._shared = Total()
        self._models: frozenset[str] = frozenset()  # that upstream has listed
        self._names: dict[str, str] = {}  # of these, by what requests call them

    # What has happened.

    def count(self, record: Record) -> None:
        """Count an exchange at its end."""
        status = record.status
        self._refused_keys += record.wrong_key
        if record.own:
            self._own[record.route, status] += 1
            return
        outcome = record.outcome if record.outcome != "-" else "refused"
        self._requests[record.route, status, outcome] += 1
        now, started = time.monotonic(), record.started
        self._duration[outcome].observe(now - started)
        if record.first_byte is not None:
            self._first_byte[outcome].observe(record.first_byte - started)
        if not record.asks:
            return
        self._answers[outcome] += 1
        saved = outcome == "hit" or record.shared
        self._saved += saved
        if (label := record.label) is not None:
            use = self._by_label.get(label) or self._use(self._by_label, label)
            use.requests += 1
            use.saved += saved
        if outcome == "refused":
            return
        model = self._names.get(record.model) or self._known(record.model)
        use = self._by_model.get(model) or self._use(self._by_model, model)
        use.requests += 1
        use.saved += saved
        minute = self._minutes[-1] if now < self._minute_over else self._minute(now)
        minute.answers += 1
        if outcome == "hit":
            minute.hits += 1
            self._from_cache.add(record.usage)

    def count_flight(self, flight: Flight) -> None:
        """Count an answer at its end; those who read it then get it whole."""
        if flight.ending is Ending.ABANDONED:
            self._cancelled += 1
        if kind := _error_of(flight):
            self._errors[kind] += 1
        usage = flight.usage
        self._generated.add(usage)
        self._minute(time.monotonic()).tokens += usage.tokens
        got = flight.served + len(flight.readers)
        if flight.ending is Ending.COMPLETE and got > 1:
            self._shared.add(usage, got - 1)
        if flight.model and usage.tokens:
            self._use(self._by_model, self._known(flight.model)).tokens += usage.tokens
        if flight.caller is not None and usage.tokens:
            self._use(self._by_label, flight.caller).tokens += usage.tokens

    def note_lag(self, seconds: float) -> None:
        """Note how late the event loop was."""
        self._lags.append(seconds)

    def know(self, models: Iterable[str]) -> None:
        """Take the names of the models that there are."""
        self._models, self._names = frozenset(models), {}

    def _known(self, model: str) -> str:
        """Return a model's name if there is such a model; so a client can invent none."""
        name = normalize_model(model)
        if name not in self._models:
            return OTHER
        name = name.removesuffix(":latest")
        if len(self._names) < MAX_NAMES:
            self._names[model] = name
        return name

    def _use(self, table: dict[str, Use], name: str) -> Use:
        return table[name if name in table or len(table) < MAX_NAMES else OTHER]

    def _minute(self, now: float) -> Minute:
        if now >= self._minute_over:
            into = time.time() % 60
            self._minutes.append(Minute(round(time.time() - into)))
            self._minute_over = now + 60 - into
        return self._minutes[-1]

    # What is said.

    def may_see_labels(self, key: Key | None) -> bool:
        """Whether a key may see the figures of all keys."""
        return key is not None and (key.admin or key.metrics or len(self.keys) == 1)

    def view(self, *, by_label: bool) -> dict[str, object]:
        """Return what the page shows."""
        now = time.time()
        return {
            "version": self.version,
            "now": now,
            "started": self.started,
            "rows_by_label": by_label,
            "answers": self._answers,
            "saved": {
                "answers": self._saved,
                "tokens": self._from_cache.tokens + self._shared.tokens,
                "gpu_seconds": self._from_cache.gpu_seconds + self._shared.gpu_seconds,
            },
            "generated": {"tokens": self._generated.tokens, "lines": self._generated.lines},
            "cache": {
                "entries": len(self.cache),
                "bytes": self.cache.stored_bytes,
                "max_bytes": self.cache.max_bytes,
                "evictions": self.cache.evictions,
                "expiries": self.cache.expiries,
            },
            "keys": len(self.keys),
            "connections": self.connections(),
            "running": self._running(by_label),
            "minutes": [asdict(m) for m in self._minutes if m.start > now - 3600],
            "models": [{"model": name, **asdict(use)} for name, use in self._by_model.items()],
            "labels": [{"label": name, **asdict(use)} for name, use in self._by_label.items()]
            if by_label
            else None,
            "errors": [{"what": what, "count": count} for what, count in self._failures()],
        }

    def _running(self, by_label: bool) -> list[dict[str, object]]:
        running = [flight for flight in self.flights if flight.caller is not None]
        return [
            {
                "id": flight.number,
                "model": self._known(flight.model),
                "label": flight.caller if by_label else None,
                "seconds": time.monotonic() - flight.began,
                "lines": flight.notes.usage.lines if flight.notes is not None else 0,
                "readers": len(flight.readers),
            }
            for flight in running[-MAX_RUNNING:]
        ]

    def _failures(self) -> Iterator[tuple[str, int]]:
        for kind, count in self._errors.items():
            yield _KINDS[kind], count
        by_status: dict[int, int] = defaultdict(int)
        for (_, status, outcome), count in self._requests.items():
            if outcome == "refused":
                by_status[status] += count
        for status, count in sorted(by_status.items()):
            yield f"refused with {status}", count

    def text(self, *, by_label: bool) -> str:
        """Return all metrics as Prometheus reads them."""
        out, cache, keys = Exposition(), self.cache, self.keys
        out.gauge("ollprox_build_info", "Which OllProx it is.", [({"version": self.version}, 1)])
        out.counter(
            "ollprox_requests_total",
            "Requests, but for OllProx's own pages, by what came of them.",
            [
                ({"route": route, "status": status, "cache": outcome}, count)
                for (route, status, outcome), count in self._requests.items()
            ],
        )
        out.counter(
            "ollprox_own_requests_total",
            "Requests for OllProx's own pages, such as this one.",
            [({"route": r, "status": s}, count) for (r, s), count in self._own.items()],
        )
        meaning = "Time until the first byte was sent."
        out.histogram("ollprox_first_byte_seconds", meaning, "cache", self._first_byte)
        meaning = "Time until a request was over."
        out.histogram("ollprox_request_duration_seconds", meaning, "cache", self._duration)
        out.gauge("ollprox_answers_under_way", "Answers under way.", len(self.flights))
        readers = sum(len(flight.readers) for flight in self.flights)
        out.gauge("ollprox_readers", "Clients that wait for them.", readers)
        meaning = "Requests sent to Ollama, OllProx's own ones included."
        out.counter("ollprox_upstream_requests_total", meaning, self.upstream_requests())
        errors = [({"kind": kind}, self._errors.get(kind, 0)) for kind in _KINDS]
        meaning = "Answers that Ollama did not give, by kind."
        out.counter("ollprox_upstream_errors_total", meaning, errors)
        meaning = "Answers that were stopped because nobody waited any more."
        out.counter("ollprox_upstream_cancelled_total", meaning, self._cancelled)
        self._add_totals(out)
        self._add_uses(out, "model", self._by_model)
        if by_label:
            self._add_uses(out, "key", self._by_label)
        out.gauge("ollprox_cache_entries", "Answers that are kept.", len(cache))
        out.gauge("ollprox_cache_bytes", "Memory charged for them.", cache.stored_bytes)
        out.gauge("ollprox_cache_max_bytes", "CACHE_MAX_BYTES.", cache.max_bytes)
        meaning = "Answers that had to make room for others."
        out.counter("ollprox_cache_evictions_total", meaning, cache.evictions)
        out.counter("ollprox_cache_expiries_total", "Answers that expired.", cache.expiries)
        out.gauge("ollprox_keys", "API keys that are valid.", len(keys))
        out.counter("ollprox_key_reloads_total", "Readings of the key file.", keys.reloads)
        meaning = "Readings of the key file that failed."
        out.counter("ollprox_key_reload_failures_total", meaning, keys.failures)
        meaning = "Requests with a wrong API key, or with none."
        out.counter("ollprox_authentication_failures_total", meaning, self._refused_keys)
        out.gauge("ollprox_connections", "Clients connected.", self.connections())
        meaning = "How late the event loop was at most, within a minute."
        out.gauge("ollprox_loop_lag_seconds", meaning, max(self._lags))
        out.process(self.started)
        return out.text()

    def _add_totals(self, out: Exposition) -> None:
        """Add what answers have come to."""
        generated, cached, shared = self._generated, self._from_cache, self._shared
        sources = {"generated": generated, "cached": cached, "shared": shared}
        meaning = "generated, served from the cache, and shared by those who joined."
        lines = [({"source": name}, total.lines) for name, total in sources.items()]
        out.counter("ollprox_lines_total", f"Lines {meaning}", lines)
        tokens = [({"source": name}, total.tokens) for name, total in sources.items()]
        out.counter("ollprox_tokens_total", f"Tokens {meaning}", tokens)
        meaning = "GPU time of the answers that were generated."
        out.counter("ollprox_gpu_seconds_total", meaning, generated.gpu_seconds)
        saved = cached.gpu_seconds + shared.gpu_seconds
        out.counter("ollprox_gpu_seconds_saved_total", "GPU time not needed again.", saved)

    def _add_uses(self, out: Exposition, what: str, table: dict[str, Use]) -> None:
        """Add what each model, or each key's label, has had."""
        for name, meaning in (
            ("requests", "Requests for answers"),
            ("saved", "Requests answered from the cache or shared"),
            ("tokens", "Tokens generated"),
        ):
            rows = [({what: label}, getattr(use, name)) for label, use in table.items()]
            out.counter(f"ollprox_{what}_{name}_total", f"{meaning}, by {what}.", rows)


_KINDS = {
    "unreachable": "Ollama could not be reached",
    "timeout": "Ollama was too slow",
    "broken": "Ollama broke off",
    "protocol": "Ollama sent what is no HTTP",
    "status": "Ollama answered with status 500 or above",
    "reported": "Ollama reported an error in a stream",
}


def _error_of(flight: Flight) -> str:
    """Return what upstream did wrong; empty for nothing, or if a client was at fault, or we."""
    if flight.error is not None:
        return flight.error.kind
    return "status" if flight.status >= 500 else ""
