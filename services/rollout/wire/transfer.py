"""The wire of weight transfers between GPUs. Imported by clients: pydantic only, no engine.

open: the server's workers join the learner's group.
receive, once per bucket: what the learner sends at the same time lies among the uploads.
close.  Then prepare and commit take the files `uploads/<name>`, as after an upload.
"""

import base64
import math
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, field_validator

from services.rollout.wire.schemas import DtypeCode, FileName, LinkBackend, Wire

MAX_RANKS = 4096
MAX_TENSORS = 65_536
_MAX_BYTES = 2**44


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

_Count = Annotated[int, Field(ge=0, le=_MAX_BYTES)]


class NcclLink(Wire):
    """A group of the learner (rank 0) and every worker of every server, over NCCL."""

    backend: Literal["nccl"] = "nccl"
    master_address: Annotated[str, Field(pattern=r"^[A-Za-z0-9.:_-]{1,255}$")]
    """Where the learner waits for the others."""

    master_port: int = Field(ge=1, le=65_535)
    rank_offset: int = Field(ge=1, lt=MAX_RANKS)
    """Rank of this server's first worker: 1 plus the workers of the servers before it."""

    world_size: int = Field(ge=2, le=MAX_RANKS)
    """1 plus the workers of all servers."""

    buffer_bytes: int = Field(ge=1, le=_MAX_BYTES)
    """Tensors travel packed in buffers of this size; both sides need the same."""


class IpcLink(Wire):
    """The learner's own GPU memory, read by a server on the same GPU."""

    backend: Literal["ipc"] = "ipc"
    gpu_uuid: str = Field(min_length=1, max_length=128)
    """Of the learner's GPU."""


class OpenRequest(Wire):
    """Join the learner's group. A link that is still open is closed first."""

    link: NcclLink | IpcLink = Field(discriminator="backend")
    timeout_s: float = Field(default=60.0, gt=0.0, le=3600.0)
    """For joining, and for each bucket received over this link."""


class LinkStatus(Wire):
    """The link that is open now."""

    backend: LinkBackend | None


class IpcHandle(Wire):
    """What torch says of one CUDA tensor that another process may map, field by field.

    torch would pickle it; a pickle from the network would run code in the engine.
    """

    gpu_uuid: str = Field(min_length=1, max_length=128)
    stride: list[_Count] = Field(max_length=8)
    tensor_offset: _Count
    device: int = Field(ge=0, le=1024)
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
    """Over ipc only."""

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
