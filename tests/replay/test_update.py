"""Every method makes its update from the same weights, and what is reported of it is true."""

import math
from dataclasses import replace

import pytest
import torch
from made_batches import sampled_batch, tiny_llama
from torch import nn

from openrlhf_alp.alp import PerturbationConfig
from openrlhf_alp.objective.loss import policy_loss
from openrlhf_alp.objective.methods import METHODS
from openrlhf_alp.replay.bench.sigma import start_sigma
from openrlhf_alp.replay.bench.update import Bench, MethodResult, UpdateSettings
from openrlhf_alp.replay.files.records import RecordedBatch
from openrlhf_alp.replay.learner import Learner
from openrlhf_alp.replay.tensors import advantages_of, batch_tensors, micro_batches

SETTINGS = UpdateSettings(learning_rate=1e-3, max_tokens=40)


def learner(sigma0: float = 0.05, batch: RecordedBatch | None = None) -> Learner:
    found = Learner(tiny_llama(), noise=PerturbationConfig(sigma0=None))
    start_sigma(found, (batch or sampled_batch(tiny_llama())).samples, 40, sigma0)
    return found


def plain_log_probs(model: nn.Module, batch: RecordedBatch) -> torch.Tensor:
    """(B, A), one sample at a time, without padding or any of the code under test."""
    longest = max(s.num_tokens for s in batch.samples) - 1
    rows = []
    for sample in batch.samples:
        ids = torch.tensor(sample.token_ids.tolist())
        every = torch.log_softmax(model(ids[None]).logits[0, :-1].float(), -1)
        row = every.gather(-1, ids[1:, None]).squeeze(-1)
        row = torch.where(torch.from_numpy(sample.action_mask[1:]), row, 0.0)
        rows.append(nn.functional.pad(row, (0, longest - row.numel())))
    return torch.stack(rows)


def test_log_probs_do_not_depend_on_micro_batches(recorded: RecordedBatch) -> None:
    model = learner()
    batch = batch_tensors(recorded.samples)
    expected = plain_log_probs(model.model, recorded)
    for max_tokens in (1, 25, 1000):
        found = model.score(micro_batches(recorded.samples, max_tokens), batch.action_mask.shape)
        assert torch.allclose(found, expected, atol=1e-5)


def test_a_learner_at_another_temperature_divides_its_logits(recorded: RecordedBatch) -> None:
    model = learner()
    [first] = micro_batches(recorded.samples[:1], 100)
    model.temperature = 2.0
    sample = recorded.samples[0]
    ids = torch.tensor(sample.token_ids.tolist())
    with torch.no_grad():
        every = torch.log_softmax(model.model(ids[None]).logits[0, :-1] / 2, -1)
        expected = every.gather(-1, ids[1:, None]).squeeze(-1)
        found = model.log_probs(first)[0]
    assert torch.allclose(found[2:], expected[2:], atol=1e-5)
    assert (found[:2] == 0).all()


def test_advantages_are_those_of_the_group_by_hand(recorded: RecordedBatch) -> None:
    """Rewards 0, 1, 0, 1: mean 0.5, standard deviation (with n - 1) 0.57735."""
    found = advantages_of(recorded.samples)
    values = [array[-1] for array in found[:4]]
    assert values == pytest.approx([-0.866025, 0.866025, -0.866025, 0.866025])
    assert (found[0][:3] == 0).all()
    alone = replace(recorded.samples[0], group="alone", reward=1.0)
    assert (advantages_of([alone])[0] == 0).all()


def test_the_gradient_is_that_of_the_loss_through_the_model(recorded: RecordedBatch) -> None:
    """Through log-probs and c_t, in micro-batches, against autograd on the whole batch."""
    methods = ("seq-bypass", "cispo", "icepop", "dppo-kl", "gspo")
    results = {r.method: r for r in Bench(learner(), recorded.samples, SETTINGS).run(methods)}
    batch = batch_tensors(recorded.samples)
    for method in methods:
        model = tiny_llama()
        log_probs = plain_log_probs(model, recorded)
        output = policy_loss(
            log_probs=log_probs,
            rollout_log_probs=batch.rollout_log_probs,
            advantages=batch.advantages,
            action_mask=batch.action_mask,
            config=METHODS[method].objective,
            old_log_probs=log_probs.detach(),
        )
        output.loss.backward()
        norm = torch.sqrt(sum(w.grad.square().sum() for w in model.parameters()))
        assert results[method].loss == pytest.approx(output.loss.item(), abs=1e-6)
        assert results[method].gradient_norm == pytest.approx(norm.item(), rel=1e-3)


