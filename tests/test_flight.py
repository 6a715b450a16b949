"""Flights without sockets: a scripted exchange, and events."""

import asyncio
import gc
import json
import math
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from answers.flight import (
    PIECE_OVERHEAD,
    Ending,
    Flight,
    Flights,
    Reader,
    Source,
    Timeouts,
    Wants,
)
from answers.notes import LineNotes, Notes, Relayed, WholeNotes
from cache import Budget
from wire.http11 import Ask, HTTPError, Response, Truncated

DONE = b'{"response":".","done":true}\n'


def line(text: str) -> bytes:
    return b'{"response":"%b","done":false}\n' % text.encode()


def asking(model: str = "m") -> Ask:
    return Ask(b"POST", b"/api/generate", (), model=model)


class Upstream:
    """A scripted exchange."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[bytes | HTTPError | None] = asyncio.Queue()
        self.begun = 0
        self.open = 0
        self.taken = 0  # pieces that the recorder has asked for

    def say(self, *pieces: bytes | HTTPError | None) -> None:
        for piece in pieces:
            self.queue.put_nowait(piece)

    @asynccontextmanager
    async def exchange(self, ask: Ask) -> AsyncIterator[Response]:
        self.begun += 1
        self.open += 1
        try:
            first = await self.queue.get()
            if isinstance(first, HTTPError):
                raise first
            yield Response(200, (), self._body(first))
        finally:
            self.open -= 1

    async def _body(self, first: bytes | None) -> AsyncIterator[bytes]:
        piece: bytes | HTTPError | None = first
        while piece is not None:
            if isinstance(piece, HTTPError):
                raise piece
            self.taken += 1
            yield piece
            piece = await self.queue.get()


class Field:
    """Flights with one upstream, and the answers they stored."""

    def __init__(
        self, window: int = 10_000, budget: int = 100_000, timeouts: Timeouts | None = None
    ) -> None:
        self.upstream = Upstream()
        self.budget = Budget(budget)
        self.flights = Flights(window, self.budget, self._exchange, timeouts or Timeouts())
        self.stored: list[bytes] = []
        self.on_store: Callable[[], None] = lambda: None

    def begin(self, key: bytes | None = b"k", model: str = "m") -> Flight:
        return self.flights.begin(key, asking(model), self._notes, self._store)

    def _exchange(self, ask: Ask) -> AbstractAsyncContextManager[Response]:
        return self.upstream.exchange(ask)

    def _notes(self, response: Response) -> Notes:
        return LineNotes(False, 10_000)

    def _store(self, flight: Flight) -> bool:
        assert isinstance(flight.notes, LineNotes)
        if not flight.notes.keeps():
            return False
        self.on_store()
        self.stored.append(flight.whole())
        return True


@contextmanager
def joined(flight: Flight, wants: Wants = Wants.PIECES) -> Iterator[Reader]:
    reader = flight.join(wants)
    try:
        yield reader
    finally:
        reader.leave()


async def settle() -> None:
    """Run all tasks until they wait."""
    for _ in range(20):
        await asyncio.sleep(0)


async def read(flight: Flight) -> bytes:
    with joined(flight) as reader:
        await reader.head()
        return b"".join([piece async for piece in reader.pieces()])


async def test_a_late_reader_gets_what_is_there_at_once_and_then_each_line() -> None:
    field = Field()
    flight = field.begin()
    first = asyncio.create_task(read(flight))
    field.upstream.say(line("a"), line("b"))
    await settle()
    with joined(flight) as late:
        pieces = late.pieces()
        assert await anext(pieces) == line("a") + line("b")
        field.upstream.say(line("c"))
        assert await anext(pieces) == line("c")
        field.upstream.say(DONE, None)
        assert await anext(pieces) == DONE
        with pytest.raises(StopAsyncIteration):
            await anext(pieces)
    assert await first == line("a") + line("b") + line("c") + DONE
    assert field.stored == [whole_answer("abc")]
    assert field.upstream.begun == 1


def whole_answer(text: str) -> bytes:
    return b"".join(map(line, text)) + DONE


async def test_an_abandoned_flight_is_freed_without_the_collector() -> None:
    """It holds a request's body, and the collector may not look at what is old."""
    field = Field()
    flight = field.begin()
    freed = weakref.ref(flight)
    gc.disable()
    try:
        with joined(flight) as reader:
            field.upstream.say(line("a"))
            await reader.head()
        del flight, reader
        await settle()
        assert field.upstream.open == 0
        assert freed() is None
    finally:
        gc.enable()


