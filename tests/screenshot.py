"""The dashboard with figures that a test chooses, without OllProx; and its picture.

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
NOW = 1_790_000_041.5  # seconds; any time will do


def _sha256(tag: str) -> str:
    (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", HTML, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


POLICY = (
    f"default-src 'none'; script-src {_sha256('script')}; style-src {_sha256('style')};"
    " img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'"
)


def _minutes() -> list[dict[str, int]]:
    dice = random.Random(7)
    minutes = []
    for ago in (ago for ago in range(59, -1, -1) if ago not in {44, 43, 42, 29}):
        answers = dice.randint(12, 40) if ago else 9
        hits = round(answers * min(0.9, 0.35 + 0.006 * (60 - ago) + dice.uniform(-0.12, 0.12)))
        start = int(NOW // 60 * 60) - 60 * ago
        minutes.append(
            {"start": start, "answers": answers, "hits": hits, "tokens": 150 * (answers - hits)}
        )
    return minutes


def busy() -> dict[str, Any]:
    """What OllProx says of itself when there is much to do."""
    return {
        "version": "0.1.0",
        "now": NOW,
        "started": NOW - 9_432.2,
        "rows_by_label": True,
        "answers": {"hit": 2304, "miss": 1412, "collapsed": 197, "bypass": 31, "refused": 14},
        "saved": {"answers": 2501, "tokens": 812_044, "gpu_seconds": 18_912.4},
        "generated": {"tokens": 489_321, "lines": 490_764},
        "cache": {
            "entries": 1342,
            "bytes": 81_234_560,
            "max_bytes": 1 << 28,
            "evictions": 0,
            "expiries": 70,
        },
        "keys": 6,
        "connections": 17,
        "running": [
            {"id": 7, "model": "llama3.1:8b", "label": "Mary", "seconds": 21.4}
            | {"lines": 640, "readers": 3},
            {"id": 9, "model": "qwen3:4b", "label": "nightly reports", "seconds": 8.1}
            | {"lines": 411, "readers": 1},
            {"id": 12, "model": "llama3.1:8b", "label": "", "seconds": 1.9}
            | {"lines": 0, "readers": 1},
        ],
        "minutes": _minutes(),
        "models": [
            {"model": "llama3.1:8b", "requests": 2611, "saved": 1788, "tokens": 301_400},
            {"model": "qwen3:4b", "requests": 904, "saved": 425, "tokens": 187_921},
            {"model": "nomic-embed-text", "requests": 429, "saved": 288, "tokens": 0},
        ],
        "labels": [
            {"label": "Mary", "requests": 1920, "saved": 1302, "tokens": 240_100},
            {"label": "nightly reports", "requests": 1211, "saved": 801, "tokens": 161_804},
            {"label": "home assistant", "requests": 790, "saved": 395, "tokens": 86_300},
            {"label": "", "requests": 23, "saved": 3, "tokens": 1117},
        ],
        "errors": [
            {"what": "Ollama could not be reached", "count": 3},
            {"what": "refused with 401", "count": 2},
        ],
    }


@dataclass
class Stage:
    """What `metrics.json` answers, and what it was asked."""

    metrics: Any = field(default_factory=busy)
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    asked: list[Request] = field(default_factory=list)
    let_go: asyncio.Event | None = None  # what the next answers wait for

    async def serve(self, page: Page) -> None:
        """Answer in OllProx's place."""
        page_headers = {"Content-Security-Policy": POLICY}
        await page.route(
            URL,
            lambda route: route.fulfill(
                path=ROOT / "watch" / "dashboard.html", headers=page_headers
            ),
        )
        await page.route("**/metrics.json", self._answer)

    async def count(self, page: Page) -> int:
        """Count what was asked until now: an own request comes behind all others."""
        await page.evaluate("fetch('metrics.json').then((answer) => answer.text())")
        self.asked.pop()
        return len(self.asked)

    async def _answer(self, route: Route) -> None:
        self.asked.append(route.request)
        if self.let_go is not None:
            await self.let_go.wait()
        await route.fulfill(status=self.status, headers=self.headers, json=self.metrics)


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """Start the machine's own browser, not one of Playwright's."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        await browser.close()


async def enter(page: Page, key: str) -> None:
    """Enter the key as somebody without a mouse does."""
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
        await page.wait_for_selector("text=702")
        (ROOT / "docs").mkdir(exist_ok=True)
        await page.screenshot(path=ROOT / "docs" / "dashboard.png", full_page=True)


if __name__ == "__main__":
    asyncio.run(_main())
