"""Let identical requests share one exchange with upstream.

A flight is a tape: one task records what upstream says, and each reader replays it at its
own pace. It ends complete, failed or abandoned. It knows neither HTTP's framing nor Ollama;
what an answer means is noted by a `Notes` that its codec gives it.

The tape is a window. The recorder runs ahead of slow readers on purpose, since they must not
hold the GPU; it waits only while it is a full window ahead of its fastest reader, and a
slower one that falls a full window behind is dropped.
"""

import asyncio
import enum
import itertools
import logging
import math
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Protocol

from record import NO_USAGE, Usage
from wire.http11 import Ask, Exchange, Headers, HTTPError, Response, Truncated

log = logging.getLogger("ollprox.flight")

MAX_LINE = 32 << 20  # bytes of a line that is waited for; a longer one is passed on in parts
SLICE = 256 << 10  # bytes that a reader takes off the tape at once
FOLD = sys.maxsize  # the position of a reader that waits for no piece, but for the fold
PIECE_OVERHEAD = 64  # bytes charged for a piece beside its own: object and list slot


_numbers = itertools.count(1)


class Ending(enum.Enum):
    """How a flight has ended."""

    COMPLETE = "upstream has said all, or reported its own error"
    FAILED = "upstream could not be reached, broke off, or was too slow"
    ABANDONED = "the last reader left"


class Budget(Protocol):
    """The bytes that all tapes and all stored answers share."""

    def reserve(self, size: int, *, must: bool = False) -> bool:
        """Set `size` bytes aside; False if there is no room, unless they `must`."""

    def release(self, size: int) -> None:
        """Give `size` bytes back."""


class Notes(Protocol):
    """What a codec notes of an answer while it is recorded."""

    delimiter: bytes
    """Ends a line (or an event); empty where an answer has no lines."""

    finished: bool
    """The last line has come: the answer is complete, whatever follows."""

    too_large: bool
    """There can be no fold any more."""

    reported: bool
    """The last line is upstream's own error."""

    held: int
    """Bytes held for the fold."""

    usage: Usage
    """What the answer has come to."""

    def is_line(self, rest: bytes) -> bool:
        """Whether what upstream ended with, without a delimiter, is a line all the same."""

    def feed(self, piece: bytes) -> None:
        """Note whole lines."""

    def close(self) -> str | None:
        """Note upstream's clean end; say what is missing if the answer was cut."""

    def forget(self) -> None:
        """Hold nothing for a fold any more."""

    def recall(self, pieces: list[bytes]) -> None:
        """Note a whole tape again, if it was forgotten."""

    def fold(self) -> bytes:
        """Return the answer as one object. Raises HTTPError if there is none."""


