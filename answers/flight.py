"""Share one exchange with upstream among identical requests.

A flight is a tape: one task, the recorder, records what upstream sends, and each reader replays
it at its own pace. A flight knows neither HTTP's framing nor Ollama's API: its `Notes` know what
an answer means. A flight that is grounded continues for its readers, but nobody else can join it
and its answer is not stored.

The tape is a window. The recorder runs ahead of its readers until the window is full. It then
waits for the readers of pieces, but not for those that only want the fold. While it waits, a
reader that takes nothing for `Timeouts.write` seconds is dropped, so that it cannot hold up the
others. The server's own write timeout covers a reader that holds up only itself.
"""

import asyncio
import enum
import itertools
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from answers.notes import REPORTED, Notes
from answers.permits import Permit
from cache import Budget
from record import NO_USAGE
from wire.http11 import Ask, Exchange, Headers, HTTPError, Response, Truncated

log = logging.getLogger("ollprox.flight")

MAX_LINE = 32 << 20  # bytes of a line; a longer one is relayed in parts
SLICE = 256 << 10  # bytes that a reader takes from the tape at once
PIECE_OVERHEAD = 64  # bytes charged for a piece beyond its length: object and list slot

MakeNotes = Callable[[Response], Notes]
"""Makes the notes for an answer, depending on the response's head."""

_numbers = itertools.count(1)


class Ending(enum.Enum):
    """How a flight has ended."""

    COMPLETE = "upstream sent the complete answer"
    INCOMPLETE = "an orderly end without the last line: Ollama's repeat guard"
    FAILED = "upstream was unreachable or too slow, broke off, or reported an error"
    ABANDONED = "the last reader left"


class Source(enum.Enum):
    """Where an answer comes from."""

    GENERATED = "generated"
    SHARED_CACHE = "shared cache"


