"""The record of one request, from its first byte to its access line."""

import enum
import time
from typing import NamedTuple


class Outcome(enum.StrEnum):
    """How a request was answered. The values are the words of the log and the metrics."""

    HIT = "hit"
    """It got a stored answer."""

    MISS = "miss"
    """No stored answer fitted, so it started an exchange with upstream."""

    COLLAPSED = "collapsed"
    """It joined an exchange that was under way (RFC 9211 section 2.7)."""

    BYPASS = "bypass"
    """Its answer cannot be cached, so it had an exchange of its own."""

    REFUSED = "refused"
    """OllProx answered with an error and did not ask upstream."""

    PAGE = "page"
    """It was for one of OllProx's own pages, whether it got the page or an error."""


class Usage(NamedTuple):
    """What one answer took to generate."""

    lines: int = 0  # or events; 0 if it came as a single object
    prompt_tokens: int = 0
    tokens: int = 0  # generated
    gpu_seconds: float = 0.0  # for prompt and answer, without loading the model


NO_USAGE = Usage()


class Record:
    """What is known about one request; filled on its way and handed over once, at its end.

    Times are seconds on the monotonic clock.
    """

    # What the server knows.
    request_id: bytes = b"-"  # the client's if it is well formed, else one that we made
    status: int = 0  # 499 if the client left first
    bytes_sent: int = 0  # of the body
    first_byte: float | None = None

    # What the proxy decided, from the head.
    caller: str = "-"  # the key's label, or the first digits of its digest
    label: str | None = None  # the key's label; None without a valid key
    wrong_key: bool = False  # the key was missing or not valid
    method: str = "-"
    path: str = "-"
    route: str = "other"  # the path, or its fixed beginning if clients choose the rest
    generates: bool = False  # it asks a model for an answer
    quiet: bool = False  # a probe or a poll, logged at DEBUG only
    headers: tuple[tuple[bytes, bytes], ...] = ()  # added to the response, even to an error

    # What the proxy decided, from the body and what followed.
    model: str = "-"  # as the client wrote it
    outcome: Outcome = Outcome.REFUSED
    cache_status: bytes = b"OllProx"  # RFC 9211
    usage: Usage = NO_USAGE  # of the answer, once it is whole
    queued: float | None = None  # seconds it waited for a turn; None if it took no turn
    shared: bool = False  # it joined an answer and received all of it

    def __init__(self, client: str) -> None:
        self.client = client  # the peer's address
        self.started = time.monotonic()
