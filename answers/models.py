"""Ask Ollama what OllProx itself needs to know: whether it answers, and which models it has."""

import asyncio
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
from wire.upstream import FORWARDED, Upstream, loop_error

log = logging.getLogger("ollprox")

PROBE_TIMEOUT = 2.0  # seconds that Ollama may take to tell its version
PROBE_INTERVAL = 1.0  # seconds that such an answer is believed
TAGS_TIMEOUT = 10.0  # seconds for the list of models
MANAGE_TIMEOUT = 5.0  # seconds that a managing request waits for that list at its end
MAX_TAGS = 16 << 20  # bytes of that list
MAX_QUOTED = 80  # characters of a foreign answer that are shown
MAX_NAMED = 64 << 10  # bytes of a managing request's body in which its models are looked for


class Probe:
    """Requests of OllProx's own to one Ollama.

    Args:
        upstream: the Ollama.
        on_change: called with `up` each time that it changes.

    """

    up: bool | None = None
    """Whether Ollama answered the last of these requests; None before the first."""

    def __init__(
        self, upstream: Upstream, on_change: Callable[[bool], None] = lambda up: None
    ) -> None:
        self._upstream = upstream
        self._on_change = on_change
        self._probed = -math.inf  # when `ready` last asked
        self._probing = asyncio.Lock()

    async def version(self) -> str | HTTPError:
        """Return Ollama's version, or the error that tells why it is not known."""
        try:
            return api.version(await self._fetch(api.VERSION, b'"version"', PROBE_TIMEOUT))
        except HTTPError as error:
            return error

    async def ready(self) -> bool:
        """Return true if Ollama answers. Callers at the same time share one request."""
        async with self._probing:
            if time.monotonic() - self._probed >= PROBE_INTERVAL:
                await self.version()
                self._probed = time.monotonic()
        return self.up is True

    async def digests(self) -> dict[str, str] | None:
        """Return each model's digest by its name; None if the list cannot be read."""
        try:
            return api.digests(await self._fetch(api.TAGS, b"{", TAGS_TIMEOUT))
        except HTTPError as error:
            log.debug("the list of models could not be read: %s", error.message)
            return None

    async def _fetch(self, target: bytes, marker: bytes, seconds: float) -> bytes:
        """Return the body of a small answer, and note whether Ollama is up. Raises HTTPError."""
        try:
            body = await self._ask(target, marker, seconds)
        except HTTPError as error:
            self._note(up=False, reason=error.message)
            raise
        self._note(up=True)
        return body

    async def _ask(self, target: bytes, marker: bytes, seconds: float) -> bytes:
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

    def _note(self, *, up: bool, reason: str = "") -> None:
        before, self.up = self.up, up
        if up is before:
            return
        if not up and before is not None:  # at the start, the start says so
            log.warning("Ollama does not answer any more: %s", reason)
        if up and before is not None:
            log.info("Ollama at %s answers again", self._upstream.address)
        self._on_change(up)


class ModelWatch:
    """Drops the stored answers of models whose digest has changed.

    Args:
        probe: reads the list of models.
        cache: whose answers are dropped.
        flights: whose answers will not be stored.
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
        """Set when the list should be read again at once."""
        self.listed_at = 0.0
        """When the last list that was read was asked for, on the monotonic clock."""
        self._probe = probe
        self._cache = cache
        self._flights = flights
        self._on_list = on_list
        self._digests: dict[str, str] | None = None  # each model's, as last listed

    @property
    def up(self) -> bool | None:
        """Whether Ollama answered when it was last asked; None before that."""
        return self._probe.up

    def digest(self, model: str) -> str:
        """Return the digest of a model, by its normalized name; empty if it is not known.

        Of a model that runs elsewhere it is not known: the list has the digest of a stub.
        """
        digest = (self._digests or {}).get(model, "")
        return "" if digest.startswith(api.REMOTE) else digest

    async def refresh(self) -> bool:
        """Drop the answers of every model whose digest has changed since the last call.

        Returns false if there was nothing to compare: the list cannot be read, or is the first.
        """
        asked = time.monotonic()
        found = await self._probe.digests()
        if found is None:
            self._digests = self._digests or {}  # all that is listed next counts as changed
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
        """Drop the answers that a managing request has made wrong.

        Takes at most `MANAGE_TIMEOUT`. If the list of models cannot be compared by then, all
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
        """Drop the answers of `names`, or all if None, and have the list read soon.

        For a managing request whose end is not known.
        """
        self._drop(names)
        self.due.set()

    def _drop(self, names: Collection[str] | None) -> int:
        """Drop the answers of some models, or of all; return how many."""
        self._flights.ground(lambda model: names is None or model in names)
        return self._cache.drop(lambda answer: names is None or answer.model in names)


class ModelChange:
    """A request that changes models, until the answers that it makes wrong are dropped.

    Its body is shown to `note`; `settled` then holds the end of its response back.
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
        """Let a response end only when the answers that its request made wrong are dropped."""
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
            if b'"success"' in piece:  # for some clients this line is the end
                await self._settle()
            yield piece
        await self._settle()

    async def _settle(self) -> None:
        await self._watch.settle(self._names())
        self._settled = True

    def _close(self) -> None:
        """Drop what may be wrong: without an end Ollama may have done it or not."""
        if not self._settled:
            self._watch.interrupt(self._names())

    def _names(self) -> set[str] | None:
        body = bytes(self._body)
        return managed_models(body) if len(body) <= MAX_NAMED else None


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