async def test_pieces_end_at_the_end_of_a_line() -> None:
    field = Field()
    task = asyncio.create_task(read(field.begin()))
    whole = whole_answer("ab")
    for start in range(0, len(whole), 7):
        field.upstream.say(whole[start : start + 7])
    field.upstream.say(None)
    assert await task == whole
    assert field.stored == [whole]


async def test_the_answer_is_stored_before_its_end_is_announced() -> None:
    """Else a request between the two would ask upstream again."""
    field = Field()
    flight = field.begin()
    field.on_store = lambda: endings.append((flight.ending, field.flights.find(b"k")))
    endings: list[tuple[Ending | None, Flight | None]] = []
    task = asyncio.create_task(read(flight))
    field.upstream.say(DONE, None)
    await task
    assert endings == [(None, flight)]
    assert flight.ending is Ending.COMPLETE
    assert field.flights.find(b"k") is None


async def test_the_first_reader_leaves_and_the_others_keep_reading() -> None:
    field = Field()
    flight = field.begin()
    first = asyncio.create_task(read(flight))
    second = asyncio.create_task(read(flight))
    field.upstream.say(line("a"))
    await settle()
    first.cancel()
    await settle()
    assert field.upstream.open == 1
    field.upstream.say(DONE, None)
    assert await second == line("a") + DONE
    assert field.stored == [line("a") + DONE]


@pytest.mark.parametrize("key", [b"k", None])  # None: a bypass, whose only reader leaves
@pytest.mark.parametrize("said", [(), (line("a"),)])
async def test_the_last_reader_leaves_and_the_exchange_is_aborted(
    said: tuple[bytes, ...], key: bytes | None
) -> None:
    field = Field()
    flight = field.begin(key)
    readers = [asyncio.create_task(read(flight)) for _ in range(3)]
    field.upstream.say(*said)
    await settle()
    for reader in readers:
        assert field.upstream.open == 1
        reader.cancel()
        await settle()
    assert field.upstream.open == 0
    assert flight.ending is Ending.ABANDONED
    assert (field.stored, len(field.flights), field.budget.reserved_bytes) == ([], 0, 0)
    again = field.begin()
    task = asyncio.create_task(read(again))
    field.upstream.say(DONE, None)
    assert await task == DONE
    assert field.upstream.begun == 2


async def test_the_last_reader_leaves_after_the_last_line_and_the_answer_is_kept() -> None:
    field = Field()
    task = asyncio.create_task(read(field.begin()))
    field.upstream.say(line("a"), DONE)
    await settle()
    task.cancel()
    await settle()
    assert field.upstream.open == 0
    assert field.stored == [line("a") + DONE]


async def test_a_failure_before_the_head_is_every_readers() -> None:
    field = Field()
    flight = field.begin()
    readers = [asyncio.create_task(read(flight)) for _ in range(3)]
    field.upstream.say(HTTPError(502, "gone"))
    errors = await asyncio.gather(*readers, return_exceptions=True)
    assert [type(error) for error in errors] == [HTTPError] * 3
    assert len({id(error) for error in errors}) == 3  # fresh ones
    assert flight.ending is Ending.FAILED


async def test_a_failure_in_the_middle_comes_after_the_whole_lines() -> None:
    field = Field()
    with joined(field.begin()) as reader:
        field.upstream.say(line("a"), b'{"resp', HTTPError(502, "gone"))
        await reader.head()
        pieces = reader.pieces()
        assert await anext(pieces) == line("a")
        with pytest.raises(HTTPError, match="gone"):
            await anext(pieces)
    assert field.stored == []


