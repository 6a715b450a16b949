"""Message bodies: decode and write them (RFC 9112 sections 6 and 7.1), for clients and upstream.

Chunked bodies are decoded here because h11 accepts more than a proxy may, such as `3 ` as a
chunk size. A body that declares more bytes than its limit is refused before they arrive.
"""

import re
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable

from wire.http11 import FIELD_LINE, MAX_FIELDS, TOKEN, BadHead, Truncated, cannot_be_head

MAX_CHUNK_LINE = 1024  # bytes: a chunk's size and its extensions
MAX_TRAILERS = 8192  # bytes, after the last chunk

_CHUNK_LINE = re.compile(
    rb"([0-9A-Fa-f]+)((?:;%b(?:=(?:%b|\"[\t !#-\[\]-~\x80-\xff]*\"))?)*)\r\n" % (TOKEN, TOKEN)
)
_SIZE = re.compile(rb"[0-9A-Fa-f]{1,16}")
_CHUNK_START = re.compile(rb"[0-9A-Fa-f]+(?:;[\t\x20-\x7e\x80-\xff]*)?\r?|")


class LengthDecoder:
    """Decodes a body of `length` bytes, or of any length until the connection closes.

    Args:
        length: in bytes; None if the connection's close ends the body.
        limit: the most bytes that are accepted.

    Raises:
        BadHead: 413 if the declared length is above the limit.

    """

    def __init__(self, length: int | None, limit: int = sys.maxsize) -> None:
        if length is not None and length > limit:
            raise too_large(limit)
        self.done = length == 0
        self._left = length

    def decode(self, buffer: bytearray) -> bytes:
        """Remove the body's bytes from the front of `buffer` and return them."""
        with memoryview(buffer) as view:
            piece = bytes(view[: self._left])
        del buffer[: len(piece)]
        if self._left is not None:
            self._left -= len(piece)
            self.done = self._left == 0
        return piece

    def end(self) -> None:
        """Handle the connection's orderly end. Raises Truncated if bytes are missing."""
        if self._left:
            raise Truncated
        self.done = True


class ChunkedDecoder:
    """Decodes a chunked body strictly (RFC 9112 section 7.1), in reads of any size.

    Pass the bytes that have arrived to `decode`. Once it is `done`, the rest of the buffer does
    not belong to this body. Extensions and trailers are checked, limited and dropped.
    """

    def __init__(self, limit: int = sys.maxsize) -> None:
        self.done = False
        self._limit = limit
        self._room = limit  # bytes of data that may still be declared
        self._left = 0  # bytes still to come of the current chunk and its CRLF
        self._last = False  # the chunk of size 0 has arrived
        self._checked = 0  # bytes of the trailers that are already checked
        self._failure: BadHead | None = None  # to be raised by the next call

    def decode(self, buffer: bytearray) -> bytes:
        """Decode and remove as much as possible from the front of `buffer`; return the data.

        Raises:
            BadHead: 400 the framing is malformed; 413 a chunk exceeds the limit.

        """
        if self._failure is not None:
            raise self._failure
        pieces: list[bytes] = []
        try:
            self._decode(buffer, pieces)
        except BadHead as error:
            if not pieces:
                raise
            self._failure = error  # raised by the next call, after this data
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def end(self) -> None:
        """Handle the connection's orderly end. Raises Truncated: the last chunk is missing."""
        raise Truncated

    def _decode(self, buffer: bytearray, pieces: list[bytes]) -> None:
        position, end = 0, len(buffer)
        try_many = True  # many chunks at once
        with memoryview(buffer) as view:
            while position < end and not self._last:
                if self._left:
                    taken = min(self._left, end - position)
                    position = self._take(view, position, taken, pieces)
                elif try_many:
                    try_many = False
                    data, taken = _whole_chunks(bytes(view[position:]))
                    if taken:
                        self._room -= len(data)
                        pieces.append(data)
                        position += taken
                else:
                    match = _CHUNK_LINE.match(buffer, position, position + MAX_CHUNK_LINE)
                    if match is None:
                        self._check_start(bytes(view[position : position + MAX_CHUNK_LINE]))
                        break
                    size = int(match[1], 16)
                    self._room -= size
                    position = match.end()
                    self._last = size == 0
                    self._left = size + 2 if size else 0
        if self._room < 0:
            raise too_large(self._limit)
        del buffer[:position]
        if self._last:
            self._take_trailers(buffer)

    def _take(self, view: memoryview, position: int, taken: int, pieces: list[bytes]) -> int:
        """Take bytes of a chunk and of the CRLF that follows."""
        data = min(taken, max(self._left - 2, 0))
        if data:
            pieces.append(bytes(view[position : position + data]))
        for offset in range(data, taken):
            wanted = 13 if self._left - offset == 2 else 10  # CR, LF
            if view[position + offset] != wanted:
                raise BadHead(400, "a chunk is longer than its size says")
        self._left -= taken
        return position + taken

    @staticmethod
    def _check_start(start: bytes) -> None:
        if len(start) >= MAX_CHUNK_LINE or not _CHUNK_START.fullmatch(start):
            raise BadHead(400, "a chunk's size line is malformed")

    def _take_trailers(self, buffer: bytearray) -> None:
        if buffer.startswith(b"\r\n"):
            end = 2
        elif (found := buffer.find(b"\r\n\r\n", max(0, self._checked - 3), MAX_TRAILERS)) >= 0:
            lines = bytes(buffer[:found]).split(b"\r\n")
            if len(lines) > MAX_FIELDS or not all(map(FIELD_LINE.fullmatch, lines)):
                raise BadHead(400, "the trailers are malformed or too many")
            end = found + 4
        elif len(buffer) >= MAX_TRAILERS or cannot_be_head(buffer, self._checked):
            raise BadHead(400, "the trailers are malformed or too long")
        else:
            self._checked = len(buffer)
            return
        del buffer[:end]
        self.done = True


