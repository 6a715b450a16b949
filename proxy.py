"""Decide how each request is answered: from the cache, by a flight, or by an OllProx page.

Read `Proxy.handle` first.
"""

import asyncio
import hashlib
import math
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any
from urllib.parse import unquote

from access.rights import Key
from answers.flight import Flight, Flights, Reader, Source, Wants
from answers.limits import LimitReached
from answers.lists import change_list, rename_model
from answers.models import ModelChange, ModelWatch
from answers.notes import JSON, progress_notes, too_large_error
from answers.ollama_api import Access, Form, Route, RouteTable, Upload
from answers.permits import Permit, Permits
from answers.questions import EXAMPLE, SHORT, Codec, Question, is_quick, large_question
from answers.replay import as_object, replay
from answers.shared import SharedCache
from answers.shared_limits import Reservation, SharedLimits, refunding
from answers.stored import StoredAnswer, stored_answer
from cache import Cache
from gate import WRONG_KEY, Admission, Gate, caller
from record import Outcome, Record
from settings import Settings, normalize_model
from watch.telemetry import MAX_SHOWN
from wire.bodies import too_large
from wire.codings import coding_of
from wire.http11 import (
    Ask,
    Head,
    Headers,
    HTTPError,
    Lookup,
    Request,
    Response,
    end_to_end,
    unpack,
)
from wire.pool import HOST
from wire.upstream import VIA, add_via, forwarded

MAX_QUESTIONS = 512  # parsed bodies that are remembered
MAX_MODEL = 8192  # characters of a model's name that are recorded; none in Ollama is so long
MAX_KNOWN_BODY = 2048  # bytes of the largest body that is remembered
PARSERS = 2  # threads that parse larger bodies


@dataclass(frozen=True, slots=True)
class CacheDirectives:
    """A request's cache directives (RFC 9111 section 5.2.1)."""

    max_age: float = math.inf  # maximum age of an answer, in seconds
    reload: bool = False  # `no-cache`: ask upstream
    private: bool = False  # `no-store`: ask upstream, and neither store nor share the answer
    only_if_cached: bool = False

    @classmethod
    def of(cls, head: Head) -> "CacheDirectives":
        """Read the directives of a head. Pragma counts only without a Cache-Control."""
        if head.names.isdisjoint(_DIRECTIVES):
            return _NO_DIRECTIVES
        value = head.get(b"cache-control")
        if value is None:
            value = head.get(b"pragma") or b""
        found = {part.strip(b" \t").lower() for part in value.split(b",")}
        ages = [match[1] for part in found if (match := _MAX_AGE.fullmatch(part))]
        max_age = min(map(int, ages)) if ages else math.inf
        return cls(
            max_age=max_age,
            reload=b"no-cache" in found or max_age == 0,
            private=b"no-store" in found,
            only_if_cached=b"only-if-cached" in found,
        )


_NO_DIRECTIVES = CacheDirectives()
_DIRECTIVES = frozenset({b"cache-control", b"pragma"})
_MAX_AGE = re.compile(rb'max-age="?(\d{1,9})"?')


Reserved = Reservation | LimitReached | None
"""A generation that was counted for all processes, or why it was not; None if it need not be."""


@dataclass(slots=True)
class Decision:
    """Where the answer to a request comes from: either `stored` or `flight` is set."""

    outcome: Outcome
    cache_status: bytes
    stored: StoredAnswer | None = None
    headers: Headers = ()  # the stored answer's Age
    flight: Flight | None = None


