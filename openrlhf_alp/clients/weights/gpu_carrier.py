"""Weights from the learner's GPU to the servers' over vLLM's transfer engines, `nccl` and `ipc`.

    open: learner (rank 0) and every worker of every server meet.   carry: all of them take part in
    one broadcast (nccl), or the server maps the learner's tensors (ipc).   Then prepare and commit.

A group lives for one update, so a server that was restarted meanwhile is no special case.

If the learner dies while a bucket is on its way, the servers wait for the rest of it, and generate
nothing, until the time limit of the link; then they serve the old version as before.

Written against vLLM 0.29. Never run on a GPU: the tests run it on a CPU, with another communicator
in the place of NCCL, and for ipc with other memory in the place of the GPU's.
"""

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import torch

from openrlhf_alp.clients.channel import Channel
from openrlhf_alp.clients.contract import require_transport
from openrlhf_alp.clients.control import ControlClient
from openrlhf_alp.clients.errors import ServiceError, WeightUpdateFailed
from openrlhf_alp.clients.weights.carry import Bucket, Carrier
from services.rollout.wire.schemas import Contract, LinkBackend, UploadStatus
from services.rollout.wire.tensors import DTYPE_CODES
from services.rollout.wire.transfer import (
    IpcLink,
    LinkStatus,
    NcclLink,
    OpenRequest,
    ReceiveRequest,
    SentTensor,
    lacks_nccl,
    leave_group,
    run_in_daemon_thread,
    to_wire,
)

_LEAVE_S = 5.0
"""Wait for the servers to leave the group; their own time limits end it otherwise."""

_GRACE_S = 10.0
"""Wait beyond a link's own limit, so that a server can say what it waited for."""

