"""Usage that survives: what is counted, the report, and a file that fails in every way."""

import asyncio
import csv
import io
import json
import os
import re
import resource
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from client import KEY, Answer, Client, ask, question
from conftest import DEFAULTS, ROOT, Program, Start
from hypothesis import given
from hypothesis import strategies as st
from standin import StandIn
from test_metrics import GPU, PROMPT, TOKENS, known

from answers.flight import Source
from record import Outcome, Record, Usage
from watch.metrics import OTHER, Span
from watch.usage import (
    MAX_PENDING,
    PERIOD,
    SCHEMA,
    Batch,
    Counts,
    Kept,
    Opened,
    Query,
    UsageError,
    UsageFile,
    earlier,
    open_file,
    parse_query,
    prefers_csv,
    render,
)
from watch.usage import Usage as UsageCounter

BOSS = "the-key-of-an-admin"
BARE = "the-key-without-a-label"
NOON = 1_795_867_200.0  # 2026-11-28 12:00 UTC
DAY = "2026-11-28"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "usage.db"


@pytest.fixture
def settings(file: Path, tmp_path: Path) -> dict[str, object]:
    path = tmp_path / "three-keys.txt"
    path.write_text(f"{KEY}  # tester\n{BOSS}  # boss\n{BARE}\n")
    return {"API_KEY_FILE": path, "ADMIN_LABELS": "boss", "USAGE_FILE": file}


async def report(port: int, query: str = "", key: str = BOSS, **headers: str) -> Answer:
    return await ask(port, "GET", f"/usage{query}", headers={"APIKEY": key, **headers})


async def rows(port: int, query: str = "", key: str = BOSS) -> list[dict[str, Any]]:
    answer = await report(port, query, key)
    assert answer.status == 200, answer.body
    assert answer.headers["cache-control"] == "no-store"
    found: list[dict[str, Any]] = answer.json()["rows"]
    return found


def counts(**given: Any) -> dict[str, Any]:
    """A row's columns; those that are not given are 0."""
    names = ("requests", "hits", "joined", "refused", "prompt_tokens", "generated_tokens")
    return {**dict.fromkeys((*names, "gpu_seconds", "gpu_seconds_saved"), 0)} | given


def one(requests: int = 1) -> dict[str, Any]:
    """What generated answers take."""
    return {
        "prompt_tokens": PROMPT * requests,
        "generated_tokens": TOKENS * requests,
        "gpu_seconds": pytest.approx(GPU * requests),
    }


def today() -> str:
    return time.strftime("%Y-%m-%d", time.gmtime())


def stored(file: Path) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(file)) as connection:
        return connection.execute("SELECT * FROM usage").fetchall()


def sums(file: Path) -> int:
    """How many requests the file counts."""
    with closing(sqlite3.connect(file)) as connection:
        return int(connection.execute("SELECT TOTAL(requests) FROM usage").fetchone()[0])


# What is counted.


async def test_each_request_counts_for_its_key_and_tokens_for_the_key_that_began(
    launch: Start, ollama: StandIn, settings: dict[str, object]
) -> None:
    ollprox = await launch(**settings)
    await known(ollama, ollprox.port)
    for key in (KEY, BARE, BARE):  # a miss and two hits
        await ask(ollprox.port, "POST", "/api/generate", question(), {"APIKEY": key})
    await ask(ollprox.port, "POST", "/api/generate", question(model="gemma3:270m"))
    await ask(ollprox.port, "POST", "/api/generate", question(model="not-listed"))  # a 404
    await ask(ollprox.port, "POST", "/api/generate", b"nonsense")
    await ask(ollprox.port, "POST", "/api/generate", question(), {"APIKEY": "wrong"})
    await ask(ollprox.port, "GET", "/api/tags")
    found = await rows(ollprox.port)
    bare = next(row["key"] for row in found if row["key"] != "tester")
    assert len(bare) == 8
    await ollprox.says(f"key={bare} ")  # as the log calls it
    assert [row for row in found if row["key"] == bare] == [
        {"day": today(), "key": bare, "model": "llama2"}
        | counts(requests=2, hits=2, gpu_seconds_saved=pytest.approx(2 * GPU))
    ]
    assert [row for row in found if row["key"] != bare] == [
        {"day": today(), "key": "tester", "model": "gemma3:270m"} | counts(requests=1, **one()),
        {"day": today(), "key": "tester", "model": "llama2"} | counts(requests=1, **one()),
        {"day": today(), "key": "tester", "model": "other"} | counts(requests=2, refused=1),
    ]
    assert await rows(ollprox.port, "?by=day") == [
        {"day": today()}
        | counts(requests=6, hits=2, refused=1, gpu_seconds_saved=pytest.approx(2 * GPU), **one(2))
    ]


