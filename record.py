"""The record of one exchange, from its first byte to its access line."""

import time
from typing import NamedTuple


class Usage(NamedTuple):
    """What an answer took: lines (or events), tokens, and GPU time in seconds.

    `prompt_tokens` were read, `tokens` were generated. The GPU time is for both, without the
    loading of the model; Ollama reports it on its native routes only.
    """

    lines: int = 0
    prompt_tokens: int = 0
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
    usage: Usage = NO_USAGE  # of the stored answer, for a hit
    shared: bool = False  # it joined an answer, and got all of it

    def __init__(self, client: str) -> None:
        self.client = client
        self.started = time.monotonic()
