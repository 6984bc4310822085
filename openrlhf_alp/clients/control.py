"""What is asked of every rollout server alike: contract, weights, readiness.

Weight updates go to every server; a server that misses one is stale and gets no requests. The next
update asks it again.
"""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, Unpack

from openrlhf_alp.clients.channel import Channel
from openrlhf_alp.clients.errors import (
    InvalidReply,
    ServiceError,
    ServiceUnavailable,
    UpdateUnanswered,
    WeightUpdateFailed,
    error_of,
)
from openrlhf_alp.clients.fleet import Access, Backoff, Fleet, Requirement, Server
from openrlhf_alp.clients.server_watch import NoServerLeft
from services.rollout.wire.schemas import (
    CommitRequest,
    CommitResponse,
    Contract,
    PrepareRequest,
    UploadStatus,
    WeightsStatus,
)

Result = TypeVar("Result")

_UPLOAD_ATTEMPTS = 5
_PIECE_BYTES = 4 * 2**20


@dataclass(slots=True)
class RequiredVersion(Requirement):
    """Requests go to servers that serve this version of the policy or a newer one."""

    minimum: int = 0

    async def is_met_by(self, channel: Channel) -> bool:
        status = await channel.get("/v1/weights", WeightsStatus)
        return status.state == "serving" and status.version >= self.minimum

    def unmet(self) -> str:
        return (
            f"No server serves version {self.minimum} or newer. Fix: push the weights again; a "
            "restarted server needs a full update."
        )


