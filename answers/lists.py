"""Leave out of Ollama's lists of models those that a key may not use."""

import json
from collections.abc import Callable

from answers.notes import dump
from settings import normalize_model
from wire.http11 import HTTPError, Response


def only_allowed(response: Response, name: str, may_use: Callable[[str], bool]) -> None:
    """Take out of a response with a list of models those that a key may not use.

    Args:
        response: it is changed. Errors stay as they are; one without a body, to HEAD, loses the
            length, which would tell how long the whole list is.
        name: of the list: `models` on Ollama's own routes, `data` on `/v1/models`.
        may_use: whether the key may use a model, by its normalized name.

    Raises:
        HTTPError: 502 if the list cannot be read, or is too large to be read.

    """
    if response.status != 200:
        return
    if response.body == b"":
        response.length = None
        return
    if not isinstance(response.body, bytes):
        raise _unreadable()
    try:
        value = json.loads(response.body)
        models = value[name] or []  # Go writes an empty list as null
        value[name] = [model for model in models if may_use(normalize_model(_name(model)))]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _unreadable() from None
    response.body = dump(value)
    response.length = len(response.body)


def _name(model: dict[str, str]) -> str:
    return model.get("model") or model.get("name") or model["id"]


def _unreadable() -> HTTPError:
    return HTTPError(502, "Ollama's list of models cannot be read; is this Ollama?")
