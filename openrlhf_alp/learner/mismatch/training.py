"""The preflight check of a training run, repeated at every N-th step.

It runs before a step's update, when learner and service hold the same weights as they do in
`openrlhf-alp preflight`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
from openrlhf.trainer.ppo_utils.experience import Experience

from openrlhf_alp.learner.mismatch.forwards import MicroBatch, of_all_ranks
from openrlhf_alp.learner.mismatch.judge import Level, judge
from openrlhf_alp.learner.mismatch.measure import Mismatch, metrics_of

logger = logging.getLogger(__name__)

NUM_FORWARDS = 4
"""Clean forwards of one micro-batch each in a check. A few hundred tokens place the quantiles; the
cost is a fraction of a step."""


def log_ratios(
    forwards: Sequence[MicroBatch], measure: Callable[[list[Experience]], np.ndarray]
) -> np.ndarray:
    """(N,) float32 log-ratios of the forwards that count.

    Args:
        forwards: from `micro_batches`.
        measure: micro-batch -> (num_actions,) log-ratios.
    """
    measured = [(measure(samples), counts) for samples, counts in forwards]
    kept = [ratios for ratios, counts in measured if counts]
    return np.concatenate([np.zeros(0, dtype=np.float32), *kept])


def recheck(own_log_ratios: np.ndarray, *, stop: bool) -> dict[str, float]:
    """Judge the log-ratios of all ranks. Collective.

    Returns:
        `preflight/*`, the same numbers on every rank; empty when there was no sample.

    Raises:
        RuntimeError: the mismatch is broken and `stop` is set.
    """
    values = np.concatenate(of_all_ranks(own_log_ratios))
    if not values.size:
        logger.warning("preflight: nothing was measured, every group asked for was dropped")
        return {}
    mismatch = Mismatch.of(values)
    verdict = judge(mismatch.figures())
    summary = (
        f"preflight: {verdict.level}, k3 KL {mismatch.k3_kl:.2e} over {mismatch.num_tokens} tokens"
    )
    if verdict.level is Level.OK:
        logger.info(summary)
    else:
        summary = "; ".join((summary, *verdict.findings, "usual causes", *verdict.causes))
        logger.warning(summary)
    if verdict.level is Level.BROKEN and stop:
        raise RuntimeError(f"{summary} (--rollout.preflight_stop)")
    return metrics_of(mismatch, verdict)