class ControlClient(AbstractAsyncContextManager["ControlClient"]):
    """Talks to one or more rollout services that serve the same policy, to all of them at once.

    Args:
        urls: base URLs, for example http://127.0.0.1:8000.
        access: see `clients.fleet.Access`.

    Use it inside one event loop; close it with `aclose` or as an async context manager.

    Attributes:
        fleet: the servers and their health.
        required: the policy version that a server must serve to get requests.
    """

    def __init__(self, urls: Sequence[str], **access: Unpack[Access]) -> None:
        self.required = RequiredVersion()
        self.fleet = Fleet("rollout", urls, requirement=self.required, **access)
        self._missed: set[str] = set()  # URLs that missed a phase of the update in progress

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close every connection."""
        await self.fleet.aclose()

    def reachable(self) -> list[Server]:
        """The servers that have followed the update in progress so far."""
        return [s for s in self.fleet.servers if s.channel.url not in self._missed]

    async def contract(self) -> Contract:
        """The contract of the first server, after checking that all servers have the same one.

        Raises:
            ServiceUnavailable: a server does not answer.
            InvalidReply: two servers serve different models.
        """
        return (await self.contracts())[0]

    async def contracts(self) -> list[Contract]:
        """The contract of each server; they differ at most in version and weights_dir."""
        contracts = await self._on_all(lambda s: s.channel.get("/v1/contract", Contract))
        first_url = self.fleet.servers[0].channel.url
        for server, contract in zip(self.fleet.servers, contracts, strict=True):
            if contract.contract_hash != contracts[0].contract_hash:
                raise InvalidReply(
                    f"{server.channel.url} and {first_url} have different contracts. Fix: "
                    "start all servers with the same model folder and flags."
                )
        return contracts

    async def weights(self) -> list[WeightsStatus]:
        """Weight state of each server, in the order of the URLs.

        Raises:
            ServiceUnavailable: a server does not answer.
        """
        return await self._on_all(_weights)

    async def reachable_weights(self) -> list[WeightsStatus]:
        """Begin an update: weight state of the servers that answer; the others become stale.

        Raises:
            UpdateUnanswered: no server answers.
        """
        self._missed.clear()
        return await self._update(_weights)

    async def wait_for_one(self, timeout_s: float) -> None:
        """Return when a server tells its weights, as one does that was started again.

        Raises:
            NoServerLeft: none does within `timeout_s`.
        """
        try:
            await self.fleet.call(
                lambda server, _: _weights(server), what="weights of a server", within_s=timeout_s
            )
        except ServiceUnavailable as error:
            raise NoServerLeft(f"No server answers within {timeout_s:g} s. {error}") from error

    async def upload(self, path: Path, name: str) -> str:
        """Send a file to every server that answers; the others become stale.

        Returns:
            The name that prepare knows the file by.

        Raises:
            WeightUpdateFailed: a server refused the file, or no server took it.
        """

        async def to(server: Server) -> None:
            await self.fleet.call(
                lambda server, give_up_s: _continue_upload(server, path, name, give_up_s),
                what=f"upload of {name}",
                # A file may take any time as long as bytes flow, so attempts are counted instead.
                within_s=math.inf,
                max_attempts=_UPLOAD_ATTEMPTS,
                only=server,
            )

        await self._update(to)
        return f"uploads/{name}"

    async def prepare_weights(self, request: PrepareRequest) -> list[WeightsStatus]:
        """Stage an update on every server that answers; the others become stale.

        Raises:
            WeightUpdateFailed: a server refused the update, or none answered. Nothing changed.
        """
        path = "/v1/weights/prepare"
        return await self._update(lambda s: s.channel.post(path, request, WeightsStatus))

    async def commit_weights(self, request: CommitRequest) -> list[CommitResponse]:
        """End the update: swap the weights of every server that staged it; the others become stale.

        Afterwards replies below this version are refused.

        Raises:
            WeightUpdateFailed: no server serves the new version.
        """
        path = "/v1/weights/commit"
        try:
            # Once one server may have swapped there is no way back, so a refusal is a server that
            # stays behind and not the end of the update.
            responses = await self._update(
                lambda s: s.channel.post(path, request, CommitResponse), refusal_is_fatal=False
            )
            for server in self.reachable():
                self.fleet.readmit(server)
        finally:
            self._missed.clear()
        self.required.minimum = request.version
        return responses

    async def abort_weights(self) -> None:
        """End the update: every server that answers drops what it staged, and the uploads."""
        self._missed.clear()

        async def abort(server: Server) -> None:
            with contextlib.suppress(ServiceError):
                await server.channel.post("/v1/weights/abort", None, WeightsStatus)

        await self._on_all(abort)

    async def wait_ready(self, timeout_s: float) -> None:
        """Return when every server would serve a request.

        Raises:
            ServiceUnavailable: names a server that is not ready after `timeout_s`.
        """
        # A model may load for minutes; the usual back-off would add seconds after it is ready.
        steady = Backoff(first_s=self.fleet.backoff.first_s, largest_s=self.fleet.backoff.first_s)

        async def until_ready(server: Server) -> None:
            url = server.channel.url
            await self.fleet.call(
                _require_ready, what=url, within_s=timeout_s, only=server, backoff=steady
            )

        try:
            await self._on_all(until_ready)
        except ServiceUnavailable as error:
            raise ServiceUnavailable(f"Not ready within {timeout_s:g} s. {error}") from error

    async def _on_all(self, call: Callable[[Server], Awaitable[Result]]) -> list[Result]:
        return list(await asyncio.gather(*(call(server) for server in self.fleet.servers)))

    async def _update(
        self, call: Callable[[Server], Awaitable[Result]], *, refusal_is_fatal: bool = True
    ) -> list[Result]:
        """Run one phase of an update; a server that does not follow becomes stale.

        It is left out of the later phases, because it lacks what this one brought and would refuse.
        """

        async def outcome_of(server: Server) -> Result | ServiceError:
            try:
                return await call(server)
            except ServiceError as error:
                return error

        servers = self.reachable()
        outcomes = await asyncio.gather(*(outcome_of(server) for server in servers))
        failures = [
            (server, outcome)
            for server, outcome in zip(servers, outcomes, strict=True)
            if isinstance(outcome, ServiceError)
        ]
        # A server that is gone can be left behind. One that refuses says that the update itself is
        # wrong, and the others would take the wrong weights.
        refused = any(not isinstance(error, ServiceUnavailable) for _, error in failures)
        if len(failures) == len(servers) or (refused and refusal_is_fatal):
            causes = "; ".join(str(error) for _, error in failures)
            kind = WeightUpdateFailed if refused else UpdateUnanswered
            raise kind(f"{len(failures)} of {len(servers)} servers failed: {causes}")
        for server, failure in failures:
            self._missed.add(server.channel.url)
            self.fleet.mark_stale(server, str(failure))
        return [outcome for outcome in outcomes if not isinstance(outcome, ServiceError)]


async def _weights(server: Server) -> WeightsStatus:
    return await server.channel.get("/v1/weights", WeightsStatus)


async def _require_ready(server: Server, give_up_s: float) -> None:
    response = await server.channel.send("GET", "/readyz", give_up_s=give_up_s)
    if response.status_code != 200:
        # Every status counts as "not yet", also those of a proxy whose server is still starting.
        raise ServiceUnavailable(str(error_of(response, server.channel.url)))


async def _continue_upload(server: Server, path: Path, name: str, give_up_s: float) -> None:
    """Send what the server does not have yet: a lost connection costs no byte that arrived."""
    channel, url = server.channel, f"/v1/weights/files/{name}"
    arrived = (await channel.get(url, UploadStatus)).num_bytes
    if arrived == path.stat().st_size > 0:
        return
    query = {"offset": arrived}
    pieces = _read_from(path, arrived)
    response = await channel.send("PUT", url, pieces, give_up_s=give_up_s, params=query)
    channel.parse(response, UploadStatus)


async def _read_from(path: Path, offset: int) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        file.seek(offset)
        while piece := await asyncio.to_thread(file.read, _PIECE_BYTES):
            yield piece
