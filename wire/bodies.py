"""Message bodies: decode and write chunks (RFC 9112 section 7.1), for either side.

Chunked bodies are decoded here because h11 accepts more than a proxy may, such as `3 ` as a
chunk size.
"""

import re

from wire.http11 import FIELD_LINE, TOKEN, BadHead, hopeless

MAX_CHUNK_LINE = 1024  # bytes: a chunk's size and its extensions
MAX_TRAILERS = 8192  # bytes, after the last chunk

_CHUNK_LINE = re.compile(
    rb"([0-9A-Fa-f]{1,16})((?:;%b(?:=(?:%b|\"[\t !#-\[\]-~\x80-\xff]*\"))?)*)\r\n" % (TOKEN, TOKEN)
)
_SIZE = re.compile(rb"[0-9A-Fa-f]{1,16}")
_CHUNK_START = re.compile(rb"[0-9A-Fa-f]{1,16}(?:;[\t\x20-\x7e\x80-\xff]*)?\r?|")


def _whole_chunks(buffer: bytes) -> tuple[bytes, int]:
    """Decode the chunks that have come whole, many at once, where none has anything odd.

    An extension, or CRLF in the data, leaves them all to be decoded one by one.

    Returns:
        Their data, and how many bytes of the buffer they took.

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


class ChunkedDecoder:
    """Decode a chunked body strictly (RFC 9112 section 7.1), whichever way it is cut.

    Feed it what has come with `decode`; once `done`, the rest of the buffer is not of this
    body. Extensions and trailers are checked, bounded and dropped.
    """

    def __init__(self) -> None:
        self.done = False
        self._left = 0  # bytes still to come of the chunk under way and its CRLF
        self._last = False  # the chunk of size 0 has come
        self._failure: BadHead | None = None  # to be raised by the next call

    def decode(self, buffer: bytearray) -> bytes:
        """Take what can be decoded off the front of `buffer` and return its data.

        Raises:
            BadHead: the framing is malformed.

        """
        if self._failure is not None:
            raise self._failure
        pieces: list[bytes] = []
        try:
            self._decode(buffer, pieces)
        except BadHead as error:
            if not pieces:
                raise
            self._failure = error  # after what came before it
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _decode(self, buffer: bytearray, pieces: list[bytes]) -> None:
        position, end = 0, len(buffer)
        in_one_go = True  # not tried yet
        with memoryview(buffer) as view:
            while position < end and not self._last:
                if self._left:
                    taken = min(self._left, end - position)
                    position = self._take(view, position, taken, pieces)
                elif in_one_go:
                    in_one_go = False
                    data, taken = _whole_chunks(bytes(view[position:]))
                    if taken:
                        pieces.append(data)
                        position += taken
                else:
                    match = _CHUNK_LINE.match(buffer, position, position + MAX_CHUNK_LINE)
                    if match is None:
                        self._check_start(bytes(view[position : position + MAX_CHUNK_LINE]))
                        break
                    size = int(match[1], 16)
                    position = match.end()
                    self._last = size == 0
                    self._left = size + 2 if size else 0
        del buffer[:position]
        if self._last:
            self._take_trailers(buffer)

    def _take(self, view: memoryview, position: int, taken: int, pieces: list[bytes]) -> int:
        """Take bytes of a chunk and of the CRLF after it."""
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
        elif (found := buffer.find(b"\r\n\r\n", 0, MAX_TRAILERS)) >= 0:
            for line in bytes(buffer[:found]).split(b"\r\n"):
                if not FIELD_LINE.fullmatch(line):
                    raise BadHead(400, "a trailer is malformed")
            end = found + 4
        elif len(buffer) >= MAX_TRAILERS or hopeless(buffer):
            raise BadHead(400, "the trailers are malformed or too long")
        else:
            return
        del buffer[:end]
        self.done = True


def frame_chunk(piece: bytes) -> bytes:
    """Write one chunk; an empty one would end the body."""
    return b"%x\r\n%b\r\n" % (len(piece), piece)


LAST_CHUNK = b"0\r\n\r\n"
