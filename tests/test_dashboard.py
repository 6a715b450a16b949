"""The dashboard in a browser: against OllProx, and with unusual figures."""

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from client import KEY, Client, ask, question
from conftest import Start
from playwright.async_api import ConsoleMessage, Page, expect
from screenshot import CHROMIUM, NOW, URL, Stage, chromium, enter
from standin import StandIn

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
POLL = 2000  # milliseconds, as the page has it
PATIENCE = 5000  # milliseconds, as the page has it
expect.set_options(timeout=20_000)  # milliseconds: a busy machine is no fault of the page's


@pytest_asyncio.fixture
async def page() -> AsyncIterator[Page]:
    """A browser's page; at the end, the browser must have reported no error."""
    complaints: list[str] = []

    def hear(message: ConsoleMessage) -> None:
        # The browser notes each 401 and each lost connection, whatever a page does about it.
        if not message.text.startswith("Failed to load resource"):
            complaints.append(message.text)

    async with chromium() as browser:
        page = await browser.new_page(locale="en-GB", timezone_id="UTC")
        page.on("console", hear)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        yield page
    assert complaints == []


@pytest_asyncio.fixture
async def stage(page: Page) -> Stage:
    """The page without OllProx, and with a clock that a test turns on."""
    stage = Stage()
    await stage.serve(page)
    await page.clock.install(time=NOW)
    await page.goto(URL)
    await page.clock.pause_at(NOW + 60)
    return stage


# Against OllProx.


async def test_what_ollama_generates_is_seen_while_it_grows(
    page: Page, launch: Start, ollama: StandIn
) -> None:
    program = await launch(ADMIN_LABELS="tester")
    failures: list[str] = []
    page.on("requestfailed", lambda request: failures.append(request.url))
    lines = asyncio.Semaphore(0)
    ollama.script.gate = lines.acquire
    await page.goto(f"http://127.0.0.1:{program.port}/dashboard")
    await enter(page, KEY)
    await expect(page.locator("#running")).to_have_text("Nothing.")
    async with Client(program.port) as client:
        answer = await client.begin("POST", "/api/generate", question())
        row = page.locator("#running tr").get_by_role("cell")
        await expect(page.locator("#running th")).to_have_text("llama2")
        await expect(row.nth(0)).to_have_text("tester")
        for count in (1, 4):
            while len(answer.lines()) < count:
                lines.release()
                await anext(client.chunks(answer))
            await expect(row.nth(2)).to_have_text(str(count))
        ollama.script.gate = None
        lines.release()
        await client.rest(answer)
    await expect(page.locator("#running")).to_have_text("Nothing.")
    await expect(page.locator("#answers")).to_have_text("1")
    await expect(page.locator("#hits")).to_have_text("0")
    await ask(program.port, "POST", "/api/generate", question())
    await expect(page.locator("#answers")).to_have_text("2")
    await expect(page.locator("#hits")).to_have_text("1")
    await expect(page.locator("#labels tr")).to_contain_text("tester")
    hits = page.locator("#requests tr", has_text="hit")
    await expect(hits).to_have_count(1)
    await expect(hits).to_contain_text("tester")
    await expect(hits).to_contain_text("llama2")
    assert failures == []


async def test_an_ollama_that_goes_away_and_comes_back_is_seen(
    page: Page, launch: Start, ollama: StandIn
) -> None:
    program = await launch(MODEL_REFRESH="0.1")
    await page.goto(f"http://127.0.0.1:{program.port}/dashboard")
    await enter(page, KEY)
    badge = page.get_by_role("status").filter(has_text="Ollama")
    await expect(badge).to_have_text("Ollama is up")
    await ollama.stop()
    await expect(badge).to_have_text("Ollama is down")
    await expect(page.locator("#upstreams td").first).to_have_text("down")
    await ollama.start(port=ollama.port)
    await expect(badge).to_have_text("Ollama is up")


