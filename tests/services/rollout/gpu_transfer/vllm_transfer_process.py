"""Real vLLM, its own engine and worker processes, and weights that reach it over a link.

    python vllm_transfer_process.py MODEL FOLDER

A CPU has no NCCL: in learner and worker the communicator is vLLM's own broadcast over TCP. Started
by test_vllm_transfer.py, which reads the last line. In a process of its own, because vLLM and the
replacement change it for good.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import load_file

from openrlhf_alp.clients.control import ControlClient
from openrlhf_alp.clients.rollout import RolloutClient
from openrlhf_alp.clients.weights.carry import in_buckets
from openrlhf_alp.clients.weights.gpu_carrier import Meeting
from openrlhf_alp.clients.weights.push import PushResult, WeightPusher
from services.rollout.api.app import create_app
from services.rollout.engines.protocol import TransferError
from services.rollout.engines.vllm_engine import VllmEngine
from services.rollout.gpu_transfer.receiver import RpcReceiver
from services.rollout.model_folder import read_model_folder
from services.rollout.service import build_service
from services.rollout.settings import RolloutSettings
from services.rollout.wire.schemas import GenerateRequest, Sampling
from services.rollout.wire.transfer import NcclLink, OpenRequest

API_KEY, ADMIN_KEY = "api-key-for-tests", "admin-key-for-tests"


def stand_in_for_nccl(_: Any = None) -> None:
    """Sent to the workers by value, so it imports what it needs."""
    import contextlib
    from types import SimpleNamespace

    import torch
    from vllm.distributed.utils import StatelessProcessGroup
    from vllm.distributed.weight_transfer import nccl_common, packed_tensor

    class Communicator:
        disabled = False

        def __init__(self, group: Any) -> None:
            self._group = group

        def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
            sent = self._group.broadcast(tensor, src)
            if self._group.rank != src:
                tensor.copy_(sent)

        def destroy(self) -> None:
            pass

    def meet(host: str, port: int, rank: int, world_size: int, device: Any) -> Communicator:
        return Communicator(StatelessProcessGroup.create(host, port, rank, world_size))

    stream = SimpleNamespace(synchronize=lambda: None)
    nccl_common.stateless_init_process_group = meet
    packed_tensor._get_streams = lambda _, number: (stream,) * number
    torch.cuda.stream = lambda _: contextlib.nullcontext()
    torch.accelerator.current_device_index = lambda: 0


class Service:
    """The real app around the engine, and its two kinds of callers."""

    def __init__(self, engine: VllmEngine, settings: RolloutSettings, folder: Path) -> None:
        service = build_service(engine, read_model_folder(settings), settings, folder)
        app = create_app(service, settings, api_key=API_KEY, admin_key=ADMIN_KEY)
        network = httpx.ASGITransport(app=app)
        self.access: dict[str, Any] = {
            "urls": ["http://s"],
            "api_key": API_KEY,
            "admin_key": ADMIN_KEY,
            "transport": network,
        }

    async def push(self, transport: Any, tensors: dict[str, torch.Tensor]) -> PushResult:
        pusher = WeightPusher(
            ["http://s"],
            api_key=API_KEY,
            admin_key=ADMIN_KEY,
            transport=transport,
            meeting=Meeting(host="127.0.0.1"),
            make_client=lambda: ControlClient(**self.access),
        )
        return await pusher.push_async(in_buckets(tensors.items()))

    async def answer(self, request_id: str) -> tuple[list[int], list[float], list[int]]:
        """Ids, log-probs and versions of twelve greedy tokens."""
        sampling = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)
        request = GenerateRequest(request_id=request_id, token_ids=[72, 101], sampling=sampling)
        async with RolloutClient(**self.access) as client:
            sample = (await client.generate(request)).samples[0]
        return sample.token_ids, sample.logprobs, [span.version for span in sample.spans]


async def failure_without_a_gpu(engine: VllmEngine) -> str:
    link = NcclLink(
        master_address="127.0.0.1", master_port=9, rank_offset=1, world_size=2, buffer_bytes=1
    )
    try:
        await RpcReceiver(engine._llm.collective_rpc).open(OpenRequest(link=link))
    except TransferError as error:
        return error.code
    return "none"


async def run(settings: RolloutSettings, folder: Path) -> dict[str, Any]:
    engine = VllmEngine.start(settings, (256,))
    try:
        report: dict[str, Any] = {
            "offered_on_a_cpu": list(engine.info.link_backends),
            "failure": await failure_without_a_gpu(engine),
        }
        stand_in_for_nccl()
        await engine._llm.collective_rpc(stand_in_for_nccl)
        engine._info = replace(engine.info, link_backends=("nccl",))
        service = Service(engine, settings, folder)
        old = load_file(settings.model / "model.safetensors")
        new = {name: tensor * 0.5 for name, tensor in old.items()}
        answers = [await service.answer("before")]
        pushes = []
        for transport, tensors in (("nccl", new), ("file", old), ("file", new)):
            pushes.append(await service.push(transport, tensors))
            answers.append(await service.answer(f"version-{pushes[-1].version}"))
        report["answers"] = answers
        report["digests"] = [push.digest for push in pushes]
        report["num_bytes"] = [push.num_bytes for push in pushes]
        return report
    finally:
        await engine.close()


if __name__ == "__main__":
    # Only to send the replacement to the workers; the service itself never needs it.
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    chosen = RolloutSettings(
        model=Path(sys.argv[1]), kv_cache_gb=0.1, num_threads=1, max_model_len=128
    )
    result = asyncio.run(run(chosen, Path(sys.argv[2])))
    print(json.dumps(result), flush=True)
