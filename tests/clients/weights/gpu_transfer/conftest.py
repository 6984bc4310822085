"""What a CPU lacks, replaced; the rest is vLLM's own engines and, between them, the real app.

NCCL: learner and workers meet over TCP as vLLM has them meet, and then exchange tensors between
threads; like NCCL, they wait for each other forever, unless the communicator is destroyed. CUDA
IPC: a handle names a tensor of this process.
"""

import asyncio
import contextlib
import socket
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from torch.distributed import TCPStore
from transformers import LlamaForCausalLM

from openrlhf_alp.clients.channel import Timeouts
from openrlhf_alp.clients.weights.carry import BUCKET_BYTES, in_buckets
from openrlhf_alp.clients.weights.gpu_carrier import GpuCarrier, Meeting
from openrlhf_alp.clients.weights.push import WeightPusher
from services.rollout.engines.hf_engine import HfEngine
from services.rollout.engines.protocol import EngineInfo
from services.rollout.gpu_transfer.receiver import RpcReceiver, TransferReceiver
from services.rollout.service import RolloutService
from services.rollout.wire.schemas import GenerateRequest, Sampling
from services.rollout.wire.transfer import TRANSFER_THREAD, run_in_daemon_thread

ADMIN = {"authorization": "Bearer admin-key-for-tests"}
HERE = Meeting(host="127.0.0.1")
END_S = 60.0
GUEST = timedelta(seconds=END_S)

OWN_GPU = "GPU-of-this-test"


class Group:
    """What the ranks of one communicator share: broadcasts in order, and who has taken part."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.sent: dict[int, torch.Tensor] = {}
        self.num_taken: defaultdict[int, int] = defaultdict(int)


class Communicator:
    """In the place of PyNcclCommunicator."""

    groups: defaultdict[str, Group] = defaultdict(Group)
    ranks: list[int] = []
    kept: list[Any] = []  # rank 0 holds the store, which the others may still be coming to
    waiting: dict[int, int] = {}  # port of a meeting that is not complete -> world size
    disabled = False

    def __init__(self, meeting: Any) -> None:
        self.rank, self.world_size = meeting.rank, meeting.world_size
        name = meeting.broadcast_obj(uuid.uuid4().hex if meeting.rank == 0 else None, src=0)
        self._group = self.groups[name]
        self._round = 0
        self._destroyed = False
        self.ranks.append(meeting.rank)
        self.kept.append(meeting)

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        group, number = self._group, self._round
        self._round += 1
        with group.changed:
            if self.rank == src:
                group.sent[number] = tensor.clone()
                group.changed.notify_all()
                self._wait(lambda: group.num_taken[number] == self.world_size - 1)
            else:
                self._wait(lambda: number in group.sent)
                tensor.copy_(group.sent[number])
                group.num_taken[number] += 1
                group.changed.notify_all()

    def _wait(self, condition: Any) -> None:
        self._group.changed.wait_for(lambda: condition() or self._destroyed)
        if self._destroyed:
            raise RuntimeError("the communicator was destroyed")

    def destroy(self) -> None:
        with self._group.changed:
            self._destroyed = True
            self._group.changed.notify_all()


def meet(host: str, port: int, rank: int, world_size: int, device: Any) -> Communicator:
    from vllm.distributed.utils import StatelessProcessGroup

    if rank == 0:  # the only one that waits for all
        Communicator.waiting[port] = world_size
    group = StatelessProcessGroup.create(host, port, rank, world_size)
    if rank == 0:
        del Communicator.waiting[port]
    return Communicator(group)


@pytest.fixture(autouse=True)
def meetings(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """`ranks` that have met in this test, and its `groups` by name.

    A meeting that was broken off is filled up at the end, so that nobody waits in it any more.
    """
    from vllm.distributed.weight_transfer import nccl_common, packed_tensor

    stream = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(nccl_common, "stateless_init_process_group", meet)
    monkeypatch.setattr(packed_tensor, "_get_streams", lambda _, number: (stream,) * number)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(Communicator, "ranks", [])
    monkeypatch.setattr(Communicator, "groups", defaultdict(Group))
    monkeypatch.setattr(Communicator, "kept", [])
    monkeypatch.setattr(Communicator, "waiting", {})
    yield SimpleNamespace(ranks=Communicator.ranks, groups=Communicator.groups)
    give_up_s = time.monotonic() + END_S
    while daemons := [t for t in threading.enumerate() if t.name == TRANSFER_THREAD]:
        assert time.monotonic() < give_up_s, daemons
        for port, world_size in list(Communicator.waiting.items()):
            guest = TCPStore("127.0.0.1", port, world_size, False, GUEST, use_libuv=False)
            Communicator.kept.append(guest)
        daemons[0].join(0.1)


@pytest.fixture
def meeting() -> Callable[..., contextlib.AbstractContextManager[int]]:
    """A learner that waits at a port for the rest of a group, and then sends nothing."""

    @contextlib.contextmanager
    def wait(world_size: int = 2) -> Iterator[int]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port: int = free.getsockname()[1]
        learner = run_in_daemon_thread(lambda: meet("127.0.0.1", port, 0, world_size, None))
        yield port
        if world_size == 2:
            learner.result()

    return wait


@pytest.fixture
def shared_memory(monkeypatch: pytest.MonkeyPatch) -> dict[bytes, torch.Tensor]:
    """CUDA IPC within this process."""
    from vllm.distributed.weight_transfer import ipc_engine

    shared: dict[bytes, torch.Tensor] = {}

    def reduce_tensor(tensor: torch.Tensor) -> tuple[Any, tuple[Any, ...]]:
        handle = b"c" + uuid.uuid4().bytes * 4
        shared[handle] = tensor
        return None, reduced(tensor, handle)

    def rebuild_cuda_tensor(*args: Any) -> torch.Tensor:
        tensor = shared[args[7]]
        assert args == reduced(tensor, args[7], device=None)
        return tensor

    gpu = SimpleNamespace(uuid=OWN_GPU)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
    monkeypatch.setattr(ipc_engine, "reduce_tensor", reduce_tensor)
    monkeypatch.setattr(ipc_engine, "rebuild_cuda_tensor", rebuild_cuda_tensor)
    return shared


@pytest.fixture
def cuda_args() -> Callable[..., tuple[Any, ...]]:
    return reduced


def reduced(tensor: torch.Tensor, handle: bytes, *, device: int | None = 0) -> tuple[Any, ...]:
    """What torch 2.13's `reduce_tensor` returns for a CUDA tensor, in its order."""
    return (
        type(tensor),
        tensor.size(),
        tensor.stride(),
        tensor.storage_offset(),
        type(tensor._typed_storage()),
        tensor.dtype,
        device,
        handle,
        tensor.untyped_storage().size(),
        512,
        tensor.requires_grad,
        b"/torch_1234_5678_9",
        7,
        b"\x00\xff" * 32,
        True,
    )


