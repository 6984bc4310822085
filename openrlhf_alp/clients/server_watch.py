"""Tells a request that must wait from one that nobody will ever answer.

A request may queue at a busy server for as long as it takes, so no limit on its whole time can say
that the servers are gone. They are asked instead.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from openrlhf_alp.clients.errors import ServiceError, ServiceUnavailable
from openrlhf_alp.clients.fleet import Server

Result = TypeVar("Result")

_MOST_BETWEEN_PROBES_S = 10.0


class NoServerLeft(ServiceUnavailable):
    """No server has answered for longer than the run is willing to wait."""


class ServerWatch:
    """Asks servers whether they are there, while something waits for them.

    Args:
        servers: returns those to ask.
        patience_s: how long all of them may be gone.
    """

    def __init__(self, servers: Callable[[], Sequence[Server]], *, patience_s: float) -> None:
        self._servers = servers
        self._patience_s = patience_s
        self._between_s = min(_MOST_BETWEEN_PROBES_S, patience_s / 5)
        self._seen_s = 0.0  # monotonic; when a server last answered
        self._num_waiting = 0
        self._probing: asyncio.Task[None] | None = None

    async def unless_all_are_gone(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Wait for `work`; cancel it when no server is left.

        Raises:
            NoServerLeft: names the servers.
            Exception: whatever `work` raises.
        """
        if not self._num_waiting:
            self._seen_s = time.monotonic()
        self._num_waiting += 1
        # One probe serves all that wait: a step has hundreds of groups at once.
        if self._probing is None or self._probing.done():
            self._probing = asyncio.create_task(self._probe_while_waiting())
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait({task, self._probing}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                self._probing.result()  # raises NoServerLeft
            return await task
        finally:
            self._num_waiting -= 1
            task.cancel()

    async def _probe_while_waiting(self) -> None:
        while self._num_waiting:
            await asyncio.sleep(self._between_s)
            asked = await asyncio.gather(*map(self._serves, self._servers()))
            now_s = time.monotonic()
            if any(asked):
                self._seen_s = now_s
            elif now_s - self._seen_s > self._patience_s:
                urls = ", ".join(s.channel.url for s in self._servers())
                raise NoServerLeft(
                    f"none of {urls} has been ready for {self._patience_s:g} s "
                    "(--rollout.request_timeout_s). Fix: look at their logs, start them again and "
                    "resume from the last checkpoint."
                )

    async def all_lost_the_weights(self) -> bool:
        """Whether servers answer, but none has the weights that are required of it.

        So it is when the only server was started again: it waits for a push, and whoever could push
        waits for its answers.
        """
        servers = self._servers()
        if not all(server.stale for server in servers):
            return False
        return any(await asyncio.gather(*map(self._answers, servers)))

    async def _serves(self, server: Server) -> bool:
        return await self._answers(server) and not server.stale

    async def _answers(self, server: Server) -> bool:
        give_up_s = time.monotonic() + self._patience_s  # a busy server may be slow to answer
        try:
            response = await server.channel.send("GET", "/readyz", give_up_s=give_up_s)
        except ServiceError:
            return False
        return response.status_code == 200
