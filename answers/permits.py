"""Let a generation begin: within its key's limits, and in its turn.

A permit is given or refused before the flight begins, so that a refusal reaches only the caller
that would have begun it. It may come with a ticket for the queue: the flight waits for the turn
inside `turns.fair_queue`. The flight gives the permit back at its end.
"""

from typing import NamedTuple

from answers.limits import Charge, Limits
from answers.turns import Ticket, Turns
from keystore import Key
from record import Usage
from wire.http11 import HTTPError


class Permit(NamedTuple):
    """Permission for one generation.

    `ticket` is its place in the queue, None if any number may run; `charge` is what it counts
    against the key's limits, None if the key has none.
    """

    key: Key
    ticket: Ticket | None
    charge: Charge | None
    limits: Limits

    def end(self, usage: Usage) -> None:
        """Give the permit back at the answer's end, and count the generated tokens."""
        had_turn = self.ticket is None or self.ticket.had_turn
        if self.ticket is not None:
            self.ticket.withdraw()
        if self.charge is not None:
            if had_turn:
                self.limits.spend(self.key, usage.tokens)
            else:
                self.charge.refund()


class Permits(NamedTuple):
    """Where permits come from."""

    limits: Limits
    turns: Turns

    def admit(self, key: Key, model: str, size: int) -> Permit:
        """Return a permit for a generation.

        Args:
            key: the caller's key, which is charged.
            model: its normalized name; empty if it is not known.
            size: bytes of the prompt, reserved while it waits.

        Raises:
            HTTPError: 429 if the key has reached a limit or its label's queue is full, 503 if
                OllProx is stopping or has no memory; always with Retry-After.

        """
        charge = self.limits.admit(key) if key.rate or key.tokens else None
        if not self.turns.bounds(key):
            return Permit(key, None, charge, self.limits)
        try:
            ticket = self.turns.admit(key, model, size)
        except HTTPError:
            if charge is not None:
                charge.refund()
            raise
        return Permit(key, ticket, charge, self.limits)
