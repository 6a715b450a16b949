"""Who gets in: the program and its key file, and the messages about both."""

import asyncio
import hashlib
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from client import KEY, Client, ask, question, request
from conftest import Program, Start
from standin import StandIn

from access.credentials import MAX_WRONG, salted_digest
from access.keytool import change_file
from access.rights import Limit
from keystore import SETTLE_TIME
from settings import Settings, SettingsError
from startup import open_keys

Headers = dict[str, str]


async def status(port: int, headers: Headers) -> int:
    answer = await ask(port, "POST", "/call_model", question(), {"APIKEY": ""} | headers)
    return answer.status


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"apikey": KEY}, 200),
        ({"ApiKey": KEY}, 200),
        ({"X-API-Key": KEY}, 200),
        ({"api-key": KEY}, 200),
        ({"Authorization": f"Bearer {KEY}"}, 200),
        ({"authorization": f"bearer {KEY}"}, 200),
        ({"APIKEY": KEY, "Authorization": "Bearer dummy"}, 200),
        ({"APIKEY": "wrong", "Authorization": f"Bearer {KEY}"}, 200),
        ({"APIKEY": "wrong", "x-api-key": "wrong", "Authorization": KEY}, 401),
        ({"X-API-Key": KEY, "Authorization": "Bearer dummy"}, 200),
        ({"X-API-Key": "wrong", "APIKEY": KEY}, 200),
        ({"APIKEY": KEY[:-1]}, 401),
        ({"APIKEY": KEY + "x"}, 401),
        ({"APIKEY": KEY.upper()}, 401),
        ({"Authorization": KEY}, 401),
        ({"Authorization": "Bearer "}, 401),
        ({}, 401),
    ],
)
async def test_where_a_key_may_be(
    ollprox: Program, ollama: StandIn, headers: Headers, expected: int
) -> None:
    assert await status(ollprox.port, headers) == expected
    assert len(ollama.asked()) == (expected == 200)


async def test_a_header_twice_with_two_values_is_401(ollprox: Program) -> None:
    twice = request("POST", "/call_model", question(), {"APIKEY": KEY, "apikey": "other"})
    same = request("POST", "/call_model", question(), {"APIKEY": KEY, "apikey": KEY})
    async with Client(ollprox.port) as client:
        await client.send(same)
        assert (await client.rest(await client.head())).status == 200
        await client.send(twice)
        assert (await client.head()).status == 401


async def test_wrong_keys_beside_a_valid_one_do_not_count_against_the_address(
    ollprox: Program,
) -> None:
    """As an agent sends a placeholder beside its user's key."""
    async with Client(ollprox.port) as client:
        for _ in range(MAX_WRONG + 2):
            headers = {"X-API-Key": "placeholder", "APIKEY": "", "Authorization": f"Bearer {KEY}"}
            assert (await client.ask("GET", "/api/tags", headers=headers)).status == 200
        assert (await client.ask("GET", "/", headers={"APIKEY": "wrong"})).status == 401


async def test_each_wrong_key_of_a_request_counts(ollprox: Program) -> None:
    wrong = {"APIKEY": "a", "X-API-Key": "b", "api-key": "c", "Authorization": "Bearer d"}
    found = [(await ask(ollprox.port, "GET", "/", headers=wrong)).status for _ in range(3)]
    assert found == [401, 401, 429]
    assert (await ask(ollprox.port, "GET", "/nope")).status == 404


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/api/chat", ["curl -H 'APIKEY: <your key>'", "'Authorization: Bearer <your key>'"]),
        ("/v1/chat/completions", ["'Authorization: Bearer <your key>'"]),
        ("/v1/messages", ["'x-api-key: <your key>'"]),
    ],
)
async def test_a_refusal_shows_the_header_that_the_apis_clients_use(
    ollprox: Program, path: str, shown: list[str]
) -> None:
    answer = await ask(ollprox.port, "POST", path, b"{}", {"APIKEY": ""})
    assert answer.status == 401
    error = answer.json()["error"]
    message = error if isinstance(error, str) else error["message"]
    assert message.startswith("there is no API key: send yours ")
    assert all(text in message for text in shown)
    assert ("APIKEY" in message) is (path == "/api/chat")
    if isinstance(error, str):
        assert answer.json()["status"] == message  # which is all that Ollama's own client shows


