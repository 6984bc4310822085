"""The learner's end of vLLM's weight transfer engines. Imported on use only: it needs vLLM."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightSource,
)
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from openrlhf_alp.clients.weights.carry import Bucket
from services.rollout.wire.transfer import lacks_nccl, leave_group

Post = Callable[[dict[str, Any]], Coroutine[Any, Any, None]]


class Sender:
    """Sends buckets over one group.

    Its methods block and belong in a thread; those of vLLM's that talk to the servers run `join`
    and `receive` in `loop`.

    Args:
        info: which engine, and where the group meets.
        loop: the event loop of the two callables below, running in another thread.
        join: has every server join, given vLLM's init info.
        receive: has every server receive what is being sent, given vLLM's update info.

    Raises:
        Exception: what vLLM, torch or `join` raises.
    """

    def __init__(
        self,
        info: TrainerInitInfo,
        *,
        loop: asyncio.AbstractEventLoop,
        join: Post,
        receive: Post,
    ) -> None:
        self._source = _BucketSource()
        self._engine: TrainerWeightTransferEngine = WeightTransferTrainerFactory.trainer_init(
            info, client=_ControlPlane(loop, join, receive), source=self._source
        )
        if lacks_nccl(self._engine):
            raise RuntimeError("vLLM cannot load NCCL in the learner")

    def send(self, bucket: Bucket) -> None:
        """Send a bucket to all servers; returns when they have kept it."""
        self._source.bucket = bucket
        self._engine.send_weights()

    def leave(self) -> None:
        """Leave the group; whoever still waits in it here is woken up with an error."""
        leave_group(self._engine)


def nccl(host: str, port: int, *, world_size: int, buffer_bytes: int) -> TrainerInitInfo:
    """Rank 0 of a group that meets at `host`:`port`; tensors travel packed."""
    return NCCLTrainerInitInfo(
        master_address=host,
        master_port=port,
        world_size=world_size,
        packed=True,
        packed_buffer_size_bytes=buffer_bytes,
        rank=0,
    )


def ipc() -> TrainerInitInfo:
    """The only learner process; each tensor with a handle of its own."""
    return IPCTrainerInitInfo(packed=False, rank=0)


class _BucketSource(WeightSource):
    """One bucket at a time, where vLLM's engines expect the whole model."""

    def __init__(self) -> None:
        self.bucket: Bucket = {}

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, t.dtype, tuple(t.shape)) for name, t in self.bucket.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.bucket.items())


class _ControlPlane:
    """`VLLMWeightSyncClient`: the four calls by which vLLM's engines reach the servers.

    Start and finish of an update do nothing: they would rebuild the live model, and here a transfer
    is only staged.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, join: Post, receive: Post) -> None:
        self._loop = loop
        self._join = join
        self._receive = receive

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        asyncio.run_coroutine_threadsafe(self._join(init_info), self._loop).result()

    def start_weight_update(self) -> None:
        pass

    def update_weights(self, update_info: dict[str, Any]) -> None:
        asyncio.run_coroutine_threadsafe(self._receive(update_info), self._loop).result()

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        pass
