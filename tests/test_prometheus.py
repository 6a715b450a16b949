"""Each query of the Grafana dashboard, the alerts and the docs, in a Prometheus that scraped."""

import asyncio
import contextlib
import json
import re
import shutil
import socket
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from client import KEY, Client, ask, question
from conftest import ROOT, Start
from standin import StandIn
from test_deploy import DEPLOY, adapted, run, tool
from test_metrics import known

DASHBOARD = json.loads((DEPLOY / "grafana.json").read_text())
BOSS = "the-key-of-an-admin"
ALERT = re.compile(r"alert: (\w+)\n +expr: (.*)")
ALERTS = dict(ALERT.findall((DEPLOY / "alerts.yml").read_text()))
WINDOW = "30s"  # in place of the windows of the queries, since the test is short


def targets() -> Iterator[tuple[str, str]]:
    """The queries of the dashboard, by the titles of their panels."""
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            yield f"{panel['title']} {target['refId']}", target["expr"]


def filled(query: str) -> str:
    """A query as Grafana sends it, with short windows."""
    query = query.replace("$instance", ".*").replace("$__rate_interval", WINDOW)
    assert "$" not in query
    return re.sub(r"\[\d+[mhd]\]", f"[{WINDOW}]", query)


def documented() -> Iterator[tuple[str, str]]:
    text = (ROOT / "docs" / "metrics.md").read_text()
    section = text.partition("### Useful queries")[2].partition("\n## ")[0]
    yield from re.findall(r"^\| (.*\?) \| `(.*)` \|$", section, re.MULTILINE)