async def test_a_key_without_a_scheme_is_refused_with_a_hint(ollprox: Program) -> None:
    answer = await ask(ollprox.port, "GET", "/", headers={"APIKEY": "", "Authorization": KEY})
    assert answer.status == 401
    assert (
        "there is no API key (in Authorization, write Bearer before it)" in answer.json()["error"]
    )
    plain = await ask(ollprox.port, "GET", "/", headers={"APIKEY": ""})
    assert "Bearer before it" not in plain.json()["error"]


async def test_no_key_passes_on_in_any_header(ollprox: Program, ollama: StandIn) -> None:
    other = "placeholder-0123456789"
    headers = {"APIKEY": KEY, "X-API-Key": other, "api-key": other, "X-Note": f"my {other}"}
    headers |= {"X-Copy": KEY, "Authorization": "Bearer another-0123456789"}
    assert await status(ollprox.port, headers) == 200
    (seen,) = ollama.asked()
    assert not [word for word in (KEY, other, "another-") if word.encode() in seen.raw]


# Rights.


async def test_an_expired_key_is_told_so_and_nobody_else(launch: Start, key_file: Path) -> None:
    key_file.write_text(f"{KEY} until=2020-01-31  # old\ngood-key-0123456789\n")
    ollprox = await launch()
    async with Client(ollprox.port) as client:
        for _ in range(MAX_WRONG + 2):  # which is no guess
            answer = await client.ask("GET", "/api/tags")
            assert answer.status == 401
            assert answer.json()["error"].startswith("the API key has expired")
        answer = await client.ask("GET", "/api/tags", headers={"APIKEY": KEY[:-1]})
        assert answer.json()["error"].startswith("the API key is not valid")
        beside = {"APIKEY": KEY, "X-API-Key": "good-key-0123456789"}
        assert (await client.ask("GET", "/api/tags", headers=beside)).status == 200


async def test_the_options_admin_and_metrics(launch: Start, key_file: Path) -> None:
    key_file.write_text(
        f"{KEY} admin\nmetrics-key-0123 metrics # m\nplain-key-012345 # p\nother-key-012345 # o\n"
    )
    ollprox = await launch()
    await ask(ollprox.port, "POST", "/call_model", question(), {"APIKEY": "other-key-012345"})
    found = {}
    for key in (KEY, "metrics-key-0123", "plain-key-012345"):
        dropped = await ask(ollprox.port, "DELETE", "/cache", headers={"APIKEY": key})
        figures = await ask(ollprox.port, "GET", "/metrics", headers={"APIKEY": key})
        found[key] = dropped.status, b'key="o"' in figures.body
    assert list(found.values()) == [(200, True), (403, True), (403, False)]


async def test_with_cache_per_key_two_callers_never_share(launch: Start, key_file: Path) -> None:
    """Not with labels that look alike either, nor with a label that is the start of a digest."""
    lines = [b"one-key-01234567 # \xff", b"two-key-01234567 # \xfe", b"three-key-01234567"]
    key_file.write_bytes(b"\n".join([*lines, b"four-key-01234567 # \xff"]) + b"\n")
    ollprox = await launch(CACHE_PER_KEY="1", LOG_LEVEL="DEBUG")
    hits = []
    for key in ("one", "two", "three", "four", "three"):
        headers = {"APIKEY": f"{key}-key-01234567"}
        answer = await ask(ollprox.port, "POST", "/call_model", question(), headers)
        hits.append("hit" in answer.cache_status)
    assert hits == [False, False, False, True, True]