async def test_an_orderly_end_without_a_last_line_is_passed_on_and_not_stored() -> None:
    field = Field()
    flight = field.begin()
    task = asyncio.create_task(read(flight))
    with joined(flight, Wants.FOLD) as folding:
        field.upstream.say(line("a"), line("b"), None)
        await folding.head()
        assert await folding.fold() == b'{"response":"ab","done":false}'
        assert folding.has_all
    assert await task == line("a") + line("b")
    assert (flight.ending, flight.error, field.stored) == (Ending.INCOMPLETE, None, [])
    assert flight.usage.tokens == 2


async def test_an_error_in_the_stream_comes_after_its_line_whatever_follows() -> None:
    for after in (None, HTTPError(502, "reset", kind="broken")):
        field = Field()
        flight = field.begin()
        with joined(flight) as reader, joined(flight, Wants.FOLD) as folding:
            field.upstream.say(line("a"), b'{"error":"died"}\n', after)
            await reader.head()
            await settle()
            pieces = reader.pieces()
            assert await anext(pieces) == line("a") + b'{"error":"died"}\n'
            with pytest.raises(HTTPError) as caught:
                await anext(pieces)
            assert (caught.value.kind, caught.value.message) == ("reported", "died")
            with pytest.raises(HTTPError) as caught:
                await folding.fold()
            assert (caught.value.status, caught.value.body) == (500, b'{"error":"died"}')
            assert not reader.has_all
        assert (flight.ending, field.stored) == (Ending.FAILED, [])


async def test_only_the_bodys_end_was_missing() -> None:
    field = Field()
    task = asyncio.create_task(read(field.begin()))
    field.upstream.say(DONE, HTTPError(502, "reset"))
    assert await task == DONE
    assert field.stored == [DONE]


async def test_a_fold_waits_for_the_end() -> None:
    field = Field()
    flight = field.begin()
    with joined(flight, Wants.FOLD) as reader:
        field.upstream.say(line("a"))
        await reader.head()
        task = asyncio.create_task(reader.fold())
        field.upstream.say(line("b"))
        await settle()
        assert not task.done()
        field.upstream.say(DONE, None)
        assert b'"response":"ab."' in await task


async def test_a_piece_that_waits_for_room_is_neither_noted_nor_lost() -> None:
    """Noted before it is on the tape, it would be missing in a fold, or in what is stored."""
    field = Field(window=cost(line("a"), line("b")), timeouts=Timeouts(write=0.01))
    flight = field.begin()
    with joined(flight) as slow, joined(flight, Wants.FOLD) as folding:
        field.upstream.say(line("a"), line("b"), line("c"), DONE, None)
        await folding.head()
        assert b'"response":"abc."' in await folding.fold()
        with pytest.raises(Truncated):
            await anext(slow.pieces())
    field = Field(window=cost(line("a"), line("b")))
    with joined(field.begin()):
        field.upstream.say(line("a"), line("b"), DONE, None)
        await settle()
    assert field.stored == []  # the last line was not on the tape yet
    await settle()


