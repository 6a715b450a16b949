"""Decide how each request is answered: whether it is let in, and from where its answer comes.

Read `Proxy.handle` first.
"""

import asyncio
import hashlib
import logging
import math
import re
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import answers.ollama_api as api
from answers.flight import Flight, Flights, Reader
from answers.notes import JSON, NDJSON, SSE, BaseNotes, content_type, progress_notes
from answers.ollama_api import Access, Form, Question, Route, RouteTable
from answers.stored import StoredAnswer
from cache import Cache
from keystore import MAX_WRONG, KeyStore, WrongKeys
from record import Record
from settings import Settings
from watch.telemetry import MAX_SHOWN
from wire.http11 import (
    MAX_FRAMED,
    Ask,
    Head,
    Headers,
    HTTPError,
    Request,
    Response,
    Truncated,
    end_to_end,
    pack,
    stored_headers,
    unpack,
)
from wire.upstream import VIA, Upstream, add_via, forwarded, loop_error, sent_by_us

log = logging.getLogger("ollprox")

MAX_QUESTIONS = 512  # small bodies whose question is remembered
MAX_KNOWN_BODY = 2048  # bytes of such a body
MAX_AT_ONCE = 1 << 20  # bytes of a body that is parsed while all others wait


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a request says of caching (RFC 9111 section 5.2.1)."""

    max_age: float = math.inf  # seconds that an answer may be old
    reload: bool = False  # `no-cache`: nothing that is there already
    private: bool = False  # `no-store`: nothing is kept or shared
    only_if_cached: bool = False

    @classmethod
    def of(cls, head: Head) -> "Wishes":
        """Read them off a head; Pragma counts where there is no Cache-Control."""
        if head.names.isdisjoint(_WISHES):
            return _NO_WISHES
        value = head.get(b"cache-control")
        if value is None:
            value = head.get(b"pragma") or b""
        said = {part.strip(b" \t").lower() for part in value.split(b",")}
        ages = [match[1] for part in said if (match := _MAX_AGE.fullmatch(part))]
        max_age = min(map(int, ages)) if ages else math.inf
        return cls(
            max_age=max_age,
            reload=b"no-cache" in said or max_age == 0,
            private=b"no-store" in said,
            only_if_cached=b"only-if-cached" in said,
        )


_NO_WISHES = Wishes()
_WISHES = frozenset({b"cache-control", b"pragma"})
_MAX_AGE = re.compile(rb'max-age="?(\d{1,9})"?')


class Proxy:
    """How requests are answered.

    Args:
        settings: what the user chose.
        keys: which API keys are valid.
        upstream: Ollama.
        routes: what is known of Ollama's API.
        cache: the stored answers.
        flights: the answers under way.
        own: answers what OllProx answers by itself: by a page's name, for a key's label.

    """

    def __init__(
        self,
        settings: Settings,
        keys: KeyStore,
        upstream: Upstream,
        routes: RouteTable,
        cache: Cache[StoredAnswer],
        flights: Flights,
        own: Callable[[str, Head, str], Awaitable[Response]],
    ) -> None:
        self.settings = settings
        self.keys = keys
        self.upstream = upstream
        self.routes = routes
        self.cache = cache
        self.flights = flights
        self.own = own
        self.models_changed = asyncio.Event()  # a model was managed: read the digests again
        self._folding = asyncio.Lock()  # one large stream at a time
        self._questions: dict[bytes, Question] = {}  # by the SHA-256 of path and body
        self._wrong_keys = WrongKeys()

    async def handle(self, request: Request, record: Record) -> Response:
        """Answer a request. The head decides who is let in; then the body is read."""
        head = request.head
        record.method = _METHODS.get(head.method, "other")
        record.headers = self._cors(head) if self.settings.cors_origins else ()
        if head.method == b"OPTIONS" and record.headers:
            record.own = True
            return self._preflight(head)
        route, target = self._admit(head, record)
        if route.own:
            return await self.own(route.own, head, record.label or "")
        record.headers += VIA
        if route.access is Access.ADMIN:
            return await self._manage(request, target, record)
        question = await self._read_question(route, request)
        record.model = question.model or "-"
        wishes = Wishes.of(head)
        key = self._scoped_key(question, record)
        answer = self._look_up(key, wishes, record) if key is not None else None
        if key and answer and question.folds and not answer.object:
            answer = await self._fold(key, answer, route, record)
        if answer is not None:
            return self._hit(answer, question, record)
        flight = self._join_or_begin(key, wishes, question, head, route, target, record)
        reader = flight.join(folds=question.folds)
        return await self._replay(reader, question, route.form, record)

    def render_error(self, error: HTTPError, head: Head | None, record: Record) -> Response:
        """Write an error in the form of the API that was called."""
        form = Form.OLLAMA if head is None else self.routes.form(head.path)
        body = error.body or form.body(error.status, error.message)
        return Response(error.status, ((b"Content-Type", JSON), *error.headers), body)

    # Who gets in, and what is asked.

    def _admit(self, head: Head, record: Record) -> tuple[Route, bytes]:
        """Check key, path and method by the head alone; return the route and its target."""
        if b"via" in head.names and sent_by_us(head.get(b"via") or b""):
            raise loop_error()
        found = self.routes.find(head.path)
        if found is None:
            self._authenticate(head, record)
            hint = self.routes.hint(head.path)
            raise HTTPError(404, f"OllProx has no such path{hint}; see the README for those it has")
        route, target = found
        record.path = head.path[:MAX_SHOWN].decode()
        record.route = (
            head.path if head.path in self.routes.rows else route.target or b""
        ).decode()
        record.own, record.asks = route.own != "", route.asks
        record.quiet = route.access is Access.OPEN
        if head.method == b"OPTIONS":
            raise _wrong_method(route)  # a browser that may not ask; no key comes with it
        label = "" if route.access is Access.OPEN else self._authenticate(head, record)
        if head.method not in route.methods:
            raise _wrong_method(route)
        if route.access is Access.ADMIN and label not in self.settings.admin_labels:
            raise HTTPError(
                403,
                "managing models and the cache is for keys whose label is in ADMIN_LABELS;"
                " ask the operator",
            )
        return route, target

    def _authenticate(self, head: Head, record: Record) -> str:
        """Return the label of the caller's key. Raises HTTPError 401."""
        digest = head.credential
        wrong = "there is no API key"
        if digest is not None:
            label = self.keys.labels.get(digest)
            record.caller, record.label = label or digest.hex()[:8], label
            if label is not None:
                return label
            wrong = "the API key is not valid"
        record.wrong_key = True
        if digest is not None:
            self._slow_down(record)
        here = f"{self.settings.listen_scheme}://localhost:{self.settings.listen_port}"
        raise HTTPError(
            401,
            f"{wrong}: send yours in a header, as in curl -H 'APIKEY: <your key>'"
            f" {here}/call_model -d"
            """ '{"model": "llama2", "prompt": "Hello"}'""",
            _CHALLENGES,
        )

    def _slow_down(self, record: Record) -> None:
        """Count a wrong key. Raises HTTPError 429 beyond a few a minute from one address."""
        count, left = self._wrong_keys.count(record.client)
        if count == MAX_WRONG + 1:
            log.warning("%s has sent %d wrong API keys within a minute", record.client, count)
        if count > MAX_WRONG:
            raise HTTPError(
                429,
                "too many wrong API keys from this address; a valid one is served at once",
                ((b"Retry-After", b"%d" % math.ceil(left)),),
            )

    def _cors(self, head: Head) -> Headers:
        """Return the headers that let a listed origin's page read the response."""
        origins = self.settings.cors_origins
        origin = head.get(b"origin")
        if origin is None or ("*" not in origins and origin.decode("latin-1") not in origins):
            return ()
        return (
            (b"Access-Control-Allow-Origin", origin),
            (b"Access-Control-Expose-Headers", b"Cache-Status, Age, X-Request-ID"),
            (b"Vary", b"Origin"),
        )

    def _preflight(self, head: Head) -> Response:
        """Answer what a browser asks before a request; no key comes with it."""
        found = self.routes.find(head.path)
        methods = b", ".join(found[0].methods) if found else b"GET, POST"
        wanted = head.get(b"access-control-request-headers") or b""
        allowed = [
            (b"Access-Control-Allow-Methods", methods),
            (b"Access-Control-Max-Age", b"600"),
        ]
        if _HEADER_NAMES.fullmatch(wanted):
            allowed.append((b"Access-Control-Allow-Headers", wanted))
        return Response(204, tuple(allowed), b"")

    async def _read_question(self, route: Route, request: Request) -> Question:
        """Read the body and what it asks, where the route has one."""
        head, codec = request.head, route.codec
        if codec is None:
            return _NO_QUESTION
        if head.length is None and not head.chunked:
            raise HTTPError(411, "send the body with a Content-Length, or chunked")
        body = await request.read(self.settings.max_body_bytes)
        if len(body) > MAX_AT_ONCE:
            return await asyncio.to_thread(_question_at_length, route, codec, body)
        return self._question(route, codec, head.path, body)

    def _question(self, route: Route, codec: api.Codec, path: bytes, body: bytes) -> Question:
        """Read what a body asks; small ones that came before are known."""
        if len(body) > MAX_KNOWN_BODY:
            return codec.question(body, route)
        index = hashlib.sha256(path + b"\n" + body).digest()
        question = self._questions.get(index)
        if question is None:
            question = self._questions[index] = codec.question(body, route)
            if len(self._questions) > MAX_QUESTIONS:
                del self._questions[next(iter(self._questions))]
        return question

    def _scoped_key(self, question: Question, record: Record) -> bytes | None:
        """Return the cache key in its scope; None where nothing may be kept or shared."""
        key, settings = question.key, self.settings
        if settings.cache_only_deterministic and not question.deterministic:
            return None
        if key is not None and settings.cache_per_key:
            return hashlib.sha256(key + record.caller.encode()).digest()
        return key

    # What is there already.

    def _look_up(self, key: bytes, wishes: Wishes, record: Record) -> StoredAnswer | None:
        """Look in the cache; say in the record what came of it."""
        record.outcome, record.cache_status = "miss", b"OllProx; fwd=miss"
        if wishes.reload or wishes.private:
            record.cache_status = b"OllProx; fwd=request"
            return None
        answer = self.cache.get(key)
        if answer is None:
            if self.cache.expire(key):
                record.cache_status = b"OllProx; fwd=stale"
            return None
        if time.monotonic() - answer.born > wishes.max_age:
            record.cache_status = b"OllProx; fwd=request"
            return None
        return answer

    def _hit(self, answer: StoredAnswer, question: Question, record: Record) -> Response:
        age = int(time.monotonic() - answer.born)
        ttl = max(0, int(self.cache.ttl) - age)
        record.outcome, record.cache_status = "hit", b"OllProx; hit; ttl=%d" % ttl
        record.headers += ((b"Age", b"%d" % age),)
        record.usage = answer
        headers = unpack(answer.packed)
        if question.folds:
            return Response(200, _as_object(headers), answer.object)
        return Response(200, headers, answer.body)

    async def _fold(
        self, key: bytes, answer: StoredAnswer, route: Route, record: Record
    ) -> StoredAnswer | None:
        """Fold a stored stream for the first who wants one object, and keep that too.

        What is no whole answer is kept no longer: None.

        Raises:
            HTTPError: 502 if it is too large for one object; the stream is still kept.

        """
        fold = partial(api.fold, route.codec, unpack(answer.packed), answer.body)
        try:
            if len(answer.body) <= MAX_AT_ONCE:
                return self._keep_fold(key, answer, fold())
            async with self._folding:  # each takes long, and as much memory again
                there = self.cache.get(key)
                if there is not None and there.object and there.born == answer.born:
                    return there  # somebody else wanted the same
                return self._keep_fold(key, answer, await asyncio.to_thread(fold))
        except HTTPError:
            record.outcome = "-"
            raise

    def _keep_fold(
        self, key: bytes, answer: StoredAnswer, folded: bytes | None
    ) -> StoredAnswer | None:
        """Keep a stored stream's fold with it; without one, drop it."""
        whole = None if folded is None else answer._replace(object=folded)
        if self.cache.get(key) is answer:  # else it was dropped meanwhile, or there is a newer one
            if whole is None:
                self.cache.remove(key)
            elif whole.size <= self.settings.cache_max_entry_bytes:
                self.cache.put(key, whole)
        return whole

    # What has to be asked.

    def _join_or_begin(
        self,
        key: bytes | None,
        wishes: Wishes,
        question: Question,
        head: Head,
        route: Route,
        target: bytes,
        record: Record,
    ) -> Flight:
        """Find a flight to join, or begin one; at once, or two might begin the same."""
        shared = not (wishes.reload or wishes.private)
        if key and shared and (flight := self.flights.find(key, wishes.max_age)) is not None:
            record.outcome, record.cache_status = "collapsed", b"OllProx; fwd=miss; collapsed"
            return flight
        if wishes.only_if_cached:
            record.outcome = "-"
            raise HTTPError(504, "the answer is not in the cache, and only-if-cached was asked")
        if key is None:
            record.outcome, record.cache_status = "bypass", b"OllProx; fwd=bypass"
        if wishes.private:
            key = None
        own = question.key is None
        headers = _passed_on(head) if own else forwarded(head.get(b"via"))
        headers += ((b"X-Request-ID", record.request_id),)
        return self.flights.begin(
            key,
            self.upstream.exchange,
            Ask(head.method, target, headers, question.body, model=api.normalised(question.model)),
            route.codec.notes if route.codec else progress_notes,
            partial(self._store, key, question) if key is not None else None,
            record.label if route.asks else None,
        )

    async def _manage(self, request: Request, target: bytes, record: Record) -> Response:
        """Pass a request that manages models on as it comes, and its progress back."""
        head = request.head
        record.outcome, record.cache_status = "bypass", b"OllProx; fwd=bypass"
        body = request.pieces() if head.has_body else bytes
        headers = (*_passed_on(head), (b"X-Request-ID", record.request_id))
        ask = Ask(head.method, target, headers, body, head.length)
        flight = self.flights.begin(None, self.upstream.exchange, ask, progress_notes, None)
        response = await self._replay(flight.join(), _NO_QUESTION, Form.OLLAMA, record)
        leave = response.release

        def release() -> None:
            self.models_changed.set()
            if leave is not None:
                leave()

        response.release = release
        return response

    def _store(self, key: bytes, question: Question, flight: Flight) -> bool:
        """Keep a complete answer; tell whether it was kept."""
        notes = flight.notes
        body = flight.whole()
        if flight.status != 200 or not isinstance(notes, BaseNotes) or not notes.keeps(body):
            return False
        if flight.grounded:  # since its response came: it was meant for one client
            return False
        folded = body if question.relayed else b""
        try:
            if notes.folding:
                folded = notes.fold()
        except HTTPError:
            return False
        if flight.born is None:
            return False
        headers, model = pack(stored_headers(flight.headers)), sys.intern(flight.model)
        answer = StoredAnswer(headers, body, folded, model, flight.born, *flight.usage)
        if answer.size > self.settings.cache_max_entry_bytes:
            return False
        return self.cache.put(key, answer)

    async def _replay(
        self, reader: Reader, question: Question, form: Form, record: Record
    ) -> Response:
        """Read a flight's tape as its client wants it; the response's release leaves it."""
        try:
            response = await self._read_tape(reader, question, form, record)
        except BaseException:
            reader.leave()
            raise

        def release() -> None:
            record.shared = record.outcome == "collapsed" and reader.has_all
            reader.leave()

        response.release = release
        return response

    async def _read_tape(
        self, reader: Reader, question: Question, form: Form, record: Record
    ) -> Response:
        await reader.head()
        flight = reader.flight
        kind = content_type(flight.headers)
        lines = kind.startswith((NDJSON, SSE))
        if lines and flight.status == 200 and question.folds:
            folded = await reader.fold()
            _say_stored(flight, record)
            return Response(200, _as_object(flight.headers), folded)
        if lines:
            return Response(flight.status, flight.headers, _stream(reader, form, kind))
        reader.take_pieces()
        body = await reader.whole()  # so that what breaks it is still an error
        if body is None:  # too large: as it comes
            return Response(flight.status, flight.headers, _relayed(reader), flight.length)
        _say_stored(flight, record)
        return Response(flight.status, flight.headers, body, flight.length)


