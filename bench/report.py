"""Compare the figures of the last runs with their targets; write the tables in `README.md`.

usage: report.py

Each figure is the median of its rounds; ratios and differences are those of medians.
"""

import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass

from common import BENCH, OTHERS, RESULTS, Figures, median

README = BENCH / "README.md"
BEGIN, END = "<!-- written by report.py -->\n", "<!-- so far -->\n"

Value = Callable[[Figures], float]


@dataclass(frozen=True)
class Target:
    """A target: `value` must be at least, or at most, `limit`; None only reports the value."""

    program: str
    what: str
    value: Value
    limit: float | None
    unit: str
    least: bool = False

    def row(self, results: dict[str, Figures]) -> str:
        try:
            value = self.value(results[self.program])
        except KeyError:  # the program was not run, or nginx is not installed
            return f"| {self.what} | not measured | {self._wanted()} | |"
        met = self.limit is None or (value >= self.limit if self.least else value <= self.limit)
        verdict = "" if self.limit is None else "yes" if met else "**no**"
        return f"| {self.what} | {_number(value)} {self.unit} | {self._wanted()} | {verdict} |"

    def _wanted(self) -> str:
        if self.limit is None:
            return ""
        return f"at {'least' if self.least else 'most'} {self.limit:g} {self.unit}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def figure(measure: str, who: str = "OllProx") -> Value:
    return lambda figures: median(figures[measure][who])


def ratio(measure: str, other: str, who: str = "OllProx") -> Value:
    return lambda figures: median(figures[measure][who]) / median(figures[measure][other])


def more(measure: str, other: str = "straight") -> Value:
    return lambda figures: median(figures[measure]["OllProx"]) - median(figures[measure][other])


def at_once(figures: Figures) -> float:
    """Return how much longer 200 identical requests take than one, without the writing."""
    took = {who: median(values) for who, values in figures["the same question, s"].items()}
    return (took["200 at once"] - took["200 hits"]) / took["one alone"]


H11, NGINX = "bare h11", "nginx"
DISTINCT, LOGGED = "hits/s, with distinct heads", "hits/s, with an access line"
FIRST, CROWD = "first line", "1,000 streams"
ENTRY, STEP = "an entry, bytes beside its answer and head", "longest step, ms"
TARGETS = [
    Target("waits", "200 identical requests, less the writing, to one", at_once, 1.1, "times"),
    Target("speed", "hits, to bare h11", ratio("hits/s", H11), 3, "times", least=True),
    Target("speed", "hits, to nginx", ratio("hits/s", NGINX), 0.8, "times", least=True),
    Target("speed", "hits with a line, to nginx", ratio(LOGGED, NGINX), 0.6, "times", least=True),
    Target("speed", "hits, distinct heads, to bare h11", ratio(DISTINCT, H11), None, "times"),
    Target("speed", "hits, distinct heads, to nginx", ratio(DISTINCT, NGINX), None, "times"),
    Target("speed", "misses, to nginx", ratio("misses/s", NGINX), 0.5, "times", least=True),
    Target("speed", "one miss, more than straight", more("one miss at a time, ms"), 0.25, "ms"),
    Target(
        "streams",
        "relayed lines, to nginx",
        ratio("relayed lines/s", NGINX),
        0.4,
        "times",
        least=True,
    ),
    Target(
        "streams",
        "relayed lines, written alone, to nginx",
        ratio("relayed lines/s, written alone", NGINX),
        None,
        "times",
    ),
    Target("streams", "first line, more, median", more(f"{FIRST}, median ms"), 0.5, "ms"),
    Target("streams", "first line, more, 99 %", more(f"{FIRST}, 99 % ms"), 2, "ms"),
    Target(
        "streams",
        "1,000 streams, lateness, 99 %",
        figure(f"{CROWD}, lateness of lines, 99 % ms"),
        100,
        "ms",
    ),
    Target("streams", "1,000 streams, memory of each", figure(f"{CROWD}, KiB each"), 40, "KiB"),
    Target("memory", "100,000 entries, overhead", figure(ENTRY, "grown"), 600, "bytes each"),
    Target("memory", "100,000 entries, charged", figure(ENTRY, "charged"), 600, "bytes each"),
    Target(
        "memory",
        "hits with 100,000 entries, to 100",
        ratio("hits/s", "100 entries", "100,000 entries"),
        0.9,
        "times",
        least=True,
    ),
    Target("memory", "longest step, cache filling", figure(STEP, "filling"), 10, "ms"),
    Target("memory", "longest step, cache filled", figure(STEP, "filled"), 10, "ms"),
    Target("memory", "10,000 idle connections, each", figure("idle connection, KiB"), 8, "KiB"),
    Target("memory", "idle process", figure("idle process, MiB"), 26, "MiB"),
    Target("memory", "from the start to ready", figure("ready, s"), 0.25, "s"),
    Target("waits", "longest wait beside 31 MB", figure("longest wait, ms", "31 MB"), 150, "ms"),
    Target(
        "pool",
        "answers of two servers, to those of one",
        ratio("answers/s", "1 servers", "2 servers"),
        1.9,
        "times",
        least=True,
    ),
    Target(
        "pool",
        "share of a server that answers 503",
        figure("share of 1,000, %", "a server that answers 503"),
        1,
        "%",
    ),
    Target(
        "pool",
        "a dead server, more, median",
        lambda figures: (
            figure("median, ms", "one of two is dead")(figures)
            - figure("median, ms", "one server")(figures)
        ),
        1,
        "ms",
    ),
]


def rows(results: dict[str, Figures], only: str = "") -> list[str]:
    """Return the table of targets, of one program or of all."""
    found = [target.row(results) for target in TARGETS if only in {"", target.program}]
    return ["| measure | measured | target | met |", "| --- | --- | --- | --- |", *found]


def show(program: str) -> int:
    """Print one program's rows; return its exit status, which is 0 even if a target is missed."""
    print("\n".join(rows(json.loads(RESULTS.read_text()), program)))
    return 0


def main() -> int:
    results = json.loads(RESULTS.read_text())
    most = max(median(figures[OTHERS]["machine"]) for figures in results.values())
    lines = [
        f"On {os.cpu_count()} cores with CPython {platform.python_version()}; other programs took"
        f" up to {most:.0f} % of the cores meanwhile.",
        "",
        *rows(results),
    ]
    lines += ["", "The medians behind them:", ""]
    lines += ["| program | measure | who | median |", "| --- | --- | --- | --- |"]
    for program, figures in results.items():
        for measure, values in figures.items():
            for who, rounds in values.items():
                lines.append(f"| {program} | {measure} | {who} | {_number(median(rounds))} |")
    before, _, rest = README.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        print(f"{README} has no {BEGIN.strip()} and {END.strip()}", file=sys.stderr)
        return 1
    README.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n\n{END}{after}")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
