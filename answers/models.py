"""Ask Ollama whether it answers and which models it has; drop answers of changed models."""

import asyncio
import contextlib
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable

import answers.ollama_api as api
from answers.flight import Flights
from answers.questions import managed_models
from answers.stored import StoredAnswer
from cache import Cache
from wire.http11 import Ask, HTTPError, Response
from wire.pool import One, Pool
from wire.upstream import FORWARDED, loop_error

log = logging.getLogger("ollprox")

PROBE_TIMEOUT = 2.0  # seconds for the version
PROBE_INTERVAL = 1.0  # seconds for which the last probe counts
RECHECK_INTERVAL = 2.0  # seconds between two probes of an Ollama that is down
LOADED_TIMEOUT = 1.0  # seconds for the list of loaded models, which somebody waits for
TAGS_TIMEOUT = 10.0  # seconds for the list of models
MANAGE_TIMEOUT = 5.0  # seconds that the end of a managing request waits for that list
MAX_TAGS = 16 << 20  # bytes of that list
MAX_QUOTED = 80  # characters shown of the answer of a program that is not Ollama
MAX_NAMED = 64 << 10  # bytes of the largest managing request that is searched for models


class Probe:
    """Sends OllProx's own requests to Ollama.

    Args:
        upstream: the Ollama server, or a pool of several.

    """

    up: bool | None = None
    """True if Ollama answered the last of these requests; None before the first."""

    loaded: tuple[str, ...] = ()
    """The models that were loaded when `look` last asked."""

    def __init__(self, upstream: One) -> None:
        self._upstream = upstream
        self.due = asyncio.Event()
        """Set when Ollama should be probed at once whether it answers."""
        self._suspected = False
        self._probed = -math.inf  # when `ready` last probed
        self._probing = asyncio.Lock()
        self._looked = -math.inf  # when `look` last asked
        self._looking = asyncio.Lock()

    @property
    def address(self) -> str:
        """Where the Ollama is."""
        return self._upstream.address

    async def version(self) -> str | HTTPError:
        """Return Ollama's version, or the error that explains why it is not known."""
        try:
            return api.version(await self._fetch(api.VERSION, b'"version"', PROBE_TIMEOUT))
        except HTTPError as error:
            return error

    def suspect(self) -> None:
        """Have Ollama asked at once, since a request did not reach it."""
        if self.up is not False:
            self._suspected = True
            self.due.set()

    async def recheck(self) -> None:
        """Ask Ollama if it is down or suspected to be; to be called every few seconds."""
        if self.up is False or self._suspected:
            self._suspected = False
            await self.version()

    async def ready(self) -> bool:
        """Return True if Ollama answers. Simultaneous calls share one request."""
        async with self._probing:
            if time.monotonic() - self._probed >= PROBE_INTERVAL:
                await self.version()
                self._probed = time.monotonic()
        return self.up is True

    async def look(self) -> None:
        """Ask which models are loaded; none are if Ollama does not tell, or is down.

        For somebody who looks at them. Callers at the same time share one request.
        """
        async with self._looking:
            if time.monotonic() - self._looked < PROBE_INTERVAL:
                return
            found: tuple[str, ...] = ()
            if self.up is not False:
                with contextlib.suppress(HTTPError):
                    found = api.loaded(await self._ask(api.LOADED, b"{", LOADED_TIMEOUT))
            self.loaded, self._looked = found, time.monotonic()

    async def digests(self) -> dict[str, str] | None:
        """Return each model's digest by its name; None if the list cannot be read."""
        try:
            return api.digests(await self._fetch(api.TAGS, b"{", TAGS_TIMEOUT))
        except HTTPError as error:
            log.debug("the list of models could not be read: %s", error.message)
            return None

    async def _fetch(self, target: bytes, marker: bytes, seconds: float) -> bytes:
        """Return the body of a small answer; update `up`. Raises HTTPError."""
        try:
            body = await self._ask(target, marker, seconds)
        except HTTPError as error:
            self._note(up=False, reason=error.message)
            raise
        self._note(up=True)
        return body

    async def _ask(self, target: bytes, marker: bytes, seconds: float) -> bytes:
        """Return the body of upstream's answer, which must contain the marker.

        Raises:
            HTTPError: no answer came in time, or another program than Ollama answered.

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
        """Return the error that says which program answered in place of Ollama."""
        found = describe_response(response.status, ((b"Server", response.server),), body)
        return HTTPError(
            502,
            f"{self._upstream.address} answered {target.decode()} with {found}. Is that Ollama?"
            " Check the OLLAMA_HOST and OLLAMA_PORT settings.",
        )

    def _note(self, *, up: bool, reason: str = "") -> None:
        before, self.up = self.up, up
        if up is before:
            return
        if not up and before is not None:  # at the start, `startup` reports it
            log.warning("Ollama does not answer any more: %s", reason)
        if up and before is not None:
            log.info("Ollama at %s answers again", self._upstream.address)


class PoolProbe(Probe):
    """The same of several Ollamas. Their pool knows which are up, and logs it."""

    def __init__(self, pool: Pool) -> None:
        super().__init__(pool)
        self._pool = pool

    async def ready(self) -> bool:
        """Return true if one of them answers."""
        return self._pool.answers

    async def digests(self) -> dict[str, str] | None:
        """Return each model's digest by its name; None unless the pool compares them."""
        self._pool.poll_soon()  # the lists of the last poll do not show what has changed since
        found = await super().digests()
        return None if self._pool.digests() is None else found

    def _note(self, *, up: bool, reason: str = "") -> None:
        self.up = up


