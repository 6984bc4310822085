"""Where and why learner and engine differ on a batch: classes of tokens, layers, hypotheses."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from openrlhf_alp.replay.bench.sigma import evenly
from openrlhf_alp.replay.explain.classes import ActionTokens, ClassFigures, action_tokens, by_class
from openrlhf_alp.replay.explain.hypotheses import Facts, Hypothesis, judge, score_variants
from openrlhf_alp.replay.explain.layers import LayerRounding, rounding_by_layer
from openrlhf_alp.replay.files.records import RecordedBatch
from openrlhf_alp.replay.learner import Learner, hash_of_template
from openrlhf_alp.replay.pick import digest_of, serving_dtype
from openrlhf_alp.replay.tensors import batch_tensors, micro_batches

MAX_TOKENS = 1024
"""Tokens of a micro-batch, with padding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What was found."""

    classes: list[ClassFigures]
    layers: list[LayerRounding]
    hypotheses: list[Hypothesis]
    num_samples: int
    """Samples of the layers and hypotheses; the classes are of the whole batch."""


def explain(
    learner: Learner,
    batch: RecordedBatch,
    tokenizer: Any,
    load_serving: Callable[[torch.dtype], Learner],
    on_stage: Callable[[str], None] = lambda line: None,
) -> Explanation:
    """Explain one batch.

    Args:
        learner: float32, without noise.
        batch: recorded at the learner's weights, or not, which is one of the hypotheses.
        tokenizer: of the model; None without one, and then no token is a digit or an end.
        load_serving: loads the same weights in a dtype.
        on_stage: called with a line for each part that begins.

    Raises:
        ValueError: the batch has no action token.
    """
    on_stage("log-probs of the whole batch")
    tokens = _tokens(learner, batch, tokenizer)
    chosen = evenly(batch.samples)
    part, batches = batch_tensors(chosen), micro_batches(chosen, MAX_TOKENS)
    dtype = serving_dtype(batch)
    on_stage("hypotheses")
    variants = score_variants(
        learner, batches, part.action_mask.shape, lambda: load_serving(dtype), dtype
    )
    hypotheses = judge(variants, part, _facts(learner, batch, tokenizer, tokens))
    layers = []
    for layer in rounding_by_layer(learner, batches, part, dtype):
        on_stage(f"layer {layer.layer} in {dtype}")
        layers.append(layer)
    return Explanation(
        classes=by_class(tokens), layers=layers, hypotheses=hypotheses, num_samples=len(chosen)
    )


def _tokens(learner: Learner, batch: RecordedBatch, tokenizer: Any) -> ActionTokens:
    tensors = batch_tensors(batch.samples)
    log_probs = learner.score(micro_batches(batch.samples, MAX_TOKENS), tensors.action_mask.shape)
    ends = {int(i) for i in batch.info.contract.get("eos_token_ids", ())}
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    return action_tokens(
        batch.samples,
        log_probs,
        policy_version=batch.info.policy_version,
        decode=(lambda token: "") if tokenizer is None else lambda token: tokenizer.decode([token]),
        end_ids=frozenset(ends),
    )


def _facts(learner: Learner, batch: RecordedBatch, tokenizer: Any, tokens: ActionTokens) -> Facts:
    info = batch.info
    known = tokens.lags[tokens.lags >= 0]
    return Facts(
        temperature=info.temperature,
        top_p=float(info.sampling.get("top_p", 1.0)),
        top_k=int(info.sampling.get("top_k", 0)),
        recorded_digest=info.model_digest,
        model_digest=digest_of(learner, batch),
        recorded_template=str(info.contract.get("chat_template_hash", "")),
        model_template=hash_of_template(tokenizer),
        logprobs_mode=str(info.contract.get("logprobs_mode", "")),
        stale_share=float((known > 0).mean()) if known.size else float("nan"),
    )