class Wants(enum.Enum):
    """What a reader wants from the tape."""

    PIECES = "each piece in turn; the recorder stays at most a window ahead"
    FOLD = "the answer as a single object, at its end; this reader never delays others"
    NOTHING = "the reader was dropped, because it was too slow for the others"


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long flights wait, in seconds.

    Attributes:
        write: for a reader that delays others (WRITE_TIMEOUT).
        idle: for the next piece (IDLE_TIMEOUT).
        object: for a fold, or a body without lines, from its request on (FIRST_BYTE_TIMEOUT);
            longer while pieces arrive.

    """

    write: float = math.inf
    idle: float = math.inf
    object: float = math.inf


class Flight:
    """One exchange with upstream, and its tape.

    Args:
        flights: the registry of flights.
        key: identifies the answer; None for a flight that cannot be joined.
        ask: the request to upstream.
        notes: makes the notes for the answer.
        store: stores a complete answer; returns True if it did. None to store nothing.
        permit: the permit of a generation; None if no model generates the answer.

    """

    def __init__(
        self,
        flights: "Flights",
        key: bytes | None,
        ask: Ask,
        notes: MakeNotes,
        store: Callable[["Flight"], bool] | None,
        permit: Permit | None,
    ) -> None:
        self.key = key
        self.model = ask.model
        self.permit = permit
        self.number = next(_numbers)
        self.began = time.monotonic()
        self.source = Source.GENERATED
        self.stored = False
        self.status = 0
        self.headers: Headers = ()
        self.length: int | None = None
        self.notes: Notes | None = None  # set when the response's head arrives
        self.born: float | None = None  # when that head first came, in seconds since 1970
        self.cache_status = b""  # what the shared cache says of it
        # Seconds that the answer may be old when it arrives; a new one is not old.
        self.may_be_old = ask.lookup.max_age if ask.lookup is not None else 0.0
        self.usage = NO_USAGE  # set at its end
        self.ending: Ending | None = None
        self.error: HTTPError | None = None
        self.start = 0  # index of the first piece on the tape
        self.readers: set[Reader] = set()
        self.served = 0  # readers that left before its end with the complete answer
        self._flights = flights
        self._make_notes = notes
        self._store = store
        self._pieces: list[bytes] = []
        self._joined: tuple[int, bytes] | None = None  # a number of pieces, and those joined
        self._size = 0  # bytes on the tape
        self._held = 0  # bytes of the budget held by the notes
        self._room: asyncio.Future[None] | None = None  # set while the recorder waits
        self._heard = 0, 0.0  # the tape's end at the last check, and when it was first seen there
        # The ask is the flight's alone. It refers to the flight, so the flight must not refer to
        # it: a cycle.
        ask.whole_wanted = self.is_whole_wanted
        self._task: asyncio.Task[None] | None = asyncio.get_running_loop().create_task(
            self._record(ask)
        )

    @property
    def joinable(self) -> bool:
        """True if a reader that joins now would get all of the answer."""
        return self.start == 0 and self.ending is None

    @property
    def end(self) -> int:
        """The index after the last piece on the tape."""
        return self.start + len(self._pieces)

    @property
    def is_full(self) -> bool:
        """True while the recorder waits for its readers."""
        return self._room is not None

    def join(self, wants: Wants = Wants.PIECES) -> "Reader":
        """Return a reader at the tape's start; the caller must `leave` in the end."""
        reader = Reader(self, wants)
        if self.notes is not None:
            reader.choose(self.notes)
        self.readers.add(reader)
        if self.is_full:
            self.wake_recorder()  # a blocking reader now delays another one too
        return reader

    def leave(self, reader: "Reader") -> None:
        """Remove a reader; abort the exchange if it was the last one."""
        self.readers.discard(reader)
        self.served += self.ending is None and reader.has_all
        if not self.readers:
            self._abandon()
        self.wake_recorder()

    def since(self, position: int) -> list[bytes]:
        """Return the pieces from `position` on, up to `SLICE` bytes or one piece."""
        first = last = position - self.start
        size = 0
        while last < len(self._pieces) and size < SLICE:
            size += len(self._pieces[last])
            last += 1
        return self._pieces[first:last]

    def whole(self) -> bytes:
        """Return the tape as one piece, which all callers share."""
        if self._joined is None or self._joined[0] != len(self._pieces):
            self._joined = len(self._pieces), b"".join(self._pieces)
        return self._joined[1]

    def wake_recorder(self) -> None:
        """Make the recorder check for room again."""
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    def store_nothing(self) -> None:
        """Do not store the answer."""
        self._store = None

    def is_whole_wanted(self) -> bool:
        """Return True if a reader waits for the whole; then `check_silence` has the timeouts."""
        return any(reader.wants_whole for reader in self.readers)

    def check_silence(self, now: float) -> None:
        """End waits for upstream that take too long. Call it about once a second.

        Each reader has its own limit. If all readers have waited too long, the flight fails.
        """
        end, since = self._heard
        if end != self.end or self.is_full or not since:  # not upstream's silence
            self._heard = self.end, now
            return
        timeouts = self._flights.timeouts
        late = [reader for reader in self.readers if now > reader.patience(since, timeouts)]
        if not late:
            return
        message = (
            f"Ollama sent nothing more of its answer within {now - since:.0f} s. Check that it is"
            " not overloaded; IDLE_TIMEOUT and FIRST_BYTE_TIMEOUT set how long OllProx waits."
        )
        error = HTTPError(504, message, kind="timeout")
        if len(late) == len(self.readers):
            self._fail(error)
        for reader in late:
            reader.fail(error)

    def _abandon(self) -> None:
        """End the exchange because nobody reads. An answer that is finished is stored."""
        if self.ending is None:
            finished = self.notes is not None and self.notes.finished
            self._finish(Ending.COMPLETE if finished else Ending.ABANDONED)
        if self._task is not None:
            self._task.cancel()
            self._task = None  # its exception refers to frames, and they to the flight: a cycle
        self._flights.budget.release(self._size + self._held)
        self._size = self._held = 0
        self._pieces, self._joined = [], None

    async def _record(self, ask: Ask) -> None:
        try:
            async with self._flights.exchange(ask) as response:
                self.notes = notes = self._make_notes(response)
                self.status, self.headers = response.status, response.headers
                self.length = response.length
                self.born, self.cache_status = self._flights.clock(), response.cache_status
                if response.born is not None or not response.storable:
                    self._note_origin(response)
                for reader in self.readers:
                    reader.choose(notes)
                self._wake_readers(everyone=True)
                assert not isinstance(response.body, bytes)
                cutter = _Cutter(notes)
                async for data in response.body:
                    if piece := cutter.cut(data):
                        await self._append(piece, notes)
                if piece := cutter.rest():
                    await self._append(piece, notes)
                self._finish(Ending.COMPLETE if notes.close() else Ending.INCOMPLETE)
        except HTTPError as error:
            self._fail(error)
        except Exception:
            log.exception("a flight failed because of a bug in OllProx")
            self._fail(HTTPError(500, "OllProx failed; its log has the details"))

    def _note_origin(self, response: Response) -> None:
        """Note that the answer is meant for one client, or was generated before."""
        if not response.storable:
            self._flights.ground_one(self)
        if response.born is not None:
            self.source, self.born = Source.SHARED_CACHE, response.born
            if self.permit is not None:  # nothing is generated
                self.permit.give_back()
                self.permit = None

    def _fail(self, error: HTTPError) -> None:
        notes = self.notes
        if notes is not None and notes.finished:
            self._finish(Ending.COMPLETE)  # only the body's end was missing
        elif self.ending is None:
            if notes is not None and notes.error is not None:
                error = notes.error  # it explains what happened later
            self.error = error
            if error.kind not in {"", REPORTED}:  # access lines do not show these
                log.warning("an answer failed: %s", error.message)
            self._finish(Ending.FAILED)

    def _finish(self, ending: Ending) -> None:
        """Set the ending: store the answer first, announce the end last."""
        if self.ending is not None:
            return
        if self.notes is not None:
            self.usage = self.notes.usage
        if ending is Ending.COMPLETE and self.start == 0 and self._store is not None:
            self._store_answer(self._store)
        self.ending = ending
        self._flights.remove(self)
        if self.permit is not None:
            self.permit.end(self.usage)
        self._flights.ended(self)
        self._wake_readers(everyone=True)

    def _store_answer(self, store: Callable[["Flight"], bool]) -> None:
        budget, size = self._flights.budget, self._size + self._held
        budget.release(size)  # the stored answer shares the bytes of the tape
        try:
            self.stored = store(self)
        except Exception:
            log.exception("an answer could not be stored because of a bug in OllProx")
        if self.stored:
            self._flights.ground_older(self)
        budget.reserve(size, must=True)

    async def _append(self, piece: bytes, notes: Notes) -> None:
        size = len(piece) + PIECE_OVERHEAD
        if not self._make_room(size):
            await self._wait_for_room(size)
        # No `await` until it is noted: a reader that joins or leaves must find both or neither.
        self._pieces.append(piece)
        self._size += size
        notes.feed(piece)
        if self.start and notes.foldable and not notes.too_large and not self.is_whole_wanted():
            notes.drop_fold()  # nobody can join any more, and the answer will not be stored
        self._flights.budget.reserve(notes.held - self._held, must=True)
        self._held = notes.held
        self._wake_readers(everyone=notes.too_large)

    async def _wait_for_room(self, size: int) -> None:
        """Wait until there is room for a piece; drop readers that delay the others too long."""
        loop = asyncio.get_running_loop()
        stuck: set[Reader] = set()  # they have taken nothing since the deadline was set
        deadline = 0.0
        try:
            while not self._make_room(size):
                blocking = {reader for reader in self._piece_readers() if self._blocks(reader)}
                stuck &= blocking
                if not stuck:
                    stuck, deadline = blocking, loop.time() + self._flights.timeouts.write
                self._room = loop.create_future()
                self._wake_readers(everyone=True)
                held_up = any(r.wants is not Wants.NOTHING for r in self.readers.difference(stuck))
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(deadline if held_up else None):
                        await self._room
                if held_up and loop.time() >= deadline:
                    for reader in stuck & self.readers:
                        reader.drop()
                    stuck = set()
        finally:
            self._room = None

    def _blocks(self, reader: "Reader") -> bool:
        """Return True if a reader still needs the first piece on the tape."""
        return reader.position <= self.start

    def _piece_readers(self) -> Iterator["Reader"]:
        return (reader for reader in self.readers if reader.wants is Wants.PIECES)

    def _make_room(self, size: int) -> bool:
        """Reserve room for a piece by dropping pieces that all readers have taken."""
        window, budget = self._flights.window, self._flights.budget
        while (
            self._size + self._held + size > window and self._overflows(size)
        ) or not budget.reserve(size):
            if not self._pieces:
                return budget.reserve(size, must=True)
            if any(map(self._blocks, self._piece_readers())):
                return False
            self._drop_first()
        return True

    def _overflows(self, size: int) -> bool:
        """Return True if a piece does not fit into the window.

        The fold counts towards the window, except while a reader waits for it: then the fold has
        its own limit, and must not take room from the readers of pieces.
        """
        folding = self.notes is not None and self.notes.foldable
        beside = folding and not self.is_whole_wanted()
        return beside or self._size + size > self._flights.window

    def _drop_first(self) -> None:
        size = len(self._pieces.pop(0)) + PIECE_OVERHEAD
        self.start += 1
        self._size -= size
        self._flights.budget.release(size)

    def _wake_readers(self, *, everyone: bool = False) -> None:
        for reader in self.readers:
            if everyone or reader.wants is Wants.PIECES:
                reader.wake()


