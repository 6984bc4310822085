"""Theta to the rollout service; sigma never leaves the learner.

every rank: gather a bucket of parameters (ZeRO-3) -> rank 0: WeightPusher carries it to the servers
(--rollout.weight_transport), prepares on every server, commits on every server
"""

from __future__ import annotations

from collections.abc import Iterator

import deepspeed
import torch
from torch import nn

from openrlhf_alp.clients.weights.carry import BUCKET_BYTES, in_buckets
from openrlhf_alp.clients.weights.push import PushResult, WeightPusher


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
    buckets = gathered_buckets(model, zero_stage, keep=pusher is not None)
    failure: list[Exception | None] = [None]
    pushed: PushResult | None = None
    if pusher is not None:
        try:
            pushed = pusher.push(buckets)
        except Exception as error:
            failure = [error]
    for _ in buckets:  # what rank 0 did not take; every rank takes part in each gathering
        pass
    torch.distributed.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise failure[0]
    return pushed


def gathered_parameters(
    model: nn.Module, zero_stage: int, *, keep: bool, bucket_bytes: int = BUCKET_BYTES
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and full tensor of every parameter, as `gathered_buckets` yields them."""
    for bucket in gathered_buckets(model, zero_stage, keep=keep, bucket_bytes=bucket_bytes):
        yield from bucket


def gathered_buckets(
    model: nn.Module, zero_stage: int, *, keep: bool, bucket_bytes: int = BUCKET_BYTES
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Every parameter in full, bucket by bucket; under ZeRO-3 with one collective per bucket.

    Tied parameters (an lm_head that is the embedding) come once, under their first name, as they do
    in a Hugging Face checkpoint. Every rank must exhaust the iterator.

    Args:
        bucket_bytes: what a rank holds beside its shards; a larger parameter is gathered alone.

    Yields:
        (Hugging Face name, tensor in the model's dtype) pairs; the tensors are empty unless `keep`.
        A tensor is the parameter itself: read it before the next bucket or update.
    """
    for bucket in in_buckets(model.named_parameters(remove_duplicate=True), bucket_bytes):
        parameters = [parameter for _, parameter in bucket]
        with deepspeed.zero.GatheredParameters(parameters, enabled=zero_stage == 3):
            yield [(name, p.detach() if keep else torch.empty(0)) for name, p in bucket]
