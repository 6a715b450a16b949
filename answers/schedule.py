"""Decide whose turn it is to use a slot of the GPU. Pure: no I/O, and the time is handed in."""

import enum
import itertools
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

MAX_RETRY_AFTER = 120  # seconds; the openai client does not retry if it is told to wait longer
FIRST_TURN = 10.0  # seconds that a turn is thought to take, before one has ended
RECENT = 0.1  # the share of the last turn in the average of recent ones


class Key(Protocol):
    """What the queue needs to know of an API key."""

    @property
    def label(self) -> str:
        """Whose key it is, or empty: turns are shared between labels; see `sharer`."""

    @property
    def digest(self) -> bytes:
        """Identify the key: `running` is counted for each."""

    @property
    def weight(self) -> float:
        """How many times the share of a label of weight 1 it gets; more than 0."""

    @property
    def running(self) -> int | None:
        """How many turns it may have at once; None for any number."""


def sharer(key: Key) -> str:
    """Return the name under which a key takes turns: its label; without one it is on its own."""
    return key.label or key.digest.hex()


class Slots(Protocol):
    """The slots of one Ollama or of several."""

    @property
    def total(self) -> int:
        """How many there are, free or taken, on hosts that are out too; 0 if unlimited."""

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

    WAITING = "waits for a slot, or for another turn of its key to end"
    GRANTED = "has a slot, which its request has not begun to use"
    RUNNING = "uses its slot"
    ENDED = "has given its slot back, or has left the queue without one"


@dataclass(eq=False, slots=True)
class Turn:
    """One request's turn. Times are in seconds, on the clock of whoever calls the scheduler."""

    key: Key
    model: str
    number: int  # turns count up in the order they come
    entered: float
    began: float | None = None  # when it got its slot
    ended: float | None = None
    slot: object = None
    state: State = State.WAITING


@dataclass(slots=True)
class _Label:
    """What a label has used, and its turns that wait or run."""

    since: float
    used: float = 0.0  # slot-seconds until `since`, each divided by the weight at its time
    weight: float = 1.0  # the largest of its keys that wait or run
    weights: Counter[float] = field(default_factory=Counter)  # of their turns
    running: int = 0
    waiting: dict[Turn, None] = field(default_factory=dict)  # its line, in order

    def charge(self, now: float) -> float:
        """Return the slot-seconds used, divided by the weight; running turns count so far."""
        return self.used + self.running * (now - self.since) / self.weight

    def rank(self, now: float) -> tuple[float, float]:
        """Return what labels are ordered by, the smallest first."""
        return self.charge(now), self.running / self.weight

    def settle(self, now: float) -> None:
        """Count what was used until now, before turns or weights change."""
        self.used, self.since = self.charge(now), now

    def count(self, weight: float, turns: int, now: float) -> None:
        """Let so many turns of a weight come, or go if negative."""
        self.settle(now)
        self.weights[weight] += turns
        if not self.weights[weight]:
            del self.weights[weight]
        self.weight = max(self.weights, default=1.0)


@dataclass(slots=True)
class _Use:
    """What one key has in the queue, and how much it may run at once."""

    bound: int | None = None  # as its last request said, since a reload may change it
    waiting: int = 0
    running: int = 0

    def full(self, more: int = 0) -> bool:
        """Whether the key may start no turn, beside `more` that it would start before."""
        return self.bound is not None and self.running + more >= self.bound