@pytest.mark.parametrize(("one", "other"), [("anna", "ann"), ("anna", "anne"), ("b x", "b y")])
async def test_with_cache_per_key_labels_that_begin_alike_do_not_share(
    launch: Start, key_file: Path, one: str, other: str
) -> None:
    key_file.write_text(f"one-key-01234567  # {one}\ntwo-key-01234567  # {other}\n")
    ollprox = await launch(CACHE_PER_KEY="1")
    hits = []
    for key in ("one", "two", "one", "two"):
        headers = {"APIKEY": f"{key}-key-01234567"}
        answer = await ask(ollprox.port, "POST", "/call_model", question(), headers)
        hits.append("hit" in answer.cache_status)
    assert hits == [False, False, True, True]


async def test_key_defaults_are_checked_at_the_start(launch: Start, key_file: Path) -> None:
    ollprox = await launch("--check", KEY_DEFAULTS="rate=60/minutes")
    assert await ollprox.process.wait() == 2
    assert "FAIL  keys      KEY_DEFAULTS: rate is malformed; write rate=60/minute" in ollprox.text()
    keys = open_keys(Settings(api_key_file=str(key_file), key_defaults="running=4 rate=9/day"))
    key = keys.find(salted_digest(keys.salt, KEY.encode()), 0)
    assert key is not None
    assert (key.running, key.rate) == (4, (Limit(9, 86400),))


async def test_a_file_of_ten_thousand_keys_with_rights_is_read(
    launch: Start, key_file: Path
) -> None:
    lines = [
        f"key-{number:020d} models=llama{number % 9}*,qwen3:8b rate=60/minute  # l{number}\n"
        for number in range(10_000)
    ]
    ollprox = await launch(KEY_REFRESH=0.1)
    key_file.write_text("".join([*lines, f"{KEY} running=2\n"]))
    await ollprox.says("API keys: 10001 read from")
    assert await status(ollprox.port, {"APIKEY": KEY}) == 200


async def test_a_refusal_says_what_to_do_and_reads_no_body(
    ollprox: Program, ollama: StandIn
) -> None:
    async with Client(ollprox.port) as client:
        headers = {"APIKEY": "wrong-key-wrong-key", "Content-Length": "30000000"}
        answer = await client.ask("POST", "/call_model", b"", {**headers, "Expect": "100-continue"})
        assert answer.status == 401
        assert b'\r\nWWW-Authenticate: Bearer realm="OllProx"\r\n' in answer.head
        assert b"Basic" not in answer.head  # or browsers would attach it to foreign pages
        assert answer.headers["connection"] == "close"
        assert "curl -H 'APIKEY: <your key>'" in answer.json()["error"]
    for path in ("/nope", "/", "/call_model"):
        assert (await ask(ollprox.port, "GET", path, headers={"APIKEY": ""})).status == 401
    assert ollama.asked() == []


async def test_keys_are_never_seen_outside(launch: Start, ollama: StandIn, tmp_path: Path) -> None:
    """In logs of any level, in errors, or upstream; nor is the salt, nor a parser's quote."""
    salt, good, bad = "a-salt-that-is-marked", "marked-good-key-0123456789", "marked-bad-key"
    path = tmp_path / "salted.txt"
    path.write_text(hashlib.sha256((salt + good).encode()).hexdigest() + "\nmarked-in-the-file\n")
    ollprox = await launch(
        API_KEY_FILE=path,
        API_KEY_SALT=salt,
        LOG_LEVEL="DEBUG",
        KEY_REFRESH=0.05,
    )
    bodies = []
    for key in (good, bad):
        for header in ("APIKEY", "X-API-Key", "Authorization"):
            value = f"Bearer {key}" if header == "Authorization" else key
            headers = {"APIKEY": "", header: value, "X-Other": key}
            for path_of in ("/call_model", "/nope", "/api/generate/"):
                answer = await ask(ollprox.port, "POST", path_of, question(), headers)
                bodies.append(answer.head + answer.body)
            bad_head = f"POST /call_model HTTP/1.1\r\nHost: a\r\n{header} : {value}\r\n\r\n"
            async with Client(ollprox.port) as client:
                await client.send(bad_head.encode())
                bodies.append(await client.reader.read())
    path.write_text("marked-line\n")
    await ollprox.says("0 read from")
    await ollprox.stop()
    everything = b"".join([*bodies, *(seen.raw for seen in ollama.seen)]) + ollprox.log.read_bytes()
    assert b"marked" not in everything.replace(b"salted.txt", b"")
    assert len(ollama.asked()) >= 1


