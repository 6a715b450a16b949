import base64
import logging
import os
import re
import stat
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from access.credentials import NO_SCHEME, new_key, salted_digest, take_credential
from access.keyfile import REST, WORK, Parsed, parse, read_file
from access.rights import Key, Limit, _can_match, _matches, parse_options
from keystore import KeyStore
from settings import normalize_model

SALT = b"pepper"
LONG = b"0123456789abcdef"
Pair = tuple[bytes, bytes]


def labels(text: bytes, *, digests: bool = False) -> dict[bytes, str]:
    keys = parse(text, SALT, digests=digests).keys
    return {digest: key.label for digest, key in keys.items()}


def test_a_plain_file_has_a_key_a_line_with_labels() -> None:
    text = b"\n# all of us\nalpha-0123456789  # Alice \nbeta-0123456789#x\n   \n#gone\n"
    assert labels(text) == {
        salted_digest(SALT, b"alpha-0123456789"): "Alice",
        salted_digest(SALT, b"beta-0123456789#x"): "",
    }


@pytest.mark.parametrize("text", [b"\xef\xbb\xbfkey-0123456789abc\r\n", b"key-0123456789abc"])
def test_bom_crlf_and_a_missing_last_newline_are_fine(text: bytes) -> None:
    assert labels(text) == {salted_digest(SALT, b"key-0123456789abc"): ""}


def test_digests_may_be_in_either_case() -> None:
    digest = salted_digest(SALT, b"key")
    for text in (digest.hex(), digest.hex().upper()):
        assert labels(f"{text}  # Bob".encode(), digests=True) == {digest: "Bob"}


def test_the_digest_is_that_of_the_documented_shell_command() -> None:
    command = """printf '%s%s' "$SALT" "$KEY" | sha256sum"""
    environ = {**os.environ, "SALT": "s4lt", "KEY": "a key's value"}
    line = subprocess.run(["sh", "-c", command], env=environ, stdout=subprocess.PIPE, check=True)
    digest = line.stdout.split()[0]
    (found,) = parse(digest, b"s4lt", digests=True).keys
    assert found == salted_digest(b"s4lt", b"a key's value")


def test_what_is_no_digest_is_reported_by_its_number_alone() -> None:
    result = parse(b"# x\nplain-secret\n", SALT, digests=True)
    assert (result.keys, result.strangers) == ({}, 1)
    assert "line 2" in result.reports[0]
    assert "plain-secret" not in result.reports[0]


def test_the_digest_of_an_empty_key_opens_nothing() -> None:
    assert labels(salted_digest(SALT, b"").hex().encode(), digests=True) == {}


def test_white_space_in_a_key_is_reported() -> None:
    result = parse(b"a-key-0123456789 alice\n", SALT, digests=False)
    assert result.keys == {}
    assert "line 1" in result.reports[0]


def test_short_plain_keys_are_warned_about_and_valid() -> None:
    result = parse(b"eleven-char\ntwelve-chars\nsecretgardenkey\n" + LONG, SALT, digests=False)
    assert len(result.keys) == 4
    assert ["line 1 has a key shorter than 12" in report for report in result.reports] == [True]


def test_a_line_full_of_spaces_takes_no_long_time() -> None:
    spaces = b" " * 1_000_000
    assert labels(b"long-key-0123456789" + spaces + b"# Mary") == {
        salted_digest(SALT, b"long-key-0123456789"): "Mary"
    }
    assert labels(b"long-key-0123456789" + spaces + b"x") == {}


def test_a_hundred_thousand_lines() -> None:
    text = b"".join(b"key-%016d\r\n" % number for number in range(100_000))
    assert len(labels(text)) == 100_000


# Where a head carries a key.


def presented(*headers: Pair) -> tuple[bytes, ...]:
    return take_credential(SALT, False, b"/", headers)[0]


def digest(key: bytes) -> bytes:
    return salted_digest(SALT, key)


def digests(*keys: bytes) -> tuple[bytes, ...]:
    return tuple(map(digest, keys))


def test_all_keys_are_found_in_the_documented_order() -> None:
    headers = [
        (b"authorization", b"Bearer five"),
        (b"api-key", b"four"),
        (b"x-api-key", b"three"),
        (b"apikey", b"two"),
    ]
    found = take_credential(SALT, True, b"/key/one/api/tags", headers)[0]
    assert found == digests(b"one", b"two", b"three", b"four", b"five")
    assert presented(*headers) == digests(b"two", b"three", b"four", b"five")
    assert presented((b"authorization", b"bearer  three")) == digests(b"three")
    assert presented((b"apikey", b"same"), (b"x-api-key", b"same")) == digests(b"same")
    assert presented((b"apikey", b""), (b"x-api-key", b"two")) == digests(b"two")
    assert presented() == ()
    assert presented((b"apikey", b""), (b"authorization", b"Bearer ")) == ()
    assert presented((b"authorization", b"Bearer")) == ()


