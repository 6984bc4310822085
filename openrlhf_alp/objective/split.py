"""Where a log-ratio comes from: noise, updates since the tokens were sampled, and the engine.

    log pi_now,sigma - log mu =   log pi_now,sigma - log pi_now      perturbation
                                + log pi_now       - log pi_start    updates of this step
                                + log pi_start     - log mu          engine, and older pushes

pi_start is the clean learner before the step's first update. At lag 0 it has the weights that
sampled, so the second part is all the staleness and the third the mismatch of learner and engine.
At a larger lag those weights are gone, and the two are reported together.

Letters: B samples, A positions of the action axis, G lags.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from openrlhf_alp.objective.metric_names import LAGS
from openrlhf_alp.objective.ratio import MAX_LOG_RATIO

_SPLIT = ("perturbation", "updates", "engine", "updates_and_engine")
_TOTALS = ("start_k3", "clean_k3", "noisy_k3", "entropy")
NUM_SUMS = 1 + 2 * len(_SPLIT) + len(_TOTALS)


def split_sums(
    *,
    noisy: Tensor,
    clean: Tensor,
    start: Tensor,
    rollout: Tensor,
    entropy: Tensor,
    action_mask: Tensor,
    lags: Sequence[int],
) -> Tensor:
    """Sums over action tokens by lag; those of micro-batches and ranks add up.

    Args:
        noisy: (B, A) log-probs of the learner with the noise of training; `clean` without any.
        clean: (B, A) of the clean learner now.
        start: (B, A) of the clean learner before the step's first update.
        rollout: (B, A) as the engine reported them.
        entropy: (B, A) of the clean learner's distribution now, in nats.
        action_mask: (B, A) bool or 0/1.
        lags: (B,) weight pushes since the sample's oldest token.

    Returns:
        (G, NUM_SUMS) float64: tokens, sums and sums of squares of each part, sums of the totals.
    """
    mask = action_mask.bool()
    parts = [noisy - clean, clean - start, start - rollout, clean - rollout]
    wide = [torch.where(mask, part.double(), 0.0) for part in parts]
    totals = [_k3(wide[2]), _k3(wide[3]), _k3(wide[0] + wide[3])]
    totals.append(torch.where(mask, entropy.double(), 0.0))
    columns = [mask.double(), *wide, *(part.square() for part in wide), *totals]
    per_sample = torch.stack(columns, dim=-1).sum(1)
    bins = torch.tensor([min(lag, len(LAGS) - 1) for lag in lags], device=mask.device)
    sums = torch.zeros(len(LAGS), NUM_SUMS, dtype=torch.float64, device=mask.device)
    return sums.index_add(0, bins, per_sample)


def split_figures(sums: Tensor) -> dict[str, float]:
    """The metrics `alp/lag_*`, `alp/clean_*`, `alp/noisy_k3_kl` and `alp/entropy` of METRICS.

    Args:
        sums: from `split_sums`, added up. A lag without a token has no metric.
    """
    table = sums.detach().cpu()
    total = table.sum(0)
    if not total[0]:
        return {}
    start, clean, noisy, entropy = (total[-len(_TOTALS) :] / total[0]).tolist()
    metrics = {
        "alp/clean_start_k3_kl": start,
        "alp/clean_k3_kl": clean,
        "alp/noisy_k3_kl": noisy,
        "alp/entropy": entropy,
    }
    for lag, row in zip(LAGS, table, strict=True):
        if row[0]:
            metrics |= _lag_figures(lag, row, share=(row[0] / total[0]).item())
    return metrics


def _lag_figures(lag: str, row: Tensor, *, share: float) -> dict[str, float]:
    means = row[1 : 1 + len(_SPLIT)] / row[0]
    roots = (row[1 + len(_SPLIT) : 1 + 2 * len(_SPLIT)] / row[0]).sqrt()
    names = {"perturbation": 0, "staleness": 1, "mismatch": 2}
    if lag != LAGS[0]:
        names = {"perturbation": 0, "staleness_and_mismatch": 3}
    metrics = {f"alp/lag_{lag}_share": share}
    for name, column in names.items():
        metrics[f"alp/lag_{lag}_{name}_mean"] = means[column].item()
        metrics[f"alp/lag_{lag}_{name}_rms"] = roots[column].item()
    return metrics


def _k3(log_ratio: Tensor) -> Tensor:
    guarded = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(guarded) - guarded
