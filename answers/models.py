"""Ask Ollama what OllProx wants to know for itself: whether it answers, and what models it has."""

import asyncio
import json
import logging
import math
import time
from collections.abc import Callable, Iterable

import answers.ollama_api as api
from answers.flight import Flights
from answers.stored import StoredAnswer
from cache import Cache
from wire.http11 import Ask, HTTPError, Response
from wire.upstream import FORWARDED, Upstream, loop_error

log = logging.getLogger("ollprox")

PROBE_TIMEOUT = 2.0  # seconds that Ollama may take to say its version
PROBE_INTERVAL = 1.0  # seconds that such an answer is believed
TAGS_TIMEOUT = 10.0  # seconds for the list of models
MAX_TAGS = 16 << 20  # bytes of that list
MAX_QUOTED = 80  # characters of a foreign answer that are shown


class Inquiry:
    """What OllProx asks by itself."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._probed = (-math.inf, False)  # when upstream was asked, and whether it answered
        self._probing = asyncio.Lock()

    async def version(self) -> str | HTTPError:
        """Return upstream's version, or the error that says why there is none."""
        try:
            return api.version(await self._fetch(api.VERSION, b'"version"', PROBE_TIMEOUT))
        except HTTPError as error:
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
            return api.digests(await self._fetch(api.TAGS, b"{", TAGS_TIMEOUT))
        except HTTPError as error:
            log.debug("the list of models could not be read: %s", error.message)
            return None

    async def _fetch(self, target: bytes, marker: bytes, seconds: float) -> bytes:
        """Return the body of a small JSON answer of upstream, in which the marker stands.

        Raises:
            HTTPError: there is none within this time, or what answers is not Ollama.

        """
        try:
            async with asyncio.timeout(seconds):
                async with self._upstream.exchange(Ask(b"GET", target, FORWARDED)) as response:
                    pieces, size = [], 0
                    async for piece in response.body:  # type: ignore[union-attr]
                        pieces.append(piece)
                        if (size := size + len(piece)) > MAX_TAGS:
                            raise HTTPError(
                                502, f"The answer of {self._upstream.address} is too large."
                            )
        except TimeoutError:
            raise HTTPError(
                504, f"No answer came from {self._upstream.address} within {seconds:g} s."
            ) from None
        if response.status == 508:
            raise loop_error()
        body = b"".join(pieces)
        if response.status != 200 or marker not in body:
            raise self._foreign(target, response, body)
        return body

    def _foreign(self, target: bytes, response: Response, body: bytes) -> HTTPError:
        """Return the error that says what answers in Ollama's place."""
        found = describe_response(response.status, response.headers, body)
        return HTTPError(
            502,
            f"{self._upstream.address} answered {target.decode()} with {found}. Is that Ollama?"
            " Check the OLLAMA_HOST and OLLAMA_PORT settings.",
        )


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


def describe_response(status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> str:
    """Return a response in a few printable words: its status, its server, and how it begins."""
    server = next((value for name, value in headers if name.lower() == b"server"), b"")
    words = [f"status {status}"]
    words += [
        f"{name} {_quoted(text)}" for name, text in (("server", server), ("body", body)) if text
    ]
    return ", ".join(words)


def _quoted(text: bytes) -> str:
    """Quote the beginning of a foreign text in one line of printable ASCII."""
    start = " ".join(text[: 4 * MAX_QUOTED].decode("utf-8", "replace").split())
    return json.dumps(start if len(start) <= MAX_QUOTED else f"{start[:MAX_QUOTED]}...")
