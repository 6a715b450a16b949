"""Replay a flight's tape to one client, as a stream or as a single object."""

from collections.abc import AsyncIterator
from functools import lru_cache

from answers.flight import Reader, Wants
from answers.notes import JSON, NDJSON, REPORTED, SSE, content_type
from answers.ollama_api import Form
from wire.http11 import MAX_FRAMED, Headers, HTTPError, Response, Truncated


async def replay(reader: Reader, form: Form) -> Response:
    """Return the response for a reader; its `release` leaves the flight.

    A fold, or a body that is not a stream of lines, is returned only when it is complete. So if
    it breaks off, the client still gets an error with the right status.

    Raises:
        HTTPError: upstream failed before the response began; the reader has left.

    """
    try:
        response = await _response(reader, form)
    except BaseException:
        reader.leave()
        raise
    response.release = reader.leave
    return response


async def _response(reader: Reader, form: Form) -> Response:
    await reader.head()
    flight = reader.flight
    if reader.wants is Wants.FOLD:
        return Response(200, as_object(flight.headers), await reader.fold())
    kind = content_type(flight.headers)
    if kind.startswith((NDJSON, SSE)):
        return Response(flight.status, flight.headers, _lines(reader, form, kind))
    body = await reader.whole()
    if body is None:  # too large for the tape: stream it
        return Response(flight.status, flight.headers, _bytes(reader), flight.length)
    return Response(flight.status, flight.headers, body, flight.length)


@lru_cache(maxsize=MAX_FRAMED)
def as_object(headers: Headers) -> Headers:
    """Return a stream's headers with the content type of a single object."""
    rest = tuple(pair for pair in headers if pair[0].lower() != b"content-type")
    return ((b"Content-Type", JSON), *rest)


async def _lines(reader: Reader, form: Form, kind: bytes) -> AsyncIterator[bytes]:
    """Yield lines. If upstream breaks off, yield a last line with the error.

    An error that Ollama itself reported is already such a line.

    Raises:
        Truncated: upstream broke off.

    """
    last = b"\n"
    try:
        async for piece in reader.pieces():
            yield piece
            last = piece[-1:]
    except HTTPError as error:
        if error.kind != REPORTED:
            yield (b"" if last == b"\n" else b"\n") + form.line(kind, error.message)
        raise Truncated from error


async def _bytes(reader: Reader) -> AsyncIterator[bytes]:
    """Yield a body without lines. Raises Truncated if upstream breaks off."""
    try:
        async for piece in reader.pieces():
            yield piece
    except HTTPError as error:
        raise Truncated from error
