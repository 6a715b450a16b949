"""Talk to a Valkey or Redis server that may be slow, full or gone.

No call waits longer than its timeout, nothing is retried, and a server that fails is left out
for a while. `redis` (redis-py) is imported only here, and only when a server is configured.
"""

import asyncio
import enum
import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

from settings import CacheServer

log = logging.getLogger("ollprox")

MAX_COMMANDS = 16  # at once, each on a connection of its own
MAX_ERRORS = 3  # errors in a row after which the server is left out
RETRY_AFTER = 2.0  # seconds until a server that was left out is tried again


class Unavailable(Exception):
    """The command was not carried out; the text says why."""


class State(enum.Enum):
    """Whether commands are sent to the server."""

    UP = "commands are sent"
    FAILING = "commands are sent, but the last one failed"
    OUT = "no commands are sent, except a probe every RETRY_AFTER seconds"


class Link(Protocol):
    """What is used of a redis-py connection."""

    @property
    def is_connected(self) -> bool:
        """Whether it was connected, and has not been closed since."""

    async def connect(self) -> None:
        """Connect and log in."""

    async def disconnect(self, *, nowait: bool = False) -> None:
        """Close it."""

    async def send_command(self, *arguments: Any) -> None:
        """Send a command."""

    async def read_response(self) -> Any:
        """Return the reply to the command."""


class Valkey:
    """One server: bounded waits, a few connections, and a circuit breaker.

    Args:
        connect: makes a connection, which connects later.
        errors: the module with redis-py's exceptions.
        timeout: seconds that a call may take, including the waits for a connection.
        clock: seconds on a clock that never goes back.

    """

    def __init__(
        self,
        connect: Callable[[], Link],
        errors: Any,
        timeout: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.state = State.UP
        self.errors = 0  # commands that failed
        self._connect = connect
        self._errors = errors
        self._timeout = timeout
        self._clock = clock
        self._places = asyncio.Semaphore(MAX_COMMANDS)
        self._idle: list[Link] = []
        self._in_a_row = MAX_ERRORS - 1  # so that the start warns at the first error
        self._probe_at = 0.0
        self._refused: set[str] = set()  # commands that the server refused when last sent

    async def call(self, *command: Any) -> Any:
        """Send a command; return its reply, with texts as bytes.

        Raises:
            Unavailable: the server is left out, too slow, unreachable, or refuses the command.

        """
        self._check_state()
        has_place = False
        try:
            async with asyncio.timeout(self._timeout), self._places:
                has_place = True
                reply = await self._exchange(command)
        except TimeoutError:
            if not has_place:
                raise Unavailable("all connections are busy") from None
            raise self._failed(f"no reply within {self._timeout:g} s") from None
        except self._errors.OutOfMemoryError:
            self._worked()
            raise Unavailable("the server is full") from None
        except self._errors.AuthenticationError:
            reason = "the server refuses the user or the password of CACHE_URL"
            raise self._failed(reason, at_once=True) from None
        except self._errors.ResponseError as error:
            raise self._was_refused(str(command[0]), error) from None
        except (self._errors.RedisError, OSError) as error:
            raise self._failed(_describe(error)) from None
        self._worked()
        self._refused.discard(str(command[0]))
        return reply

    async def close(self) -> None:
        """Close all connections that are idle."""
        while self._idle:
            await self._idle.pop().disconnect(nowait=True)

    async def _exchange(self, command: tuple[Any, ...]) -> Any:
        link = self._idle.pop() if self._idle else self._connect()
        try:
            if not link.is_connected:
                await link.connect()
            await link.send_command(*command)
            reply = await link.read_response()
        except self._errors.ResponseError:
            if link.is_connected:
                self._idle.append(link)  # the server has replied, so it is in step
            raise
        except BaseException as error:
            # Its next reply may belong to this command.
            await link.disconnect(nowait=True)
            if not isinstance(error, asyncio.CancelledError):
                await self.close()  # the others are probably broken too
            raise
        self._idle.append(link)
        return reply

    def _check_state(self) -> None:
        if self.state is not State.OUT:
            return
        now = self._clock()
        if now < self._probe_at:
            raise Unavailable("the server is left out, since it did not work")
        self._probe_at = now + RETRY_AFTER  # this command is the probe

    def _failed(self, reason: str, *, at_once: bool = False) -> Unavailable:
        self.errors += 1
        self._in_a_row += 1
        if self.state is State.UP:
            self.state = State.FAILING
        if self.state is State.FAILING and (at_once or self._in_a_row >= MAX_ERRORS):
            self.state, self._probe_at = State.OUT, self._clock() + RETRY_AFTER
            log.warning(
                "the shared cache is not used: %s; tried again every %g s", reason, RETRY_AFTER
            )
        return Unavailable(reason)

    def _worked(self) -> None:
        if self.state is State.OUT:
            log.info("the shared cache is used again")
        self.state, self._in_a_row = State.UP, 0

    def _was_refused(self, name: str, error: Exception) -> Unavailable:
        """Note that the server refused one command; it may still carry out others."""
        self._worked()
        self.errors += 1
        denied = isinstance(error, self._errors.NoPermissionError)
        why = "its ACL does not allow it" if denied else type(error).__name__
        if name not in self._refused:
            self._refused.add(name)
            log.warning("the server of the shared cache refuses %s: %s", name, why)
        return Unavailable(f"the server refuses {name}: {why}")


def _describe(error: Exception) -> str:
    """Return what went wrong, without what the server or the URL put into the error's text."""
    cause = error.__cause__ or error.__context__ or error
    reason = getattr(cause, "strerror", None) or getattr(cause, "reason", None)
    return f"{type(error).__name__}: {reason}" if reason else type(error).__name__


def open_valkey(where: CacheServer, timeout: float, ca_file: str | None) -> Valkey:
    """Return a server that is connected to when it is first called.

    Args:
        where: its address, and how to log in.
        timeout: seconds that a call may take.
        ca_file: verifies its certificate, in place of the system's authorities.

    Raises:
        ModuleNotFoundError: redis-py is not installed.

    """
    import redis.asyncio
    from redis import exceptions
    from redis.maint_notifications import MaintNotificationsConfig

    options: dict[str, Any] = {
        "host": where.host,
        "port": where.port,
        "db": where.database,
        "username": where.user or None,
        "password": where.password or None,
        # Beyond our own timeout, which must be the one that ends a wait.
        "socket_timeout": timeout + 1,
        "socket_connect_timeout": timeout + 1,
        # Nothing is sent but what the documented ACL allows.
        "protocol": 2,
        "driver_info": None,
        "maint_notifications_config": MaintNotificationsConfig(enabled=False),
    }
    kind: Any = redis.asyncio.Connection
    if where.tls:
        kind = redis.asyncio.SSLConnection
        options |= {"ssl_ca_certs": ca_file, "ssl_cert_reqs": "required"}
    return Valkey(lambda: kind(**options), exceptions, timeout)
