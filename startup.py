"""Checks at the start, the messages of the start, TLS, signals, and `--ping`."""

import asyncio
import contextlib
import errno
import gc
import hmac
import json
import logging
import math
import os
import re
import resource
import signal
import socket
import ssl
import sys
from pathlib import Path
from typing import Any

from answers.models import describe_response
from keystore import KeyStore, new_key, parse_options, reason
from settings import ROOT, Settings, SettingsError, address, program_path
from wire.http11 import HTTPError
from wire.valkey import Unavailable, Valkey, open_valkey

log = logging.getLogger("ollprox")

MADE = "made-at-start"  # the label of the key that is made where there is none
EXIT_SETTINGS = 2  # a setting is wrong
EXIT_FAILED = 1  # the start, or --ping, failed for another reason
PING_TIMEOUT = 3.0  # seconds
MAX_PONG = 1024  # bytes that --ping reads of an answer's body
_PLAIN = re.compile(r"[\w.+-]+", re.ASCII)  # versions that need no quotes
LOOP_ERROR_INTERVAL = 60.0  # seconds between two log lines for the same failure


def open_keys(settings: Settings) -> KeyStore:
    """Read the key file.

    Raises:
        SettingsError: it cannot be used with these settings.

    """
    path = settings.key_path if settings.api_key_file else None
    try:
        defaults = parse_options(settings.key_defaults.split())
    except ValueError as error:
        raise SettingsError(f"KEY_DEFAULTS: {error}") from None
    keys = KeyStore.open(
        path,
        secret_bytes(settings.api_key_salt),
        admin_labels=settings.admin_labels,
        defaults=defaults,
        refresh=settings.key_refresh,
        shared_salt=_shared_salt(settings),
    )
    if path is None:
        _warn_without_a_file(settings)
        return keys
    result = keys.reload()
    if isinstance(result, OSError):
        raise SettingsError(f"API_KEY_FILE: {_unusable(path, settings.api_key_file, result)}")
    if keys.digests and result.strangers and not result.lookalikes:
        raise SettingsError(
            f"API_KEY_SALT is set, but no line of API_KEY_FILE {path} is a salted digest:"
            " hash the file with `python keystore.py hash`, or leave API_KEY_SALT empty"
        )
    for level, line in keys.adopt(result):
        log.log(level, "%s", line)
    if not keys.digests and result.lookalikes == len(result.keys) > 0:
        log.warning(
            "API_KEY_SALT is empty, but each line of API_KEY_FILE %s looks like a salted digest:"
            " if they are, set API_KEY_SALT, or nobody's key will fit",
            path,
        )
    return keys


def _shared_salt(settings: Settings) -> bytes:
    """Return a salt that all processes with one CACHE_SECRET have; empty without a secret."""
    if not settings.cache_secret:
        return b""
    return hmac.digest(secret_bytes(settings.cache_secret), b"ollprox salt", "sha256")


def secret_bytes(text: str) -> bytes:
    """Return a secret of the settings as the bytes that the environment has."""
    return text.encode("utf-8", "surrogateescape")


def _warn_without_a_file(settings: Settings) -> None:
    """Warn about settings that do nothing without a key file."""
    if settings.api_key_salt:
        log.warning("API_KEY_SALT is set, but API_KEY_FILE is not: the salt does nothing")
    if set(settings.admin_labels) - {MADE}:
        log.warning("ADMIN_LABELS is set, but API_KEY_FILE is not: no key has these labels")


def _unusable(path: Path, text: str, error: OSError) -> str:
    """Say why the key file, set as `text`, cannot be used."""
    if isinstance(error, FileNotFoundError) and _may_be_a_key(path, text):
        return (
            "it does not name a file, and looks like a key (not shown); put the key into a file"
            " such as keys/keys.txt, and set API_KEY_FILE=keys/keys.txt"
        )
    return f"{path}: {_mend(path, error)}"


def _may_be_a_key(path: Path, text: str) -> bool:
    """Whether a missing file's path may be a key: it has no suffix, and is in no folder."""
    in_a_folder = "/" in text and (text[0] in "/~." or path.parent.is_dir())
    return not in_a_folder and not re.search(r"\.[A-Za-z]{2,5}\Z", text)


