"""The record of one request, from its first byte to its access line."""

import enum
import time
from typing import NamedTuple


class Outcome(enum.StrEnum):
    """How a request was answered. The values are the words of the log and the metrics."""

    HIT = "hit"
    """Answered with a stored answer."""

    MISS = "miss"
    """No stored answer could be used, so the request began a flight."""

    COLLAPSED = "collapsed"
    """Joined a flight that was under way (RFC 9211 section 2.7)."""

    BYPASS = "bypass"
    """Not cacheable, so the request had a flight to itself."""

    REFUSED = "refused"
    """Answered with an error by OllProx, without asking upstream."""

    PAGE = "page"
    """A request for one of OllProx's own pages, successful or not."""


class Usage(NamedTuple):
    """The cost of generating one answer."""

    lines: int = 0  # or events; 0 if it came as a single object
    prompt_tokens: int = 0
    tokens: int = 0  # generated
    gpu_seconds: float = 0.0  # for prompt and answer, without loading the model


NO_USAGE = Usage()


class Record:
    """What is known about one request. It is filled on the way, and counted and logged at the end.

    Times are seconds on the monotonic clock.
    """

    # Set by the server.
    request_id: bytes = b"-"  # the client's if it is well formed, else a new one
    status: int = 0  # 499 if the client left first
    bytes_sent: int = 0  # of the body
    first_byte: float | None = None
    ended: float = 0.0

    # Set by the proxy, from the head.
    caller: str = "-"  # the key's label, or the first digits of its digest
    label: str | None = None  # the key's label; None without a valid key
    wrong_key: bool = False  # the key was missing or not valid
    method: str = "-"
    path: str = "-"
    route: str = "other"  # the path, or its fixed beginning if clients choose the rest
    generates: bool = False  # the route makes a model generate an answer
    quiet: bool = False  # a probe or a poll, logged at DEBUG only
    headers: tuple[tuple[bytes, bytes], ...] = ()  # of the response, even if it is an error

    # Set by the proxy, from the body and the answer.
    model: str = "-"  # as the client wrote it, or the start of a very long name
    outcome: Outcome = Outcome.REFUSED
    cache_status: bytes = b"OllProx"  # RFC 9211
    usage: Usage = NO_USAGE  # of the answer, once it has ended
    queued: float | None = None  # seconds of waiting for a turn; None if it took none
    shared: bool = False  # it joined a flight and received the complete answer

    def __init__(self, client: str) -> None:
        self.client = client  # the peer's address
        self.started = time.monotonic()