async def test_a_joined_request_saves_for_itself_and_costs_the_one_that_began(
    launch: Start, ollama: StandIn, settings: dict[str, object]
) -> None:
    ollprox = await launch(**settings)
    await known(ollama, ollprox.port)
    ollama.script.hold_before = 3
    async with Client(ollprox.port) as first, Client(ollprox.port) as second:
        begun = await first.begin("POST", "/api/generate", question())
        joined = await second.begin("POST", "/api/generate", question(), {"APIKEY": BOSS})
        assert "collapsed" in joined.cache_status
        ollama.script.let_go.set()
        await first.rest(begun)
        await second.rest(joined)
    assert await rows(ollprox.port, "?by=key") == [
        {"key": "boss"} | counts(requests=1, joined=1, gpu_seconds_saved=pytest.approx(GPU)),
        {"key": "tester"} | counts(requests=1, **one()),
    ]


async def test_a_joined_reader_that_leaves_at_the_last_line_has_saved_too(
    launch: Start, ollama: StandIn, settings: dict[str, object]
) -> None:
    ollprox = await launch(**settings)
    ollama.script.hold_end = True  # the last line comes, the body's end does not
    async with Client(ollprox.port) as first:
        begun = await first.begin("POST", "/api/generate", question())
        async with Client(ollprox.port) as second:
            joined = await second.begin("POST", "/api/generate", question(), {"APIKEY": BOSS})
            while not joined.body.endswith(b"}\n") or b'"done":true' not in joined.body:
                await anext(second.chunks(joined))
        while not (found := await rows(ollprox.port, "?by=key")):
            await asyncio.sleep(0.01)
        assert found[0] == {"key": "boss"} | counts(
            requests=1, joined=1, gpu_seconds_saved=pytest.approx(GPU)
        )
        ollama.script.let_go.set()
        await first.rest(begun)


async def test_it_survives_a_restart_and_the_file_is_its_owners_alone(
    launch: Start, ollama: StandIn, settings: dict[str, object], file: Path
) -> None:
    for count in (1, 2):
        ollprox = await launch(**settings)
        await ask(ollprox.port, "POST", "/api/generate", question(f"secret {count}"))
        assert (await rows(ollprox.port, "?by=key"))[0]["requests"] == count
        assert await ollprox.stop() == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert {path.name for path in file.parent.iterdir() if "usage" in path.name} == {"usage.db"}
    assert b"secret" not in file.read_bytes()
    assert b"Paris" not in file.read_bytes()
    assert KEY.encode() not in file.read_bytes()
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (SCHEMA,)


async def test_a_key_without_a_label_keeps_its_name_without_a_salt_in_the_settings(
    launch: Start, settings: dict[str, object]
) -> None:
    for count in (1, 2):
        ollprox = await launch(**settings)
        await ask(ollprox.port, "POST", "/api/generate", question(str(count)), {"APIKEY": BARE})
        assert [row["requests"] for row in await rows(ollprox.port, key=BARE)] == [count]
        await ollprox.stop()


async def test_the_last_days_are_charted_from_the_file(
    launch: Start, settings: dict[str, object]
) -> None:
    for count in (1, 2):
        ollprox = await launch(**settings)
        await ask(ollprox.port, "POST", "/api/generate", question(str(count)))
        view = (await ask(ollprox.port, "GET", "/metrics.json")).json()
        for name in ("hours", "days"):
            assert sum(span["miss"] for span in view[name]) == count
            assert sum(span["tokens"] for span in view[name]) == count * TOKENS
        assert view["kept"] is True
        assert sum(span["miss"] for span in view["minutes"]) == 1
        await ollprox.stop()


