"""The client's address from `X-Forwarded-For`, behind proxies that are trusted."""

import ipaddress
import time

import pytest
from client import ask, question
from conftest import Start
from hypothesis import given
from hypothesis import strategies as st
from standin import StandIn

from settings import SettingsError, load
from wire.forwarded import client_address

TRUSTED = tuple(map(ipaddress.ip_network, ("10.0.0.0/8", "127.0.0.1", "fd00::/8")))


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("203.0.113.1", b"198.51.100.7", "203.0.113.1"),  # spoofed: the peer is not trusted
        ("10.0.0.1", b"", "10.0.0.1"),
        ("10.0.0.1", b"198.51.100.7", "198.51.100.7"),
        ("10.0.0.1", b"1.2.3.4, 198.51.100.7", "198.51.100.7"),  # the left one is the client's own
        ("10.0.0.1", b"198.51.100.7, 10.0.0.2,10.0.0.3", "198.51.100.7"),
        ("10.0.0.1", b"10.0.0.9, 10.0.0.2", "10.0.0.9"),  # all trusted: the leftmost
        ("10.0.0.1", b"198.51.100.7, nonsense, 10.0.0.2", "10.0.0.2"),
        ("10.0.0.1", b"198.51.100.7, ", "10.0.0.1"),
        ("10.0.0.1", b"unknown", "10.0.0.1"),
        ("10.0.0.1", b"198.51.100.7:4711", "198.51.100.7"),
        ("10.0.0.1", b"198.51.100.7:", "10.0.0.1"),
        ("10.0.0.1", b"198.51.100.7:x", "10.0.0.1"),
        ("10.0.0.1", b"[2001:db8::1]:4711", "2001:db8::1"),
        ("10.0.0.1", b"[2001:db8::1]", "2001:db8::1"),
        ("10.0.0.1", b"2001:DB8:0::1", "2001:db8::1"),
        ("10.0.0.1", b"[198.51.100.7]", "10.0.0.1"),
        ("10.0.0.1", b"[2001:db8::1", "10.0.0.1"),
        ("10.0.0.1", b"fe80::1%a b", "10.0.0.1"),  # a zone is any text
        ("10.0.0.1", b"010.0.0.1", "10.0.0.1"),
        ("10.0.0.1", b"\xef\xbc\x91.2.3.4", "10.0.0.1"),
        ("10.0.0.1", b"::ffff:198.51.100.7", "198.51.100.7"),
        ("::ffff:10.0.0.1", b"198.51.100.7", "198.51.100.7"),
        ("fd00::1", b"2001:db8::1", "2001:db8::1"),
        ("127.0.0.1", b"198.51.100.7", "198.51.100.7"),
        ("127.0.0.2", b"198.51.100.7", "127.0.0.2"),
    ],
)
def test_the_first_address_that_is_not_trusted_is_the_clients(
    peer: str, forwarded: bytes, client: str
) -> None:
    assert client_address(peer, forwarded, TRUSTED) == client


@given(st.binary(), st.sampled_from(["10.0.0.1", "203.0.113.1", "::1", "odd"]))
def test_any_header_gives_an_address(forwarded: bytes, peer: str) -> None:
    found = client_address(peer, forwarded, TRUSTED)
    assert found == peer or str(ipaddress.ip_address(found)) == found


def test_long_headers_take_linear_time() -> None:
    def seconds(count: int) -> float:
        began = time.process_time()
        assert client_address("10.0.0.1", b"10.0.0.2," * count + b"10.0.0.3", TRUSTED)
        assert client_address("10.0.0.1", b"1" * count * 9, TRUSTED) == "10.0.0.1"
        assert client_address("10.0.0.1", b"," * count * 9, TRUSTED) == "10.0.0.1"
        return time.process_time() - began

    seconds(100)
    assert min(seconds(16_000) for _ in range(3)) < 64 * min(seconds(1_000) for _ in range(3))


def test_networks_are_read_and_checked() -> None:
    settings = load({"TRUSTED_PROXIES": "127.0.0.1, 10.0.0.0/8,fd00::/8"})
    assert settings.trusted_proxies[1] == ipaddress.ip_network("10.0.0.0/8")
    for wrong in ("localhost", "10.0.0.1/8", "10.0.0.0/33", "*"):
        with pytest.raises(SettingsError, match="TRUSTED_PROXIES must be IP addresses"):
            load({"TRUSTED_PROXIES": wrong})


async def test_wrong_keys_are_counted_by_the_clients_address(
    launch: Start, ollama: StandIn
) -> None:
    program = await launch(TRUSTED_PROXIES="127.0.0.1")

    async def status(address: str) -> int:
        headers = {"APIKEY": "wrong", "X-Forwarded-For": f"192.0.2.1, {address}"}
        return (await ask(program.port, "POST", "/call_model", question(), headers)).status

    guesses = [await status("198.51.100.7") for _ in range(11)]
    assert guesses == [401] * 10 + [429]
    assert await status("198.51.100.8") == 401
    await program.says(r"client=198\.51\.100\.7 key=\w+ method=POST path=/call_model .*status=429")
    assert "192.0.2.1" not in program.text()


async def test_without_trusted_proxies_the_header_is_ignored(
    launch: Start, ollama: StandIn
) -> None:
    program = await launch()
    headers = {"X-Forwarded-For": "198.51.100.7"}
    await ask(program.port, "POST", "/call_model", question(), headers)
    await program.says(r"client=127\.0\.0\.1 ")
    assert ollama.asked()[0].header("X-Forwarded-For") is None
