"""Leave out of Ollama's lists of models those that a key may not use."""

import json
from collections.abc import AsyncIterator, Callable

from answers.notes import dump
from settings import normalize_model
from wire.http11 import HTTPError, Response, Truncated

MAX_LIST = 16 << 20  # bytes


async def only_allowed(response: Response, name: str, may_use: Callable[[str], bool]) -> None:
    """Take out of a response with a list of models those that a key may not use.

    Args:
        response: it is changed. Errors stay as they are; one without a body, to HEAD, loses the
            length, which would tell how long the whole list is.
        name: of the list: `models` on Ollama's own routes, `data` on `/v1/models`.
        may_use: whether the key may use a model, by its normalized name.

    Raises:
        HTTPError: 502 if the list cannot be read, or is too large to be read; the response is
            released.

    """
    try:
        await _filter(response, name, may_use)
    except BaseException:
        if response.release is not None:
            response.release()
        raise


async def _filter(response: Response, name: str, may_use: Callable[[str], bool]) -> None:
    if response.status != 200:
        return
    if response.body == b"":
        response.length = None
        return
    body = response.body
    if not isinstance(body, bytes):
        body = await _whole(body)
    try:
        value = json.loads(body)
        models = value[name] or []  # Go writes an empty list as null
        value[name] = [model for model in models if may_use(normalize_model(_name(model)))]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _unreadable() from None
    response.body = dump(value)
    response.length = len(response.body)


async def _whole(body: AsyncIterator[bytes]) -> bytes:
    """Return a body that is too large for its flight's tape."""
    pieces, size = [], 0
    try:
        async for piece in body:
            pieces.append(piece)
            if (size := size + len(piece)) > MAX_LIST:
                raise _unreadable()
    except Truncated:
        raise _unreadable() from None
    return b"".join(pieces)


def _name(model: dict[str, str]) -> str:
    return model.get("model") or model.get("name") or model["id"]


def _unreadable() -> HTTPError:
    return HTTPError(502, "Ollama's list of models cannot be read; is this Ollama?")