# Headers that go no further: they are about this connection, or about who the client is;
# and codings, in which OllProx could not read an answer.
_STOPPED = frozenset(
    b"host expect via origin referer cookie proxy-authorization accept-encoding forwarded"
    b" x-real-ip x-request-id".split()
)
_CHALLENGES: Headers = (  # two fields: some clients do not understand both in one
    (b"WWW-Authenticate", b'Basic realm="OllProx"'),
    (b"WWW-Authenticate", b"Bearer"),
)
_METHODS = {m: m.decode() for m in (b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"OPTIONS")}
_HEADER_NAMES = re.compile(rb"[\w!#$%&'*+.^`|~, -]+", re.ASCII)
_NO_QUESTION = Question(bytes, "", None, stream=False, relayed=True, deterministic=True)


def _question_at_length(route: Route, codec: api.Codec, body: bytes) -> Question:
    """Read a large body's question, and write the body anew, in a thread.

    The interpreter's lock is held by each step, but let go between them.
    """
    question = codec.question(body, route)
    written = question.body()
    question.body = lambda: written
    return question


def _passed_on(head: Head) -> Headers:
    """Return what upstream gets of a client's headers, where its answer is the client's alone."""
    kept = end_to_end(head.headers, without=_STOPPED)
    passed = (pair for pair in kept if not pair[0].startswith(b"x-forwarded-"))
    return (*passed, *add_via(head.get(b"via")))


