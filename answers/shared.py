"""Share answers between several OllProx processes, through a Valkey or Redis server.

The shared cache is behind each process's cache in memory. Looking in it is the first step inside
a flight, so identical requests look once. It never costs an answer: each wait is bounded, and
each error is a miss.

A value is used only if it verifies. Its MAC covers its name, the epoch and its content, so it
cannot be forged, moved to another name, or used after a purge. The epoch is a random text on
the server. A purge replaces it, and each process that sees another epoch drops what it has in
memory.
"""

import asyncio
import hashlib
import hmac
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from answers.stored import StoredAnswer
from wire.http11 import Ask, Exchange, HTTPError, Lookup, Response, unpack
from wire.valkey import State, Unavailable, Valkey

log = logging.getLogger("ollprox")

PREFIX = b"ollprox:1:"  # of every key on the server; the number is the version
EPOCH_KEY = PREFIX + b"epoch"
EPOCH_BYTES = 32  # 16 random bytes in hex
MAGIC = b"OLX\x01"  # at the start of a value; the last byte is the version
MAC_BYTES = 32  # HMAC-SHA256
WATCH_INTERVAL = 2.0  # seconds between two looks at the epoch
MAX_WAITING = 32 << 20  # bytes of answers that wait to be written
CONFIRM_INTERVAL = 1.0  # seconds between two lists of models that are read for the writer
SLICE = 64 << 10  # bytes of an answer's body that are handed on at once

_HIT = b"Valkey; hit"
_MISS = b"Valkey; fwd=miss"


class Sealer:
    """Makes names, and seals and opens values.

    Args:
        secret: CACHE_SECRET; the same in all processes that share answers.

    """

    def __init__(self, secret: bytes) -> None:
        self._name_secret = hmac.digest(secret, b"ollprox name", hashlib.sha256)
        self._value_secret = hmac.digest(secret, b"ollprox value", hashlib.sha256)

    def name(self, *parts: bytes) -> bytes:
        """Return the key on the server for what these parts identify."""
        text = b"".join(b"%d:%b" % (len(part), part) for part in parts)
        return PREFIX + hmac.digest(self._name_secret, text, hashlib.sha256).hex().encode()

    def seal(self, name: bytes, epoch: bytes, content: bytes) -> bytes:
        """Return the value to store under `name`."""
        return MAGIC + self._mac(name, epoch, content) + content

    def open(self, name: bytes, epoch: bytes, value: bytes) -> bytes | None:
        """Return a value's content; None unless it was sealed for this name and epoch."""
        start = len(MAGIC) + MAC_BYTES
        if not value.startswith(MAGIC) or len(value) < start:
            return None
        content = value[start:]
        good = hmac.compare_digest(value[len(MAGIC) : start], self._mac(name, epoch, content))
        return content if good else None

    def _mac(self, name: bytes, epoch: bytes, content: bytes) -> bytes:
        # All names have one length, and all epochs too, so the parts cannot run together.
        mac = hmac.new(self._value_secret, name + epoch, hashlib.sha256)
        mac.update(content)
        return mac.digest()


class Models(Protocol):
    """What is known of the models; `answers.models.ModelWatch`."""

    listed_at: float
    """When the newest list that was read was requested, on the monotonic clock."""

    def digest(self, model: str) -> str:
        """Return a model's digest in that list; empty if it has none."""

    async def refresh(self) -> bool:
        """Read the list again."""


@dataclass(frozen=True, slots=True)
class Write:
    """An answer that waits to be written.

    `epoch` is the one in force when its flight began; `ended` is when it was complete, on the
    monotonic clock.
    """

    cache_key: bytes
    epoch: bytes
    answer: StoredAnswer
    ended: float


class Counts(NamedTuple):
    """What the shared cache has done since the start."""

    up: bool  # the server answers, and answers may be shared
    hits: int
    misses: int
    unavailable: int  # lookups that the server did not answer
    writes: int
    dropped: int  # writes that were given up
    errors: int  # commands that failed