Decoder = LengthDecoder | ChunkedDecoder


async def read_body(
    decoder: Decoder, buffer: bytearray, more: Callable[[], Awaitable[bool]]
) -> AsyncGenerator[bytes, None]:
    """Yield a body's pieces as they arrive.

    Args:
        decoder: finds the body's end.
        buffer: the bytes that have arrived; the body is removed from its front.
        more: waits until more bytes are in the buffer; returns False at the orderly end of the
            connection, and raises if it breaks.

    Raises:
        BadHead: the framing is malformed, or the body is larger than the decoder's limit.
        Truncated: the connection ended before the body did.

    """
    while not decoder.done:
        if buffer and (piece := decoder.decode(buffer)):
            yield piece
        elif not decoder.done and not await more():
            decoder.end()


def _whole_chunks(buffer: bytes) -> tuple[bytes, int]:
    """Decode many complete chunks at once, if none of them is unusual.

    With an extension, or CRLF in the data, all must be decoded one by one.

    Returns:
        Their data, and the number of bytes that they take in the buffer.

    """
    parts = buffer.split(b"\r\n")
    data = parts[1:-1:2]  # each with CRLF after it
    sizes = parts[: 2 * len(data) : 2]
    if sizes and sizes[-1] == b"0":
        del sizes[-1], data[-1]  # the end of the body
    lengths = [*map(len, data)]
    for size, length in set(zip(sizes, lengths, strict=True)):  # most have a few lengths
        if not length or not _SIZE.fullmatch(size) or int(size, 16) != length:
            return b"", 0
    return b"".join(data), sum(lengths) + sum(map(len, sizes)) + 4 * len(sizes)


def too_large(limit: int) -> BadHead:
    """Return the 413 for a body of more than `limit` bytes."""
    if limit == sys.maxsize:
        return BadHead(413, "the declared size of a chunk is larger than any body")
    return BadHead(413, f"the body is larger than {limit} bytes (MAX_BODY_BYTES)")


def frame_chunk(piece: bytes) -> bytes:
    """Return a piece as one chunk. It must not be empty: that would end the body."""
    return b"%x\r\n%b\r\n" % (len(piece), piece)


LAST_CHUNK = b"0\r\n\r\n"
