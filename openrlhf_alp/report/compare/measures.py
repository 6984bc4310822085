"""One number per run, for the table of methods x conditions."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

from openrlhf_alp.report.compare.runs import AFTER, Run
from openrlhf_alp.report.metrics import EDGE_STEPS, REWARD

KL = ("alp/clean_k3_kl", "alp/k3_kl")
"""The same quantity for all methods first; an older run has the second only."""
TAIL_HIGH, TAIL_LOW = "alp/log_ratio_p99_9", "alp/log_ratio_p00_1"
_SPIKE = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """What one tab of the table shows."""

    key: str
    title: str
    meaning: str
    of: Callable[[Run], float | None]
    """None where the run has no such number."""

    better: int = 0
    """1 when more is better, -1 when less is, 0 when neither is."""

    digits: int = 3


def final_reward(run: Run) -> float | None:
    """Mean reward of the last EDGE_STEPS steps."""
    rewards = list(run.values(REWARD).values())
    return fmean(rewards[-EDGE_STEPS:]) if len(rewards) >= EDGE_STEPS else None


def collapsed(run: Run) -> float | None:
    """1.0 if the final reward is below half of the best EDGE_STEPS steps in a row, else 0.0."""
    rewards, final = list(run.values(REWARD).values()), final_reward(run)
    if final is None:
        return None
    windows = [rewards[i : i + EDGE_STEPS] for i in range(len(rewards) - EDGE_STEPS + 1)]
    return float(final < max(fmean(window) for window in windows) / 2)


def worst_tail(run: Run) -> float | None:
    """The largest |log-ratio| at the 0.1 % and 99.9 % quantiles over the steps."""
    values = [*run.values(TAIL_HIGH).values(), *run.values(TAIL_LOW).values()]
    return max(map(abs, values), default=None)


def kl_spikes(run: Run) -> float | None:
    """Steps whose k3 KL is more than 5 times the run's median."""
    values = list(run.values("alp/k3_kl").values())
    if not values:
        return None
    limit = _SPIKE * statistics.median(values)
    return float(sum(value > limit for value in values))


def _extreme(of: Callable[..., float], *names: str) -> Callable[[Run], float | None]:
    return lambda run: of(found) if (found := list(run.values(*names).values())) else None


def _evaluated(run: Run) -> float | None:
    suites = run.evaluations.get(AFTER, {}).get("suites", [])
    averages = [suite["avg"]["value"] for suite in suites]
    return fmean(averages) if averages else None


def _last(*names: str) -> Callable[[Run], float | None]:
    return lambda run: (
        fmean(list(found.values())[-EDGE_STEPS:]) if (found := run.values(*names)) else None
    )


MEASURES = (
    Measure(
        key="reward",
        title="Final reward",
        meaning=f"Mean reward of the last {EDGE_STEPS} steps.",
        of=final_reward,
        better=1,
    ),
    Measure(
        key="tail",
        title="Worst tail",
        meaning="Largest |log-ratio| of a token at the 0.1 % and 99.9 % quantiles, over all steps. "
        "A ratio of e is 1.",
        of=worst_tail,
        better=-1,
    ),
    Measure(
        key="kl",
        title="Peak KL",
        meaning="Largest k3 KL(rollout || learner without noise) after an update, nats per token.",
        of=_extreme(max, *KL),
        better=-1,
        digits=4,
    ),
    Measure(
        key="spikes",
        title="KL spikes",
        meaning=f"Steps whose k3 KL is more than {_SPIKE:g} times the run's median.",
        of=kl_spikes,
        better=-1,
        digits=2,
    ),
    Measure(
        key="collapsed",
        title="Collapsed",
        meaning="Share of runs whose final reward is below half of their best.",
        of=collapsed,
        better=-1,
        digits=2,
    ),
    Measure(
        key="ess",
        title="Smallest ESS",
        meaning="Smallest effective sample size of the token ratios over their number.",
        of=_extreme(min, "alp/token_ess"),
        better=1,
    ),
    Measure(
        key="entropy",
        title="Entropy",
        meaning=f"Entropy of the learner without noise, last {EDGE_STEPS} measured steps, nats.",
        of=_last("alp/entropy"),
    ),
    Measure(
        key="clip",
        title="Clipped",
        meaning="Mean share of action tokens whose gradient the clip window cut.",
        of=_extreme(fmean, "alp/clip_fraction"),
    ),
    Measure(
        key="gradient",
        title="Largest gradient",
        meaning="Largest gradient norm of the weights, before it is cut.",
        of=_extreme(max, "alp/weight_grad_norm", "actor_grad_norm"),
        better=-1,
    ),
    Measure(
        key="time",
        title="Step time",
        meaning="Median seconds of a step.",
        of=_extreme(statistics.median, "timing/step_total"),
        better=-1,
        digits=1,
    ),
    Measure(
        key="evaluation",
        title="Evaluation",
        meaning="avg@n after training, mean over the problem sets.",
        of=_evaluated,
        better=1,
    ),
)
"""Tabs of the table, in their order; one that no run has is left out."""


def finite(value: float | None) -> float | None:
    """None for what cannot be averaged."""
    return value if value is not None and math.isfinite(value) else None
