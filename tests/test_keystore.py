import base64
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from keystore import (
    KeyStore,
    Parsed,
    new_key,
    parse,
    read_file,
    salted_digest,
    take_credential,
)

SALT = b"pepper"
LONG = b"0123456789abcdef"


def labels(text: bytes, *, digests: bool = False) -> dict[bytes, str]:
    return parse(text, SALT, digests=digests).labels


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
    found = parse(digest, b"s4lt", digests=True).labels
    assert found == {salted_digest(b"s4lt", b"a key's value"): ""}


def test_what_is_no_digest_is_reported_by_its_number_alone() -> None:
    result = parse(b"# x\nplain-secret\n", SALT, digests=True)
    assert (result.labels, result.strangers) == ({}, 1)
    assert "line 2" in result.reports[0]
    assert "plain-secret" not in result.reports[0]


def test_the_digest_of_an_empty_key_opens_nothing() -> None:
    assert labels(salted_digest(SALT, b"").hex().encode(), digests=True) == {}


def test_white_space_in_a_key_is_reported() -> None:
    result = parse(b"a-key-0123456789 alice\n", SALT, digests=False)
    assert result.labels == {}
    assert "line 1" in result.reports[0]


def test_short_plain_keys_are_warned_about_and_valid() -> None:
    result = parse(b"short\n" + LONG, SALT, digests=False)
    assert len(result.labels) == 2
    assert ["line 1" in report for report in result.reports] == [True]


def test_a_hundred_thousand_lines() -> None:
    text = b"".join(b"key-%016d\r\n" % number for number in range(100_000))
    assert len(labels(text)) == 100_000


# Where a head carries a key.


def presented(*headers: tuple[bytes, bytes]) -> bytes | None:
    return take_credential(SALT, False, b"/", headers)[0]


def digest(key: bytes) -> bytes:
    return salted_digest(SALT, key)


def test_the_first_header_that_carries_a_key_decides() -> None:
    apikey, other = (b"apikey", b"one"), (b"x-api-key", b"two")
    bearer = (b"authorization", b"Bearer three")
    assert presented(bearer, other, apikey) == digest(b"one")
    assert presented(bearer, other) == digest(b"two")
    assert presented(bearer) == digest(b"three")
    assert presented(bearer, other, (b"apikey", b"")) == digest(b"two")
    assert presented((b"authorization", b"bearer  three")) == digest(b"three")
    assert presented() is None
    assert presented((b"apikey", b""), (b"authorization", b"Bearer ")) is None


def test_a_header_twice_with_two_values_matches_nothing() -> None:
    assert presented((b"apikey", b"one"), (b"apikey", b"one")) == digest(b"one")
    assert presented((b"apikey", b"one"), (b"apikey", b"two")) not in {
        digest(b"one"),
        digest(b"two"),
        None,
    }


def test_no_header_that_held_a_key_passes_on() -> None:
    headers = [
        (b"apikey", LONG),
        (b"x-api-key", b"dummy"),
        (b"authorization", b"Bearer other-0123456789"),
        (b"x-note", b"see " + LONG),
        (b"accept", b"*/*"),
    ]
    assert take_credential(SALT, False, b"/", headers)[2] == [(b"accept", b"*/*")]


def basic(text: bytes) -> tuple[bytes, bytes]:
    return b"authorization", b"Basic " + base64.b64encode(text)


def test_with_basic_the_key_is_the_password() -> None:
    assert presented(basic(b"anyone:the:key")) == digest(b"the:key")
    assert presented(basic(b":key")) == digest(b"key")
    assert presented(basic(b"key")) is None
    assert presented(basic(b"user:")) is None
    assert presented((b"authorization", b"Basic not*base64")) is None
    assert presented((b"authorization", b"Basic QQ=A")) is None


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
    expected = digest(key) if key else digest(b"other")
    assert take_credential(SALT, True, path, header)[:2] == (expected, left)
    assert take_credential(SALT, False, path, header)[:2] == (digest(b"other"), left)


# Reading the file again.


def store(path: Path) -> KeyStore:
    keys = KeyStore.open(path, b"")
    result = keys.reload()
    assert isinstance(result, Parsed)
    list(keys.adopt(result))
    return keys


def poll(keys: KeyStore) -> list[str]:
    result = keys.poll()
    return [] if result is None else [text for _, text in keys.adopt(result)]


def valid(keys: KeyStore, key: bytes) -> bool:
    return salted_digest(keys.salt, key) in keys.labels


def test_a_change_is_seen_even_within_a_tick_of_the_clock(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(LONG)
    keys = store(path)
    status = path.stat()
    path.write_bytes(LONG[::-1])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    poll(keys)
    assert valid(keys, LONG[::-1])
    assert not valid(keys, LONG)


def test_an_old_file_is_read_only_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(LONG)
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
    path.write_bytes(LONG)
    keys = store(path)
    path.write_bytes(b"# nobody\n")
    poll(keys)
    assert not keys.labels


def test_the_key_made_at_start_holds_until_the_file_gets_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(b"# none yet\n")
    keys = store(path)
    keys.admit(b"made", "made-at-start")
    path.write_bytes(b"# still none\n")
    poll(keys)
    assert valid(keys, b"made")
    path.write_bytes(LONG)
    poll(keys)
    assert not valid(keys, b"made")
    path.write_bytes(b"")
    poll(keys)
    assert not keys.labels


def test_a_file_that_vanishes_keeps_the_keys_and_is_reported_once(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(LONG)
    keys = store(path)
    path.unlink()
    assert ["cannot be read" in text for text in poll(keys)] == [True]
    assert poll(keys) == []
    assert valid(keys, LONG)
    path.write_bytes(LONG)
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
    assert all(word in out for word in ("new", "hash", "salt"))