_WHOLE_BUCKET_BYTES = 2**40
"""vLLM cuts a bucket into chunks of this size. Ours is cut already; no buffer of this size is made.
"""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Where learner and servers meet for nccl."""

    host: str | None = None
    """Address of the learner as the servers reach it; None: that of the route to the servers."""

    port: int | None = None
    """TCP port; None: a free one for each update."""


@dataclass
class GpuCarrier(Carrier):
    """Sends buckets that stay in GPU memory; the servers write what arrives into their uploads.

    Every server that answered when the update began takes part. If one of them fails then, the
    update fails for all, because a broadcast needs every rank. Create it inside the event loop.
    """

    client: ControlClient  # of all servers
    name: str  # begins the name of each file, new for each update
    backend: LinkBackend
    _: KW_ONLY
    limit_s: float  # for the group to meet, and for each bucket
    meeting: Meeting = field(default_factory=Meeting)
    buffer_bytes: int = _WHOLE_BUCKET_BYTES  # of one broadcast

    on_device = True

    def __post_init__(self) -> None:
        self._members: list[tuple[Channel, int]] = []  # with the rank of each server's first worker
        self._world_size = 1  # the learner is rank 0
        self._device = torch.device("cpu")
        self._source = _BucketSource()
        self._engine: Any = None  # vLLM's, once the group has met
        self._file = ""
        self._refusal: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()

    async def __aenter__(self) -> Self:
        """Count the group's ranks; it meets when there is something to send."""
        channels = [server.channel for server in self.client.reachable()]
        contracts = await asyncio.gather(*(c.get("/v1/contract", Contract) for c in channels))
        for channel, contract in zip(channels, contracts, strict=True):
            require_transport(contract, self.backend, channel.url)
            self._members.append((channel, self._world_size))
            self._world_size += contract.num_workers
        if self.backend == "ipc":
            _require_one_learner_and_one_worker(self._world_size)
        return self

    async def __aexit__(self, *_: object) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            # First on this side: it wakes up a broadcast of ours that still waits for a server.
            await asyncio.to_thread(leave_group, engine)
        # A server that is waiting for a bucket leaves by its own time limit.
        with contextlib.suppress(TimeoutError, ServiceError):
            async with asyncio.timeout(_LEAVE_S):
                path = "/v1/weights/transfer/close"
                await self._on_each(lambda channel, _: channel.post(path, None, LinkStatus))

    async def carry(self, index: int, bucket: Bucket) -> str:
        self._file = f"{self.name}-{index:05d}.safetensors"
        self._device = next(iter(bucket.values())).device
        self._source.bucket = bucket
        if self._engine is None:
            loop = asyncio.get_running_loop()
            self._engine = await self._within_limit(lambda: self._open(loop))
        await self._within_limit(self._engine.send_weights)
        # Every server has kept the bucket by now; holding it longer would keep full parameters in
        # GPU memory while the next bucket is gathered.
        self._source.bucket = {}
        return f"uploads/{self._file}"

    def _open(self, loop: asyncio.AbstractEventLoop) -> Any:
        """Have the group meet. Blocks, in a thread, while `loop` runs `_join` in another."""
        try:
            # With the other transports the learner needs no vLLM.
            from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        except ImportError as error:
            raise WeightUpdateFailed(
                f"The transport {self.backend} needs vLLM beside the learner too ({error}). Fix: "
                "install the version that the servers have, or use the transport http."
            ) from error
        if self.backend == "ipc":
            # Each tensor travels with a handle of its own: packing would copy the model once more.
            info = IPCTrainerInitInfo(packed=False, rank=0)
        else:
            host, port = _place(self.meeting, [channel.url for channel, _ in self._members])
            info = NCCLTrainerInitInfo(
                master_address=host,
                master_port=port,
                world_size=self._world_size,
                packed=True,
                packed_buffer_size_bytes=self.buffer_bytes,
                rank=0,
            )
        client = _ControlPlane(loop, self._join, self._receive)
        engine = WeightTransferTrainerFactory.trainer_init(info, client=client, source=self._source)
        # vLLM only logs that it has no NCCL; every broadcast would then send nothing.
        if lacks_nccl(engine):
            raise RuntimeError("vLLM cannot load NCCL in the learner")
        return engine

    async def _join(self, init_info: dict[str, Any]) -> None:
        """Have every server join the group that this side is opening, given vLLM's init info."""

        def request(rank_offset: int) -> OpenRequest:
            if self.backend == "ipc":
                gpu = torch.cuda.get_device_properties(self._device.index)
                return OpenRequest(link=IpcLink(gpu_uuid=str(gpu.uuid)), timeout_s=self.limit_s)
            link = NcclLink(
                master_address=init_info["master_address"],
                master_port=init_info["master_port"],
                rank_offset=rank_offset,
                world_size=init_info["world_size"],
                buffer_bytes=init_info["packed_buffer_size_bytes"],
            )
            return OpenRequest(link=link, timeout_s=self.limit_s)

        path = "/v1/weights/transfer/open"
        with self._noting_refusal():
            await self._on_each(lambda channel, rank: channel.post(path, request(rank), LinkStatus))

    async def _receive(self, update_info: dict[str, Any]) -> None:
        """Have every server receive what this side is sending, given vLLM's update info."""
        with self._noting_refusal():
            request = ReceiveRequest(name=self._file, tensors=_described(update_info))
            path = "/v1/weights/transfer/receive"
            await self._on_each(lambda channel, _: channel.post(path, request, UploadStatus))

    async def _on_each(self, call: Callable[[Channel, int], Awaitable[Any]]) -> None:
        await asyncio.gather(*(call(channel, rank) for channel, rank in self._members))

    @contextlib.contextmanager
    def _noting_refusal(self) -> Iterator[None]:
        """Keep a server's refusal, so that `_within_limit` ends at once.

        vLLM's sending thread learns of it only after a broadcast that no server receives.
        """
        try:
            yield
        except Exception as error:
            if not self._refusal.done():
                self._refusal.set_result(error)
            raise

    async def _within_limit(self, call: Callable[[], Result]) -> Result:
        """Run a blocking call of vLLM's; a server that refuses ends the wait for the others.

        A call that still runs then is woken up when this side leaves the group.
        """

        def on_device() -> Result:
            with torch.accelerator.device_index(self._device.index):
                return call()

        # A call that waits inside NCCL may never return; no executor could be shut down then.
        running = asyncio.wrap_future(run_in_daemon_thread(on_device))
        waited_for: set[asyncio.Future[Any]] = {running, self._refusal}
        limit_s = self.limit_s + _GRACE_S
        await asyncio.wait(waited_for, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        try:
            if self._refusal.done():
                raise self._refusal.result()
            if not running.done():
                raise TimeoutError(f"no answer within {limit_s:g} s")
            return running.result()
        except WeightUpdateFailed:
            raise
        except Exception as error:
            raise WeightUpdateFailed(
                f"The transfer over {self.backend} broke off: {error or type(error).__name__}. "
                "The old version serves. Fix: see the logs of both sides; the transport http "
                "needs no way from GPU to GPU."
            ) from error
        finally:
            running.cancel()


@dataclass(slots=True)
class _BucketSource:
    """vLLM's `WeightSource`, as far as its engines use it: one bucket instead of a whole model."""

    bucket: Bucket = field(default_factory=dict)

    def metadata(self) -> list[Any]:
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(name, t.dtype, tuple(t.shape)) for name, t in self.bucket.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.bucket.items())


@dataclass(frozen=True, slots=True)
class _ControlPlane:
    """vLLM's `VLLMWeightSyncClient`: the four calls by which its engines reach the servers.

    The engines call it in their thread; it runs `join` and `receive` in `loop`. Start and finish of
    an update do nothing: they would rebuild the live model, and here a transfer is only staged.
    """

    loop: asyncio.AbstractEventLoop
    join: Callable[[dict[str, Any]], Coroutine[Any, Any, None]]
    receive: Callable[[dict[str, Any]], Coroutine[Any, Any, None]]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        asyncio.run_coroutine_threadsafe(self.join(init_info), self.loop).result()

    def start_weight_update(self) -> None:
        pass

    def update_weights(self, update_info: dict[str, Any]) -> None:
        asyncio.run_coroutine_threadsafe(self.receive(update_info), self.loop).result()

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        pass


def _described(update_info: dict[str, Any]) -> list[SentTensor]:
    """The tensors of vLLM's update info, as our wire names them; over nccl without handles."""
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
    """This machine's address on the route to the servers; loopback only if all are here."""
    addresses = []
    for url in urls:
        parts = urlsplit(url)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            # Connecting a UDP socket sends nothing; the kernel only chooses the route.
            probe.connect((parts.hostname, parts.port or 80))
            addresses.append(probe.getsockname()[0])
    # Servers elsewhere cannot reach loopback, while local ones can reach every address.
    return next((a for a in addresses if not a.startswith("127.")), addresses[0])


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port