@pytest.mark.parametrize("salt", ["", "a-salt"])
async def test_limits_on_tokens_go_on_after_a_restart(
    launch: Start, settings: dict[str, object], tmp_path: Path, salt: str
) -> None:
    path = tmp_path / "limited.txt"
    path.write_text(f"{KEY}  tokens={2 * TOKENS}/day # tester\n{BOSS} # boss\n")
    if salt:
        from access.credentials import salted_digest

        digest = salted_digest(salt.encode(), KEY.encode()).hex()
        path.write_text(f"{digest}  tokens={2 * TOKENS}/day # tester\n")
    settings |= {"API_KEY_FILE": path, "API_KEY_SALT": salt}
    for prompt in ("a", "b"):
        ollprox = await launch(**settings)
        answer = await ask(ollprox.port, "POST", "/api/generate", question(prompt))
        assert answer.status == 200
        await ollprox.stop()
    ollprox = await launch(**settings)
    me = (await ask(ollprox.port, "GET", "/whoami")).json()
    assert me["used"]["tokens"] == 2 * TOKENS
    answer = await ask(ollprox.port, "POST", "/api/generate", question("c"))
    assert answer.status == 429
    assert 86_400 - PERIOD <= int(answer.headers["retry-after"]) <= 86_400


def test_earlier_tokens_count_until_the_end_of_their_slot_has_left_the_window() -> None:
    key: Any = SimpleNamespace(digest=bytes.fromhex("0123456789abcdef"))
    kept = Kept(b"", {"01234567": [(int(NOON) - 600, 3), (int(NOON) + 60, 4)]})
    now = time.monotonic()
    (first, three), (last, four) = earlier(kept, NOON)(key)
    assert (three, four) == (3, 4)
    assert first == pytest.approx(now - 600, abs=5)
    assert last == pytest.approx(now, abs=5)  # the slot that is not over counts from now


# The report.


async def test_others_see_their_own_label_and_admins_all(
    launch: Start, settings: dict[str, object], tmp_path: Path
) -> None:
    path = tmp_path / "four-keys.txt"
    path.write_text(f"{KEY} # tester\n{BOSS} # boss\n{BARE}\nscraper metrics # scraper\n")
    ollprox = await launch(**settings | {"API_KEY_FILE": path})
    for key in (KEY, BOSS, BARE):
        await ask(ollprox.port, "POST", "/api/generate", question(), {"APIKEY": key})
    assert len(await rows(ollprox.port)) == len(await rows(ollprox.port, key="scraper")) == 3
    assert {row["key"] for row in await rows(ollprox.port, key=KEY)} == {"tester"}
    assert await rows(ollprox.port, "?by=day", KEY) == [
        {"day": today()} | (await rows(ollprox.port, "?by=day", KEY))[0]
    ]
    assert (await rows(ollprox.port, "?by=day", KEY))[0]["requests"] == 1
    assert len(await rows(ollprox.port, key=BARE)) == 1
    assert (await report(ollprox.port, key="wrong")).status == 401


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("from=yesterday", "from takes a day"),
        ("from=20261128", "from takes a day"),
        ("to=2026-02-30", "to takes a day"),
        ("from=2026-11-02&to=2026-11-01", "later"),
        ("by=hour", "by takes"),
        ("by=day,day", "by takes"),
        ("by=day,", "by takes"),
        ("format=xml", "format takes"),
        ("day=2026-11-01", "no parameter"),
        ("by=day&by=key", "once"),
    ],
)
def test_wrong_parameters_are_named(query: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_query(query)


async def test_the_report_over_http(
    launch: Start, ollama: StandIn, settings: dict[str, object]
) -> None:
    ollprox = await launch(**settings)
    await known(ollama, ollprox.port)
    await ask(ollprox.port, "POST", "/api/generate", question())
    wrong = await report(ollprox.port, "?by=hour")
    assert wrong.status == 400
    assert "by takes" in wrong.json()["error"]
    assert await rows(ollprox.port, "?from=&to=&by=") == await rows(ollprox.port)
    assert await rows(ollprox.port, f"?from={today()}&to={today()}") == await rows(ollprox.port)
    assert await rows(ollprox.port, "?to=2026-01-01") == []
    header = "day,key,model,requests,hits,joined,refused,prompt_tokens,generated_tokens"
    header += ",gpu_seconds,gpu_seconds_saved"
    for answer in (
        await report(ollprox.port, "?format=csv"),
        await report(ollprox.port, Accept="text/csv, application/json;q=0.5"),
    ):
        assert answer.headers["content-type"] == "text/csv; charset=utf-8"
        lines = answer.body.decode().split("\r\n")
        assert lines[0] == header
        assert list(csv.reader(lines))[1][:4] == [today(), "tester", "llama2", "1"]
    assert (await report(ollprox.port, "?format=json", Accept="text/csv")).json()["rows"]
    head = await ask(ollprox.port, "HEAD", "/usage")
    assert head.status == 200
    assert (await ask(ollprox.port, "POST", "/usage", {})).status == 405


async def test_without_usage_file_it_is_404_and_named(ollprox: Program) -> None:
    answer = await ask(ollprox.port, "GET", "/usage?by=nonsense")
    assert answer.status == 404
    assert "USAGE_FILE" in answer.json()["error"]
    assert "ollprox_usage" not in (await ask(ollprox.port, "GET", "/metrics")).body.decode()
    view = (await ask(ollprox.port, "GET", "/metrics.json")).json()
    assert view["kept"] is False
    maps = Path(f"/proc/{ollprox.pid}/maps").read_text()
    assert "sqlite" not in maps  # it is not even loaded


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", False),
        ("*/*", False),
        ("text/csv", True),
        ("TEXT/CSV;q=0.9, application/json;q=0.8", True),
        ("text/csv;q=0.1, application/json", False),
        ("text/csv;q=0", False),
        ("text/csv;q=nonsense", False),
        ("text/html,text/csv", True),
    ],
)
def test_accept_chooses_the_form(accept: str, expected: bool) -> None:
    assert prefers_csv(accept) is expected


