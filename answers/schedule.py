"""Decide whose turn is next on the GPU. No I/O; the time is an argument."""

import enum
import itertools
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

MAX_RETRY_AFTER = 120  # seconds; the openai client does not retry after a longer wait
FIRST_TURN = 10.0  # seconds; the assumed length of a turn until one has ended
RECENT = 0.1  # weight of the newest turn in the moving average


class Key(Protocol):
    """What the queue needs to know of an API key."""

    @property
    def label(self) -> str:
        """Whose key it is, or empty. Labels share the turns fairly; see `sharer`."""

    @property
    def digest(self) -> bytes:
        """Identifies the key; `running` is counted for each."""

    @property
    def weight(self) -> float:
        """The label's share, relative to weight 1; more than 0."""

    @property
    def running(self) -> int | None:
        """How many turns it may run at once; None for any number."""


def sharer(key: Key) -> str:
    """Return the name under which a key takes turns: its label; without one it is on its own."""
    return key.label or key.digest.hex()


class Slots(Protocol):
    """The slots of one Ollama or of several."""

    @property
    def total(self) -> int:
        """How many there are, free or taken, including hosts that are down; 0 if unlimited."""

    def take(self, model: str) -> object | None:
        """Take a slot that can run the model; None if none is free."""

    def give_back(self, slot: object) -> None:
        """Free a slot."""


class CountedSlots:
    """The slots of one Ollama: `total` of them, or any number if that is 0."""

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
    GRANTED = "has a slot but does not use it yet"
    RUNNING = "uses its slot"
    ENDED = "has freed its slot, or left the queue without one"


@dataclass(eq=False, slots=True)
class Turn:
    """One request's turn. Times are in seconds on the caller's clock."""

    key: Key
    model: str
    number: int  # counts up in order of arrival
    entered: float
    began: float | None = None  # when it got its slot
    ended: float | None = None
    slot: object = None
    state: State = State.WAITING


@dataclass(slots=True)
class _Label:
    """What a label has used, and its waiting and running turns."""

    since: float
    used: float = 0.0  # slot-seconds until `since`, divided by the weight at that time
    weight: float = 1.0  # the largest among its waiting and running keys
    weights: Counter[float] = field(default_factory=Counter)  # of their turns
    running: int = 0
    waiting: dict[Turn, None] = field(default_factory=dict)  # in order of arrival

    def charge(self, now: float) -> float:
        """Return the slot-seconds used so far, divided by the weight."""
        return self.used + self.running * (now - self.since) / self.weight

    def rank(self, now: float) -> tuple[float, float]:
        """Return the sort key of labels; the smallest goes first."""
        return self.charge(now), self.running / self.weight

    def settle(self, now: float) -> None:
        """Add up what was used until now. Call it before turns or weights change."""
        self.used, self.since = self.charge(now), now

    def count(self, weight: float, turns: int, now: float) -> None:
        """Add this many turns of a weight, or remove them if negative."""
        self.settle(now)
        self.weights[weight] += turns
        if not self.weights[weight]:
            del self.weights[weight]
        self.weight = max(self.weights, default=1.0)


@dataclass(slots=True)
class _Use:
    """A key's turns, and how many it may run at once."""

    bound: int | None = None  # as of its last request; a reload may change it
    waiting: int = 0
    running: int = 0

    def full(self, more: int = 0) -> bool:
        """Return True if the key may not start another turn after `more` others."""
        return self.bound is not None and self.running + more >= self.bound


class Scheduler:
    """Decide whose turn is next. `now` is in seconds and never goes back.

    - Each label has a charge: the slot-seconds it has used, divided by its weight. The label with
      the smallest charge gets the next slot. Running turns count with the time so far; otherwise
      a label with long turns would look cheap until they end.
    - A label contends while one of its requests waits only for a slot. When it starts to contend,
      its charge is raised to the smallest charge of the other active labels, and to `_floor`, so
      nobody can save up turns by being idle.
    - `_floor` is the smallest charge among the contending labels when a slot was last granted. It
      rises by one per second while no label is active, since anybody could have run then.
    - An idle label whose charge is at most `_floor` is forgotten, since it would start there.
    - Only a key at its `running` bound and a model without a free slot are skipped.
    """

    def __init__(self, slots: Slots) -> None:
        self.turn_seconds = FIRST_TURN  # average of recent turns
        self.slots = slots
        self._numbers = itertools.count(1)
        self._labels: dict[str, _Label] = {}  # active: with waiting or running turns
        self._idle: dict[str, _Label] = {}  # idle, with a charge above the floor
        self._uses: dict[bytes, _Use] = {}
        self._floor = 0.0
        self._waiting = 0  # turns
        self._ended = 0  # turns that have run
        self._idle_since: float | None = None

    def add(self, key: Key, model: str, now: float) -> Turn:
        """Queue a request behind those of its label. Call `grant` afterwards."""
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
        """Give out free slots in the order of turns; return the turns that got one."""
        granted: list[Turn] = []
        taken: set[str] = set()  # models without a free slot
        while self._waiting and (turn := self._grant_one(now, taken)):
            granted.append(turn)
        return granted

    def end(self, turn: Turn, now: float) -> None:
        """End a running or waiting turn, and free its slot. Call `grant` afterwards."""
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
        """Return those that wait, in the order they would run if slots came free from now on.

        Each is taken to last an average time. Those held by their key's bound come last.
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
        """Return the number of waiting requests of a key's label."""
        name = sharer(key)
        return len(self._labels[name].waiting) if name in self._labels else 0

    def running(self) -> dict[str, int]:
        """Return the number of running turns by label, without zeros."""
        return {name: label.running for name, label in self._labels.items() if label.running}

    def of_key(self, digest: bytes) -> tuple[int, int]:
        """Return how many turns of a key run, and how many wait."""
        use = self._uses.get(digest, _Use())
        return use.running, use.waiting

    def charges(self, now: float) -> dict[str, float]:
        """Return the charge of each known label: slot-seconds divided by weight."""
        return {name: label.charge(now) for name, label in (self._labels | self._idle).items()}

    def estimate(self, key: Key) -> int:
        """Return in how many seconds a new request would get its turn, 1 to `MAX_RETRY_AFTER`."""
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
        """Start the next turn, if any; add models without a free slot to `taken`."""
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
        """Return the first of a label's requests that waits only for a slot."""
        free = (turn for turn in label.waiting if not self._uses[turn.key.digest].full())
        return next(free, None)

    def _level(self, label: _Label, now: float) -> float:
        """Return the least charge with which a label starts to contend."""
        others = (other.charge(now) for other in self._labels.values() if other is not label)
        return max(self._floor, min(others, default=self._floor))

    def _rest(self, name: str, now: float) -> None:
        """Make a label idle; forget idle labels that would start at the floor anyway."""
        self._idle[name] = self._labels.pop(name)
        self._idle_since = now
        self._idle = {name: idle for name, idle in self._idle.items() if idle.used > self._floor}