def _wrong_method(route: Route) -> HTTPError:
    allowed = b", ".join(route.methods)
    return HTTPError(405, f"this path takes only {allowed.decode()}", ((b"Allow", allowed),))


@lru_cache(maxsize=MAX_FRAMED)
def _as_object(headers: Headers) -> Headers:
    """Give the headers of a stream the type of a single object."""
    rest = tuple(pair for pair in headers if pair[0].lower() != b"content-type")
    return ((b"Content-Type", JSON), *rest)


def _say_stored(flight: Flight, record: Record) -> None:
    if flight.stored and record.outcome == "miss":
        record.cache_status += b"; stored"


async def _stream(reader: Reader, form: Form, kind: bytes) -> AsyncIterator[bytes]:
    """Replay lines; where upstream breaks off, say so in a last one and stay cut."""
    last = b"\n"
    try:
        async for piece in reader.pieces():
            yield piece
            last = piece[-1:]
    except HTTPError as error:
        notes = reader.flight.notes
        if notes is None or not notes.reported:  # else Ollama has said why
            yield (b"" if last == b"\n" else b"\n") + form.line(kind, error.message)
        raise Truncated from error


async def _relayed(reader: Reader) -> AsyncIterator[bytes]:
    """Replay a body that has no lines; where upstream breaks off, it stays cut."""
    try:
        async for piece in reader.pieces():
            yield piece
    except HTTPError as error:
        raise Truncated from error
