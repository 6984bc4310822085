"""Theta to the rollout service; sigma never leaves the learner.

every rank: gather one parameter (ZeRO-3) -> rank 0: WeightPusher writes safetensors,
prepares on every server, commits on every server
"""

from __future__ import annotations

from collections.abc import Iterator

import deepspeed
import torch
from torch import nn

from openrlhf_alp.clients.push import PushResult, WeightPusher


def push_weights(
    pusher: WeightPusher | None, model: nn.Module, zero_stage: int
) -> PushResult | None:
    """Make every server serve `model`. Collective: all ranks call it, rank 0 writes and pushes.

    An error on rank 0 is raised on all ranks, so that none waits for ever in a collective.

    Args:
        pusher: on rank 0; None on the others.
        model: the Hugging Face model inside DeepSpeed's engine, without sigma.
        zero_stage: of DeepSpeed.

    Returns:
        What rank 0 pushed; None on the others.

    Raises:
        ServiceError: the folder cannot be written, or a server refused, failed or is gone.
    """
    parameters = gathered_parameters(model, zero_stage, keep=pusher is not None)
    failure: list[Exception | None] = [None]
    pushed: PushResult | None = None
    if pusher is not None:
        try:
            pushed = pusher.push(parameters)
        except Exception as error:
            failure = [error]
    for _ in parameters:  # what rank 0 did not take; every rank takes part in each gathering
        pass
    torch.distributed.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise failure[0]
    return pushed


def gathered_parameters(
    model: nn.Module, zero_stage: int, *, keep: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and full tensor of every parameter, one gathered at a time.

    Tied parameters (an lm_head that is the embedding) come once, under their first name, as they do
    in a Hugging Face checkpoint. Every rank must exhaust the iterator.

    Yields:
        Hugging Face name, tensor in the model's dtype (an empty one unless `keep`).
    """
    for name, parameter in model.named_parameters(remove_duplicate=True):
        with deepspeed.zero.GatheredParameters([parameter], enabled=zero_stage == 3):
            tensor = parameter.detach() if keep else torch.empty(0)
            if zero_stage == 3:
                tensor = tensor.clone()  # the gathered copy is freed with the context
        yield name, tensor
