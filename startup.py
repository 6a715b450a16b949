"""Start and stop: check the key file, say what will be done, take signals."""

import asyncio
import contextlib
import errno
import gc
import logging
import math
import os
import re
import resource
import signal
import socket
import ssl
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cache import Cache
from keystore import KeyStore, new_key, parse_options, reason
from settings import ROOT, Settings, SettingsError, program_path

log = logging.getLogger("ollprox")

MADE = "made-at-start"  # the label of the key that is made where there is none
EXIT_SETTINGS = 2  # a setting is wrong
EXIT_FAILED = 1  # the start failed for another reason
FREEZE_AFTER = 2000  # stored answers
THAW_AFTER = 1000  # connections: some 10 MiB
COLLECT_AFTER = 10_000  # new objects; Python's own 700 are as many as a few requests have


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
        settings.api_key_salt.encode("utf-8", "surrogateescape"),
        admin_labels=settings.admin_labels,
        defaults=defaults,
        refresh=settings.key_refresh,
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
    """Say in three lines what OllProx will do."""
    source = f"from {keys.path}" if keys.path else "since API_KEY_FILE is not set"
    cache = f"at most {settings.cache_max_bytes} bytes, {settings.cache_max_entry_bytes} an answer"
    kept = f"{cache}, for {settings.cache_ttl:g} s" if settings.cache_ttl else "off (CACHE_TTL=0)"
    return (
        f"forwards to   {settings.upstream_url}\n"
        f"API keys      {len(keys) or 'none'} {source}\n"
        f"cache         {kept}"
    )


def raise_file_limit(wanted: int) -> int:
    """Allow as many open files as the system does; return how many clients that is enough for.

    Each client is one, and may need another for Ollama.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = wanted if soft == resource.RLIM_INFINITY else min(wanted, max(1, (soft - 32) // 2))
    if enough < wanted:
        log.warning("MAX_CONNECTIONS is %d, since only %d files may be open", enough, soft)
    return enough


def upstream_tls(settings: Settings) -> ssl.SSLContext | None:
    """Return how upstream's certificate is verified; None for plain HTTP.

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


def check(settings: Settings) -> None:
    """Log what is probably wrong; try the address and the certificates. Raises SettingsError."""
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
    if settings.tls_cert_file:
        Certificate(settings)


class Certificate:
    """Our own certificate and its key, read again when either changes.

    Raises:
        SettingsError: TLS_CERT_FILE or TLS_KEY_FILE cannot be used.

    """

    def __init__(self, settings: Settings) -> None:
        self._paths = program_path(settings.tls_cert_file), program_path(settings.tls_key_file)
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._seen = self._said = self._state()
        try:
            self._load(self.context)
        except (OSError, ValueError) as error:
            raise SettingsError(
                f"TLS_CERT_FILE, TLS_KEY_FILE: {self._paths[0]}, {self._paths[1]}:"
                f" {_tls_reason(error)}: name a certificate chain and its key, as PEM files"
            ) from None

    async def poll(self) -> None:
        """Take a renewed certificate; one that cannot be used leaves the last in force."""
        state = self._state()
        if state == self._seen:
            return
        try:
            # A pair that does not fit would spoil the one in force: try it apart first.
            self._load(ssl.create_default_context(ssl.Purpose.CLIENT_AUTH))
            self._load(self.context)
        except (OSError, ValueError) as error:
            if state != self._said:
                log.error("the renewed certificate cannot be used: %s", _tls_reason(error))
            self._said = state
        else:
            self._seen = state
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
    """Refuse, rather than wait at the terminal."""
    raise ValueError("the key is encrypted; OllProx needs one that is not")


def _tls_reason(error: BaseException) -> str:
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)


class LoopErrors:
    """Log what the event loop cannot handle; running out of files once a minute, in one line."""

    def __init__(self) -> None:
        self._said: dict[str, float] = {}  # when each message was last logged; they are few

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log one such error."""
        error, message = context.get("exception"), str(context.get("message"))
        if isinstance(error, ssl.SSLError | asyncio.CancelledError):
            log.debug("%s: %s", message, _tls_reason(error))
        elif isinstance(error, ValueError) and "file descriptor" in str(error):
            log.debug("%s", message)  # asyncio tries to accept on what was closed meanwhile
        elif not isinstance(error, OSError):
            log.error("%s", message, exc_info=error)
        elif loop.time() - self._said.get(message, -math.inf) > 60:
            self._said[message] = loop.time()
            log.error("%s: %s", message, reason(error))


class Collector:
    """Keep the garbage collector from going through all stored answers again and again.

    With 100,000 of them that would stop everything for tens of milliseconds. What lives
    long is frozen: it is still freed when it is dropped, only cycles are not looked for.
    Whatever is alive just then is frozen with it, and connections end in cycles of asyncio's
    own: so all is gone through after all once many of them may have been left.

    Args:
        cache: the stored answers.
        connections: counts the connections that there are.

    """

    def __init__(self, cache: Cache[Any], connections: Callable[[], int]) -> None:
        self._cache = cache
        self._connections = connections
        self._frozen = 0  # answers that the cache had taken by then
        self._may_be_left = 0  # connections that were frozen
        gc.set_threshold(COLLECT_AFTER, 10, 10)
        gc.collect()
        gc.freeze()

    async def poll(self) -> None:
        """Freeze what has been stored since; to be called now and then."""
        if self._cache.puts - self._frozen < FREEZE_AFTER:
            return
        self._frozen = self._cache.puts
        if self._may_be_left >= THAW_AFTER:
            self._may_be_left = 0
            gc.unfreeze()
        gc.collect()  # of what is not frozen: a few milliseconds at most
        gc.freeze()
        self._may_be_left += self._connections()


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
    """Say why the port cannot be listened on; return the exit status."""
    where = settings.listen_address
    if error.errno == errno.EADDRINUSE:
        complain(f"port in use: {where} is taken; stop what uses it, or set LISTEN_PORT")
    else:
        complain(f"cannot listen on {where} (LISTEN_HOST, LISTEN_PORT): {reason(error)}")
    return EXIT_FAILED


def complain(text: str) -> None:
    """Write one line on standard error."""
    print(f"ollprox: {text}", file=sys.stderr, flush=True)


def ping(settings: Settings) -> int:
    """Ask the OllProx of these settings whether it is alive; 0 if so, 1 if not."""
    import http.client  # 2 MiB that the server need not hold

    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.listen_host, settings.listen_host)
    connection = http.client.HTTPConnection(host, settings.listen_port, timeout=3)
    if settings.tls_cert_file:  # our own certificate, asked for by an address: not verified
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection = http.client.HTTPSConnection(
            host, settings.listen_port, timeout=3, context=context
        )
    try:
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        complain(f"no answer from {settings.listen_address}: {error}")
        return EXIT_FAILED
    finally:
        connection.close()
    return 0 if status == 200 else EXIT_FAILED