class Scheduler:
    """Decide whose turn is next. Pure: `now` is handed in, in seconds, and never goes back.

    - Each label has a charge: the slot-seconds that it used, divided by its weight. The label
      with the smallest gets the next slot. A turn counts while it runs with the time it has run
      so far, or a label with long turns would look cheap until they end.
    - A label contends while one of its requests waits for nothing but a slot. One that begins
      to contend starts at the largest of its own charge, the smallest of the other active
      labels, and `_floor`: so nobody saves up turns by asking for few.
    - `_floor` is the smallest charge among the labels that contended when a slot was last given.
      It rises by a second for each second in which no label is active, for all could have run.
    - An idle label whose charge is no larger than `_floor` is forgotten: it would start there.
    - A key at its `running` bound and a model without a free slot are skipped, and nothing else.
    """

    def __init__(self, slots: Slots) -> None:
        self.turn_seconds = FIRST_TURN  # average of recent turns
        self.slots = slots
        self._numbers = itertools.count(1)
        self._labels: dict[str, _Label] = {}  # the active ones: they wait or run
        self._idle: dict[str, _Label] = {}  # those ahead of the floor
        self._uses: dict[bytes, _Use] = {}
        self._floor = 0.0
        self._waiting = 0  # turns
        self._ended = 0  # turns that ran
        self._idle_since: float | None = None

    def add(self, key: Key, model: str, now: float) -> Turn:
        """Put a request at the end of its label's line; see `grant`."""
        if not self._labels and self._idle_since is not None:
            self._floor += now - self._idle_since
        name = sharer(key)
        label = self._labels.get(name) or self._idle.pop(name, None) or _Label(now)
        self._labels[name] = label
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
        """Give slots to whoever may run, in the order of turns, and return those that got one."""
        granted: list[Turn] = []
        taken: set[str] = set()  # models that no slot is free for
        while self._waiting and (turn := self._grant_one(now, taken)):
            granted.append(turn)
        return granted

    def end(self, turn: Turn, now: float) -> None:
        """End a turn that runs or waits, and free its slot; then `grant`."""
        name = sharer(turn.key)
        label, use = self._labels[name], self._uses[turn.key.digest]
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
            self._rest(name, now)

    def order(self, now: float) -> list[Turn]:
        """Return those that wait in the order they would run, if each took an average time.

        Those that wait for another turn of their key come last.
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

    def waiting(self, key: Key) -> int:
        """Return how many requests of a key's label wait."""
        name = sharer(key)
        return len(self._labels[name].waiting) if name in self._labels else 0

    def running(self) -> dict[str, int]:
        """Return how many turns each label has that run, for those with any."""
        return {name: label.running for name, label in self._labels.items() if label.running}

    def of_key(self, digest: bytes) -> tuple[int, int]:
        """Return how many turns of a key run, and how many wait."""
        use = self._uses.get(digest, _Use())
        return use.running, use.waiting

    def charges(self, now: float) -> dict[str, float]:
        """Return the charge of each label that is not forgotten: seconds divided by weight."""
        return {name: label.charge(now) for name, label in (self._labels | self._idle).items()}

    def estimate(self, key: Key) -> int:
        """Return in how many seconds a request that came now would get its turn, 1 to 120."""
        lines = [len(label.waiting) for label in self._labels.values() if label.waiting]
        own = self.waiting(key) + 1
        seconds = 1.0
        if self.slots.total:
            ahead = min(sum(lines) + 1, own * max(1, len(lines)))
            seconds = self.turn_seconds * ahead / self.slots.total
        if key.running:
            seconds = max(seconds, self.turn_seconds * own / key.running)
        return min(MAX_RETRY_AFTER, max(1, math.ceil(seconds)))

    def _grant_one(self, now: float, taken: set[str]) -> Turn | None:
        """Start the next turn; note the models that no slot is free for."""
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
        """Return the first of a label's requests that waits for nothing but a slot."""
        free = (turn for turn in label.waiting if not self._uses[turn.key.digest].full())
        return next(free, None)

    def _level(self, label: _Label, now: float) -> float:
        """Return the charge at which a label starts at the least."""
        others = (other.charge(now) for other in self._labels.values() if other is not label)
        return max(self._floor, min(others, default=self._floor))

    def _rest(self, name: str, now: float) -> None:
        """Let a label be idle, and forget those that would start at the floor all the same."""
        self._idle[name] = self._labels.pop(name)
        self._idle_since = now
        self._idle = {name: idle for name, idle in self._idle.items() if idle.used > self._floor}