async def test_an_admin_drops_the_stored_answers_of_a_model(
    page: Page, launch: Start, ollama: StandIn, tmp_path: Path
) -> None:
    keys = tmp_path / "two.txt"
    keys.write_text(f"{KEY}  # tester\nanother-key  # other\n")
    program = await launch(API_KEY_FILE=keys, ADMIN_LABELS="tester")
    await ollama.until(lambda: bool(ollama.asked("/api/tags")))
    for prompt in ("a", "b"):
        await ask(program.port, "POST", "/call_model", question(prompt))
    await page.goto(f"http://127.0.0.1:{program.port}/dashboard")
    await enter(page, KEY)
    await page.locator("#which").select_option("llama2")
    await page.get_by_role("button", name="Drop them …").click()
    await page.get_by_role("dialog").get_by_role("button", name="Drop them").click()
    await expect(page.locator("#dropped")).to_have_text("2 answers dropped.")
    await expect(page.locator("#cache")).to_contain_text("0 answers")
    await page.get_by_role("button", name="Forget the key").click()
    await page.keyboard.type("another-key")
    await page.keyboard.press("Enter")
    await expect(page.locator("#cache")).to_contain_text("0 answers")
    await expect(page.locator("#drop")).to_be_hidden()


async def test_a_wrong_key_is_said_to_be_wrong(page: Page, launch: Start, tmp_path: Path) -> None:
    key = "schlüssel-鍵"  # more than a header takes as it is
    file = tmp_path / "foreign.txt"
    file.write_text(f"{key}\nanother-one-that-may-not-see-it\n")
    program = await launch(API_KEY_FILE=file)
    await page.goto(f"http://127.0.0.1:{program.port}/dashboard")
    await enter(page, "no-such-key")
    await expect(page.get_by_role("alert")).to_have_text("This key is not valid.")
    await expect(page.get_by_label("API key")).to_be_focused()
    await expect(page.get_by_label("API key")).to_have_value("")
    await page.keyboard.type(key)
    await page.keyboard.press("Enter")
    await expect(page.locator("#answers")).to_have_text("0")
    await expect(page.get_by_text("Only this key's label.")).to_be_visible()


async def test_figures_are_old_while_ollprox_is_away(page: Page, launch: Start) -> None:
    program = await launch()
    await page.goto(f"http://127.0.0.1:{program.port}/dashboard")
    await enter(page, KEY)
    await expect(page.locator("#hits")).to_have_text("0")
    await program.stop()
    old = page.get_by_role("alert").get_by_text("OllProx does not answer")
    await expect(old).to_be_visible()
    await launch(LISTEN_PORT=program.port)
    await expect(old).to_be_hidden()
    await expect(page.locator("#hits")).to_be_visible()


# Without OllProx.


async def test_names_are_shown_as_text(page: Page, stage: Stage) -> None:
    name = "<img src=x onerror=alert(1)>"
    for rows, column in (("models", "model"), ("labels", "label"), ("errors", "what")):
        stage.metrics[rows][0][column] = name
    stage.metrics["running"][0] |= {"model": name, "label": name}
    stage.metrics["version"] = name
    await enter(page, "any")
    for place in ("running", "models", "labels", "errors"):
        await expect(page.locator(f"#{place}")).to_contain_text(name)
    await expect(page.locator("#about")).to_contain_text(name)
    assert await page.locator("img").count() == 0


async def test_the_key_is_nowhere_but_in_the_header(page: Page, stage: Stage) -> None:
    await page.context.add_cookies([{"name": "a", "value": "cookie", "url": URL}])
    await enter(page, "topsecret")
    await expect(page.locator("#hits")).to_be_visible()
    headers = await stage.asked[0].all_headers()
    assert headers["apikey"] == "topsecret"
    assert headers.keys().isdisjoint({"authorization", "cookie", "referer"})
    kept = (
        "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])"
    )
    assert "topsecret" not in await page.evaluate(kept) + await page.content()
    assert await page.locator("#key").input_value() == ""


async def test_forgetting_the_key_forgets_what_it_showed(page: Page, stage: Stage) -> None:
    await enter(page, "any")
    await expect(page.locator("#models")).to_contain_text("llama3.1:8b")
    await page.get_by_role("button", name="Forget the key").press("Enter")
    await expect(page.get_by_label("API key")).to_be_focused()
    assert "llama" not in await page.locator("body").inner_text()
    await page.clock.run_for(3 * POLL)
    assert await stage.count(page) == 1


@pytest.mark.parametrize(
    ("status", "said"),
    [(401, "This key is not valid."), (429, "Too many wrong keys .* Try again in 42s.")],
)
async def test_a_key_that_is_refused_later_is_forgotten_too(
    page: Page, stage: Stage, status: int, said: str
) -> None:
    await enter(page, "any")
    await expect(page.locator("#models")).to_contain_text("llama3.1:8b")
    stage.status, stage.headers = status, {"Retry-After": "42"}
    await page.clock.run_for(POLL)
    await expect(page.get_by_role("alert")).to_have_text(re.compile(said))
    assert "llama" not in await page.locator("body").inner_text()


