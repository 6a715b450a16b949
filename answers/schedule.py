"""Decide whose turn it is to use a slot of the GPU. Pure: no I/O, and the time is an argument."""

import enum
import itertools
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

MAX_RETRY_AFTER = 120  # seconds; the openai client does not retry after a longer wait
FIRST_TURN = 10.0  # assumed length of a turn in seconds, until one has ended
RECENT = 0.1  # weight of the last turn in the moving average


class Key(Protocol):
    """What the queue needs to know of an API key."""

    @property
    def label(self) -> str:
        """The label of the key; turns are shared between labels."""

    @property
    def digest(self) -> bytes:
        """Identifies the key; `running` is counted for each key."""

    @property
    def weight(self) -> float:
        """Its share, compared with a label of weight 1; more than 0."""

    @property
    def running(self) -> int | None:
        """How many turns it may have at once; None for any number."""


class Slots(Protocol):
    """The slots of one Ollama or of several."""

    @property
    def total(self) -> int:
        """The number of slots, free or taken, even on hosts that are down; 0 if unlimited."""

    def take(self, model: str) -> object | None:
        """Take a slot on which a model can run; None if none is free."""

    def give_back(self, slot: object) -> None:
        """Free a slot that was taken."""


class CountedSlots:
    """The slots of a single Ollama: `total` of them, or any number if it is 0."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.taken = 0

    def take(self, model: str) -> object | None:
        """Take a slot; None if none is free."""
        if self.total and self.taken >= self.total:
            return None
        self.taken += 1
        return self

    def give_back(self, slot: object) -> None:
        """Free a slot."""
        self.taken -= 1


class State(enum.Enum):
    """Where a turn is."""

    WAITING = "it waits for a slot, or for another turn of its key to end"
    GRANTED = "it has a slot, but its request has not begun to use it"
    RUNNING = "its request uses the slot"
    ENDED = "it has returned its slot, or left the queue without one"


@dataclass(eq=False, slots=True)
class Turn:
    """One request's turn. Times are in seconds, on the caller's clock."""

    key: Key
    model: str
    number: int  # in the order of arrival
    entered: float
    began: float | None = None  # when it got its slot
    ended: float | None = None
    slot: object = None
    state: State = State.WAITING


@dataclass(slots=True)
class _Label:
    """A label's use so far, and its waiting and running turns."""

    since: float
    used: float = 0.0  # slot-seconds until `since`, each divided by the weight at its time
    weight: float = 1.0  # the largest of its keys that wait or run
    weights: Counter[float] = field(default_factory=Counter)  # the number of turns by weight
    running: int = 0
    waiting: dict[Turn, None] = field(default_factory=dict)  # its line, in order

    def charge(self, now: float) -> float:
        """Return the slot-seconds used, including running turns so far, divided by the weight."""
        return self.used + self.running * (now - self.since) / self.weight

    def rank(self, now: float) -> tuple[float, float]:
        """Return the sort key of a label; the smallest is next."""
        return self.charge(now), self.running / self.weight

    def settle(self, now: float) -> None:
        """Add up the use until now, before turns or weights change."""
        self.used, self.since = self.charge(now), now

    def count(self, weight: float, turns: int, now: float) -> None:
        """Add turns with this weight; a negative number removes them."""
        self.settle(now)
        self.weights[weight] += turns
        if not self.weights[weight]:
            del self.weights[weight]
        self.weight = max(self.weights, default=1.0)


@dataclass(slots=True)
class _Use:
    """The turns of one key, and its limit of running turns."""

    bound: int | None = None  # of its last request, since a reload may change it
    waiting: int = 0
    running: int = 0

    def full(self, more: int = 0) -> bool:
        """Return True if the key may start no turn, given `more` that would start before."""
        return self.bound is not None and self.running + more >= self.bound


