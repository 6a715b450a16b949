"""Stored answers: what the cache keeps."""

from typing import NamedTuple

from record import Usage


class StoredAnswer(NamedTuple):
    """A complete answer: what a stream's reader gets, and what a single object's does.

    It is flat, since there are many.
    """

    packed: bytes  # the headers
    body: bytes
    object: bytes  # empty: nobody has asked for it yet
    model: str
    born: float  # when upstream's head came, on the monotonic clock
    lines: int
    prompt_tokens: int
    tokens: int
    gpu_seconds: float

    @property
    def usage(self) -> Usage:
        """What it took to generate."""
        return Usage(self.lines, self.prompt_tokens, self.tokens, self.gpu_seconds)

    @property
    def size(self) -> int:
        """Its bytes; where stream and object are one, they are counted once."""
        both = len(self.body) if self.object is self.body else len(self.body) + len(self.object)
        return len(self.packed) + both
