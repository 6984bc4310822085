"""Async client of the rollout service: several servers, one set of time limits, safe retries.

A generate call keeps its request_id over all attempts, so that a server can tell a retry from a new
request. A server with older weights than required is stale and gets no traffic.
"""

import asyncio
import contextlib
import logging
import math
import time
from dataclasses import dataclass

import httpx

from openrlhf_alp.clients.control import ControlClient
from openrlhf_alp.clients.errors import (
    IncompleteReply,
    InvalidReply,
    ServiceError,
    ServiceUnavailable,
)
from openrlhf_alp.clients.fleet import Server, ServerState
from openrlhf_alp.clients.http import RETRYABLE, error_of
from services.common.wire import MSGPACK_TYPE, encode
from services.rollout.wire.schemas import (
    VERSION_HEADER,
    GenerateRequest,
    GenerateResponse,
    WeightsStatus,
)

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Retry(Exception):
    """An attempt failed in a way that another attempt may not."""

    failure: ServiceError
    retry_after: str | None = None
    may_be_running: bool = False


class RolloutClient(ControlClient):
    """Samples from one or more rollout services that serve the same policy.

    Takes what `ControlClient` takes, and does all that it does.
    """

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
            level = logging.WARNING if self._fleet.may_warn(server) else logging.DEBUG
            logger.log(level, "%s: attempt %d: %s", request.request_id, attempt, failure.failure)
            stay_on = server if failure.may_be_running and stay_on is None else None
            if server is not None and stay_on is None:
                self._fleet.failed(server, delay_s)
            following = stay_on or self._fleet.best()
            if following is None or following is server or following.state is ServerState.SUSPECT:
                await asyncio.sleep(delay_s)

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
