"""OLLAMA_HOST as a list, and the credentials of its servers."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from settings import Host, SettingsError, parse_hosts


def test_a_list_of_hosts_is_parsed() -> None:
    hosts = parse_hosts("gpu1, gpu2:1234*2 ,https://gpu3*0.5,[::1],::2, gpu4/", None)
    assert [(h.url, h.weight) for h in hosts[:4]] == [
        ("http://gpu1:11434", 1),
        ("http://gpu2:1234", 2),
        ("https://gpu3:443", 0.5),
        ("http://[::1]:11434", 1),
    ]
    assert [h.name for h in hosts] == ["gpu1", "gpu2", "gpu3", "::1", "::2", "gpu4"]
    assert [h.port for h in parse_hosts("a,b:1,https://c", 5)] == [5, 1, 5]


def test_hosts_that_share_a_host_are_named_with_their_ports() -> None:
    hosts = parse_hosts("gpu1:1,gpu2,https://u:p@gpu1:2,::1,[::1]:3", None)
    names = [host.name for host in hosts]
    assert names == ["gpu1:1", "gpu2", "gpu1:2", "[::1]:11434", "[::1]:3"]


@pytest.mark.parametrize(
    "text",
    [
        "a,",
        ",a",
        "a,,b",
        "a,a",
        "a:11434,http://a",
        "a*0",
        "a*0.0",
        "a*-1",
        "a*x",
        "a*",
        "*2",
        "a*1e3",
        "a b",
        "http://a/path",
        "http://a?x",
        "ftp://a",
        "a:0",
        "a:99999",
        "a..b",
        "x" * 70,
    ],
)
def test_a_wrong_list_is_named_in_one_line(text: str) -> None:
    with pytest.raises(SettingsError, match=r"^OLLAMA_HOST .*\Z"):
        parse_hosts(text, None)


def test_credentials_are_decoded_and_shown_nowhere() -> None:
    (host,) = parse_hosts("https://us%40er:pa%3Ass%2Cw%C3%B6rd@gpu1:1*2", None)
    kind, _, encoded = host.authorization.partition(" ")
    assert kind == "Basic"
    assert base64.b64decode(encoded).decode() == "us@er:pa:ss,w\u00f6rd"
    assert (host.name, host.url, host.weight) == ("gpu1", "https://gpu1:1", 2)
    assert encoded not in repr(host)
    for text in (
        "https://user:secret@a/path",
        "ftp://user:secret@a",
        "https://user:secret@a b",
        "https://user:secret,more@a",  # an error is in the part before the comma
        "https://user:sec,secret@a,b",
    ):
        with pytest.raises(SettingsError) as caught:
            parse_hosts(text, None)
        assert "secret" not in str(caught.value)


def authorizations(hosts: tuple[Host, ...]) -> list[str]:
    return [host.authorization for host in hosts]


def test_one_key_goes_to_https_servers_alone() -> None:
    hosts = parse_hosts("a,https://b,https://u:p@c", None, "to=ken==")
    assert authorizations(hosts) == ["", "Bearer to=ken==", "Basic dTpw"]


def test_a_named_key_goes_to_its_server_alone() -> None:
    hosts = parse_hosts("a,https://b,https://c,d:1,d:2", None, "a=x=y, d:2=z")
    assert authorizations(hosts) == ["Bearer x=y", "", "", "", "Bearer z"]


def test_a_key_that_only_looks_like_a_list_is_one_key() -> None:
    assert authorizations(parse_hosts("https://b", None, "a=x,b=y")) == ["Bearer a=x,b=y"]


@pytest.mark.parametrize(
    ("hosts", "key"),
    [
        ("a", "secret"),
        ("https://u:p@a", "secret"),
        ("https://u:p@a,b", "a=secret"),
        ("a,b", "a=secret,c=secret"),
        ("a,b", "a=secret,secret"),
        ("https://a", "sec ret"),
        ("a", "a="),
        ("https://a", "sec\nret"),
    ],
)
def test_a_key_that_would_go_nowhere_or_astray_stops_the_start(hosts: str, key: str) -> None:
    with pytest.raises(SettingsError, match=r"^UPSTREAM_API_KEY .*\Z") as caught:
        parse_hosts(hosts, None, key)
    assert "secret" not in str(caught.value)


@given(st.text(alphabet="ab:/@[]*.,%=#?1\u00e9 ", max_size=20), st.text("ab=, ", max_size=8))
def test_no_text_is_worse_than_a_settings_error(text: str, key: str) -> None:
    try:
        hosts = parse_hosts(text, None, key)
    except SettingsError:
        return
    assert len({host.name for host in hosts}) == len(hosts)
    assert len({host.address for host in hosts}) == len(hosts)
