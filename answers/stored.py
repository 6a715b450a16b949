"""Stored answers: what the cache stores, and its serialized form for other processes."""

import math
import struct
import sys
import zlib
from typing import NamedTuple

from answers.flight import Flight
from record import Usage
from settings import MAX_NAME_CHARS
from wire.http11 import FIELD_LINE, HTTPError, pack, stored_headers

MAGIC = b"OLLPROX\x01"  # the last byte is the version of the form

_SAME = (1 << 64) - 1  # in place of the object's length: the object is the body
# The lengths of headers, body, object, model and digest; then `born`, lines, prompt tokens,
# tokens, GPU seconds.
_FIELDS = struct.Struct(">5Qd3Qd")
_CHECKSUM = struct.Struct(">I")  # CRC-32 of everything before it: detects accidents only


class StoredAnswer(NamedTuple):
    """A complete answer, as a stream and as a single object.

    It is flat, and its headers are one bytes object, because there may be many answers.
    """

    packed: bytes
    """The headers; see `http11.pack`."""
    body: bytes
    """The stream as it was received, or the object if there is no stream."""
    object: bytes
    """The fold of a stream, empty if it was too large; `body` itself if there is no stream."""
    model: str
    """Its normalized name."""
    digest: str
    """The digest of the model that generated it; "" if unknown."""
    born: float
    """When the response's head arrived, in seconds since 1970."""
    lines: int
    prompt_tokens: int
    tokens: int
    gpu_seconds: float

    @property
    def size(self) -> int:
        """Its size in bytes; a body that is also the object is counted once."""
        both = len(self.body) if self.object is self.body else len(self.body) + len(self.object)
        return len(self.packed) + both

    @property
    def usage(self) -> Usage:
        """The usage of generating it."""
        return Usage._make(self[-len(Usage._fields) :])  # the last fields are those of Usage

    def age(self, now: float) -> float:
        """Return its age in seconds; 0 if the clock was set back."""
        return max(0.0, now - self.born)

    def dump(self) -> bytes:
        """Serialize it; `load` is the reverse."""
        model = self.model.encode("utf-8", "surrogatepass")  # a client may choose half a surrogate
        digest = self.digest.encode("utf-8", "surrogatepass")
        same = self.object is self.body
        lengths = len(self.packed), len(self.body), _SAME if same else len(self.object)
        fields = _FIELDS.pack(
            *(*lengths, len(model), len(digest), self.born),
            *(self.lines, self.prompt_tokens, self.tokens, self.gpu_seconds),
        )
        folded = b"" if same else self.object
        text = b"".join([MAGIC, fields, self.packed, self.body, folded, model, digest])
        return text + _CHECKSUM.pack(zlib.crc32(text))

    @classmethod
    def load(cls, data: bytes) -> "StoredAnswer":
        """Return the answer that `dump` serialized.

        Raises:
            ValueError: the data is not an answer, has another version, or is damaged.

        """
        text, start = data[: -_CHECKSUM.size], len(MAGIC) + _FIELDS.size
        if not text.startswith(MAGIC) or len(text) < start:
            raise ValueError("not a stored answer of this version")
        if data[-_CHECKSUM.size :] != _CHECKSUM.pack(zlib.crc32(text)):
            raise ValueError("a damaged stored answer")
        fields = _FIELDS.unpack_from(text, len(MAGIC))
        lengths = fields[:5]
        born, lines, prompt_tokens, tokens, gpu_seconds = fields[5:]
        parts = []
        for length in (0 if length == _SAME else length for length in lengths):
            parts.append(text[start : start + length])
            start += length
        packed, body, folded, model, digest = parts
        good = start == len(text) and math.isfinite(born) and 0 <= gpu_seconds < math.inf
        if not good or not _are_headers(packed):
            raise ValueError("a malformed stored answer")
        return cls(
            packed,
            body,
            body if lengths[2] == _SAME else folded,
            sys.intern(model.decode("utf-8", "surrogatepass")),
            sys.intern(digest.decode("utf-8", "surrogatepass")),
            born,
            lines,
            prompt_tokens,
            tokens,
            gpu_seconds,
        )


def _are_headers(packed: bytes) -> bool:
    """Return True if these are valid headers, which can be sent unchanged."""
    return not packed or all(
        b": " in line and FIELD_LINE.fullmatch(line) for line in packed.split(b"\r\n")
    )


def stored_answer(flight: Flight, body: bytes, digest: str = "") -> StoredAnswer | None:
    """Return the answer to store for a flight whose answer is complete.

    Args:
        flight: a flight whose tape has lost nothing.
        body: its complete tape.
        digest: the digest of its model; "" if unknown.

    Returns:
        None if the answer is not worth storing, or has no fold for another reason than its size.

    """
    notes = flight.notes
    if notes is None or flight.status != 200 or not notes.keeps():
        return None
    if len(flight.model) > MAX_NAME_CHARS:  # its memory would not be counted
        return None
    try:
        folded = notes.fold() if notes.foldable else body
    except HTTPError:
        if not notes.too_large:
            return None
        folded = b""
    assert flight.born is not None
    model, digest = sys.intern(flight.model), sys.intern(digest)
    headers = pack(stored_headers(flight.headers))
    return StoredAnswer(headers, body, folded, model, digest, flight.born, *flight.usage)