def _mend(path: Path, error: OSError) -> str:
    """Say what is wrong with the key file, and what to do."""
    inside = ROOT / "keys" in path.parents
    image = Path("/app") == ROOT and any(map(os.path.exists, ("/.dockerenv", "/run/.containerenv")))
    if image and not inside and isinstance(error, FileNotFoundError):
        folder = path.parent if path.parent not in {ROOT, Path("/")} else "its folder"
        return (
            "there is no such file in the container, which sees only the folder keys/: move it"
            f" there and set API_KEY_FILE=keys/{path.name}, or add a mount of {folder} under"
            " `volumes:` in docker-compose.yml"
        )
    if isinstance(error, FileNotFoundError):
        return "there is no such file: make it with one key a line, or leave API_KEY_FILE empty"
    if isinstance(error, PermissionError):
        return (
            f"user {os.getuid()} may not read it: give it to a group of that user with chgrp,"
            " then chmod 640, or make that user its owner"
        )
    return f"{reason(error)}: name a file with one key a line"


def make_key(keys: KeyStore, scheme: str, port: int) -> str:
    """Make a key for this run, where there is none, and say how it is used."""
    key = new_key()
    keys.admit(key.encode(), MADE)
    why = f"API_KEY_FILE {keys.path} has no key in it" if keys.path else "No API key is set"
    until = "stops, or until the file gets a key" if keys.path else "stops"
    return f"""
{why}, so this one was made. It is valid until OllProx {until}:

    {key}

    curl {scheme}://localhost:{port}/call_model -H "APIKEY: {key}" \\
      -d '{{"model": "llama2", "prompt": "What is the capital of France?"}}'

To make a lasting one: mkdir -p keys && python keystore.py new --label me, append the line
that it prints to keys/keys.txt, and set API_KEY_FILE=keys/keys.txt in .env
"""


def describe(settings: Settings, keys: KeyStore) -> str:
    """Return a few lines that say what OllProx does with these settings."""
    source = f"from {keys.path}" if keys.path else "(API_KEY_FILE is not set)"
    limits = f"up to {_size(settings.cache_max_bytes)}"
    limits += f", {_size(settings.cache_max_entry_bytes)} per answer"
    kept = f"{limits}, for {settings.cache_ttl:g} s" if settings.cache_ttl else "off (CACHE_TTL=0)"
    shared = f"\nshared cache  {settings.cache_server}" if settings.cache_url else ""
    return (
        f"forwards to   {settings.upstream_url}\n"
        f"API keys      {len(keys) or 'none'} {source}\n"
        f"cache         {kept}{shared}"
    )


def _size(count: int) -> str:
    """Return a number of bytes as it may be written in a setting."""
    for unit, power in (("G", 30), ("M", 20), ("K", 10)):
        if count % (1 << power) == 0:
            return f"{count >> power}{unit}"
    return f"{count} bytes"


def describe_upstream(version: str | HTTPError, address: str) -> str:
    """Return one line that says what answers at upstream's address.

    Args:
        version: Ollama's version, or the error of asking for it.
        address: host and port of upstream.

    """
    if isinstance(version, str):
        shown = version if _PLAIN.fullmatch(version) else json.dumps(version)
        return f"Ollama {shown} answers at {address}"
    if version.status == 508:
        return f"{version.message} ({address} is OllProx); until then each request gets 508"
    return f"Ollama does not answer yet; requests will still be forwarded. {version.message}"


