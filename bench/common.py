"""What the benchmarks share: programs that they start, and how a load is measured."""

import contextlib
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
KEY = "a-key-for-the-benchmarks"
QUESTION = '{"model":"llama2","prompt":"Why is the sky blue?"}'


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def program(*command: str, port: int, core: int | None = None, **environ: object) -> Iterator[int]:
    """Run a program that listens on a port, on one core; it is ended with the block."""
    pinned = ["taskset", "-c", str(core)] if core is not None and _can_pin(core) else []
    process = subprocess.Popen(
        [*pinned, *command],
        env={**os.environ, **{name: str(value) for name, value in environ.items()}},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(port, process)
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def _can_pin(core: int) -> bool:
    return shutil.which("taskset") is not None and core in os.sched_getaffinity(0)


def wait_for(port: int, process: "subprocess.Popen[bytes] | None" = None) -> None:
    for _ in range(1000):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        if process is not None and process.poll() is not None:
            break
        time.sleep(0.01)
    raise RuntimeError(f"nothing listens on port {port}")


@contextlib.contextmanager
def ollprox(upstream: int, **settings: object) -> Iterator[tuple[int, int]]:
    """OllProx before an upstream, on core 0; gives its port and its process id."""
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
        with program(sys.executable, str(ROOT / "ollprox.py"), port=port, core=0, **environ) as pid:
            yield port, pid


@contextlib.contextmanager
def script(name: str, *arguments: object) -> Iterator[int]:
    """One of the programs in `bench/`, on core 0 if it is a yardstick; gives its port."""
    port = free_port()
    command = [sys.executable, str(BENCH / name), str(port), *map(str, arguments)]
    with program(*command, port=port, core=0 if name.startswith("h11") else 1):
        yield port


def wrk(port: int, path: str, *, seconds: float, clients: int = 32, lua: str = "") -> float:
    """Load a server from core 1; return its requests per second, all answered with 200."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as file:
        file.write(lua or lua_for(QUESTION))
        file.flush()
        pinned = ["taskset", "-c", "1"] if _can_pin(1) else []
        url = f"http://127.0.0.1:{port}{path}"
        done = subprocess.run(
            [*pinned, "wrk", "-t1", f"-c{clients}", f"-d{seconds:.0f}s", "-s", file.name, url],
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
    if "Non-2xx" in done.stdout or "Socket errors" in done.stdout:
        raise RuntimeError(done.stdout)
    found = re.search(r"Requests/sec:\s+([\d.]+)", done.stdout)
    assert found
    return float(found[1])


def lua_for(body: str) -> str:
    """A wrk script that asks one question again and again."""
    return (
        f"wrk.method = 'POST'\nwrk.body = '{body}'\nwrk.headers['APIKEY'] = '{KEY}'\n"
        "wrk.headers['Content-Type'] = 'application/json'\n"
    )


def median(values: list[float]) -> float:
    return statistics.median(values)


def resident(pid: int) -> int:
    """A process's resident memory, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.split("VmRSS:")[1].split()[0])
