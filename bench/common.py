"""Shared by the benchmarks: starting programs, and measuring a load.

If there are two cores, the servers to compare run on core 0, the load and the stand-in on
core 1. Importing this module raises the limit of open files.
"""

import contextlib
import itertools
import json
import os
import re
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
RESULTS = BENCH / "results.json"
KEY = "a-key-for-the-benchmarks"
QUESTION = '{"model":"llama2","prompt":"Why is the sky blue?"}'
OTHERS = "work of other programs, % of the cores"
NUMBER = 10**12  # the first of the numbers that make questions differ, all of one length

Figures = dict[str, dict[str, list[float]]]
"""By measure, with its unit, and by who was measured: a figure for each round."""

Contender = Callable[[int], contextlib.AbstractContextManager[int]]
"""Starts a server before the stand-in's port; gives its own port."""

FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
with contextlib.suppress(ValueError):  # only root may have more than the limit
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(FILES, 32768),) * 2)
FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))

NGINX = """
{user} worker_processes 1; daemon off; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 4096; }}
http {{
  access_log {log}; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  proxy_cache_path {folder}/cache keys_zone=answers:50m; keepalive_requests 100000000;
  map $http_apikey $valid {{ default 0; "{key}" 1; }}
  upstream ollama {{ server 127.0.0.1:{upstream}; keepalive 64; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096; client_body_buffer_size 64k;
    location / {{
      if ($valid = 0) {{ return 401; }}
      proxy_pass http://ollama/api/generate; proxy_http_version 1.1;
      proxy_set_header Connection ""; {cache}
    }}
  }}
}}
"""
CACHE = (
    "proxy_cache answers; proxy_cache_methods POST; proxy_cache_valid 200 1h;"
    'proxy_cache_key "$uri|$request_body";'
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def program(
    *command: str,
    port: int,
    core: int,
    output: int | IO[bytes] = subprocess.DEVNULL,
    **environ: object,
) -> Iterator[int]:
    """Run a program that listens on a port, on one core, until the end of the block."""
    process = subprocess.Popen(
        [*on_core(core), *command],
        env={**os.environ, **{name: str(value) for name, value in environ.items()}},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
    )
    try:
        wait_for(port, process)
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def on_core(core: int) -> list[str]:
    """Return the start of a command that runs on one core; empty if that is impossible."""
    possible = shutil.which("taskset") is not None and core in range(os.cpu_count() or 1)
    return ["taskset", "-c", str(core)] if possible else []


def be_the_load() -> None:
    """Move this process to the load's core."""
    if on_core(1):
        os.sched_setaffinity(0, {1})


def wait_for(port: int, process: "subprocess.Popen[bytes] | None" = None) -> None:
    for _ in range(10000):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        if process is not None and process.poll() is not None:
            break
        time.sleep(0.001)
    raise RuntimeError(f"nothing listens on port {port}")


@contextlib.contextmanager
def ollprox(
    upstream: int,
    *,
    command: tuple[str, ...] = (str(ROOT / "ollprox.py"),),
    output: int | IO[bytes] = subprocess.DEVNULL,
    **settings: object,
) -> Iterator[tuple[int, int]]:
    """Run OllProx on core 0; yield its port and its process id."""
    port = free_port()
    with tempfile.NamedTemporaryFile("w", suffix=".keys") as keys:
        keys.write(KEY)
        keys.flush()
        defaults = {
            "OLLAMA_HOST": "127.0.0.1",
            "OLLAMA_PORT": upstream,
            "LISTEN_HOST": "127.0.0.1",
            "LISTEN_PORT": port,
            "API_KEY_FILE": keys.name,
            "API_KEY_SALT": "",
            "LOG_LEVEL": "WARNING",
            "MODEL_REFRESH": 0,
        }
        environ = {**defaults, **settings}
        with program(sys.executable, *command, port=port, core=0, output=output, **environ) as pid:
            yield port, pid


@contextlib.contextmanager
def ours(upstream: int, *, logged: bool = False) -> Iterator[int]:
    """OllProx as a contender; its access lines go to a file, as nginx's do."""
    with tempfile.TemporaryFile() as log:
        level = "INFO" if logged else "WARNING"
        with ollprox(upstream, output=log, LOG_LEVEL=level) as (port, _):
            yield port


@contextlib.contextmanager
def nginx(upstream: int, *, cached: bool, logged: bool = False) -> Iterator[int]:
    """nginx with a key check, and with a cache or passing each piece on as it comes."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        text = NGINX.format(
            folder=folder,
            user="user root;" if os.getuid() == 0 else "",
            log=f"{folder}/access.log" if logged else "off",
            key=KEY,
            upstream=upstream,
            port=port,
            cache=CACHE if cached else "proxy_buffering off;",
        )
        config = Path(folder, "nginx.conf")
        config.write_text(text)
        with program("nginx", "-c", str(config), "-p", folder, port=port, core=0):
            yield port


@contextlib.contextmanager
def straight(upstream: int) -> Iterator[int]:
    """Nothing between the load and the stand-in."""
    yield upstream


def with_nginx(contenders: dict[str, Contender]) -> dict[str, Contender]:
    """Return the contenders, without nginx if it is not installed."""
    if shutil.which("nginx") is None:
        contenders.pop("nginx", None)
    return contenders


@contextlib.contextmanager
def script(name: str, *arguments: object) -> Iterator[int]:
    """One of the programs in `bench/`, on core 0 if it is a yardstick; gives its port."""
    port = free_port()
    command = [sys.executable, str(BENCH / name), str(port), *map(str, arguments)]
    with program(*command, port=port, core=0 if name.startswith("h11") else 1):
        yield port


def post(prompt: str, *, stream: bool = False, header: str = "") -> bytes:
    """A request as it is sent."""
    body = json.dumps({"model": "llama2", "prompt": prompt, "stream": stream})
    return (
        f"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nAPIKEY: {KEY}\r\n{header}"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    ).encode()


def connect(port: int, source: str = "127.0.0.1") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), 60, (source, 0))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def ask(connection: socket.socket, message: bytes) -> bytes:
    """Send a request and return its response, which must have status 200."""
    connection.sendall(message)
    data = b""
    while not is_whole(data):
        more = connection.recv(1 << 16)
        if not more:
            raise RuntimeError(f"the connection has ended: {data[:300]!r}")
        data += more
    if not data.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"no good response: {data[:300]!r}")
    return data


def is_whole(data: bytes) -> bool:
    head, _, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", head)
    return len(body) >= int(length[1]) if length else data.endswith(b"\r\n0\r\n\r\n")


def wrk(port: int, lua: str, *, seconds: float, clients: int = 32) -> float:
    """Load a server from core 1; return its requests per second, all answered with 200."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as file:
        file.write(lua)
        file.flush()
        url = f"http://127.0.0.1:{port}/call_model"
        done = subprocess.run(
            [*on_core(1), "wrk", "-t1", f"-c{clients}", f"-d{seconds:.0f}s", "-s", file.name, url],
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
    if "Non-2xx" in done.stdout or "Socket errors" in done.stdout:
        raise RuntimeError(done.stdout)
    found = re.search(r"Requests/sec:\s+([\d.]+)", done.stdout)
    assert found
    return float(found[1])


def lua_same() -> str:
    """A wrk script that asks one question again and again."""
    return (
        f"wrk.method = 'POST'\nwrk.body = '{QUESTION}'\nwrk.headers['APIKEY'] = '{KEY}'\n"
        "wrk.headers['Content-Type'] = 'application/json'\n"
    )


_starts = itertools.count(NUMBER, 10**8)


def lua_each(message: bytes, *, padded: bool = False, wrap: int = 10**8) -> str:
    """A wrk script whose requests differ by the number that stands for NUMBER in `message`.

    No two scripts have numbers in common, unless they `wrap` after so many, from NUMBER on.
    With `padded` up to 63 further bytes follow the number: so the head that it stands in has
    another length, too. Texts are only joined, so that wrk is not the limit.
    """
    before, after = message.decode().split(str(NUMBER))
    start = next(_starts) if wrap == 10**8 else NUMBER
    pads = "string.rep('x', i)" if padded else "''"
    return (
        f"local n, pads, before, after = 0, {{}}, {json.dumps(before)}, {json.dumps(after)}\n"
        f"for i = 0, 63 do pads[i] = {pads} end\n"
        f"request = function()\n  n = (n + 1) % {wrap}\n"
        f"  return before .. {start} + n .. pads[n % 64] .. after\nend\n"
    )


def median(values: list[float]) -> float:
    return statistics.median(values)


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[int(len(values) * share)]


def resident(pid: int, what: str = "VmRSS") -> int:
    """A process's resident memory, in bytes; the most there has been for `VmHWM`."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.split(f"{what}:")[1].split()[0])


def note(figures: Figures, measure: str, who: str, value: float) -> None:
    """Add a round's figure, and show it."""
    figures.setdefault(measure, {}).setdefault(who, []).append(round(value, 4))
    print(f"{measure:45} {who:25} {value:12,.2f}", flush=True)


def worked() -> float:
    """Return the seconds of work of all cores since the machine started."""
    user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


_begun = time.monotonic(), worked()


def save(name: str, figures: Figures) -> None:
    """Save a program's figures, and the share of the cores that other programs used."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    others = worked() - _begun[1] - sum(used.ru_utime + used.ru_stime for used in spent)
    whole = (time.monotonic() - _begun[0]) * (os.cpu_count() or 1)
    note(figures, OTHERS, "machine", max(0.0, 100 * others / whole))
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[name] = figures
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