class Prometheus:
    """A running Prometheus."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/api/v1"

    async def get(self, path: str, **parameters: str) -> Any:
        url = f"{self._url}/{path}?{urllib.parse.urlencode(parameters)}"
        return await asyncio.to_thread(self._read, url)

    @staticmethod
    def _read(url: str) -> Any:
        with urllib.request.urlopen(url, timeout=10) as answer:
            found = json.load(answer)
        assert found["status"] == "success", found
        return found["data"]

    async def query(self, query: str) -> list[Any]:
        found: list[Any] = (await self.get("query", query=query))["result"]
        return found

    async def until(self, query: str, condition: Callable[[list[Any]], bool]) -> None:
        while True:
            with contextlib.suppress(OSError):  # not up yet
                if condition(await self.query(query)):
                    return
            await asyncio.sleep(0.2)


@contextlib.asynccontextmanager
async def prometheus(folder: Path, ollprox_port: int) -> AsyncIterator[Prometheus]:
    """Start a Prometheus with the files of `deploy/`, which scrapes each second."""
    (folder / "key").write_text(BOSS)
    changes = {
        "/etc/prometheus/ollprox.key": str(folder / "key"),
        "/etc/prometheus/ollprox-alerts.yml": str(DEPLOY / "alerts.yml"),
        "127.0.0.1:8000": f"127.0.0.1:{ollprox_port}",
    }
    config = folder / "prometheus.yml"
    seconds = "global: {scrape_interval: 1s, evaluation_interval: 1s}\n"
    config.write_text(seconds + adapted("prometheus.yml", changes))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = await asyncio.create_subprocess_exec(
        tool("prometheus"),
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=error",
    )
    try:
        yield Prometheus(port)
    finally:
        process.terminate()
        await process.wait()


async def some_of_everything(port: int, ollama: StandIn) -> None:
    """Requests with each outcome, an error of Ollama, a wait for a turn, and a wrong key."""
    for body in (question(), question(), question(stream=False)):
        await ask(port, "POST", "/api/generate", body)
    await ask(port, "POST", "/api/generate", question("b"), {"APIKEY": "wrong"})
    await ask(port, "POST", "/api/generate", question("c"), {"Cache-Control": "no-store"})
    ollama.script.break_after = 2
    async with Client(port) as client:
        answer = await client.begin("POST", "/api/generate", question("d"))
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, ValueError):
            await client.rest(answer)
    ollama.script.break_after = None


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs prometheus")
async def test_each_query_finds_what_ollprox_tells(
    launch: Start, ollama: StandIn, tmp_path: Path
) -> None:
    path = tmp_path / "two-keys.txt"
    path.write_text(f"{KEY}  # tester\n{BOSS}  # boss\n")
    ollprox = await launch(
        API_KEY_FILE=path,
        ADMIN_LABELS="boss",
        MAX_GENERATIONS=1,
        USAGE_FILE=tmp_path / "usage.db",
    )
    await known(ollama, ollprox.port)
    await ask(ollprox.port, "POST", "/api/generate", question("before the first scrape"))
    async with prometheus(tmp_path, ollprox.port) as server:
        await server.until("ollprox_requests_total", bool)
        await some_of_everything(ollprox.port, ollama)
        seen = "sum(ollprox_upstream_errors_total)"
        await server.until(seen, lambda rows: bool(rows) and rows[0]["value"][1] == "1")
        youngest = f"min(count_over_time(ollprox_requests_total[{WINDOW}]))"
        await server.until(youngest, lambda rows: float(rows[0]["value"][1]) >= 2)  # for a rate
        scraped = set(await server.get("label/__name__/values"))
        everything = {
            **dict(targets()),
            **{f"alert {name}": expr for name, expr in ALERTS.items()},
            **dict(documented()),
        }
        assert len(everything) > 40
        conflict = "ollprox_upstream_digest_conflict"  # a series only while servers disagree
        everything = {title: text for title, text in everything.items() if conflict not in text}
        for title, query in everything.items():
            rows = await server.query(filled(query))
            unknown = set(re.findall(r"\b(?:ollprox|process)_\w+", query)) - scraped
            assert not unknown, (title, unknown)
            # A comparison filters, and finds nothing while all is well.
            assert rows or re.search(r" (?:>|==) [\d.]+$", query), (title, query)
        compared = [query for query in everything.values() if re.search(r" (?:>|==) ", query)]
        for query in compared:  # but what it compares is there
            measured = re.sub(r" (?:>|==) [\d.]+$", "", query)
            assert await server.query(filled(measured)), query
        groups = (await server.get("rules"))["groups"]
        assert [rule["name"] for rule in groups[0]["rules"]] == list(ALERTS)
        assert {rule["health"] for rule in groups[0]["rules"]} == {"ok"}


async def test_promtool_finds_no_fault_in_the_rules() -> None:
    await run(tool("promtool"), "check", "rules", "--lint=all", str(DEPLOY / "alerts.yml"))


SERIES = {  # of each alert: what brings it about, and how long that takes
    "OllProxDown": ('up{job="ollprox"}', "0x20", "3m"),
    "OllamaDown": ("ollprox_upstream_up", "0x20", "3m"),
    "OllamaErrors": ("ollprox_upstream_errors_total", "0+1x20", "10m"),
    "OllProxQueueRefuses": ('ollprox_queue_refused_total{reason="timeout"}', "0+1x20", "10m"),
    "OllProxLongQueue": ('ollprox_queue_seconds_bucket{le="+Inf"}', "0+9x40", "30m"),
    "OllProxWrongKeys": ("ollprox_authentication_failures_total", "0+90x20", "12m"),
    "OllProxKeyFileUnreadable": ("ollprox_key_reload_failures_total", "0 0 1x20", "5m"),
    "OllProxUsageNotWritten": ("ollprox_usage_write_failures_total", "0+12x20", "5m"),
    "OllProxSlow": ("ollprox_loop_lag_seconds", "0.7x20", "6m"),
}


@pytest.mark.parametrize("quiet", [False, True])
async def test_each_alert_fires_when_it_should(tmp_path: Path, quiet: bool) -> None:
    assert list(SERIES) == list(ALERTS)
    tests = []
    for name, (series, values, at) in SERIES.items():
        well = "1x40" if values == "0x20" else "0x40"
        happens = [{"series": series, "values": well if quiet else values}]
        if name == "OllProxLongQueue":  # of nine waits a minute, none or all took up to a minute
            happens = [
                {"series": f'ollprox_queue_seconds_bucket{{le="{le}"}}', "values": values}
                for le, values in (("60.0", "0+9x40" if quiet else "0x40"), ("120.0", "0+9x40"))
            ]
            happens.append({"series": series, "values": "0+9x40"})
        rule = {
            "expr": f'count(ALERTS{{alertname="{name}", alertstate="firing"}})',
            "eval_time": at,
            "exp_samples": [] if quiet else [{"labels": "{}", "value": 1}],
        }
        tests.append({"interval": "1m", "input_series": happens, "promql_expr_test": [rule]})
    file = tmp_path / "tests.yml"  # JSON is YAML
    file.write_text(json.dumps({"rule_files": [str(DEPLOY / "alerts.yml")], "tests": tests}))
    await run(tool("promtool"), "test", "rules", str(file))


def test_the_grafana_dashboard_is_complete() -> None:
    """What Grafana needs to import it: ids, places that do not overlap, and one data source."""
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
        assert panel["datasource"]["uid"] == "${datasource}"
        assert all('instance=~"$instance"' in target["expr"] for target in panel["targets"])
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == [
        "datasource",
        "instance",
    ]