class ModelWatch:
    """Drops the stored answers of models whose digest has changed.

    Args:
        probe: reads the list of models.
        cache: the stored answers.
        flights: the answers under way; those of changed models are grounded.
        on_list: called with the models' names when the list has changed.

    """

    def __init__(
        self,
        probe: Probe,
        cache: Cache[StoredAnswer],
        flights: Flights,
        on_list: Callable[[Iterable[str]], None],
    ) -> None:
        self.due = asyncio.Event()
        """Set it to read the list again at once."""
        self.listed_at = 0.0
        """When the newest list was asked for, on the monotonic clock."""
        self._probe = probe
        self._cache = cache
        self._flights = flights
        self._on_list = on_list
        self._digests: dict[str, str] | None = None  # each model's, as last listed

    def digest(self, model: str) -> str:
        """Return the digest of a model, by its normalized name; empty if it is not known.

        Of a model that runs elsewhere it is not known: the list has the digest of a stub.
        """
        digest = (self._digests or {}).get(model, "")
        return "" if digest.startswith(api.REMOTE) else digest

    async def refresh(self) -> bool:
        """Drop the answers of every model whose digest has changed since the last call.

        Returns False if there was nothing to compare: the list cannot be read, or is the first.
        """
        asked = time.monotonic()
        found = await self._probe.digests()
        if found is None:
            self._digests = self._digests or {}  # then every model of the next list is new
            return False
        if asked < self.listed_at:
            return True  # a list that was asked for later came first
        self.listed_at = asked
        before, self._digests = self._digests, found
        if found != before:
            self._on_list(found)
        if before is None:
            return False
        changed = {n for n in before.keys() | found.keys() if before.get(n) != found.get(n)}
        if changed:
            dropped = self._drop(changed)
            log.info("%d models have changed: %d stored answers dropped", len(changed), dropped)
        return True

    async def settle(self, names: Collection[str] | None) -> None:
        """Drop the answers that a managing request has invalidated.

        Takes at most `MANAGE_TIMEOUT`. If the list of models cannot be compared in that time, all
        answers of `names` are dropped, or all answers if `names` is None.
        """
        try:
            async with asyncio.timeout(MANAGE_TIMEOUT):
                compared = await self.refresh()
        except TimeoutError:
            compared = False
        if not compared:
            self.interrupt(names)

    def interrupt(self, names: Collection[str] | None) -> None:
        """Drop the answers of `names`, or all if None, and let the list be read soon.

        For a managing request whose result is unknown.
        """
        self._drop(names)
        self.due.set()

    def _drop(self, names: Collection[str] | None) -> int:
        """Drop the answers of some models, or of all; return how many."""
        self._flights.ground(lambda model: names is None or model in names)
        return self._cache.drop(lambda answer: names is None or answer.model in names)


class ModelChange:
    """Drops the answers that a request to change models invalidates, before its response ends.

    Pass the request's body to `note`, and its response through `settled`.
    """

    def __init__(self, watch: ModelWatch) -> None:
        self._watch = watch
        self._body = bytearray()
        self._settled = False

    def note(self, piece: bytes) -> None:
        """Take a piece of the request's body."""
        if len(self._body) <= MAX_NAMED:
            self._body += piece

    async def settled(self, replay: Awaitable[Response]) -> Response:
        """Return a response that ends only after the invalidated answers are dropped."""
        try:
            response = await replay
        except BaseException:
            self._close()
            raise
        leave = response.release

        def release() -> None:
            self._close()
            if leave is not None:
                leave()

        response.release = release
        if not isinstance(response.body, bytes):
            response.body = self._pieces(response.body)
            return response
        try:
            await self._settle()
        except BaseException:
            release()
            raise
        return response

    async def _pieces(self, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for piece in body:
            if b'"success"' in piece:  # some clients do not read on after this line
                await self._settle()
            yield piece
        await self._settle()

    async def _settle(self) -> None:
        await self._watch.settle(self._names())
        self._settled = True

    def _close(self) -> None:
        """If the response was cut off, drop what the request may have invalidated."""
        if not self._settled:
            self._watch.interrupt(self._names())

    def _names(self) -> set[str] | None:
        body = bytes(self._body)
        return managed_models(body) if len(body) <= MAX_NAMED else None


def describe_response(status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> str:
    """Return a short printable description of a response: status, server, start of the body."""
    server = next((value for name, value in headers if name.lower() == b"server"), b"")
    words = [f"status {status}"]
    words += [
        f"{name} {_quoted(text)}" for name, text in (("server", server), ("body", body)) if text
    ]
    return ", ".join(words)


def _quoted(text: bytes) -> str:
    """Quote the start of an untrusted text as one line of printable ASCII."""
    start = " ".join(text[: 4 * MAX_QUOTED].decode("utf-8", "replace").split())
    return json.dumps(start if len(start) <= MAX_QUOTED else f"{start[:MAX_QUOTED]}...")
