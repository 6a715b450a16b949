"""Decide which of several Ollama servers gets a request. Pure: no I/O; the time is an argument.

- A model's name stands for one digest: the one that most of the healthy servers have; in a tie,
  that of the first server in the list. Servers with another digest do not serve the model, so a
  stored answer is valid whichever server generated it.
- Of the remaining servers, the one with the fewest running generations divided by its weight gets
  the request. In a tie, a server that has the model loaded is preferred; then the choice depends
  only on the model and the start of the prompt, so that Ollama's own prompt cache is used.
- A server is down as soon as it cannot be connected to, or when it fails three times in a row.
  Otherwise a server that responds with 503 at once would attract every request. If all suitable
  servers are down, they are tried anyway.
"""

import enum
import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

MAX_FAILURES = 3  # in a row
FIRST_PROBE = 1.0  # seconds until a server that is down is probed
MAX_PROBE = 30.0  # the most seconds between two probes
PROMPT_START = 1024  # bytes of the request's body that may influence the choice


class Health(enum.Enum):
    """Whether a server takes requests."""

    UP = "it takes requests"
    UNREACHABLE = "it cannot be connected to; an answered poll or generation ends this"
    FAILING = "it failed three times in a row; a generation that succeeds ends this"


@dataclass(eq=False, slots=True)
class Member:
    """One server of the roster, compared by identity. Times are in seconds on one clock.

    `digests` has its models by normalized name, None until it has listed them. `slots` is how
    many generations it may run at once, 0 for any number.
    """

    name: str
    weight: float = 1.0
    slots: int = 0
    digests: Mapping[str, str] | None = None
    loaded: frozenset[str] = frozenset()
    health: Health = Health.UP
    running: int = 0  # generations of OllProx
    failures: int = 0  # in a row
    errors: int = 0  # since the start
    probe_at: float = 0.0  # when a server that is down may be probed
    pause: float = FIRST_PROBE  # seconds from the last failure to that
    is_probed: bool = False  # a failing server has one generation as a probe


@dataclass(eq=False, slots=True)
class Slot:
    """A generation's place on a server; `member` is None while it may run on any server."""

    member: Member | None = None