class Proxy:
    """Answers requests.

    Args:
        settings: the user's settings.
        gate: decides which requests get in.
        routes: the routes of Ollama's API.
        cache: the stored answers.
        flights: the answers under way.
        permits: decides whether a generation may begin.
        models: knows the models' digests, and watches requests that change models.
        page: returns the OllProx page of that name, for the caller's key.
        shared: where processes share answers; None if they do not.
        shared_limits: where they count together; None if they do not.

    """

    def __init__(
        self,
        settings: Settings,
        gate: Gate,
        routes: RouteTable,
        cache: Cache[StoredAnswer],
        flights: Flights,
        permits: Permits,
        models: ModelWatch,
        page: Callable[[str, Head, Key | None], Coroutine[Any, Any, Response]],
        shared: SharedCache | None = None,
        shared_limits: SharedLimits | None = None,
    ) -> None:
        self.settings = settings
        self.gate = gate
        self.routes = routes
        self.cache = cache
        self.flights = flights
        self.permits = permits
        self.models = models
        self.page = page
        self.shared = shared
        self.shared_limits = shared_limits
        self._questions: dict[tuple[bytes, bytes], Question] = {}  # by path and body
        # A separate pool, so that parsing never delays the reading of the key file.
        self._parsers = ThreadPoolExecutor(PARSERS, "parse")

    def handle(self, request: Request, record: Record) -> Coroutine[Any, Any, Response]:
        """Check a request's head, and return what answers the request. Both raise HTTPError."""
        head = request.head
        record.method = _METHODS.get(head.method, "other")
        if b"origin" in head.names:
            record.headers = self.gate.cors(head)
        if head.method == b"OPTIONS" and record.headers:
            record.outcome = Outcome.PAGE
            return self._preflight(head)
        admission = self.gate.admit(head, record.client)
        route, key = admission.route, admission.key
        self._note(record, head, route, key)
        if route.page:
            # Probes of load balancers, and polls of Prometheus and the dashboard.
            record.quiet = route.access is not Access.ADMIN
            return self.page(route.page, head, key)
        record.headers += VIA
        if route.upload is not Upload.NONE:
            return self._upload(request, admission, record)
        return self._answer(request, admission, record)

    async def _preflight(self, head: Head) -> Response:
        return self.gate.preflight(head)

    async def _answer(self, request: Request, admission: Admission, record: Record) -> Response:
        """Read the body, and answer with a stored answer or from a flight."""
        route, key = admission.route, admission.key
        question = await self._read_question(route, request)
        record.model = question.model[:MAX_MODEL] or "-"
        if key is not None and key.models is not None:
            _check_model(key, question, admission)
        head, request_id = request.head, record.request_id
        if self.shared_limits is None:
            decision = self._decide(head, question, admission, request_id)
        else:
            decision = await self._decide_within_limits(head, question, admission, request_id)
        record.outcome, record.cache_status = decision.outcome, decision.cache_status
        if decision.stored is not None:
            return self._hit(decision.stored, decision.headers, question, record)
        assert decision.flight is not None
        reader = decision.flight.join(Wants.FOLD if question.folds else Wants.PIECES)
        response = await self._replay(reader, route.form, record, self._heartbeat(route, question))
        if route.lists or route.names_model:
            await self._change_list(response, head, admission)
        return response

    def render_error(self, error: HTTPError, head: Head | None, record: Record) -> Response:
        """Return the response for an error, in the form of the API that was called."""
        if head is not None and record.route == NO_ROUTE:  # the gate refused it
            found = self.routes.find(head.path)
            self._note(record, head, found[0] if found else None, self.gate.identify(head))
            record.wrong_key = error.kind == WRONG_KEY
        form = Form.OLLAMA if head is None else self.routes.form(head.path)
        body = error.body or form.body(error.status, error.message)
        return Response(error.status, ((b"Content-Type", JSON), *error.headers), body)

    def _note(self, record: Record, head: Head, route: Route | None, key: Key | None) -> None:
        """Record what a request's head says: the caller, and the route if there is one."""
        if key is not None:
            record.caller, record.label = key.label or key.digest.hex()[:8], key.label
        else:
            record.caller = caller(head)
        if route is None:
            return
        path = head.path.decode()
        record.path = path[:MAX_SHOWN]
        record.route = path if head.path in self.routes.rows else (route.target or b"").decode()
        record.generates = route.generates
        if route.page:
            record.outcome = Outcome.PAGE

    # Read the question.

    async def _read_question(self, route: Route, request: Request) -> Question:
        """Read the body, if the route reads bodies. Raises HTTPError 400, 411, 413, 415."""
        head, codec, limit = request.head, route.codec, self.settings.max_body_bytes
        if codec is None or route.target is None:
            return _NO_QUESTION
        if head.length is None and not head.chunked:
            raise HTTPError(411, f"the request has no body: send JSON, as in curl -d '{EXAMPLE}'")
        coding = b""
        if b"content-encoding" in head.names:
            value = head.get(b"content-encoding")
            coding = coding_of(value, accepted=route.takes_compressed)
        body = await request.read(limit)
        if not coding and (len(body) <= SHORT or is_quick(body)):
            return self._question(codec, route.target, head.path, body)
        read = partial(large_question, codec, route.target, body, coding, limit)
        del body  # so that only the pool holds it
        return await asyncio.get_running_loop().run_in_executor(self._parsers, read)

    def _question(self, codec: Codec, target: bytes, path: bytes, body: bytes) -> Question:
        """Parse a body; small bodies are parsed only once."""
        if len(body) > MAX_KNOWN_BODY:
            return codec.question(body, target)
        asked = path, body
        question = self._questions.get(asked)
        if question is None:
            question = self._questions[asked] = codec.question(body, target)
            if len(self._questions) > MAX_QUESTIONS:
                del self._questions[next(iter(self._questions))]
        return question

    def _scoped_key(self, question: Question, admission: Admission) -> bytes | None:
        """Return the cache key, for this caller only if CACHE_PER_KEY is set.

        None if the answer may be neither stored nor shared.
        """
        settings, cache_key = self.settings, question.key
        if cache_key is None or admission.target.startswith(HOST):
            return None  # that server may have another model of the same name
        if settings.cache_only_deterministic and not question.deterministic:
            return None
        if settings.cache_per_key and admission.key is not None:
            return hashlib.sha256(cache_key + admission.key.scope).digest()
        return cache_key

    # Find or begin the answer.

    def _is_at_hand(self, cache_key: bytes | None, directives: CacheDirectives) -> bool:
        """Return whether a request would generate nothing, if it were decided now."""
        if directives.only_if_cached:
            return True
        if cache_key is None or directives.reload or directives.private:
            return False
        answer = self.cache.get(cache_key)
        if answer is not None and answer.age(time.time()) <= directives.max_age:
            return True
        return self._find_flight(cache_key, directives) is not None

    async def _reserve(self, key: Key | None) -> Reserved:
        """Count a generation for all processes, if they count together."""
        if self.shared_limits is None or key is None or not (key.rate or key.tokens):
            return None
        try:
            return await self.shared_limits.reserve(key)
        except LimitReached as error:
            return error

    async def _decide_within_limits(
        self, head: Head, question: Question, admission: Admission, request_id: bytes
    ) -> Decision:
        """Decide within the limits that all processes count together; see `_decide`."""
        reserved: Reserved = None
        if admission.route.generates and not question.unloads:
            cache_key = self._scoped_key(question, admission)
            if not self._is_at_hand(cache_key, CacheDirectives.of(head)):
                reserved = await self._reserve(admission.key)
        with refunding(reserved):
            return self._decide(head, question, admission, request_id, reserved)

    def _decide(
        self,
        head: Head,
        question: Question,
        admission: Admission,
        request_id: bytes,
        reserved: Reserved = None,
    ) -> Decision:
        """Return the stored answer, the flight to join, or a new flight.

        There is no `await` in here: two identical requests must not both begin a flight.

        Raises:
            HTTPError: 429, 503 the caller may not begin a generation now; 504 the answer is
                not in the cache, and the request has `only-if-cached`.

        """
        directives = CacheDirectives.of(head)
        cache_key = self._scoped_key(question, admission)
        status = b"fwd=bypass"
        if cache_key is not None:
            found = self._look_up(cache_key, directives)
            if isinstance(found, Decision):
                return found
            status = found
            if (flight := self._find_flight(cache_key, directives)) is not None:
                return Decision(Outcome.COLLAPSED, _MISS + b"; collapsed", flight=flight)
        flight_key = None if directives.private else cache_key
        lookup = None if self.shared is None else self._shared_lookup(flight_key, directives)
        outcome = Outcome.BYPASS if cache_key is None else Outcome.MISS
        begin = partial(self._begin, head, question, admission, request_id)
        try:
            if directives.only_if_cached:
                raise HTTPError(
                    504, "the answer is not in the cache, and the request has only-if-cached"
                )
            flight = begin(flight_key, lookup, reserved)
        except HTTPError as error:
            if lookup is None:
                raise
            # Maybe the shared cache has it. Nobody may join: others want it generated if not.
            refusal = HTTPError(error.status, error.message, error.headers)
            outcome, flight = Outcome.REFUSED, begin(None, replace(lookup, refusal=refusal))
        return Decision(outcome, b"OllProx; " + status, flight=flight)

    def _look_up(self, cache_key: bytes, directives: CacheDirectives) -> Decision | bytes:
        """Return the decision to use the stored answer, or why not, for Cache-Status."""
        if directives.reload or directives.private:
            return b"fwd=request"
        answer = self.cache.get(cache_key)
        if answer is None:
            return b"fwd=stale" if self.cache.expire(cache_key) else b"fwd=miss"
        age = answer.age(time.time())
        if age > directives.max_age:
            return b"fwd=request"
        status, headers = _freshness(int(age), int(self.cache.ttl) - int(age))
        return Decision(Outcome.HIT, status, answer, headers)

    def _shared_lookup(
        self, flight_key: bytes | None, directives: CacheDirectives
    ) -> Lookup | None:
        """Return what may be looked up in the shared cache."""
        if flight_key is None or directives.reload:
            return None
        return Lookup(flight_key, directives.max_age)

    def _find_flight(self, cache_key: bytes, directives: CacheDirectives) -> Flight | None:
        """Return the flight that a request may join, if there is one."""
        if directives.reload or directives.private:
            return None
        return self.flights.find(cache_key, directives.max_age)

    def _begin(
        self,
        head: Head,
        question: Question,
        admission: Admission,
        request_id: bytes,
        flight_key: bytes | None,
        lookup: Lookup | None,
        reserved: Reserved = None,
    ) -> Flight:
        """Begin a flight and charge the caller's key. Raises HTTPError 429, 503."""
        route, model = admission.route, normalize_model(question.model)
        permit, wanted = None, lookup is None or lookup.refusal is None
        if wanted and route.generates and not question.unloads and admission.key is not None:
            if isinstance(reserved, LimitReached):
                raise reserved
            permit = self.permits.admit(admission.key, model, len(question.body), reserved)
        cacheable = question.key is not None
        # The body is sent decompressed.
        via = head.get(b"via")
        headers = forwarded(via) if cacheable else _passed_on(head, without=_DECODED)
        headers += ((b"X-Request-ID", request_id),)
        return self.flights.begin(
            flight_key,
            Ask(
                head.method,
                admission.target,
                headers,
                question.body,
                model=model,
                ticket=permit.ticket if permit is not None else None,
                lookup=lookup,
            ),
            route.codec.notes if route.codec else progress_notes,
            partial(self._store, flight_key) if flight_key is not None else None,
            permit,
        )

    def _hit(
        self, answer: StoredAnswer, age: Headers, question: Question, record: Record
    ) -> Response:
        if question.folds and not answer.object:
            record.outcome = Outcome.REFUSED
            raise too_large_error(self.settings.max_object_bytes)
        record.headers += age
        record.usage = answer.usage
        headers = unpack(answer.packed)
        if question.folds:
            return Response(200, as_object(headers), answer.object)
        return Response(200, headers, answer.body)

    async def _upload(self, request: Request, admission: Admission, record: Record) -> Response:
        """Stream a request's body through unread, and relay the response."""
        head, route = request.head, admission.route
        limit = self.settings.max_body_bytes if route.upload is Upload.LIMITED else None
        if limit is not None and (head.length or 0) > limit:
            raise too_large(limit)
        permit = None
        if route.generates and admission.key is not None:
            permit = await self._admit_upload(admission.key)
        change = ModelChange(self.models) if route.manages else None
        pieces = request.pieces() if limit is None else request.pieces(limit)
        body = pieces if change is None else _noted(pieces, change)
        headers = (*_passed_on(head), (b"X-Request-ID", record.request_id))
        ticket = permit.ticket if permit is not None else None
        ask = Ask(
            head.method,
            admission.target,
            headers,
            body if head.has_body else b"",
            head.length,
            ticket=ticket,
        )
        record.outcome, record.cache_status = Outcome.BYPASS, b"OllProx; fwd=bypass"
        flight = self.flights.begin(None, ask, progress_notes, None, permit)
        response = self._replay(flight.join(), route.form, record)
        return await (response if change is None else change.settled(response))

    async def _admit_upload(self, key: Key) -> Permit:
        """Let a generation begin whose prompt is not read. Raises HTTPError 429, 503."""
        reserved = await self._reserve(key)
        if isinstance(reserved, LimitReached):
            raise reserved
        with refunding(reserved):
            return self.permits.admit(key, "", 0, reserved)

    def _store(self, cache_key: bytes, flight: Flight) -> bool:
        """Store a complete answer; return whether it was stored."""
        answer = stored_answer(flight, flight.whole(), self.models.digest(flight.model))
        if answer is None or answer.size > self.settings.cache_max_entry_bytes:
            return False
        if self.shared is not None and flight.source is Source.GENERATED:
            self.shared.store(cache_key, answer, flight.began)
        return self.cache.put(cache_key, answer)

    def _heartbeat(self, route: Route, question: Question) -> float:
        """Return the seconds until a comment; 0 where anything but events may be the answer."""
        only_events = route.streams_events and question.stream and not question.ambiguous
        return self.settings.heartbeat if only_events else 0.0

    async def _change_list(self, response: Response, head: Head, admission: Admission) -> None:
        """Change a list of models, or the description of one. Raises HTTPError 502."""
        route, key = admission.route, admission.key
        aliases = self.settings.model_aliases if route.lists_aliases else ()
        restricted = key is not None and key.models is not None
        if route.lists and (aliases or restricted):
            may_use = key.may_use if key is not None and restricted else None
            await change_list(response, route.lists, may_use, aliases)
        if route.names_model and admission.target != head.path:
            await rename_model(
                response, unquote(head.path.removeprefix(route.target or b"").decode())
            )

    async def _replay(
        self, reader: Reader, form: Form, record: Record, heartbeat: float = 0.0
    ) -> Response:
        """Replay a flight to its reader, and record the result."""
        flight = reader.flight
        try:
            response = await replay(reader, form, heartbeat)
        finally:
            if flight.permit is not None:
                record.queued = _queued(flight.permit, record)
        if flight.cache_status:
            self._note_source(flight, record)
        is_late = flight.born is None  # a heartbeat came before the head: it may still be queued
        ended = isinstance(response.body, bytes)  # else it is not known yet if it is stored
        if ended and flight.stored and record.outcome is Outcome.MISS:
            record.cache_status += b"; stored"
        if record.queued is not None and not is_late:
            duration = b"queue;dur=%.1f" % (record.queued * 1000)
            record.headers += ((b"Server-Timing", duration),)

        def release() -> None:
            record.shared = record.outcome is Outcome.COLLAPSED and reader.has_all
            record.usage = flight.usage
            if flight.ending is None and flight.notes is not None and reader.has_all:
                record.usage = flight.notes.usage  # it leaves before the end of the body
            if is_late:
                self._note_late(flight, record)
            reader.leave()

        response.release = release
        return response

    def _note_late(self, flight: Flight, record: Record) -> None:
        """Record what was not known when the response's head was sent."""
        if flight.permit is not None:
            record.queued = _queued(flight.permit, record)
        if flight.source is Source.SHARED_CACHE:
            self._note_source(flight, record)

    def _note_source(self, flight: Flight, record: Record) -> None:
        """Note in the record what the shared cache says of an answer."""
        record.cache_status = flight.cache_status + b", " + record.cache_status
        if flight.source is Source.SHARED_CACHE and flight.born is not None:
            record.headers += ((b"Age", b"%d" % max(0, time.time() - flight.born)),)
            if record.outcome is not Outcome.COLLAPSED:
                record.outcome = Outcome.HIT


