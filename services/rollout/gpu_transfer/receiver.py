"""Weights from the learner's GPU, over vLLM's own transfer engines, into a file.

vLLM's receivers write straight into the model that is being served. Here a Collector takes the
model's place: what arrives goes to host memory and from there to a safetensors file among the
uploads, so that prepare can verify its digest and commit can swap it. A transfer that breaks off
has touched nothing that is served.

    service: RpcReceiver --collective_rpc--> every worker: TransferReceiver -> Link -> Collector

The workers draw no token while a bucket arrives, and draw again between two buckets.

Written against vLLM 0.29. Run on CPU only, with replacements for NCCL and for CUDA IPC; never run
on a GPU.
"""

import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from services.rollout.engines.protocol import TransferError
from services.rollout.wire.schemas import LinkBackend
from services.rollout.wire.tensors import DTYPES
from services.rollout.wire.transfer import (
    OpenRequest,
    ReceiveRequest,
    SentTensor,
    from_wire,
    lacks_nccl,
    leave_group,
    run_in_daemon_thread,
)

logger = logging.getLogger(__name__)

Outcome = tuple[str, str] | None
"""(code, message) of a TransferError, in a form that vLLM's RPC carries; None: success."""

Rpc = Callable[..., Awaitable[Sequence[Any]]]
"""`AsyncLLM.collective_rpc`: method name, `args` -> what each worker returned."""


def link_backends(num_workers: int) -> tuple[LinkBackend, ...]:
    """Backends over which this vLLM can receive here; none without CUDA or vLLM's modules."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return ()
    try:
        import vllm.distributed.weight_transfer.factory  # noqa: F401
    except ImportError:
        return ()
    # One handle maps the memory of one GPU, so ipc reaches one worker.
    return ("nccl", "ipc") if num_workers == 1 else ("nccl",)


class RpcReceiver:
    """WeightReceiver over vLLM's workers."""

    def __init__(self, rpc: Rpc) -> None:
        self._rpc = rpc

    async def open(self, request: OpenRequest) -> None:
        await self._call("alp_open_link", request.model_dump())

    async def receive(self, request: ReceiveRequest, path: Path) -> None:
        await self._call("alp_receive", request.model_dump(), str(path))

    async def close(self) -> None:
        await self._call("alp_close_link")

    async def _call(self, method: str, *args: Any) -> None:
        for outcome in await self._rpc(method, args=args):
            if outcome is not None:
                raise TransferError(*outcome)


