"""The fair queue: requests wait for a turn on the GPU, shared fairly between labels.

`answers/schedule.py` decides whose turn is next. A request is admitted or refused first, and waits
for its turn later, inside its flight:

    ticket = turns.admit(key, model, size)  # raises HTTPError; begin the flight at once
    async with ticket as slot: ...          # waits; the turn ends with the block

The end of the flight also calls `ticket.withdraw()`, because a task that is cancelled before its
first step never reaches the `async with`.
"""

import asyncio
import enum
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, TypeVar

from answers.schedule import Key, Scheduler, Slots, State, Turn
from wire.http11 import HTTPError

RESTART = 5  # seconds until another process has probably taken over from one that drains


class Budget(Protocol):
    """The bytes that waiting prompts share with tapes and stored answers."""

    def reserve(self, size: int) -> bool:
        """Set `size` bytes aside; False if there is no room."""

    def release(self, size: int) -> None:
        """Give `size` bytes back."""


class Refusal(enum.Enum):
    """Why the queue refused a request; the values are used in metrics."""

    QUEUE_FULL = "queue full"
    TIMEOUT = "timeout"
    DRAINING = "draining"
    MEMORY = "memory"


@dataclass(frozen=True, slots=True)
class Waiting:
    """A queued request; `position` counts from 1, in the order of turns as of now."""

    label: str
    model: str
    seconds: float
    position: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The queue at one moment; `waiting` is in the order of turns, `running` by label."""

    waiting: list[Waiting]
    running: dict[str, int]
    refusals: dict[Refusal, int]  # since the start


class Turns:
    """The queue. Call it from one event loop; only entering a ticket awaits.

    Args:
        slots: where turns run.
        queue_max: how many requests of a label may wait.
        queue_timeout: how long a request may wait, in seconds.
        budget: holds the bytes of waiting prompts.
        clock: seconds on a clock that never goes back.

    """

    def __init__(
        self,
        slots: Slots,
        queue_max: int,
        queue_timeout: float,
        budget: Budget,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._slots = slots
        self.queue_timeout = queue_timeout
        self.clock = clock
        self._queue_max = queue_max
        self._budget = budget
        self._scheduler = Scheduler(slots)
        self._waiting: dict[Turn, Ticket] = {}
        self._refusals: Counter[Refusal] = Counter()
        self._draining = False

    def bounds(self, key: Key) -> bool:
        """Return True if a request of the key may have to wait."""
        return self._slots.total > 0 or key.running is not None

    def admit(self, key: Key, model: str, size: int = 0) -> "Ticket":
        """Return a ticket: its turn begins at once, or it is queued.

        Args:
            key: of the caller; it is charged.
            model: normalized name.
            size: of the prompt in bytes; held in the budget while it waits.

        Raises:
            HTTPError: 429 if too many requests of its label wait, 503 while draining or if
                there is no memory for its prompt; all with Retry-After.

        """
        if self._draining:
            raise self.refuse(Refusal.DRAINING, key)
        now = self.clock()
        ticket = Ticket(self, self._scheduler.add(key, model, now), size)
        self._grant(now)
        if ticket.turn.state is State.WAITING:
            if self._scheduler.waiting(key) > self._queue_max:
                refusal = Refusal.QUEUE_FULL
            elif not self._budget.reserve(size):
                refusal = Refusal.MEMORY
            else:
                self._waiting[ticket.turn] = ticket
                return ticket
            self._scheduler.end(ticket.turn, now)
            raise self.refuse(refusal, key)
        return ticket

    def leave(self, ticket: "Ticket") -> None:
        """End a ticket's turn or wait, and start the turns that can use its slot. Idempotent."""
        if ticket.turn.state is State.ENDED:
            return
        now = self.clock()
        self._let_out(ticket.turn)
        self._scheduler.end(ticket.turn, now)
        if ticket.had_turn:
            self._grant(now)

    def wake(self) -> None:
        """Start all turns that can start. Call it when slots appear, as when a host recovers."""
        self._grant(self.clock())

    def drain(self) -> None:
        """Refuse queued and new requests; running turns go on."""
        self._draining = True
        for turn in list(self._waiting):
            self._scheduler.end(turn, self.clock())
            self._let_out(turn)

    def refuse(self, why: Refusal, key: Key) -> HTTPError:
        """Count a refusal; return its error, which says why and when to retry."""
        self._refusals[why] += 1
        seconds = RESTART if why is Refusal.DRAINING else self._scheduler.estimate(key)
        what = {
            Refusal.QUEUE_FULL: f"{self._queue_max} of your requests are waiting already"
            " (QUEUE_MAX): send fewer at once",
            Refusal.TIMEOUT: f"no turn came within {self.queue_timeout:g} s (QUEUE_TIMEOUT)",
            Refusal.DRAINING: "OllProx is stopping",
            Refusal.MEMORY: "OllProx has no memory left in which a request could wait",
        }[why]
        status = 429 if why is Refusal.QUEUE_FULL else 503
        retry_after = (b"Retry-After", b"%d" % seconds)
        return HTTPError(status, f"{what}; try again in {seconds} s", (retry_after,))

    def of_key(self, digest: bytes) -> tuple[int, int]:
        """Return how many turns of a key run and how many wait."""
        return self._scheduler.of_key(digest)

    def snapshot(self) -> Snapshot:
        """Return the queue as of now."""
        now = self.clock()
        waiting = [
            Waiting(turn.key.label, turn.model, now - turn.entered, position)
            for position, turn in enumerate(self._scheduler.order(now), start=1)
        ]
        return Snapshot(waiting, self._scheduler.running(), dict(self._refusals))

    def __len__(self) -> int:
        """Return the number of queued requests."""
        return len(self._waiting)

    def _grant(self, now: float) -> None:
        for turn in self._scheduler.grant(now):
            self._let_out(turn)

    def _let_out(self, turn: Turn) -> None:
        """Remove a turn from the queue, if it is queued, and wake its ticket."""
        if (ticket := self._waiting.pop(turn, None)) is not None:
            self._budget.release(ticket.size)
            ticket.wake()


