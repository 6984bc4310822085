"""How much of a batch all ranks can train on together.

The ranks meet in a collective call forevery micro-batch. A rank with fewer of them would leave the
others waiting forever, and a dropped group or the end of the data makes a batch that does not
divide. So a batch is cut to what divides before any rank sees it, and the rest is counted.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Sample = TypeVar("Sample")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchFit:
    """What of a batch is trained on."""

    num_samples: int
    """Whole groups, the same number of micro-batches on every rank; 0 when too few samples came."""

    rollout_micro_batch_size: int
    """Samples of one forward before the update; at most `--rollout.micro_batch_size`."""

    train_batch_size: int
    """Samples of an optimizer step under dynamic batching; at most `--train.batch_size`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchShape:
    """The numbers that decide what divides."""

    num_ranks: int
    """Data-parallel ranks of the policy; ranks that share a sequence count as one."""

    group_size: int
    """`--rollout.n_samples_per_prompt`."""

    rollout_micro_batch_size: int
    train_micro_batch_size: int
    train_batch_size: int

    dynamic: bool
    """`--train.dynamic_batch_enable`: micro-batches are cut by tokens, equally many on each rank of
    an optimizer step."""

    @classmethod
    def of(cls, args: Any) -> BatchShape:
        """The shape that settled args ask for."""
        num_processes = args.actor.num_nodes * args.actor.num_gpus_per_node
        copies = args.ds.ring_attn_size * args.ds.tensor_parallel_size
        return cls(
            num_ranks=max(1, num_processes // copies),
            group_size=args.rollout.n_samples_per_prompt,
            rollout_micro_batch_size=args.rollout.micro_batch_size,
            train_micro_batch_size=args.train.micro_batch_size,
            train_batch_size=args.train.batch_size,
            dynamic=args.train.dynamic_batch_enable,
        )

    def fit(self, num_samples: int) -> BatchFit:
        """What of `num_samples` is trained on.

        The rest is less than a micro-batch per rank, or under dynamic batching less than a sample
        per rank and optimizer step, and what whole groups ask for beyond that.
        """
        if self.dynamic:
            num_kept, num_steps = self._dynamic_fit(num_samples)
            per_rank, batch_size = num_kept // self.num_ranks, num_kept // num_steps
        else:
            unit = math.lcm(self.group_size, self.num_ranks * self.train_micro_batch_size)
            num_kept = num_samples - num_samples % unit
            per_rank, batch_size = num_kept // self.num_ranks, self.train_batch_size
        sizes = range(self.rollout_micro_batch_size, 0, -1)
        return BatchFit(
            num_samples=num_kept,
            # OpenRLHF deals out forwards, not samples, so their size must divide a rank's share.
            rollout_micro_batch_size=next(size for size in sizes if per_rank % size == 0),
            train_batch_size=batch_size,
        )

    def dynamic_batch_size(self, samples_per_rank: int) -> int:
        """`BatchFit.train_batch_size` of a batch that was cut, as a rank sees it."""
        return self.fit(samples_per_rank * self.num_ranks).train_batch_size

    def _dynamic_fit(self, num_samples: int) -> tuple[int, int]:
        """Samples kept and optimizer steps; the steps take equally many samples of each rank."""
        most = math.ceil(num_samples / self.train_batch_size)
        fits = [(0, 1)]
        for num_steps in range(1, most + 1):
            kept = num_samples - num_samples % math.lcm(self.group_size, self.num_ranks * num_steps)
            # Exactly as many steps as the kept samples need: a rank, which knows only those, then
            # comes to the same number.
            if math.ceil(kept / self.train_batch_size) == num_steps:
                fits.append((kept, num_steps))
        return max(fits, key=lambda fit: (fit[0], -fit[1]))


def fitting_part(samples: Sequence[Sample], fit: BatchFit, *, group_size: int, seed: int) -> list:
    """The samples that are trained on, whole groups in their order.

    Which groups are left out is drawn: the last to arrive are those with the longest answers.
    """
    num_groups, num_kept = len(samples) // group_size, fit.num_samples // group_size
    kept = sorted(random.Random(seed).sample(range(num_groups), num_kept))
    return [s for group in kept for s in samples[group * group_size : (group + 1) * group_size]]