class Scheduler:
    """Decides whose turn is next. `now` is always a time in seconds that never goes back.

    - Each label has a charge: the slot-seconds that it has used, divided by its weight. The label
      with the smallest charge gets the next slot. Running turns count with the time they have
      run so far; otherwise a label with long turns would look cheap until they end.
    - A label contends while one of its requests waits only for a slot. When it begins to
      contend, its charge is raised to the smallest charge of the other active labels, and to
      `_floor`. So an idle label does not save up turns.
    - `_floor` is the smallest charge among the labels that contended when a slot was last given.
      It rises by a second for each second in which no label is active.
    - An idle label whose charge is not above `_floor` is forgotten: it would start there anyway.
    - Only keys at their `running` bound, and models without a free slot, are skipped.
    """

    def __init__(self, slots: Slots) -> None:
        self.turn_seconds = FIRST_TURN  # average of recent turns
        self.slots = slots
        self._numbers = itertools.count(1)
        self._labels: dict[str, _Label] = {}  # the active ones: they wait or run
        self._idle: dict[str, _Label] = {}  # idle ones whose charge is above the floor
        self._uses: dict[bytes, _Use] = {}
        self._floor = 0.0
        self._waiting = 0  # turns
        self._ended = 0  # turns that ran
        self._idle_since: float | None = None

    def add(self, key: Key, model: str, now: float) -> Turn:
        """Add a request at the end of its label's line. Call `grant` next."""
        if not self._labels and self._idle_since is not None:
            self._floor += now - self._idle_since
        label = self._labels.get(key.label) or self._idle.pop(key.label, None) or _Label(now)
        self._labels[key.label] = label
        label.settle(now)
        if self._first_free(label) is None:
            label.used = max(label.used, self._level(label, now))
        turn = Turn(key, model, next(self._numbers), now)
        label.waiting[turn] = None
        label.count(key.weight, 1, now)
        use = self._uses.setdefault(key.digest, _Use())
        use.bound = key.running
        use.waiting += 1
        self._waiting += 1
        return turn

    def grant(self, now: float) -> list[Turn]:
        """Begin all turns that may begin, in order, and return them."""
        granted: list[Turn] = []
        taken: set[str] = set()  # models without a free slot
        while self._waiting and (turn := self._grant_one(now, taken)):
            granted.append(turn)
        return granted

    def end(self, turn: Turn, now: float) -> None:
        """End a running or waiting turn, and free its slot. Call `grant` next."""
        label, use = self._labels[turn.key.label], self._uses[turn.key.digest]
        label.count(turn.key.weight, -1, now)
        if turn.began is not None:
            self._ended += 1
            change = now - turn.began - self.turn_seconds
            self.turn_seconds += change * max(RECENT, 1 / self._ended)
            label.running -= 1
            use.running -= 1
            self.slots.give_back(turn.slot)
        else:
            del label.waiting[turn]
            use.waiting -= 1
            self._waiting -= 1
        turn.state, turn.ended = State.ENDED, now
        if not use.waiting and not use.running:
            del self._uses[turn.key.digest]
        if not label.waiting and not label.running:
            self._rest(turn.key.label, now)

    def order(self, now: float) -> list[Turn]:
        """Return the waiting turns in their expected order, if each took the average time.

        Turns that wait for another turn of their key come last.
        """
        places = []
        for label in self._labels.values():
            ahead: Counter[bytes] = Counter()
            line = []
            for turn in label.waiting:
                digest = turn.key.digest
                line.append((self._uses[digest].full(ahead[digest]), turn.number, turn))
                ahead[digest] += 1
            (charge, share), step = label.rank(now), self.turn_seconds / label.weight
            for index, (held, number, turn) in enumerate(sorted(line, key=lambda place: place[:2])):
                places.append(((held, charge + index * step, share, number), turn))
        return [turn for _, turn in sorted(places, key=lambda place: place[0])]

    def waiting(self, label: str) -> int:
        """Return how many requests of a label wait."""
        return len(self._labels[label].waiting) if label in self._labels else 0

    def running(self) -> dict[str, int]:
        """Return the number of running turns by label, without labels that have none."""
        return {name: label.running for name, label in self._labels.items() if label.running}

    def of_key(self, digest: bytes) -> tuple[int, int]:
        """Return how many turns of a key are running, and how many are waiting."""
        use = self._uses.get(digest, _Use())
        return use.running, use.waiting

    def charges(self, now: float) -> dict[str, float]:
        """Return the charge of each known label, in seconds divided by weight."""
        return {name: label.charge(now) for name, label in (self._labels | self._idle).items()}

    def estimate(self, key: Key) -> int:
        """Return the expected wait of a new request in seconds, from 1 to 120."""
        lines = [len(label.waiting) for label in self._labels.values() if label.waiting]
        in_label = self.waiting(key.label) + 1
        seconds = 1.0
        if self.slots.total:
            ahead = min(sum(lines) + 1, in_label * max(1, len(lines)))
            seconds = self.turn_seconds * ahead / self.slots.total
        if key.running:
            seconds = max(seconds, self.turn_seconds * in_label / key.running)
        return min(MAX_RETRY_AFTER, max(1, math.ceil(seconds)))

    def _grant_one(self, now: float, taken: set[str]) -> Turn | None:
        """Start the next turn; add models without a free slot to `taken`."""
        contending = [
            ((*label.rank(now), turn.number), label)
            for label in self._labels.values()
            if label.waiting and (turn := self._first_free(label)) is not None
        ]
        contending.sort(key=lambda place: place[0])
        for _, label in contending:
            for turn in label.waiting:
                if self._uses[turn.key.digest].full() or turn.model in taken:
                    continue
                if (slot := self.slots.take(turn.model)) is not None:
                    self._floor = max(self._floor, contending[0][0][0])
                    self._start(label, turn, slot, now)
                    return turn
                taken.add(turn.model)
        return None

    def _start(self, label: _Label, turn: Turn, slot: object, now: float) -> None:
        turn.slot, turn.began, turn.state = slot, now, State.GRANTED
        label.settle(now)
        del label.waiting[turn]
        label.running += 1
        use = self._uses[turn.key.digest]
        use.waiting -= 1
        use.running += 1
        self._waiting -= 1

    def _first_free(self, label: _Label) -> Turn | None:
        """Return the first of a label's turns that waits only for a slot."""
        free = (turn for turn in label.waiting if not self._uses[turn.key.digest].full())
        return next(free, None)

    def _level(self, label: _Label, now: float) -> float:
        """Return the smallest charge with which a label may begin to contend."""
        others = (other.charge(now) for other in self._labels.values() if other is not label)
        return max(self._floor, min(others, default=self._floor))

    def _rest(self, name: str, now: float) -> None:
        """Make a label idle, and forget idle labels that are not above the floor."""
        self._idle[name] = self._labels.pop(name)
        self._idle_since = now
        self._idle = {name: idle for name, idle in self._idle.items() if idle.used > self._floor}
