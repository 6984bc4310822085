"""What a batch or a step reports about its importance ratios; `metric_names.py` says what it means.

    micro-batches --add--> RatioTelemetry --maxima--> all ranks: maximum --+
                                          --sums(maxima)-> rank 0: sum ----+-> figures -> metrics

Everything is a sum or a maximum of fixed size (0.5 MB), so that ranks reduce it: no token leaves
its rank, and memory does not grow with the step.

Letters: B samples, A positions of the action axis, N action tokens, P bins of the rollout
probability.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from openrlhf_alp.objective.metric_names import (
    ENVELOPE_EDGES,
    ENVELOPE_QUANTILES,
    LEVELS,
    NUM_ENVELOPE_BINS,
    QUANTILES,
    SIGNS,
)
from openrlhf_alp.objective.ratio import MAX_LOG_RATIO
from openrlhf_alp.objective.sketch import NUM_BINS, bins_of, quantiles

_NUM_LEVELS = len(LEVELS)
# Rows of counts: one for each bin of the rollout probability, then product and geometric mean.
_NUM_ROWS = NUM_ENVELOPE_BINS + 2
_MOMENTS = ("number", "log_ratio", "k3", "weight", "weight_squared")


def level_log_ratios(log_ratio: Tensor, action_mask: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Log-ratios of a micro-batch at the three levels, each with a mask of what counts.

    Args:
        log_ratio: (B, A) of single tokens.
        action_mask: (B, A) bool or 0/1.

    Returns:
        `token`: (B, A) twice; `product` and `geometric`: (B,) twice. float64, 0.0 where masked; a
        sample without an action does not count.
    """
    mask = action_mask.bool()
    tokens = torch.where(mask, log_ratio.detach().double(), 0.0)
    product, has_action = tokens.sum(-1), mask.any(-1)
    return {
        "token": (tokens, mask),
        "product": (product, has_action),
        "geometric": (product / mask.sum(-1).clamp(min=1), has_action),
    }


class RatioTelemetry:
    """Collects the log-ratios of all micro-batches of a step, on their own device.

    Nothing is read back before the end of the step, so that no forward pass waits for it.
    """

    def __init__(self) -> None:
        self._counts = torch.zeros(_NUM_ROWS * NUM_BINS, dtype=torch.float64)
        self._moments = torch.zeros(_NUM_LEVELS, len(_MOMENTS), dtype=torch.float64)
        # Largest and largest negative log-ratio, and log of the summed weights and their squares.
        self._extremes = torch.full((_NUM_LEVELS, 2), -torch.inf, dtype=torch.float64)
        self._log_sums = torch.full((_NUM_LEVELS, 2), -torch.inf, dtype=torch.float64)

    def add(self, log_ratio: Tensor, action_mask: Tensor, rollout_log_probs: Tensor) -> None:
        """Add a micro-batch.

        Args:
            log_ratio: (B, A) of single tokens, learner over rollout, before any guard.
            action_mask: (B, A) bool or 0/1.
            rollout_log_probs: (B, A); they place a token in the envelope.
        """
        self._move_to(log_ratio.device)
        levels = level_log_ratios(log_ratio, action_mask)
        for row, (values, mask) in enumerate(levels.values()):
            self._moments[row] += _moments(values, mask)
            selected = torch.where(mask, values, -torch.inf).flatten()
            opposite = torch.where(mask, -values, -torch.inf).flatten()
            extremes = torch.stack([selected.max(), opposite.max()])
            self._extremes[row] = torch.maximum(self._extremes[row], extremes)
            log_sums = torch.stack([selected, 2 * selected]).logsumexp(-1)
            self._log_sums[row] = torch.logaddexp(self._log_sums[row], log_sums)
        edges = torch.tensor(ENVELOPE_EDGES[1:-1], device=log_ratio.device, dtype=torch.float64)
        probabilities = rollout_log_probs.detach().double().exp()
        rows = (
            torch.bucketize(probabilities, edges, right=True),
            torch.full_like(levels["product"][1], NUM_ENVELOPE_BINS, dtype=torch.long),
            torch.full_like(levels["product"][1], NUM_ENVELOPE_BINS + 1, dtype=torch.long),
        )
        for row_of, (values, mask) in zip(rows, levels.values(), strict=True):
            places = row_of * NUM_BINS + bins_of(values)
            # Masked ones add 0: selecting the others would make the device wait for their number.
            self._counts.index_add_(0, places.flatten(), mask.double().flatten())

    def maxima(self) -> Tensor:
        """(6,) float64, -inf without a token: to be maximised over ranks, on every rank."""
        return self._extremes.flatten().clone()

    def sums(self, maxima: Tensor) -> Tensor:
        """What adds up over ranks, float64; for `figures`.

        Args:
            maxima: of all ranks. They scale the weights of the effective sample size, so that a
                summed log-ratio of 3,000 overflows on no rank.
        """
        shift = maxima.view(_NUM_LEVELS, 2)[:, :1].to(self._log_sums.device)
        powers = torch.tensor([1.0, 2.0], dtype=torch.float64, device=self._log_sums.device)
        weights = torch.where(
            self._log_sums.isfinite(), (self._log_sums - shift * powers).exp(), 0.0
        )
        return torch.cat([self._moments.flatten(), weights.flatten(), self._counts])

    def summary(self) -> dict[str, float]:
        """The metrics of what this process added; several ranks reduce and call `figures`."""
        maxima = self.maxima()
        return figures(maxima, self.sums(maxima))

    def _move_to(self, device: torch.device) -> None:
        for name in ("_counts", "_moments", "_extremes", "_log_sums"):
            setattr(self, name, getattr(self, name).to(device))


