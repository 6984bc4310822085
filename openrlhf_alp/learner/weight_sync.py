"""Theta to the rollout service, in two phases; sigma never leaves the learner.

    gather one parameter (ZeRO-3) -> safetensors in the service's weights folder -> prepare on all
    servers -> commit on all servers, or abort on all if one cannot prepare
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import deepspeed
import ray
import torch
from torch import nn

from openrlhf_alp.clients.weights import write_weights


class WeightPusher:
    """Rank 0's side of the push. `engines` are the Ray actors of `rollout_engine.RolloutEngine`."""

    def __init__(self, engines: list[Any]) -> None:
        self.engines = engines
        self.directory = ray.get(engines[0].weights_directory.remote())

    @staticmethod
    def push(pusher: WeightPusher | None, model: nn.Module, zero_stage: int) -> None:
        """Collective over all ranks; `pusher` is None everywhere but on rank 0."""
        tensors = gathered_parameters(model, zero_stage, keep=pusher is not None)
        if pusher is None:
            for _ in tensors:
                pass
            return
        pusher.send(tensors)

    def send(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Write, prepare everywhere, commit everywhere.

        Raises:
            WeightUpdateFailed: a server refused or failed; all keep serving the old version.
        """
        with write_weights(self.directory, tensors) as staged:
            try:
                ray.get([e.prepare_weights.remote(staged.manifest) for e in self.engines])
            except ray.exceptions.RayTaskError as error:
                ray.get([e.abort_weights.remote() for e in self.engines])
                raise error.cause from None
            ray.get([e.commit_weights.remote() for e in self.engines])


def gathered_parameters(
    model: nn.Module, zero_stage: int, *, keep: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and full tensor of every parameter, one gathered at a time.

    Tied parameters (an lm_head that is the embedding) come once, under their first name, as they do
    in a Hugging Face checkpoint. Every rank must exhaust the iterator.

    Yields:
        Hugging Face name, CPU tensor in the model's dtype (an empty one unless `keep`).
    """
    for name, parameter in model.named_parameters(remove_duplicate=True):
        with deepspeed.zero.GatheredParameters([parameter], enabled=zero_stage == 3):
            tensor = parameter.detach().to("cpu", copy=zero_stage == 3) if keep else torch.empty(0)
        yield name, tensor
