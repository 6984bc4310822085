"""torch's arguments for mapping a CUDA tensor of another process, to and from the wire.

The order is that of `torch.multiprocessing.reductions.rebuild_cuda_tensor`. The classes in it are
always the same, so they need not travel.
"""

from collections.abc import Sequence
from typing import Any

import torch

from services.rollout.wire.transfer import IpcHandle

_NUM_ARGS = 15


def to_wire(args: Sequence[Any], gpu_uuid: str) -> IpcHandle:
    """The handle of one tensor; its shape and dtype travel beside it.

    Args:
        args: second part of what `reduce_tensor` returns for a CUDA tensor without gradient.
        gpu_uuid: of the GPU that holds it.

    Raises:
        ValueError: the arguments are not those of a plain CUDA tensor, as torch 2.13 gives them.
    """
    if len(args) != _NUM_ARGS or (args[0], args[4], args[10]) != (
        torch.Tensor,
        torch.storage.TypedStorage,
        False,
    ):
        raise ValueError(
            "torch describes a shared CUDA tensor in another way than this release knows. Fix: "
            "use the transport nccl or http."
        )
    return IpcHandle(
        gpu_uuid=gpu_uuid,
        stride=list(args[2]),
        tensor_offset=args[3],
        device=args[6],
        storage_handle=args[7],
        storage_size_bytes=args[8],
        storage_offset_bytes=args[9],
        ref_counter_handle=args[11],
        ref_counter_offset=args[12],
        event_handle=args[13],
        event_sync_required=args[14],
    )


def from_wire(handle: IpcHandle, shape: Sequence[int], dtype: torch.dtype) -> tuple[Any, ...]:
    """The arguments of `rebuild_cuda_tensor`, exactly as the learner's torch gave them."""
    return (
        torch.Tensor,
        torch.Size(shape),
        tuple(handle.stride),
        handle.tensor_offset,
        torch.storage.TypedStorage,
        dtype,
        handle.device,
        handle.storage_handle,
        handle.storage_size_bytes,
        handle.storage_offset_bytes,
        False,
        handle.ref_counter_handle,
        handle.ref_counter_offset,
        handle.event_handle,
        handle.event_sync_required,
    )