def raise_file_limit(wanted: int) -> int:
    """Raise the limit of open files; return the number of clients it allows, at most `wanted`.

    Each client needs one file, and may need another for its connection to Ollama.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = wanted if soft == resource.RLIM_INFINITY else min(wanted, max(1, (soft - 32) // 2))
    if enough < wanted:
        log.warning("MAX_CONNECTIONS is lowered to %d: only %d files may be open", enough, soft)
    return enough


def upstream_tls(settings: Settings) -> ssl.SSLContext | None:
    """Return the TLS context that verifies upstream's certificate; None for plain HTTP.

    Raises:
        SettingsError: OLLAMA_CA_FILE cannot be used.

    """
    if not settings.ollama_tls:
        return None
    path = program_path(settings.ollama_ca_file) if settings.ollama_ca_file else None
    try:
        return ssl.create_default_context(cafile=path)
    except (OSError, ValueError) as error:
        raise SettingsError(f"OLLAMA_CA_FILE: {path}: {_tls_reason(error)}") from None


def cache_server(settings: Settings) -> Valkey | None:
    """Return the server of the shared cache, not connected yet; None if there is none.

    Raises:
        SettingsError: redis-py is not installed, or CACHE_CA_FILE cannot be used.

    """
    server = settings.cache_server
    if server is None:
        return None
    path = str(program_path(settings.cache_ca_file)) if settings.cache_ca_file else None
    try:
        if server.tls:
            ssl.create_default_context(cafile=path)  # redis-py would not say what is wrong
    except (OSError, ValueError) as error:
        raise SettingsError(f"CACHE_CA_FILE: {path}: {_tls_reason(error)}") from None
    try:
        return open_valkey(server, settings.cache_timeout, path)
    except ModuleNotFoundError:
        raise SettingsError(
            "CACHE_URL needs redis-py: run"
            f" `{sys.executable} -m pip install -r requirements-shared.txt`, or leave it empty"
        ) from None


async def describe_cache(server: Valkey, key: bytes) -> str:
    """Return one line that says whether the server of the shared cache answers for a key."""
    try:
        await server.call("MGET", key)
    except Unavailable as error:
        return f"the shared cache does not answer yet: {error}"
    return "the shared cache answers"


def _warn_about_the_shared_cache(settings: Settings) -> None:
    """Warn about settings that do nothing, or that keep the shared cache from working."""
    server = settings.cache_server
    if server is None:
        if settings.cache_secret or settings.cache_ca_file:
            log.warning("CACHE_SECRET and CACHE_CA_FILE do nothing without CACHE_URL")
        return
    if not settings.model_refresh:
        log.warning("MODEL_REFRESH=0: the digests of models are not known, so no answer is shared")
    if not settings.cache_ttl:
        log.warning("CACHE_TTL=0: no answer is stored, so none is shared")
    if settings.cache_ca_file and not server.tls:
        log.warning("CACHE_CA_FILE does nothing: the scheme of CACHE_URL is without TLS")


def check(settings: Settings) -> None:
    """Warn about settings that are probably wrong; check the address and the certificates.

    Raises:
        SettingsError: one of them cannot be used.

    """
    for warning in settings.warnings:
        log.warning("%s", warning)
    try:
        family, kind, *_, where = socket.getaddrinfo(
            settings.listen_host, 0, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind) as probe:
            probe.bind(where)
    except OSError:
        raise SettingsError(
            f"LISTEN_HOST must be an address of this machine, not {settings.listen_host!r}"
        ) from None
    upstream_tls(settings)
    cache_server(settings)
    _warn_about_the_shared_cache(settings)
    if settings.tls_cert_file:
        Certificate(settings)


class Certificate:
    """Our certificate and its key, read again when either changes.

    Raises:
        SettingsError: TLS_CERT_FILE or TLS_KEY_FILE cannot be used.

    """

    def __init__(self, settings: Settings) -> None:
        self._paths = program_path(settings.tls_cert_file), program_path(settings.tls_key_file)
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._loaded = self._failed = self._state()
        try:
            self._load(self.context)
        except (OSError, ValueError) as error:
            raise SettingsError(
                f"TLS_CERT_FILE, TLS_KEY_FILE: {self._paths[0]}, {self._paths[1]}:"
                f" {_tls_reason(error)}: name a certificate chain and its key, as PEM files"
            ) from None

    async def poll(self) -> None:
        """Load a renewed certificate; if it cannot be used, the last one stays in use."""
        state = self._state()
        if state == self._loaded:
            return
        try:
            # A pair that does not match would break the context in use, so try another first.
            self._load(ssl.create_default_context(ssl.Purpose.CLIENT_AUTH))
            self._load(self.context)
        except (OSError, ValueError) as error:
            if state != self._failed:
                log.error("the renewed certificate cannot be used: %s", _tls_reason(error))
            self._failed = state
        else:
            self._loaded = state
            log.info("the certificate was read again")

    def _load(self, context: ssl.SSLContext) -> None:
        context.load_cert_chain(*self._paths, password=_no_passphrase)

    def _state(self) -> list[tuple[int, int, int] | None]:
        state: list[tuple[int, int, int] | None] = []
        for path in self._paths:
            try:
                status = path.stat()
            except OSError:
                state.append(None)
            else:
                state.append((status.st_mtime_ns, status.st_size, status.st_ino))
        return state


def _no_passphrase() -> str:
    """Refuse an encrypted key; OpenSSL would ask for the passphrase at the terminal."""
    raise ValueError("the key is encrypted; use one without a passphrase")


def _tls_reason(error: BaseException) -> str:
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)


class LoopErrors:
    """Logs errors of the event loop; the same failure of the system at most once a minute."""

    def __init__(self) -> None:
        self._logged: dict[str, float] = {}  # time of the last log line by message; few messages

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log one error."""
        error, message = context.get("exception"), str(context.get("message"))
        if isinstance(error, ssl.SSLError | asyncio.CancelledError):
            log.debug("%s: %s", message, _tls_reason(error))
        elif isinstance(error, ValueError) and "file descriptor" in str(error):
            log.debug("%s", message)  # asyncio accepts once more on a closed socket
        elif not isinstance(error, OSError):
            log.error("%s", message, exc_info=error)
        elif loop.time() - self._logged.get(message, -math.inf) > LOOP_ERROR_INTERVAL:
            self._logged[message] = loop.time()
            log.error("%s: %s", message, reason(error))


