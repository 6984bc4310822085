"""Async client of the rollout service: several servers, one set of time limits, safe retries.

A generate call keeps its request_id over all attempts, so that a server can tell a retry from a new
request. Control calls go to every server and report the failure of each.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import httpx
from pydantic import BaseModel

from openrlhf_alp.clients.errors import (
    InvalidReply,
    ServiceError,
    ServiceUnavailable,
    WeightUpdateFailed,
)
from openrlhf_alp.clients.http import RETRYABLE, Backoff, Timeouts, error_of
from services.common.wire import MSGPACK_TYPE, decode, encode, media_type_of
from services.rollout.schemas import (
    CommitRequest,
    CommitResponse,
    Contract,
    GenerateRequest,
    GenerateResponse,
    Health,
    PauseMode,
    PauseRequest,
    PrepareRequest,
    WeightsStatus,
)

logger = logging.getLogger(__name__)

# A server that failed is asked again only after this time, or when no other is left.
_AVOID_S = 1.0

Reply = TypeVar("Reply", bound=BaseModel)
Result = TypeVar("Result")


@dataclass(slots=True)
class _Server:
    url: str
    http: httpx.AsyncClient
    num_outstanding: int = 0  # samples asked for and not yet answered
    down_until_s: float = 0.0  # monotonic time before which it is only used as a last resort


class _Retry(Exception):
    """An attempt failed in a way that another attempt may not."""

    def __init__(
        self, message: str, retry_after: str | None, *, may_be_running: bool = False
    ) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.may_be_running = may_be_running


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
        self._api_key = api_key
        self._admin_key = admin_key
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
        self._background: set[asyncio.Task[None]] = set()
        self._servers = [
            _Server(
                url=url.rstrip("/"),
                http=httpx.AsyncClient(
                    base_url=url,
                    timeout=self._timeouts.httpx(),
                    limits=limits,
                    transport=transport,
                    headers={"accept": MSGPACK_TYPE},
                ),
            )
            for url in urls
        ]

    async def __aenter__(self) -> "RolloutClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Finish cancellations under way and close every connection."""
        await asyncio.gather(*self._background)
        await asyncio.gather(*(server.http.aclose() for server in self._servers))

    @property
    def urls(self) -> list[str]:
        return [server.url for server in self._servers]

    async def contract(self) -> Contract:
        """The contract of the first server, after checking that all servers have the same one.

        Raises:
            ServiceUnavailable: a server does not answer.
            InvalidReply: two servers serve different models.
        """
        contracts = await self._on_all(lambda s: self._get(s, "/v1/contract", Contract))
        for server, contract in zip(self._servers, contracts, strict=True):
            if contract.contract_hash != contracts[0].contract_hash:
                raise InvalidReply(
                    f"{server.url} and {self._servers[0].url} have different contracts. Fix: "
                    "start all servers with the same model folder and flags."
                )
        return contracts[0]

    async def weights(self) -> list[WeightsStatus]:
        """Weight state of each server, in the order of the URLs."""
        return await self._on_all(lambda s: self._get(s, "/v1/weights", WeightsStatus))

    async def generate(self, request: GenerateRequest) -> GenerateResponse:
        """Sample; on a lost connection, 429, 502 or 503 try again under the same id.

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
        server = self._best_server()
        attempt = 0
        while True:
            try:
                return await self._attempt(server, request, body, give_up_s)
            except _Retry as retry:
                failure = retry
            except asyncio.CancelledError:
                self._cancel_on(server, request.request_id)
                raise
            attempt += 1
            delay_s = self._backoff.delay_s(attempt, failure.retry_after)
            now_s = time.monotonic()
            if now_s + delay_s >= give_up_s:
                raise ServiceUnavailable(f"Gave up after {attempt} attempts. {failure}")
            logger.warning("%s: attempt %d failed: %s", request.request_id, attempt, failure)
            if failure.may_be_running and attempt == 1:
                # The server may still work on it: attaching there costs nothing, elsewhere double.
                await asyncio.sleep(delay_s)
                continue
            server.down_until_s = now_s + max(delay_s, _AVOID_S)
            server = self._best_server()
            if server.down_until_s > now_s:
                await asyncio.sleep(delay_s)

    async def _attempt(
        self, server: _Server, request: GenerateRequest, body: bytes, give_up_s: float
    ) -> GenerateResponse:
        server.num_outstanding += request.n
        try:
            response = await self._send(server, "POST", "/v1/generate", body, give_up_s)
            if response.status_code in RETRYABLE:
                raise _Retry(
                    str(error_of(response, server.url)), response.headers.get("retry-after")
                )
            reply = self._parse(server, response, GenerateResponse)
            _check_reply(request, reply, server.url)
            return reply
        except ServiceUnavailable as error:
            lost = isinstance(error.__cause__, httpx.ReadError | httpx.RemoteProtocolError)
            raise _Retry(str(error), None, may_be_running=lost) from error
        finally:
            server.num_outstanding -= request.n

    def _cancel_on(self, server: _Server, request_id: str) -> None:
        """Free the server's slot without making the cancelled caller wait for it."""
        give_up_s = time.monotonic() + self._timeouts.connect_s
        path = f"/v1/generate/{request_id}"

        async def delete() -> None:
            with contextlib.suppress(ServiceUnavailable):
                await self._send(server, "DELETE", path, None, give_up_s)

        task = asyncio.create_task(delete())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def prepare_weights(self, request: PrepareRequest) -> list[WeightsStatus]:
        """Stage an update on every server.

        Raises:
            WeightUpdateFailed: names every server that did not stage it.
        """
        path = "/v1/weights/prepare"
        return await self._control(lambda s: self._post(s, path, request, WeightsStatus))

    async def commit_weights(self, request: CommitRequest) -> list[CommitResponse]:
        """Swap every server to the staged update; returns when all of them serve it.

        Raises:
            WeightUpdateFailed: names every server that did not load it.
        """
        path = "/v1/weights/commit"
        return await self._control(lambda s: self._post(s, path, request, CommitResponse))

    async def abort_weights(self) -> list[WeightsStatus]:
        """Forget the staged update on every server."""
        path = "/v1/weights/abort"
        return await self._control(lambda s: self._post(s, path, None, WeightsStatus))

    async def pause(self, mode: PauseMode = "keep") -> None:
        """Stop drawing tokens on every server."""
        request = PauseRequest(mode=mode)
        await self._on_all(lambda s: self._post(s, "/v1/pause", request, Health))

    async def resume(self) -> None:
        """Draw tokens again on every server."""
        await self._on_all(lambda s: self._post(s, "/v1/resume", None, Health))

    async def wait_ready(self, timeout_s: float) -> None:
        """Return when every server would serve a request.

        Raises:
            ServiceUnavailable: names a server that is not ready after `timeout_s`.
        """
        give_up_s = time.monotonic() + timeout_s
        await self._on_all(lambda server: self._wait_for(server, give_up_s))

    async def _wait_for(self, server: _Server, give_up_s: float) -> None:
        while True:
            try:
                response = await self._send(server, "GET", "/readyz", None, give_up_s)
                if response.status_code == 200:
                    return
                failure = error_of(response, server.url)
            except ServiceUnavailable as error:
                failure = error
            if time.monotonic() + self._backoff.first_s >= give_up_s:
                raise ServiceUnavailable(f"Not ready in time. {failure}")
            await asyncio.sleep(self._backoff.first_s)

    def _best_server(self) -> _Server:
        """The one with the least outstanding samples among those not known to be down."""
        now_s = time.monotonic()
        return min(
            self._servers, key=lambda s: (max(0.0, s.down_until_s - now_s), s.num_outstanding)
        )

    async def _send(
        self, server: _Server, method: str, path: str, body: bytes | None, give_up_s: float
    ) -> httpx.Response:
        is_control = method == "POST" and not path.startswith("/v1/generate")
        key = self._admin_key if is_control and self._admin_key else self._api_key
        headers = {"authorization": f"Bearer {key}"}
        if body is not None:
            headers["content-type"] = MSGPACK_TYPE
        try:
            async with asyncio.timeout(max(0.001, give_up_s - time.monotonic())):
                return await server.http.request(method, path, content=body, headers=headers)
        except (httpx.TransportError, TimeoutError) as error:
            raise ServiceUnavailable(
                f"{server.url} does not answer ({type(error).__name__} {error}). Fix: check that "
                "the rollout service runs there; its log says why it stopped."
            ) from error

    def _parse(self, server: _Server, response: httpx.Response, model: type[Reply]) -> Reply:
        if response.status_code >= 400:
            raise error_of(response, server.url)
        try:
            media_type = media_type_of(response.headers.get("content-type"))
            return model.model_validate(decode(response.content, media_type))
        except ValueError as error:
            raise InvalidReply(
                f"{server.url} sent a reply that does not parse ({error}). Fix: install the same "
                "release of services and learner."
            ) from error

    async def _get(self, server: _Server, path: str, model: type[Reply]) -> Reply:
        give_up_s = time.monotonic() + self._timeouts.control_s
        return self._parse(server, await self._send(server, "GET", path, None, give_up_s), model)

    async def _post(
        self, server: _Server, path: str, body: BaseModel | None, model: type[Reply]
    ) -> Reply:
        give_up_s = time.monotonic() + self._timeouts.control_s
        content = None if body is None else encode(body, MSGPACK_TYPE)
        response = await self._send(server, "POST", path, content, give_up_s)
        return self._parse(server, response, model)

    async def _on_all(self, call: Callable[[_Server], Awaitable[Result]]) -> list[Result]:
        return list(await asyncio.gather(*(call(server) for server in self._servers)))

    async def _control(self, call: Callable[[_Server], Awaitable[Result]]) -> list[Result]:
        async def outcome_of(server: _Server) -> Result | ServiceError:
            try:
                return await call(server)
            except ServiceError as error:
                return error

        outcomes = await self._on_all(outcome_of)
        failures = [str(outcome) for outcome in outcomes if isinstance(outcome, ServiceError)]
        if failures:
            raise WeightUpdateFailed(
                f"{len(failures)} of {len(outcomes)} servers failed: " + "; ".join(failures)
            )
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
