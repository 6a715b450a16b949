"""The report of `--check`: a line for each thing that a start depends on, with a mark."""

import asyncio
import enum
import logging
import os
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import startup
from answers.models import Probe
from settings import Settings, SettingsError, program_path

MAX_LISTED = 10  # models that are named


class Mark(enum.Enum):
    """How a line of the report begins."""

    OK = "ok"
    WARN = "warn"  # OllProx would start
    FAIL = "FAIL"  # it would not


def report(load: Callable[[], Settings], make_upstream: Callable[[Settings], Any]) -> int:
    """Print the report; return the exit status, 0 if OllProx would start.

    Args:
        load: reads the settings; may raise SettingsError.
        make_upstream: makes the upstream that would be used.

    """
    with _section("settings") as failed:
        settings = load()
        startup.check(settings)
        say(
            Mark.OK,
            "settings",
            f"listens on {settings.listen_scheme}://{settings.listen_address},"
            f" forwards to {startup.describe_hosts(settings)}",
        )
        say(Mark.OK, "cache", startup.describe_cache(settings))
    if failed:
        return startup.EXIT_SETTINGS
    with _section("keys") as failed:
        _check_keys(settings)
    asyncio.run(_check_ollama(make_upstream(settings)))
    _check_certificate(settings)
    with _section("limits"):
        _check_limits(settings)
    return startup.EXIT_SETTINGS if failed else 0


def say(mark: Mark, subject: str, text: str) -> None:
    """Print a line of the report."""
    print(f"{mark.value:<5} {subject:<9} {' '.join(text.split())}", flush=True)


@contextmanager
def _section(subject: str) -> Iterator[list[str]]:
    """Print what is logged as warnings, and a SettingsError as a failure, which is yielded."""
    failed: list[str] = []
    logger = logging.getLogger("ollprox")
    handler = _Warnings(subject)
    handlers, logger.handlers, logger.propagate = logger.handlers, [handler], False
    try:
        yield failed
    except SettingsError as error:
        failed.append(str(error))
        say(Mark.FAIL, subject, str(error))
    finally:
        logger.handlers = handlers


class _Warnings(logging.Handler):
    """Prints the warnings of the log as lines of the report."""

    def __init__(self, subject: str) -> None:
        super().__init__(logging.WARNING)
        self._subject = subject

    def emit(self, record: logging.LogRecord) -> None:
        say(Mark.WARN, self._subject, record.getMessage())


def _check_keys(settings: Settings) -> None:
    keys = startup.open_keys(settings)
    if len(keys):
        say(Mark.OK, "keys", f"{len(keys)} from {keys.path}")
        return
    where = f"none in {keys.path}" if keys.path else "none (API_KEY_FILE is not set)"
    then = f"to make a lasting one: {startup.command()} keys add --label me"
    say(Mark.WARN, "keys", f"{where}: each start makes one; {then}")


async def _check_ollama(upstream: Any) -> None:
    probe = Probe(upstream)
    version = await probe.version()
    text = startup.describe_upstream(version, upstream.address).removeprefix("Ollama ")
    say(Mark.OK if isinstance(version, str) else Mark.WARN, "Ollama", text)
    if isinstance(version, str):
        found = await probe.digests()
        if found:
            names = [*found][:MAX_LISTED] + ["..."] * (len(found) > MAX_LISTED)
            say(Mark.OK, "models", f"{len(found)}: {', '.join(names)}")
        else:
            what = "the list cannot be read" if found is None else "none yet: ollama pull llama2"
            say(Mark.WARN, "models", what)
    await upstream.close()


def _check_certificate(settings: Settings) -> None:
    if not settings.tls_cert_file:
        say(Mark.OK, "TLS", "off (TLS_CERT_FILE is not set)")
        return
    try:
        until = _valid_until(settings)
    except (OSError, ValueError) as error:
        reason = getattr(error, "verify_message", "") or str(error)
        say(Mark.WARN, "TLS", f"clients will not trust {settings.tls_cert_file}: {reason}")
    else:
        say(Mark.OK, "TLS", f"{settings.tls_cert_file} is valid until {until}")


def _valid_until(settings: Settings) -> str:
    """Return until when our certificate is valid.

    The ssl module reads a certificate's dates only from a peer that it has verified. So this
    shakes hands with itself, in memory, and trusts the certificate as such.

    Raises:
        OSError: it is not valid now, as an SSLCertVerificationError.

    """
    client = ssl.create_default_context(cafile=program_path(settings.tls_cert_file))
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", ssl.VerifyFlags(0))
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    near = startup.Certificate(settings).context.wrap_bio(up, down, server_side=True)
    far = client.wrap_bio(down, up)
    for side in (far, near, far):
        with suppress(ssl.SSLWantReadError):
            side.do_handshake()
    return str((far.getpeercert() or {}).get("notAfter", "an unknown time"))


def _check_limits(settings: Settings) -> None:
    clients = startup.raise_file_limit(settings.max_connections)
    if clients == settings.max_connections:
        say(Mark.OK, "limits", f"{clients} clients at once (MAX_CONNECTIONS)")
    memory = _memory()
    if memory is not None and settings.cache_max_bytes > memory // 2:
        say(
            Mark.WARN,
            "limits",
            f"CACHE_MAX_BYTES is more than half of the memory, {memory >> 20} MiB",
        )


def _memory() -> int | None:
    """Return the bytes of memory that OllProx may have; None where the system does not say."""
    found = []
    with suppress(OSError, ValueError, AttributeError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(OSError, ValueError):  # of a container; "max" for no limit
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(found, default=None)
