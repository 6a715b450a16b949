"""What an API key may do: its options in the key file, and the models that they allow."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import lru_cache
from typing import Any

from settings import MAX_NAME_CHARS, REGISTRY, normalize_model

_LABEL_SCOPE = b"label".ljust(32)  # followed by a label it is longer than any digest


@dataclass(frozen=True, slots=True, order=True)
class Limit:
    """At most `count` in any `seconds`."""

    count: int
    seconds: int

    def __str__(self) -> str:
        """Return it as written in the key file."""
        unit = next(unit for unit, seconds in _UNITS.items() if seconds == self.seconds)
        return f"{self.count}/{unit}"


@dataclass(frozen=True, slots=True)
class Key:
    """An API key and its rights.

    - `digest`: the salted SHA-256 of the key.
    - `scope`: separates callers with `CACHE_PER_KEY`; made from the label, or without one the
      digest.
    - `models`: patterns of normalized names; None allows all models.
    - `models_also`: the patterns of further lines with the same key; each must match too.
    - `rate`, `tokens`: limits on generations and on generated tokens, at most one per unit.
    - `running`: how many generations it may have at once; None for any number.
    - `until`: when the key expires, in seconds since 1970 (UTC); None for never.
    - `weight`: its label's share of the GPU; 1 is normal.
    """

    digest: bytes = field(repr=False)
    label: str
    scope: bytes = field(repr=False)
    admin: bool = False
    metrics: bool = False
    models: tuple[str, ...] | None = None
    rate: tuple[Limit, ...] = ()
    running: int | None = None
    tokens: tuple[Limit, ...] = ()
    until: float | None = None
    weight: int = 1
    models_also: tuple[tuple[str, ...], ...] = ()

    def may_use(self, model: str) -> bool:
        """Return true if the key may use the model with this normalized name.

        Takes time linear in the length of the name.
        """
        if self.models is None:
            return True
        if len(model) > MAX_NAME_CHARS:
            return False
        return all(
            any(_matches(pattern, model) for pattern in patterns)
            for patterns in (self.models, *self.models_also)
        )

    def rights(self) -> list[tuple[str, str]]:
        """Return the options that are set, as (name, value) as written in the key file."""
        lists = [] if self.models is None else [self.models, *self.models_also]
        numbers = {"running": self.running, "weight": self.weight if self.weight > 1 else None}
        found = [(name, "") for name in ("admin", "metrics") if getattr(self, name)]
        found += [("models", ",".join(patterns)) for patterns in lists]
        found += [("rate", str(limit)) for limit in self.rate]
        found += [("tokens", str(limit)) for limit in self.tokens]
        found += [(name, str(number)) for name, number in numbers.items() if number is not None]
        if self.until is not None:
            found.append(("until", str(date.fromordinal(_EPOCH + int(self.until) // _DAY - 1))))
        return found


def make_key(digest: bytes, label: bytes, options: Mapping[str, Any]) -> Key:
    """Make a key from its line. An option that is None counts as not given."""
    given = {name: value for name, value in options.items() if value is not None}
    scope = _LABEL_SCOPE + label if label else digest
    return Key(digest, label.decode("utf-8", "replace"), scope, **given)


def both(one: Key, two: Key) -> Key:
    """Return one key for two lines with the same key: the second's label, and what both allow."""
    lists = [
        patterns
        for key in (one, two)
        if key.models is not None
        for patterns in (key.models, *key.models_also)
    ]
    return replace(
        two,
        admin=one.admin and two.admin,
        metrics=one.metrics and two.metrics,
        models=lists[0] if lists else None,
        models_also=tuple(lists[1:]),
        rate=_smaller(one.rate, two.rate),
        tokens=_smaller(one.tokens, two.tokens),
        running=min((n for n in (one.running, two.running) if n is not None), default=None),
        until=min((t for t in (one.until, two.until) if t is not None), default=None),
        weight=min(one.weight, two.weight),
    )


def _smaller(one: tuple[Limit, ...], two: tuple[Limit, ...]) -> tuple[Limit, ...]:
    """Return the smaller limit for each unit."""
    limits: dict[int, Limit] = {}
    for limit in sorted(one + two, reverse=True):
        limits[limit.seconds] = limit
    return tuple(limits[seconds] for seconds in sorted(limits))


# Options.

_UNITS = {"minute": 60, "hour": 3600, "day": 86400}
_DAY = _UNITS["day"]
_EPOCH = date(1970, 1, 1).toordinal()
_FLAGS = frozenset({"admin", "metrics"})
_FORMS = {  # examples for error messages
    "admin": "admin",
    "metrics": "metrics",
    "models": "models=llama2,qwen3:8b,me/* with names of models; * stands for any characters",
    "rate": "rate=60/minute, or /hour or /day",
    "running": "running=2, at least 1",
    "tokens": "tokens=200000/day, or /hour",
    "until": "until=2027-01-31, a date",
    "weight": "weight=2, at least 1",
}

Options = dict[str, Any]
"""A line's options by name, each a field of `Key`. None lifts one of KEY_DEFAULTS (`rate=none`)."""