@given(st.text(max_size=20))
def test_no_csv_cell_is_a_formula(name: str) -> None:
    text = render(Query(by=("key",), form="csv"), {(name,): Counts()})
    cell = list(csv.reader(io.StringIO(text, newline="")))[1][0]
    assert cell in {name, f"'{name}"}
    assert cell[:1] not in set("=+-@\t\r\n＝＋－＠")  # noqa: RUF001
    assert cell.lstrip()[:1] not in set("=+-@")


def test_a_formula_as_a_label_is_defused() -> None:
    for name in ('=cmd|"/c calc"!A1', "+1", "-1", "@SUM(A1)", "\t=1", "  =1", "\n=1"):
        text = render(Query(by=("key",), form="csv"), {(name,): Counts()})
        assert list(csv.reader(io.StringIO(text, newline="")))[1][0] == f"'{name}"


async def test_the_command_line_prints_a_table(
    launch: Start, settings: dict[str, object], file: Path
) -> None:
    ollprox = await launch(**settings)
    await ask(ollprox.port, "POST", "/api/generate", question())
    await rows(ollprox.port)  # which writes
    out = run_usage(file)
    header, line = out.stdout.splitlines()
    assert header.split()[:4] == ["day", "key", "model", "requests"]
    assert line.split()[:2] == [today(), "tester"]
    assert len(header) >= len(line)
    assert run_usage(file, "by=key").stdout.split()[0] == "key"
    assert run_usage(file, "by=key&format=csv").stdout.startswith("key,requests,")
    assert run_usage(file, "by=hour").returncode == 2
    missing = run_usage(file.parent / "none.db")
    assert missing.returncode == 1
    assert "none.db cannot be read: No such file" in missing.stderr
    assert not (file.parent / "none.db").exists()
    unset = run_usage("")
    assert unset.returncode == 2
    assert "USAGE_FILE" in unset.stderr


def run_usage(file: Path | str, *query: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "ollprox.py"), "--usage", *query],
        env={**DEFAULTS, "PATH": os.environ["PATH"], "USAGE_FILE": str(file)},
        capture_output=True,
        text=True,
        check=False,
    )


# The file.


def batch(**models: int) -> Batch:
    """A batch with so many requests for each model."""
    made = Batch()
    for model, requests in models.items():
        made.row(DAY, "Mary", model).add(Counts(requests=requests))
    return made


def test_what_is_added_is_read_by_day_key_and_model(file: Path) -> None:
    usage = UsageFile(file, 400)
    usage.write(batch(a=1, b=2), NOON)
    usage.write(batch(b=3), NOON)
    assert usage.rows(Query()) == {
        (DAY, "Mary", "a"): Counts(requests=1),
        (DAY, "Mary", "b"): Counts(requests=5),
    }
    assert usage.rows(Query(by=("key",), own="Mary")) == {("Mary",): Counts(requests=6)}
    assert usage.rows(Query(by=("key",), own="Tom")) == {}
    assert usage.rows(Query(last="2026-11-27")) == {}
    assert usage.rows(Query(first=DAY, last=DAY, by=("day",))) == {(DAY,): Counts(requests=6)}


