"""Start and stop: check the key file, say what will be done, take signals."""

import asyncio
import errno
import http.client
import logging
import os
import signal
import socket
import sys
from pathlib import Path

from keystore import KeyStore, new_key, reason
from settings import ROOT, Settings, SettingsError

log = logging.getLogger("ollprox")

EXIT_SETTINGS = 2  # a setting is wrong
EXIT_FAILED = 1  # the start failed for another reason


def open_keys(settings: Settings) -> KeyStore:
    """Read the key file.

    Raises:
        SettingsError: it cannot be used with these settings.

    """
    path = settings.key_path if settings.api_key_file else None
    keys = KeyStore.open(path, settings.api_key_salt.encode("utf-8", "surrogateescape"))
    if path is None:
        return keys
    result = keys.reload()
    if isinstance(result, OSError):
        raise SettingsError(f"API_KEY_FILE: {path}: {_mend(path, result)}")
    if keys.digests and result.strangers and not result.lookalikes:
        raise SettingsError(
            f"API_KEY_SALT is set, but no line of API_KEY_FILE {path} is a salted digest:"
            " hash the file with `python keystore.py hash`, or leave API_KEY_SALT empty"
        )
    for level, line in keys.adopt(result):
        log.log(level, "%s", line)
    if not keys.digests and result.lookalikes == len(result.labels) > 0:
        log.warning(
            "API_KEY_SALT is empty, but each line of API_KEY_FILE %s looks like a salted digest:"
            " if they are, set API_KEY_SALT, or nobody's key will fit",
            path,
        )
    return keys


def _mend(path: Path, error: OSError) -> str:
    """Say what is wrong with the key file, and what to do."""
    inside = ROOT / "keys" in path.parents
    contained = any(map(os.path.exists, ("/.dockerenv", "/run/.containerenv")))
    if contained and not inside and isinstance(error, FileNotFoundError):
        return (
            "there is no such file in the container, which sees only the folder keys/: move it"
            f" there and set API_KEY_FILE=keys/{path.name}, or mount its folder, with"
            f" {path.parent}:{path.parent}:ro under `volumes:` in docker-compose.yml"
        )
    if isinstance(error, FileNotFoundError):
        return "there is no such file: make it with one key a line, or leave API_KEY_FILE empty"
    if isinstance(error, PermissionError):
        return f"user {os.getuid()} may not read it: chmod a+r, or make that user its owner"
    return f"{reason(error)}: name a file with one key a line"


def make_key(keys: KeyStore, port: int) -> str:
    """Make a key for this run, where there is none, and say how it is used."""
    key = new_key()
    keys.admit(key.encode(), "made-at-start")
    return f"""
No API key is set, so this one was made. It is valid until OllProx stops:

    {key}

    curl http://localhost:{port}/call_model -H "APIKEY: {key}" \\
      -d '{{"model": "llama2", "prompt": "What is the capital of France?"}}'

To make a lasting one: mkdir -p keys && python keystore.py new --label me, append the line
that it prints to keys/keys.txt, and set API_KEY_FILE=keys/keys.txt in .env
"""


def describe(settings: Settings, keys: KeyStore) -> str:
    """Say in three lines what OllProx will do."""
    source = keys.path or "nowhere, since API_KEY_FILE is not set"
    cache = f"at most {settings.cache_max_bytes} bytes, {settings.cache_max_entry_bytes} an answer"
    kept = f"{cache}, for {settings.cache_ttl:g} s" if settings.cache_ttl else "off (CACHE_TTL=0)"
    return (
        f"forwards to   http://{settings.upstream_address}\n"
        f"API keys      {len(keys.labels)} from {source}\n"
        f"cache         {kept}"
    )


class Signals:
    """The first and the second SIGTERM or SIGINT.

    As PID 1 in a container an unhandled signal does nothing, so both are handled.
    """

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._came)

    def _came(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


def cannot_listen(settings: Settings, error: OSError) -> int:
    """Say why the address cannot be listened on; return the exit status."""
    where = settings.listen_address
    if error.errno == errno.EADDRINUSE:
        complain(f"port in use: {where} is taken; stop what uses it, or set LISTEN_PORT")
        return EXIT_FAILED
    if error.errno in {errno.EADDRNOTAVAIL, None} or isinstance(error, socket.gaierror):
        complain(f"LISTEN_HOST must be an address of this machine, not {settings.listen_host!r}")
        return EXIT_SETTINGS
    complain(f"cannot listen on {where} (LISTEN_HOST, LISTEN_PORT): {reason(error)}")
    return EXIT_FAILED


def complain(text: str) -> None:
    """Write one line on standard error."""
    print(f"ollprox: {text}", file=sys.stderr, flush=True)


def ping(settings: Settings) -> int:
    """Ask the OllProx of these settings whether it is alive; 0 if so, 1 if not."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.listen_host, settings.listen_host)
    connection = http.client.HTTPConnection(host, settings.listen_port, timeout=3)
    try:
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        complain(f"no answer from {settings.listen_address}: {error}")
        return EXIT_FAILED
    finally:
        connection.close()
    return 0 if status == 200 else EXIT_FAILED