async def test_a_store_that_fails_does_not_leave_the_flight_in_the_air(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail() -> None:
        raise TypeError("unhashable")

    field = Field()
    field.on_store = fail
    task = asyncio.create_task(read(field.begin()))
    field.upstream.say(DONE, None)
    assert await task == DONE
    assert len(field.flights) == 0
    assert "could not be stored" in caplog.text


# Back-pressure.


def cost(*pieces: bytes) -> int:
    return sum(len(piece) + PIECE_OVERHEAD for piece in pieces)


async def test_the_recorder_waits_a_full_window_ahead_of_its_fastest_reader() -> None:
    lines = [line(str(number)) for number in range(8)]
    field = Field(window=cost(*lines[:3]) + 3)
    with joined(field.begin()) as reader:
        field.upstream.say(*lines, DONE, None)
        await settle()
        assert field.upstream.taken == 4  # three on the tape, one in the hand
        assert field.budget.reserved_bytes == cost(*lines[:3]) + 3  # and the fold of three
        got = [piece async for piece in reader.pieces()]
    assert b"".join(got) == b"".join(lines) + DONE


async def test_a_reader_that_holds_up_others_is_dropped_and_the_fastest_goes_on() -> None:
    lines = [line(str(number)) for number in range(8)]
    field = Field(window=cost(*lines[:3]), timeouts=Timeouts(write=0.01))
    flight = field.begin()
    with joined(flight) as slow:
        fast = asyncio.create_task(read(flight))
        for piece in (*lines, DONE, None):
            field.upstream.say(piece)
            await settle()
        assert await fast == b"".join(lines) + DONE
        assert not flight.joinable
        with pytest.raises(Truncated):
            await anext(slow.pieces())
    assert field.stored == []  # it had lost its beginning
    assert field.budget.reserved_bytes == 0


async def test_a_flight_that_has_lost_its_start_cannot_be_joined() -> None:
    field = Field(window=cost(line("a")))
    flight = field.begin()
    assert field.flights.find(b"k") is flight
    task = asyncio.create_task(read(flight))
    for piece in (line("a"), line("b")):
        field.upstream.say(piece)
        await settle()
    assert field.flights.find(b"k") is None
    field.upstream.say(DONE, None)
    assert await task == line("a") + line("b") + DONE


async def test_all_tapes_together_stay_within_the_budget() -> None:
    lines = [line(str(number)) for number in range(6)]
    field = Field(window=cost(*lines), budget=cost(*lines[:4]))
    first, second = field.begin(b"1"), field.begin(b"2")
    with joined(first) as one, joined(second) as two:
        for piece in (*lines[:2], *lines[:2], *lines[:2]):
            field.upstream.say(piece)
        # One piece more, for the flight that would have none and could not go on.
        most = field.budget.max_bytes + cost(lines[0])
        await settle()
        assert field.budget.max_bytes <= field.budget.reserved_bytes <= most
        for reader in (one.pieces(), two.pieces()):
            assert await anext(reader)
            await settle()
            assert field.budget.reserved_bytes <= most


async def test_a_fold_does_not_outrun_a_reader_of_pieces() -> None:
    lines = [line(str(number)) for number in range(8)]
    field = Field(window=cost(*lines[:3]), timeouts=Timeouts(write=10))
    flight = field.begin()
    with joined(flight, Wants.FOLD) as folding, joined(flight) as reader:
        field.upstream.say(*lines, DONE, None)
        await settle()
        assert field.upstream.taken == 4  # it waits, whoever wants the fold
        assert flight.start == 0
        got = b"".join([piece async for piece in reader.pieces()])
        assert got == b"".join(lines) + DONE
        assert b'"response":"01234567."' in await folding.fold()


async def test_a_reader_that_holds_up_nobody_has_all_the_time() -> None:
    """A client on a slow line is alone; whether it still reads is for the server to tell."""
    lines = [line(str(number)) for number in range(8)]
    field = Field(window=cost(*lines[:3]), timeouts=Timeouts(write=0.01))
    flight = field.begin()
    with joined(flight) as slow:
        field.upstream.say(*lines, DONE, None)
        await asyncio.sleep(0.05)
        got = b"".join([piece async for piece in slow.pieces()])
    assert got == b"".join(lines) + DONE


async def test_a_reader_that_makes_progress_is_not_dropped() -> None:
    lines = [line(str(number)) for number in range(8)]
    field = Field(window=cost(line("0")), timeouts=Timeouts(write=0.2))
    flight = field.begin()
    with joined(flight) as slow:
        fast = asyncio.create_task(read(flight))
        field.upstream.say(*lines, DONE, None)
        got = b""
        async for piece in slow.pieces():
            got += piece
            await asyncio.sleep(0.05)  # many times more in all than it may take for one
    assert got == await fast == b"".join(lines) + DONE


async def test_a_fold_that_joins_lets_a_stalled_reader_be_dropped() -> None:
    """Until then it has held up nobody but itself."""
    lines = [line(str(number)) for number in range(4)]
    field = Field(window=cost(*lines[:2]), timeouts=Timeouts(write=0.01))
    flight = field.begin()
    with joined(flight) as stalled:
        field.upstream.say(*lines, DONE, None)
        await asyncio.sleep(0.03)
        with joined(flight, Wants.FOLD) as folding:
            assert b'"response":"0123."' in await folding.fold()
        assert stalled.wants is Wants.NOTHING
        with pytest.raises(Truncated):
            await anext(stalled.pieces())


async def test_the_bytes_reserved_for_a_fold_are_given_back() -> None:
    text = "x" * 1000
    for ending in (DONE, HTTPError(502, "broke"), None, "leaves"):
        field = Field()
        flight = field.begin()
        with joined(flight, Wants.FOLD) as folding:
            field.upstream.say(line(text))
            await folding.head()
            await settle()
            assert field.budget.reserved_bytes == cost(line(text)) + len(text)
            if ending != "leaves":
                field.upstream.say(ending, None)  # type: ignore[arg-type]
            await settle()
        await settle()
        assert field.budget.reserved_bytes == 0
        assert (field.stored != []) is (ending == DONE)


async def test_a_fold_that_nobody_can_want_any_more_is_given_up() -> None:
    """It could grow to MAX_OBJECT_BYTES, and neither be stored nor be joined for."""
    field = Field(window=cost(line("a")))
    flight = field.begin()
    with joined(flight) as reader:
        field.upstream.say(line("a"), line("b"))
        await reader.head()
        pieces = reader.pieces()
        assert await anext(pieces) == line("a")
        assert await anext(pieces) == line("b")
        assert field.budget.reserved_bytes == cost(line("b"))
        field.upstream.say(DONE, None)
        assert await anext(pieces) == DONE
        with pytest.raises(StopAsyncIteration):
            await anext(pieces)
    assert flight.ending is Ending.COMPLETE


async def test_what_cannot_be_folded_is_read_in_pieces_from_its_start() -> None:
    """The recorder knows that at once: it does not run away before the reader has noticed."""
    field = Field(window=cost(b"x"))
    flight = field.flights.begin(b"k", asking(), lambda response: Relayed())
    with joined(flight, Wants.FOLD) as reader:
        field.upstream.say(*[b"x"] * 5, None)
        await reader.head()
        assert reader.wants is Wants.PIECES
        assert await reader.whole() is None
        assert b"".join([piece async for piece in reader.pieces()]) == b"x" * 5


async def test_an_object_has_all_of_the_window() -> None:
    """What is noted of it is not stored beside it."""
    body = b'{"embedding":[1]}'
    field = Field(window=cost(body))
    flight = field.flights.begin(b"k", asking(), lambda response: WholeNotes())
    with joined(flight) as reader:
        field.upstream.say(body, None)
        await reader.head()
        assert await reader.whole() == body


async def test_what_makes_no_notes_is_no_reader() -> None:
    """What joins can leave: nothing that raises comes after a reader was added."""

    def fail(response: Response) -> Notes:
        raise TypeError("no notes")

    field = Field()
    flight = field.flights.begin(b"k", asking(), fail)
    field.upstream.say(line("a"))
    with joined(flight) as reader, pytest.raises(HTTPError) as caught:
        await reader.head()
    assert (caught.value.status, flight.ending) == (500, Ending.FAILED)
    assert (len(field.flights), len(flight.readers), field.upstream.open) == (0, 0, 0)


# Silence.


async def test_each_reader_has_its_own_time_for_silences() -> None:
    field = Field(timeouts=Timeouts(idle=10, object=100))
    flight = field.begin()
    with joined(flight, Wants.FOLD) as folding, joined(flight) as reader:
        field.upstream.say(line("a"))
        pieces = reader.pieces()
        assert await anext(pieces) == line("a")
        now = folding.joined
        flight.check_silence(now)  # it was heard then
        with joined(flight) as late:
            late.joined = now + 8
            flight.check_silence(now + 11)
            with pytest.raises(HTTPError) as caught:
                await anext(pieces)
            assert (caught.value.status, caught.value.kind) == (504, "timeout")
            assert not reader.has_all
            later = late.pieces()
            assert await anext(later) == line("a")
            field.upstream.say(line("b"))
            assert await anext(later) == line("b")
        reader.leave()
        flight.check_silence(now + 12)  # it was heard
        flight.check_silence(now + 99)
        assert flight.ending is None
        field.upstream.say(line("c"))
        await settle()
        flight.check_silence(now + 120)
        flight.check_silence(now + 129)  # beyond its time, but lines still come
        assert flight.ending is None
        flight.check_silence(now + 131)
        with pytest.raises(HTTPError, match="nothing more"):
            await folding.fold()
    assert len(field.flights) == 0
    await settle()
    assert field.upstream.open == 0


async def test_a_recorder_that_waits_for_its_readers_is_not_upstreams_silence() -> None:
    field = Field(window=cost(line("a")), timeouts=Timeouts(idle=10, object=10))
    flight = field.begin()
    with joined(flight, Wants.FOLD) as folding, joined(flight) as slow:
        field.upstream.say(line("a"), line("b"), DONE, None)
        await settle()
        for later in (0, 20, 40):
            flight.check_silence(folding.joined + later)
        assert b"".join([p async for p in slow.pieces()]) == line("a") + line("b") + DONE
        assert b'"response":"ab."' in await folding.fold()


# Which flight is joined, and which one stores.


async def test_an_answer_says_where_it_comes_from() -> None:
    field = Field()
    with joined(flight := field.begin()):
        assert flight.source is Source.GENERATED
    await settle()


async def test_the_youngest_flight_is_joined_and_an_older_one_cannot_store_after_it() -> None:
    field = Field()
    first = field.upstream
    old_reader = asyncio.create_task(read(field.begin()))
    await settle()
    later = field.upstream = Upstream()
    younger = field.begin()
    assert field.flights.find(b"k") is younger
    young_reader = asyncio.create_task(read(younger))
    later.say(line("new"), DONE, None)
    assert await young_reader == line("new") + DONE
    assert field.flights.find(b"k") is None  # the older one must not be joined again
    first.say(line("old"), DONE, None)
    assert await old_reader == line("old") + DONE
    assert field.stored == [line("new") + DONE]


async def test_an_older_flight_that_ends_does_not_remove_a_younger_one() -> None:
    """Removal is by identity: by key it would take the younger one away."""
    field = Field()
    first = field.upstream
    older = asyncio.create_task(read(field.begin()))
    await settle()
    later = field.upstream = Upstream()
    younger = field.begin()
    young_reader = asyncio.create_task(read(younger))
    first.say(DONE, None)
    await older
    assert field.flights.find(b"k") is younger
    later.say(DONE, None)
    await young_reader
    assert len(field.flights) == 0


async def test_a_head_that_is_too_old_is_not_joined() -> None:
    clock = [100.0]
    field = Field()
    field.flights.clock = lambda: clock[0]
    flight = field.begin()
    task = asyncio.create_task(read(flight))
    assert field.flights.find(b"k", 0) is flight  # no head yet
    field.upstream.say(line("a"))
    await settle()
    clock[0] += 5
    assert field.flights.find(b"k", 5) is flight
    assert field.flights.find(b"k", 4) is None
    field.upstream.say(DONE, None)
    await task


async def test_a_grounded_flight_is_neither_joined_nor_stored() -> None:
    field = Field()
    task = asyncio.create_task(read(field.begin(model="a")))
    field.flights.ground(lambda model: model == "b")
    assert field.flights.find(b"k")
    field.flights.ground(lambda model: model == "a")
    assert field.flights.find(b"k") is None
    field.upstream.say(DONE, None)
    assert await task == DONE
    assert field.stored == []
    assert len(field.flights) == 0


@pytest.mark.parametrize("stage", range(4))
async def test_cancelling_at_each_stage_leaves_nothing(stage: int) -> None:
    field = Field(window=cost(line("a")))
    task = asyncio.create_task(read(field.begin()))
    await settle()
    for piece in [line("a"), line("b"), line("c")][:stage]:
        field.upstream.say(piece)
        await settle()
    task.cancel()
    await settle()
    assert (field.upstream.open, len(field.flights), field.budget.reserved_bytes) == (0, 0, 0)
    others = asyncio.all_tasks() - {asyncio.current_task()}
    assert not others


# Any order of events, against a model: what was said, and how much of it each reader has had.

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["join", "fold", "say", "say", "read", "read", "leave"]),
        st.integers(0, 9),
    ),
    max_size=30,
)