class _Cutter:
    """Cuts a body into pieces that end with a line; lines of one read stay together."""

    def __init__(self, notes: Notes) -> None:
        self._notes = notes
        self._rest = bytearray()

    def cut(self, data: bytes) -> bytes:
        """Return the complete lines so far; empty if there are none."""
        rest, delimiter = self._rest, self._notes.delimiter
        if not delimiter or (not rest and data.endswith(delimiter)):
            return data
        unseen = max(0, len(rest) - len(delimiter) + 1)
        rest += data
        found = rest.rfind(delimiter, unseen)
        if found < 0 and len(rest) <= MAX_LINE:
            return b""
        end = found + len(delimiter) if found >= 0 else len(rest)
        piece = bytes(memoryview(rest)[:end])
        del rest[:end]
        return piece

    def rest(self) -> bytes:
        """Return the bytes after the last delimiter, at the body's end.

        Raises:
            HTTPError: they are half a line.

        """
        rest = bytes(self._rest)
        if rest and not self._notes.is_line(rest):
            message = "Ollama ended its answer in the middle of a line. Ask again."
            raise HTTPError(502, message, kind="broken")
        return rest


class Reader:
    """One client's place on a flight's tape.

    Attributes:
        wants: pieces or the fold. Final once the response's head has arrived: an answer that
            cannot be folded is read in pieces.
        position: index of the next piece to take.
        joined: when it joined, on the monotonic clock.

    """

    def __init__(self, flight: Flight, wants: Wants) -> None:
        self.flight = flight
        self.wants = wants
        self.position = 0
        self.joined = time.monotonic()
        self._awaits_end = False  # see `whole`
        self._error: HTTPError | None = None  # this reader's alone
        self._news: asyncio.Future[None] | None = None

    def wake(self) -> None:
        """Make the reader check for news."""
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    def leave(self) -> None:
        """Leave the flight."""
        self.flight.leave(self)

    def choose(self, notes: Notes) -> None:
        """Read pieces if the answer turns out not to be foldable."""
        if self.wants is Wants.FOLD and not notes.foldable:
            self.wants = Wants.PIECES

    def drop(self) -> None:
        """Drop the reader, because it is too slow for the others."""
        self.wants = Wants.NOTHING
        self.wake()

    def fail(self, error: HTTPError) -> None:
        """End its wait with an error."""
        self._error = error
        self.wake()

    def patience(self, silent_since: float, timeouts: Timeouts) -> float:
        """Return how long it waits for upstream: a time on the monotonic clock."""
        until = max(silent_since, self.joined) + timeouts.idle
        return max(until, self.joined + timeouts.object) if self.wants_whole else until

    @property
    def wants_whole(self) -> bool:
        """True while the reader can use nothing but the whole answer."""
        return self.wants is Wants.FOLD or self._awaits_end

    @property
    def has_all(self) -> bool:
        """True if it has read a complete answer, even if the flight has not ended yet."""
        flight, notes = self.flight, self.flight.notes
        if notes is None or flight.status != 200 or self._error is not None:
            return False
        if flight.ending in {Ending.COMPLETE, Ending.INCOMPLETE}:
            return self.wants is not Wants.NOTHING
        return self.wants is Wants.PIECES and flight.end <= self.position and notes.finished

    async def head(self, silence: float = 0.0) -> bool:
        """Wait for the response's head; return False if `silence` seconds pass first (0: never).

        Raises:
            HTTPError: none comes.

        """
        while self.flight.born is None:
            self._raise_failure()
            if not await self._wait(silence):
                return False
        return True

    async def pieces(self, silence: float = 0.0) -> AsyncIterator[bytes]:
        """Yield the tape to its end, up to a slice at a time.

        With `silence`, it also yields b"" after each period of this many seconds without news.

        Raises:
            HTTPError: upstream broke off, or was silent for too long.
            Truncated: this reader was dropped.

        """
        flight = self.flight
        while True:
            if self.wants is Wants.NOTHING:
                raise Truncated
            if self.position < flight.end:
                pieces = flight.since(self.position)
                self.position += len(pieces)
                flight.wake_recorder()
                yield pieces[0] if len(pieces) == 1 else b"".join(pieces)
            elif flight.ending is not None or self._error is not None:
                self._raise_failure()
                return
            elif not await self._wait(silence):
                yield b""

    async def whole(self) -> bytes | None:
        """Wait for the end and return the complete tape; None if it does not fit the window.

        Raises:
            HTTPError: upstream broke off.

        """
        flight = self.flight
        self._awaits_end = True
        while flight.ending is None and not flight.is_full and flight.start == 0:
            self._raise_failure()
            await self._wait()
        self._awaits_end = False
        if flight.ending is None or flight.start > 0:
            return None
        self._raise_failure()
        return flight.whole()

    async def fold(self) -> bytes:
        """Wait for the end and return the answer as one object.

        Raises:
            HTTPError: upstream broke off or was silent for too long, or there is no fold.

        """
        flight, notes = self.flight, self.flight.notes
        assert notes is not None
        while flight.ending is None and not notes.too_large:
            self._raise_failure()
            await self._wait()
        self._raise_failure()
        return notes.fold()

    def _raise_failure(self) -> None:
        if (error := self._error or self.flight.error) is not None:
            # A copy: raising one instance for many readers would grow its traceback.
            raise HTTPError(
                error.status, error.message, error.headers, error.body, error.kind
            ) from error

    async def _wait(self, seconds: float = 0.0) -> bool:
        """Wait for news; return False if none comes within `seconds` (0: no limit)."""
        self._news = asyncio.get_running_loop().create_future()
        if not seconds:
            await self._news
            return True
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._news
        return not self._news.cancelled()


