"""Several processes: answers shared through Valkey, and the front's hash.

usage: cluster.py [REQUESTS]

- One request after the other on one connection, each with another prompt: a hit in memory, a hit in
  Valkey, a miss with Valkey and one without. The stand-in answers at once.
- Misses while Valkey is frozen, from when it freezes: how much longer than normal 99 % take, with
  the default CACHE_TIMEOUT of 50 ms.
- Hits from three processes behind nginx, to hits from one process behind nginx, as wrk loads them.
  The ratio cannot exceed the cores that the processes have, less what nginx and wrk take.

Limits: everything is on this machine. With two cores the last ratio only tells what the
front costs. It needs valkey-server or redis-server, nginx and wrk.
"""

import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import (
    KEY,
    ROOT,
    Figures,
    ask,
    be_the_load,
    connect,
    free_port,
    lua_same,
    median,
    note,
    ollprox,
    percentile,
    post,
    program,
    save,
    script,
    wrk,
)

ROUNDS = 3
TIMEOUT = 0.05  # seconds; the default CACHE_TIMEOUT
PATH = f"{os.environ['PATH']}:/usr/sbin"
SECRET = "a-secret-for-the-benchmarks"
NGINX = """
{user} worker_processes 1; daemon off; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 4096; }}
http {{
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; keepalive_requests 100000000;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  include {folder}/cluster.conf;
}}
"""


@contextlib.contextmanager
def valkey() -> Iterator[tuple[dict[str, Any], int]]:
    """A server on core 1; gives the settings for it, and its process id."""
    name = shutil.which("valkey-server") or shutil.which("redis-server", path=PATH)
    if name is None:
        sys.exit("cluster.py needs valkey-server or redis-server")
    port = free_port()
    command = (name, "--port", str(port), "--save", "", "--appendonly", "no")
    with program(*command, port=port, core=1) as pid:
        url = f"redis://127.0.0.1:{port}"
        yield {"CACHE_URL": url, "CACHE_SECRET": SECRET, "MODEL_REFRESH": 30}, pid


@contextlib.contextmanager
def front(ports: list[int]) -> Iterator[int]:
    """nginx with `deploy/nginx-cluster.conf` before some processes."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        text = (ROOT / "deploy" / "nginx-cluster.conf").read_text()
        for number in range(3):
            server = f"    server 127.0.0.1:{8001 + number} max_fails=1 fail_timeout=2s;\n"
            ours = f"    server 127.0.0.1:{ports[number]};\n" if number < len(ports) else ""
            text = text.replace(server, ours)
        text = text.replace("listen 8000;", f"listen 127.0.0.1:{port};")
        Path(folder, "cluster.conf").write_text(text)
        user = "user root;" if os.getuid() == 0 else ""
        Path(folder, "nginx.conf").write_text(NGINX.format(folder=folder, user=user))
        command = ("nginx", "-c", f"{folder}/nginx.conf", "-p", folder)
        with program(*command, port=port, core=1, PATH=PATH):
            yield port


def seconds_each(connection: socket.socket, prompts: list[str]) -> list[float]:
    found = []
    for prompt in prompts:
        message = post(prompt)
        began = time.perf_counter()
        ask(connection, message)
        found.append(time.perf_counter() - began)
    return found


def metric(port: int, name: str) -> float:
    with connect(port) as connection:
        message = f"GET /metrics HTTP/1.1\r\nHost: localhost\r\nAPIKEY: {KEY}\r\n\r\n"
        text = ask(connection, message.encode()).decode()
    values = [line.split()[1] for line in text.splitlines() if line.startswith(f"{name} ")]
    return float(values[0]) if values else 0.0


def wait_until(port: int, name: str, value: float) -> None:
    deadline = time.monotonic() + 30
    while metric(port, name) < value:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{name} stays below {value}")
        time.sleep(0.02)


def latencies(count: int, upstream: int, figures: Figures) -> None:
    """Measure hits and misses, and misses while Valkey is frozen."""
    with (
        valkey() as (settings, pid),
        ollprox(upstream, **settings) as (first, _),
        ollprox(upstream, **settings) as (second, _),
        ollprox(upstream) as (alone, _),
    ):
        for port in (first, second):
            wait_until(port, "ollprox_shared_cache_up", 1)
        with connect(first) as one, connect(second) as two, connect(alone) as three:
            for number in range(ROUNDS):
                prompts = [f"round {number} prompt {n}" for n in range(count)]
                written = metric(first, "ollprox_shared_cache_writes_total")
                times = {"miss with Valkey": seconds_each(one, prompts)}
                times["hit in memory"] = seconds_each(one, prompts)
                times["miss without Valkey"] = seconds_each(three, prompts)
                wait_until(first, "ollprox_shared_cache_writes_total", written + count)
                times["hit in Valkey"] = seconds_each(two, prompts)
                for what, each in times.items():
                    note(figures, "one after the other, ms", what, 1000 * median(each))
                normal = percentile(times["miss with Valkey"], 0.99)
                os.kill(pid, signal.SIGSTOP)
                prompts = [f"frozen {number} {n}" for n in range(count)]
                frozen = percentile(seconds_each(two, prompts), 0.99)
                os.kill(pid, signal.SIGCONT)
                wait_until(second, "ollprox_shared_cache_up", 1)
                note(figures, "misses, 99 %, ms", "normal", 1000 * normal)
                note(figures, "misses, 99 %, ms", "Valkey frozen", 1000 * frozen)


def throughput(upstream: int, figures: Figures) -> None:
    """Measure hits behind nginx, from one process and from three."""
    if not shutil.which("wrk") or not shutil.which("nginx", path=PATH):
        print("without nginx and wrk there is no comparison of one process with three")
        return
    with contextlib.ExitStack() as stack:
        ports = [stack.enter_context(ollprox(upstream))[0] for _ in range(3)]
        for _ in range(ROUNDS):
            for who, some in (("one process", ports[:1]), ("three processes", ports)):
                with front(some) as port:
                    rate = wrk(port, lua_many(), seconds=3)
                    note(figures, "hits behind nginx, per second", who, rate)


def lua_many() -> str:
    """A wrk script that asks 64 questions in turn, so that all processes have some."""
    return lua_same() + (
        "local n = 0\nrequest = function()\n  n = (n + 1) % 64\n"
        '  return wrk.format(nil, nil, nil, \'{"model":"llama2","prompt":"\' .. n .. \'"}\')\nend\n'
    )


def main(count: int) -> int:
    figures: Figures = {}
    be_the_load()
    with script("fast_ollama.py") as upstream:
        latencies(count, upstream, figures)
        throughput(upstream, figures)
    save("cluster", figures)
    p99 = figures["misses, 99 %, ms"]
    more = median(p99["Valkey frozen"]) - median(p99["normal"])
    kept = more <= 1000 * TIMEOUT + 5  # timers are that exact here
    print(
        f"frozen: {more:.1f} ms more, at most {1000 * TIMEOUT:g}: {'kept' if kept else 'NOT KEPT'}"
    )
    if rates := figures.get("hits behind nginx, per second"):
        ratio = median(rates["three processes"]) / median(rates["one process"])
        print(f"three processes to one: {ratio:.2f} times, on {os.cpu_count()} cores")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if sys.argv[1:] else 500))
