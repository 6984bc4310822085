"""Client of the rollout service: sample from several servers, safely over lost connections.

A generate call keeps its request_id over all attempts, so that a server can tell a retry from a new
request. A server with older weights than required is stale and gets no requests.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Unpack

from openrlhf_alp.clients.control import ControlClient
from openrlhf_alp.clients.errors import InvalidReply, ServiceUnavailable
from openrlhf_alp.clients.fleet import Access, Server
from services.common.wire import MSGPACK_TYPE, encode
from services.rollout.wire.schemas import VERSION_HEADER, GenerateRequest, GenerateResponse


class RolloutClient(AbstractAsyncContextManager["RolloutClient"]):
    """Samples from one or more rollout services that serve the same policy.

    Args:
        urls: base URLs, for example http://127.0.0.1:8000.
        access: see `clients.fleet.Access`.

    Use it inside one event loop; close it with `aclose` or as an async context manager.

    Attributes:
        control: contract, weights and readiness of the same servers.
    """

    def __init__(self, urls: Sequence[str], **access: Unpack[Access]) -> None:
        self.control = ControlClient(urls, **access)
        self._fleet = self.control.fleet
        self._cancellations: set[asyncio.Task[None]] = set()  # on their way to a server

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Finish cancellations that are on their way and close every connection."""
        await asyncio.gather(*self._cancellations)
        await self.control.aclose()

    def require_version(self, version: int) -> None:
        """Refuse servers that serve less than `version` for every request sent from now on."""
        self.control.required.minimum = version

    async def generate(self, request: GenerateRequest) -> GenerateResponse:
        """Sample; on a lost connection, 429 or 5xx try again under the same id.

        After a connection lost in mid-request the same server is asked first, where the retry joins
        the running request. Cancelling this call frees the slot on the server.

        Raises:
            RequestRejected: the request is wrong.
            DeadlineExceeded: `deadline_s` passed on the server.
            ServiceUnavailable: no server answered within `timeouts.total_s`.
            InvalidReply: the reply breaks the contract.
        """
        content = encode(request, MSGPACK_TYPE)

        async def attempt(server: Server, give_up_s: float) -> GenerateResponse:
            # Read before sending: a request that is under way when the requirement rises may return
            # older tokens. Its spans name their versions, and its server has missed nothing.
            minimum = self.control.required.minimum
            channel = server.channel
            try:
                response = await channel.send("POST", "/v1/generate", content, give_up_s=give_up_s)
            except asyncio.CancelledError:
                self._cancel_on(server, request.request_id)
                raise
            reply = channel.parse(response, GenerateResponse)
            _check_reply(request, reply, channel.url)
            # The header says what the server serves now; the reply itself may have been stored
            # under an older version, which is no fault of the server.
            serving = int(response.headers.get(VERSION_HEADER, reply.version))
            if serving < minimum:
                reason = f"serves version {serving}, needed is {minimum}"
                self._fleet.mark_stale(server, reason)
                raise ServiceUnavailable(f"{channel.url} {reason}.")
            return reply

        return await self._fleet.call(
            attempt,
            what=f"request {request.request_id}",
            within_s=self._fleet.timeouts.total_s,
            load=request.n,
            attach=True,
        )

    def _cancel_on(self, server: Server, request_id: str) -> None:
        """Free the server's slot without making the cancelled caller wait for it."""
        give_up_s = time.monotonic() + self._fleet.timeouts.connect_s

        async def delete() -> None:
            # If the server cannot be reached, the request ends there by its own deadline.
            with contextlib.suppress(ServiceUnavailable):
                path = f"/v1/generate/{request_id}"
                await server.channel.send("DELETE", path, give_up_s=give_up_s)

        # The event loop holds tasks weakly; without the set this one could vanish before it ran.
        task = asyncio.create_task(delete())
        self._cancellations.add(task)
        task.add_done_callback(self._cancellations.discard)


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
            problem = f"sample {index} has a log-prob that is not a finite number"
        elif sum(span.end - span.start for span in sample.spans) != len(sample.token_ids):
            problem = f"the version spans of sample {index} do not cover its tokens"
    if problem is not None:
        raise InvalidReply(
            f"{url}, request {request.request_id}: {problem}. Fix: report it; do not train on it."
        )