def test_old_days_are_dropped(file: Path) -> None:
    usage = UsageFile(file, 2)
    usage.write(batch(a=1), NOON)
    usage.write(Batch(tokens={("k", 0): 1}), NOON + 86_400)
    assert len(stored(file)) == 1
    usage.write(Batch(tokens={("k", 0): 1}), NOON + 2 * 86_400)
    assert stored(file) == []


def test_hours_and_tokens_come_back(file: Path) -> None:
    usage = UsageFile(file, 400)
    hour = int(NOON) - 3600
    made = Batch(tokens={("k", int(NOON) - 600): 7, ("k", int(NOON) - 90_000): 9})
    for minute in (hour, hour + 60):
        made.pass_minute(Span(minute, {**Span(0).outcomes, Outcome.HIT: 2}, 5, 1))
    usage.write(made, NOON)
    kept = usage.start(NOON)
    assert kept.spent == {"k": [(int(NOON) - 300, 7)]}
    assert kept.hours == (Span(hour, {**Span(0).outcomes, Outcome.HIT: 4}, 10, 2),)
    assert kept.salt == usage.start(NOON).salt
    assert len(kept.salt) == 32


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path.write_text("my diary\n" * 100), "not a usage file"),
        (lambda path: path.write_bytes(b"x"), "not a usage file"),
        (lambda path: foreign(path), "not a usage file"),
        (lambda path: newer(path), "newer OllProx"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: os.mkfifo(path), "not a regular file"),
    ],
)
def test_a_file_that_is_not_ours_is_left_untouched(
    file: Path, make: Callable[[Path], object], says: str
) -> None:
    make(file)
    before = file.read_bytes() if file.is_file() else b"", file.stat().st_mode
    usage = UsageFile(file, 400)
    for use in (lambda: usage.start(NOON), lambda: usage.write(batch(a=1), NOON)):
        with pytest.raises(UsageError, match=says):
            use()
    assert (file.read_bytes() if file.is_file() else b"", file.stat().st_mode) == before
    assert len(list(file.parent.iterdir())) == 1


def foreign(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE usage (mine)")
        connection.execute(f"PRAGMA user_version = {SCHEMA}")
    path.with_name(path.name + "-wal").unlink(missing_ok=True)


def newer(path: Path) -> None:
    UsageFile(path, 400).write(batch(a=1), NOON)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA + 1}")


@pytest.mark.parametrize(
    "change",
    ["DELETE FROM meta", "UPDATE hours SET hit = 'x'", "DROP TABLE tokens"],
)
def test_damage_inside_the_file_is_found_at_the_start(file: Path, change: str) -> None:
    made = batch(a=1)
    made.pass_minute(Span(int(NOON) - 3600, tokens=1))
    UsageFile(file, 400).write(made, NOON)
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.execute(change)
    opened = open_file(file, 400, NOON)
    assert re.search("damaged|no such table", opened.trouble)
    assert opened.kept.hours == ()


def test_a_file_that_others_could_read_is_closed_to_them(file: Path) -> None:
    file.touch(0o644)
    usage = UsageFile(file, 400)
    usage.write(batch(a=1), NOON)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize("moment", range(8))
def test_a_file_is_whole_after_kill_9_at_any_moment(file: Path, moment: int) -> None:
    """A process writes batches of 100 rows in a loop; each is in the file whole, or not at all."""
    code = (
        "import sys; from pathlib import Path; from watch.usage import *;"
        "usage = UsageFile(Path(sys.argv[1]), 400); made = Batch();"
        f"[made.row('{DAY}', 'Mary', f'm{{n:03}}').add(Counts(requests=1)) for n in range(100)]\n"
        f"while True: print('.', end='', flush=True); usage.write(made, {NOON})"
    )
    writes = 0
    for dots in (1, 3, 4):  # the first is before the file is made
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(file)], cwd=ROOT, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        began = time.monotonic()
        for _ in range(dots):
            process.stdout.read(1)
        lasts = (time.monotonic() - began) / dots if dots > 1 else 0.03
        time.sleep(lasts * moment / 8)  # somewhere in a write; none may be the wrong one
        process.kill()
        writes += dots - 1 + process.communicate()[0].count(b".")
        found = list(UsageFile(file, 400).rows(Query(), create=True).values())
        assert all(each == found[0] for each in found)
        assert len(found) in {0, 100}
        done = found[0].requests if found else 0
        assert done in {writes, writes + 1}
        writes = done