@given(
    STEPS,
    st.sampled_from(["end", "break", "leave", "incomplete"]),
    st.sampled_from([150, 400, 100_000]),
    st.sampled_from([math.inf, 0]),
)
def test_any_order_of_events_is_the_model_of_a_shared_answer(
    steps: list[tuple[str, int]], ending: str, window: int, patience: float
) -> None:
    asyncio.run(play(steps, ending, window, Timeouts(write=patience)))


async def play(  # noqa: C901 - a script
    steps: list[tuple[str, int]], ending: str, window: int, timeouts: Timeouts
) -> None:
    field = Field(window=window, timeouts=timeouts)
    flight = field.begin()
    said = 0  # lines that upstream has said
    readers: list[ModelReader] = []
    folds: list[Reader] = []
    led = False  # a reader that may have been held up has left

    readers.append(ModelReader(flight))
    for what, number in steps:
        if what == "join" and flight.joinable:
            readers.append(ModelReader(flight))
        elif what == "fold" and flight.joinable:
            folds.append(flight.join(Wants.FOLD))
        elif what == "say":
            field.upstream.say(line(str(said)))
            said += 1
        elif readers:
            reader = readers[number % len(readers)]
            if what == "read":
                await reader.read()
            elif what == "leave" and len(readers) > 1:
                reader.leave()
                readers.remove(reader)
                led = True
        await settle()
        assert field.upstream.open == 1  # as long as one reads
        assert field.budget.reserved_bytes <= 4 * window + 10_000
    everybody: list[ModelReader | Reader] = [*readers, *folds]
    if ending == "leave":
        for left in everybody:
            left.leave()
        await settle()
        assert field.stored == []
    else:
        end = {"end": (DONE, None), "break": (HTTPError(502, "broke"),), "incomplete": (None,)}
        field.upstream.say(*end[ending])
        whole = [line(str(number)) for number in range(said)] + [DONE] * (ending == "end")
        lost = await read_to_the_end(readers)
        for reader in lost:
            reader.leave()
        await settle()
        for reader in readers:
            assert b"".join(whole).startswith(reader.had)
            if reader not in lost:
                assert reader.had == b"".join(whole)
                assert reader.failed is (ending == "break")
        assert not lost or timeouts.write == 0
        assert not lost or folds or led or len(lost) < len(readers)  # none is dropped alone
        await check_folds(folds, ending, whole)
        assert (field.stored == [b"".join(whole)]) is (ending == "end" and flight.start == 0)
    assert (field.upstream.open, len(field.flights)) == (0, 0)
    for left in everybody:
        left.leave()  # once more for some, which must change nothing
    assert field.budget.reserved_bytes == 0