def tune_collector() -> None:
    """Keep collections of garbage short, however many answers are stored.

    A collection looks at every object that holds others: with Python's own thresholds it
    would go through all stored answers again and again.
    """
    gc.collect()
    gc.freeze()  # what the start has made stays until the end
    gc.set_threshold(50_000, 20, 100)


class Signals:
    """SIGTERM and SIGINT, of which the first drains and the second ends at once; and SIGHUP.

    As PID 1 in a container an unhandled signal does nothing, so each is handled.
    """

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        self.reload = asyncio.Event()  # set by SIGHUP; cleared by whoever reloads
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        loop.add_signal_handler(signal.SIGHUP, self._reload)

    def _stop(self) -> None:
        (self.second if self.first.is_set() else self.first).set()

    def _reload(self) -> None:
        log.info("SIGHUP: reading the key file and the certificate again")
        self.reload.set()


def cannot_listen(settings: Settings, error: OSError) -> int:
    """Print why OllProx cannot listen on its port; return the exit status."""
    where = settings.listen_address
    if error.errno != errno.EADDRINUSE:
        complain(f"cannot listen on {where} (LISTEN_HOST, LISTEN_PORT): {reason(error)}")
    elif settings.listen_port == settings.ollama_port:
        complain(
            f"port in use: {where} is taken, probably by Ollama: LISTEN_PORT is OllProx's own port"
            " and must differ from Ollama's, such as 8000"
        )
    else:
        complain(
            f"port in use: {where} is taken: stop the program that uses it, or set LISTEN_PORT"
        )
    return EXIT_FAILED


def complain(text: str) -> None:
    """Write one line on standard error."""
    print(f"ollprox: {text}", file=sys.stderr, flush=True)


def ping(settings: Settings) -> int:
    """Ask for `/health` where these settings listen and print what answers; 0 if it is OllProx."""
    import http.client  # 2 MiB that the server need not hold

    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.listen_host, settings.listen_host)
    url = f"{settings.listen_scheme}://{address(host, settings.listen_port)}"
    connection = http.client.HTTPConnection(host, settings.listen_port, timeout=PING_TIMEOUT)
    if settings.tls_cert_file:  # our own certificate, asked for by an address: not verified
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection = http.client.HTTPSConnection(
            host, settings.listen_port, timeout=PING_TIMEOUT, context=context
        )
    try:
        connection.request("GET", "/health")
        response = connection.getresponse()
        body = response.read(MAX_PONG)
    except (OSError, http.client.HTTPException) as error:
        complain(f"no answer from {url}/health: {ascii(str(error) or type(error).__name__)[1:-1]}")
        return EXIT_FAILED
    finally:
        connection.close()
    if response.status == 200 and body == b'{"status":"ok"}':
        print(f"OllProx is alive at {url}")
        return 0
    headers = [(name.encode(), value.encode()) for name, value in response.getheaders()]
    found = describe_response(response.status, headers, body)
    complain(f"no healthy OllProx at {url}: GET /health had {found}")
    return EXIT_FAILED