class Flight:
    """One exchange with upstream, and the tape that it is recorded on.

    Args:
        flights: where it is registered.
        key: what identifies its answer; None for one that cannot be joined.
        exchange: carries out what is asked.
        ask: what is asked.
        notes: makes the notes for a response's head.
        store: keeps a complete answer and tells whether it did; None to keep none.
        caller: the label of the key that asked for it; None if it is no answer of a model.

    """

    def __init__(
        self,
        flights: "Flights",
        key: bytes | None,
        exchange: Exchange,
        ask: Ask,
        notes: Callable[[Response], Notes],
        store: Callable[["Flight"], bool] | None,
        caller: str | None = None,
    ) -> None:
        self.key = key
        self.model = ask.model
        self.caller = caller
        self.number = next(_numbers)
        self.began = flights.clock()
        self.grounded = False  # its model has changed: neither joined nor stored
        self.stored = False
        self.status = 0
        self.headers: Headers = ()
        self.length: int | None = None
        self.notes: Notes | None = None  # from the response's head on
        self.born: float | None = None  # when that head came, on the clock
        self.usage = NO_USAGE  # what it has come to, at its end
        self.ending: Ending | None = None
        self.error: HTTPError | None = None
        self.start = 0  # index of the first piece on the tape
        self.readers: set[Reader] = set()
        self.served = 0  # readers that left with all of it before its end
        self.crowded = False  # the recorder has had to wait for its readers
        self._flights = flights
        self._exchange = exchange
        self._ask = ask
        self._make_notes = notes
        self._store = store
        self._pieces: list[bytes] = []
        self._joined: tuple[int, bytes] | None = None  # so many pieces, as one
        self._size = 0  # bytes on the tape
        self._held = 0  # bytes of the budget that the notes have
        self._room: asyncio.Future[None] | None = None  # the recorder waits for its readers
        self._task: asyncio.Task[None] | None = asyncio.get_running_loop().create_task(
            self._record()
        )

    @property
    def joinable(self) -> bool:
        """Whether a reader that comes now would get all of the answer."""
        return self.start == 0 and self.ending is None and not self.grounded

    @property
    def end(self) -> int:
        """The index after the last piece on the tape."""
        return self.start + len(self._pieces)

    def join(self, *, folds: bool = False) -> "Reader":
        """Read from the tape's start; the reader must `leave` in the end.

        A reader that `folds` waits for the fold alone, and holds no recorder up.
        """
        reader = Reader(self, FOLD if folds else 0)
        self.readers.add(reader)
        if folds and self.notes is not None:
            self.notes.recall(self._pieces)  # the tape is whole, or nobody could join
            self._count_notes(self.notes)
        return reader

    def leave(self, reader: "Reader") -> None:
        """Let a reader go; with the last one goes the exchange."""
        self.readers.discard(reader)
        self.served += self.ending is None and reader.has_all
        if not self.readers:
            self._abandon()
        self.wake_recorder()

    def since(self, position: int) -> list[bytes]:
        """Return the pieces from `position` on, up to a slice of the tape."""
        first = last = position - self.start
        size = 0
        while last < len(self._pieces) and size < SLICE:
            size += len(self._pieces[last])
            last += 1
        return self._pieces[first:last]

    def whole(self) -> bytes:
        """Return the tape as one piece, the same for all that ask for it."""
        if self._joined is None or self._joined[0] != len(self._pieces):
            self._joined = len(self._pieces), b"".join(self._pieces)
        return self._joined[1]

    def wake_recorder(self) -> None:
        """Let the recorder look again whether there is room."""
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    def ground(self) -> None:
        """Let nobody join any more, and store nothing."""
        self.grounded, self._store = True, None

    def _abandon(self) -> None:
        """End the exchange: nobody listens. What has been said to its end is kept."""
        if self.ending is None:
            complete = self.notes is not None and self.notes.finished
            self._finish(Ending.COMPLETE if complete else Ending.ABANDONED)
        if self._task is not None:
            self._task.cancel()
            self._task = None  # its last exception holds frames, which hold us: a circle
        self._flights.budget.release(self._size + self._held)
        self._size = self._held = 0
        self._pieces, self._joined = [], None

    async def _record(self) -> None:
        try:
            async with self._exchange(self._ask) as response:
                self.status, self.headers = response.status, response.headers
                self.length = response.length
                self.born = self._flights.clock()
                self.grounded |= not response.storable  # it is meant for one client
                self.notes = notes = self._make_notes(response)
                if not self._is_folded():
                    notes.forget()  # until somebody waits for the fold
                self._wake_readers(everyone=True)
                assert not isinstance(response.body, bytes)
                cutter = _Cutter(notes)
                async for data in response.body:
                    if piece := cutter.cut(data):
                        await self._append(piece, notes)
                if piece := cutter.rest():
                    await self._append(piece, notes)
                if (missing := notes.close()) is not None:
                    raise HTTPError(502, missing, kind="broken")
                self._finish(Ending.COMPLETE)
        except HTTPError as error:
            self._fail(error)
        except Exception:
            log.exception("a flight failed by a fault of OllProx")
            self._fail(HTTPError(500, "OllProx failed; its log says more"))

    def _fail(self, error: HTTPError) -> None:
        if self.notes is not None and self.notes.finished:
            self._finish(Ending.COMPLETE)  # only the body's end was missing
        elif self.ending is None:
            self.error = error
            if error.kind:  # upstream's fault, which the access lines do not explain
                log.warning("an answer failed: %s", error.message)
            self._finish(Ending.FAILED)

    def _finish(self, ending: Ending) -> None:
        """Set the ending: store first, announce last."""
        if self.ending is not None:
            return
        if self.notes is not None:
            self.usage = self.notes.usage
        if ending is Ending.COMPLETE and self.start == 0 and self._store is not None:
            budget = self._flights.budget
            size = self._size + self._held
            budget.release(size)  # what is stored is what is on the tape
            try:
                self.stored = self._store(self)
            except Exception:
                log.exception("an answer could not be stored by a fault of OllProx")
            if self.stored:
                self._flights.ground_older(self)
            budget.reserve(size, must=True)
        self.ending = ending
        self._flights.remove(self)
        self._flights.ended(self)
        self._wake_readers(everyone=True)

    async def _append(self, piece: bytes, notes: Notes) -> None:
        size = len(piece) + PIECE_OVERHEAD
        while not self._make_room(size):
            self.crowded = True
            self._wake_readers(everyone=True)
            self._room = asyncio.get_running_loop().create_future()
            await self._room
        # On the tape and noted at once: whoever joins or leaves must find both or neither.
        self._pieces.append(piece)
        self._size += size
        notes.feed(piece)
        if self._size + notes.held > self._flights.window and not self._is_folded():
            notes.forget()  # with its fold it is too large to be stored
        self._count_notes(notes)
        self._wake_readers(everyone=notes.too_large)

    def _is_folded(self) -> bool:
        """Whether a reader waits for the fold."""
        return any(reader.position == FOLD for reader in self.readers)

    def _count_notes(self, notes: Notes) -> None:
        self._flights.budget.reserve(notes.held - self._held, must=True)
        self._held = notes.held

    def _make_room(self, size: int) -> bool:
        """Reserve room for a piece, dropping what the fastest reader has read."""
        window, budget = self._flights.window, self._flights.budget
        while self._size + size > window or not budget.reserve(size):
            if not self._pieces:
                return budget.reserve(size, must=True)
            if self.start >= max(reader.position for reader in self.readers):
                return False
            self._drop_first()
        return True

    def _drop_first(self) -> None:
        size = len(self._pieces.pop(0)) + PIECE_OVERHEAD
        self.start += 1
        self._size -= size
        self._flights.budget.release(size)

    def _wake_readers(self, *, everyone: bool = False) -> None:
        for reader in self.readers:
            if everyone or reader.position < self.end:
                reader.wake()