async def test_plain_keys_become_digests_that_no_log_explains(
    ollprox: Program, key_file: Path
) -> None:
    await ask(ollprox.port, "GET", "/api/tags", headers={"APIKEY": "some-wrong-key"})
    await ask(ollprox.port, "POST", "/call_model", question())
    await ollprox.says(r"key=[0-9a-f]{8} .* status=401")
    await ollprox.says(r"key=tester .* status=200")


# The file changes while the program runs.


async def until(port: int, key: str, expected: int) -> None:
    """Ask until a key is valid, or is not any more; a 429 ends its connection."""
    async with asyncio.timeout(8):
        while (await ask(port, "GET", "/nope", headers={"APIKEY": key})).status != expected:
            await asyncio.sleep(0.02)


async def test_adding_and_removing_keys_takes_effect_on_open_connections(
    launch: Start, key_file: Path
) -> None:
    ollprox = await launch(KEY_REFRESH=0.1)
    async with Client(ollprox.port) as client:
        assert (await client.ask("POST", "/call_model", question())).status == 200
        replacement = key_file.with_suffix(".new")
        replacement.write_text("another-key-0123456789\r\na-third-key-0123456789\r\n")
        replacement.rename(key_file)  # as editors do
        await ollprox.says("2 read from")
        await until(ollprox.port, "another-key-0123456789", 404)
        answer = await client.ask("POST", "/call_model", question())
        assert answer.status == 401


async def test_a_key_that_sits_in_every_table_is_revoked_all_the_same(
    launch: Start, ollama: StandIn, key_file: Path
) -> None:
    """The head is known, the question is known, and the answer is stored: byte for byte."""
    ollprox = await launch(KEY_REFRESH=0.2)
    async with Client(ollprox.port) as client, asyncio.timeout(10):
        outcomes = [await client.ask("POST", "/call_model", question()) for _ in range(3)]
        assert ["hit" in answer.cache_status for answer in outcomes] == [False, True, True]
        key_file.write_text("another-key-0123456789\n")
        while (answer := await client.ask("POST", "/call_model", question())).status == 200:
            assert "hit" in answer.cache_status
        assert answer.status == 401
    assert (await ask(ollprox.port, "POST", "/call_model", question())).status == 401
    assert len(ollama.asked()) == 1


async def test_an_emptied_file_lets_nobody_in(launch: Start, key_file: Path) -> None:
    ollprox = await launch(KEY_REFRESH=0.1)
    await until(ollprox.port, KEY, 404)
    key_file.write_text("")
    await until(ollprox.port, KEY, 401)


async def test_a_file_that_vanishes_keeps_the_keys(launch: Start, key_file: Path) -> None:
    ollprox = await launch(KEY_REFRESH=0.05)
    text = key_file.read_text()
    key_file.unlink()
    await ollprox.says("ERROR .*cannot be read")
    assert await status(ollprox.port, {"APIKEY": KEY}) == 200
    key_file.write_text(text + "second-key-0123456789\n")
    await ollprox.says("ERROR .*can be read again")
    await until(ollprox.port, "second-key-0123456789", 404)
    assert ollprox.text().count("cannot be read") == 1