class SharedCache:
    """The shared cache: a step in front of an exchange, and a place to store answers.

    Args:
        server: carries out commands.
        sealer: makes names, and seals values.
        models: returns the `Models`. An answer is kept under its model's digest, so no answer of a
            model that was replaced is found. It is a function since models need flights, which
            need this.
        ttl: seconds that an answer is kept, from its birth.
        on_purge: called when all answers must be dropped from memory.
        clock: seconds since 1970.

    """

    def __init__(
        self,
        server: Valkey,
        sealer: Sealer,
        models: Callable[[], Models],
        ttl: float,
        on_purge: Callable[[], object],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.server = server
        self.news = asyncio.Event()
        """Set when an answer waits to be written."""
        self._sealer = sealer
        self._models = models
        self._ttl = ttl
        self._on_purge = on_purge
        self._clock = clock
        self._epoch = b""  # as last seen; empty if it is not known
        self._epoch_since = 0.0  # when it was first seen, on the monotonic clock
        self._queue: deque[Write] = deque()
        self._waiting = 0  # bytes in the queue
        self._confirm_at = 0.0  # when the list of models may be read again, on that clock
        self._hits = self._misses = self._unavailable = self._writes = self._dropped = 0

    def counts(self) -> Counts:
        """Return what it has done since the start."""
        return Counts(
            self.server.state is not State.OUT and self._epoch != b"",
            self._hits,
            self._misses,
            self._unavailable,
            self._writes,
            self._dropped,
            self.server.errors,
        )

    # Looking up.

    def before(self, exchange: Exchange) -> Exchange:
        """Return an exchange that looks here first, if its ask has a lookup."""

        @asynccontextmanager
        async def looked_up(ask: Ask, lookup: Lookup) -> AsyncIterator[Response]:
            answer, status = await self._find(lookup, ask.model)
            if answer is not None:
                headers, body = unpack(answer.packed), _slices(answer.body)
                yield Response(200, headers, body, born=answer.born, cache_status=status)
            elif lookup.refusal is not None:
                raise lookup.refusal
            else:
                async with exchange(ask) as response:
                    response.cache_status = status
                    yield response

        return lambda ask: exchange(ask) if ask.lookup is None else looked_up(ask, ask.lookup)

    async def _find(self, lookup: Lookup, model: str) -> tuple[StoredAnswer | None, bytes]:
        """Return the answer, if there is one that may be given, and what Cache-Status says."""
        digest = self._models().digest(model)
        if not digest:
            return None, b""
        name, asked = self._sealer.name(b"answer", digest.encode(), lookup.cache_key), _now()
        try:
            epoch, value = await self.server.call("MGET", EPOCH_KEY, name)
        except Unavailable:
            self._unavailable += 1
            return None, b""
        current = self._see(epoch, asked)
        answer = self._opened(name, value, lookup.max_age) if current and value else None
        if answer is None or self._models().digest(model) != digest:
            self._misses += 1
            return None, _MISS
        self._hits += 1
        return answer, _HIT

    def _opened(self, name: bytes, value: bytes, max_age: float) -> StoredAnswer | None:
        """Read a value; None unless it verifies and is young enough."""
        content = self._sealer.open(name, self._epoch, value)
        if content is None:
            return None
        try:
            answer = StoredAnswer.load(content)
        except ValueError:
            return None
        age = answer.age(self._clock())
        return answer if age < self._ttl and age <= max_age else None

    # Storing.

    def store(self, cache_key: bytes, answer: StoredAnswer, began: float) -> None:
        """Have an answer written soon; drop it if too much waits. Never waits.

        Args:
            cache_key: identifies it, with its scope.
            answer: what a model has generated just now.
            began: when its flight began, on the monotonic clock.

        """
        if not answer.digest:
            return
        # An answer that began before this epoch may have been purged already.
        in_epoch = self._epoch and began >= self._epoch_since
        if not in_epoch or self._waiting + answer.size > MAX_WAITING:
            self._dropped += 1
            return
        self._queue.append(Write(cache_key, self._epoch, answer, _now()))
        self._waiting += answer.size
        self.news.set()

    async def flush(self) -> None:
        """Write what waits. To be called whenever `news` is set, and each CONFIRM_INTERVAL.

        An answer is written once a list of models that was asked for after the answer's end
        still shows its model's digest. Until then, another model may have given it.
        """
        queue, models = self._queue, self._models()
        if queue and queue[-1].ended > models.listed_at and _now() >= self._confirm_at:
            await self._confirm()
        while queue and queue[0].ended <= models.listed_at:
            await self._write_next()

    async def _confirm(self) -> None:
        """Read the list of models; if it cannot be read, drop what waits for it."""
        asked = _now()
        await self._models().refresh()
        self._confirm_at = asked + CONFIRM_INTERVAL
        if self._models().listed_at < asked:
            while self._queue and self._queue[0].ended <= asked:
                self._take()
                self._dropped += 1

    async def _write_next(self) -> None:
        try:
            written = await self._write(self._queue[0])
        except Unavailable:
            written = False
        self._take()
        self._writes += written
        self._dropped += not written

    def _take(self) -> None:
        self._waiting -= self._queue.popleft().answer.size

    async def _write(self, write: Write) -> bool:
        """Write an answer; return False if it must not be shared. Raises Unavailable."""
        answer = write.answer
        left = int(answer.born + self._ttl - self._clock())
        confirmed = self._models().digest(answer.model) == answer.digest
        if not confirmed or write.epoch != self._epoch or left < 1:
            return False
        name = self._sealer.name(b"answer", answer.digest.encode(), write.cache_key)
        # The object is folded from the body again.
        content = answer._replace(object=b"").dump()
        value = self._sealer.seal(name, write.epoch, content)
        await self.server.call("SET", name, value, "EX", left)
        return True

    # Purging.

    async def purge(self) -> None:
        """Drop all shared answers, and have all other processes drop what they have in memory.

        Raises:
            HTTPError: 503, the server did not do it.

        """
        try:
            # Without an epoch no value verifies. Deleting works even if the server is full.
            await self.server.call("DEL", EPOCH_KEY)
            self._epoch, self._epoch_since = b"", _now()  # the caller drops what is in memory
            await self._begin_epoch()
        except Unavailable as error:
            raise HTTPError(
                503,
                f"only the answers in this process's memory were dropped: {error}; try again",
                ((b"Retry-After", b"2"),),
            ) from None

    async def watch(self) -> None:
        """Look whether the answers were purged. To be called every WATCH_INTERVAL seconds."""
        asked = _now()
        try:
            (epoch,) = await self.server.call("MGET", EPOCH_KEY)
            self._see(epoch, asked)
            if not self._epoch:
                await self._begin_epoch()
        except Unavailable as error:
            log.debug("the epoch of the shared cache is not known: %s", error)

    async def _begin_epoch(self) -> None:
        """Set a new epoch, unless another process has just done so."""
        await self.server.call("SET", EPOCH_KEY, secrets.token_hex(EPOCH_BYTES // 2), "NX")
        asked = _now()
        (epoch,) = await self.server.call("MGET", EPOCH_KEY)
        self._see(epoch, asked)

    def _see(self, epoch: bytes | None, asked: float) -> bool:
        """Note the epoch in a reply; return whether it is the current one.

        A command that was sent before the current epoch was seen may return an older one.
        """
        epoch = epoch if epoch is not None and len(epoch) == EPOCH_BYTES else b""
        if epoch != self._epoch and asked >= self._epoch_since:
            known, self._epoch, self._epoch_since = self._epoch, epoch, _now()
            if known:
                self._on_purge()
        return epoch == self._epoch and epoch != b""


_now = time.monotonic


async def _slices(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), SLICE):
        yield body[start : start + SLICE]
        await asyncio.sleep(0)  # others' requests go on meanwhile
