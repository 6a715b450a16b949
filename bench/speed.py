"""How fast hits and misses are, against yardsticks run in the same minute.

usage: speed.py [ROUNDS [SECONDS]]

Each measure runs OllProx and its yardsticks in turn, several rounds. The server is on core 0,
the load (`wrk -t1 -c32`, but for the last measure) and the stand-in on core 1.

- hits: one small question, a single object of about 400 bytes from the cache. The yardsticks
  are a bare h11 server on asyncio streams, and nginx with a key check and `proxy_cache` on POST
  with the body as key. "With an access line": each side writes them to a file.
- hits with distinct heads: the same, but each request's head has another X-Request-ID, of up to
  63 bytes more or less, so that no head is known from before.
- misses: every question is another one, so each is a request to the stand-in, whose stream of
  four lines is folded; nginx passes the same stream on without a cache, and so does the stand-in.
  The stand-in shares its core with the load, so the fastest of them are bound by that core.
- one miss at a time: the same on one connection, from the request's first byte to the answer's
  last, in this process: its own work, some 20 microseconds, is in all figures.
Needs wrk and nginx (Debian's packages of these names); without nginx its columns are missing.
"""

import sys
import time
from collections.abc import Callable

import report
from common import (
    NUMBER,
    Contender,
    Figures,
    ask,
    be_the_load,
    connect,
    lua_each,
    lua_same,
    median,
    nginx,
    note,
    ours,
    post,
    save,
    script,
    straight,
    with_nginx,
    wrk,
)

ASKED = 2000  # misses, one at a time, in a round


def distinct_heads() -> str:
    message = post("Why is the sky blue?", header=f"X-Request-ID: {NUMBER}\r\n")
    return lua_each(message, padded=True)


def distinct_questions() -> str:
    return lua_each(post(f"Question {NUMBER}"))


def measures() -> dict[str, tuple[Callable[[], str], dict[str, Contender]]]:
    """Each measure: what makes its wrk scripts, and who takes part."""
    cached: dict[str, Contender] = {
        "OllProx": ours,
        "bare h11": lambda upstream: script("h11_server.py"),
        "nginx": lambda upstream: nginx(upstream, cached=True),
    }
    return {
        "hits/s": (lua_same, cached),
        "hits/s, with an access line": (
            lua_same,
            {
                "OllProx": lambda upstream: ours(upstream, logged=True),
                "nginx": lambda upstream: nginx(upstream, cached=True, logged=True),
            },
        ),
        "hits/s, with distinct heads": (distinct_heads, cached),
        "misses/s": (
            distinct_questions,
            {
                "OllProx": ours,
                "nginx": lambda upstream: nginx(upstream, cached=False),
                "straight": straight,
            },
        ),
    }


def one_at_a_time(port: int, start: int) -> float:
    """Return the median latency of misses on one connection, in milliseconds."""
    times = []
    with connect(port) as connection:
        for number in range(ASKED):
            message = post(f"Question {start + number}")
            begun = time.perf_counter()
            ask(connection, message)
            times.append(1000 * (time.perf_counter() - begun))
    return median(times)


def main() -> int:
    rounds = int(sys.argv[1]) if sys.argv[1:] else 3
    seconds = float(sys.argv[2]) if sys.argv[2:] else 2.0
    be_the_load()
    figures: Figures = {}
    with script("fast_ollama.py") as upstream:
        for measure, (lua, contenders) in measures().items():
            for _ in range(rounds):
                for who, start in with_nginx(contenders).items():
                    with start(upstream) as port:
                        wrk(port, lua(), seconds=1)  # to warm up
                        note(figures, measure, who, wrk(port, lua(), seconds=seconds))
        with ours(upstream) as port:
            for number in range(rounds + 1):
                for who, where in (("OllProx", port), ("straight", upstream)):
                    latency = one_at_a_time(where, NUMBER + number * ASKED)
                    if number:  # the first is to warm up
                        note(figures, "one miss at a time, ms", who, latency)
    save("speed", figures)
    return report.show("speed")


if __name__ == "__main__":
    sys.exit(main())
