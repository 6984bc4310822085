"""Async client of the rollout service: several servers, one set of time limits, safe retries.

A generate call keeps its request_id over all attempts, so that a server can tell a retry from a new
request. Weight updates go to every server; one that misses an update is stale and gets no traffic.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx

from openrlhf_alp.clients.channel import Channel
from openrlhf_alp.clients.errors import (
    IncompleteReply,
    InvalidReply,
    ServiceError,
    ServiceUnavailable,
    WeightUpdateFailed,
)
from openrlhf_alp.clients.fleet import Fleet, Server, ServerState
from openrlhf_alp.clients.http import RETRYABLE, Backoff, Timeouts, error_of
from services.common.wire import MSGPACK_TYPE, encode
from services.rollout.schemas import (
    VERSION_HEADER,
    CommitRequest,
    CommitResponse,
    Contract,
    GenerateRequest,
    GenerateResponse,
    Health,
    PauseMode,
    PauseRequest,
    PrepareRequest,
    SleepLevel,
    SleepMode,
    SleepRequest,
    WeightsStatus,
)

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(slots=True)
class _Retry(Exception):
    """An attempt failed in a way that another attempt may not."""

    failure: ServiceError
    retry_after: str | None = None
    may_be_running: bool = False


class RolloutClient:
    """Talks to one or more rollout services that serve the same policy.

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
        self._background: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "RolloutClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Finish cancellations under way and close every connection."""
        await asyncio.gather(*self._background)
        await asyncio.gather(*(server.channel.aclose() for server in self._fleet.servers))

    def states(self) -> dict[str, ServerState]:
        """Health of each server by URL."""
        return {server.channel.url: server.state for server in self._fleet.servers}

    def require_version(self, version: int) -> None:
        """Refuse servers that serve less than `version` for every request sent from now on."""
        self._fleet.min_version = version

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
        """Weight state of the servers that answer; the others become stale.

        Raises:
            WeightUpdateFailed: none answers.
        """
        return await self._update(lambda c: c.get("/v1/weights", WeightsStatus))

    async def weights(self) -> list[WeightsStatus]:
        """Weight state of each server, in the order of the URLs.

        Raises:
            ServiceUnavailable: a server does not answer.
        """
        return await self._on_all(lambda c: c.get("/v1/weights", WeightsStatus))

    async def generate(self, request: GenerateRequest) -> GenerateResponse:
        """Sample; on a lost connection, 429 or 5xx try again under the same id.

        A connection lost in mid-request is tried again on the same server first, where the retry
        attaches to the run. Cancelling this call frees the slot on the server.

        Raises:
            RequestRejected: the request is wrong.
            DeadlineExceeded: `deadline_s` passed on the server.
            ServiceUnavailable: no server answered within `timeouts.total_s`.
            InvalidReply: the reply breaks the contract.
        """
        body = encode(request, MSGPACK_TYPE)
        give_up_s = time.monotonic() + self._timeouts.total_s
        attempt = 0
        stay_on: Server | None = None
        while True:
            server = stay_on or await self._choose()
            try:
                if server is None:
                    raise _Retry(self._all_stale())
                return await self._attempt(server, request, body, give_up_s)
            except _Retry as retry:
                failure = retry
            except asyncio.CancelledError:
                if server is not None:
                    self._cancel_on(server, request.request_id)
                raise
            attempt += 1
            delay_s = self._backoff.delay_s(attempt, failure.retry_after)
            if time.monotonic() + delay_s >= give_up_s:
                raise ServiceUnavailable(
                    f"Gave up after {attempt} attempts. {failure.failure}"
                ) from failure.failure
            if attempt & (attempt - 1) == 0:  # 1, 2, 4, 8: a long outage fills no log
                logger.warning("%s: attempt %d: %s", request.request_id, attempt, failure.failure)
            stay_on = server if failure.may_be_running and stay_on is None else None
            if server is not None and stay_on is None:
                self._fleet.failed(server, delay_s)
            following = stay_on or self._fleet.best()
            if following is None or following is server or following.state is ServerState.SUSPECT:
                await asyncio.sleep(delay_s)

    async def prepare_weights(self, request: PrepareRequest) -> list[WeightsStatus]:
        """Stage an update on every server that answers; the others become stale.

        Raises:
            WeightUpdateFailed: a server refused the update, or none answered. Nothing changed.
        """
        path = "/v1/weights/prepare"
        return await self._update(lambda c: c.post(path, request, WeightsStatus))

    async def commit_weights(self, request: CommitRequest) -> list[CommitResponse]:
        """Swap every server that staged the update; one that fails to becomes stale.

        Afterwards replies below this version are refused.

        Raises:
            WeightUpdateFailed: no server serves the new version.
        """
        path = "/v1/weights/commit"
        responses = await self._update(
            lambda c: c.post(path, request, CommitResponse), refusal_is_fatal=False
        )
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
        """Forget the staged update on every server that answers."""
        for server in self._fleet.servers:
            with contextlib.suppress(ServiceError):
                await server.channel.post("/v1/weights/abort", None, WeightsStatus)

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

    async def _choose(self) -> Server | None:
        for server in self._fleet.due_for_probe():
            with contextlib.suppress(ServiceError):
                status = await server.channel.get("/v1/weights", WeightsStatus)
                if status.state == "serving" and status.version >= self._fleet.min_version:
                    self._fleet.readmit(server)
        return self._fleet.best()

    async def _attempt(
        self, server: Server, request: GenerateRequest, body: bytes, give_up_s: float
    ) -> GenerateResponse:
        channel = server.channel
        # A request that was under way when the requirement rose may bring back older tokens: its
        # spans name their versions, and its server has missed nothing.
        min_version = self._fleet.min_version
        server.num_outstanding += request.n
        server.num_sent += request.n
        try:
            response = await channel.send("POST", "/v1/generate", body, give_up_s)
            if response.status_code in RETRYABLE:
                retry_after = response.headers.get("retry-after")
                raise _Retry(error_of(response, channel.url), retry_after)
            reply = channel.parse(response, GenerateResponse)
        except IncompleteReply as error:
            raise _Retry(error, may_be_running=True) from error
        except ServiceUnavailable as error:
            lost = isinstance(error.__cause__, httpx.ReadError | httpx.RemoteProtocolError)
            raise _Retry(error, may_be_running=lost) from error
        finally:
            server.num_outstanding -= request.n
        _check_reply(request, reply, channel.url)
        # What the server serves now: the reply itself may be a kept one of an older version.
        serving = int(response.headers.get(VERSION_HEADER, reply.version))
        if serving < min_version:
            needed = f"serves version {serving}, needed is {min_version}"
            self._fleet.mark_stale(server, needed)
            raise _Retry(ServiceUnavailable(f"{channel.url} {needed}."))
        return reply

    def _cancel_on(self, server: Server, request_id: str) -> None:
        """Free the server's slot without making the cancelled caller wait for it."""
        give_up_s = time.monotonic() + self._timeouts.connect_s

        async def delete() -> None:
            with contextlib.suppress(ServiceUnavailable):
                await server.channel.send("DELETE", f"/v1/generate/{request_id}", None, give_up_s)

        task = asyncio.create_task(delete())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _all_stale(self) -> ServiceUnavailable:
        return ServiceUnavailable(
            f"No server serves version {self._fleet.min_version} or newer. Fix: push the weights "
            "again; a restarted server needs a full update."
        )

    async def _on_all(self, call: Callable[[Channel], Awaitable[Result]]) -> list[Result]:
        return list(await asyncio.gather(*(call(s.channel) for s in self._fleet.servers)))

    async def _update(
        self, call: Callable[[Channel], Awaitable[Result]], *, refusal_is_fatal: bool = True
    ) -> list[Result]:
        """Run one phase of an update everywhere; who cannot follow becomes stale."""

        async def outcome_of(server: Server) -> Result | ServiceError:
            try:
                return await call(server.channel)
            except ServiceError as error:
                return error

        servers = self._fleet.servers
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
                self._fleet.mark_stale(server, str(failure))
            elif not refusal_is_fatal:
                self._fleet.readmit(server)
        return [outcome for outcome in outcomes if not isinstance(outcome, ServiceError)]


def _check_reply(request: GenerateRequest, reply: GenerateResponse, url: str) -> None:
    problem = None
    if reply.request_id != request.request_id:
        problem = f"the reply is for {reply.request_id}"
    elif len(reply.samples) != request.n:
        problem = f"{len(reply.samples)} samples instead of {request.n}"
    for index, sample in enumerate(reply.samples):
        if len(sample.token_ids) != len(sample.logprobs):
            problem = f"sample {index} has {len(sample.logprobs)} log-probs for its tokens"
        elif not math.isfinite(sum(sample.logprobs)):
            problem = f"sample {index} has a log-prob that is no finite number"
        elif sum(span.end - span.start for span in sample.spans) != len(sample.token_ids):
            problem = f"the version spans of sample {index} do not cover its tokens"
    if problem is not None:
        raise InvalidReply(
            f"{url}, request {request.request_id}: {problem}. Fix: report it; do not train on it."
        )
