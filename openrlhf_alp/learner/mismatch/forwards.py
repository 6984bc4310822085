"""The micro-batches of a measurement: as large as the update's, and the same number on each rank.

A forward pass is collective under ZeRO-3, so ranks that made different numbers of them would wait
for each other forever. And an update's micro-batch is what the user made sure to fit into memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from openrlhf.trainer.ppo_utils.experience import Experience

Value = TypeVar("Value")


class MicroBatch(NamedTuple):
    """Samples of one forward pass."""

    samples: list[Experience]
    counts: bool
    """False for a forward that only keeps this rank in step with the others."""


def micro_batches(
    samples: Sequence[Experience],
    *,
    spare: Experience,
    size: int,
    max_tokens: int | None,
    limit: int | None = None,
) -> list[MicroBatch]:
    """Cut `samples` of this rank as the update does. Collective.

    Args:
        samples: single samples, in order; a rank may have none.
        spare: sample for the forwards of a rank that has too few.
        size: samples of a micro-batch; ignored with `max_tokens`.
        max_tokens: tokens of a micro-batch under dynamic batching. A longer sample stands alone.
        limit: most micro-batches; samples beyond them are left out.
    """
    if max_tokens is None:
        cut = [list(samples[start : start + size]) for start in range(0, len(samples), size)]
    else:
        cut = _by_tokens(samples, max_tokens)
    own = [MicroBatch(batch, True) for batch in cut[:limit]]
    missing = max(of_all_ranks(len(own))) - len(own)
    return own + [MicroBatch([spare], False)] * missing


def with_actions(samples: Sequence[Experience], *, count: int) -> list[Experience]:
    """At most `count` samples that have an action token, evenly spaced.

    Neighbours are answers to the same prompt, and void episodes have no action.
    """
    usable = [sample for sample in samples if sample.action_mask.any()]
    number = min(count, len(usable))
    return [usable[i * len(usable) // number] for i in range(number)]


def of_all_ranks(own: Value) -> list[Value]:
    """Every rank's value, in the order of ranks, on every rank."""
    ranks: list[Value | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, own)
    return ranks  # type: ignore[return-value]


def _by_tokens(samples: Sequence[Experience], max_tokens: int) -> list[list[Experience]]:
    batches: list[list[Experience]] = []
    room = 0
    for sample in samples:
        length = int(sample.total_length.item())
        if not batches or length > room:
            batches.append([])
            room = max_tokens
        batches[-1].append(sample)
        room -= length
    return batches
