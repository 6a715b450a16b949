"""How fast hits, misses and streamed lines are, against yardsticks run in the same minute.

usage: speed.py [ROUNDS [SECONDS]]

Each measure runs OllProx and its yardsticks in turn, several rounds, and prints the medians and
the ratio. The server is on core 0, the load (`wrk -t1`) and the stand-in on core 1.

- hits: `wrk -c32`, one small question, a single object of about 400 bytes from the cache. The
  yardsticks are a bare h11 server on asyncio streams, and nginx with a key check and
  `proxy_cache` on POST with the body as key. "logged" has an access line on both sides.
- misses: every question is another one, so each is a request to the stand-in, whose stream of
  four lines is folded; nginx passes the same stream on without a cache, and so does the stand-in.
  The stand-in shares its core with the load, so the fastest of them are bound by that core.
Needs wrk and nginx (Debian's packages of these names); without nginx its columns are missing.
"""

import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from common import BENCH, KEY, free_port, lua_for, median, ollprox, program, script, wrk

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
DISTINCT = lua_for("") + (
    "local n = 0\nrequest = function()\n  n = n + 1\n"
    '  return wrk.format(nil, nil, nil, string.format(\'{"model":"llama2","prompt":"q %d %d"}\','
    " n, math.random(1000000000)))\nend\n"
)


@contextlib.contextmanager
def nginx(upstream: int, *, cached: bool, logged: bool) -> Iterator[int]:
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        log = f"{folder}/access.log" if logged else "off"
        text = NGINX.format(
            folder=folder,
            user="user root;" if os.getuid() == 0 else "",
            log=log,
            key=KEY,
            upstream=upstream,
            port=port,
            cache=CACHE if cached else "proxy_buffering off;",
        )
        config = Path(folder, "nginx.conf")
        config.write_text(text)
        with program("nginx", "-c", str(config), "-p", folder, port=port, core=0):
            yield port


Contender = Callable[[int], contextlib.AbstractContextManager[int]]


@contextlib.contextmanager
def ours(upstream: int, level: str) -> Iterator[int]:
    with ollprox(upstream, LOG_LEVEL=level) as (port, _):
        yield port


@contextlib.contextmanager
def straight(upstream: int) -> Iterator[int]:
    yield upstream


def measures() -> dict[str, tuple[str, dict[str, Contender]]]:
    """Each measure: its wrk script, and who takes part."""
    found = {
        "hits": (
            "",
            {
                "ollprox": lambda upstream: ours(upstream, "WARNING"),
                "h11": lambda upstream: script("h11_server.py"),
                "nginx": lambda upstream: nginx(upstream, cached=True, logged=False),
            },
        ),
        "hits, logged": (
            "",
            {
                "ollprox": lambda upstream: ours(upstream, "INFO"),
                "nginx": lambda upstream: nginx(upstream, cached=True, logged=True),
            },
        ),
        "misses": (
            DISTINCT,
            {
                "ollprox": lambda upstream: ours(upstream, "WARNING"),
                "nginx": lambda upstream: nginx(upstream, cached=False, logged=False),
                "straight": straight,
            },
        ),
    }
    if shutil.which("nginx") is None:
        for _, contenders in found.values():
            contenders.pop("nginx", None)
    return found


def main() -> int:
    rounds = int(sys.argv[1]) if sys.argv[1:] else 3
    seconds = float(sys.argv[2]) if sys.argv[2:] else 3.0
    results: dict[str, dict[str, list[float]]] = {}
    with script("upstream.py") as upstream:
        for name, (lua, contenders) in measures().items():
            rows = results.setdefault(name, {})
            for _ in range(rounds):
                for contender, start in contenders.items():
                    with start(upstream) as port:
                        path = "/api/generate" if contender == "straight" else "/call_model"
                        wrk(port, path, seconds=1, lua=lua)  # to warm up
                        speed = wrk(port, path, seconds=seconds, lua=lua)
                    rows.setdefault(contender, []).append(speed)
            for contender, speeds in rows.items():
                ratio = median(rows["ollprox"]) / median(speeds)
                print(f"| {name} | {contender} | {median(speeds):,.0f} | {ratio:.2f} |", flush=True)
    (BENCH / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
