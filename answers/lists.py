"""Change lists of models for one caller: what its key may use, and the aliases."""

import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from answers.notes import dump
from settings import normalize_model
from wire.http11 import HTTPError, Response, Truncated

MAX_LIST = 16 << 20  # bytes


async def change_list(
    response: Response,
    name: str,
    may_use: Callable[[str], bool] | None,
    aliases: Sequence[tuple[str, str]] = (),
) -> None:
    """Remove the models that a key may not use from a list, and add the aliases of the rest.

    An alias hides a model of the same name, since requests for it reach another model.

    Args:
        response: it is changed in place, unless it is an error or has no body.
        name: the field with the list: `models` on Ollama's own routes, `data` on `/v1/models`.
        may_use: returns True if the key may use the model with this normalized name; None if it
            may use all.
        aliases: names and their models, as MODEL_ALIASES has them.

    Raises:
        HTTPError: 502 if the list cannot be read, or is too large to be read; the response is
            released.

    """
    hidden = {normalize_model(alias) for alias, _ in aliases}

    def change(value: Any) -> Any:
        listed = [(normalize_model(_name(entry)), entry) for entry in value[name] or []]  # or null
        kept = [(model, e) for model, e in listed if may_use is None or may_use(model)]
        shown = [entry for model, entry in kept if model not in hidden]
        real = dict(kept)
        found = [(alias, real.get(normalize_model(model))) for alias, model in aliases]
        value[name] = shown + [_renamed(entry, alias) for alias, entry in found if entry]
        return value

    await _change(response, change)


async def rename_model(response: Response, alias: str) -> None:
    """Put an alias in the place of its model's name, in the description of one model.

    Raises:
        HTTPError: 502 if the description cannot be read.

    """
    await _change(response, lambda value: _renamed(value, alias))


async def _change(response: Response, change: Callable[[Any], Any]) -> None:
    """Change a response's JSON; release a response that cannot be read."""
    try:
        await _rewrite(response, change)
    except BaseException:
        if response.release is not None:
            response.release()
        raise


async def _rewrite(response: Response, change: Callable[[Any], Any]) -> None:
    if response.status != 200:
        return
    response.length = None
    if response.body == b"":  # HEAD: the length of another body would be wrong
        return
    body = response.body
    if not isinstance(body, bytes):
        body = await _whole(body)
    try:
        response.body = dump(change(json.loads(body)))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _unreadable() from None


def _renamed(entry: dict[str, Any], name: str) -> dict[str, Any]:
    return {field: name if field in _NAMES else value for field, value in entry.items()}


_NAMES = ("model", "name", "id")


def _name(entry: dict[str, Any]) -> Any:
    return entry.get("model") or entry.get("name") or entry["id"]


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


def _unreadable() -> HTTPError:
    return HTTPError(502, "Ollama's list of models cannot be read; is this Ollama?")
