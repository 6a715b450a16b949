"""What happens at the start: checks, messages, TLS, signals; and `--ping`."""

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
import signal
import socket
import ssl
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from access.credentials import new_key
from access.keyfile import reason
from access.rights import parse_options
from answers.models import describe_response
from keystore import KeyStore
from settings import COMMAND, ROOT, Host, Settings, SettingsError, address, program_path
from wire.http11 import HTTPError
from wire.valkey import Unavailable, Valkey, open_valkey

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

log = logging.getLogger("ollprox")

MADE = "made-at-start"  # the label of the key that is made if there is none
EXIT_SETTINGS = 2  # a setting is wrong
EXIT_FAILED = 1  # the start, or --ping, failed for another reason
PING_TIMEOUT = 3.0  # seconds
MAX_PONG = 1024  # bytes of a body that --ping reads
_PLAIN = re.compile(r"[\w.+-]+", re.ASCII)  # versions that need no quotes
LOOP_ERROR_INTERVAL = 60.0  # seconds between two log lines for the same failure
OUTSIDE = "host.docker.internal"  # the name of its host in a container of Docker Desktop
LOCAL_TIMEOUT = 1.0  # seconds to connect to an Ollama on this machine
# What runs OllProx's commands where the start runs in the container of docker-compose.yml.
_IN_COMPOSE = "docker compose run --rm -v ./keys:/app/keys ollprox"


