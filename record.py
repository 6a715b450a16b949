"""The record of one exchange, from its first byte to its access line."""

import time
from typing import NamedTuple, Protocol


class Spent(Protocol):
    """What an answer has come to: lines, tokens generated, and GPU time in seconds.

    The time is that for prompt and answer, without the loading of the model.
    """

    @property
    def lines(self) -> int:
        """Lines, or events."""

    @property
    def tokens(self) -> int:
        """Tokens generated."""

    @property
    def gpu_seconds(self) -> float:
        """GPU time, in seconds."""


class Usage(NamedTuple):
    """What an answer has come to, alone; see `Spent`."""

    lines: int = 0
    tokens: int = 0
    gpu_seconds: float = 0.0


NO_USAGE = Usage()


class Record:
    """What is known of one exchange; filled on its way, handed over once at its end.

    Times are seconds on the monotonic clock, `bytes_sent` counts the body.
    """

    caller: str = "-"  # the key's label, or the first digits of its digest
    method: str = "-"
    path: str = "-"
    model: str = "-"
    status: int = 0
    outcome: str = "-"  # hit, miss, collapsed or bypass
    cache_status: bytes = b"OllProx"  # RFC 9211
    headers: tuple[tuple[bytes, bytes], ...] = ()  # of the response, whatever it will be
    request_id: bytes = b"-"  # the client's where it is sane, else one of ours
    bytes_sent: int = 0
    first_byte: float | None = None
    quiet: bool = False  # a probe, of interest at DEBUG alone
    own: bool = False  # it is for a page of OllProx's own
    asks: bool = False  # it asks a model for an answer
    route: str = "other"  # the path, or what it begins with where clients choose the rest
    label: str | None = None  # the key's, once it was found valid
    wrong_key: bool = False
    usage: Spent = NO_USAGE  # of a stored answer that was given
    shared: bool = False  # it joined an answer, and got all of it

    def __init__(self, client: str) -> None:
        self.client = client
        self.started = time.monotonic()