class Flights:
    """The flights under way, and what they all share.

    Args:
        window: the size of each tape, in bytes.
        budget: the bytes that all tapes share with the cache.
        exchange: carries out requests to upstream.
        timeouts: how long flights wait.
        clock: returns the time in seconds since 1970.

    """

    ended: Callable[[Flight], None]
    """Called with each flight at its end."""

    def __init__(
        self,
        window: int,
        budget: Budget,
        exchange: Exchange,
        timeouts: Timeouts = Timeouts(),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.ended = lambda flight: None
        self.window = window
        self.budget = budget
        self.exchange = exchange
        self.timeouts = timeouts
        self.clock = clock
        self._by_key: dict[bytes | None, list[Flight]] = {}  # in the order they began

    def find(self, key: bytes, max_age: float = math.inf) -> Flight | None:
        """Return the youngest flight for a key, if it can be joined.

        Args:
            key: identifies the answer.
            max_age: maximum age of the response's head, in seconds.

        """
        flights = self._by_key.get(key)
        if not flights or not flights[-1].joinable:
            return None
        flight = flights[-1]
        age = flight.may_be_old if flight.born is None else self.clock() - flight.born
        return flight if age <= max_age else None

    def begin(
        self,
        key: bytes | None,
        ask: Ask,
        notes: MakeNotes,
        store: Callable[[Flight], bool] | None = None,
        permit: Permit | None = None,
    ) -> Flight:
        """Begin a flight; see `Flight`. Its first reader must join before any `await`."""
        flight = Flight(self, key, ask, notes, store, permit)
        self._by_key.setdefault(key, []).append(flight)
        return flight

    def remove(self, flight: Flight) -> None:
        """Remove a flight, by identity: a younger one may have its key."""
        flights = self._by_key.get(flight.key, [])
        if flight in flights:
            flights.remove(flight)
        if not flights:
            self._by_key.pop(flight.key, None)

    def ground_older(self, stored: Flight) -> None:
        """Ground the flights that began earlier, so that they do not replace this answer."""
        for flight in list(self._by_key.get(stored.key, [])):
            if flight is stored:
                break
            self.ground_one(flight)

    def ground(self, changed: Callable[[str], bool]) -> None:
        """Ground all flights whose model, by its normalized name, has changed."""
        for flight in [flight for flight in self if changed(flight.model)]:
            self.ground_one(flight)

    def ground_one(self, flight: Flight) -> None:
        """Ground a flight: nobody can join it any more, and its answer is not stored."""
        self.remove(flight)
        flight.key = None
        flight.store_nothing()
        self._by_key.setdefault(None, []).append(flight)

    def sweep(self) -> None:
        """End waits for upstream that take too long. Call it about once a second."""
        now = time.monotonic()
        for flight in [f for f in self if f.born is not None and f.is_whole_wanted()]:
            flight.check_silence(now)

    def __iter__(self) -> Iterator[Flight]:
        return itertools.chain.from_iterable(self._by_key.values())

    def __len__(self) -> int:
        return sum(len(flights) for flights in self._by_key.values())
