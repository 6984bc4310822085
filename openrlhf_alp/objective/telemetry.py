"""What a step reports about its importance ratios, and the table of metric names."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from openrlhf_alp.objective.ratio import MAX_LOG_RATIO

METRICS: dict[str, str] = {
    "alp/log_ratio_p01": "1 % quantile of the tokens' log-ratio, perturbed learner over rollout",
    "alp/log_ratio_p25": "25 % quantile of the tokens' log-ratio",
    "alp/log_ratio_p50": "median of the tokens' log-ratio",
    "alp/log_ratio_p75": "75 % quantile of the tokens' log-ratio",
    "alp/log_ratio_p99": "99 % quantile of the tokens' log-ratio, the tail that ALP keeps short",
    "alp/log_ratio_mean": "mean of the tokens' log-ratio, the negative k1 KL",
    "alp/log_ratio_max": "largest log-ratio of a token",
    "alp/sequence_log_ratio_mean": "mean over samples of the summed log-ratio",
    "alp/sequence_log_ratio_max": "largest summed log-ratio of a sample",
    "alp/token_ess": "effective sample size of the token ratios over their number, in (0, 1]",
    "alp/sequence_ess": "effective sample size of the sequence ratios over their number",
    "alp/k3_kl": "k3 estimate of KL(rollout || perturbed learner), nats per token",
    "alp/num_tokens": "action tokens of the step; 0 makes all ratios above read 0.0",
    "alp/clip_fraction": "action tokens whose gradient the clip window cut",
    "alp/clip_low_fraction": "of these, cut at 1 - clip_low",
    "alp/clip_high_fraction": "of these, cut at 1 + clip_high",
    "alp/dual_clip_fraction": "action tokens cut by the dual clip",
    "alp/guard_fraction": "action tokens whose log-ratio hit the overflow guard",
    "alp/approx_kl": "mean of rollout minus new log-prob (k1)",
    "alp/sigma_mean": "mean sigma over perturbed layers and dimensions, in the unit of sigma0",
    "alp/sigma_min": "smallest sigma",
    "alp/sigma_max": "largest sigma",
    "alp/sigma_bound_share": "fraction of sigmas on --alp.sigma_min or --alp.sigma_max",
    "alp/sigma_grad_snr": "signal-to-noise of the gradient of log sigma over the step's "
    "micro-batches: 1 is pure noise, 0 says that fewer than 2 were there",
    "alp/layer_sigma_over_scale_min": "smallest over layers of sigma / median |h| now",
    "alp/layer_sigma_over_scale_max": "largest of it",
    "alp/layer_changed_share_min": "smallest over layers of the share of entries of h that the "
    "noise changed after rounding to the model's dtype",
    "alp/layer_changed_share_max": "largest of it",
    **{
        f"alp/layer_{place}_{figure}": f"{place} perturbed layer: {meaning}"
        for place in ("first", "middle", "last")
        for figure, meaning in (
            ("scale", "median |h| of its input in the step's first micro-batch"),
            ("sigma_over_scale", "its median sigma over that"),
            ("changed_share", "share of entries that the noise changed after rounding"),
        )
    },
    "alp/sigma0": "sigma where delta is 0: --alp.sigma0 or its calibration",
    "alp/mismatch_k3_kl": "at the start: k3 KL of the clean learner against the rollout engine",
    "alp/noise_k3_kl": "at the start: k3 KL against the clean learner that sigma0 adds to rounding",
    "alp/rounding_k3_kl": "at the start: k3 KL of noise that only changes roundings; 0 if not auto",
    "alp/clean_outside_share": "at the start: action tokens outside the clip window without noise",
    "alp/noisy_outside_share": "at the start: the same with the noise of sigma0",
}
"""Every metric of ALP. The first block comes from `RatioTelemetry.summary`, the second from
`LossOutput`, the third from `LayerwisePerturbation` and its layers, the last from the start of a
run, which every step repeats."""

_Statistic = Callable[[np.ndarray], Any]
_QUANTILES: dict[str, _Statistic] = {
    f"p{percent:02d}": partial(np.quantile, q=percent / 100) for percent in (1, 25, 50, 75, 99)
}


class RatioTelemetry:
    """Collects the log-ratios of all micro-batches of a step.

    A step's quantiles are not the means of its micro-batches' quantiles, so the values are kept (4
    bytes per action token) and, with several ranks, gathered: `arrays()` on each rank, `merge()` on
    one.
    """

    def __init__(self) -> None:
        self._tokens: list[np.ndarray] = []
        self._sequences: list[np.ndarray] = []

    def add(self, log_ratio: Tensor, action_mask: Tensor) -> None:
        """Add a micro-batch: log_ratio (B, A) of single tokens, action_mask (B, A)."""
        mask = action_mask.bool()
        masked = log_ratio.detach().float() * mask
        self._tokens.append(masked[mask].cpu().numpy())
        self._sequences.append(masked.sum(dim=-1)[mask.any(dim=-1)].cpu().numpy())

    def arrays(self) -> dict[str, np.ndarray]:
        """All values so far: `tokens` (N,) and `sequences` (S,), float32."""
        return {"tokens": _concatenate(self._tokens), "sequences": _concatenate(self._sequences)}

    def merge(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Add what `arrays()` returned on another rank."""
        self._tokens.append(arrays["tokens"])
        self._sequences.append(arrays["sequences"])

    def summary(self) -> dict[str, float]:
        """The ratio metrics of METRICS. The same keys in the same order for any input."""
        arrays = self.arrays()
        tokens: np.ndarray = arrays["tokens"].astype(np.float64)
        sequences: np.ndarray = arrays["sequences"].astype(np.float64)
        return {
            **{f"alp/log_ratio_{name}": _reduce(q, tokens) for name, q in _QUANTILES.items()},
            "alp/log_ratio_mean": _reduce(np.mean, tokens),
            "alp/log_ratio_max": _reduce(np.max, tokens),
            "alp/sequence_log_ratio_mean": _reduce(np.mean, sequences),
            "alp/sequence_log_ratio_max": _reduce(np.max, sequences),
            "alp/token_ess": _reduce(_effective_share, tokens),
            "alp/sequence_ess": _reduce(_effective_share, sequences),
            "alp/k3_kl": _reduce(_k3_kl, tokens),
            "alp/num_tokens": float(tokens.size),
        }


def _concatenate(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=np.float32), *parts])


def _reduce(statistic: _Statistic, values: np.ndarray) -> float:
    # A step of void episodes has no token; its metrics must have the same names all the same.
    return float(statistic(values)) if values.size else 0.0


def _k3_kl(log_ratio: np.ndarray) -> float:
    """mean(exp(d) - 1 - d); the loss's guard keeps one absurd token from making it infinite."""
    guarded = log_ratio.clip(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return float(np.mean(np.expm1(guarded) - guarded))


def _effective_share(log_weights: np.ndarray) -> float:
    """(sum w)**2 / (n * sum w**2), w = exp(log_weights), shifted so that no weight overflows."""
    weights = np.exp(log_weights - log_weights.max())
    return weights.sum() ** 2 / (weights.size * np.square(weights).sum())
