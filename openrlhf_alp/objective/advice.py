"""What a step's metrics say to the person who trains: what is wrong, why, and what to set.

Pure functions of the metrics by name (metric_names.py), for a running step, a metrics file or a
replayed batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass

Metrics = Mapping[str, float]

CHANGED_SHARE = 0.1
"""Below this share of changed entries rounding swallows a layer's noise."""
BOUND_SHARE = 0.1
CLIPPED_SHARE = 0.9
TAIL = 2.0
"""|log-ratio| of the outer 1 % of tokens; that of equal weights in bfloat16 is about 0.2."""
VARIANCE_SHARE = 0.75
MIN_LAYERS = 3
"""With fewer perturbed layers, one of them has most of the noise by choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """A warning that is given once."""

    name: str
    """Of the condition, the same at every step that meets it."""
    text: str
    """What happened, with the figure, what it means, and what to set."""


def advice(metrics: Metrics, *, perturbed: bool, num_layers: int = 0) -> list[Advice]:
    """Everything that the metrics of a step warn of, in the order of what to look at first.

    Args:
        metrics: `alp/*` of one step; what was not computed is not judged.
        perturbed: whether the method adds noise.
        num_layers: perturbed layers.
    """
    found = [_no_advantage(metrics), _clipped(metrics)]
    if perturbed:
        found += [_rounded(metrics), _at_bound(metrics)]
        if num_layers >= MIN_LAYERS:
            found.append(_one_layer(metrics))
    else:
        found.append(_tail(metrics))
    return [one for one in found if one is not None]


def _no_advantage(metrics: Metrics) -> Advice | None:
    tokens = metrics.get("alp/num_tokens", 0.0)
    signed = ("alp/advantage_positive_tokens", "alp/advantage_negative_tokens")
    if not tokens or any(metrics.get(name, 1.0) for name in signed):
        return None
    return Advice(
        name="no_advantage",
        text=f"all advantages of this step's {tokens:.0f} action tokens are 0, so nothing is "
        "learned: every group's answers got the same reward. The tasks are too easy or too hard "
        "for the model, or the reward cannot tell answers apart. Look at rollout/reward_mean and "
        "the labels, mix in other tasks, or raise --rollout.n_samples_per_prompt",
    )


def _clipped(metrics: Metrics) -> Advice | None:
    names = ("clip_low", "clip_high", "dual_clip", "mask", "guard")
    found, total = 0.0, 0.0
    for sign in ("positive", "negative"):
        tokens = metrics.get(f"alp/advantage_{sign}_tokens", 0.0)
        shares = (metrics.get(f"alp/{name}_share_{sign}", 0.0) for name in names)
        # One token may meet several, so the largest is a safe lower bound of what is cut.
        found += tokens * max(shares)
        total += tokens
    if not total or found / total < CLIPPED_SHARE:
        return None
    return Advice(
        name="clipped",
        text=f"clips, masks and guard cut at least {found / total:.0%} of the action tokens that "
        "have an advantage, so almost nothing is learned from. The ratios are outside the window: "
        "the learner disagrees with the rollout engine (openrlhf-alp preflight), the samples are "
        "too old (--rollout.max_staleness), the noise is too strong (--alp.sigma0 auto) or the "
        "window is of another level (--alp.clip_low_high)",
    )


def _rounded(metrics: Metrics) -> Advice | None:
    share = metrics.get("alp/layer_changed_share_min")
    if share is None or share >= CHANGED_SHARE:
        return None
    return Advice(
        name="rounded",
        text=f"in one perturbed layer or more the noise changes only {share:.1%} of the entries of "
        "the hidden states: it is below their rounding, so it has neither effect nor gradient "
        "there. Raise --alp.sigma0, use --alp.sigma_scale relative, so that sigma grows with the "
        "layers, or leave these layers out with --alp.layers",
    )


def _at_bound(metrics: Metrics) -> Advice | None:
    share = metrics.get("alp/sigma_bound_share", 0.0)
    if share < BOUND_SHARE:
        return None
    return Advice(
        name="at_bound",
        text=f"{share:.0%} of the sigmas are at --alp.sigma_min or --alp.sigma_max and cannot "
        "adapt further. Compare alp/sigma_min and alp/sigma_max with the bounds and move the one "
        "that is met, or lower --alp.lr if sigma drifted there within a few steps",
    )


def _one_layer(metrics: Metrics) -> Advice | None:
    share = metrics.get("alp/layer_variance_share_max", 0.0)
    if share < VARIANCE_SHARE:
        return None
    layer = metrics.get("alp/layer_variance_share_argmax", 0.0)
    return Advice(
        name="one_layer",
        text=f"layer {layer:.0f} makes {share:.0%} of what the noise of all layers does to the "
        "loss: this is noise on one layer and hardly any on the others. Use --alp.sigma_scale "
        "relative, so that each layer's sigma fits its hidden states, or --alp.layers to choose",
    )


def _tail(metrics: Metrics) -> Advice | None:
    low, high = (metrics.get(f"alp/log_ratio_{p}", 0.0) for p in ("p01", "p99"))
    worst = low if -low > high else high
    if abs(worst) < TAIL:
        return None
    return Advice(
        name="tail",
        text=f"the log-ratio of one token in a hundred is beyond {worst:.1f} and training has no "
        "noise: the tail that makes Bypass unstable (arXiv 2603.19470, Figure 1). Use an *-alp "
        "method, which keeps it short, or a masking one such as token-mis; if the tail was there "
        "from the first step, compare learner and engine with openrlhf-alp preflight",
    )
