"""The dashboard without OllProx, with figures chosen by a test; and its screenshot.

`python tests/screenshot.py` makes `docs/dashboard.png`.
"""

import asyncio
import base64
import hashlib
import random
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.async_api import Browser, Page, Request, Route, async_playwright

ROOT = Path(__file__).resolve().parent.parent
HTML = (ROOT / "watch" / "dashboard.html").read_text()
CHROMIUM = shutil.which("chromium")
URL = "http://dashboard.test/dashboard"
NOW = 1_790_000_081.5  # seconds; any time will do


def _sha256(tag: str) -> str:
    (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", HTML, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


POLICY = (
    f"default-src 'none'; script-src {_sha256('script')}; style-src {_sha256('style')};"
    " img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'"
)


def _spans(seconds: int, count: int) -> list[dict[str, int]]:
    """Hours or days with a rhythm."""
    dice = random.Random(count)
    spans = []
    for ago in range(count - 1, -1, -1):
        start = int(NOW // seconds * seconds) - seconds * ago
        busy = 24 * 24 if seconds > 3600 else 24 - abs(start // 3600 % 24 - 14)
        answers = busy * dice.randint(20, 60) if start // 86400 % 7 < 5 else busy * 6
        hits = answers * dice.randint(40, 65) // 100
        joined = answers * dice.randint(3, 9) // 100
        rest = {"bypass": answers // 40, "refused": answers // 30 if ago == 9 else 0}
        misses = answers - hits - joined
        spans.append(
            {"start": start, "hit": hits, "collapsed": joined, "miss": misses, **rest}
            | {"tokens": 150 * misses, "errors": 5 if ago == 6 else 0}
        )
    return spans


def _minutes() -> list[dict[str, int]]:
    dice = random.Random(7)
    minutes = []
    for ago in (ago for ago in range(59, -1, -1) if ago not in {44, 43, 42, 29}):
        answers = dice.randint(12, 40) if ago else 21
        hits = round(answers * min(0.9, 0.35 + 0.006 * (60 - ago) + dice.uniform(-0.12, 0.12)))
        joined = min(answers - hits, dice.randint(0, 5))
        minutes.append(
            {
                "start": int(NOW // 60 * 60) - 60 * ago,
                "hit": hits,
                "collapsed": joined,
                "miss": answers - hits - joined,
                "bypass": dice.randint(0, 2),
                "refused": 3 if ago == 20 else 0,
                "tokens": 150 * (answers - hits),
                "errors": 3 if ago == 41 else 0,
            }
        )
    return minutes


def _requests() -> list[dict[str, Any]]:
    dice = random.Random(11)
    rows = []
    for number in range(40):
        outcome = dice.choices(("hit", "miss", "collapsed", "refused"), (10, 5, 2, 1))[0]
        generated = outcome in {"miss", "collapsed"}
        rows.append(
            {
                "time": NOW - 3.7 * number - dice.random(),
                "label": dice.choice(("Mary", "Mary", "nightly reports", "home assistant")),
                "route": dice.choice(("/api/chat", "/v1/chat/completions", "/call_model")),
                "model": dice.choice(("llama3.1:8b", "llama3.1:8b", "qwen3:4b")),
                "outcome": outcome,
                "status": 429 if outcome == "refused" else 200,
                "queued": round(dice.random() * 3, 3) if generated else None,
                "first_byte": round(0.3 + dice.random() * 2, 4) if generated else 0.0004,
                "seconds": round(3 + dice.random() * 14, 4) if generated else 0.0006,
                "tokens": 0 if outcome == "refused" else dice.randint(20, 600),
            }
        )
    return rows


def busy() -> dict[str, Any]:
    """Return the figures of a busy OllProx."""
    return {
        "version": "0.1.0",
        "now": NOW,
        "started": NOW - 9_432.2,
        "rows_by_label": True,
        "may_drop": True,
        "answers": {"hit": 2304, "miss": 1412, "collapsed": 197, "bypass": 31, "refused": 14},
        "saved": {"answers": 2501, "tokens": 812_044, "gpu_seconds": 18_912.4},
        "generated": {"tokens": 489_321, "prompt_tokens": 1_203_884, "lines": 490_764},
        "cache": {
            "entries": 1342,
            "bytes": 81_234_560,
            "max_bytes": 1 << 28,
            "evictions": 0,
            "expiries": 70,
        },
        "keys": 6,
        "connections": 17,
        "upstreams": [
            {"host": "127.0.0.1:11434", "up": True, "running": 3, "waiting": 2, "errors": 3}
            | {"models": ["llama3.1:8b", "qwen3:4b"]}
        ],
        "queue_depth": 2,
        "waiting": [
            {"position": 1, "model": "llama3.1:8b", "label": "home assistant", "seconds": 2.2},
            {"position": 2, "model": "qwen3:4b", "label": "nightly reports", "seconds": 31.7},
        ],
        "running": [
            {"id": 7, "model": "llama3.1:8b", "label": "Mary", "seconds": 21.4}
            | {"lines": 640, "readers": 3},
            {"id": 9, "model": "qwen3:4b", "label": "nightly reports", "seconds": 8.1}
            | {"lines": 411, "readers": 1},
            {"id": 12, "model": "llama3.1:8b", "label": "", "seconds": 1.9}
            | {"lines": 0, "readers": 1},
        ],
        "minutes": _minutes(),
        "hours": _spans(3600, 24),
        "days": _spans(86400, 31),
        "kept": True,
        "latency": [
            {"outcome": "hit", "requests": 1204, "first_byte": [0.0004, 0.0011]}
            | {"total": [0.0006, 0.0019]},
            {"outcome": "miss", "requests": 612, "first_byte": [0.412, 2.87]}
            | {"total": [8.31, 21.4]},
            {"outcome": "collapsed", "requests": 97, "first_byte": [0.0021, 1.36]}
            | {"total": [5.05, 17.9]},
        ],
        "models": [
            _use(2611, 1788, 702_114, 301_400, model="llama3.1:8b"),
            _use(904, 425, 391_020, 187_921, model="qwen3:4b"),
            _use(429, 288, 110_750, 0, model="nomic-embed-text"),
        ],
        "labels": [
            _use(1920, 1302, 590_321, 240_100, label="Mary"),
            _use(1211, 801, 402_804, 161_804, label="nightly reports"),
            _use(790, 395, 208_100, 86_300, label="home assistant"),
            _use(23, 3, 2_659, 1117, label=""),
        ],
        "limits": [
            {"label": "nightly reports", "name": "tokens=200000/day", "used": 161_804}
            | {"allowed": 200_000, "resets": 30_144.0},
            {"label": "home assistant", "name": "rate=60/hour", "used": 12, "allowed": 60}
            | {"resets": 912.0},
        ],
        "errors": [
            {"what": "Ollama could not be reached", "count": 3},
            {"what": "refused with 401", "count": 2},
        ],
        "requests": _requests(),
    }


def _use(requests: int, saved: int, prompt: int, tokens: int, **name: str) -> dict[str, Any]:
    figures = {"requests": requests, "saved": saved, "prompt_tokens": prompt, "tokens": tokens}
    return {**name, **figures}


@dataclass
class Stage:
    """The answers of `metrics.json`, and the requests for it; `dropped` has the URLs of DELETEs."""

    metrics: Any = field(default_factory=busy)
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    asked: list[Request] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    let_go: asyncio.Event | None = None  # what the next answers wait for

    async def serve(self, page: Page) -> None:
        """Answer requests in place of OllProx."""
        page_headers = {"Content-Security-Policy": POLICY}
        await page.route(
            URL,
            lambda route: route.fulfill(
                path=ROOT / "watch" / "dashboard.html", headers=page_headers
            ),
        )
        await page.route("**/metrics.json", self._answer)
        await page.route(re.compile("/cache"), self._drop)

    async def count(self, page: Page) -> int:
        """Count what was asked until now: an own request comes behind all others."""
        await page.evaluate("fetch('metrics.json').then((answer) => answer.text())")
        self.asked.pop()
        return len(self.asked)

    async def _drop(self, route: Route) -> None:
        assert route.request.method == "DELETE"
        assert (await route.request.all_headers())["apikey"] == "any"
        self.dropped.append(route.request.url)
        await route.fulfill(json={"dropped": 7})

    async def _answer(self, route: Route) -> None:
        self.asked.append(route.request)
        if self.let_go is not None:
            await self.let_go.wait()
        await route.fulfill(status=self.status, headers=self.headers, json=self.metrics)


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """Start the installed browser, not one of Playwright's."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        await browser.close()


async def enter(page: Page, key: str) -> None:
    """Enter the key with the keyboard alone."""
    await page.keyboard.press("Tab")
    await page.keyboard.type(key)
    await page.keyboard.press("Enter")


async def _main() -> None:
    async with chromium() as browser:
        page = await browser.new_page(
            viewport={"width": 1100, "height": 700}, locale="en-GB", timezone_id="Europe/Berlin"
        )
        stage = Stage()
        await stage.serve(page)
        await page.goto(URL)
        await enter(page, "any")
        await page.wait_for_selector("#hits")
        stage.metrics["now"] += 2
        for flight, speed in zip(stage.metrics["running"], (31, 55, 0), strict=True):
            flight["lines"] += 2 * speed
        await page.wait_for_selector("#running >> text=702")
        (ROOT / "docs").mkdir(exist_ok=True)
        await page.screenshot(path=ROOT / "docs" / "dashboard.png", full_page=True)


if __name__ == "__main__":
    asyncio.run(_main())
