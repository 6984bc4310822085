"""One rank of a ZeRO-3 learner: an update, a resumed one, and what the first would push.

Started by test_weight_sync.py:

    python zero3_rank.py RANK WORLD_SIZE PORT ARGS.pickle PUSHED.safetensors

Rank 0 writes the pushed tensors, and the exported model to `--ckpt.output_dir`.
"""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import deepspeed
import torch
from safetensors.torch import save_file
from test_actor import rollouts

from openrlhf_alp.learner import seams
from openrlhf_alp.learner.actor import AlpPolicyModelActor
from openrlhf_alp.learner.strategy import without_sigma
from openrlhf_alp.learner.weight_sync import gathered_parameters

BUCKET_BYTES = 40_000  # the tiny model has 82 kB of embeddings and about 110 kB of layers

PERSISTENT_ELEMENTS = 200
"""DeepSpeed keeps parameters below 100,000 elements whole; all of the tiny model's are."""


def partly(get_config: Callable[..., dict], num_elements: int) -> Callable[..., dict]:
    def with_threshold(*args: object, **kwargs: object) -> dict:
        config = get_config(*args, **kwargs)
        config["zero_optimization"]["stage3_param_persistence_threshold"] = num_elements
        return config

    return with_threshold


def build_actor(args: SimpleNamespace, *where: object) -> AlpPolicyModelActor:
    from openrlhf.utils import get_strategy

    actor = AlpPolicyModelActor(*where)
    with seams.installed():
        strategy = get_strategy(args)
    strategy.get_ds_train_config = partly(strategy.get_ds_train_config, PERSISTENT_ELEMENTS)
    actor.init_model_from_pretrained(strategy, args.actor.model_name_or_path, 10, None)
    return actor


def resume(first: AlpPolicyModelActor, args: SimpleNamespace, *where: object) -> None:
    """A checkpoint of `first` continues with its sigma, and its next update is the same."""
    first.save_checkpoint("global_step1", {"global_step": 1})
    args.ckpt.load_enable = True
    resumed = build_actor(args, *where)
    ours, theirs = (actor.trainer.perturbation for actor in (first, resumed))
    assert ours.get_extra_state() == theirs.get_extra_state()
    metrics = []
    for actor in (first, resumed):
        torch.manual_seed(3)  # the shuffle of the replay buffer
        actor.append(rollouts(actor, seed=10))
        metrics.append(actor.fit())
    for name in ("alp/k3_kl", "alp/sigma_mean", "policy_loss"):
        # Ratios are logged by rank 0 alone.
        assert metrics[0].get(name) == metrics[1].get(name), name
        assert name in metrics[0] or torch.distributed.get_rank() > 0, name


def main(rank: int, world_size: int, port: int, args_file: Path, pushed_file: Path) -> None:
    torch.set_num_threads(1)
    args = pickle.loads(args_file.read_bytes())
    where = (world_size, rank, "127.0.0.1", port)
    actor = build_actor(args, *where)
    batch = rollouts(actor, seed=rank)
    if rank > 0:
        # One forward is enough to measure on what is left here, and rank 0 makes two.
        batch.action_mask[:3] = 0
    actor.append(batch)
    actor.fit()
    start = {"sigma0": actor.trainer.perturbation.sigma0, **actor.trainer.perturbation.start}
    pushed_file.with_suffix(f".rank{rank}.json").write_text(json.dumps(start))
    model = actor.actor.model.module
    gather = mock.patch.object(
        deepspeed.zero, "GatheredParameters", wraps=deepspeed.zero.GatheredParameters
    )
    with without_sigma(actor.actor), gather as gatherings:
        shards = {name: tensor.numel() for name, tensor in model.named_parameters()}
        pushed = dict(gathered_parameters(model, 3, keep=rank == 0, bucket_bytes=BUCKET_BYTES))
    actor.save_model()
    if rank == 0:
        save_file({name: tensor.contiguous() for name, tensor in pushed.items()}, pushed_file)
        report = {"num_gatherings": gatherings.call_count, "shards": shards}
        pushed_file.with_suffix(".json").write_text(json.dumps(report))
    else:
        assert not any(tensor.numel() for tensor in pushed.values())
    resume(actor, args, *where)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), Path(sys.argv[4]), Path(sys.argv[5]))
