"""A few sequences of a step through the clean learner, before and after its updates.

ALP's training forward is noisy and Bypass's is not, so only the clean learner can be compared: the
KL of the paper's Figure 3. The same forwards say where a log-ratio comes from (objective/split.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from openrlhf.trainer.ppo_utils.experience import Experience
from torch import Tensor

from openrlhf_alp.learner.experience import STALENESS
from openrlhf_alp.learner.mismatch.forwards import MicroBatch
from openrlhf_alp.learner.telemetry.over_ranks import sum_on_rank_0
from openrlhf_alp.objective.metric_names import LAGS
from openrlhf_alp.objective.split import NUM_SUMS, split_figures, split_sums

MAX_SEQUENCES = 8
STEP_SHARE = 16


def num_sequences(num_samples: int) -> int:
    """How many of a rank's samples are measured: a sixteenth of them, at most 8, at least one.

    Two clean forwards and one noisy one, every 10 steps, cost below 1 % of a step's three.
    """
    return max(1, min(MAX_SEQUENCES, num_samples // STEP_SHARE))


class CleanProbe:
    """Made before a step's first update; `metrics` after its last one. Collective.

    Args:
        forwards: what to measure on, the same number on each rank.
        batch: makes one batch of a micro-batch's samples, with `rollout_log_probs`.
        clean: forward without noise: (B, A) log-probs and entropy.
        noisy: forward as in training, (B, A) log-probs; None when training has no noise.
    """

    def __init__(
        self,
        forwards: Sequence[MicroBatch],
        *,
        batch: Callable[[list[Experience]], Experience],
        clean: Callable[[Experience], tuple[Tensor, Tensor]],
        noisy: Callable[[Experience], Tensor] | None,
    ) -> None:
        self._forwards = forwards
        self._batch = batch
        self._clean = clean
        self._noisy = noisy
        self._start = [clean(batch(samples))[0] for samples, _ in forwards]

    def metrics(self) -> dict[str, float]:
        """`MEASURED` of all ranks on rank 0; empty on the others, or without an action token."""
        sums = torch.zeros(len(LAGS), NUM_SUMS, dtype=torch.float64)
        for (samples, counts), start in zip(self._forwards, self._start, strict=True):
            batch = self._batch(samples)
            clean, entropy = self._clean(batch)
            noisy = clean if self._noisy is None else self._noisy(batch)
            if counts:
                sums += split_sums(
                    noisy=noisy,
                    clean=clean,
                    start=start,
                    rollout=batch.rollout_log_probs,
                    entropy=entropy,
                    action_mask=batch.action_mask,
                    lags=_lags(batch),
                ).cpu()
        total = sum_on_rank_0(sums)
        return {} if total is None else split_figures(total)


def _lags(batch: Experience) -> list[int]:
    """Staleness of each sample; 0 where upstream's own engines sampled, which know no version."""
    if STALENESS not in batch.info:
        return [0] * len(batch.sequences)
    return [int(lag) for lag in batch.info[STALENESS]]
