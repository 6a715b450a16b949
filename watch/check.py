"""The report of `--check`: a line for each thing that a start depends on, with a mark."""

import enum
import logging
import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from settings import SettingsError


class Mark(enum.Enum):
    """How a line of the report begins."""

    OK = "ok"
    WARN = "warn"  # OllProx would start
    FAIL = "FAIL"  # it would not


class Report:
    """Prints the lines as they are found."""

    failed = False
    """Whether a line began with FAIL."""

    def __init__(self) -> None:
        self._subject = ""

    @contextmanager
    def section(self, subject: str) -> Iterator[None]:
        """Print lines about a subject: also what is logged as a warning, and a SettingsError."""
        self._subject = subject
        logger = logging.getLogger("ollprox")
        before = logger.handlers, logger.propagate
        logger.handlers, logger.propagate = [_Warnings(self)], False
        try:
            yield
        except SettingsError as error:
            self.failed = True
            self.say(Mark.FAIL, str(error))
        finally:
            logger.handlers, logger.propagate = before

    def say(self, mark: Mark, text: str) -> None:
        """Print a line."""
        print(f"{mark.value:<5} {self._subject:<9} {' '.join(text.split())}", flush=True)


class _Warnings(logging.Handler):
    """Prints the warnings of the log as lines of a report."""

    def __init__(self, report: Report) -> None:
        super().__init__(logging.WARNING)
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        self._report.say(Mark.WARN, record.getMessage())


def valid_until(ours: ssl.SSLContext, file: Path) -> str:
    """Return until when the certificate is valid that a context has loaded from a file.

    The ssl module reads a certificate's dates only from a peer that it has verified. So this
    shakes hands with itself, in memory, and trusts the certificate as such.

    Raises:
        ssl.SSLCertVerificationError: it is not valid now.

    """
    client = ssl.create_default_context(cafile=file)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", ssl.VerifyFlags(0))
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    near, far = ours.wrap_bio(up, down, server_side=True), client.wrap_bio(down, up)
    for side in (far, near, far):
        with suppress(ssl.SSLWantReadError):
            side.do_handshake()
    return str((far.getpeercert() or {}).get("notAfter", "an unknown time"))


def memory() -> int | None:
    """Return the bytes of memory that OllProx may use; None where the system does not say."""
    found = []
    with suppress(OSError, ValueError, AttributeError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(OSError, ValueError):  # of a container; "max" for no limit
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(found, default=None)