@pytest.mark.parametrize("nonsense", [(503, {"error": "no"}), (200, {"hello": 1}), (200, None)])
async def test_nonsense_leaves_the_old_figures_and_says_their_age(
    page: Page, stage: Stage, nonsense: tuple[int, object]
) -> None:
    sense = stage.metrics
    await enter(page, "any")
    await expect(page.locator("#hits")).to_have_text("2,304")
    stage.status, stage.metrics = nonsense
    await page.clock.run_for(POLL)
    await expect(page.locator("#old")).to_contain_text("does not answer")
    await page.clock.run_for(10_000)
    await expect(page.locator("#old")).to_contain_text("from 12s ago")
    await expect(page.locator("#hits")).to_have_text("2,304")
    stage.status, stage.metrics = 200, sense
    await page.clock.resume()
    await expect(page.locator("#old")).to_be_hidden()


async def test_a_key_is_kept_while_nothing_has_answered_yet(page: Page, stage: Stage) -> None:
    stage.status = 502
    await enter(page, "any")
    await expect(page.locator("#message")).to_contain_text("OllProx does not answer")
    stage.status = 200
    await page.clock.run_for(POLL)
    await expect(page.locator("#hits")).to_be_visible()
    await expect(page.locator("#message")).to_have_text("")


async def test_a_question_without_an_answer_is_given_up_before_the_next(
    page: Page, stage: Stage
) -> None:
    await enter(page, "any")
    await expect(page.locator("#hits")).to_be_visible()
    stage.let_go = asyncio.Event()
    await page.clock.run_for(POLL)
    while len(stage.asked) < 2:
        await asyncio.sleep(0.01)
    await page.clock.run_for(PATIENCE - 1)
    await expect(page.locator("#old")).to_be_hidden()
    await page.clock.run_for(1)
    await expect(page.locator("#old")).to_be_visible()
    assert len(stage.asked) == 2
    stage.let_go.set()
    await page.clock.resume()
    await expect(page.locator("#old")).to_be_hidden()


async def test_nothing_is_asked_while_the_tab_is_hidden(page: Page, stage: Stage) -> None:
    await enter(page, "any")
    await expect(page.locator("#hits")).to_be_visible()
    hide = "Object.defineProperty(document, 'hidden', {{value: {}, configurable: true}})"
    await page.evaluate(hide.format("true"))
    await page.clock.run_for(5 * POLL)
    assert await stage.count(page) == 1
    stage.metrics["answers"]["hit"] += 1
    await page.evaluate(hide.format("false"))
    await page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    await expect(page.locator("#hits")).to_have_text("2,305")


