"""HTTP to one rollout service: key, wire format, time limits, errors of our tree."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TypeVar

import httpx
from pydantic import BaseModel

from openrlhf_alp.clients.errors import IncompleteReply, InvalidReply, ServiceUnavailable
from openrlhf_alp.clients.http import LIMITS, Backoff, Timeouts, error_of
from openrlhf_alp.clients.trace import trace_headers
from services.common.wire import MSGPACK_TYPE, decode, encode, media_type_of
from services.rollout.wire.schemas import UploadStatus

_UPLOAD_ATTEMPTS = 5
_PIECE_BYTES = 4 * 2**20
_CONTROL_PATHS = ("/v1/weights/", "/v1/pause", "/v1/resume", "/v1/sleep", "/v1/wake_up")

Reply = TypeVar("Reply", bound=BaseModel)


class Channel:
    """Connections to one base URL.

    Args:
        url: base URL of the service.
        api_key: sent with data routes.
        admin_key: sent with control routes; None: the api key is sent.
        timeouts: limits of every call.
        transport: replaces the network, for tests.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str,
        admin_key: str | None,
        timeouts: Timeouts,
        transport: httpx.AsyncBaseTransport | None,
    ) -> None:
        self.url = url.rstrip("/")
        self._data_key = api_key
        self._control_key = admin_key or api_key
        self._timeouts = timeouts
        self._http = httpx.AsyncClient(
            base_url=self.url,
            timeout=timeouts.httpx(),
            limits=LIMITS,
            transport=transport,
            headers={"accept": MSGPACK_TYPE},
        )

    async def aclose(self) -> None:
        await self._http.aclose()

    async def send(
        self, method: str, path: str, body: bytes | None, give_up_s: float
    ) -> httpx.Response:
        """One attempt, whatever the status of its reply.

        Args:
            give_up_s: monotonic time after which the attempt counts as failed.

        Raises:
            ServiceUnavailable: no reply. Its cause tells a lost connection from a refused one.
        """
        key = self._control_key if path.startswith(_CONTROL_PATHS) else self._data_key
        headers = {"authorization": f"Bearer {key}", **trace_headers()}
        if body is not None:
            headers["content-type"] = MSGPACK_TYPE
        try:
            async with asyncio.timeout(max(0.001, give_up_s - time.monotonic())):
                return await self._http.request(method, path, content=body, headers=headers)
        except (httpx.TransportError, TimeoutError) as error:
            raise ServiceUnavailable(
                f"{self.url} does not answer ({type(error).__name__} {error}). Fix: check that "
                "the rollout service runs there; its log says why it stopped."
            ) from error

    def parse(self, response: httpx.Response, model: type[Reply]) -> Reply:
        """The reply as a model.

        Raises:
            ServiceError: the one that the status and error body stand for.
            InvalidReply: the body does not parse.
        """
        if response.status_code >= 400:
            raise error_of(response, self.url)
        try:
            content = decode(response.content, media_type_of(response.headers.get("content-type")))
        except ValueError as error:
            raise IncompleteReply(
                f"The reply of {self.url} was cut short or garbled ({error}). Fix: ask again; if "
                "it stays, look for a proxy that changes bodies."
            ) from error
        try:
            return model.model_validate(content)
        except ValueError as error:
            raise InvalidReply(
                f"{self.url} sent a reply that does not parse ({error}). Fix: install the same "
                "release of services and learner."
            ) from error

    async def get(self, path: str, model: type[Reply]) -> Reply:
        """GET within `control_s`."""
        give_up_s = time.monotonic() + self._timeouts.control_s
        return self.parse(await self.send("GET", path, None, give_up_s), model)

    async def post(self, path: str, body: BaseModel | None, model: type[Reply]) -> Reply:
        """POST within `control_s`."""
        give_up_s = time.monotonic() + self._timeouts.control_s
        content = None if body is None else encode(body, MSGPACK_TYPE)
        return self.parse(await self.send("POST", path, content, give_up_s), model)

    async def upload(self, path: Path, name: str, backoff: Backoff) -> int:
        """Send a file, going on where a lost connection left it. Returns its size in bytes.

        Raises:
            ServiceUnavailable: the connection was lost too often.
            ServiceError: the server refused the file.
        """
        url = f"/v1/weights/files/{name}"
        attempt = 0
        while True:
            try:
                arrived = (await self.get(url, UploadStatus)).num_bytes
                if arrived == path.stat().st_size > 0:
                    return arrived
                response = await self._http.put(
                    url,
                    params={"offset": arrived},
                    content=_read_from(path, arrived),
                    headers={"authorization": f"Bearer {self._control_key}", **trace_headers()},
                )
                return self.parse(response, UploadStatus).num_bytes
            except (httpx.TransportError, ServiceUnavailable) as error:
                attempt += 1
                if attempt >= _UPLOAD_ATTEMPTS:
                    raise ServiceUnavailable(
                        f"{self.url} lost the upload of {name} {attempt} times ({error}). Fix: "
                        "check the network and the service's log."
                    ) from error
                await asyncio.sleep(backoff.delay_s(attempt, None))


async def _read_from(path: Path, offset: int) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        file.seek(offset)
        while piece := await asyncio.to_thread(file.read, _PIECE_BYTES):
            yield piece