async def check_folds(folds: list[Reader], ending: str, whole: list[bytes]) -> None:
    """Whoever waits for the fold gets all of it, or the error."""
    text = "".join(json.loads(line)["response"] for line in whole)
    for reader in folds:
        try:
            await reader.head()
            folded = json.loads(await reader.fold())
        except HTTPError:
            assert ending == "break" or not whole
        else:
            assert folded == {"response": text, "done": ending == "end"}


class ModelReader:
    """A reader that is driven step by step, and what it has had."""

    def __init__(self, flight: Flight) -> None:
        self.had = b""
        self.failed = False
        self.dropped = False
        self.ended = False
        self._reader = flight.join()
        self._pieces = self._reader.pieces()
        self._next: asyncio.Task[bytes] | None = None

    async def read(self) -> None:
        """Read what is new, if anything."""
        if self.ended:
            return
        if self._next is None:
            self._next = asyncio.create_task(anext(self._pieces))  # type: ignore[arg-type]
        await settle()
        if self._next.done():
            task, self._next = self._next, None
            try:
                self.had += task.result()
            except StopAsyncIteration:
                self.ended = True
            except HTTPError:
                self.ended = self.failed = True
            except Truncated:
                self.ended = self.dropped = True

    def leave(self) -> None:
        if self._next is not None:
            self._next.cancel()
        self._reader.leave()


async def read_to_the_end(readers: list[ModelReader]) -> list[ModelReader]:
    """Let all readers read in turn; return those that were dropped."""
    while not all(reader.ended for reader in readers):
        for reader in readers:
            await reader.read()
    return [reader for reader in readers if reader.dropped]