class Ticket:
    """A request's place in the queue. `async with` waits for the turn and gives the slot.

    Raises on entering:
        HTTPError: 503 with Retry-After if no turn comes in time, or while draining.

    """

    def __init__(self, turns: Turns, turn: Turn, size: int) -> None:
        self.turn = turn
        self.size = size
        self._turns = turns
        self._news: asyncio.Future[None] | None = None

    @property
    def slot(self) -> object:
        """The slot of its turn; None before the turn."""
        return self.turn.slot

    @property
    def had_turn(self) -> bool:
        """True once the turn has begun, even if it has ended since."""
        return self.turn.began is not None

    def waited(self) -> float:
        """Return the seconds it was queued, or has been queued so far."""
        turn = self.turn
        until = turn.began if turn.began is not None else turn.ended
        return (self._turns.clock() if until is None else until) - turn.entered

    def withdraw(self) -> None:
        """Leave the queue, unless the turn runs in an `async with`, which then ends it."""
        if self.turn.state is not State.RUNNING:
            self._turns.leave(self)

    def wake(self) -> None:
        """Wake the waiting task."""
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    async def __aenter__(self) -> object:
        if self.turn.state is not State.GRANTED:
            await self._wait()
        self.turn.state = State.RUNNING
        return self.turn.slot

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._turns.leave(self)

    async def _wait(self) -> None:
        turn, turns = self.turn, self._turns
        try:
            async with asyncio.timeout(turn.entered + turns.queue_timeout - turns.clock()):
                while turn.state is State.WAITING:
                    self._news = asyncio.get_running_loop().create_future()
                    await self._news
        except TimeoutError:
            if turn.state is State.WAITING:  # otherwise the turn came at the same moment
                turns.leave(self)
                raise turns.refuse(Refusal.TIMEOUT, turn.key) from None
        except BaseException:
            turns.leave(self)
            raise
        if turn.state is State.ENDED:
            raise turns.refuse(Refusal.DRAINING, turn.key)


class Queued(Protocol):
    """What the queue needs of an ask."""

    @property
    def ticket(self) -> AbstractAsyncContextManager[object] | None:
        """Its place in the queue; None if it needs no turn."""


AskT = TypeVar("AskT", bound=Queued)
ResponseT = TypeVar("ResponseT")


def fair_queue(
    exchange: Callable[[AskT], AbstractAsyncContextManager[ResponseT]],
) -> Callable[[AskT], AbstractAsyncContextManager[ResponseT]]:
    """Return an exchange that waits for a turn, which lasts until the response ends."""

    @asynccontextmanager
    async def in_turn(
        ask: AskT, ticket: AbstractAsyncContextManager[object]
    ) -> AsyncIterator[ResponseT]:
        async with ticket, exchange(ask) as response:
            yield response

    def queued(ask: AskT) -> AbstractAsyncContextManager[ResponseT]:
        return exchange(ask) if ask.ticket is None else in_turn(ask, ask.ticket)

    return queued
