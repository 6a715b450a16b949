"""Use several Ollama servers as one.

`roster.py` chooses a server. If that sends no byte of a response or responds with 503, a request
that needs a model goes to another server, since the client has seen nothing yet. Lists of models
are answered from the last poll, so that a server that is down cannot delay them. Models are
managed on all servers or on the first; with `/host/NAME` before the path, on that server alone.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    ExitStack,
    aclosing,
    asynccontextmanager,
    suppress,
)
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Protocol
from urllib.parse import unquote

from wire.http11 import Ask, Headers, HTTPError, Response
from wire.roster import Health, Member, Roster, Slot
from wire.upstream import FORWARDED, NoAnswer

log = logging.getLogger("ollprox")

POLL_TIMEOUT = 2.0  # seconds for a server to list its models
LOADED_INTERVAL = 5.0  # seconds between two polls of the loaded models
MAX_LIST = 16 << 20  # bytes of a list
MAX_COMMAND = 1 << 20  # bytes of a request that goes to all servers

HOST = b"/host/"  # followed by a server's name and a path: for that server alone
_READS = frozenset({b"GET", b"HEAD"})
_JSON: Headers = ((b"Content-Type", b"application/json; charset=utf-8"),)
_LINES: Headers = ((b"Content-Type", b"application/x-ndjson"),)

Listed = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Api:
    """The parts of Ollama's API that the pool needs: paths, and how to normalize a name."""

    normalize: Callable[[str], str]
    tags: bytes  # lists a server's models
    loaded: bytes  # lists the loaded models
    models: bytes  # lists the models in OpenAI's form; followed by `/NAME`, one of them
    pull: bytes
    delete: bytes
    blobs: bytes  # followed by a digest
    told: frozenset[bytes]  # those that report their progress on the first server
    openai: bytes  # how the paths of OpenAI's API begin; none of them manages models


@dataclass(frozen=True, slots=True)
class Status:
    """The state of a server, for operators."""

    name: str
    health: Health
    loaded: tuple[str, ...]
    running: int
    errors: int


class One(Protocol):
    """One Ollama server, as `Upstream` is."""

    @property
    def address(self) -> str:
        """Its host and port."""

    @property
    def requests(self) -> int:
        """The number of requests sent to it."""

    def exchange(self, ask: Ask) -> AbstractAsyncContextManager[Response]:
        """Carry out a request; see `Exchange`."""

    def sweep(self) -> None:
        """End waits that take too long."""

    async def close(self) -> None:
        """Close the idle connections."""


@dataclass(slots=True)
class _Server:
    """A member of the roster, its connections, and its last lists of models."""

    member: Member
    upstream: One
    tags: list[Listed]  # from the last poll
    ps: list[Listed]
    tags_at: float = 0.0  # when the next poll is due
    ps_at: float = 0.0

    @property
    def is_stale(self) -> bool:
        """True if its models may have changed, unless it is down: then waiting is pointless."""
        return not self.tags_at and self.member.health is not Health.UNREACHABLE


