"""What is asked of every rollout server alike: contract, weights, pause, sleep, readiness.

Weight updates go to every server; one that misses an update is stale and gets no traffic. The next
update asks it again.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Self, TypeVar

import httpx

from openrlhf_alp.clients.channel import Channel
from openrlhf_alp.clients.errors import (
    InvalidReply,
    ServiceError,
    ServiceUnavailable,
    WeightUpdateFailed,
)
from openrlhf_alp.clients.fleet import Fleet, Server, ServerState
from openrlhf_alp.clients.http import Backoff, Timeouts, error_of
from services.rollout.wire.schemas import (
    CommitRequest,
    CommitResponse,
    Contract,
    Health,
    PauseMode,
    PauseRequest,
    PrepareRequest,
    SleepLevel,
    SleepMode,
    SleepRequest,
    WeightsStatus,
)

Result = TypeVar("Result")


class ControlClient:
    """Talks to one or more rollout services that serve the same policy, to all of them at once.

    Args:
        urls: base URLs, for example http://127.0.0.1:8000.
        api_key: bearer key of the data routes.
        admin_key: bearer key of the control routes; needed for weights and pause.
        timeouts: limits of every call.
        backoff: waiting between attempts.
        transport: replaces the network, for tests.

    Use inside one event loop; close with `aclose` or as an async context manager.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        api_key: str,
        admin_key: str | None = None,
        timeouts: Timeouts | None = None,
        backoff: Backoff | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        if not urls:
            raise ValueError("No rollout service URL. Fix: set --rollout.service_urls.")
        self._timeouts = timeouts or Timeouts()
        self._backoff = backoff or Backoff()
        self._fleet = Fleet(
            [
                Channel(
                    url,
                    api_key=api_key,
                    admin_key=admin_key,
                    timeouts=self._timeouts,
                    transport=transport,
                )
                for url in urls
            ]
        )
        self._missed: set[str] = set()  # URLs that missed a phase of the update in progress
        self._background: set[asyncio.Task[None]] = set()  # cancellations on their way

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Finish cancellations on their way and close every connection."""
        await asyncio.gather(*self._background)
        await asyncio.gather(*(server.channel.aclose() for server in self._fleet.servers))

    def states(self) -> dict[str, ServerState]:
        """Health of each server by URL."""
        return {server.channel.url: server.state for server in self._fleet.servers}

    def require_version(self, version: int) -> None:
        """Refuse servers that serve less than `version` for every request sent from now on."""
        self._fleet.min_version = version

    def reachable(self) -> list[Channel]:
        """The servers that have followed the update in progress so far."""
        return [server.channel for server in self._following()]

    async def contract(self) -> Contract:
        """The contract of the first server, after checking that all servers have the same one.

        Raises:
            ServiceUnavailable: a server does not answer.
            InvalidReply: two servers serve different models.
        """
        return (await self.contracts())[0]

    async def contracts(self) -> list[Contract]:
        """The contract of each server; they differ at most in version and weights_dir.

        Raises: as `contract`.
        """
        contracts = await self._on_all(lambda c: c.get("/v1/contract", Contract))
        first_url = self._fleet.servers[0].channel.url
        for server, contract in zip(self._fleet.servers, contracts, strict=True):
            if contract.contract_hash != contracts[0].contract_hash:
                raise InvalidReply(
                    f"{server.channel.url} and {first_url} have different contracts. Fix: "
                    "start all servers with the same model folder and flags."
                )
        return contracts

    async def reachable_weights(self) -> list[WeightsStatus]:
        """Begin an update: weight state of the servers that answer; the others become stale.

        Raises:
            WeightUpdateFailed: none answers.
        """
        self._missed.clear()
        return await self._update(lambda c: c.get("/v1/weights", WeightsStatus))

    async def weights(self) -> list[WeightsStatus]:
        """Weight state of each server, in the order of the URLs.

        Raises:
            ServiceUnavailable: a server does not answer.
        """
        return await self._on_all(lambda c: c.get("/v1/weights", WeightsStatus))

    async def prepare_weights(self, request: PrepareRequest) -> list[WeightsStatus]:
        """Stage an update on every server that answers; the others become stale.

        Raises:
            WeightUpdateFailed: a server refused the update, or none answered. Nothing changed.
        """
        path = "/v1/weights/prepare"
        return await self._update(lambda c: c.post(path, request, WeightsStatus))

    async def commit_weights(self, request: CommitRequest) -> list[CommitResponse]:
        """Swap every server that staged the update; one that fails to becomes stale.

        Ends the update. Afterwards replies below this version are refused.

        Raises:
            WeightUpdateFailed: no server serves the new version.
        """
        path = "/v1/weights/commit"
        try:
            responses = await self._update(
                lambda c: c.post(path, request, CommitResponse), refusal_is_fatal=False
            )
            for server in self._following():
                self._fleet.readmit(server)
        finally:
            self._missed.clear()
        self.require_version(request.version)
        return responses

    async def upload(self, path: Path, name: str) -> str:
        """Send a file to every server that answers; the others become stale.

        Returns:
            The name that prepare knows the file by.

        Raises:
            WeightUpdateFailed: a server refused the file, or none took it.
        """
        await self._update(lambda c: c.upload(path, name, self._backoff))
        return f"uploads/{name}"

    async def abort_weights(self) -> None:
        """End the update: every server that answers forgets what it staged, and the uploads."""
        self._missed.clear()

        async def abort(channel: Channel) -> None:
            with contextlib.suppress(ServiceError):
                await channel.post("/v1/weights/abort", None, WeightsStatus)

        await self._on_all(abort)

    async def pause(self, mode: PauseMode = "keep") -> None:
        """Stop drawing tokens on every server."""
        request = PauseRequest(mode=mode)
        await self._on_all(lambda c: c.post("/v1/pause", request, Health))

    async def resume(self) -> None:
        """Draw tokens again on every server."""
        await self._on_all(lambda c: c.post("/v1/resume", None, Health))

    async def sleep(self, level: SleepLevel = 1, mode: SleepMode = "wait") -> None:
        """Give the accelerators' memory back on every server, until `wake_up`.

        Raises:
            ServiceUnavailable: a server does not answer.
            RequestRejected: a server cannot sleep; it says why.
        """
        request = SleepRequest(level=level, mode=mode)
        await self._on_all(lambda c: c.post("/v1/sleep", request, Health))

    async def wake_up(self) -> None:
        """Serve again on every server what was serving before `sleep`."""
        await self._on_all(lambda c: c.post("/v1/wake_up", None, Health))

    async def wait_ready(self, timeout_s: float) -> None:
        """Return when every server would serve a request.

        Raises:
            ServiceUnavailable: names a server that is not ready after `timeout_s`.
        """
        give_up_s = time.monotonic() + timeout_s
        await self._on_all(lambda channel: self._wait_for(channel, give_up_s))

    async def _wait_for(self, channel: Channel, give_up_s: float) -> None:
        while True:
            try:
                response = await channel.send("GET", "/readyz", None, give_up_s)
                if response.status_code == 200:
                    return
                failure = error_of(response, channel.url)
            except ServiceUnavailable as error:
                failure = error
            if time.monotonic() + self._backoff.first_s >= give_up_s:
                raise ServiceUnavailable(f"Not ready in time. {failure}")
            await asyncio.sleep(self._backoff.first_s)

    async def _on_all(self, call: Callable[[Channel], Awaitable[Result]]) -> list[Result]:
        return list(await asyncio.gather(*(call(s.channel) for s in self._fleet.servers)))

    def _following(self) -> list[Server]:
        return [s for s in self._fleet.servers if s.channel.url not in self._missed]

    async def _update(
        self, call: Callable[[Channel], Awaitable[Result]], *, refusal_is_fatal: bool = True
    ) -> list[Result]:
        """Run one phase of an update; who cannot follow becomes stale and is left out of the rest.

        A server that comes back in mid-update lacks what was sent before, and would refuse.
        """

        async def outcome_of(server: Server) -> Result | ServiceError:
            try:
                return await call(server.channel)
            except ServiceError as error:
                return error

        servers = self._following()
        outcomes = await asyncio.gather(*(outcome_of(server) for server in servers))
        failures = {
            server.channel.url: outcome
            for server, outcome in zip(servers, outcomes, strict=True)
            if isinstance(outcome, ServiceError)
        }
        refused = any(not isinstance(error, ServiceUnavailable) for error in failures.values())
        if len(failures) == len(servers) or (refused and refusal_is_fatal):
            causes = "; ".join(str(error) for error in failures.values())
            raise WeightUpdateFailed(f"{len(failures)} of {len(servers)} servers failed: {causes}")
        for server in servers:
            failure = failures.get(server.channel.url)
            if failure is not None:
                self._missed.add(server.channel.url)
                self._fleet.mark_stale(server, str(failure))
        return [outcome for outcome in outcomes if not isinstance(outcome, ServiceError)]
