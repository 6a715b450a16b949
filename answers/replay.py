"""Replay a flight's tape to one client, as a stream or as a single object."""

from collections.abc import AsyncIterator
from functools import lru_cache

from answers.flight import Reader, Wants
from answers.notes import JSON, NDJSON, REPORTED, SSE, content_type
from answers.ollama_api import Form
from wire.http11 import MAX_FRAMED, Headers, HTTPError, Response, Truncated

BEAT = b": \n\n"  # a comment, and a blank line for clients that split events at those
_EVENTS: Headers = ((b"Content-Type", b"text/event-stream"), (b"Cache-Control", b"no-cache"))


async def replay(reader: Reader, form: Form, heartbeat: float = 0.0) -> Response:
    """Return the response for a reader; its `release` leaves the flight.

    A fold, or a body that is not a stream of lines, is returned only when it is complete. So if
    it breaks off, the client still gets an error with the right status.

    Args:
        reader: its place on the tape.
        form: that of errors.
        heartbeat: seconds of silence after which an event stream gets a comment; 0 for never.
            Only for requests that nothing but an event stream can answer: a comment that comes
            before upstream's head commits to the status 200, and a later error is an event.

    Raises:
        HTTPError: upstream failed before the response began; the reader has left.

    """
    try:
        response = await _response(reader, form, heartbeat)
    except BaseException:
        reader.leave()
        raise
    response.release = reader.leave
    return response


async def _response(reader: Reader, form: Form, heartbeat: float) -> Response:
    if not await reader.head(heartbeat):
        return Response(200, _EVENTS, _late(reader, form, heartbeat))
    flight = reader.flight
    if reader.wants is Wants.FOLD:
        return Response(200, as_object(flight.headers), await reader.fold())
    kind = content_type(flight.headers)
    if kind.startswith(SSE):
        return Response(flight.status, flight.headers, _lines(reader, form, kind, heartbeat))
    if kind.startswith(NDJSON):
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


async def _late(reader: Reader, form: Form, heartbeat: float) -> AsyncIterator[bytes]:
    """Replay an event stream whose head has not come when the first comment is due."""
    flight = reader.flight
    try:
        yield BEAT
        while not await reader.head(heartbeat):
            yield BEAT
        kind = content_type(flight.headers)
        if flight.status == 200 and kind.startswith(SSE):
            async for piece in _lines(reader, form, kind, heartbeat):
                yield piece
            return
        error = await reader.whole() if kind.startswith(b"application/json") else None
        if flight.status < 400 or not error:
            raise HTTPError(502, "Ollama's answer is not a stream of events. Ask again.")
    except HTTPError as failure:
        error = failure.body or form.body(failure.status, failure.message)
    yield form.event(error)


async def _lines(
    reader: Reader, form: Form, kind: bytes, heartbeat: float = 0.0
) -> AsyncIterator[bytes]:
    """Yield lines. If upstream breaks off, yield a last line with the error.

    An error that Ollama itself reported is already such a line. In a silence between two events
    of an event stream, yield a comment.

    Raises:
        Truncated: upstream broke off.

    """
    last = b"\n"
    between_events = True
    try:
        async for piece in reader.pieces(heartbeat):
            if piece:
                yield piece
                last, between_events = piece[-1:], piece.endswith(b"\n\n")
            elif between_events:
                yield BEAT
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