# Serving goes on.


async def test_a_locked_file_costs_nothing_and_is_caught_up(
    launch: Start, settings: dict[str, object], file: Path
) -> None:
    ollprox = await launch(**settings)
    await ask(ollprox.port, "POST", "/api/generate", question())
    await rows(ollprox.port)
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        for prompt in "abc":
            answer = await ask(ollprox.port, "POST", "/api/generate", question(prompt))
            assert answer.status == 200
        failed = await report(ollprox.port)
        assert failed.status == 503
        assert "USAGE_FILE" in failed.json()["error"]
        await report(ollprox.port)
        other.execute("ROLLBACK")
    assert (await rows(ollprox.port, "?by=key"))[0]["requests"] == 4
    await ollprox.says("is written again")
    assert ollprox.text().count("cannot be used: database is locked") == 1  # once for all
    text = (await ask(ollprox.port, "GET", "/metrics")).body.decode()
    assert "\nollprox_usage_write_failures_total 2\n" in text
    assert "\nollprox_usage_pending_rows 0\n" in text


@pytest.mark.parametrize("kind", ["foreign", "newer", "corrupt", "no folder", "locked"])
async def test_a_file_that_cannot_be_used_is_a_warning_at_the_start(
    launch: Start, settings: dict[str, object], file: Path, kind: str
) -> None:
    lock = None
    if kind == "foreign":
        foreign(file)
    elif kind == "newer":
        newer(file)
    elif kind == "corrupt":
        UsageFile(file, 400).write(batch(**{f"m{n}": 1 for n in range(2000)}), NOON)
        data = file.read_bytes()
        file.write_bytes(data[:4096] + b"\xff" * (len(data) - 4096))
    elif kind == "no folder":
        settings["USAGE_FILE"] = file.parent / "none" / "usage.db"
    before = file.read_bytes() if file.exists() else b""
    if kind == "locked":
        UsageFile(file, 400).write(batch(a=1), NOON)
        lock = sqlite3.connect(file, isolation_level=None)
        lock.execute("BEGIN EXCLUSIVE")
    ollprox = await launch(**settings)
    await ollprox.says("WARNING USAGE_FILE .* cannot be used")
    for prompt in "ab":
        answer = await ask(ollprox.port, "POST", "/api/generate", question(prompt))
        assert answer.status == 200
    assert (await report(ollprox.port)).status == 503
    assert ollprox.text().count("cannot be used") == 1
    if lock is not None:
        lock.close()
        assert (await rows(ollprox.port, "?by=key"))[-1]["requests"] == 2
    else:
        assert (file.read_bytes() if file.exists() else b"") == before


