"""Theta to the rollout service; sigma never leaves the learner.

every rank: gather a bucket of parameters (ZeRO-3) -> rank 0: WeightPusher carries it to the servers
(--rollout.weight_transport), prepares on every server, commits on every server
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import deepspeed
import torch
from torch import nn

from openrlhf_alp.clients.weights.push import PushResult, WeightPusher

BUCKET_BYTES = 256 * 2**20
"""Full parameters that ZeRO-3 gathers at once: what a rank holds beside its shards during a push.
One collective per bucket instead of one per parameter; a larger parameter is gathered alone."""


def push_weights(
    pusher: WeightPusher | None, model: nn.Module, zero_stage: int
) -> PushResult | None:
    """Make every server serve `model`. Collective: all ranks call it, rank 0 writes and pushes.

    An error on rank 0 is raised on all ranks, so that none waits forever in a collective.

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
    model: nn.Module, zero_stage: int, *, keep: bool, bucket_bytes: int = BUCKET_BYTES
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and full tensor of every parameter; under ZeRO-3 gathered bucket by bucket.

    Tied parameters (an lm_head that is the embedding) come once, under their first name, as they do
    in a Hugging Face checkpoint. Every rank must exhaust the iterator.

    Yields:
        Hugging Face name, tensor in the model's dtype (an empty one unless `keep`). The tensor is
        the parameter itself: read it before the next update.
    """
    named = model.named_parameters(remove_duplicate=True)
    for bucket in _buckets(named, bucket_bytes) if zero_stage == 3 else [list(named)]:
        parameters = [parameter for _, parameter in bucket]
        with deepspeed.zero.GatheredParameters(parameters, enabled=zero_stage == 3):
            for name, parameter in bucket:
                yield name, parameter.detach() if keep else torch.empty(0)


def _buckets(
    named: Iterable[tuple[str, nn.Parameter]], bucket_bytes: int
) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Parameters in order, as many at a time as fit `bucket_bytes` when gathered; at least one.

    Deterministic in the names and full sizes, which are the same on every rank: the ranks gather
    the same buckets.
    """
    bucket: list[tuple[str, nn.Parameter]] = []
    held_bytes = 0
    for name, parameter in named:
        # `ds_numel` is the full size of a parameter of which this rank holds a shard.
        num_bytes = getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
        if bucket and held_bytes + num_bytes > bucket_bytes:
            yield bucket
            bucket, held_bytes = [], 0
        bucket.append((name, parameter))
        held_bytes += num_bytes
    if bucket:
        yield bucket
