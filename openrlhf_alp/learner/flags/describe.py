"""What `--dry_run` prints: the settings that follow from the flags, and where they come from."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

from openrlhf_alp.learner.flags.config import AlpConfig
from openrlhf_alp.objective.config import ObjectiveConfig
from openrlhf_alp.objective.methods import METHODS

_WIDTH = 15


def describe(args: SimpleNamespace) -> str:
    """Lines of the update that the settled `args` would make."""
    alp: AlpConfig = args.alp
    if not alp.enable:
        return (
            "OpenRLHF's own policy loss and forward pass: neither --alp.method nor --alp.enable is "
            "given."
        )
    lines = [*_method(alp), *_objective(alp.objective()), *_rest(args)]
    return "\n".join(f"{name:<{_WIDTH}}{text}" for name, text in lines)


def _method(alp: AlpConfig) -> Iterator[tuple[str, str]]:
    preset = alp.preset
    yield "method", f"{alp.method}: {preset.summary}"
    yield "source", preset.source
    yield "paper", preset.paper_row or "no row of the tables of arXiv 2603.19470"
    if preset.choice:
        yield "choice", preset.choice


def _objective(objective: ObjectiveConfig) -> Iterator[tuple[str, str]]:
    old = "old policy: one clean forward pass before the step's first update"
    yield "denominator", old if objective.needs_old_policy else "rollout engine; no old policy"
    yield "level", objective.level
    yield "clip", clip_text(objective)
    correction, region = objective.correction, objective.trust_region
    if correction:
        corrected = "old policy" if objective.needs_old_policy else "learner"
        weight = {"unit": "its ratio", "token": "its token's ratio", "none": "1"}[correction.weight]
        statistic = "largest k3 KL of a token" if correction.unit == "max-token" else "ratio"
        yield (
            "correction",
            f"{correction.mode} by {correction.unit}: {statistic} of {corrected} over rollout "
            f"engine in [{correction.low:g}, {correction.high:g}], factor {weight}",
        )
    else:
        yield "correction", "none"
    yield (
        "trust region",
        f"{region.divergence} of the sampled token at most {region.threshold:g}"
        if region
        else "none",
    )


def clip_text(objective: ObjectiveConfig) -> str:
    """The clip of an objective in words."""
    if objective.clip == "none":
        return "none"
    window = f"[{1 - objective.clip_low:g}, {1 + objective.clip_high:g}]"
    if objective.clip == "cispo":
        return f"the ratio is a detached weight in {window}"
    return f"ratio in {window}, dual clip {objective.dual_clip or 'none'}"


def _rest(args: SimpleNamespace) -> Iterator[tuple[str, str]]:
    alp: AlpConfig = args.alp
    yield "aggregation", f"{args.actor.loss_agg_mode} (--actor.loss_agg_mode)"
    yield "numerator", _numerator(alp)
    yield "comparable", _comparable(args)


def _numerator(alp: AlpConfig) -> str:
    if not alp.perturbed:
        return "clean learner; --alp.sigma*, --alp.layers, --alp.draws and --alp.lr have no effect"
    noise = alp.noise
    sigma0 = "auto" if noise.sigma0 is None else f"{noise.sigma0:g}"
    return (
        f"perturbed learner: sigma0 {sigma0} ({noise.sigma_scale}), one sigma per "
        f"{'dimension and layer' if noise.kind == 'vector' else 'layer'}, layers {noise.layers}, "
        f"{_draws(noise.draws)}, learning rate {alp.lr:g}, seed {noise.seed}"
    )


def _draws(draws: int) -> str:
    if draws == 1:
        return "1 draw"
    return f"{draws} draws in one forward pass of {draws} times the samples and memory"


def _comparable(args: SimpleNamespace) -> str:
    """Which methods share clip and aggregation with this run, or what was changed."""
    alp: AlpConfig = args.alp
    preset, ours = alp.preset.objective, alp.objective()
    changed = [
        flag
        for flag, differs in (
            ("--alp.clip_low_high", _window(ours) != _window(preset)),
            ("--alp.dual_clip", ours.dual_clip != preset.dual_clip),
            ("--alp.sequence_ratio", ours.level != preset.level),
            ("--actor.loss_agg_mode", args.actor.loss_agg_mode != preset.aggregation),
        )
        if differs
    ]
    if changed:
        return (
            f"{' and '.join(changed)} differ from the table's, which --alp.method gives to all "
            "methods of a level: give the same to the runs you compare with"
        )
    alike = [
        name
        for name, other in METHODS.items()
        if name != alp.method and _shared(other.objective) == _shared(preset)
    ]
    if not alike:
        return "no other method has this clip; aggregation is that of all methods of its level"
    return f"window, dual clip and aggregation are those of {', '.join(alike)}"


def _window(objective: ObjectiveConfig) -> tuple[float, float]:
    return objective.clip_low, objective.clip_high


def _shared(objective: ObjectiveConfig) -> tuple[object, ...]:
    return (*_window(objective), objective.dual_clip, objective.aggregation, objective.clip)