def figures(maxima: Tensor, sums: Tensor) -> dict[str, float]:
    """The ratio and envelope metrics of METRICS, of reduced `maxima` and `sums`.

    The same keys in the same order for any input; a step without an action token reads 0.0.
    """
    parts = (
        sums.detach()
        .cpu()
        .split([_NUM_LEVELS * len(_MOMENTS), _NUM_LEVELS * 2, _NUM_ROWS * NUM_BINS])
    )
    moments, weights = parts[0].view(_NUM_LEVELS, -1), parts[1].view(_NUM_LEVELS, 2)
    rows = parts[2].view(_NUM_ROWS, NUM_BINS)
    extremes = maxima.detach().cpu().view(_NUM_LEVELS, 2)
    envelope = rows[:NUM_ENVELOPE_BINS]
    counts = (envelope.sum(0), rows[-2], rows[-1])
    metrics: dict[str, float] = {}
    for level, (prefix, _) in enumerate(LEVELS.values()):
        found = quantiles(counts[level], tuple(QUANTILES.values()))
        metrics |= {f"alp/{prefix}log_ratio_{q}": v for q, v in zip(QUANTILES, found, strict=True)}
        metrics |= _level_figures(prefix, moments[level], weights[level], extremes[level])
    metrics["alp/num_tokens"] = moments[0, 0].item()
    return metrics | _envelope_figures(envelope)


def ratio_figures(
    log_ratio: Tensor, action_mask: Tensor, rollout_log_probs: Tensor
) -> dict[str, float]:
    """`RatioTelemetry.summary` of one batch; arguments as for `RatioTelemetry.add`."""
    telemetry = RatioTelemetry()
    telemetry.add(log_ratio, action_mask, rollout_log_probs)
    return telemetry.summary()


def cut_counts(cuts: Mapping[str, Tensor], advantages: Tensor, action_mask: Tensor) -> Tensor:
    """Tokens that each cut touched, by the sign of their advantage; counts of batches add up.

    Args:
        cuts: name to (B, A) bool, true where the clip, mask or guard of that name cut a token.
        advantages: (B, A).
        action_mask: (B, A) bool or 0/1.

    Returns:
        (2, 1 + len(cuts)) float64: for positive and for negative advantages the number of action
        tokens, then of those cut. A token whose advantage is 0 has no gradient and is in neither.
    """
    mask = action_mask.bool()
    signs = torch.stack([mask & (advantages > 0), mask & (advantages < 0)])
    touched = torch.stack([torch.ones_like(mask), *(cut.bool() for cut in cuts.values())])
    return (signs[:, None] & touched[None]).flatten(2).sum(-1).double()


def cut_shares(names: Sequence[str], counts: Tensor) -> dict[str, float]:
    """`alp/<name>_share_positive` and `_negative` of what `cut_counts` gave, summed or not.

    Args:
        names: of the cuts, in their order.
        counts: (2, 1 + len(names)).
    """
    shares = counts / counts[:, :1].clamp(min=1)
    return {
        f"alp/{name}_share_{sign}": shares[row, column].item()
        for row, sign in enumerate(SIGNS)
        for column, name in enumerate(names, start=1)
    } | {f"alp/advantage_{sign}_tokens": counts[row, 0].item() for row, sign in enumerate(SIGNS)}


def _moments(values: Tensor, mask: Tensor) -> Tensor:
    """(5,) the sums of _MOMENTS; the loss's guard keeps one absurd token from making them inf."""
    guarded = torch.where(mask, values.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), 0.0)
    weight = torch.where(mask, guarded.exp(), 0.0)
    terms = (mask.double(), values, torch.expm1(guarded) - guarded, weight, weight.square())
    return torch.stack([term.sum() for term in terms])


def _level_figures(
    prefix: str, moments: Tensor, weights: Tensor, extremes: Tensor
) -> dict[str, float]:
    number, log_ratio, k3, weight, squared = moments.tolist()
    count = max(number, 1.0)
    share = (weights[0].square() / (count * weights[1])).item() if number else 0.0
    return {
        f"alp/{prefix}log_ratio_mean": log_ratio / count,
        f"alp/{prefix}log_ratio_min": -extremes[1].item() if number else 0.0,
        f"alp/{prefix}log_ratio_max": extremes[0].item() if number else 0.0,
        f"alp/{prefix}k3_kl": k3 / count,
        f"alp/{prefix}chi2": (squared - 2 * weight + number) / count,
        f"alp/{prefix or 'token_'}ess": share,
    }


def _envelope_figures(counts: Tensor) -> dict[str, float]:
    """Of counts (P, NUM_BINS). A bin without a token reads 0.0 and has share 0."""
    total = max(counts.sum().item(), 1.0)
    probabilities = [QUANTILES[name] for name in ENVELOPE_QUANTILES]
    metrics = {}
    for index, row in enumerate(counts):
        metrics[f"alp/envelope_{index}_share"] = row.sum().item() / total
        for name, value in zip(ENVELOPE_QUANTILES, quantiles(row, probabilities), strict=True):
            metrics[f"alp/envelope_{index}_{name}"] = value
    return metrics
