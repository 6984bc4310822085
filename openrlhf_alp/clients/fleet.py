"""Which server gets the next request.

    HEALTHY --failed attempt--> SUSPECT --its pause is over--> HEALTHY
    any --failed or old weights--> STALE --probe sees the required version, or commit--> HEALTHY

A STALE server gets no traffic: its samples would carry the wrong weights.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from openrlhf_alp.clients.channel import Channel

logger = logging.getLogger(__name__)

_AVOID_S = 1.0
_PROBE_EVERY_S = 2.0
_WARN_EVERY_S = 30.0


class ServerState(StrEnum):
    """Health of one server as this client sees it."""

    HEALTHY = "healthy"
    """Gets requests."""

    SUSPECT = "suspect"
    """Failed lately; gets requests when no healthy one is left."""

    STALE = "stale"
    """Missed a weight update; gets none before it has had a full one."""


@dataclass(slots=True, kw_only=True)
class Server:
    """One server and what is known about it."""

    channel: Channel
    num_outstanding: int = 0  # samples asked for and not yet answered
    num_sent: int = 0  # samples ever asked for; breaks ties, so that an idle fleet takes turns
    stale: bool = False
    avoid_until_s: float = 0.0  # monotonic

    @property
    def state(self) -> ServerState:
        if self.stale:
            return ServerState.STALE
        suspect = self.avoid_until_s > time.monotonic()
        return ServerState.SUSPECT if suspect else ServerState.HEALTHY


class Fleet:
    """All servers of one policy, balanced by outstanding samples."""

    def __init__(self, channels: Sequence[Channel]) -> None:
        self.servers = [Server(channel=channel) for channel in channels]
        self.min_version = 0
        self._warned_s: dict[str | None, float] = {}  # monotonic, by URL; None: of all servers

    def best(self) -> Server | None:
        """The least loaded server that may serve; a suspect one only when none is healthy.

        None: every server is stale.
        """
        usable = [server for server in self.servers if not server.stale]
        return min(
            usable,
            key=lambda s: (s.state is ServerState.SUSPECT, s.num_outstanding, s.num_sent),
            default=None,
        )

    def failed(self, server: Server, delay_s: float) -> None:
        """Prefer other servers for at least a second."""
        server.avoid_until_s = time.monotonic() + max(delay_s, _AVOID_S)

    def may_warn(self, server: Server | None) -> bool:
        """Whether half a minute has gone since the last warning about this server (None: all).

        A full server answers 429 to every request of a burst; one line says as much as all.
        """
        key = None if server is None else server.channel.url
        now_s = time.monotonic()
        if now_s - self._warned_s.get(key, -math.inf) < _WARN_EVERY_S:
            return False
        self._warned_s[key] = now_s
        return True

    def mark_stale(self, server: Server, reason: str) -> None:
        """Take a server out of traffic until it has had a full update."""
        if not server.stale:
            logger.warning("%s is stale: %s", server.channel.url, reason)
        server.stale = True
        server.avoid_until_s = time.monotonic() + _PROBE_EVERY_S

    def readmit(self, server: Server) -> None:
        """Put a server back into traffic."""
        if server.stale:
            logger.info("%s serves the required version again", server.channel.url)
        server.stale = False
        server.avoid_until_s = 0.0

    def due_for_probe(self) -> list[Server]:
        """Stale servers that were not probed lately; their next probe is put off."""
        now_s = time.monotonic()
        due = [server for server in self.servers if server.stale and server.avoid_until_s <= now_s]
        for server in due:
            server.avoid_until_s = now_s + _PROBE_EVERY_S
        return due
