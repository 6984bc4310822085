"""Why learner and engine may differ: each cause with a test where one is possible, and its switch.

Every test scores the same samples with one thing changed. The KL is that of learner over rollout;
a change that makes it much smaller is a likely cause.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openrlhf_alp.objective.ratio import k3_kl
from openrlhf_alp.replay.learner import Learner
from openrlhf_alp.replay.tensors import BatchTensors, MicroBatch

TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.5)
"""At which the learner is scored, besides the recorded one."""

LIKELY = 0.5
"""A change that leaves less than this share of the KL explains most of it."""

ROUNDING_KL = 0.005
"""k3 KL up to which two engines of one model differ by rounding alone; half of what `preflight`
calls suspicious."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hypothesis:
    """One possible cause."""

    name: str
    figure: str
    """What was measured, with its value."""
    verdict: str
    """`likely`, `unlikely`, `ok` or `not tested`."""
    switch: str
    """What to set, and where."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known without a forward pass."""

    temperature: float
    top_p: float
    top_k: int
    recorded_digest: str
    model_digest: str
    recorded_template: str
    """Hash of the chat template of the service; empty when unknown."""
    model_template: str
    logprobs_mode: str
    """Of the service's contract; empty when unknown."""
    stale_share: float
    """Action tokens that an older version sampled; NaN when unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variants:
    """The same tokens scored by learners with one thing changed; log-probs (B, A)."""

    base: Tensor
    """Float32, as `replay` scores."""
    serving: Tensor
    """All of the model in the serving dtype."""
    serving_exact_head: Tensor
    """The same with the head in float32."""
    other_attention: Tensor | None
    """Float32 with another attention kernel; None when the model has one only."""
    by_temperature: dict[float, Tensor]


def score_variants(
    learner: Learner,
    batches: Sequence[MicroBatch],
    shape: torch.Size,
    serving: Callable[[], Learner],
    dtype: torch.dtype,
) -> Variants:
    """Score the samples in every way.

    Args:
        learner: float32.
        batches: of the samples.
        shape: (B, A) of them.
        serving: loads the learner in the serving dtype; called once, and the model is dropped.
        dtype: that dtype.
    """
    rounded = serving()
    in_serving = rounded.score(batches, shape)
    with_exact_head = _with_float_head(rounded, batches, shape)
    del rounded
    temperature = learner.temperature
    try:
        by_temperature = {}
        for value in TEMPERATURES:
            learner.temperature = value
            by_temperature[value] = learner.score(batches, shape)
    finally:
        learner.temperature = temperature
    return Variants(
        base=learner.score(batches, shape),
        serving=in_serving,
        serving_exact_head=with_exact_head,
        other_attention=_with_other_attention(learner, batches, shape),
        by_temperature=by_temperature,
    )


def judge(variants: Variants, batch: BatchTensors, facts: Facts) -> list[Hypothesis]:
    """Every hypothesis with its figure and verdict."""

    def kl(log_probs: Tensor) -> float:
        return k3_kl(log_probs, batch.rollout_log_probs, batch.action_mask)

    base = kl(variants.base)
    return [
        _weights(facts, base),
        _staleness(facts),
        _temperature(variants, facts, kl, base),
        _processed(variants, facts, kl, base),
        _template(facts),
        _changed(
            "serving dtype of the learner",
            kl(variants.serving),
            base,
            switch="--ds.param_dtype as the service's --dtype, or float32 on both sides",
        ),
        _changed(
            "lm_head in float32",
            kl(variants.serving_exact_head),
            kl(variants.serving),
            switch="keep lm_head in float32 on both sides; here against the learner all in serving "
            "dtype",
        ),
        _attention(variants, kl, base),
        Hypothesis(
            name="prefix cache",
            figure="a recorded batch does not show it",
            verdict="not tested",
            switch="start the service without prefix caching (vLLM: --no-enable-prefix-caching) "
            "and repeat `openrlhf-alp preflight --explain`",
        ),
    ]


def _changed(name: str, changed: float, base: float, *, switch: str) -> Hypothesis:
    """Verdict of a change that leaves a KL of `changed` of `base`."""
    return Hypothesis(
        name=name,
        figure=f"k3 KL {changed:.2e} with it, {base:.2e} without",
        verdict=_verdict(changed, base),
        switch=switch,
    )


def _verdict(changed: float, base: float) -> str:
    return "likely" if changed < LIKELY * base else "unlikely"


def _weights(facts: Facts, base: float) -> Hypothesis:
    switch = "--model with the weights that sampled; preflight --push"
    if not facts.recorded_digest:
        verdict = "likely" if base > ROUNDING_KL else "unlikely"
        figure = f"the file has no digest; k3 KL {base:.2e}"
    else:
        same = facts.recorded_digest == facts.model_digest
        verdict = "ok" if same else "likely"
        figure = "the digests are equal" if same else "the model's digest is not the recorded one"
    return Hypothesis(name="other weights", figure=figure, verdict=verdict, switch=switch)


def _staleness(facts: Facts) -> Hypothesis:
    share = facts.stale_share
    known = share == share
    return Hypothesis(
        name="stale weights",
        figure=f"{share:.1%} of the tokens are older than the weights" if known else "unknown",
        verdict=("likely" if share > 0 else "ok") if known else "not tested",
        switch="--rollout.max_staleness 0, or a synchronous run",
    )


def _temperature(
    variants: Variants, facts: Facts, kl: Callable[[Tensor], float], base: float
) -> Hypothesis:
    found = {value: kl(log_probs) for value, log_probs in variants.by_temperature.items()}
    best = min(found, key=found.__getitem__)
    verdict = _verdict(found[best], base) if best != facts.temperature else "ok"
    return Hypothesis(
        name="temperature",
        figure=f"recorded {facts.temperature:g}; smallest k3 KL {found[best]:.2e} at {best:g}",
        verdict=verdict,
        switch="--rollout.temperature as the service samples with",
    )


def _processed(
    variants: Variants, facts: Facts, kl: Callable[[Tensor], float], base: float
) -> Hypothesis:
    """Raw log-probs are those of temperature 1 without top-p and top-k."""
    switch = "the engine's processed log-probs, --rollout.top_p 1, no top-k"
    cut = facts.top_p < 1 or facts.top_k > 0
    raw = kl(variants.by_temperature[1.0])
    figure = f"top_p {facts.top_p:g}, top_k {facts.top_k}, mode {facts.logprobs_mode or 'unknown'}"
    if facts.temperature != 1:
        figure += f"; k3 KL {raw:.2e} against raw log-probs, {base:.2e} against processed"
    likely = cut or (facts.temperature != 1 and _verdict(raw, base) == "likely")
    wrong_mode = facts.logprobs_mode not in ("", "processed_logprobs")
    return Hypothesis(
        name="processed log-probs",
        figure=figure,
        verdict="likely" if likely or wrong_mode else "ok",
        switch=switch,
    )


def _template(facts: Facts) -> Hypothesis:
    known = bool(facts.recorded_template and facts.model_template)
    same = facts.recorded_template == facts.model_template
    return Hypothesis(
        name="chat template",
        figure=("the hashes are equal" if same else "the hashes differ") if known else "unknown",
        verdict=("ok" if same else "likely") if known else "not tested",
        switch="serve the model folder that is trained; ids are sent, so it matters to people and "
        "rewards first",
    )


def _attention(variants: Variants, kl: Callable[[Tensor], float], base: float) -> Hypothesis:
    switch = "--ds.attn_implementation"
    if variants.other_attention is None:
        return Hypothesis(
            name="attention kernel", figure="there is one only", verdict="not tested", switch=switch
        )
    return _changed("attention kernel", kl(variants.other_attention), base, switch=switch)


def _with_float_head(rounded: Learner, batches: Sequence[MicroBatch], shape: torch.Size) -> Tensor:
    """The head computes in float32 from the rounded hidden states, with the rounded weights."""
    head = rounded.model.get_output_embeddings()
    weight = head.weight.detach().float()
    bias = None if getattr(head, "bias", None) is None else head.bias.detach().float()

    def exact(_: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return torch.nn.functional.linear(args[0].float(), weight, bias)

    handle = head.register_forward_hook(exact)
    try:
        return rounded.score(batches, shape)
    finally:
        handle.remove()


def _with_other_attention(
    learner: Learner, batches: Sequence[MicroBatch], shape: torch.Size
) -> Tensor | None:
    config = learner.model.config
    before = getattr(config, "_attn_implementation", None)
    other = {"sdpa": "eager", "eager": "sdpa"}.get(str(before))
    if other is None:
        return None
    try:
        learner.model.set_attn_implementation(other)
        return learner.score(batches, shape)
    except (ValueError, ImportError, NotImplementedError):
        return None
    finally:
        learner.model.set_attn_implementation(before)
