"""Theta to the rollout service; sigma never leaves the learner.

every rank: gather a bucket of parameters (ZeRO-3) -> rank 0: give them the names and shapes of the
checkpoint -> WeightPusher carries it to the servers
(--rollout.weight_transport), prepares on every server, commits on every server
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

import deepspeed
import torch
from openrlhf.utils.utils import is_vlm_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from openrlhf_alp.clients.errors import WeightUpdateFailed
from openrlhf_alp.clients.weights.carry import BUCKET_BYTES, packed_groups
from openrlhf_alp.clients.weights.layout import CheckpointLayout, stored_tensors, to_checkpoint
from openrlhf_alp.clients.weights.push import PushResult, WeightPusher

logger = logging.getLogger(__name__)

_MAX_PUSHES = 3  # a server can end in the middle of a push; one that ends in each is broken


def push_weights(
    pusher: WeightPusher | None, model: nn.Module, zero_stage: int
) -> PushResult | None:
    """Make every server serve `model`. Collective: all ranks call it, rank 0 writes and pushes.

    A push that a server's end broke off is made again, in full, to the server that took its place.
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
    for attempt in range(1, _MAX_PUSHES + 1):
        pushed, failure = _push_once(pusher, model, zero_stage)
        if failure is None:
            return pushed
        if attempt == _MAX_PUSHES or not isinstance(failure, WeightUpdateFailed):
            raise failure
        if pusher is not None:
            logger.warning("push %d of at most %d: %s", attempt, _MAX_PUSHES, failure)
    raise AssertionError("unreachable: the last attempt returns or raises")


def _push_once(
    pusher: WeightPusher | None, model: nn.Module, zero_stage: int
) -> tuple[PushResult | None, Exception | None]:
    """One attempt. All ranks learn of rank 0's failure, which they raise or follow by another."""
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
    return pushed, failure[0]


def pushed_tensors(name_or_path: str) -> Mapping[str, torch.Tensor]:
    """What a learner of this model will push: names, shapes and dtypes, on the meta device.

    Args:
        name_or_path: folder or Hugging Face id; only the headers of its weight files are read.

    Raises:
        ValueError: the model cannot be built.
        WeightUpdateFailed: its weights cannot be pushed bucket by bucket.
    """
    kind = AutoModelForImageTextToText if is_vlm_model(name_or_path) else AutoModelForCausalLM
    try:
        model = kind.from_pretrained(name_or_path, trust_remote_code=True, device_map="meta")
    except Exception as error:
        raise ValueError(
            f"--actor.model_name_or_path {name_or_path}: its model cannot be built ({error}). Give "
            "a folder or id with config.json and unquantised .safetensors weights."
        ) from error
    layout = CheckpointLayout.of(model)
    layout.require_convertible(model)
    return layout.tensors


def gathered_parameters(
    model: nn.Module, zero_stage: int, *, keep: bool, bucket_bytes: int = BUCKET_BYTES
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and full tensor of every parameter, as `gathered_buckets` yields them."""
    for bucket in gathered_buckets(model, zero_stage, keep=keep, bucket_bytes=bucket_bytes):
        yield from bucket


def gathered_buckets(
    model: nn.Module, zero_stage: int, *, keep: bool, bucket_bytes: int = BUCKET_BYTES
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Every tensor of the model's checkpoint in full, bucket by bucket; under ZeRO-3 with one
    collective per bucket. Every rank must exhaust the iterator.

    Args:
        bucket_bytes: what a rank holds beside its shards, and once more where a conversion copies;
            a larger parameter is gathered alone.

    Yields:
        (name as in save_pretrained's files, tensor in the model's dtype) pairs; none unless `keep`.
        A tensor may share the parameter's memory: read it before the next bucket or update.
    """
    layout = CheckpointLayout.of(model)
    stored = stored_tensors(model)
    groups = [[(name, stored[name]) for name in group] for group in layout.groups]
    for packed in packed_groups(groups, bucket_bytes):
        bucket = {name: tensor for group in packed for name, tensor in group}
        sharded = [t for t in bucket.values() if isinstance(t, nn.Parameter)]
        with deepspeed.zero.GatheredParameters(sharded, enabled=zero_stage == 3):
            if not keep:
                yield []
                continue
            whole = {name: tensor.detach() for name, tensor in bucket.items()}
            yield list(to_checkpoint(model, whole).items())