async def test_both_charts_show_the_same_minutes(page: Page, stage: Stage) -> None:
    start = int(stage.metrics["now"] // 60 * 60)
    none = dict.fromkeys(("hit", "collapsed", "miss", "bypass", "refused", "tokens", "errors"), 0)
    stage.metrics["minutes"] = [
        {**none, "start": start - 59 * 60, "hit": 1, "miss": 3},
        {**none, "start": start - 60, "collapsed": 2, "tokens": 1200, "errors": 1},
        {**none, "start": start, "tokens": 600},  # the minute is 41.5 s old
    ]
    await enter(page, "any")
    requests, tokens = page.locator("#outcomes-at"), page.locator("#speed-at")
    now = ["14:14, so far", "hit 0", "joined 0", "miss 0", "bypass 0", "refused 0"]
    await expect(requests.locator("li")).to_have_text(now)
    speed = ["14:14, so far", "tokens per second 14.5", "errors of Ollama 0"]
    await expect(tokens.locator("li")).to_have_text(speed)
    bars = (
        "rects => rects.map(r => [r.getAttribute('class'), Math.floor(r.getAttribute('x')),"
        " Number(r.getAttribute('height'))])"
    )
    assert await page.locator("#outcomes rect:not(.mark)").evaluate_all(bars) == [
        ["hit", 0, 20],  # of the scale's 5
        ["miss", 0, 60],
        ["collapsed", 58, 40],
    ]
    drawn = await page.locator("#speed rect:not(.mark)").evaluate_all(bars)
    assert [(name, at) for name, at, _ in drawn] == [("hit", 58), ("error", 58), ("hit", 59)]
    await page.get_by_role("slider", name="Requests per minute").focus()
    await page.keyboard.press("ArrowLeft")
    before = ["14:13", "hit 0", "joined 2", "miss 0", "bypass 0", "refused 0"]
    await expect(requests.locator("li")).to_have_text(before)
    await expect(tokens).to_contain_text("14:13tokens per second 20errors of Ollama 1")
    said = "14:13: hit 0, joined 2, miss 0, bypass 0, refused 0"
    await expect(page.locator("#outcomes")).to_have_attribute("aria-valuetext", said)
    await page.keyboard.press("Home")
    await expect(requests).to_contain_text("13:15hit 1")
    await page.clock.run_for(POLL)  # new figures leave the minute where it is
    await expect(requests).to_contain_text("13:15hit 1")
    box = await page.locator("#speed").bounding_box()
    assert box is not None
    await page.mouse.move(box["x"] + box["width"] * 58.5 / 60, box["y"] + 9)
    await expect(requests).to_contain_text("14:13hit 0")
    await expect(tokens).to_contain_text("14:13tokens per second 20")
    await page.mouse.move(1, 1)
    await expect(requests.locator("li")).to_have_text(now)


async def test_the_charts_show_an_hour_a_day_or_a_month(page: Page, stage: Stage) -> None:
    none = dict.fromkeys(("hit", "collapsed", "miss", "bypass", "refused", "tokens", "errors"), 0)
    hour, day = (int(stage.metrics["now"] // size * size) for size in (3600, 86400))
    stage.metrics |= {
        "hours": [{**none, "start": hour - 7200, "hit": 3, "tokens": 9}, {**none, "start": hour}],
        "days": [
            {**none, "start": day - 40 * 86400, "hit": 1000},  # too long ago
            {**none, "start": day - 30 * 86400, "collapsed": 2, "refused": 3, "tokens": 1_500_000},
            {**none, "start": day, "miss": 7, "errors": 4},
        ],
    }
    await enter(page, "any")
    span, total = page.get_by_label("Show the last"), page.locator("#sum")
    await expect(page.locator("#h-outcomes")).to_have_text("Requests per minute, the last hour")
    await expect(total).to_contain_text("97,200 tokens, 3 errors of Ollama")
    await span.select_option("day")
    await expect(page.locator("#h-speed")).to_have_text("Tokens per hour, the last day")
    await expect(total).to_have_text("3 requests, 9 tokens, 0 errors of Ollama")
    await page.get_by_role("slider", name="Requests per hour").focus()
    for _ in range(2):
        await page.keyboard.press("ArrowLeft")
    await expect(page.locator("#outcomes-at")).to_contain_text("12:00hit 3")
    await expect(page.locator("#outcomes")).to_have_attribute("aria-valuemax", "23")
    await span.select_option("month")
    await expect(total).to_have_text("12 requests, 1,500,000 tokens, 4 errors of Ollama")
    now = ["21 Sept, so far", "hit 0", "joined 0", "miss 7", "bypass 0", "refused 0"]
    await expect(page.locator("#outcomes-at li")).to_have_text(now)
    await page.get_by_role("slider", name="Requests per day").focus()
    await page.keyboard.press("Home")
    await expect(page.locator("#speed-at")).to_contain_text("22 Augtokens 1,500,000")
    stage.metrics["kept"] = False
    await page.clock.run_for(POLL)
    await expect(span).to_have_value("days")  # new figures leave the choice as it is
    await expect(total).to_contain_text("since the start, as USAGE_FILE is not set")


async def test_requests_are_found_by_outcome_key_model_and_route(page: Page, stage: Stage) -> None:
    await enter(page, "any")
    rows = page.locator("#requests tr")
    await expect(rows).to_have_count(40)
    every = stage.metrics["requests"]
    joined = [row for row in every if row["outcome"] == "collapsed"]
    await page.get_by_label("Outcome", exact=True).select_option("joined")
    await expect(rows).to_have_count(len(joined))
    await expect(page.locator("#matching")).to_contain_text(f"{len(joined)} of the latest 40")
    await page.get_by_label("Key, model or route").fill("MARY")
    of_mary = [row for row in joined if row["label"] == "Mary"]
    await expect(rows).to_have_count(len(of_mary))
    await page.clock.run_for(POLL)
    await expect(rows).to_have_count(len(of_mary))
    await page.get_by_label("Key, model or route").fill("no such thing")
    await expect(page.locator("#requests")).to_have_text("None.")


async def test_nothing_is_dropped_before_the_question_is_answered(page: Page, stage: Stage) -> None:
    await enter(page, "any")
    await page.get_by_role("button", name="Drop them …").press("Enter")
    dialog = page.get_by_role("dialog", name="Drop all 1,342 stored answers?")
    await expect(dialog.get_by_role("button", name="Keep them")).to_be_focused()
    await page.keyboard.press("Enter")
    await expect(dialog).to_be_hidden()
    await page.locator("#which").select_option("qwen3:4b")
    await page.get_by_role("button", name="Drop them …").press("Enter")
    await page.keyboard.press("Escape")
    assert stage.dropped == []
    await page.get_by_role("button", name="Drop them …").press("Enter")
    await expect(page.get_by_role("dialog", name="of qwen3:4b?")).to_be_visible()
    await page.get_by_role("dialog").get_by_role("button", name="Drop them").press("Enter")
    await expect(page.locator("#dropped")).to_have_text("7 answers dropped.")
    assert [url.partition("/cache")[2] for url in stage.dropped] == ["?model=qwen3%3A4b"]


async def test_the_tab_remembers_a_key_only_if_asked(page: Page, stage: Stage) -> None:
    await enter(page, "any")
    await expect(page.locator("#hits")).to_be_visible()
    await page.reload()
    await expect(page.get_by_label("API key")).to_be_visible()
    await page.get_by_label("Remember it in this tab").check()
    await page.get_by_label("API key").fill("any")
    await page.keyboard.press("Enter")
    await expect(page.locator("#hits")).to_be_visible()
    await page.reload()
    await expect(page.locator("#hits")).to_be_visible()
    await page.get_by_role("button", name="Forget the key").click()
    await page.reload()
    await expect(page.get_by_label("API key")).to_be_visible()
    assert await page.evaluate("sessionStorage.length + localStorage.length") == 0


async def test_a_password_manager_knows_the_field(page: Page, stage: Stage) -> None:
    field = page.get_by_label("API key")
    await expect(field).to_have_attribute("autocomplete", "current-password")
    assert await page.locator("#login [name]").count() == 0  # nothing can reach a URL


async def test_the_heading_stays_in_view(page: Page, stage: Stage) -> None:
    await page.set_viewport_size({"width": 360, "height": 500})
    await enter(page, "any")
    await expect(page.locator("#figures")).to_be_focused()
    await expect(page.get_by_role("heading", name="OllProx")).to_be_in_viewport()
    assert await page.evaluate("scrollY") == 0


@pytest.mark.parametrize(("up", "said"), [((), ""), ((1, 0), "1 of 2 Ollamas are up")])
async def test_the_badge_counts_what_is_up(
    page: Page, stage: Stage, up: tuple[int, ...], said: str
) -> None:
    one = stage.metrics["upstreams"][0]
    stage.metrics["upstreams"] = [{**one, "up": bool(each)} for each in up]
    await enter(page, "any")
    await expect(page.locator("#hits")).to_be_visible()
    await expect(page.locator("#badge")).to_have_text(said)


async def test_who_waits_is_listed_in_the_order_of_turns(page: Page, stage: Stage) -> None:
    await enter(page, "any")
    rows = page.locator("#waiting tr")
    await expect(rows).to_have_text(
        [
            re.compile("^nextllama3.1:8bhome assistant2s$"),
            re.compile("^2qwen3:4bnightly reports32s$"),
        ]
    )
    stage.metrics |= {"waiting": [], "rows_by_label": False}
    await page.clock.run_for(POLL)
    await expect(page.locator("#waiting")).to_have_text("None with this key's label.")
    await expect(page.locator("#depth")).to_contain_text("2 requests")


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_it_fits_a_phone_in_light_and_in_dark(page: Page, stage: Stage, scheme: str) -> None:
    stage.metrics["models"][0]["model"] = "m" * 200
    stage.metrics["running"][0]["label"] = "l" * 200
    await page.set_viewport_size({"width": 360, "height": 740})
    await page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    await enter(page, "any")
    await expect(page.locator("#hits")).to_be_visible()
    assert await page.evaluate("document.documentElement.scrollWidth") <= 360
    cut = """() => [...document.querySelectorAll("tbody *")].filter((cell) => {
        const box = cell.getBoundingClientRect();
        return cell.checkVisibility() && (box.left < 0 || box.right > 360 || !box.width);
    }).map((cell) => cell.textContent)"""
    assert await page.evaluate(cut) == []  # no column is out of sight
    await expect(page.locator("#requests tr").first).to_contain_text("/v1/chat/completions")
    colour = await page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert all((int(part) < 64) == (scheme == "dark") for part in re.findall(r"\d+", colour))
