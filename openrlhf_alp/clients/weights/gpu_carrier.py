"""Weights from the learner's GPU to the servers' over vLLM's transfer engines, `nccl` and `ipc`.

    open: learner (rank 0) and every worker of every server meet.   carry: all of them take part in
    one broadcast (nccl), or the server maps the learner's tensors (ipc).   Then prepare and commit.

A group lives for one update: a server that was restarted meanwhile is no special case.

A learner that dies while a bucket is on its way leaves the servers waiting for the rest of it, and
drawing no token, for the time limit of the link; they serve the old version then as before.

Written against vLLM 0.29. Run on CPU with another communicator in the place of NCCL, and for ipc
with other memory in the place of the GPU's; not run on a GPU.
"""

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import torch

from openrlhf_alp.clients.channel import Channel
from openrlhf_alp.clients.contract import require_transport
from openrlhf_alp.clients.control import ControlClient
from openrlhf_alp.clients.errors import ServiceError, WeightUpdateFailed
from openrlhf_alp.clients.weights.carry import DTYPE_CODES, Bucket, Carrier
from services.rollout.wire.schemas import Contract, LinkBackend, UploadStatus
from services.rollout.wire.transfer import (
    IpcLink,
    LinkStatus,
    NcclLink,
    OpenRequest,
    ReceiveRequest,
    SentTensor,
    run_in_daemon_thread,
    to_wire,
)

BUCKET_BYTES = 256 * 2**20
"""A bucket is packed into one buffer of its size on the learner's GPU and on each server's."""

_LEAVE_S = 5.0
_GRACE_S = 10.0
"""Beyond a link's own limit, so that a server can say what it waited for."""

_WHOLE_BUCKET_BYTES = 2**40
"""vLLM cuts a bucket into chunks of this size; ours is cut already. Nothing so large is made."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Where learner and servers meet for nccl. None: found out."""

    host: str | None = None
    """Address of the learner, as the servers reach it; else that of the way to the servers."""

    port: int | None = None
    """TCP port; else a free one for each update."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A server in the group."""

    channel: Channel
    rank_offset: int  # rank of its first worker; the learner is 0


