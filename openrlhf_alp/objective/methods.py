"""The table of methods, `--alp.method`: each an objective, a numerator and a source.

Imports no torch, so that a command line can list the methods before anything heavy is loaded.

All methods share what their own paper does not fix: a window of [1 - 0.2, 1 + 0.28] for ratios of
tokens, [1 - 0.5, 1 + 3] for products, [1 - 3e-4, 1 + 4e-4] for geometric means, a dual clip of 10,
and the mean over tokens (over sequences for geometric means). So two rows differ in what their
names say and in nothing else.
"""

from dataclasses import dataclass, replace

from openrlhf_alp.objective.config import Correction, ObjectiveConfig, TrustRegion


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodPreset:
    """One row of `--alp.method`."""

    objective: ObjectiveConfig
    perturbed: bool
    """Whether the numerator's forward pass is perturbed."""
    summary: str
    """What it is, in one line."""
    source: str
    """Where the formula comes from."""
    paper_row: str | None = None
    """Row and table of arXiv 2603.19470 that this is; None if the paper does not have it."""
    choice: str = ""
    """What the source leaves open, and whose choice was taken."""


# The clip windows are those of the authors' scripts. Appendix E has a dual clip of 10 in its
# single-turn details; the authors' multi-turn scripts have 3.
_TOKEN = ObjectiveConfig(level="token", clip_low=0.2, clip_high=0.28, dual_clip=10.0)
_SEQUENCE = ObjectiveConfig(level="sequence", clip_low=0.5, clip_high=3.0, dual_clip=10.0)
# A mean of log-ratios is closer to 0 than a sum by the length: the window of GSPO (arXiv
# 2507.18071, section 5.1). A dual clip of 10 only guards against a broken batch there.
_GEOMETRIC = ObjectiveConfig(
    level="geometric",
    clip_low=3e-4,
    clip_high=4e-4,
    dual_clip=10.0,
    aggregation="seq-mean-token-mean",
)
_UNCLIPPED = replace(_TOKEN, clip="none", clip_low=1.0, clip_high=float("inf"), dual_clip=None)
# The threshold of the authors' scripts; the paper's text has lost the number.
_MIS = Correction(mode="mask", unit="sequence", low=0.0, high=5.0, weight="unit")
# The single ratio carries the mismatch already, so what is kept has the factor 1.
_ALP_MASK = replace(_MIS, weight="none")

_ALP = "arXiv 2603.19470, section 2.2"
_BYPASS = "arXiv 2603.19470, section 2.1; Yao et al. 2025, Liu et al. 2025"