class Roster:
    """The servers, in the order of the settings."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = tuple(members)

    # Choice.

    def digest(self, model: str) -> str | None:
        """Return the digest that a model's name stands for; None if no server lists it."""
        listing = [m for m in self.members if m.digests is not None and model in m.digests]
        healthy = [m for m in listing if m.health is Health.UP] or listing
        counts = Counter(m.digests[model] for m in healthy if m.digests is not None)
        return max(counts, key=counts.__getitem__, default=None)  # the first of the largest

    def able(self, model: str) -> list[Member]:
        """Return the servers that may serve a model, whatever their health.

        A model that no server lists may be on one that has not listed its models yet. If there
        is none, any server may respond that there is no such model.
        """
        digest = self.digest(model) if model else None
        if digest is None:
            unknown = [m for m in self.members if m.digests is None]
            return unknown if model and unknown else list(self.members)
        return [m for m in self.members if m.digests and m.digests.get(model) == digest]

    def choose(
        self,
        model: str,
        prompt: bytes,
        now: float,
        tried: Collection[Member] = (),
        *,
        free: bool = False,
    ) -> Member | None:
        """Return the server for a request; None if there is none left.

        Args:
            model: its normalized name; empty if the request needs no model.
            prompt: the request's body, whose start counts.
            now: the time in seconds.
            tried: servers that have already failed to answer the request.
            free: choose only a server with a free slot; otherwise one is only preferred.

        """
        able = self.able(model)
        up = [m for m in able if m.health is Health.UP or self._may_probe(m, now)]
        left = [m for m in up if m not in tried] or [m for m in able if m not in tried]
        with_slot = [m for m in left if not m.slots or m.running < m.slots]
        if free or with_slot:
            left = with_slot
        for member in left:
            if member.health is Health.FAILING and self._may_probe(member, now):
                return member
        return self._least_busy(left, model, prompt)

    @staticmethod
    def _may_probe(member: Member, now: float) -> bool:
        """Return True if a failing server may get one generation as a probe."""
        return member.health is Health.FAILING and not member.is_probed and now >= member.probe_at

    @staticmethod
    def _least_busy(members: list[Member], model: str, prompt: bytes) -> Member | None:
        if not members:
            return None
        ranks = {m: (m.running / m.weight, model not in m.loaded) for m in members}
        best = min(ranks.values())
        tied = [member for member in members if ranks[member] == best]
        if len(tied) == 1:
            return tied[0]
        start = f"{model}\n".encode() + prompt[:PROMPT_START]
        return max(tied, key=lambda m: hashlib.sha256(m.name.encode() + b"\n" + start).digest())

    # Slots.

    @property
    def total(self) -> int:
        """How many generations may run at once on all servers; 0 if any number may."""
        slots = [member.slots for member in self.members]
        return sum(slots) if all(slots) else 0

    def take(self, model: str, now: float) -> Slot | None:
        """Take a slot on which a model can run; None if none is free."""
        if not self.total:
            return Slot()  # the server is chosen when the prompt is known
        member = self.choose(model, b"", now, free=True)
        return None if member is None else self.move(Slot(), member)

    def move(self, slot: Slot, member: Member) -> Slot:
        """Move a generation to another server, even if it is full; return its slot."""
        self.give_back(slot)
        slot.member = member
        member.running += 1
        member.is_probed = member.health is Health.FAILING
        return slot

    def give_back(self, slot: Slot) -> None:
        """Free a slot."""
        if slot.member is not None:
            slot.member.running -= 1
            slot.member.is_probed = False
            slot.member = None

    # Health.

    def note_unreachable(self, member: Member, now: float) -> None:
        """Note that a server could not be connected to."""
        member.errors += 1
        if member.health is not Health.UNREACHABLE:
            self._take_out(member, Health.UNREACHABLE, now)
        elif now >= member.probe_at:
            self._wait_longer(member, now)

    def note_answer(self, member: Member, status: int, now: float) -> None:
        """Note the status of a generation; 500 and above are failures."""
        if status < 500:
            member.failures = 0
            member.health = Health.UP
            return
        self.note_reached(member)
        member.errors += 1
        member.failures += 1
        if member.health is Health.UP and member.failures >= MAX_FAILURES:
            self._take_out(member, Health.FAILING, now)
        elif member.health is Health.FAILING and now >= member.probe_at:
            self._wait_longer(member, now)

    def note_reached(self, member: Member) -> None:
        """Note that a server answered a poll or a generation, with any status."""
        if member.health is Health.UNREACHABLE:
            member.health, member.failures = Health.UP, 0

    def trust_again(self, now: float) -> None:
        """Let failing servers that got no probe for a while serve again, until the next failure.

        A server gets none if other servers' digests have won for all of its models.
        """
        for member in self.members:
            if self._may_probe(member, now) and now >= member.probe_at + MAX_PROBE:
                member.health, member.failures = Health.UP, MAX_FAILURES - 1

    @staticmethod
    def _take_out(member: Member, health: Health, now: float) -> None:
        member.health, member.pause = health, FIRST_PROBE
        member.probe_at = now + FIRST_PROBE

    @staticmethod
    def _wait_longer(member: Member, now: float) -> None:
        member.pause = min(2 * member.pause, MAX_PROBE)
        member.probe_at = now + member.pause

    # Lists.

    def digests(self) -> dict[str, str]:
        """Return each model's digest by name."""
        names = {name for member in self.members for name in member.digests or ()}
        found = {name: self.digest(name) for name in names}
        return {name: digest for name, digest in found.items() if digest is not None}

    def conflicts(self) -> set[tuple[str, str]]:
        """Return pairs of server and model that are not used, because their digest differs."""
        chosen = self.digests()
        return {
            (member.name, name)
            for member in self.members
            for name, digest in (member.digests or {}).items()
            if digest != chosen[name]
        }
