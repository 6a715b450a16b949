"""Write to many connections in one go."""

import asyncio


class Outbox:
    """What is written once all that is ready to run has had its turn.

    A write wakes who waits at the other end, and that costs more than all else that a hit
    needs. Of many writes in a row only the first does.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[asyncio.Transport, bytes]] = []

    def put(self, transport: asyncio.Transport, data: bytes) -> None:
        """Take what is to be written soon: before the event loop looks at any socket again."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self.flush)
        self._waiting.append((transport, data))

    def flush(self) -> None:
        """Write it now; to be called before a connection is closed."""
        waiting, self._waiting = self._waiting, []
        for transport, data in waiting:
            if not transport.is_closing():
                transport.write(data)