def parse_options(words: Iterable[str]) -> Options:
    """Parse the options of a line.

    Raises:
        ValueError: one is unknown or malformed. The message says what is allowed. It quotes only
            names of options, since any other word may be a key.

    """
    options: Options = {}
    for word in words:
        name, value = _read_option(word)
        if name in options:
            value = _repeated(name, options[name], value)
        options[name] = value
    return options


def _repeated(name: str, before: Any, value: Any) -> tuple[Limit, ...]:
    """Return the limits of an option that is given twice. Raises ValueError if it may not be."""
    if name == "rate" and before and value:
        limits: tuple[Limit, ...] = (*before, *value)
        if len({limit.seconds for limit in limits}) == len(limits):
            return limits
    raise ValueError(f"{name} is given twice")


@lru_cache(maxsize=4096)  # in a large file, most options repeat
def _read_option(word: str) -> tuple[str, Any]:
    name, equals, text = word.partition("=")
    if name not in _FORMS:
        raise ValueError(f"there is an unknown option; the options are {', '.join(_FORMS)}")
    if text == "none":
        return name, None
    if name in _FLAGS and not equals:
        return name, True
    try:
        return name, _READ[name](text)
    except (ValueError, KeyError):
        raise ValueError(f"{name} is malformed; write {_FORMS[name]}") from None


def _count(text: str) -> int:
    if not re.fullmatch(r"0*[1-9][0-9]{0,14}", text):
        raise ValueError
    return int(text)


def _limit(text: str, units: Sequence[str]) -> tuple[Limit, ...]:
    count, _, unit = text.partition("/")
    if unit not in units:
        raise ValueError
    return (Limit(_count(count), _UNITS[unit]),)


def _until(text: str) -> float:
    """Return the end of a day, in seconds since 1970 in UTC."""
    if not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
        raise ValueError
    return float((date.fromisoformat(text).toordinal() - _EPOCH + 1) * _DAY)


_READ: dict[str, Callable[[str], Any]] = {  # without flags: one with a value is a KeyError
    "models": lambda text: tuple(map(_pattern, text.split(","))),
    "rate": lambda text: _limit(text, ("minute", "hour", "day")),
    "running": _count,
    "tokens": lambda text: _limit(text, ("hour", "day")),
    "until": _until,
    "weight": _count,
}


# Patterns of model names.

_NAMESPACES = (f"{REGISTRY}/library/", f"{REGISTRY}/", "")  # by the slashes in a normalized name


def _pattern(text: str) -> str:
    """Normalize a pattern as model names are. Raises ValueError if no model can match.

    A `*` at the end also matches the tag. A pattern with a `*` keeps the default host or
    namespace if it names them: `library/*` does not match `me/llama2`.
    """
    pattern = normalize_model(text)
    if text.endswith("*"):
        pattern = pattern.removesuffix(":latest")
    if "*" in pattern and text.count("/") > pattern.count("/"):
        pattern = _NAMESPACES[pattern.count("/")] + pattern
    if len(pattern) > MAX_NAME_CHARS or not _can_match(pattern):
        raise ValueError
    return pattern


def _matches(pattern: str, name: str) -> bool:
    """Return true if a normalized name matches. `*` matches any characters, or none."""
    if pattern.startswith(REGISTRY):
        name = _NAMESPACES[min(name.count("/"), 2)] + name
    start, *others = pattern.split("*")
    if not others:
        return pattern == name
    *middle, end = others
    if len(name) < len(start) + len(end) or not (name.startswith(start) and name.endswith(end)):
        return False
    position, stop = len(start), len(name) - len(end)
    for part in middle:  # the first match leaves the most room for the parts after it
        position = name.find(part, position, stop)
        if position < 0:
            return False
        position += len(part)
    return True


# The grammar of normalized names, [[HOST/]NAMESPACE/]MODEL:TAG, as a state machine. Each state maps
# a kind of character to the next state; `w` is a letter, a digit or `_`. A lower-case state is at
# the start of a part, an upper-case one inside it.
_GRAMMAR = {
    "h": {"w": "H"},
    "H": {"w": "H", "-": "H", ".": "H", ":": "H", "/": "n"},
    "n": {"w": "N"},
    "N": {"w": "N", "-": "N", "/": "m"},
    "m": {"w": "M"},
    "M": {"w": "M", "-": "M", ".": "M", ":": "t"},
    "t": {"w": "T"},
    "T": {"w": "T", "-": "T", ".": "T"},
}


def _can_match(pattern: str) -> bool:
    """Return true if some valid model name matches the pattern."""
    states = set("hnm")
    for char in pattern:
        if char == "*":
            for _ in _GRAMMAR:  # so many steps reach every reachable state
                states |= {after for state in states for after in _GRAMMAR[state].values()}
        else:
            kind = "w" if char.isascii() and (char.isalnum() or char == "_") else char
            states = {_GRAMMAR[state][kind] for state in states if kind in _GRAMMAR[state]}
    return "T" in states