NO_ROUTE = Record.route
_MISS = b"OllProx; fwd=miss"
# Headers that are not forwarded: they concern this connection or identify the client, or they
# would let Ollama compress the answer, which OllProx must read.
_STOPPED = frozenset(
    b"host expect via origin referer cookie proxy-authorization accept-encoding forwarded"
    b" x-real-ip x-request-id".split()
)
_DECODED = frozenset({b"content-encoding"})
_METHODS = {m: m.decode() for m in (b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"OPTIONS")}
_NO_QUESTION = Question(b"", "", None, stream=False, relayed=True, deterministic=True)


@lru_cache(maxsize=1024)
def _freshness(age: int, ttl: int) -> tuple[bytes, Headers]:
    """Return a hit's Cache-Status and Age, from its age and the time it has left in seconds."""
    return b"OllProx; hit; ttl=%d" % ttl, ((b"Age", b"%d" % age),)


def _check_model(key: Key, question: Question, admission: Admission) -> None:
    """Check that the key may use the model. Raises HTTPError 403."""
    route, model = admission.route, question.model
    if route.names_model:
        model = unquote(admission.target.rpartition(route.target or b"")[2].decode())
    elif route.codec is None:
        return
    if question.ambiguous or not key.may_use(normalize_model(model)):
        raise HTTPError(
            403, "this API key may not use this model; GET /api/tags lists those that it may use"
        )


def _queued(permit: Permit, record: Record) -> float | None:
    """Return the seconds that a request was queued; None if it takes no turn."""
    if permit.ticket is None:
        return None
    return max(0.0, min(permit.ticket.waited(), time.monotonic() - record.started))


async def _noted(pieces: AsyncIterator[bytes], change: ModelChange) -> AsyncIterator[bytes]:
    """Pass a body on, and show it to `change`."""
    async for piece in pieces:
        change.note(piece)
        yield piece


def _passed_on(head: Head, *, without: frozenset[bytes] = frozenset()) -> Headers:
    """Return the client's headers to forward, for an answer that only this client gets."""
    kept = end_to_end(head.headers, without=_STOPPED | without)
    passed = (pair for pair in kept if not pair[0].startswith(b"x-forwarded-"))
    return (*passed, *add_via(head.get(b"via")))