class _Cutter:
    """Cut a body into pieces that end at the end of a line; all of a read go together."""

    def __init__(self, notes: Notes) -> None:
        self._notes = notes
        self._rest = bytearray()

    def cut(self, data: bytes) -> bytes:
        """Return what has come to its end with `data`, if anything has."""
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
        """Return what the body ended with, if that is a line without its delimiter."""
        rest = bytes(self._rest)
        return rest if rest and self._notes.is_line(rest) else b""


class Reader:
    """One client's place on a flight's tape."""

    def __init__(self, flight: Flight, position: int) -> None:
        self.flight = flight
        self.position = position
        self._news: asyncio.Future[None] | None = None

    def wake(self) -> None:
        """Let the reader look again."""
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    def leave(self) -> None:
        """Leave the flight."""
        self.flight.leave(self)

    @property
    def has_all(self) -> bool:
        """Whether the answer is whole, and all of it was read: nobody need wait for its end."""
        flight, notes = self.flight, self.flight.notes
        if notes is None or notes.reported or flight.status != 200:
            return False
        read = flight.end <= self.position < FOLD
        ended = flight.ending is Ending.COMPLETE and self.position >= flight.start
        return ended or (read and notes.finished)

    def take_pieces(self) -> None:
        """Begin at the start after all: there turned out to be nothing to fold."""
        if self.position == FOLD:
            self.position = 0

    async def head(self) -> None:
        """Wait for the response's head. Raises HTTPError if none comes."""
        while self.flight.born is None:
            self._raise_failure()
            await self._wait()

    async def pieces(self) -> AsyncIterator[bytes]:
        """Read to the end; each step gives what has come since, up to a slice.

        Raises:
            HTTPError: upstream broke off.
            Truncated: this reader fell a full window behind.

        """
        flight = self.flight
        self.take_pieces()
        while True:
            if self.position < flight.start:
                raise Truncated
            if self.position < flight.end:
                pieces = flight.since(self.position)
                self.position += len(pieces)
                flight.wake_recorder()
                yield pieces[0] if len(pieces) == 1 else b"".join(pieces)
            elif flight.ending is not None:
                self._raise_failure()
                return
            else:
                await self._wait()

    async def whole(self) -> bytes | None:
        """Wait for the end and return the whole tape, shared; None if it is too large for that.

        Raises:
            HTTPError: upstream broke off.

        """
        flight = self.flight
        while flight.ending is None and not flight.crowded and flight.start == 0:
            await self._wait()
        if flight.crowded or flight.start > 0:
            return None
        self._raise_failure()
        return flight.whole()

    async def fold(self) -> bytes:
        """Wait for the end and return the answer as one object.

        Raises:
            HTTPError: upstream broke off, or there is no fold.

        """
        flight, notes = self.flight, self.flight.notes
        assert notes is not None
        assert self.position == FOLD
        while flight.ending is None and not notes.too_large:
            await self._wait()
        if not notes.reported:
            self._raise_failure()
        return notes.fold()

    def _raise_failure(self) -> None:
        if (error := self.flight.error) is not None:
            # A fresh one: one instance raised by many readers would grow its traceback.
            raise HTTPError(error.status, error.message, kind=error.kind) from error

    async def _wait(self) -> None:
        self._news = asyncio.get_running_loop().create_future()
        await self._news