class Pool:
    """Several Ollama servers.

    Args:
        servers: the members and their servers, in the order of the settings.
        api: what is known of Ollama's API.
        model_refresh: seconds between two polls of a server's models; 0 for none.
        changed: called when the digests of models or a server's health may have changed; it
            must not block.
        slot_of: returns the slot that a request has from the fair queue, or None.
        clock: returns seconds on a clock that never goes back.

    """

    def __init__(
        self,
        servers: Mapping[Member, One],
        api: Api,
        *,
        model_refresh: float,
        changed: Callable[[], None] = lambda: None,
        slot_of: Callable[[Ask], Slot | None] = lambda ask: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.roster = Roster(tuple(servers))
        self.changed = changed
        self._servers = {m: _Server(m, one, [], []) for m, one in servers.items()}
        self._api = api
        self._model_refresh = model_refresh
        self._slot_of = slot_of
        self._clock = clock
        self._digests: dict[str, str] = {}
        self._conflicts: set[tuple[str, str]] = set()
        self._managing = 0  # requests under way that may change models

    # The interface of a single `Upstream`.

    @property
    def address(self) -> str:
        """The addresses of all servers."""
        return ", ".join(server.upstream.address for server in self._servers.values())

    @property
    def requests(self) -> int:
        """The number of requests sent to all servers."""
        return sum(server.upstream.requests for server in self._servers.values())

    @property
    def servers(self) -> list[One]:
        """The servers, in the order of the settings."""
        return [server.upstream for server in self._servers.values()]

    @property
    def answers(self) -> bool:
        """Whether a server answers; one whose generations fail still does."""
        return any(m.health is not Health.UNREACHABLE for m in self.roster.members)

    def sweep(self) -> None:
        """End waits that take too long. Call it once a second."""
        for server in self._servers.values():
            server.upstream.sweep()

    async def close(self) -> None:
        """Close the connections that are kept."""
        for server in self._servers.values():
            await server.upstream.close()

    # The slots of the fair queue.

    @property
    def total(self) -> int:
        """How many generations may run at once; 0 if any number may."""
        return self.roster.total

    def take(self, model: str) -> Slot | None:
        """Take a slot on which a model can run; None if none is free."""
        return self.roster.take(model, self._clock())

    def give_back(self, slot: object) -> None:
        """Free a slot."""
        assert isinstance(slot, Slot)
        self.roster.give_back(slot)

    # Requests.

    @asynccontextmanager
    async def exchange(self, ask: Ask) -> AsyncIterator[Response]:
        """Carry out a request on the right server; see `Exchange`."""
        async with AsyncExitStack() as stack:
            yield await self._answer(ask, stack)

    def _named(self, name: str) -> Member | None:
        """Return the server of that name."""
        return next((member for member in self.roster.members if member.name == name), None)

    async def _answer(self, ask: Ask, stack: AsyncExitStack) -> Response:
        if ask.target.startswith(HOST):
            return await self._ask_one(ask, stack)
        if ask.model:
            return await self._generate(ask, stack)
        if ask.method not in _READS and ask.target.startswith(self._api.openai):
            return await self._upload(ask, stack)
        if ask.method in _READS:
            if (known := await self._known(ask.target)) is not None:
                return _response(200, known, stack, head=ask.method == b"HEAD")
            if not ask.target.startswith(self._api.blobs):
                return await self._read_from_any(ask, stack)
        return await self._manage(ask, stack)

    async def _manage(self, ask: Ask, stack: AsyncExitStack) -> Response:
        """Manage models on all servers or on the first."""
        self._expect_changes(stack)
        everywhere = {self._api.pull: self._pull, self._api.delete: self._delete}
        if (manage := everywhere.get(ask.target)) is not None:
            return await manage(replace(ask, body=await _read(ask), length=None), stack)
        # On the first server: what such a request leaves there is needed by later ones.
        first = self.roster.members[0]
        response = await stack.enter_async_context(self._on(first, ask))
        if response.status != 200 or ask.target not in self._api.told:
            return response
        lines = _marked(first.name, response)
        stack.push_async_callback(lines.aclose)
        return Response(200, response.headers, lines)

    async def _ask_one(self, ask: Ask, stack: AsyncExitStack) -> Response:
        """Send a request to the server named in its path. Raises HTTPError 404."""
        name, slash, rest = ask.target.removeprefix(HOST).partition(b"/")
        member = self._named(unquote(name.decode("latin-1")))
        if member is None:
            raise HTTPError(404, "OLLAMA_HOST has no server of that name")
        if ask.model:
            self._occupy(member, ask, stack)
        elif ask.method not in _READS:
            self._expect_changes(stack)
        return await stack.enter_async_context(self._on(member, replace(ask, target=slash + rest)))

    async def _upload(self, ask: Ask, stack: AsyncExitStack) -> Response:
        """Ask the first server that is up: nobody reads which model an upload is for."""
        members = self.roster.members
        member = next((m for m in members if m.health is Health.UP), members[0])
        self._occupy(member, ask, stack)
        return await stack.enter_async_context(self._on(member, ask))

    def _occupy(self, member: Member, ask: Ask, stack: AsyncExitStack) -> None:
        """Count a generation on a server, which may be full."""
        if (slot := self._slot_of(ask)) is None:
            slot = Slot()
            stack.callback(self.roster.give_back, slot)
        self.roster.move(slot, member)

    def _expect_changes(self, stack: AsyncExitStack) -> None:
        """Have the lists read anew from now until after the exchange, which may change models."""
        self._managing += 1

        def end() -> None:
            self._managing -= 1
            self.poll_soon()

        stack.callback(end)

    async def _known(self, target: bytes) -> bytes | None:
        """Return a list of models, after polling stale servers; None for any other target.

        Models that are being managed are listed again.
        """
        if self._managing and target == self._api.tags:
            self.poll_soon()
        stale = [server for server in self._servers.values() if server.is_stale]
        if stale and target == self._api.tags:
            await self._poll_all(stale)
        return self.union(target)

    async def _read_from_any(self, ask: Ask, stack: AsyncExitStack) -> Response:
        """Send a request to the first server that is up, or the next one that answers."""
        members: Sequence[Member] = self.roster.members
        if ask.target.startswith(self._api.models + b"/"):
            name = unquote(ask.target[len(self._api.models) + 1 :].decode("latin-1"))
            members = self.roster.able(self._api.normalize(name))
        *others, last = sorted(members, key=lambda m: m.health is not Health.UP)
        for member in others:
            with suppress(NoAnswer):
                return await stack.enter_async_context(self._on(member, ask))
        return await stack.enter_async_context(self._on(last, ask))

    async def _generate(self, ask: Ask, stack: AsyncExitStack) -> Response:
        """Try one server after another, until one answers or none is left."""
        slot = self._slot_of(ask)
        if slot is None:
            slot = Slot()
            stack.callback(self.roster.give_back, slot)
        tried: set[Member] = set()
        member = slot.member or self._other(ask, tried)
        while True:
            assert member is not None  # there is always a first
            tried.add(member)
            if slot.member is not member:
                self.roster.move(slot, member)
            attempt = self._on(member, ask)
            try:
                response = await attempt.__aenter__()
            except NoAnswer:
                member = self._other(ask, tried)
                if member is None:
                    raise
                continue
            if response.status == 503 and (other := self._other(ask, tried)) is not None:
                await attempt.__aexit__(None, None, None)
                member = other
                continue
            stack.push_async_exit(attempt)
            return response

    def _other(self, ask: Ask, tried: set[Member]) -> Member | None:
        """Return the next server to try; None if none is left or the body was already sent."""
        if not isinstance(ask.body, bytes):
            return None if tried else self.roster.choose(ask.model, b"", self._clock())
        return self.roster.choose(ask.model, ask.body, self._clock(), tried)

    @asynccontextmanager
    async def _on(self, member: Member, ask: Ask) -> AsyncIterator[Response]:
        """Carry out a request on one server, and update the server's health."""
        async with AsyncExitStack() as stack:
            try:
                one = self._servers[member].upstream
                response = await stack.enter_async_context(one.exchange(ask))
            except HTTPError as error:
                self._note(member, error, ask)
                raise
            with self._watching(member):
                if ask.model:
                    self.roster.note_answer(member, response.status, self._clock())
            yield response

    def _note(self, member: Member, error: HTTPError, ask: Ask) -> None:
        with self._watching(member, error.message):
            if isinstance(error, NoAnswer) and error.kind == "unreachable":
                self.roster.note_unreachable(member, self._clock())
            elif ask.model:
                self.roster.note_answer(member, error.status, self._clock())

    def _watching(self, member: Member, why: str = "") -> "_Watch":
        return _Watch(self, member, why)

    # Managing models.

    async def _pull(self, ask: Ask, stack: AsyncExitStack) -> Response:
        """Pull a model on all servers in turn; each progress line names the server."""
        lines = self._pull_all(ask)
        stack.push_async_callback(lines.aclose)
        assert isinstance(ask.body, bytes)
        if (_object(ask.body) or {}).get("stream") is not False:
            return Response(200, _LINES, lines)
        last = b""
        async for line in lines:
            last = line
        return _response(500 if b'"error"' in last else 200, last, stack)

    async def _pull_all(self, ask: Ask) -> AsyncGenerator[bytes, None]:
        failed: list[str] = []
        for member in self.roster.members:
            async with aclosing(self._progress(member, ask, failed)) as lines:
                async for line in lines:
                    yield line
        if failed:
            done = [m.name for m in self.roster.members if m.name not in failed]
            where = f"; done on {', '.join(done)}" if done else ""
            yield _line({"error": f"the pull failed on {', '.join(failed)}{where}"})
        else:
            yield _line({"status": "success"})

    async def _progress(
        self, member: Member, ask: Ask, failed: list[str]
    ) -> AsyncGenerator[bytes, None]:
        """Yield a server's lines with its name; add the name to `failed` if the pull fails."""
        error: object = "the pull ended too early"
        try:
            async with self._on(member, ask) as response:
                async for line in _lines(response):
                    told = _object(line) or {}
                    error = told.get("error", error)
                    if told.get("status") == "success":
                        error = None
                    if told and "error" not in told:
                        status = f"{member.name}: {told.get('status', '')}"
                        yield _line({**told, "status": status, "host": member.name})
        except HTTPError as broken:
            error = broken.message
        if error is not None:
            failed.append(member.name)
            yield _line({"status": f"{member.name}: failed: {error}", "host": member.name})

    async def _delete(self, ask: Ask, stack: AsyncExitStack) -> Response:
        """Delete a model on all servers. Raises HTTPError 502 that names those that failed."""
        failed: list[str] = []
        bodies: dict[int, bytes] = {}
        for member in self.roster.members:
            try:
                async with self._on(member, ask) as response:
                    bodies[response.status] = await _all(response)
                    if response.status not in {200, 404}:
                        failed.append(member.name)
            except HTTPError:
                failed.append(member.name)
        if failed:
            raise HTTPError(502, f"the model could not be deleted on {', '.join(failed)}")
        status = 200 if 200 in bodies else 404
        return _response(status, bodies[status], stack)

    # Polls.

    async def tick(self) -> None:
        """Poll the servers that are due. Call it once a second, and before the first request.

        Each list takes at most `POLL_TIMEOUT`.
        """
        with ExitStack() as stack:
            for member in self.roster.members:
                stack.enter_context(self._watching(member))
            self.roster.trust_again(self._clock())
        await self._poll_all(self._servers.values())

    async def _poll_all(self, servers: Iterable[_Server]) -> None:
        """Poll the servers that are due, and update the digests."""
        now = self._clock()
        async with asyncio.TaskGroup() as group:
            for server in servers:
                group.create_task(self._poll(server, now))
        digests, conflicts = self.roster.digests(), self.roster.conflicts()
        for name, model in sorted(conflicts - self._conflicts):
            log.warning(
                "Ollama on %s is not used for %s: most servers have another model of that name;"
                " pull it again there",
                name,
                model,
            )
        changed = digests != self._digests
        self._digests, self._conflicts = digests, conflicts
        if changed:
            self.changed()

    def poll_soon(self) -> None:
        """Make the next tick read all lists again, because models may have changed."""
        for server in self._servers.values():
            server.tags_at = server.ps_at = 0.0

    async def _poll(self, server: _Server, now: float) -> None:
        member = server.member
        is_out = member.health is Health.UNREACHABLE
        if is_out and now < member.probe_at:
            return
        if is_out or (self._model_refresh and now >= server.tags_at):
            server.tags_at = now + self._model_refresh
            await self._poll_tags(server)
        if now >= server.ps_at and member.health is not Health.UNREACHABLE:
            server.ps_at = now + LOADED_INTERVAL
            if (listed := await self._list(member, self._api.loaded)) is not None:
                server.ps = listed
                member.loaded = frozenset(self._name(m) for m in listed)

    async def _poll_tags(self, server: _Server) -> None:
        member = server.member
        if (listed := await self._list(member, self._api.tags)) is None:
            if member.health is Health.UNREACHABLE and self._clock() >= member.probe_at:
                self.roster.note_unreachable(member, self._clock())  # it answered without a list
            return
        if self._model_refresh:
            found = {self._name(m): m.get("digest") for m in listed}
            server.tags = listed
            member.digests = {n: d for n, d in found.items() if n and isinstance(d, str) and d}
        with self._watching(member):
            self.roster.note_reached(member)  # only now, when its models are known

    def _name(self, listed: Listed) -> str:
        """Return a listed model's normalized name; empty if it has none."""
        name = listed.get("name")
        return self._api.normalize(name) if isinstance(name, str) else ""

    async def _list(self, member: Member, target: bytes) -> list[Listed] | None:
        """Return a server's list of models; None if it cannot be read."""
        try:
            async with asyncio.timeout(POLL_TIMEOUT):
                async with self._on(member, Ask(b"GET", target, FORWARDED)) as response:
                    body = await _all(response)
        except TimeoutError:
            with self._watching(member, f"no answer within {POLL_TIMEOUT:g} s"):
                self.roster.note_unreachable(member, self._clock())
            return None
        except HTTPError as error:
            if target == self._api.tags and not isinstance(error, NoAnswer):
                # Such as a gateway that wants other credentials. It may refuse the other list.
                with self._watching(member, error.message):
                    self.roster.note_unreachable(member, self._clock())
            return None
        listed = (_object(body) or {}).get("models")
        if response.status != 200 or not isinstance(listed, list):
            return None
        return [model for model in listed if isinstance(model, dict)]

    def able(self, model: str) -> list[str]:
        """Return the names of the servers that may answer for a model."""
        return [member.name for member in self.roster.able(model)]

    def digests(self) -> dict[str, str] | None:
        """Return each model's digest by name; None if no server has listed its models."""
        known = any(member.digests is not None for member in self.roster.members)
        return dict(self._digests) if known else None

    def conflicts(self) -> set[tuple[str, str]]:
        """Return pairs of server and model that are not used, because their digest differs."""
        return set(self._conflicts)

    def statuses(self) -> list[Status]:
        """Return the state of each server."""
        return [
            Status(m.name, m.health, tuple(sorted(m.loaded)), m.running, m.errors)
            for m in self.roster.members
        ]

    def union(self, target: bytes) -> bytes | None:
        """Return the list of all servers' models; None if the target is not a list, or not known.

        Args:
            target: the path of any request.

        """
        if target == self._api.loaded:
            up = [s for s in self._servers.values() if s.member.health is Health.UP]
            return _dump({"models": [model for server in up for model in server.ps]})
        if target not in {self._api.tags, self._api.models} or self.digests() is None:
            return None
        named = {
            self._name(model): model
            for server in reversed(self._servers.values())  # so the first server wins
            for model in server.tags
            if model.get("digest") == self._digests.get(self._name(model))
        }
        models = sorted(named.values(), key=lambda m: str(m.get("modified_at")), reverse=True)
        if target == self._api.tags:
            return _dump({"models": models})
        return _dump({"object": "list", "data": [_openai(model) for model in models]})


class _Watch:
    """Logs a change of a server's health within a `with` block."""

    def __init__(self, pool: Pool, member: Member, why: str) -> None:
        self._pool = pool
        self._member = member
        self._why = why
        self._before = member.health

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        member, health = self._member, self._member.health
        if health is self._before:
            return
        if health is Health.UP:
            log.info("Ollama on %s is back", member.name)
        elif self._before is Health.UP:
            log.warning(
                "Ollama on %s is down: %s",
                member.name,
                self._why or "it failed three times in a row",
            )
        self._pool._digests = self._pool.roster.digests()
        self._pool.changed()


def _openai(model: Listed) -> Listed:
    """Return a model in OpenAI's form, as Ollama writes it."""
    name = str(model.get("name"))
    try:
        created = int(datetime.fromisoformat(str(model.get("modified_at"))).timestamp())
    except (ValueError, OverflowError):
        created = 0
    owner = name.rpartition("/")[0].rpartition("/")[2] or "library"
    return {"id": name, "object": "model", "created": created, "owned_by": owner}


def _dump(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def _line(value: Listed) -> bytes:
    return _dump(value) + b"\n"


def _object(data: bytes) -> Listed | None:
    """Parse a JSON object; None if it is not one."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _response(status: int, body: bytes, stack: AsyncExitStack, *, head: bool = False) -> Response:
    """Return our own response, as a stream like those of servers."""

    async def pieces() -> AsyncGenerator[bytes, None]:
        if body and not head:
            yield body

    made = pieces()
    stack.push_async_callback(made.aclose)
    return Response(status, _JSON, made, len(body))


async def _pieces(response: Response) -> AsyncGenerator[bytes, None]:
    """Yield a body's pieces, whether it is complete or a stream."""
    if isinstance(response.body, bytes):
        yield response.body
        return
    async for piece in response.body:
        yield piece


async def _lines(response: Response) -> AsyncGenerator[bytes, None]:
    """Yield a body's lines, without their ends. Raises HTTPError 502 if one is too large."""
    rest = b""
    async for piece in _pieces(response):
        *lines, rest = (rest + piece).split(b"\n")
        if len(rest) > MAX_LIST:
            raise HTTPError(502, "Ollama's answer is too large")
        for line in lines:
            yield line
    if rest:
        yield rest


async def _marked(name: str, response: Response) -> AsyncGenerator[bytes, None]:
    """Yield lines of progress with the name of the server that they tell of.

    The last status stays `success`, which clients look for.
    """
    async for line in _lines(response):
        told = _object(line)
        if told is None or "error" in told:
            yield line + b"\n"
            continue
        if (status := told.get("status")) not in {None, "success"}:
            told["status"] = f"{name}: {status}"
        yield _line({**told, "host": name})


async def _all(response: Response) -> bytes:
    """Return a complete body. Raises HTTPError 502 if it is too large."""
    body = bytearray()
    async for piece in _pieces(response):
        body += piece
        if len(body) > MAX_LIST:
            raise HTTPError(502, "Ollama's answer is too large")
    return bytes(body)


async def _read(ask: Ask) -> bytes:
    """Read a request's body, to send it to several servers. Raises HTTPError 413."""
    if isinstance(ask.body, bytes):
        return ask.body
    body = bytearray()
    async for piece in ask.body:
        body += piece
        if len(body) > MAX_COMMAND:
            raise HTTPError(413, f"a request for all servers has at most {MAX_COMMAND} bytes")
    return bytes(body)
