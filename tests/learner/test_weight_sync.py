"""Pushes that break off; under ZeRO-3 whole parameters, gathered a bucket at a time."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from openrlhf_alp.clients.errors import WeightUpdateFailed
from openrlhf_alp.clients.weights.carry import NamedBuckets
from openrlhf_alp.clients.weights.push import PushResult, WeightPusher
from openrlhf_alp.learner.weight_sync import push_weights

RANK = Path(__file__).with_name("zero3_rank.py")


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_zero3_ranks_calibrate_update_push_what_they_export_and_resume(
    parse: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    world_size = 2
    args = parse(
        *("--alp.enable", "--alp.sigma0", "auto", "--ds.zero_stage", "3"),
        *("--alp.layers", "all,logits", "--alp.draws", "2"),
        *("--actor.num_gpus_per_node", str(world_size), "--train.batch_size", str(4 * world_size)),
        *("--rollout.micro_batch_size", "1", "--ds.param_dtype", "bf16"),
    )
    args_file, pushed_file = tmp_path / "args.pickle", tmp_path / "pushed.safetensors"
    args_file.write_bytes(pickle.dumps(args))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, RANK, str(rank), str(world_size), str(port), args_file, pushed_file],
            env={**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        outputs = [rank.communicate(timeout=480)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0] * world_size, "\n".join(outputs)[-4000:]

    starts = [
        json.loads(pushed_file.with_suffix(f".rank{rank}.json").read_text())
        for rank in range(world_size)
    ]
    assert starts[0] == starts[1]
    assert starts[0]["sigma0"] > 1e-6

    pushed = load_file(pushed_file)
    exported = load_file(Path(args.ckpt.output_dir) / "model.safetensors")
    assert pushed.keys() == exported.keys()
    assert all(torch.equal(tensor, exported[name]) for name, tensor in pushed.items())
    before = load_file(Path(args.actor.model_name_or_path) / "model.safetensors")
    assert any(not torch.equal(tensor, before[name]) for name, tensor in pushed.items())
    report = json.loads(pushed_file.with_suffix(".json").read_text())
    assert 1 < report["num_gatherings"] < len(pushed)
    assert report["shards"]["model.embed_tokens.weight"] == 0  # partitioned before and after


class BreaksOff(WeightPusher):
    """Its first pushes end as when a server ends in their middle."""

    num_failures = 0

    def push(self, buckets: NamedBuckets) -> PushResult:
        self.num_pushes = getattr(self, "num_pushes", 0) + 1
        self.names = [name for bucket in buckets for name, _ in bucket]
        if self.num_pushes <= self.num_failures:
            raise WeightUpdateFailed("http://a does not answer")
        result: Any = f"push {self.num_pushes}"
        return result


@pytest.fixture
def one_rank() -> Iterator[None]:
    if torch.distributed.is_initialized():  # DeepSpeed in an earlier test of this process
        yield
        return
    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, store=torch.distributed.HashStore()
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_a_push_that_broke_off_is_made_again_in_full_but_not_for_ever(tiny_model: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_model)
    pusher = BreaksOff(["http://a"], api_key="x", admin_key="x")
    pusher.num_failures = 2
    assert push_weights(pusher, model, zero_stage=2) == "push 3"
    assert "model.norm.weight" in pusher.names
    pusher.num_pushes, pusher.num_failures = 0, 3
    with pytest.raises(WeightUpdateFailed, match="does not answer"):
        push_weights(pusher, model, zero_stage=2)
    assert pusher.num_pushes == 3
