"""The service's end of a link to the learner: at most one, and what arrives becomes an upload.

Calls wait for each other, so a new learner takes over from one that was killed during a bucket;
the link's own time limit bounds that wait.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from services.rollout.engines.protocol import Engine, TransferError, WeightReceiver
from services.rollout.weights.uploads import Uploads
from services.rollout.wire.schemas import UploadStatus
from services.rollout.wire.tensors import DTYPES
from services.rollout.wire.transfer import LinkStatus, NcclLink, OpenRequest, ReceiveRequest

_GRACE_S = 30.0
"""Added to the link's limit, which the workers keep: the time of the call to them and back."""


class WeightTransfer:
    """Opens the link of one service, receives over it and closes it."""

    def __init__(self, engine: Engine, uploads: Uploads) -> None:
        self._engine = engine
        self._uploads = uploads
        self._link: OpenRequest | None = None
        self._lock = asyncio.Lock()

    async def open(self, request: OpenRequest) -> LinkStatus:
        """Join the learner's group; the learner has to wait for it at the same time.

        Raises:
            TransferError: `transport_unavailable`, `ranks_do_not_fit`, `foreign_gpu`, or
                `transfer_timeout` when the others do not come.
        """
        receiver = self._receiver(request)
        async with self._lock, self._closed_by_errors(request):
            # Before the engine leaves the old group: if it fails in between, no link is open.
            self._link = None
            await receiver.open(request)
            self._link = request
            return self._status()

    async def receive(self, request: ReceiveRequest) -> UploadStatus:
        """Receive one bucket while the learner sends it. After an error the link is closed.

        Raises:
            TransferError: `no_link` before open, `wrong_handles`, `transfer_timeout` when the
                learner does not send, `cannot_store` when the disk is full.
            WeightsError: `upload_too_large`.
        """
        async with self._lock:
            link = self._link
            if link is None:
                raise TransferError("no_link", "No link to a learner is open.")
            over_ipc = link.link.backend == "ipc"
            if any((tensor.handle is not None) != over_ipc for tensor in request.tensors):
                message = "Tensors come with a handle over ipc, and without one over nccl."
                raise TransferError("wrong_handles", message)
            # Checked before the workers take part: nothing limits what they write.
            sizes = (DTYPES[sent.dtype].itemsize * sent.num_elements for sent in request.tensors)
            path = self._uploads.reserve(request.name, sum(sizes))
            async with self._closed_by_errors(link):
                await self._receiver(link).receive(request, path)
        return UploadStatus(name=request.name, num_bytes=self._uploads.size(request.name))

    async def close(self) -> LinkStatus:
        """Leave the group, if any."""
        async with self._lock:
            link, self._link = self._link, None
            if link is not None:
                async with self._closed_by_errors(link):
                    await self._receiver(link).close()
            return self._status()

    def _status(self) -> LinkStatus:
        return LinkStatus(backend=self._link.link.backend if self._link is not None else None)

    def _receiver(self, request: OpenRequest) -> WeightReceiver:
        link, info = request.link, self._engine.info
        receiver = self._engine.receiver if link.backend in info.link_backends else None
        if receiver is None:
            message = f"This server cannot receive weights over {link.backend}."
            raise TransferError("transport_unavailable", message)
        # Checked here, because a rank outside the group would hang every other rank until timeout.
        if isinstance(link, NcclLink) and link.rank_offset + info.num_workers > link.world_size:
            raise TransferError(
                "ranks_do_not_fit",
                f"{info.num_workers} workers from rank {link.rank_offset} on do not fit into a "
                f"group of {link.world_size}.",
            )
        return receiver

    @contextlib.asynccontextmanager
    async def _closed_by_errors(self, link: OpenRequest) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(link.timeout_s + _GRACE_S):
                yield
        except TimeoutError:
            self._link = None
            raise TransferError("transfer_timeout", "The engine did not answer.") from None
        except TransferError:
            # The receiver has left its group already.
            self._link = None
            raise
