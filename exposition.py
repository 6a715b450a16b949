"""Write metrics as Prometheus reads them: the text format, version 0.0.4."""

import os
import resource
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from pathlib import Path

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
