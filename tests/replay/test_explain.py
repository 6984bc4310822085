"""Where and why learner and engine differ, on batches whose cause is known."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from made_batches import sample, sampled_batch, tiny_llama

from openrlhf_alp.replay.explain.classes import (
    AFTER_TOOL,
    DIGIT,
    FIRST,
    ClassFigures,
    action_tokens,
    by_class,
)
from openrlhf_alp.replay.explain.explain import Explanation, explain
from openrlhf_alp.replay.files.records import RecordedBatch
from openrlhf_alp.replay.learner import Learner


def explained(batch: RecordedBatch, *, seed: int = 0, temperature: float = 1.0) -> Explanation:
    def load(dtype: torch.dtype) -> Learner:
        return Learner(tiny_llama(seed).to(dtype), temperature=temperature)

    return explain(load(torch.float32), batch, None, load)


def verdicts(explanation: Explanation) -> dict[str, str]:
    return {hypothesis.name: hypothesis.verdict for hypothesis in explanation.hypotheses}


def test_every_token_is_in_one_class_of_each_view_by_hand() -> None:
    """Log-ratios 0, 0, -1 at positions 0, 1 and 3 of the answer; k3 is exp(d) - 1 - d."""
    one = sample()
    log_probs = torch.tensor([[0.0, -0.5, -1.25, 0.0, -3.0]])
    tokens = action_tokens(
        [one], log_probs, policy_version=4, decode=lambda token: str(token), end_ids=frozenset()
    )
    assert tokens.log_ratio.tolist() == [0.0, 0.0, -1.0]
    assert tokens.positions.tolist() == [0, 1, 3]
    assert tokens.kinds.tolist() == [FIRST, DIGIT, AFTER_TOOL]
    assert tokens.lags.tolist() == [1, 1, 0]
    rows = {(row.view, row.name): row for row in by_class(tokens)}
    after = rows["token class", AFTER_TOOL]
    assert after.k3_kl == pytest.approx(math.exp(-1))
    assert after.share == pytest.approx(1.0)
    assert rows["version lag", "1 pushes"].num_tokens == 2
    for view in {view for view, _ in rows}:
        inside: list[ClassFigures] = [row for row in rows.values() if row.view == view]
        assert sum(row.num_tokens for row in inside) == 3
        assert sum(row.share for row in inside) == pytest.approx(1.0)


def test_an_engine_in_bfloat16_is_explained_by_its_dtype(recorded: RecordedBatch) -> None:
    found = explained(recorded)
    assert verdicts(found)["serving dtype of the learner"] == "likely"
    assert verdicts(found)["temperature"] == "ok"
    assert [layer.layer for layer in found.layers] == ["0", "1", "2", "final norm", "lm_head"]
    assert all(0 < layer.k3_kl < 1 for layer in found.layers)
    # bfloat16 keeps 8 bits: what rounding changes is of the order of 2**-9 of what it rounds.
    assert all(1e-4 < layer.relative_error < 0.05 for layer in found.layers)


def test_a_float32_layer_does_not_differ_from_itself(recorded: RecordedBatch) -> None:
    batch = RecordedBatch(
        info=recorded.info.model_copy(update={"contract": {"dtype": "float32"}}),
        samples=recorded.samples,
    )
    assert all(layer.relative_error == 0 and layer.k3_kl == 0 for layer in explained(batch).layers)


def test_another_temperature_is_found() -> None:
    """The engine sampled at 0.7 and the file says 1."""
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.div_(0.7)
    found = explained(sampled_batch(model, num_samples=16, dtype=torch.float32))
    assert verdicts(found)["temperature"] == "likely"
    [cause] = [h for h in found.hypotheses if h.name == "temperature"]
    assert "at 0.7" in cause.figure


def test_other_weights_are_named_by_their_digest(recorded: RecordedBatch) -> None:
    digest = Learner(tiny_llama()).digests()[torch.bfloat16]
    info = recorded.info.model_copy(update={"model_digest": digest})
    same = RecordedBatch(info=info, samples=recorded.samples)
    assert verdicts(explained(same))["other weights"] == "ok"
    assert verdicts(explained(same, seed=1))["other weights"] == "likely"


def test_stale_tokens_are_counted_by_their_versions(recorded: RecordedBatch) -> None:
    info = recorded.info.model_copy(update={"policy_version": 3})
    found = explained(RecordedBatch(info=info, samples=recorded.samples))
    assert verdicts(found)["stale weights"] == "likely"
    assert ("version lag", "2 pushes") in {(row.view, row.name) for row in found.classes}


def test_a_batch_without_actions_is_refused(recorded: RecordedBatch) -> None:
    void = tuple(replace(s, action_ranges=()) for s in recorded.samples)
    with pytest.raises(ValueError, match="nothing to explain"):
        explained(RecordedBatch(info=recorded.info, samples=void))


def test_a_learner_leaves_no_hook_behind(recorded: RecordedBatch) -> None:
    model = tiny_llama()
    learner = Learner(model)
    explain(learner, recorded, None, lambda dtype: Learner(tiny_llama().to(dtype)))
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks
    assert model.config._attn_implementation == tiny_llama().config._attn_implementation
    assert np.isfinite(learner.temperature)
