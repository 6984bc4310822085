"""The service's end of a link to the learner: one at a time, what arrives lies among the uploads.

Calls wait for each other, so that a new learner takes over from one that was killed in mid-bucket;
how long a bucket may take is part of the link.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from services.common.errors import ApiError
from services.rollout.engines.protocol import Engine, TransferError, WeightReceiver
from services.rollout.weights.uploads import Uploads
from services.rollout.wire.schemas import UploadStatus
from services.rollout.wire.transfer import (
    LinkStatus,
    NcclLink,
    OpenRequest,
    ReceiveRequest,
)

_GRACE_S = 30.0
"""Beyond a link's own limit, which the engine's workers keep: for the way to them and back."""

_ELEMENT_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I32": 4, "I64": 8}

_ANSWERS = {
    "timeout": (
        504,
        "transfer_timeout",
        "Open a new link; learner and servers have to reach each other and send at the same time.",
        None,
    ),
    "disk": (507, "cannot_store", "Free space in weights_dir.", None),
    "foreign_gpu": (
        422,
        "foreign_gpu",
        "Put learner and server on one GPU, or use the transport nccl or http.",
        "link.gpu_uuid",
    ),
    "failed": (
        503,
        "transfer_failed",
        "See this service's log; open a new link, or use the transport http.",
        None,
    ),
}


class WeightTransfer:
    """Opens, feeds and closes the link of one service."""

    def __init__(self, engine: Engine, uploads: Uploads) -> None:
        self._engine = engine
        self._uploads = uploads
        self._link: OpenRequest | None = None
        self._lock = asyncio.Lock()

    async def open(self, request: OpenRequest) -> LinkStatus:
        """Join the learner's group; the learner has to wait for it at the same time.

        Raises:
            ApiError: 501 when the engine has no such transport, 422 for ranks that do not fit or
                another GPU, 504 when the others do not come.
        """
        receiver = self._receiver(request)
        async with self._lock, self._answering_errors(request):
            self._link = None
            await receiver.open(request)
            self._link = request
            return self._status()

    async def receive(self, request: ReceiveRequest) -> UploadStatus:
        """Receive one bucket while the learner sends it. After an error the link is closed.

        Raises:
            ApiError: 409 before open, 413 above the limit of the uploads, 422 for handles where
                none belong or none where they do, 504 when the learner does not send, 507 when
                the disk is full.
        """
        async with self._lock:
            link = self._link
            if link is None:
                raise ApiError(
                    409,
                    "no_link",
                    "No link to a learner is open.",
                    fix="POST /v1/weights/transfer/open first; after a failed transfer, again.",
                )
            over_ipc = link.link.backend == "ipc"
            if any((tensor.handle is not None) != over_ipc for tensor in request.tensors):
                raise ApiError(
                    422,
                    "wrong_handles",
                    "Tensors come with a handle over ipc, and without one over nccl.",
                    fix="Send what fits the link that is open, or open another one.",
                    field="tensors",
                )
            path = self._uploads.reserve(request.name, _num_bytes(request))
            async with self._answering_errors(link):
                await self._receiver(link).receive(request, path)
        return UploadStatus(name=request.name, num_bytes=self._uploads.size(request.name))

    async def close(self) -> LinkStatus:
        """Leave the group, if any."""
        async with self._lock:
            link, self._link = self._link, None
            if link is not None:
                async with self._answering_errors(link):
                    await self._receiver(link).close()
            return self._status()

    def _status(self) -> LinkStatus:
        return LinkStatus(backend=self._link.link.backend if self._link is not None else None)

    def _receiver(self, request: OpenRequest) -> WeightReceiver:
        link, info = request.link, self._engine.info
        receiver = self._engine.receiver if link.backend in info.link_backends else None
        if receiver is None:
            raise ApiError(
                501,
                "transport_unavailable",
                f"This server cannot receive weights over {link.backend}.",
                fix="Use the transport file or http: nccl and ipc need the vLLM engine on CUDA, "
                "and ipc a tensor_parallel_size of 1.",
                field="link.backend",
            )
        if isinstance(link, NcclLink) and link.rank_offset + info.num_workers > link.world_size:
            raise ApiError(
                422,
                "ranks_do_not_fit",
                f"{info.num_workers} workers from rank {link.rank_offset} on do not fit into a "
                f"group of {link.world_size}.",
                fix="Count num_workers of every server's contract, and 1 for the learner.",
                field="link.world_size",
            )
        return receiver

    @contextlib.asynccontextmanager
    async def _answering_errors(self, link: OpenRequest) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(link.timeout_s + _GRACE_S):
                yield
        except TimeoutError:
            raise self._failure(TransferError("timeout", "The engine did not answer")) from None
        except TransferError as error:
            raise self._failure(error) from error

    def _failure(self, error: TransferError) -> ApiError:
        self._link = None
        status, code, fix, field = _ANSWERS[error.kind]
        return ApiError(status, code, f"{error}.", fix=fix, field=field)


def _num_bytes(request: ReceiveRequest) -> int:
    return sum(_ELEMENT_BYTES.get(t.dtype, 1) * t.num_elements for t in request.tensors)
