"""Permits to generate: a key's limits and the fair queue behind one call.

A permit is granted or refused at once, before the flight begins, so a refusal reaches only the
caller that would have begun the flight. The flight returns the permit when it ends.
"""

from typing import NamedTuple

from access.rights import Key
from answers.limits import Charge, Limits, Reserved
from answers.turns import Ticket, Turns
from record import Usage
from wire.http11 import HTTPError


class Permit(NamedTuple):
    """Leave to generate once.

    `ticket` is None if nothing bounds how many generations run; `charge` is None if the key has no
    limit.
    """

    key: Key
    ticket: Ticket | None
    charge: Charge | None
    limits: Limits

    def give_back(self) -> None:
        """Give it back unused: nothing was generated."""
        if self.ticket is not None:
            self.ticket.withdraw()
        if self.charge is not None:
            self.charge.refund()

    def end(self, usage: Usage) -> None:
        """Return the permit when the answer ends, and count the generated tokens."""
        had_turn = self.ticket is None or self.ticket.had_turn
        if self.ticket is not None:
            self.ticket.withdraw()
        if self.charge is not None:
            if had_turn:
                self.limits.spend(self.key, usage.tokens)
            else:
                self.charge.refund()


class Permits(NamedTuple):
    """Grants permits."""

    limits: Limits
    turns: Turns

    def admit(self, key: Key, model: str, size: int, reserved: Reserved | None = None) -> Permit:
        """Return a permit for a generation.

        Args:
            key: of the caller; it is charged.
            model: normalized name; empty if unknown.
            size: of the prompt in bytes; held in the budget while it waits.
            reserved: what `SharedLimits.reserve` returned.

        Raises:
            HTTPError: 429 if the key has reached a limit or its label's queue is full, 503 if
                OllProx is stopping or out of memory; all with Retry-After.

        """
        charge = self.limits.admit(key, reserved) if key.rate or key.tokens else None
        if not self.turns.bounds(key):
            return Permit(key, None, charge, self.limits)
        try:
            ticket = self.turns.admit(key, model, size)
        except HTTPError:
            if charge is not None:
                charge.refund()
            raise
        return Permit(key, ticket, charge, self.limits)