async def test_a_hundred_thousand_lines_do_not_stop_the_loop(launch: Start, key_file: Path) -> None:
    ollprox = await launch(KEY_REFRESH=0.1)
    lines = [f"key-{number:020d}\r\n" for number in range(100_000)]
    key_file.write_text("\ufeff" + "".join(lines) + KEY, encoding="utf-8", newline="")
    await until(ollprox.port, "key-00000000000000099999", 404)
    assert await status(ollprox.port, {"APIKEY": KEY}) == 200


# The start.


async def test_without_a_file_a_key_is_made_and_shown_once(launch: Start) -> None:
    ollprox = await launch(API_KEY_FILE="")
    key = (await ollprox.says(r'curl http://localhost:\d+/call_model -H "APIKEY: (\S+)"'))[1]
    assert len(key) >= 22  # 128 bits
    assert await status(ollprox.port, {"APIKEY": key}) == 200
    assert "To make a lasting one: python ollprox.py keys add" in ollprox.text()


async def test_a_key_in_place_of_the_files_name_is_not_shown(launch: Start) -> None:
    for value in ("secretgardenkey", "c2VjcmV0/Z2FyZGVu+a2V5=="):
        ollprox = await launch("--check", API_KEY_FILE=value)
        assert await ollprox.process.wait() == 2
        assert "FAIL  keys      API_KEY_FILE: it does not name a file" in ollprox.text()
        assert value not in ollprox.text()
    for value in ("keys.txt", "keys/mine", "/run/secrets/ollprox", "../keys"):
        ollprox = await launch("--check", API_KEY_FILE=value)
        assert await ollprox.process.wait() == 2
        assert Path(value).name in ollprox.text()


async def test_what_is_probably_a_mistake_is_warned_about(launch: Start, key_file: Path) -> None:
    key_file.write_text(f"{KEY}#Mary\n{KEY}#Mary\n")
    ollprox = await launch("--check", ADMIN_LABELS="Mary", CACHE_PERKEY="1")
    assert await ollprox.process.wait() == 0
    text = ollprox.text()
    assert "line 1 has a # in its key" in text
    assert "line 2 has the same key as line 1" in text
    assert "has no key with the label that is number 1 in ADMIN_LABELS" in text
    assert "CACHE_PERKEY is not a setting of OllProx: did you mean CACHE_PER_KEY?" in text
    assert KEY not in text
    assert "Mary" not in text
    without = {"API_KEY_FILE": "", "API_KEY_SALT": "pepper", "ADMIN_LABELS": "Mary"}
    ollprox = await launch("--check", **without)
    assert await ollprox.process.wait() == 0
    assert "warn  keys      API_KEY_SALT is set, but API_KEY_FILE is not" in ollprox.text()
    assert "warn  keys      ADMIN_LABELS is set, but API_KEY_FILE is not" in ollprox.text()


async def test_a_file_rewritten_in_place_locks_nobody_out(launch: Start, key_file: Path) -> None:
    ollprox = await launch(KEY_REFRESH=0.05)
    async with Client(ollprox.port) as client:
        with key_file.open("w") as file:  # empty, then half, then whole
            for part in ("", f"{KEY}  # tester\nnew-key", "-0123456789\n"):
                file.write(part)
                file.flush()
                for _ in range(10):
                    assert (await client.ask("GET", "/nope")).status == 404
                    await asyncio.sleep(0.02)
        await ollprox.says("API keys: 2 read from")
        assert (await client.ask("GET", "/nope")).status == 404
        assert (await client.ask("GET", "/nope", headers={"APIKEY": "new-key"})).status == 401
    assert "0 read from" not in ollprox.text()
    assert await status(ollprox.port, {"APIKEY": "new-key-0123456789"}) == 200