class Flights:
    """The flights under way.

    Args:
        window: bytes of each tape that are kept.
        budget: what all tapes share.
        clock: seconds on a clock that never goes back.

    """

    ended: Callable[[Flight], None]
    """Is handed each flight at its end."""

    def __init__(
        self, window: int, budget: Budget, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.ended = lambda flight: None
        self.window = window
        self.budget = budget
        self.clock = clock
        self._by_key: dict[bytes | None, list[Flight]] = {}  # in the order they began

    def find(self, key: bytes, max_age: float = math.inf) -> Flight | None:
        """Return the youngest flight for a key, if it can be joined.

        Args:
            key: what identifies the answer.
            max_age: seconds that its response's head may be old.

        """
        flights = self._by_key.get(key)
        if not flights or not flights[-1].joinable:
            return None
        born = flights[-1].born
        return flights[-1] if born is None or self.clock() - born <= max_age else None

    def begin(
        self,
        key: bytes | None,
        exchange: Exchange,
        ask: Ask,
        notes: Callable[[Response], Notes],
        store: Callable[[Flight], bool] | None,
        caller: str | None = None,
    ) -> Flight:
        """Begin a flight; see `Flight`. Its first reader must join before any `await`."""
        flight = Flight(self, key, exchange, ask, notes, store, caller)
        self._by_key.setdefault(key, []).append(flight)
        return flight

    def remove(self, flight: Flight) -> None:
        """Forget a flight, by identity: younger ones may have its key."""
        flights = self._by_key.get(flight.key, [])
        if flight in flights:
            flights.remove(flight)
        if not flights:
            self._by_key.pop(flight.key, None)

    def ground_older(self, stored: Flight) -> None:
        """Let no flight store over the answer of one that began later."""
        for flight in self._by_key.get(stored.key, []):
            if flight is stored:
                break
            flight.ground()

    def ground(self, changed: Callable[[str], bool]) -> None:
        """Ground all flights whose model has changed."""
        for flight in self:
            if changed(flight.model):
                flight.ground()

    def __iter__(self) -> Iterator[Flight]:
        return itertools.chain.from_iterable(self._by_key.values())

    def __len__(self) -> int:
        return sum(len(flights) for flights in self._by_key.values())
