"""Connect to a host by any of its addresses, and detect when it has vanished."""

import asyncio
import itertools
import socket
import sys

NEXT_ADDRESS = 0.25  # seconds until a host's next address is tried too (RFC 8305 section 5)
SILENCE = 20  # seconds without an acknowledgement until a host counts as vanished
PROBE_AFTER = 10  # seconds of silence until keep-alive probes begin
PROBE_INTERVAL = 5  # seconds between two of them

_KEEPALIVE = (  # not every system has all of them
    ("TCP_KEEPIDLE", PROBE_AFTER),
    ("TCP_KEEPINTVL", PROBE_INTERVAL),
    ("TCP_KEEPCNT", 2),
)
_Address = tuple[socket.AddressFamily, tuple[object, ...]]


async def dial(host: str, port: int) -> socket.socket:
    """Return a socket connected to the first of the host's addresses that answers.

    asyncio can do this too (`happy_eyeballs_delay`), but in Python 3.11 it loses the socket if
    it is cancelled at the moment of success.

    Raises:
        OSError: no address answers, or the name has none.
        UnicodeError: the name is not a valid host name.

    """
    left = await _resolve(host, port)
    tasks: list[asyncio.Task[socket.socket]] = []
    errors: list[BaseException] = []
    winner = None
    try:
        while left or not all(task.done() for task in tasks):
            if left:
                tasks.append(asyncio.create_task(_connect(*left.pop(0))))
            winner = await _first(tasks, errors, NEXT_ADDRESS if left else None)
            if winner is not None:
                return winner.result()
        raise errors[0]
    finally:
        for task in tasks:
            if task is not winner:
                task.cancel()
                task.add_done_callback(_close)
        errors.clear()  # each refers to this frame


async def _resolve(host: str, port: int) -> list[_Address]:
    """Return a host's addresses, alternating between the address families."""
    try:  # without a thread, if it is an IP address
        flags = socket.AI_NUMERICHOST
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    except socket.gaierror:
        loop = asyncio.get_running_loop()
        infos = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses: list[_Address] = [(family, where) for family, _, _, _, where in infos]
    preferred = [address for address in addresses if address[0] == addresses[0][0]]
    others = [address for address in addresses if address[0] != addresses[0][0]]
    pairs = itertools.zip_longest(preferred, others)
    return [address for pair in pairs for address in pair if address is not None]


async def _connect(family: socket.AddressFamily, where: tuple[object, ...]) -> socket.socket:
    plain = socket.socket(family, socket.SOCK_STREAM)
    try:
        plain.setblocking(False)
        await asyncio.get_running_loop().sock_connect(plain, where)
    except BaseException:
        plain.close()
        raise
    return plain


async def _first(
    tasks: list[asyncio.Task[socket.socket]], errors: list[BaseException], seconds: float | None
) -> asyncio.Task[socket.socket] | None:
    """Wait until one more address has answered or failed; return the one that answered."""
    waiting = [task for task in tasks if not task.done()]
    done, _ = await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        if (error := task.exception()) is None:
            return task
        errors.append(error)
    return None


def _close(task: asyncio.Task[socket.socket]) -> None:
    """Close the socket of an address that answered too late."""
    if not task.cancelled() and task.exception() is None:
        task.result().close()


def watch(plain: socket.socket, *, uploads: bool) -> None:
    """Make the kernel detect that the host at the other end has vanished.

    TCP_USER_TIMEOUT would also end an upload while the receiver reads nothing, as an Ollama with
    a slow disk does. So it is off while a socket `uploads`; use `silence` then.
    """
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    milliseconds = 0 if uploads else SILENCE * 1000
    for name, value in (*_KEEPALIVE, ("TCP_USER_TIMEOUT", milliseconds)):
        if (option := getattr(socket, name, None)) is not None:
            plain.setsockopt(socket.IPPROTO_TCP, option, value)


def silence(plain: socket.socket) -> float:
    """Return how long the peer has owed an acknowledgement, in seconds; 0 if it owes none.

    A peer that reads nothing still acknowledges window probes, so it owes nothing. Always 0
    where the system does not say: only Linux has both options.
    """
    if not hasattr(socket, "TCP_INFO") or not hasattr(socket, "TCP_USER_TIMEOUT"):
        return 0.0
    info = plain.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 148)  # struct tcp_info
    unacknowledged, last_ack, unsent = (
        int.from_bytes(info[offset : offset + 4], sys.byteorder) for offset in (24, 56, 144)
    )
    # A single probe may just have been sent; bytes stay unsent if our own link is down.
    is_owing = unacknowledged or (unsent and info[3] > 1)
    return last_ack / 1000 if is_owing else 0.0