class Collector:
    """Takes the model's place and keeps what vLLM's receiver would load into it.

    Args:
        keep: False on the workers whose copy is not needed; they take part and drop it.
    """

    def __init__(self, *, keep: bool) -> None:
        self._keep = keep
        self._tensors: dict[str, torch.Tensor] = {}

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy tensors to host memory. vLLM calls this once per buffer."""
        for name, tensor in weights:
            if self._keep:
                # A copy, because vLLM fills the same buffer again afterwards.
                self._tensors[name] = tensor.to("cpu", copy=True)

    def write(self, path: Path) -> None:
        """Write what arrived as one safetensors file, whole or not at all, and forget it."""
        if not self._keep:
            return
        tensors, self._tensors = self._tensors, {}
        # Renamed once complete: prepare must never link a file that is still growing.
        partial = path.with_name(f".{path.name}")
        try:
            save_file(tensors, partial)
            os.replace(partial, path)
        except Exception as error:  # safetensors has an error of its own for a full disk
            message = f"{path.name} cannot be written: {error}."
            raise TransferError("cannot_store", message) from error
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()


class Link:
    """This worker's place in the learner's group.

    Args:
        request: validated by the service.
        vllm_config: the worker's.
        device: where tensors arrive.
        keep: whether this worker writes what arrives.
    """

    def __init__(
        self, request: OpenRequest, vllm_config: Any, device: torch.device, *, keep: bool
    ) -> None:
        from vllm.config.weight_transfer import WeightTransferConfig
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

        self._link = request.link
        self._limit_s = request.timeout_s
        self._device = device
        self._collector = Collector(keep=keep)
        self._engine = WeightTransferEngineFactory.create_engine(
            WeightTransferConfig(backend=self._link.backend), vllm_config, device, self._collector
        )

    def join(self) -> None:
        """Meet the learner and the other workers.

        Raises:
            TransferError: `transfer_timeout`, `transfer_failed` without NCCL, or `foreign_gpu`
                when the learner is on another GPU.
        """
        if self._link.backend == "ipc":
            own = str(torch.cuda.get_device_properties(self._device.index).uuid)
            if self._link.gpu_uuid != own:
                message = f"The learner is on GPU {self._link.gpu_uuid}, this server on {own}."
                raise TransferError("foreign_gpu", message)
            info: dict[str, Any] = {"packed": False}
        else:
            info = {
                "master_address": self._link.master_address,
                "master_port": self._link.master_port,
                "rank_offset": self._link.rank_offset,
                "world_size": self._link.world_size,
                "packed": True,
                "packed_buffer_size_bytes": self._link.buffer_bytes,
            }
        parsed = self._engine.parse_init_info(info)
        self._within_limit(lambda: self._engine.init_transfer_engine(parsed))
        if lacks_nccl(self._engine):
            # vLLM continues without NCCL and would report tensors that never arrived.
            raise TransferError("transfer_failed", "vLLM cannot load NCCL on this server.")

    def receive(self, tensors: Sequence[SentTensor], path: Path) -> None:
        """Take part in sending one bucket, then write it.

        Raises:
            TransferError: `transfer_timeout`, or `cannot_store` when it could not be written.
        """
        info: dict[str, Any] = {
            "names": [tensor.name for tensor in tensors],
            "dtype_names": [str(DTYPES[tensor.dtype]).split(".")[-1] for tensor in tensors],
            "shapes": [tensor.shape for tensor in tensors],
        }
        if self._link.backend == "ipc":
            info["ipc_handles"] = [_rebuild_args(tensor) for tensor in tensors]
        parsed = self._engine.parse_update_info(info)
        # Not vLLM's `update_weights`: its start and finish rebuild the live model. Copies to host
        # memory wait for the bytes, so nothing is left to synchronise afterwards.
        self._within_limit(lambda: self._engine.receive_weights(parsed))
        self._collector.write(path)

    def leave(self) -> None:
        """Leave the group; calls of this worker that still wait in it raise an error."""
        leave_group(self._engine)

    def _within_limit(self, call: Callable[[], None]) -> None:
        """NCCL waits forever; destroying the communicator from another thread ends the wait.

        A rendezvous that was never completed cannot be ended in this way: its thread stays until
        the time limit of vLLM's store, five minutes, and blocks nothing.
        """

        def on_device() -> None:
            # The current device belongs to a thread; a new one would start at device 0.
            with torch.accelerator.device_index(self._device.index):
                call()

        running = run_in_daemon_thread(on_device)
        done, _ = futures.wait([running], timeout=self._limit_s)
        if not done:
            self.leave()
            message = f"The other side did not take part within {self._limit_s:g} s."
            raise TransferError("transfer_timeout", message)
        running.result()


def _rebuild_args(tensor: SentTensor) -> dict[str, tuple[Any, ...]]:
    assert tensor.handle is not None, "checked by the service"
    args = from_wire(tensor.handle, tensor.shape, DTYPES[tensor.dtype])
    return {tensor.handle.gpu_uuid: args}


class TransferReceiver:
    """Worker methods that RpcReceiver calls; the attributes without a value are the worker's."""

    vllm_config: Any
    device: torch.device
    rank: int
    _alp_link: Link | None = None

    def alp_open_link(self, request: dict[str, Any]) -> Outcome:
        """Join the group of a dumped OpenRequest."""
        self.alp_close_link()

        def join() -> None:
            keep = self.rank == 0
            opening = OpenRequest.model_validate(request)
            self._alp_link = Link(opening, self.vllm_config, self.device, keep=keep)
            self._alp_link.join()

        return self._alp_outcome(join)

    def alp_receive(self, request: dict[str, Any], path: str) -> Outcome:
        """Receive the bucket of a dumped ReceiveRequest into the file `path`."""

        def receive() -> None:
            assert self._alp_link is not None, "checked by the service"
            self._alp_link.receive(ReceiveRequest.model_validate(request).tensors, Path(path))

        return self._alp_outcome(receive)

    def alp_close_link(self) -> None:
        """Leave the group, if any."""
        link, self._alp_link = self._alp_link, None
        if link is not None:
            link.leave()

    def _alp_outcome(self, call: Callable[[], None]) -> Outcome:
        """Return errors as values: raised through vLLM's RPC they would lose their type."""
        try:
            call()
        except TransferError as error:
            outcome = (error.code, str(error))
        except Exception as error:
            logger.exception("weight transfer failed")
            outcome = ("transfer_failed", f"{type(error).__name__}: {error}.")
        else:
            return None
        # A group in which one call failed is out of step; only a new one can be used.
        self.alp_close_link()
        return outcome