@pytest.mark.parametrize("name", [b"apikey", b"x-api-key", b"api-key", b"authorization"])
def test_a_header_twice_with_two_values_matches_nothing(name: bytes) -> None:
    scheme = b"Bearer " if name == b"authorization" else b""
    one, two = (name, scheme + b"one"), (name, scheme + b"two")
    assert presented(one, one) == digests(b"one")
    valid_beside = (b"x-api-key" if name == b"apikey" else b"apikey", b"one")
    (nothing,) = presented(one, two, valid_beside)
    assert nothing not in digests(b"one", b"two")


def test_a_bare_key_in_authorization_is_no_key_but_noticed() -> None:
    assert presented((b"authorization", LONG)) == (NO_SCHEME,)
    assert presented((b"authorization", b"Token " + LONG)) == ()
    left = take_credential(SALT, False, b"/", [(b"authorization", LONG), (b"x-note", LONG)])[2]
    assert left == []
    left = take_credential(SALT, False, b"/", [(b"authorization", b"T " + LONG), (b"x", LONG)])[2]
    assert left == []


def test_no_header_that_held_a_key_passes_on() -> None:
    headers = [
        (b"apikey", LONG),
        (b"x-api-key", b"dummy"),
        (b"api-key", b"azure-0123456789"),
        (b"authorization", b"Bearer other-0123456789"),
        (b"x-note", b"see " + LONG),
        (b"x-azure", b"is azure-0123456789"),
        (b"x-dummy", b"dummy"),
        (b"x-no-dummy", b"a dummy of mine"),
        (b"accept", b"*/*"),
    ]
    left = [(b"x-no-dummy", b"a dummy of mine"), (b"accept", b"*/*")]
    assert take_credential(SALT, False, b"/", headers)[2] == left


def test_a_key_in_the_path_passes_on_in_no_header_whether_it_counts_or_not() -> None:
    headers = [(b"referer", b"http://a/key/secret%2Fgarden/"), (b"x", b"secret/garden")]
    for counts in (True, False):
        assert take_credential(SALT, counts, b"/key/secret%2Fgarden/", headers)[2] == []


class Value(bytes):
    """A header's value that counts how often it is searched."""

    searches = 0

    def __contains__(self, other: object) -> bool:
        Value.searches += 1
        return super().__contains__(other)  # type: ignore[operator]


@pytest.mark.parametrize("size", [100, 1000])
def test_the_search_for_keys_is_linear_in_the_head(size: int) -> None:
    """As 580 headers with keys among 1,600 others once took 38 ms."""
    Value.searches = 0
    keys: list[Pair] = [(b"apikey", b"key-0123456789-%d" % number) for number in range(size)]
    others: list[Pair] = [(b"x-%d" % number, Value(b"value-%d" % number)) for number in range(size)]
    take_credential(SALT, False, b"/key/path-0123456789/", keys + others)
    one_each: list[Pair] = [(b"apikey", LONG), (b"x-api-key", LONG[1:]), (b"api-key", LONG[2:])]
    take_credential(SALT, False, b"/key/path-0123456789/", one_each + others + [basic(b":" + LONG)])
    assert size <= Value.searches <= 10 * size


def basic(text: bytes) -> tuple[bytes, bytes]:
    return b"authorization", b"Basic " + base64.b64encode(text)


def test_with_basic_the_key_is_the_password() -> None:
    assert presented(basic(b"anyone:the:key")) == digests(b"the:key")
    assert presented(basic(b":key")) == digests(b"key")
    assert presented(basic(b"key")) == ()
    assert presented(basic(b"user:")) == ()
    assert presented((b"authorization", b"Basic not*base64")) == ()
    assert presented((b"authorization", b"Basic QQ=A")) == ()


@pytest.mark.parametrize(
    ("path", "left", "key"),
    [
        (b"/key/K/api/tags", b"/api/tags", b"K"),
        (b"/key/K/", b"/", b"K"),
        (b"/key/K", b"/", b"K"),
        (b"/key/a%2Fb%20c/api/tags", b"/api/tags", b"a/b c"),
        (b"/key//api/tags", b"/api/tags", None),
        (b"/keys/K/api/tags", b"/keys/K/api/tags", None),
        (b"/key", b"/key", None),
        (b"/key/K/key/L/api", b"/key/L/api", b"K"),
    ],
)
def test_a_key_in_the_path_is_cut_off_and_counts_where_that_is_set(
    path: bytes, left: bytes, key: bytes | None
) -> None:
    header = [(b"apikey", b"other")]
    expected = digests(key, b"other") if key else digests(b"other")
    assert take_credential(SALT, True, path, header)[:2] == (expected, left)
    assert take_credential(SALT, False, path, header)[:2] == (digests(b"other"), left)


# Reading the file again.

AGO = 5.0  # seconds; a file this old is believed at once


def write(path: Path, text: bytes, ago: float = AGO) -> None:
    """Write a file in place, as if some seconds ago."""
    path.write_bytes(text)
    os.utime(path, (time.time() - ago, time.time() - ago))


def store(path: Path, refresh: float = 0.1) -> KeyStore:
    keys = KeyStore.open(path, b"", refresh=refresh)
    result = keys.reload()
    assert isinstance(result, Parsed)
    list(keys.adopt(result))
    return keys