class Worker(TransferReceiver):
    """As much of a vLLM worker as the receiver sees."""

    def __init__(self, rank: int, num_workers: int) -> None:
        parallel = SimpleNamespace(data_parallel_index=0, world_size=num_workers, rank=rank)
        self.vllm_config = SimpleNamespace(parallel_config=parallel, model_config=None)
        self.device = torch.device("cpu")
        self.rank = rank


class LinkedEngine(HfEngine):
    """The deterministic engine with vLLM's receivers, each worker in a thread."""

    num_workers = 1

    @property
    def info(self) -> EngineInfo:
        backends = ("nccl", "ipc")
        return replace(super().info, link_backends=backends, num_workers=self.num_workers)

    @property
    def receiver(self) -> RpcReceiver:
        if not hasattr(self, "workers"):
            self.workers = [Worker(rank, self.num_workers) for rank in range(self.num_workers)]
        return RpcReceiver(self.rpc)

    async def rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        calls = (asyncio.to_thread(getattr(worker, method), *args) for worker in self.workers)
        return await asyncio.gather(*calls)


class TwoGpuEngine(LinkedEngine):
    num_workers = 2


ENGINES = {0: HfEngine, 1: LinkedEngine, 2: TwoGpuEngine}


class Fleet:
    """Services over one model, and what a learner does with them."""

    def __init__(self, make_service: Any, network: Any, make_client: Any, folder: Path) -> None:
        self.network, self.make_client, self.folder = network, make_client, folder
        self.make_service = make_service
        self.urls: list[str] = []
        self.services: list[RolloutService] = []

    def add(self, num_gpus: int = 1) -> RolloutService:
        """One more service; without a GPU its engine has no receiver."""
        service = self.make_service(own_folder=True, engine_class=ENGINES[num_gpus])
        self.urls.append(self.network.add(f"s{len(self.urls)}", service))
        self.services.append(service)
        return service

    def carrier(self, client: Any, name: str, **options: Any) -> GpuCarrier:
        return GpuCarrier(client, name, "nccl", limit_s=20, meeting=HERE, **options)

    async def push(
        self,
        transport: Any,
        tensors: Any,
        *,
        timeouts: Timeouts | None = None,
        meeting: Meeting | None = HERE,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> Any:
        pusher = WeightPusher(
            self.urls,
            api_key="x",
            admin_key="x",
            timeouts=timeouts,
            transport=transport,
            meeting=meeting,
            make_client=lambda: self.make_client(*self.urls).control,
        )
        return await asyncio.to_thread(pusher.push, in_buckets(tensors, bucket_bytes))

    def weights(self, factor: float) -> dict[str, torch.Tensor]:
        model = LlamaForCausalLM.from_pretrained(self.folder)
        return {name: tensor * factor for name, tensor in model.named_parameters()}

    async def answer(self, url: str, request_id: str) -> tuple[list[int], list[float], set[int]]:
        """Ids, log-probs and versions of eight greedy tokens."""
        sampling = Sampling(max_tokens=8, temperature=0.0, ignore_eos=True)
        request = GenerateRequest(request_id=request_id, token_ids=[1, 2, 3], sampling=sampling)
        async with self.make_client(url) as client:
            sample = (await client.generate(request)).samples[0]
        return sample.token_ids, sample.logprobs, {span.version for span in sample.spans}

    @contextlib.asynccontextmanager
    async def http(self, index: int = 0) -> AsyncIterator[httpx.AsyncClient]:
        """Raw requests with the admin key to one service."""
        app = self.network.apps[f"s{index}"]
        async with httpx.AsyncClient(
            transport=app, base_url=self.urls[index], headers=ADMIN
        ) as http:
            yield http


@pytest.fixture
def fleet(make_service: Any, network: Any, make_client: Any, model_folder: Path) -> Fleet:
    return Fleet(make_service, network, make_client, model_folder)