@pytest.mark.parametrize(("refresh", "end"), [(1, "\n"), (1, ""), (3, "")])
async def test_a_revoked_key_is_refused_within_a_refresh_and_a_second(
    launch: Start, key_file: Path, refresh: int, end: str
) -> None:
    """Whenever it is revoked: `repeat` waits after each poll, and a poll lets a file settle."""
    key_file.write_text(f"{KEY}\nrevoked-key-0123456789\n")
    os.utime(key_file, (1, 1))
    ollprox = await launch(KEY_REFRESH=refresh)
    async with Client(ollprox.port) as client:
        moment = random.uniform(0, refresh)
        await asyncio.sleep(moment)
        begun = time.monotonic()
        change_file(key_file, lambda _: KEY.encode() + end.encode())
        revoked = {"APIKEY": "revoked-key-0123456789"}
        while (await client.ask("GET", "/nope", headers=revoked)).status == 404:
            await asyncio.sleep(0.01)
        took = time.monotonic() - begun
        assert (await client.ask("GET", "/nope")).status == 404
    slack = 0.8  # for a busy machine
    assert took < refresh + SETTLE_TIME + slack, f"revoked {moment:.3f} s after the start"


async def test_a_made_key_holds_until_the_file_gets_keys(launch: Start, tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    path.write_text("# nobody yet\n")
    ollprox = await launch(API_KEY_FILE=path, KEY_REFRESH=0.1)
    await ollprox.says("API_KEY_FILE .*keys.txt has no key in it, so this one was made")
    key = (await ollprox.says(r'-H "APIKEY: (\S+)"'))[1]
    await until(ollprox.port, key, 404)
    path.write_text(KEY)
    await until(ollprox.port, key, 401)
    await until(ollprox.port, KEY, 404)
    path.write_text("")
    await until(ollprox.port, KEY, 401)
    assert await status(ollprox.port, {"APIKEY": key}) == 401


def _missing(path: Path) -> None:
    """Leave it missing."""


def _folder(path: Path) -> None:
    path.mkdir()


def _fifo(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("make", [_missing, _folder, _fifo])
async def test_a_key_file_that_is_none_fails_the_start(
    launch: Start, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    path = tmp_path / "keys.txt"
    make(path)
    ollprox = await launch("--check", API_KEY_FILE=path)
    assert await ollprox.process.wait() == 2
    assert f"FAIL  keys      API_KEY_FILE: {path}: " in ollprox.text()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can try it as another user")
def test_a_key_file_that_may_not_be_read_fails_the_start(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    path.write_text(KEY)
    path.chmod(0o600)
    read, write = os.pipe()
    if (child := os.fork()) == 0:  # pragma: no cover - the child's
        os.setuid(65534)
        try:
            open_keys(Settings(api_key_file=str(path)))
        except SettingsError as error:
            os.write(write, str(error).encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    text = os.read(read, 1000).decode()
    os.close(read)
    assert text.startswith("API_KEY_FILE")
    assert "chmod 640" in text
    assert "a+r" not in text


async def test_a_salt_that_does_not_fit_the_file_fails_the_start(launch: Start) -> None:
    ollprox = await launch("--check", API_KEY_SALT="pepper")
    assert await ollprox.process.wait() == 2
    assert "FAIL  keys      API_KEY_SALT is set" in ollprox.text()
    assert KEY not in ollprox.text()


async def test_digests_without_a_salt_are_warned_about(launch: Start, key_file: Path) -> None:
    key_file.write_text(hashlib.sha256(b"x").hexdigest())
    ollprox = await launch("--check")
    assert await ollprox.process.wait() == 0
    assert "API_KEY_SALT is empty" in ollprox.text()


async def test_a_short_key_is_warned_about_by_its_line(launch: Start, key_file: Path) -> None:
    key_file.write_text(f"{KEY}\nshort\nsecretgardenkey\n")
    ollprox = await launch("--check")
    assert await ollprox.process.wait() == 0
    assert "warn  keys" in ollprox.text()
    assert "line 2 has a key shorter than 12" in ollprox.text()
    assert "line 3" not in ollprox.text()
    assert "short\n" not in ollprox.text()
