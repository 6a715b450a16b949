"""Let a generation begin: within its key's limits, and in its turn.

A permit is got at once or refused, before the flight begins, so that a refusal reaches only the
caller that would have begun it. The flight gives it back at its end.
"""

from typing import NamedTuple

from answers.limits import Charge, Limits, Reserved
from answers.turns import Ticket, Turns
from keystore import Key
from record import Usage
from wire.http11 import HTTPError


class Permit(NamedTuple):
    """A generation that may begin, with a ticket as soon as its turn comes.

    `ticket` is None if nothing bounds how many run, `charge` if its key has no limit.
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
        """Give it back at the answer's end, and count the tokens that were generated."""
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

    def admit(self, key: Key, model: str, size: int, reserved: Reserved | None = None) -> Permit:
        """Let a generation begin.

        Args:
            key: of the caller, who is charged.
            model: its normalized name; empty if the body does not tell.
            size: bytes of the prompt, which count while it waits.
            reserved: what `SharedLimits.reserve` returned.

        Raises:
            HTTPError: 429 if the key has used up a limit or its label's queue is full, 503 if
                OllProx is stopping or has no memory; all with Retry-After.

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