def open_keys(settings: Settings, salt: bytes = b"") -> KeyStore:
    """Read the key file.

    Args:
        settings: what the user chose.
        salt: of the digests in memory where API_KEY_SALT is not set; empty for a random one.

    Raises:
        SettingsError: it cannot be used with these settings.

    """
    path = settings.key_path if settings.api_key_file or settings.key_path.exists() else None
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
    )
    if (salt := _shared_salt(settings) or salt) and not settings.api_key_salt:
        keys.salt = salt
    if path is None:
        _warn_without_a_file(settings)
        return keys
    result = keys.reload()
    if isinstance(result, OSError):
        raise SettingsError(f"API_KEY_FILE: {_unusable(path, settings.api_key_file, result)}")
    if keys.digests and result.strangers and not result.lookalikes:
        raise SettingsError(
            f"API_KEY_SALT is set, but no line of API_KEY_FILE {path} is a salted digest:"
            f" hash the file with `{command()} keys hash`, or leave API_KEY_SALT empty"
        )
    for level, line in keys.adopt(result):
        log.log(level, "%s", line)
    if not keys.digests and result.lookalikes == len(result.keys) > 0:
        log.warning(
            "API_KEY_SALT is empty, but each line of API_KEY_FILE %s looks like a salted digest:"
            " if so, set API_KEY_SALT, or no key will be valid",
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
    """Warn about settings that have no effect without a key file."""
    if settings.api_key_salt:
        log.warning("API_KEY_SALT is set, but API_KEY_FILE is not: the salt has no effect")
    if set(settings.admin_labels) - {MADE}:
        log.warning("ADMIN_LABELS is set, but API_KEY_FILE is not: no key has these labels")


def _unusable(path: Path, text: str, error: OSError) -> str:
    """Return why the key file, set as `text`, cannot be used."""
    if isinstance(error, FileNotFoundError) and _may_be_a_key(path, text):
        return (
            "it does not name a file, and looks like a key (not shown); put the key into a file"
            " such as keys/keys.txt, and set API_KEY_FILE=keys/keys.txt"
        )
    return f"{path}: {_fix(path, error)}"


def _may_be_a_key(path: Path, text: str) -> bool:
    """Return True if the path of a missing file may be a key: no suffix, and no folder."""
    in_a_folder = "/" in text and (text[0] in "/~." or path.parent.is_dir())
    return not in_a_folder and not re.search(r"\.[A-Za-z]{2,5}\Z", text)


def _fix(path: Path, error: OSError) -> str:
    """Return what is wrong with the key file, and the fix."""
    inside = ROOT / "keys" in path.parents
    if in_our_container() and not inside and isinstance(error, FileNotFoundError):
        folder = path.parent if path.parent not in {ROOT, Path("/")} else "its folder"
        return (
            "there is no such file in the container, which sees only the folder keys/: move it"
            f" there and set API_KEY_FILE=keys/{path.name}, or add a mount of {folder} under"
            " `volumes:` in docker-compose.yml"
        )
    if isinstance(error, FileNotFoundError):
        return "there is no such file: make it with one key a line, or leave API_KEY_FILE empty"
    if isinstance(error, PermissionError):
        user = f"user {os.getuid()}" if hasattr(os, "getuid") else "OllProx's user"
        return (
            f"{user} may not read it: give it to a group of that user with chgrp,"
            " then chmod 640, or make that user its owner"
        )
    return f"{reason(error)}: name a file with one key a line"


def make_key(keys: KeyStore, scheme: str, port: int) -> str:
    """Make a key for this run; return the message that shows it and how to use it."""
    key = new_key()
    keys.accept_only(key.encode(), MADE)
    why = f"API_KEY_FILE {keys.path} has no key in it" if keys.path else "No API key is set"
    until = "stops, or until the file gets a key" if keys.path else "stops"
    return f"""
{why}, so this one was made. It is valid until OllProx {until}:

    {key}

    curl {scheme}://localhost:{port}/call_model -H "APIKEY: {key}" \\
      -d '{{"model": "llama2", "prompt": "What is the capital of France?"}}'

To make a lasting one: {command()} keys add --label me, and restart
"""


def in_our_container() -> bool:
    """Return True in a container of our own image."""
    marks = ("/.dockerenv", "/run/.containerenv")  # Docker's, Podman's
    return Path("/app") == ROOT and any(map(os.path.exists, marks))


def command() -> str:
    """Return how a user of this machine runs OllProx's commands."""
    return _IN_COMPOSE if in_our_container() else COMMAND


def host_of_container(settings: Settings, outside: str = OUTSIDE) -> str | None:
    """Return the name of a container's host if Ollama should be looked for there, else None.

    That is so where OLLAMA_HOST is the default, nothing answers there, and the host has a name,
    as in Docker Desktop: there the container's own loopback never has an Ollama.
    """
    if len(settings.hosts) > 1 or settings.ollama_host != Settings().ollama_host:
        return None
    here = (settings.ollama_host, settings.ollama_port)
    try:
        socket.create_connection(here, timeout=LOCAL_TIMEOUT).close()
    except OSError:
        with contextlib.suppress(OSError):
            socket.getaddrinfo(outside, settings.ollama_port)
            return outside
    return None


def describe(settings: Settings, keys: KeyStore) -> str:
    """Return a few lines that summarize the settings."""
    source = f"from {keys.path}" if keys.path else "(API_KEY_FILE is not set)"
    shared = f"\nshared cache  {settings.cache_server}" if settings.cache_url else ""
    return (
        f"forwards to   {describe_hosts(settings)}\n"
        f"API keys      {len(keys) or 'none'} {source}\n"
        f"cache         {describe_cache(settings)}{shared}"
    )


def describe_hosts(settings: Settings) -> str:
    """Return what may be shown of the Ollama servers."""
    return ", ".join(map(_host, settings.hosts))


def _host(host: Host) -> str:
    """Describe a server without showing its credentials."""
    weight = f" (weight {host.weight:g})" if host.weight != 1 else ""
    return f"{host.url}{weight}{' with credentials' if host.authorization else ''}"


def describe_cache(settings: Settings) -> str:
    """Return what is kept, and for how long."""
    if not settings.cache_ttl:
        return "off (CACHE_TTL=0)"
    limits = f"up to {_size(settings.cache_max_bytes)}"
    limits += f", {_size(settings.cache_max_entry_bytes)} per answer"
    return f"{limits}, for {settings.cache_ttl:g} s"


def dashboard_url(settings: Settings, port: int) -> str:
    """Return the dashboard's address for a browser on this machine."""
    everywhere = settings.listen_host in {"0.0.0.0", "::", "127.0.0.1", "::1"}
    host = "localhost" if everywhere else settings.listen_host
    return f"{settings.listen_scheme}://{address(host, port)}/dashboard"


def _size(count: int) -> str:
    """Return a number of bytes as a setting would have it, such as 8M."""
    for unit, power in (("G", 30), ("M", 20), ("K", 10)):
        if count % (1 << power) == 0:
            return f"{count >> power}{unit}"
    return f"{count} bytes"


def describe_upstream(version: str | HTTPError, address: str) -> str:
    """Return one line about what answers at upstream's address.

    Args:
        version: Ollama's version, or the error of the request for it.
        address: host and port of upstream.

    """
    if isinstance(version, str):
        shown = version if _PLAIN.fullmatch(version) else json.dumps(version)
        return f"Ollama {shown} answers at {address}"
    if version.status == 508:
        return f"{version.message} ({address} is OllProx); until then each request gets 508"
    then = _how_to_start_ollama() if "cannot be reached" in version.message else ""
    return f"Ollama does not answer yet; requests will still be forwarded. {version.message}{then}"


def _how_to_start_ollama() -> str:
    if in_our_container():
        return " To start one beside OllProx: docker compose --profile ollama up -d"
    return " To start it: ollama serve. To get it: https://ollama.com/download"


def raise_file_limit(wanted: int) -> int:
    """Raise the limit of open files; return how many clients it allows, at most `wanted`.

    Each client needs one open file, and perhaps another for its connection to Ollama.
    """
    if resource is None:
        return wanted
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for files in (hard, 2 * wanted + 32):  # macOS refuses its own hard limit
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
            break
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
    if not any(host.tls for host in settings.hosts):
        return None
    return _trusting("OLLAMA_CA_FILE", settings.ollama_ca_file)


def _trusting(name: str, file: str) -> ssl.SSLContext:
    """Return a TLS context that trusts the authorities in `file`, or those of the system.

    Raises:
        SettingsError: the file that the setting `name` names cannot be used.

    """
    path = program_path(file) if file else None
    try:
        return ssl.create_default_context(cafile=path)
    except (OSError, ValueError) as error:
        raise SettingsError(f"{name}: {path}: {_tls_reason(error)}") from None


def cache_server(settings: Settings) -> Valkey | None:
    """Return the server of the shared cache, not connected yet; None if there is none.

    Raises:
        SettingsError: redis-py is not installed, or CACHE_CA_FILE cannot be used.

    """
    server = settings.cache_server
    if server is None:
        return None
    if server.tls:  # redis-py would not say what is wrong
        _trusting("CACHE_CA_FILE", settings.cache_ca_file)
    path = str(program_path(settings.cache_ca_file)) if settings.cache_ca_file else None
    try:
        return open_valkey(server, settings.cache_timeout, path)
    except ModuleNotFoundError:
        raise SettingsError(
            "CACHE_URL needs redis-py: run"
            f" `{sys.executable} -m pip install -r requirements-shared.txt`"
            " (other installations: docs/scaling.md), or leave it empty"
        ) from None


async def try_cache(server: Valkey, key: bytes) -> str:
    """Read a key on the server of the shared cache; return why that failed, empty if it worked."""
    try:
        await server.call("MGET", key)
    except Unavailable as error:
        return str(error)
    return ""


def _warn_about_the_shared_cache(settings: Settings) -> None:
    """Warn about settings that have no effect, or that keep the shared cache from working."""
    server = settings.cache_server
    if server is None:
        if settings.cache_secret or settings.cache_ca_file:
            log.warning("CACHE_SECRET and CACHE_CA_FILE have no effect without CACHE_URL")
        return
    if not settings.model_refresh:
        log.warning("MODEL_REFRESH=0: the digests of models are not known, so no answer is shared")
    if not settings.cache_ttl:
        log.warning("CACHE_TTL=0: no answer is stored, so none is shared")
    if settings.cache_ca_file and not server.tls:
        log.warning("CACHE_CA_FILE has no effect: the scheme of CACHE_URL is without TLS")


def check(settings: Settings) -> None:
    """Warn about settings that are probably wrong; check the address and the certificates.

    Raises:
        SettingsError: one of them cannot be used.

    """
    for warning in settings.warnings:
        log.warning("%s", warning)
    if len(settings.hosts) > 1 and not settings.model_refresh:
        log.warning(
            "MODEL_REFRESH is 0, so OllProx does not compare the models of the servers in"
            " OLLAMA_HOST: a request may go to one that lacks its model or has another version"
            " of it, and lists show the models of one server only"
        )
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
            # A pair that does not match would break the current context, so test it first.
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
    """Logs errors of the event loop, the same OS error at most once a minute."""

    def __init__(self) -> None:
        self._logged: dict[str, float] = {}  # when each message was last logged; there are few

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log one error."""
        error, message = context.get("exception"), str(context.get("message"))
        if isinstance(error, ssl.SSLError | asyncio.CancelledError):
            log.debug("%s: %s", message, _tls_reason(error))
        elif isinstance(error, ValueError) and "file descriptor" in str(error):
            log.debug("%s", message)  # asyncio calls accept once more after closing the socket
        elif not isinstance(error, OSError):
            log.error("%s", message, exc_info=error)
        elif loop.time() - self._logged.get(message, -math.inf) > LOOP_ERROR_INTERVAL:
            self._logged[message] = loop.time()
            log.error("%s: %s", message, reason(error))


def tune_collector() -> None:
    """Keep garbage collections short, however many answers are stored.

    A full collection visits all stored answers, and Python's default thresholds would make it
    run often.
    """
    gc.collect()
    gc.freeze()  # these objects live until the end
    gc.set_threshold(50_000, 20, 100)


class Signals:
    """Handles SIGTERM and SIGINT, where the first drains and the second stops; and SIGHUP.

    In a container, OllProx is PID 1, for which an unhandled signal does nothing. Windows has no
    SIGHUP; its Ctrl-Break is SIGBREAK.
    """

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        self.reload = asyncio.Event()  # set by SIGHUP; the reloading task clears it
        for name in ("SIGTERM", "SIGINT", "SIGBREAK"):
            _on_signal(name, self._stop)
        _on_signal("SIGHUP", self._reload)

    def _stop(self) -> None:
        (self.second if self.first.is_set() else self.first).set()

    def _reload(self) -> None:
        log.info("SIGHUP: reading the key file and the certificate again")
        self.reload.set()


def _on_signal(name: str, act: Callable[[], None]) -> None:
    """Let the event loop call `act` when a signal comes, if this system has it."""
    number: int | None = getattr(signal, name, None)
    if number is None:
        return
    loop = asyncio.get_running_loop()
    try:
        loop.add_signal_handler(number, act)
    except NotImplementedError:  # the loops of Windows
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(act))


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
    """Request our own `/health`, and print the result; return 0 if OllProx answers."""
    import http.client  # 2 MiB that the server need not hold

    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.listen_host, settings.listen_host)
    url = f"{settings.listen_scheme}://{address(host, settings.listen_port)}"
    connection = http.client.HTTPConnection(host, settings.listen_port, timeout=PING_TIMEOUT)
    if settings.tls_cert_file:  # it need not be valid for this address, so it is not verified
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