async def test_a_full_disk_is_a_warning_and_what_was_written_stays(
    settings: dict[str, object], file: Path, ollama: StandIn, launch: Start
) -> None:
    ollprox = await launch(**settings)
    await ask(ollprox.port, "POST", "/api/generate", question())
    before = await rows(ollprox.port)
    # No write of this process to a file goes beyond its first byte; its log is one of them.
    _, hard = resource.prlimit(ollprox.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(ollprox.pid, resource.RLIMIT_FSIZE, (1, hard))
    answer = await ask(ollprox.port, "POST", "/api/generate", question("while it is full"))
    assert answer.status == 200
    full = await rows(ollprox.port, "?by=day")  # of the file, and of what is in memory
    assert full[0]["requests"] == before[0]["requests"] + 1
    assert sums(file) == before[0]["requests"]
    text = (await ask(ollprox.port, "GET", "/metrics")).body.decode()
    assert "\nollprox_usage_write_failures_total 1\n" in text
    assert "\nollprox_usage_pending_rows 1\n" in text
    resource.prlimit(ollprox.pid, resource.RLIMIT_FSIZE, (hard, hard))
    assert (await rows(ollprox.port, "?by=day"))[0]["requests"] == before[0]["requests"] + 1
    assert sums(file) == before[0]["requests"] + 1
    await ollprox.says("is written again")


async def test_counts_reach_the_file_without_a_report_or_a_good_end(
    launch: Start, settings: dict[str, object], file: Path
) -> None:
    ollprox = await launch(**settings)
    await ask(ollprox.port, "POST", "/api/generate", question())
    async with asyncio.timeout(20):
        while sums(file) < 1:
            await asyncio.sleep(0.05)
    ollprox.process.send_signal(signal.SIGKILL)
    await ollprox.process.wait()
    ollprox = await launch(**settings)
    assert (await rows(ollprox.port, "?by=key"))[0]["requests"] == 1


# In memory.


class Broken(UsageFile):
    """A file that cannot be written."""

    def write(self, batch: Batch, now: float) -> None:
        raise UsageError("broken")


def record(outcome: Outcome = Outcome.MISS, **values: Any) -> Record:
    made = Record("127.0.0.1")
    made.label, made.caller, made.generates, made.outcome = "Mary", "Mary", True, outcome
    for name, value in values.items():
        setattr(made, name, value)
    return made


def counter(file: UsageFile) -> UsageCounter:
    return UsageCounter(Opened(file, Kept(b"", {})), clock=lambda: NOON)


def test_memory_is_bounded_while_nothing_can_be_written(file: Path) -> None:
    usage = counter(Broken(file, 400))
    for n in range(MAX_PENDING + 50):
        usage.count(record(model=f"m{n}"))
        if n % 5000 == 0:
            usage._write()
    usage._write()
    assert usage.pending == MAX_PENDING + 1
    assert usage._pending.rows[DAY, OTHER, OTHER].requests == 50
    assert sum(row.requests for row in usage._pending.rows.values()) == MAX_PENDING + 50
    assert usage.failures == 4


def test_a_batch_bounds_its_hours_and_tokens() -> None:
    made = Batch()
    for hour in range(2000):
        made.pass_minute(Span(3600 * hour, tokens=1))
    for n in range(MAX_PENDING + 9):
        made.spend("k", n, 1)
    assert len(made.hours) == 31 * 24
    assert max(made.hours) == 3600 * 1999
    assert len(made.tokens) == MAX_PENDING


def test_any_path_and_any_number_of_rows_will_do(tmp_path: Path) -> None:
    name = b"100% odd?#&mode=ro \xff.db"
    usage = UsageFile(Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)), 400)
    usage.write(batch(a=1), NOON)
    assert os.listdir(os.fsencode(tmp_path)) == [name]
    text = render(Query(), {(DAY, "k", str(n)): Counts() for n in range(3)})
    assert [row["model"] for row in json.loads(text)["rows"]] == ["0", "1", "2"]


def test_too_many_rows_are_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("watch.usage.MAX_ROWS", 2)
    usage = UsageFile(file, 400)
    usage.write(batch(a=1, b=2), NOON)
    assert len(usage.rows(Query())) == 2
    usage.write(batch(c=3), NOON)
    with pytest.raises(ValueError, match="more than 2 rows"):
        usage.rows(Query())
    assert usage.rows(Query(by=("key",))) == {("Mary",): Counts(requests=6)}


def test_a_model_with_half_a_surrogate_pair_is_counted(file: Path) -> None:
    usage = counter(UsageFile(file, 400))
    usage.count(record(model="m\ud83d"))
    usage._write()
    assert stored(file)[0][2] == "m\\ud83d"


def test_an_answer_of_the_shared_cache_took_no_tokens(file: Path) -> None:
    usage = counter(UsageFile(file, 400))
    key = SimpleNamespace(label="Mary", tokens=(), digest=b"12345678")
    flight: Any = SimpleNamespace(
        permit=SimpleNamespace(key=key),
        source=Source.SHARED_CACHE,
        usage=Usage(6, 15, 5, 1.0),
        model="m",
    )
    usage.count_flight(flight)
    assert usage.pending == 0
    flight.source = Source.GENERATED
    usage.count_flight(flight)
    assert usage._pending.rows[DAY, "Mary", "m"].generated_tokens == 5


def test_sums_too_large_for_sqlite_are_cut(file: Path) -> None:
    usage = UsageFile(file, 400)
    made = Batch()
    made.row(DAY, "Mary", "m").add(Counts(generated_tokens=1 << 70))
    usage.write(made, NOON)
    assert usage.rows(Query())[DAY, "Mary", "m"].generated_tokens == (1 << 63) - 1


def test_a_warning_says_what_follows(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.write_text("mine")
    opened = open_file(file, 400, NOON)
    assert "left as it is" in opened.trouble
    assert "limits on tokens begin anew" in caplog.text
    usage = counter(UsageFile(file, 400))
    usage.count(record())
    usage._write()
    usage._write()
    assert caplog.text.count("stay in memory until") == 1