def poll(keys: KeyStore) -> list[str]:
    result = keys.poll()
    if result is None or isinstance(result, float):
        return []
    return [text for _, text in keys.adopt(result)]


def valid(keys: KeyStore, key: bytes) -> bool:
    return keys.find(salted_digest(keys.salt, key), time.time()) is not None


def test_a_change_is_seen_even_within_a_tick_of_the_clock(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    write(path, LONG + b"\n", ago=1.5)
    keys = store(path)
    status = path.stat()
    path.write_bytes(LONG[::-1] + b"\n")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    poll(keys)
    assert valid(keys, LONG[::-1])
    assert not valid(keys, LONG)


def test_an_old_file_is_read_only_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    write(path, LONG)
    keys = store(path)
    os.utime(path, (1, 1))
    keys = store(path)
    assert keys.poll() is None
    replacement = tmp_path / "new"
    replacement.write_bytes(LONG[::-1])
    os.utime(replacement, (1, 1))
    replacement.rename(path)
    poll(keys)
    assert valid(keys, LONG[::-1])


def test_an_emptied_file_lets_nobody_in(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    write(path, LONG)
    keys = store(path)
    write(path, b"# nobody\n")
    poll(keys)
    assert len(keys) == 0


def test_a_file_that_is_just_being_written_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "keys"
    write(path, LONG + b"\n")
    keys = store(path, refresh=3600)
    texts = [(b"other-0123", 0.0), (b"other-0123456789\n", 0.9), (b"other-0123456789\n", 1.1)]
    waits = []

    def sleep(seconds: float) -> None:
        if seconds != REST:
            waits.append(seconds)
            write(path, *texts[len(waits) - 1])

    now = time.time()
    monkeypatch.setattr("keystore.time.time", lambda: now)
    monkeypatch.setattr("keystore.time.sleep", sleep)
    write(path, b"", ago=0)
    assert ["1 read from" in text for text in poll(keys)] == [True]
    assert valid(keys, b"other-0123456789")
    assert not valid(keys, LONG)
    assert [round(seconds, 1) for seconds in waits] == [1.0, 1.0, 0.1]


def test_half_a_line_is_not_a_key_before_the_file_has_rested_for_a_refresh(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    write(path, LONG + b"\n")
    keys = store(path, refresh=10)
    for ago in (1.1, 5, 9):
        write(path, LONG + b"\nother-0123456789", ago)
        poll(keys)
        assert not valid(keys, b"other-0123456789")
        assert valid(keys, LONG)
    write(path, LONG + b"\nother-0123456789", ago=11)
    poll(keys)
    assert valid(keys, b"other-0123456789")


@pytest.mark.parametrize(("refresh", "seconds"), [(4, 2), (10, 8), (3600, 8)])
def test_a_revoked_key_of_an_unfinished_file_is_refused_after_one_refresh(
    tmp_path: Path, refresh: float, seconds: float
) -> None:
    """Not after two, as when the file was looked at again only with the next poll."""
    path = tmp_path / "keys"
    write(path, LONG + b"\n")
    keys = store(path, refresh)
    write(path, b"other-0123456789", ago=2)
    assert keys.poll() == pytest.approx(seconds, abs=0.5)
    assert valid(keys, LONG)
    write(path, b"other-0123456789", ago=min(refresh, 10))
    poll(keys)
    assert not valid(keys, LONG)


def test_half_a_line_that_is_only_touched_counts_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else whatever touches the file all the time would keep a revoked key valid."""
    path = tmp_path / "keys"
    write(path, LONG + b"\n")
    keys = store(path, refresh=10)
    for later, believed in ((0, False), (9, False), (10, True)):
        now = time.monotonic() + later
        monkeypatch.setattr("keystore.time.monotonic", lambda now=now: now)
        write(path, b"other-0123456789", ago=2)
        poll(keys)
        assert valid(keys, LONG) is not believed
        monkeypatch.undo()


def test_at_the_start_the_file_is_taken_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(LONG)  # just now, without a line's end
    keys = store(path, refresh=10)
    assert valid(keys, LONG)
    assert poll(keys) == []
    assert valid(keys, LONG)


def test_a_file_that_never_rests_is_believed_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "keys"
    write(path, LONG + b"\n")
    keys = store(path)
    clock = time.monotonic()

    def sleep(seconds: float) -> None:
        nonlocal clock
        clock += seconds
        write(path, LONG[::-1] + b"\n", ago=0)

    monkeypatch.setattr("keystore.time.monotonic", lambda: clock)
    monkeypatch.setattr("keystore.time.sleep", sleep)
    sleep(0)
    poll(keys)
    assert not valid(keys, LONG)


def test_the_key_made_at_start_holds_until_the_file_gets_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    write(path, b"# none yet\n")
    keys = store(path)
    keys.accept_only(b"made", "made-at-start")
    write(path, b"# still none\n")
    poll(keys)
    assert valid(keys, b"made")
    write(path, LONG)
    poll(keys)
    assert not valid(keys, b"made")
    write(path, b"")
    poll(keys)
    assert len(keys) == 0


def test_a_file_that_vanishes_keeps_the_keys_and_is_reported_once(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    write(path, LONG)
    keys = store(path)
    path.unlink()
    assert ["cannot be read" in text for text in poll(keys)] == [True]
    assert poll(keys) == []
    assert valid(keys, LONG)
    write(path, LONG)
    assert ["can be read again" in text for text in poll(keys)] == [True]
    path.unlink()
    path.mkdir()
    assert ["cannot be read" in text for text in poll(keys)] == [True]
    assert valid(keys, LONG)


def test_a_fifo_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="not a regular file"):
        read_file(tmp_path / "fifo")


def test_a_file_in_utf_16_is_refused(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("a-key", encoding="utf-16")
    with pytest.raises(OSError, match="UTF-8"):
        read_file(tmp_path / "keys")


def test_neither_keys_nor_salt_are_in_a_repr(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(LONG + b"  # Alice")
    keys = KeyStore.open(path, SALT)
    keys.adopt(parse(LONG, SALT, digests=False))
    assert repr(SALT)[2:-1] not in repr(keys)
    assert LONG.decode() not in repr(keys)


def test_levels_of_what_is_logged(tmp_path: Path) -> None:
    keys = KeyStore.open(tmp_path / "none", b"")
    result = keys.reload()
    assert [level for level, _ in keys.adopt(result)] == [logging.ERROR]


# Rights.


def key_of(line: str, **defaults: object) -> Key:
    """The key of a good line."""
    result = parse(line.encode(), SALT, digests=False, defaults=defaults)
    assert result.reports == []
    (key,) = result.keys.values()
    return key


def test_a_line_has_a_key_options_and_a_label() -> None:
    line = (
        "long-key-0123456789 admin metrics\tmodels=Llama2,qwen3* rate=60/minute rate=1000/day"
        "  running=2 tokens=200000/day weight=3 until=2027-01-31   # Mary of # room 5 "
    )
    end = datetime(2027, 2, 1, tzinfo=UTC).timestamp()
    assert key_of(line) == Key(
        digest=digest(b"long-key-0123456789"),
        label="Mary of # room 5",
        scope=key_of("other-key-0123456789  # Mary of # room 5").scope,
        admin=True,
        metrics=True,
        models=("llama2:latest", "qwen3*"),
        rate=(Limit(60, 60), Limit(1000, 86400)),
        running=2,
        tokens=(Limit(200000, 86400),),
        until=end,
        weight=3,
    )
    words = "admin metrics models=llama2:latest,qwen3* rate=60/minute rate=1000/day"
    rest = "tokens=200000/day running=2 weight=3 until=2027-01-31"
    rights = [f"{name}={value}" if value else name for name, value in key_of(line).rights()]
    assert " ".join(rights) == f"{words} {rest}"
    assert key_of("long-key-0123456789").rights() == []


def test_a_digest_line_takes_the_same_options() -> None:
    line = digest(LONG).hex().encode() + b" running=2 # Mary"
    (key,) = parse(line, SALT, digests=True).keys.values()
    assert (key.digest, key.running, key.label) == (digest(LONG), 2, "Mary")


MALFORMED = [
    "unknown",
    "Rate=5/hour",
    "rate",
    "rate=",
    "rate=5",
    "rate=0/hour",
    "rate=-1/hour",
    "rate=5/week",
    "rate=5/Hour",
    "rate=5/hour,6/day",
    "rate=5.5/hour",
    "rate=\u0665/hour",
    "rate=5/hour rate=6/hour",
    "rate=5/hour rate=none",
    "rate=none rate=5/hour",
    "running",
    "running=0",
    "running=00",
    "running=two",
    "running=1 running=1",
    "tokens=5/minute",
    "tokens=5/hour tokens=5/day",
    "tokens=1e6/day",
    "weight=0",
    "weight=1.5",
    "admin=yes",
    "admin=",
    "admin admin",
    "metrics=true",
    "until=2027-1-31",
    "until=2027-02-30",
    "until=20270131",
    "until=2027-W05-1",
    "until=tomorrow",
    "models",
    "models=",
    "models=a,",
    "models=,a",
    "models=a,,b",
    "models=a b",
    "models=a;b",
    "models=a?",
    "models=a:b:c",
    "models=a:",
    "models=:7b",
    "models=/a",
    "models=a//b",
    "models=a/b/c/d",
    "models=-a",
    "models=a models=b",
    "models=ä",
    "models=a*/b/c/d*/e",
    "rate=5/hour# Mary",
    "=5",
    "#x=5",
]


@pytest.mark.parametrize("options", MALFORMED)
def test_a_malformed_option_opens_nothing_and_is_reported_without_its_words(options: str) -> None:
    text = f"# x\nbad-key-0123456789 {options}\ngood-key-0123456789\n"
    if options.startswith("#"):
        text = text.replace(" #", " x#")
    result = parse(text.encode(), SALT, digests=False)
    assert [key.digest for key in result.keys.values()] == [digest(b"good-key-0123456789")]
    (report,) = result.reports
    assert report.startswith("line 2 has bad options: ")
    assert report.endswith(": it opens nothing")


OPTIONS = {"admin", "metrics", "models", "rate", "running", "tokens", "until", "weight"}


@pytest.mark.parametrize(
    "options", ["secret", "secret=5", "rate=secret", "models=secret;", "a=1#s"]
)
def test_a_report_quotes_nothing_of_a_line(options: str) -> None:
    text = f"secret-key {options} # secret\n" * 2
    assert "secret" not in str(parse(text.encode(), SALT, digests=False).reports)
    assert "secret" not in str(parse(text.encode(), SALT, digests=True).reports)


def test_the_report_says_what_would_be_right() -> None:
    for option in OPTIONS - {"admin", "metrics"}:
        (report,) = parse(f"{LONG.decode()} {option}=?".encode(), SALT, digests=False).reports
        assert f"{option} is malformed; write {option}=" in report


def test_options_replace_the_defaults_of_the_same_name_and_none_lifts_them() -> None:
    defaults = parse_options(["rate=60/minute", "rate=9/day", "running=4", "models=a", "admin"])
    assert key_of("long-key-0123456789", **defaults).rate == (Limit(60, 60), Limit(9, 86400))
    key = key_of("long-key-0123456789 rate=5/hour models=none admin=none", **defaults)
    assert (key.rate, key.running, key.models, key.admin) == ((Limit(5, 3600),), 4, None, False)
    key = key_of("long-key-0123456789 rate=none running=none", **defaults)
    assert (key.rate, key.running, key.models) == ((), None, ("a:latest",))


@pytest.mark.parametrize(
    ("patterns", "model", "may"),
    [
        ("llama2", "llama2", True),
        ("llama2", "LLAMA2:latest", True),
        ("llama2", "registry.ollama.ai/library/llama2", True),
        ("llama2", "llama2:local", True),
        ("llama2", "llama2:7b", False),
        ("llama2", "llama22", False),
        ("llama2", "me/llama2", False),
        ("llama2", "", False),
        ("Library/Llama2", "llama2", True),
        ("llama*", "llama3.2:1b", True),
        ("llama*", "codellama", False),
        ("*llama", "codellama", True),
        ("*llama", "codellama:7b", False),
        ("*llama*", "codellama:7b", True),
        ("qwen3:*b", "qwen3:8b", True),
        ("qwen3:*b", "qwen3:8b-q4", False),
        ("*", "hf.co/me/x:q4", True),
        ("me/*", "me/x:q4", True),
        ("me/*", "meme/x", False),
        ("hf.co/*", "hf.co/me/x", True),
        ("library/*", "llama2:7b", True),
        ("library/*", "me/llama2", False),
        ("registry.ollama.ai/*", "me/llama2", True),
        ("registry.ollama.ai/*", "hf.co/me/llama2", False),
        ("https://registry.ollama.ai/library/l*2", "llama2", True),
        ("a*b*c", "a-b-b-c", True),
        ("a*bc*bc", "abc", False),
        ("ab*ba:latest", "aba", False),
        ("gpt-oss:20b:cloud", "gpt-oss:20b-cloud", True),
        ("a,b*", "bb:7b", True),
        ("a.c", "abc", False),
        ("[ab]", "a", None),
    ],
)
def test_which_models_a_key_may_use(patterns: str, model: str, may: bool | None) -> None:
    line = f"long-key-0123456789 models={patterns}"
    if may is None:
        assert parse(line.encode(), SALT, digests=False).keys == {}
        return
    assert key_of(line).may_use(normalize_model(model)) is may
    assert key_of("long-key-0123456789").may_use(normalize_model(model))


names = st.text("ab:/.-*", max_size=12)


@given(names, st.text("ab:/.-", max_size=12))
def test_a_pattern_matches_as_a_regular_expression_does(pattern: str, name: str) -> None:
    expression = ".*".join(map(re.escape, pattern.split("*")))
    assert _matches(pattern, name) is (re.fullmatch(expression, name) is not None)


@given(names, st.lists(st.sampled_from(["", "a", "a/", "/a", ":a", "a.b/", "/a:a"]), max_size=8))
def test_a_pattern_that_any_name_matches_is_not_malformed(pattern: str, fills: list[str]) -> None:
    name = pattern
    for fill in fills:
        name = name.replace("*", fill, 1)
    part, space = r"[a-z0-9_][a-z0-9_.-]*", r"[a-z0-9_][a-z0-9_-]*"
    good = re.fullmatch(rf"(?:(?:[a-z0-9_][a-z0-9_.:-]*/)?{space}/)?{part}:{part}", name)
    if "*" not in name and good:
        assert _can_match(pattern)
    if "*" not in pattern:
        assert _can_match(pattern) is (good is not None)


@pytest.mark.parametrize("size", [1000, 100_000])
def test_a_long_name_or_pattern_takes_no_long_time(size: int) -> None:
    key = key_of("long-key-0123456789 models=*a*a*a*a*a*a*b")
    assert not key.may_use("a" * size)
    with pytest.raises(ValueError, match="models"):
        parse_options(["models=" + "*a" * size])


def test_the_same_key_on_two_lines_may_do_what_both_allow() -> None:
    text = """
        long-key-0123456789 admin metrics rate=5/hour running=3 tokens=9/day weight=5  # first
        other-key-0123456789
        long-key-0123456789 metrics rate=9/hour rate=1/day until=2027-01-31 models=a*,b  # second
        long-key-0123456789 metrics running=2 tokens=3/hour until=2028-01-31 models=*c  # third
    """
    result = parse(text.encode(), SALT, digests=False)
    key = result.keys[digest(b"long-key-0123456789")]
    assert (key.label, key.admin, key.metrics) == ("third", False, True)
    assert key.rate == (Limit(5, 3600), Limit(1, 86400))
    assert key.tokens == (Limit(3, 3600), Limit(9, 86400))
    assert (key.running, key.weight) == (2, 1)
    assert key.until == datetime(2027, 2, 1, tzinfo=UTC).timestamp()
    found = [model for model in ("abc", "ab", "cc", "b") if key.may_use(f"{model}:latest")]
    assert found == ["abc"]
    assert [name for name, _ in key.rights()].count("models") == 2
    assert ["line 4 has the same key as line 2" in report for report in result.reports] == [
        True,
        False,
    ]
    assert key.scope == key_of("k-0123456789012345  # third").scope


def test_a_key_on_a_malformed_line_too_opens_nothing() -> None:
    for lines in ("{0} running=0\n{0}\n{1}\n", "{0}\n{0} runing=1\n{1}\n", "{0}\n{0} x\n{0}\n{1}"):
        text = lines.format("long-key-0123456789", "other-key-0123456789")
        result = parse(text.encode(), SALT, digests=False)
        assert [*result.keys] == [digest(b"other-key-0123456789")]
        assert "opens nothing, since its key is on a line with a fault too" in result.reports[-1]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("secretgardenkey#Mary", "has a # in its key"),
        ('"secretgardenkey"', "has quotes around its key"),
        ("'secretgardenkey'  # Mary", "has quotes around its key"),
        ("API_KEY=secretgardenkey", "looks like a setting"),
        ("api-key=secretgardenkey", "looks like a setting"),
        ('{"keys":["secretgardenkey"]}', "looks like JSON"),
        ('["secretgardenkey"]', "looks like JSON"),
    ],
)
def test_a_probable_mistake_is_reported_and_a_key_all_the_same(line: str, said: str) -> None:
    result = parse(b"\n" + line.encode(), SALT, digests=False)
    assert len(result.keys) == 1
    (report,) = result.reports
    assert report.startswith(f"line 2 {said}")
    assert "secret" not in report
    assert "Mary" not in report


def test_json_of_several_words_is_called_json() -> None:
    (report,) = parse(b'{"keys": ["secretgardenkey"]}', SALT, digests=False).reports
    assert report.startswith("line 1 looks like JSON")
    assert report.endswith("it opens nothing")


def test_keys_that_end_as_base64_does_are_not_mistakes() -> None:
    assert key_of("c2VjcmV0IGdhcmRlbg==")
    assert key_of("bXkga2V5IGlzIHNlY3JldA=")


def test_labels_without_a_key_are_reported_by_their_place() -> None:
    text = b"long-key-0123456789  # Mary\n"
    result = parse(text, SALT, digests=False, admin_labels=("Mary", "mary", "long-key-0123456789"))
    assert [key.admin for key in result.keys.values()] == [True]
    assert [report.split()[-3:] for report in result.reports] == [
        ["2", "in", "ADMIN_LABELS"],
        ["3", "in", "ADMIN_LABELS"],
    ]
    assert parse(b"", SALT, digests=False, admin_labels=("Mary",)).reports == []


def test_an_admin_label_counts_for_the_label_of_the_last_line() -> None:
    text = b"long-key-0123456789  # Mary\nlong-key-0123456789  # ops\n"
    for labels, admin in ((("ops",), True), (("Mary",), False)):
        (key,) = parse(text, SALT, digests=False, admin_labels=labels).keys.values()
        assert key.admin is admin


def test_a_scope_is_the_whole_digest_or_the_bytes_of_the_label() -> None:
    text = b"one-key-0123456789 # \xff\ntwo-key-0123456789 # \xfe\nkey-without-a-label\n"
    one, two, three = parse(text, SALT, digests=False).keys.values()
    assert one.label == two.label
    assert len({one.scope, two.scope, three.scope}) == 3
    assert three.scope == three.digest
    assert one.scope.endswith(b"\xff")
    assert len(key_of("long-key-0123456789 # x").scope) > len(three.digest)


def test_a_key_expires_at_midnight(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    write(path, LONG + b" until=2027-01-31\n")
    keys = store(path)
    its = salted_digest(keys.salt, LONG)
    end = datetime(2027, 2, 1, tzinfo=UTC).timestamp()
    assert keys.find(its, end - 0.001) is not None
    assert not keys.expired(its, end - 0.001)
    assert keys.find(its, end) is None
    assert keys.expired(its, end)
    assert not keys.expired(digest(b"another"), end)
    assert (len(keys), keys.labels()) == (1, frozenset())


def test_ten_thousand_keys_with_rights_are_adopted_in_few_steps(tmp_path: Path) -> None:
    """On the event loop, so each may take as long as a request may wait."""
    lines = b"".join(
        b"key-%016d models=llama%d*,qwen3:8b rate=%d/minute running=2 # l%d\n"
        % (n, n % 9, n + 1, n)
        for n in range(10_000)
    )
    path = tmp_path / "keys"
    write(path, lines)
    keys = store(path)
    assert len(keys) == 10_000
    write(path, lines.replace(b"running=2", b"running=3"), ago=4)
    result = keys.poll()
    assert isinstance(result, Parsed)
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in {"call", "c_call"}

    sys.setprofile(count)
    try:
        list(keys.adopt(result))
    finally:
        sys.setprofile(None)
    assert calls < 100
    key = keys.find(salted_digest(keys.salt, b"key-%016d" % 9999), 0)
    assert key is not None
    assert key.running == 3


def test_a_reload_rests_often_so_that_the_event_loop_can_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it parses keys and while it compares them, but not at the start."""
    path = tmp_path / "keys"
    lines = b"".join(b"key-%016d running=2\n" % number for number in range(100))
    write(path, lines)
    clock = 0.0
    rests: list[float] = []

    def tick() -> float:
        nonlocal clock
        clock += 0.3 * WORK  # so each item takes that long
        return clock

    monkeypatch.setattr("access.keyfile.time.thread_time", tick)
    monkeypatch.setattr("access.keyfile.time.sleep", rests.append)
    keys = store(path)
    assert rests == []
    write(path, lines, ago=4)
    assert isinstance(keys.poll(), Parsed)
    assert rests == [REST] * 50


# The command line tool.


def tool(*arguments: str, given: bytes = b"", **environ: str) -> subprocess.CompletedProcess[bytes]:
    program = Path(__file__).parent.parent / "keystore.py"
    return subprocess.run(
        [sys.executable, str(program), *arguments],
        input=given,
        env={"API_KEY_SALT": "", **environ},
        capture_output=True,
        check=False,
    )


def test_new_makes_a_key_and_its_line() -> None:
    assert len(new_key()) * 6 >= 128
    out = tool("new", "--label", "Alice of\nroom 5").stdout.decode()
    key, line = (row.split(":", 1)[1].strip() for row in out.splitlines())
    assert line == f"{key}  # Alice of room 5"


def test_new_writes_a_digest_where_a_salt_is_set() -> None:
    out = tool("new", API_KEY_SALT="pepper").stdout.decode()
    key, line = (row.split(":", 1)[1].strip() for row in out.splitlines())
    assert line == digest(key.encode()).hex()


def test_hash_keeps_labels_comments_and_blank_lines() -> None:
    given = b"\xef\xbb\xbf# our keys\r\n\r\nalpha-0123456789 # Alice\nbeta"
    result = tool("hash", given=given, API_KEY_SALT="pepper")
    assert result.stdout.decode().splitlines() == [
        "# our keys",
        "",
        f"{digest(b'alpha-0123456789').hex()}  # Alice",
        digest(b"beta").hex(),
    ]


def test_hashing_twice_changes_nothing_more() -> None:
    """Else a key that is added later, and hashed with the rest, would lock all others out."""
    once = tool("hash", given=b"alpha-0123456789 # Alice\n", API_KEY_SALT="pepper").stdout
    twice = tool("hash", given=once + b"beta\n", API_KEY_SALT="pepper")
    assert twice.stdout == once + digest(b"beta").hex().encode() + b"\n"
    assert b"line 1 is a digest already" in twice.stderr


def test_hash_without_a_salt_says_what_to_do() -> None:
    result = tool("hash", given=b"x")
    assert result.returncode == 2
    assert b"API_KEY_SALT" in result.stderr
    assert result.stdout == b""


def test_salt_prints_a_fresh_salt() -> None:
    first, second = (tool("salt").stdout.strip() for _ in range(2))
    assert first != second
    assert len(first) >= 32


def test_help_explains_each_command() -> None:
    out = tool("--help").stdout.decode()
    assert all(word in out for word in ("new", "hash", "salt", "add", "list", "revoke"))


def test_new_writes_options() -> None:
    out = tool("new", "--label", "Mary", "--options", "rate=5/hour  running=2").stdout.decode()
    key, line = (row.split(":", 1)[1].strip() for row in out.splitlines())
    assert line == f"{key} rate=5/hour running=2  # Mary"


@pytest.mark.parametrize("options", ["runing=2", "rate=5", "running=2 # x"])
def test_wrong_options_make_no_key(options: str, tmp_path: Path) -> None:
    for command in (("new",), ("add", str(tmp_path / "keys"))):
        result = tool(*command, "--options", options)
        assert (result.returncode, result.stdout) == (2, b"")
        assert result.stderr.startswith(b"keystore.py: --options: ")
        assert result.stderr.count(b"\n") == 1
    assert not (tmp_path / "keys").exists()


def test_hash_keeps_options() -> None:
    given = b"alpha-0123456789   rate=5/hour\trunning=2 # Alice\n"
    result = tool("hash", given=given, API_KEY_SALT="pepper")
    line = f"{digest(b'alpha-0123456789').hex()} rate=5/hour running=2  # Alice\n"
    assert result.stdout.decode() == line


def test_hash_passes_no_word_on_that_may_be_a_key() -> None:
    given = b"good-0123456789\nalpha-0123456789 beta-0123456789\n"
    result = tool("hash", given=given, API_KEY_SALT="pepper")
    assert (result.returncode, result.stdout) == (1, b"")
    assert result.stderr.startswith(b"keystore.py: line 2 has bad options")
    assert b"beta" not in result.stderr


@pytest.mark.parametrize("salt", ["", "pepper"])
def test_a_key_is_added_listed_and_revoked(salt: str, tmp_path: Path) -> None:
    """By a symbolic link; the file keeps its other lines, its owner and its mode."""
    path, link = tmp_path / "keys.txt", tmp_path / "link"
    old = digest(LONG).hex() if salt else LONG.decode()
    path.write_text(f"\ufeff# ours\r\n{old} until=2020-01-01  # old", newline="")
    path.chmod(0o640)
    link.symlink_to(path)
    before = path.stat()
    arguments = ("--label", "Mary of  room 5", "--options", "rate=5/hour running=2", str(link))
    added = tool("add", *arguments, API_KEY_SALT=salt)
    assert added.returncode == 0, added.stderr
    key = added.stdout.decode().splitlines()[0].split(":", 1)[1].strip()
    assert link.is_symlink()
    after = path.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (
        before.st_mode,
        before.st_uid,
        before.st_gid,
    )
    assert after.st_ino != before.st_ino
    keys = KeyStore.open(path, salt.encode())
    list(keys.adopt(keys.reload()))
    found = keys.find(salted_digest(keys.salt, key.encode()), 0)
    assert found is not None
    assert (found.label, found.running) == ("Mary of room 5", 2)

    listed = tool("list", API_KEY_FILE=str(path), API_KEY_SALT=salt)
    assert [line.split() for line in listed.stdout.decode().splitlines()] == [
        ["old", "until=2020-01-01", "(expired)"],
        ["Mary", "of", "room", "5", "rate=5/hour", "running=2"],
    ]
    hidden = (key, old, digest(key.encode()).hex(), digest(LONG).hex())
    assert not [word for word in hidden if word in (listed.stdout + listed.stderr).decode()]

    revoked = tool("revoke", "Mary of room 5", str(link), API_KEY_SALT=salt)
    assert revoked.returncode == 0, revoked.stderr
    assert path.read_bytes() == f"\ufeff# ours\r\n{old} until=2020-01-01  # old\n".encode()
    assert sorted(tmp_path.iterdir()) == [path, link]


def test_revoke_removes_each_key_of_a_label_on_all_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    path.write_text(
        "one-0123456789 # Mary\nother-0123456789\none-0123456789 admin # Bob\n"
        "two-0123456789 # Mary\nbad-0123456789 x # Mary\n# Mary\nthree-0123456789#Mary\n"
    )
    result = tool("revoke", "Mary", str(path))
    assert path.read_text() == "other-0123456789\n# Mary\nthree-0123456789#Mary\n"
    assert b"4 lines" in result.stdout


@pytest.mark.parametrize(("label", "status"), [("Nobody", 1), ("", 2), (" ", 2)])
def test_an_unknown_label_is_an_error_and_changes_nothing(
    label: str, status: int, tmp_path: Path
) -> None:
    path = tmp_path / "keys.txt"
    path.write_text("one-0123456789\n")
    before = path.stat()
    result = tool("revoke", label, str(path))
    assert (result.returncode, result.stderr.count(b"\n")) == (status, 1)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert [*tmp_path.iterdir()] == [path]


def test_list_never_prints_a_key_and_says_which_lines_open_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    path.write_text("secret-1 secret-2 # \x1b[2Jbad\nsecret-3 # \x1b[2Jgood\nsecret-4\n")
    result = tool("list", str(path))
    assert [*map(str.strip, result.stdout.decode().splitlines())] == ["?[2Jgood", "(no label)"]
    assert b"line 1 has bad options" in result.stderr
    assert b"secret" not in result.stdout + result.stderr
    assert b"\x1b" not in result.stdout + result.stderr


def test_add_makes_a_file_that_others_cannot_read(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    assert tool("add", str(path)).returncode == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert len(path.read_bytes().splitlines()) == 1


def test_two_who_add_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    program = Path(__file__).parent.parent / "keystore.py"
    command = [sys.executable, str(program), "add", str(path)]
    adding = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(6)]
    assert [process.wait() for process in adding] == [0] * 6
    assert len(path.read_bytes().splitlines()) == 6


def test_a_file_that_cannot_be_changed_is_named_in_one_line(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none" / "keys.txt"):
        for command in (("add",), ("list",), ("revoke", "x")):
            result = tool(*command, str(path))
            assert (result.returncode, result.stderr.count(b"\n")) == (1, 1), result.stderr
            assert result.stderr.startswith(f"keystore.py: {path}: ".encode())
    for command in (("list",), ("revoke", "x")):
        result = tool(*command, API_KEY_FILE=str(tmp_path / "none.txt"))
        assert result.returncode == 1
        assert str(tmp_path / "none.txt").encode() in result.stderr
