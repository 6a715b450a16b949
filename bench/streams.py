"""Streams: relayed lines per second, the first line, and a thousand streams at once.

usage: streams.py [ROUNDS]

Each stream asks another question, so that nothing is shared. The client is one process that
reads whatever has come (epoll), on core 1 with the stand-in; the same is measured straight from
the stand-in, which shows what these two can do by themselves.

- relayed lines: 16 streams of 40,000 lines of 107 bytes, made and read as fast as they come;
  from the first request to the end of the last stream. The stand-in writes 500 lines at a time,
  so what is measured is the way of the bytes rather than of single pieces. "Written alone": 5,000
  lines, each with a write of its own, as Ollama does; there the stand-in itself is the limit, and
  whoever is slow to look finds more lines at once, so these figures tell the least.
- first line: 16 clients ask one question after the other; an answer has ten lines, the first at
  once, then 10 ms apart. From the request to its first line, over all requests.
- 1,000 streams at once: a line each 100 ms, begun within one second. Each line carries the
  instant in which it was sent; how late it is, is seen when the client has read it. The memory
  is the most that OllProx had, less what it had before, so 60 lines that it keeps are in it.
"""

import collections
import itertools
import re
import selectors
import sys
import time

import report
from common import (
    NUMBER,
    Contender,
    Figures,
    be_the_load,
    connect,
    nginx,
    note,
    ollprox,
    ours,
    percentile,
    post,
    resident,
    save,
    script,
    straight,
    with_nginx,
)
from fast_ollama import LINE

STREAMS, LINES, ALONE = 16, 40_000, 5_000
CROWD = 1000
STAMP = re.compile(rb'"created_at":"0*(\d+)"')
END = b"0\r\n\r\n"  # a line ends otherwise

numbers = itertools.count(NUMBER)


def question(lines: int | str = "Question") -> bytes:
    """A request for a stream, each another one; of so many lines if it is a number."""
    return post(f"{lines} {next(numbers)}", stream=True)


class Client:
    """A connection on which streams are read."""

    def __init__(self, port: int, streams: int) -> None:
        self.connection = connect(port)
        self.left = streams  # to come
        self.begun = 0  # the nanosecond of the request whose first line is to come
        self._tail = b""

    def ask(self, message: bytes) -> None:
        self.begun = time.monotonic_ns()
        self.connection.sendall(message)

    def has_ended(self, data: bytes | bytearray) -> bool:
        """Whether a stream ends with what has come."""
        if not data:
            raise RuntimeError("a stream was cut")
        self._tail = (self._tail + data[-len(END) :])[-len(END) :]
        return self._tail == END


def ready(selector: selectors.BaseSelector, seconds: float = 60) -> list[Client]:
    """Wait for clients that have something to read."""
    return [key.data for key, _ in selector.select(seconds)]


def relayed(port: int, lines: int) -> float:
    """Return the lines per second of all streams together."""
    buffer, size = bytearray(1 << 20), 0
    with selectors.DefaultSelector() as selector:
        clients = [Client(port, 1) for _ in range(STREAMS)]
        begun = time.perf_counter()
        for client in clients:
            selector.register(client.connection, selectors.EVENT_READ, client)
            client.ask(question(lines))
        while selector.get_map():
            for client in ready(selector):
                count = client.connection.recv_into(buffer)
                size += count
                if client.has_ended(buffer[max(0, count - len(END)) : count]):
                    selector.unregister(client.connection)
                    client.connection.close()
        seconds = time.perf_counter() - begun
    if size < STREAMS * lines * len(LINE):
        raise RuntimeError(f"only {size} bytes have come")
    return STREAMS * lines / seconds


class Crowd:
    """Clients that ask for streams, and when their lines come; times in nanoseconds."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.first: list[float] = []  # from a request to its first line
        self.late: list[float] = []  # from a line's sending to its coming

    def listen(self, clients: int, *, each: int, spread: float) -> None:
        """Let so many clients ask so often each; they begin within `spread` seconds."""
        with selectors.DefaultSelector() as selector:
            idle = collections.deque(Client(self.port, each) for _ in range(clients))
            for client in idle:
                selector.register(client.connection, selectors.EVENT_READ, client)
            gap = int(1e9 * spread / clients)
            due = time.monotonic_ns()
            while selector.get_map():
                while idle and due <= time.monotonic_ns():
                    idle.popleft().ask(question())
                    due += gap
                for client in ready(selector, 0.001 if idle else 60):
                    if not self._read(client):
                        selector.unregister(client.connection)
                        client.connection.close()

    def _read(self, client: Client) -> bool:
        """Take what has come; False when a client has had enough."""
        data = client.connection.recv(1 << 16)
        now = time.monotonic_ns()
        stamps = STAMP.findall(data)
        self.late += [now - int(stamp) for stamp in stamps]
        if stamps and client.begun:
            self.first.append(now - client.begun)
            client.begun = 0
        if client.has_ended(data):
            client.left -= 1
            if client.left:
                client.ask(question())
        return client.left > 0


def measure_lines(figures: Figures, rounds: int) -> None:
    contenders: dict[str, Contender] = {
        "OllProx": ours,
        "nginx": lambda upstream: nginx(upstream, cached=False),
        "straight": straight,
    }
    for measure, lines, how in (
        ("relayed lines/s", LINES, ""),
        ("relayed lines/s, written alone", ALONE, "alone"),
    ):
        with script("fast_ollama.py", 3, 0, how) as upstream:
            for _ in range(rounds):
                for who, start in with_nginx(contenders).items():
                    with start(upstream) as port:
                        note(figures, measure, who, relayed(port, lines))


def measure_first(figures: Figures, rounds: int) -> None:
    with script("fast_ollama.py", 10, 0.01) as upstream, ours(upstream) as port:
        for number in range(rounds + 1):
            for who, where in (("OllProx", port), ("straight", upstream)):
                crowd = Crowd(where)
                crowd.listen(STREAMS, each=25, spread=0.1)
                if number:  # the first is to warm up
                    note(figures, "first line, median ms", who, percentile(crowd.first, 0.5) / 1e6)
                    note(figures, "first line, 99 % ms", who, percentile(crowd.first, 0.99) / 1e6)


def measure_crowd(figures: Figures, rounds: int) -> None:
    with script("fast_ollama.py", 60, 0.1) as upstream:
        for _ in range(rounds):
            with ollprox(upstream) as (port, pid):
                Crowd(port).listen(8, each=1, spread=0)  # to warm up
                before = resident(pid)
                for who, where in (("OllProx", port), ("straight", upstream)):
                    crowd = Crowd(where)
                    crowd.listen(CROWD, each=1, spread=1)
                    assert len(crowd.late) >= 60 * CROWD, len(crowd.late)
                    late = percentile(crowd.late, 0.99) / 1e6
                    note(figures, "1,000 streams, lateness of lines, 99 % ms", who, late)
                grown = (resident(pid, "VmHWM") - before) / CROWD / 1024
                note(figures, "1,000 streams, KiB each", "OllProx", grown)


def main() -> int:
    rounds = int(sys.argv[1]) if sys.argv[1:] else 3
    be_the_load()
    figures: Figures = {}
    measure_lines(figures, rounds)
    measure_first(figures, rounds)
    measure_crowd(figures, rounds)
    save("streams", figures)
    return report.show("streams")


if __name__ == "__main__":
    sys.exit(main())
