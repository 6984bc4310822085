"""The preflight's figures again in mid-training, on the step's own samples before its update.

At that moment the weights of the learner and of the service are the same, as they are in
`openrlhf-alp preflight`; samples of an older version are left out.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from openrlhf.trainer.ppo_utils.experience import Experience, make_experience_batch

from openrlhf_alp.learner.mismatch import Mismatch, log_ratio, metrics_of
from openrlhf_alp.learner.staleness import STALENESS
from openrlhf_alp.report.verdict import Level, judge

if TYPE_CHECKING:
    from openrlhf_alp.learner.actor import AlpActorPPOTrainer

logger = logging.getLogger(__name__)

NUM_FORWARDS = 4
"""Clean forwards of one micro-batch each, on every rank the same number: a forward is collective
under ZeRO-3. A few hundred tokens place the quantiles; the cost is that of a fraction of a step."""


def recheck(trainer: AlpActorPPOTrainer) -> dict[str, float]:
    """`preflight/*` of this step, the same numbers on every rank; none when no sample is fresh.

    Raises:
        RuntimeError: the mismatch is broken and `--rollout.preflight_stop` is set.
    """
    ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, _log_ratios(trainer))
    values = np.concatenate(ranks)
    if not values.size:
        logger.warning("preflight: no sample of the version that is updated; nothing was measured")
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
    if verdict.level is Level.BROKEN and trainer.args.rollout_service.preflight_stop:
        raise RuntimeError(f"{summary} (--rollout.preflight_stop)")
    return metrics_of(mismatch, verdict)


def _log_ratios(trainer: AlpActorPPOTrainer) -> np.ndarray:
    """(N,) of this rank's first samples that are not older than the weights."""
    items = trainer.replay_buffer.items
    size = trainer.micro_train_batch_size
    parts: list[np.ndarray] = [np.zeros(0, dtype=np.float32)]
    for start in range(0, NUM_FORWARDS * size, size):
        rows = items[start : start + size]
        # A rank that has run out of samples takes part all the same, and counts none twice.
        batch = make_experience_batch(rows or items[:size], trainer.args.ds.packing_samples)
        ratios = log_ratio(trainer.actor, batch.to_device(torch.cuda.current_device()))
        lengths = [int(row.action_mask.sum()) for row in rows]
        by_sample = np.split(ratios, np.cumsum(lengths))
        parts += [part for part, row in zip(by_sample, rows, strict=False) if _is_fresh(row)]
    return np.concatenate(parts)


def _is_fresh(sample: Experience) -> bool:
    return float(sample.info.get(STALENESS, 0.0)) == 0.0