def test_the_order_of_methods_does_not_matter(recorded: RecordedBatch) -> None:
    """Each starts from the same weights, and the noise is the same in every pass."""

    def run(*methods: str) -> dict[str, MethodResult]:
        return {r.method: r for r in Bench(learner(), recorded.samples, SETTINGS).run(methods)}

    first, second = run("token-alp", "seq-bypass"), run("seq-bypass", "token-alp")
    for method in first:
        assert first[method].kl_after == second[method].kl_after
        assert first[method].after == second[method].after
    assert first["token-alp"].cosine == pytest.approx(1.0)
    assert first["seq-bypass"].cosine == pytest.approx(second["token-alp"].cosine)


def test_methods_with_the_same_gradient_are_computed_once(recorded: RecordedBatch) -> None:
    """Over the old policy the ratio is 1: nothing is clipped, and grpo and cispo are the same."""
    results = list(Bench(learner(), recorded.samples, SETTINGS).run(["grpo", "cispo", "seq-alp"]))
    assert [r.same_as for r in results] == [None, "grpo", None]
    assert results[1].kl_after == results[0].kl_after
    alone = next(Bench(learner(), recorded.samples, SETTINGS).run(["cispo"]))
    assert alone.kl_after == pytest.approx(results[0].kl_after, rel=1e-5)


def test_noise_is_in_the_numerator_of_perturbed_methods_only(recorded: RecordedBatch) -> None:
    bypass, alp = Bench(learner(0.2), recorded.samples, SETTINGS).run(["token-bypass", "token-alp"])
    assert alp.before["alp/k3_kl"] > 3 * bypass.before["alp/k3_kl"]
    assert bypass.after == bypass.clean_after
    assert alp.after != alp.clean_after
    assert alp.clean_after["alp/k3_kl"] == pytest.approx(alp.kl_after, rel=1e-3)


def test_several_updates_go_further_than_one(recorded: RecordedBatch) -> None:
    one, four = (
        next(Bench(learner(), recorded.samples, replace(SETTINGS, updates=n)).run(["token-bypass"]))
        for n in (1, 4)
    )
    assert four.kl_after > one.kl_after
    # The loss is that of the whole batch at the weights before any update, whatever the parts.
    assert four.loss == one.loss


def test_the_updated_weights_are_those_of_adamw(recorded: RecordedBatch) -> None:
    """Adam's first step moves every weight that has a gradient by the learning rate."""
    model = learner()
    before = {name: w.detach().clone() for name, w in model.weights().items()}
    next(Bench(model, recorded.samples, SETTINGS).run(["token-bypass"]))
    moved = model.weights()["lm_head.weight"] - before["lm_head.weight"]
    assert moved.abs().max().item() == pytest.approx(1e-3, rel=1e-2)


def test_a_batch_that_teaches_nothing_has_no_gradient(recorded: RecordedBatch) -> None:
    flat = [replace(sample, reward=1.0) for sample in recorded.samples]
    result = next(Bench(learner(), flat, SETTINGS).run(["grpo"]))
    assert result.gradient_norm == 0
    assert math.isnan(result.cosine)
    with pytest.raises(ValueError, match="no sample of the batch has an action token"):
        list(Bench(learner(), [replace(s, action_ranges=()) for s in flat], SETTINGS).run(["grpo"]))


def test_sigma0_auto_gives_the_noise_the_kl_of_the_mismatch(recorded: RecordedBatch) -> None:
    found = Learner(tiny_llama(), noise=PerturbationConfig(sigma0=None))
    assert start_sigma(found, recorded.samples, 40, None) > 1e-4
    bypass, alp = Bench(found, recorded.samples, SETTINGS).run(["token-bypass", "token-alp"])
    # The noise comes on top of the mismatch and has about the same KL.
    assert 1.3 < alp.before["alp/k3_kl"] / bypass.before["alp/k3_kl"] < 4
