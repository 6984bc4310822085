"""Several servers of one kind: which one gets the next request, and the one retry loop of clients.

    HEALTHY --failed attempt--> SUSPECT --its pause is over--> HEALTHY
    any --missed a requirement--> STALE --a probe or the next update finds it met--> HEALTHY

A STALE server gets no requests. For rollout servers the requirement is the policy's version: the
samples of a stale one would carry old weights.
"""

import asyncio
import contextlib
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Required, TypedDict, TypeVar, Unpack

import httpx

from openrlhf_alp.clients.channel import Channel, ServiceKind, Timeouts
from openrlhf_alp.clients.errors import IncompleteReply, ServiceError, ServiceUnavailable

logger = logging.getLogger(__name__)

_AVOID_S = 1.0
_PROBE_EVERY_S = 2.0
_WARN_EVERY_S = 30.0

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Exponential waiting with full jitter between attempts."""

    first_s: float = 0.1  # longest first wait; it doubles with each attempt
    largest_s: float = 5.0

    def delay_s(self, attempt: int, retry_after_s: float) -> float:
        """Seconds after attempt number `attempt` (from 1) and before the next one.

        Retry-After sets the shortest wait; the jitter keeps many clients from coming back at once.
        """
        # The exponent is bounded because 2.0 ** 1024 overflows, and a client may try for hours.
        ceiling = min(self.largest_s, self.first_s * 2 ** min(attempt - 1, 16))
        return retry_after_s + random.uniform(0.0, ceiling)


class Access(TypedDict, total=False):
    """How servers are reached. Every client takes these as keyword arguments."""

    api_key: Required[str]
    """Bearer key of the data routes."""

    admin_key: str | None
    """Bearer key of the control routes; needed for weights."""

    timeouts: Timeouts | None
    """Limits of every call; `total_s` bounds all attempts of one request together."""

    backoff: Backoff | None
    """Waiting between attempts."""

    transport: httpx.AsyncBaseTransport | None
    """Replaces the network, for tests."""


class ServerState(StrEnum):
    """Health of one server as this client sees it."""

    HEALTHY = "healthy"
    """Gets requests."""

    SUSPECT = "suspect"
    """Failed lately; gets requests when no healthy server is left."""

    STALE = "stale"
    """Missed a requirement; gets no requests until it meets it again."""


@dataclass(slots=True, kw_only=True)
class Server:
    """One server and what is known about it."""

    channel: Channel
    num_outstanding: int = 0  # samples or runs asked for and not yet answered
    num_sent: int = 0  # samples or runs ever asked for
    stale: bool = False
    avoid_until_s: float = 0.0  # monotonic; of a stale server: when its next probe is due

    @property
    def state(self) -> ServerState:
        if self.stale:
            return ServerState.STALE
        suspect = self.avoid_until_s > time.monotonic()
        return ServerState.SUSPECT if suspect else ServerState.HEALTHY

    @contextlib.contextmanager
    def loaded(self, load: int) -> Iterator[None]:
        """Count `load` samples or runs as outstanding."""
        self.num_outstanding += load
        self.num_sent += load
        try:
            yield
        finally:
            self.num_outstanding -= load


class Requirement:
    """What a server must meet to get requests. This one is met by every server."""

    async def is_met_by(self, channel: Channel) -> bool:
        """Ask a stale server whether it may come back."""
        return True

    def unmet(self) -> str:
        """The error text, with its fix, for when no server meets the requirement."""
        return "Every server is stale. Fix: restart them."


class Fleet:
    """Servers of one kind that can take each other's requests.

    Args:
        kind: which service runs on all of them.
        urls: base URLs, for example http://127.0.0.1:8000.
        requirement: what a stale server must meet before it gets requests again.
        access: see `Access`.

    Use it inside one event loop.
    """

    def __init__(
        self,
        kind: ServiceKind,
        urls: Sequence[str],
        *,
        requirement: Requirement | None = None,
        **access: Unpack[Access],
    ) -> None:
        if not urls or isinstance(urls, str):
            raise ValueError(
                f"urls={urls!r}: give a list with at least one URL of a {kind} service "
                f"(--{kind}.service_urls)."
            )
        self.timeouts = access.get("timeouts") or Timeouts()
        self.backoff = access.get("backoff") or Backoff()
        self.servers = [
            Server(
                channel=Channel(
                    url,
                    kind=kind,
                    api_key=access["api_key"],
                    admin_key=access.get("admin_key"),
                    timeouts=self.timeouts,
                    transport=access.get("transport"),
                )
            )
            for url in urls
        ]
        self._requirement = requirement or Requirement()
        self._warned_s: dict[str | None, float] = {}  # monotonic, by URL; None: of all servers

    async def aclose(self) -> None:
        """Close every connection."""
        await asyncio.gather(*(server.channel.aclose() for server in self.servers))

    async def call(
        self,
        attempt: Callable[[Server, float], Awaitable[Result]],
        *,
        what: str,
        within_s: float,
        load: int = 0,
        only: Server | None = None,
        attach: bool = False,
        backoff: Backoff | None = None,
        max_attempts: float = math.inf,
    ) -> Result:
        """Make attempts until one of them succeeds, on the least loaded server each time.

        Args:
            attempt: takes a server and the monotonic time at which it must have given up. Another
                attempt follows when it raises ServiceUnavailable or IncompleteReply.
            what: names the call in log lines and in the error.
            within_s: for all attempts together.
            load: how many samples or runs the call puts on a server.
            only: makes all attempts on this server.
            attach: a server joins a repeated request to the run that it may still have, so the
                attempt after a lost connection goes to the same server.
            backoff, max_attempts: replaces the fleet's own back-off; gives up after so many.

        Raises:
            ServiceUnavailable: no attempt succeeded. Its cause is the last failure.
            Exception: whatever else `attempt` raises; it is not repeated.
        """
        give_up_s = time.monotonic() + within_s
        number = 0
        stay_on: Server | None = None
        while True:
            server = only or stay_on
            try:
                server = server or await self._choose()
                with server.loaded(load):
                    return await attempt(server, give_up_s)
            except (ServiceUnavailable, IncompleteReply) as error:
                failure = error
            number += 1
            delay_s = (backoff or self.backoff).delay_s(number, failure.retry_after_s)
            # Give up before the wait and not after it: the caller learns the cause at once.
            if number >= max_attempts or time.monotonic() + delay_s >= give_up_s:
                message = f"{what}: gave up after {number} attempts. {failure}"
                raise ServiceUnavailable(message) from failure
            level = logging.WARNING if self._may_warn(server) else logging.DEBUG
            logger.log(level, "%s: attempt %d: %s", what, number, failure)
            # Another server would do from the beginning what this one may have nearly finished. It
            # gets one such chance; if the connection is lost again, the server itself is in doubt.
            can_attach = attach and failure.may_be_running and stay_on is None
            stay_on = server if can_attach else None
            if server is not None and stay_on is None:
                # Even after a short delay another server is the better choice for a second: a
                # refusal comes faster than an answer, and the load alone would favour this one.
                server.avoid_until_s = time.monotonic() + max(delay_s, _AVOID_S)
            following = only or stay_on or self._least_loaded()
            # A healthy server that has refused nothing is asked without a wait.
            if following is None or following is server or following.state is ServerState.SUSPECT:
                await asyncio.sleep(delay_s)

    def _may_warn(self, server: Server | None) -> bool:
        """Whether half a minute has passed since the last warning about this server (None: all).

        A full server answers 429 to every request of a burst; one line says as much as all.
        """
        key = None if server is None else server.channel.url
        now_s = time.monotonic()
        if now_s - self._warned_s.get(key, -math.inf) < _WARN_EVERY_S:
            return False
        self._warned_s[key] = now_s
        return True

    def mark_stale(self, server: Server, reason: str) -> None:
        """Send no requests to a server until it meets the requirement again."""
        if not server.stale:
            logger.warning("%s is stale: %s", server.channel.url, reason)
        server.stale = True
        # It was asked just now, so a probe at once would only repeat the answer.
        server.avoid_until_s = time.monotonic() + _PROBE_EVERY_S

    def readmit(self, server: Server) -> None:
        """Send requests to a server again."""
        if server.stale:
            logger.info("%s meets the requirement again", server.channel.url)
        server.stale = False
        server.avoid_until_s = 0.0

    async def _choose(self) -> Server:
        """The server for the next attempt, after a probe of the stale ones.

        Raises:
            ServiceUnavailable: every server is stale.
        """
        now_s = time.monotonic()
        due = [server for server in self.servers if server.stale and server.avoid_until_s <= now_s]
        for server in due:
            # Set before the first await: of many requests at once only one probes the server.
            server.avoid_until_s = now_s + _PROBE_EVERY_S
        for server in due:
            with contextlib.suppress(ServiceError):
                if await self._requirement.is_met_by(server.channel):
                    self.readmit(server)
        chosen = self._least_loaded()
        if chosen is None:
            raise ServiceUnavailable(self._requirement.unmet())
        return chosen

    def _least_loaded(self) -> Server | None:
        """The least loaded server that is not stale; a suspect one only if none is healthy."""
        return min(
            (server for server in self.servers if not server.stale),
            # `num_sent` breaks ties; otherwise an idle fleet would always ask its first server.
            key=lambda s: (s.state is ServerState.SUSPECT, s.num_outstanding, s.num_sent),
            default=None,
        )