class GpuCarrier(Carrier):
    """Sends buckets that stay in GPU memory; the servers write what arrives into their uploads.

    Every server that answered when the update began takes part; one that fails then fails the
    update for all, because a broadcast needs everybody.

    Args:
        client: of all servers.
        name: begins the name of each file, new for each update.
        backend: nccl or ipc.
        limit_s: for meeting, and for each bucket.
        meeting: where, for nccl.
        bucket_bytes: of one receive call.
        buffer_bytes: of one broadcast.
    """

    on_device = True

    def __init__(
        self,
        client: ControlClient,
        name: str,
        backend: LinkBackend,
        *,
        limit_s: float,
        meeting: Meeting | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        buffer_bytes: int = _WHOLE_BUCKET_BYTES,
    ) -> None:
        self.bucket_bytes = bucket_bytes
        self._buffer_bytes = buffer_bytes
        self._client = client
        self._name = name
        self._backend = backend
        self._limit_s = limit_s
        self._meeting = meeting or Meeting()
        self._members: list[Member] = []
        self._world_size = 1
        self._device = torch.device("cpu")
        self._sender: Any = None
        self._file = ""
        self._refusal: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()

    async def __aenter__(self) -> Self:
        """Count the group's ranks; it meets when there is something to send."""
        channels = self._client.reachable()
        contracts = await asyncio.gather(*(c.get("/v1/contract", Contract) for c in channels))
        for channel, contract in zip(channels, contracts, strict=True):
            require_transport(contract, self._backend, channel.url)
            self._members.append(Member(channel=channel, rank_offset=self._world_size))
            self._world_size += contract.num_workers
        if self._backend == "ipc":
            _require_one_learner_and_one_worker(self._world_size)
        return self

    async def __aexit__(self, *_: object) -> None:
        sender, self._sender = self._sender, None
        if sender is not None:
            await asyncio.to_thread(sender.leave)
        # A server that is waiting for a bucket leaves by its own time limit.
        with contextlib.suppress(TimeoutError, ServiceError):
            async with asyncio.timeout(_LEAVE_S):
                path = "/v1/weights/transfer/close"
                await self._on_each(lambda m: m.channel.post(path, None, LinkStatus))

    async def carry(self, index: int, bucket: Bucket) -> str:
        self._file = f"{self._name}-{index:05d}.safetensors"
        self._device = next(iter(bucket.values())).device
        if self._sender is None:
            loop = asyncio.get_running_loop()
            self._sender = await self._within_limit(lambda: self._open(loop))
        sender = self._sender
        await self._within_limit(lambda: sender.send(bucket))
        return f"uploads/{self._file}"

    def _open(self, loop: asyncio.AbstractEventLoop) -> Any:
        try:
            from openrlhf_alp.clients.weights import vllm_sender
        except ImportError as error:
            raise WeightUpdateFailed(
                f"The transport {self._backend} needs vLLM beside the learner too ({error}). Fix: "
                "install the version that the servers have, or use the transport http."
            ) from error
        if self._backend == "ipc":
            info = vllm_sender.ipc()
        else:
            host, port = _place(self._meeting, [member.channel.url for member in self._members])
            info = vllm_sender.nccl(
                host, port, world_size=self._world_size, buffer_bytes=self._buffer_bytes
            )
        return vllm_sender.Sender(info, loop=loop, join=self._join, receive=self._receive)

    async def _join(self, init_info: dict[str, Any]) -> None:
        """Have every server join the group that this side is opening; vLLM's init info in."""

        def request(member: Member) -> OpenRequest:
            if self._backend == "ipc":
                gpu = torch.cuda.get_device_properties(self._device.index)
                return OpenRequest(link=IpcLink(gpu_uuid=str(gpu.uuid)), timeout_s=self._limit_s)
            link = NcclLink(
                master_address=init_info["master_address"],
                master_port=init_info["master_port"],
                rank_offset=member.rank_offset,
                world_size=init_info["world_size"],
                buffer_bytes=init_info["packed_buffer_size_bytes"],
            )
            return OpenRequest(link=link, timeout_s=self._limit_s)

        path = "/v1/weights/transfer/open"
        with self._noting_refusal():
            await self._on_each(lambda m: m.channel.post(path, request(m), LinkStatus))

    async def _receive(self, update_info: dict[str, Any]) -> None:
        """Have every server receive what this side is sending; vLLM's update info in."""
        with self._noting_refusal():
            request = ReceiveRequest(name=self._file, tensors=_described(update_info))
            path = "/v1/weights/transfer/receive"
            await self._on_each(lambda m: m.channel.post(path, request, UploadStatus))

    async def _on_each(self, call: Callable[[Member], Awaitable[Any]]) -> None:
        await asyncio.gather(*(call(member) for member in self._members))

    @contextlib.contextmanager
    def _noting_refusal(self) -> Iterator[None]:
        """vLLM's sending thread hears of a refusal only after a broadcast that nobody receives."""
        try:
            yield
        except Exception as error:
            if not self._refusal.done():
                self._refusal.set_result(error)
            raise

    async def _within_limit(self, call: Callable[[], Result]) -> Result:
        """Run a blocking call of vLLM's; a server that refuses ends the wait for the others.

        What still runs then is woken up when the sender leaves the group.
        """

        def on_device() -> Result:
            with torch.accelerator.device_index(self._device.index):
                return call()

        running = asyncio.wrap_future(run_in_daemon_thread(on_device))
        waited_for: set[asyncio.Future[Any]] = {running, self._refusal}
        await asyncio.wait(
            waited_for,
            timeout=self._limit_s + _GRACE_S,
            return_when=asyncio.FIRST_COMPLETED,
        )
        try:
            if self._refusal.done():
                raise self._refusal.result()
            if not running.done():
                raise TimeoutError(f"nobody answered within {self._limit_s + _GRACE_S:g} s")
            return running.result()
        except WeightUpdateFailed:
            raise
        except Exception as error:
            raise WeightUpdateFailed(
                f"The transfer over {self._backend} broke off: {error or type(error).__name__}. "
                "The old version serves. Fix: see the logs of both sides; the transport http "
                "needs no way from GPU to GPU."
            ) from error
        finally:
            running.cancel()


def _described(update_info: dict[str, Any]) -> list[SentTensor]:
    """The tensors of vLLM's update info, on our wire."""
    names = update_info["names"]
    handles = update_info.get("ipc_handles") or [{None: None}] * len(names)
    tensors = []
    for name, dtype_name, shape, handle in zip(
        names, update_info["dtype_names"], update_info["shapes"], handles, strict=True
    ):
        ((gpu_uuid, args),) = handle.items()
        tensors.append(
            SentTensor(
                name=name,
                dtype=DTYPE_CODES[getattr(torch, dtype_name)],
                shape=shape,
                handle=None if args is None else to_wire(args, gpu_uuid),
            )
        )
    return tensors


def _require_one_learner_and_one_worker(world_size: int) -> None:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    num_learners = torch.distributed.get_world_size() if distributed else 1
    if (num_learners, world_size) != (1, 2):
        raise WeightUpdateFailed(
            f"The transport ipc maps the memory of one GPU: it takes one learner process and one "
            f"worker, not {num_learners} and {world_size - 1}. Fix: use the transport nccl or http."
        )


def _place(meeting: Meeting, urls: Sequence[str]) -> tuple[str, int]:
    try:
        host = meeting.host or _address_towards(urls)
        return host, meeting.port or _free_port(host)
    except OSError as error:
        raise WeightUpdateFailed(
            f"There is no place where learner and servers can meet for nccl: {error}. Fix: set "
            "--rollout.weight_sync_host to an IPv4 address of the learner that the servers reach."
        ) from error


def _address_towards(urls: Sequence[str]) -> str:
    """This machine's address on the way to the servers; loopback only if all are here."""
    addresses = []
    for url in urls:
        parts = urlsplit(url)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing
            probe.connect((parts.hostname, parts.port or 80))
            addresses.append(probe.getsockname()[0])
    return next((a for a in addresses if not a.startswith("127.")), addresses[0])


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port
