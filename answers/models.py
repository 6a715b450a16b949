"""Ask Ollama what OllProx wants to know for itself: whether it answers, and what models it has."""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable

import answers.ollama_api as api
from answers.flight import Flights
from answers.stored import StoredAnswer
from cache import Cache
from wire.http11 import Ask, HTTPError
from wire.upstream import FORWARDED, Upstream, loop_error

log = logging.getLogger("ollprox")

PROBE_TIMEOUT = 2.0  # seconds that Ollama may take to say its version
PROBE_INTERVAL = 1.0  # seconds that such an answer is believed
TAGS_TIMEOUT = 10.0  # seconds for the list of models
MAX_TAGS = 16 << 20  # bytes of that list


class Inquiry:
    """What OllProx asks by itself."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self.up = False  # whether upstream answered the last time that we asked
        self._probed = (-math.inf, False)  # when upstream was asked, and whether it answered
        self._probing = asyncio.Lock()

    async def version(self) -> str | HTTPError:
        """Ask upstream for its version, or learn why it does not say it."""
        try:
            version = api.version(await self._fetch(api.VERSION, PROBE_TIMEOUT))
            self.up = True
            return version
        except HTTPError as error:
            self.up = False
            return error

    async def ready(self) -> bool:
        """Tell whether upstream answers; many who ask at once ask once."""
        async with self._probing:
            if time.monotonic() - self._probed[0] >= PROBE_INTERVAL:
                version = await self.version()
                self._probed = (time.monotonic(), isinstance(version, str))
        return self._probed[1]

    async def digests(self) -> dict[str, str] | None:
        """Return each model's digest by its name; None if the list cannot be read."""
        try:
            digests = api.digests(await self._fetch(api.TAGS, TAGS_TIMEOUT))
            self.up = True
            return digests
        except HTTPError as error:
            self.up = False
            log.debug("the list of models could not be read: %s", error.message)
            return None

    async def _fetch(self, target: bytes, seconds: float) -> bytes:
        """Read a small answer of upstream's. Raises HTTPError."""
        try:
            async with asyncio.timeout(seconds):
                async with self._upstream.exchange(Ask(b"GET", target, FORWARDED)) as response:
                    pieces, size = [], 0
                    async for piece in response.body:  # type: ignore[union-attr]
                        pieces.append(piece)
                        if (size := size + len(piece)) > MAX_TAGS:
                            raise HTTPError(502, "the answer is too large")
        except TimeoutError:
            raise HTTPError(504, f"no answer within {seconds:g} s") from None
        if response.status == 508:
            raise loop_error()
        if response.status != 200:
            raise HTTPError(502, f"Its answer had status {response.status}.")
        return b"".join(pieces)


class ModelWatch:
    """Drop the answers of models that are others now.

    Args:
        inquiry: asks upstream.
        cache: whose answers are dropped.
        flights: whose answers will not be stored.
        know: is told the models' names.

    """

    def __init__(
        self,
        inquiry: Inquiry,
        cache: Cache[StoredAnswer],
        flights: Flights,
        know: Callable[[Iterable[str]], None],
    ) -> None:
        self._inquiry = inquiry
        self._cache = cache
        self._flights = flights
        self._know = know
        self._digests: dict[str, str] | None = None  # each model's, as last listed

    async def refresh(self) -> None:
        """Drop the answers of every model that is another one now, or gone."""
        found = await self._inquiry.digests()
        if found is None:
            self._digests = self._digests or {}  # what is listed next may have changed meanwhile
            return
        before, self._digests = self._digests, found
        if found != before:
            self._know(found)
        if before is None:  # the first list is where it starts, if nothing could be missed
            return
        changed = {n for n in before.keys() | found.keys() if before.get(n) != found.get(n)}
        if changed:
            dropped = self._cache.drop(lambda answer: answer.model in changed)
            self._flights.ground(changed.__contains__)
            log.info("%d models have changed: %d stored answers dropped", len(changed), dropped)
