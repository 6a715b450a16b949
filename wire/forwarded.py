"""Find a client's address behind trusted proxies, from `X-Forwarded-For`."""

from collections.abc import Awaitable, Callable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

from record import Record
from wire.http11 import Request, Response

IPAddress = IPv4Address | IPv6Address
Handle = Callable[[Request, Record], Awaitable[Response]]
Networks = Sequence[IPv4Network | IPv6Network]

MAX_ADDRESS = 64  # bytes of an element that may be an address; the longest with a port has 53


def client_address(peer: str, forwarded: bytes, trusted: Networks) -> str:
    """Return the client's address; linear in the header's length.

    The header is read from its right end, where the nearest proxy has written. The first address
    that is not trusted is the client's. An element that is not an address ends the reading: then
    the last trusted address is returned, and the leftmost one if all are trusted.

    Args:
        peer: the address that the connection comes from.
        forwarded: the values of `X-Forwarded-For`, joined by commas.
        trusted: whose word is taken.

    """
    found = _plain(peer)
    if found is None or not _is_trusted(found, trusted):
        return peer
    for element in reversed(forwarded.split(b",")):
        address = _element(element.strip(b" \t"))
        if address is None:
            break
        found = address
        if not _is_trusted(found, trusted):
            break
    return str(found)


def behind(handle: Handle, trusted: Networks) -> Handle:
    """Return a handler that notes the client's address in the record before it handles."""

    async def handled(request: Request, record: Record) -> Response:
        forwarded = request.head.get(b"x-forwarded-for") or b""
        record.client = client_address(record.client, forwarded, trusted)
        return await handle(request, record)

    return handled


def _is_trusted(address: IPAddress, trusted: Networks) -> bool:
    return any(address in network for network in trusted)


def _element(text: bytes) -> IPAddress | None:
    """Read `1.2.3.4`, `1.2.3.4:80`, `::1`, `[::1]` or `[::1]:80`; None if it is none of these."""
    if len(text) > MAX_ADDRESS or not text.isascii():
        return None
    host = text.decode()
    if host.startswith("["):
        host, bracket, port = host[1:].partition("]")
        if not bracket or ":" not in host or (port and not _is_port(port)):
            return None
    elif host.count(":") == 1:
        host, _, port = host.partition(":")
        if not _is_port(f":{port}"):
            return None
    return None if "%" in host else _plain(host)


def _is_port(text: str) -> bool:
    return text[0] == ":" and text[1:].isdigit() and len(text) <= 6


def _plain(text: str) -> IPAddress | None:
    """Read an address; an IPv4 address in IPv6's form becomes plain. None if it is none."""
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
