"""What both ends of a GPU transfer share: its messages, CUDA handles, vLLM's group and a thread.

    open      the server's workers join the learner's group
    receive   once per bucket: what the learner sends at the same time becomes `uploads/<name>`
    close     prepare and commit then take the files `uploads/<name>`, as after an upload

Never run on a GPU. Written against vLLM 0.29 and torch 2.13; imports pydantic and torch, no engine.
"""

import base64
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BeforeValidator, Field, PlainSerializer, field_validator

from services.common.wire import Number, Whole
from services.rollout.wire.schemas import DtypeCode, FileName, LinkBackend, Wire

MAX_RANKS = 4096
MAX_TENSORS = 65_536
TRANSFER_THREAD = "weight-transfer"
_MAX_BYTES = 2**44
_NUM_REBUILD_ARGS = 15
_HANDLE_ARGS = {
    2: "stride", 3: "tensor_offset", 6: "device", 7: "storage_handle", 8: "storage_size_bytes",
    9: "storage_offset_bytes", 11: "ref_counter_handle", 12: "ref_counter_offset",
    13: "event_handle", 14: "event_sync_required",
}  # fmt: skip
"""Place in the arguments of torch's `rebuild_cuda_tensor` -> field of IpcHandle."""

Result = TypeVar("Result")


def _decoded(value: object) -> object:
    return base64.urlsafe_b64decode(value) if isinstance(value, str) else value


def _encoded(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).decode()


Blob = Annotated[
    bytes,
    BeforeValidator(_decoded),
    PlainSerializer(_encoded, when_used="json-unless-none"),
    Field(max_length=1024),
]
"""Bytes: raw in msgpack, URL-safe base64 in JSON."""

_Count = Annotated[Whole, Field(ge=0, le=_MAX_BYTES)]


class NcclLink(Wire):
    """A group of the learner (rank 0) and every worker of every server, over NCCL."""

    backend: Literal["nccl"] = "nccl"
    master_address: Annotated[str, Field(pattern=r"^[A-Za-z0-9.:_-]{1,255}$")]
    """Host on which the learner waits for the others."""

    master_port: Whole = Field(ge=1, le=65_535)
    rank_offset: Whole = Field(ge=1, lt=MAX_RANKS)
    """Rank of this server's first worker: 1 plus the workers of the servers before it."""

    world_size: Whole = Field(ge=2, le=MAX_RANKS)
    """1 plus the workers of all servers."""

    buffer_bytes: Whole = Field(ge=1, le=_MAX_BYTES)
    """Size of the buffers that tensors are packed into; both ends need the same."""


class IpcLink(Wire):
    """The learner's own GPU memory, read by a server on the same GPU."""

    backend: Literal["ipc"] = "ipc"
    gpu_uuid: str = Field(min_length=1, max_length=128)
    """Identifier of the learner's GPU."""


class OpenRequest(Wire):
    """Join the learner's group. A link that is still open is closed first."""

    link: NcclLink | IpcLink = Field(discriminator="backend")
    timeout_s: Number = Field(default=60.0, gt=0.0, le=3600.0)
    """Time limit for joining, and for each bucket received over this link."""


class LinkStatus(Wire):
    """The link that is open now."""

    backend: LinkBackend | None


class IpcHandle(Wire):
    """torch's description of one CUDA tensor that another process may map, field by field.

    torch would pickle it, but unpickling bytes from the network can run any code in the engine.
    """

    gpu_uuid: str = Field(min_length=1, max_length=128)
    stride: tuple[_Count, ...] = Field(max_length=8)
    tensor_offset: _Count
    device: Whole = Field(ge=0, le=1024)
    storage_handle: Blob | None
    storage_size_bytes: _Count
    storage_offset_bytes: _Count
    ref_counter_handle: Blob | None
    ref_counter_offset: _Count
    event_handle: Blob | None
    event_sync_required: bool


class SentTensor(Wire):
    """One tensor of a bucket; they arrive in the order of the list."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,511}$")]
    dtype: DtypeCode
    shape: list[_Count] = Field(max_length=8)
    handle: IpcHandle | None = None
    """Set over ipc only."""

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


class ReceiveRequest(Wire):
    """Receive one bucket and keep it as `uploads/<name>`."""

    name: FileName
    tensors: list[SentTensor] = Field(min_length=1, max_length=MAX_TENSORS)

    @field_validator("tensors")
    @classmethod
    def _each_name_once(cls, tensors: list[SentTensor]) -> list[SentTensor]:
        if len({tensor.name for tensor in tensors}) < len(tensors):
            raise ValueError("a tensor is named twice")
        return tensors


def to_wire(args: Sequence[Any], gpu_uuid: str) -> IpcHandle:
    """The handle of one tensor; its shape and dtype travel beside it.

    Args:
        args: second part of what `reduce_tensor` returns for a CUDA tensor without gradient.
        gpu_uuid: the GPU that holds the tensor.

    Raises:
        ValueError: the arguments are not those of a plain CUDA tensor, as torch 2.13 gives them.
    """
    # The classes are the same in every call, so they are compared here and do not travel.
    classes = (torch.Tensor, torch.storage.TypedStorage, False)
    if len(args) != _NUM_REBUILD_ARGS or (args[0], args[4], args[10]) != classes:
        raise ValueError(
            "torch describes a shared CUDA tensor in another way than this release knows. Fix: "
            "use the transport nccl or http."
        )
    return IpcHandle(
        gpu_uuid=gpu_uuid, **{name: args[place] for place, name in _HANDLE_ARGS.items()}
    )


def from_wire(handle: IpcHandle, shape: Sequence[int], dtype: torch.dtype) -> tuple[Any, ...]:
    """The arguments of `rebuild_cuda_tensor`, exactly as the learner's torch gave them."""
    args: dict[int, Any] = {
        0: torch.Tensor, 1: torch.Size(shape), 4: torch.storage.TypedStorage, 5: dtype, 10: False
    }  # fmt: skip
    args |= {place: getattr(handle, name) for place, name in _HANDLE_ARGS.items()}
    return tuple(args[place] for place in range(_NUM_REBUILD_ARGS))


def lacks_nccl(engine: Any) -> bool:
    """Whether vLLM's transfer engine made a communicator that does nothing, for lack of NCCL."""
    group = _communicator(engine)
    return group is not None and bool(group.disabled)


def leave_group(engine: Any) -> None:
    """Leave the group of a transfer engine; calls on this side that wait in it raise an error."""
    group = _communicator(engine)
    if group is not None:
        group.destroy()
    engine.shutdown()


def _communicator(engine: Any) -> Any:
    """vLLM's communicator; None over ipc, and for a group that never met."""
    return getattr(engine, "model_update_group", None)


def run_in_daemon_thread(call: Callable[[], Result]) -> Future[Result]:
    """Run `call` in a daemon thread.

    Neither `asyncio.run` nor the interpreter waits for such a thread when it ends, unlike for one
    of an executor: a call that waits inside NCCL may never return.
    """
    outcome: Future[Result] = Future()
    outcome.set_running_or_notify_cancel()  # a waiter that is cancelled must not cancel the call

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name=TRANSFER_THREAD, daemon=True).start()
    return outcome
