"""Replay a flight's tape to one client, in the form that it wants."""

from collections.abc import AsyncIterator
from functools import lru_cache

from answers.flight import Reader, Wants
from answers.notes import JSON, NDJSON, REPORTED, SSE, content_type
from answers.ollama_api import Form
from wire.http11 import MAX_FRAMED, Headers, HTTPError, Response, Truncated


async def replay(reader: Reader, form: Form) -> Response:
    """Return the response for a reader; its `release` leaves the flight.

    A fold, and a body that is not a stream of lines, is waited for to its end, so that what
    breaks it is still an error with a status of its own.

    Raises:
        HTTPError: upstream failed before anything was passed on; the reader has left.

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
    if body is None:  # too large for the tape: as it comes
        return Response(flight.status, flight.headers, _bytes(reader), flight.length)
    return Response(flight.status, flight.headers, body, flight.length)


@lru_cache(maxsize=MAX_FRAMED)
def as_object(headers: Headers) -> Headers:
    """Return a stream's headers with the content type of a single object."""
    rest = tuple(pair for pair in headers if pair[0].lower() != b"content-type")
    return ((b"Content-Type", JSON), *rest)


async def _lines(reader: Reader, form: Form, kind: bytes) -> AsyncIterator[bytes]:
    """Replay lines; where upstream breaks off, add a line that says so, and cut.

    An error that Ollama reported is such a line already.
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
    """Replay a body that has no lines; where upstream breaks off, cut."""
    try:
        async for piece in reader.pieces():
            yield piece
    except HTTPError as error:
        raise Truncated from error