METHODS: dict[str, MethodPreset] = {
    "grpo": MethodPreset(
        objective=replace(_TOKEN, denominator="old"),
        perturbed=False,
        summary="clipped token ratio over the old policy, blind to the engine's mismatch",
        source="arXiv 2402.03300; clip-higher of arXiv 2503.14476",
        paper_row="Table 5, GRPO",
        choice="Eq. 1 averages over each response first; the authors' scripts, and this, over "
        "tokens.",
    ),
    "gspo": MethodPreset(
        objective=replace(_GEOMETRIC, denominator="old"),
        perturbed=False,
        summary="clipped geometric mean of a sequence's ratios over the old policy",
        source="arXiv 2507.18071, section 4.1; window of its section 5.1",
    ),
    "cispo": MethodPreset(
        objective=replace(_TOKEN, denominator="old", clip="cispo", clip_low=1.0, dual_clip=None),
        perturbed=False,
        summary="the clipped token ratio is a detached weight of log pi: no token loses its "
        "gradient",
        source="arXiv 2506.13585 (MiniMax-M1), section 3.1",
        choice="No lower bound, as there. The upper one has no number there; it is that of the "
        "shared window.",
    ),
    "tis": MethodPreset(
        objective=replace(
            _TOKEN,
            denominator="old",
            correction=Correction(mode="truncate", unit="token", low=0.0, high=2.0, weight="unit"),
        ),
        perturbed=False,
        summary="GRPO times min(old / rollout, 2) of each token",
        source="Yao et al. 2025, Your Efficient RL Framework Secretly Brings You Off-Policy RL "
        "Training",
        choice="Token level with a cap of 2, as there; the ALP authors' script truncates the "
        "sequence's product at 5.",
    ),
    "icepop": MethodPreset(
        objective=replace(
            _TOKEN,
            denominator="old",
            correction=Correction(mode="mask", unit="token", low=0.5, high=5.0, weight="unit"),
        ),
        perturbed=False,
        summary="GRPO times old / rollout of each token where that is in [0.5, 5], else 0",
        source="arXiv 2510.18855 (Ring-1T)",
    ),
    "token-mis": MethodPreset(
        objective=replace(_TOKEN, denominator="old", correction=_MIS),
        perturbed=False,
        summary="GRPO times old / rollout of the sequence where that is at most 5, else 0",
        source="arXiv 2603.19470, section 2.1; Liu et al. 2025, When Speed Kills Stability",
        paper_row="Table 5, Token-MIS",
        choice="Threshold and missing lower bound are those of the authors' multi-turn script.",
    ),
    "seq-mis": MethodPreset(
        objective=replace(_SEQUENCE, denominator="old", correction=_MIS),
        perturbed=False,
        summary="clipped product of a sequence's ratios over the old policy, with token-mis's mask",
        source="arXiv 2603.19470, section 2.1; Liu et al. 2025, When Speed Kills Stability",
        paper_row="Table 5, Seq-MIS",
        choice="Threshold and missing lower bound are those of the authors' multi-turn script.",
    ),
    "geo-mis": MethodPreset(
        objective=replace(
            _TOKEN,
            denominator="old",
            correction=Correction(
                mode="mask", unit="geometric", low=0.999, high=1.001, weight="token"
            ),
        ),
        perturbed=False,
        summary="GRPO times old / rollout of each token, in sequences whose geometric mean of it "
        "is in [0.999, 1.001], else 0",
        source="Liu et al. 2025, When Speed Kills Stability",
        choice="Bounds of verl's preset, the weight of OpenRLHF's (is_correction_level seq). Made "
        "for long answers: short ones leave such a band by chance; see "
        "--alp.correction_low_high.",
    ),
    "token-bypass": MethodPreset(
        objective=_TOKEN,
        perturbed=False,
        summary="clipped token ratio over the rollout engine: token-alp without noise",
        source=_BYPASS,
    ),
    "seq-bypass": MethodPreset(
        objective=_SEQUENCE,
        perturbed=False,
        summary="clipped product of ratios over the rollout engine: seq-alp without noise",
        source=_BYPASS,
        paper_row="Table 5, Seq-Bypass",
    ),
    "gspo-bypass": MethodPreset(
        objective=_GEOMETRIC,
        perturbed=False,
        summary="clipped geometric mean of ratios over the rollout engine: gspo-alp without noise",
        source=_BYPASS,
    ),
    "dppo-tv": MethodPreset(
        objective=replace(_UNCLIPPED, trust_region=TrustRegion(divergence="tv", threshold=0.15)),
        perturbed=False,
        summary="token ratio over the rollout engine, without gradient where |p - q| is above 0.15 "
        "and would grow",
        source="arXiv 2602.04879 (DPPO, Binary-TV)",
        choice="The threshold of its authors' scripts. Their code also caps the ratio at 20; here, "
        "as in the formula, only the overflow guard (e^20) bounds it.",
    ),
    "dppo-kl": MethodPreset(
        objective=replace(_UNCLIPPED, trust_region=TrustRegion(divergence="kl", threshold=0.05)),
        perturbed=False,
        summary="dppo-tv with the Bernoulli KL of the sampled token, 0.05 nats",
        source="arXiv 2602.04879 (DPPO, Binary-KL)",
        choice="The threshold of its authors' scripts; the ratio as in dppo-tv.",
    ),
    "trm": MethodPreset(
        objective=replace(
            _TOKEN,
            correction=Correction(mode="mask", unit="max-token", low=0.0, high=0.2, weight="none"),
        ),
        perturbed=False,
        summary="token-bypass without the sequences that hold a token of a k3 KL above 0.2",
        source="arXiv 2512.23075 (Trust Region Masking)",
        choice="Its KL is over the vocabulary; here it is the k3 estimate from the sampled token, "
        "the max criterion of its authors' code. The threshold is ours: a ratio of 1.74 or 0.49.",
    ),
    "token-alp": MethodPreset(
        objective=_TOKEN,
        perturbed=True,
        summary="clipped token ratio of the perturbed learner over the rollout engine",
        source=f"{_ALP}, eq. 2",
        paper_row="Tables 1 and 3, Token-ALP",
    ),
    "seq-alp": MethodPreset(
        objective=_SEQUENCE,
        perturbed=True,
        summary="clipped product of ratios of the perturbed learner over the rollout engine",
        source=f"{_ALP}, eq. 3",
        paper_row="Tables 1, 2 and 3, Seq-ALP",
    ),
    "gspo-alp": MethodPreset(
        objective=_GEOMETRIC,
        perturbed=True,
        summary="seq-alp with GSPO's geometric mean and window",
        source=f"{_ALP}; arXiv 2507.18071",
    ),
    "token-alp-mis": MethodPreset(
        objective=replace(_TOKEN, correction=_ALP_MASK),
        perturbed=True,
        summary="token-alp without the sequences whose ratio is above 5",
        source=f"{_ALP}, eq. 2, with the mask of MIS",
        choice="Ours: the mask looks at the one ratio, perturbed learner over rollout engine.",
    ),
    "seq-alp-mis": MethodPreset(
        objective=replace(_SEQUENCE, correction=_ALP_MASK),
        perturbed=True,
        summary="seq-alp without the sequences whose ratio is above 5",
        source=f"{_ALP}, eq. 3, with the mask of MIS",
        choice="Ours: the mask looks at the one ratio, perturbed learner over rollout engine.",
    ),
}
"""`--alp.method`, in the order of `docs/methods.md`."""

DEFAULT_METHOD = "token-alp"
"""`--alp.method` when only `--alp.enable` is given."""
