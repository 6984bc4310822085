"""A preset with what a user changes of it. Imports no torch."""

from dataclasses import replace
from typing import Literal

from openrlhf_alp.objective.config import MAX_GEOMETRIC_WINDOW, ObjectiveConfig, RatioLevel

SequenceRatio = Literal["product", "geometric"]


def adapted(
    objective: ObjectiveConfig,
    *,
    method: str,
    clip_low_high: tuple[float, float] | None = None,
    dual_clip: float | None = None,
    sequence_ratio: SequenceRatio | None = None,
    correction_low_high: tuple[float, float] | None = None,
    trust_region: float | None = None,
) -> ObjectiveConfig:
    """`objective` with every argument that is not None in place of its own value.

    Args:
        objective: of the preset.
        method: its name, for messages.
        clip_low_high, dual_clip, sequence_ratio, correction_low_high, trust_region: the flags
            `--alp.<name>`.

    Raises:
        ValueError: a value is out of range or has no effect on the method; names the flag.
    """
    correction, region = objective.correction, objective.trust_region
    _refuse_without_effect(
        method,
        {
            "clip_low_high": (clip_low_high, objective.clip != "none", "clip window"),
            "dual_clip": (dual_clip, objective.clip == "ppo", "clipped surrogate"),
            "correction_low_high": (correction_low_high, correction is not None, "correction"),
            "trust_region": (trust_region, region is not None, "trust region"),
        },
    )
    level = _level(objective.level, sequence_ratio, method)
    low, high = clip_low_high or (objective.clip_low, objective.clip_high)
    if level == "geometric" and max(low, high) > MAX_GEOMETRIC_WINDOW:
        raise ValueError(
            f"the clip window {low} {high} of --alp.clip_low_high or --alp.method is that of a "
            "product of ratios, which a geometric mean never leaves: nothing would be clipped. "
            "Use --alp.method gspo-alp or gspo-bypass, or set --alp.clip_low_high 3e-4 4e-4"
        )
    if correction is not None and correction_low_high is not None:
        correction = replace(correction, low=correction_low_high[0], high=correction_low_high[1])
    if region is not None and trust_region is not None:
        region = replace(region, threshold=trust_region)
    return replace(
        objective,
        level=level,
        clip_low=low,
        clip_high=high,
        dual_clip=objective.dual_clip if dual_clip is None else dual_clip,
        correction=correction,
        trust_region=region,
        aggregation="seq-mean-token-mean" if level == "geometric" else objective.aggregation,
    )


def _level(level: RatioLevel, joined: SequenceRatio | None, method: str) -> RatioLevel:
    if joined and level == "token":
        raise ValueError(
            f"--alp.sequence_ratio {joined} has no effect on --alp.method {method}, whose ratios "
            "are of single tokens. Drop it, or use a method seq-* or gspo-*"
        )
    if joined == "product" and level == "geometric":
        raise ValueError(
            f"--alp.sequence_ratio product contradicts --alp.method {method}, which takes the "
            "geometric mean. Drop it, or use --alp.method seq-alp or seq-bypass"
        )
    return "geometric" if joined == "geometric" else level


def _refuse_without_effect(method: str, flags: dict[str, tuple[object, bool, str]]) -> None:
    """`flags`: by name the value (None if not given), whether it has an effect, what is lacking."""
    for name, (value, has_effect, lacks) in flags.items():
        if value is not None and not has_effect:
            raise ValueError(
                f"--alp.{name} has no effect on --alp.method {method}: it has no {lacks}. Drop it, "
                "or use another method (docs/methods.md)"
            )
