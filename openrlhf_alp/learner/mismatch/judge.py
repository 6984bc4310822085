"""Limits above which a mismatch of learner and rollout log-probs is suspicious or broken, and why.

At equal weights the log-ratio of a sampled token, learner over rollout, is the difference of their
numerics. When they disagree on weights, tokenizer or temperature it is larger by an order of
magnitude. `measure.py` computes the figures. No torch here: `--help` shows the limits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """What a mismatch means for a run."""

    OK = "ok"
    SUSPICIOUS = "suspicious"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """Absolute values from which a figure is suspicious or broken."""

    figure: str
    suspicious: float
    broken: float


# Measured with SmolLM2 in bfloat16 against vLLM on a CPU, k3 KL and 1 % quantile: the same weights
# 0.002 and -0.19; tokens served at temperature 0.9 and scored at 1 0.02 and -0.31, at 0.7 0.13 and
# -0.78; the service 16 steps of training behind 0.16 and -3.7.
LIMITS = (
    Limit(figure="k3_kl", suspicious=0.01, broken=0.1),
    Limit(figure="mean", suspicious=0.02, broken=0.2),
    Limit(figure="p01", suspicious=0.5, broken=2.0),
    Limit(figure="p99", suspicious=0.5, broken=2.0),
)

LEVELS = tuple(Level)
"""From good to bad."""

CAUSES = {
    Level.OK: (),
    Level.SUSPICIOUS: (
        "one side computes in lower precision: --quantization, an fp8 KV cache, float16",
        "a mixture of experts routes tokens differently on the two sides",
        "other attention kernels, long answers in bfloat16; compare --ds.attn_implementation",
        "a temperature or penalty that only one side applies",
    ),
    Level.BROKEN: (
        "the service holds other weights: another folder, or a push of another run",
        "log-probs of another distribution: temperature, top-p, penalties, or not processed",
        "another tokenizer or position encoding (rope scaling) on one side",
        "NaN or overflow in half precision: look at the last update's gradient norm",
    ),
}
"""Usual causes, the most likely first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Level of a mismatch, and the figures that led to it."""

    level: Level
    findings: tuple[str, ...]
    """One sentence for each figure beyond a limit, the worst first."""

    @property
    def causes(self) -> tuple[str, ...]:
        return CAUSES[self.level]


def judge(figures: Mapping[str, float]) -> Verdict:
    """Compare each figure of LIMITS with its limits; the worst one decides."""
    found: dict[Level, list[str]] = {Level.BROKEN: [], Level.SUSPICIOUS: []}
    for limit in LIMITS:
        value = figures[limit.figure]
        for level, bound in ((Level.BROKEN, limit.broken), (Level.SUSPICIOUS, limit.suspicious)):
            if not abs(value) < bound:  # written this way so that NaN is broken
                found[level].append(f"|{limit.figure}| is {abs(value):.2g}, the limit {bound:g}")
                break
    level = next((level for level, findings in found.items() if findings), Level.OK)
    return Verdict(level=level, findings=(*found[Level.BROKEN], *found[Level.SUSPICIOUS]))
