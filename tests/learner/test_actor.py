"""The policy update through OpenRLHF's own actor and DeepSpeed, on one CPU rank."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

Parse = Callable[..., SimpleNamespace]
pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore")]

SIGMA = ("--alp.sigma0", "0.01")
UP = "model.layers.0.mlp.up_proj.weight"


def build_actor(args: SimpleNamespace, actor_class: Any = None) -> Any:
    from openrlhf.utils import get_strategy

    from openrlhf_alp.learner import seams
    from openrlhf_alp.learner.actor import AlpPolicyModelActor

    actor = (actor_class or AlpPolicyModelActor)(1, 0, None, None)
    with seams.installed():
        strategy = get_strategy(args)
    actor.init_model_from_pretrained(strategy, args.actor.model_name_or_path, 10, None)
    return actor


def rollouts(actor: Any, *, num_samples: int = 4, mismatch: float = 0.02, seed: int = 0) -> Any:
    """Random sequences whose rollout log-probs are the learner's own, moved by `mismatch`."""
    from openrlhf.trainer.ppo_utils.experience import Experience

    from openrlhf_alp.learner.experience import SAMPLE_ID

    generator = torch.Generator().manual_seed(seed)
    length = 12
    sequences = torch.randint(2, 250, (num_samples, length), generator=generator)
    attention_mask = torch.ones_like(sequences)
    attention_mask[0, -3:] = 0
    sequences[0, -3:] = 0
    action_mask = attention_mask[:, 1:].clone()
    action_mask[:, :4] = 0
    clean = actor.forward(sequences, action_mask, attention_mask)
    noise = mismatch * torch.randn(clean.shape, generator=generator)
    rewards = torch.tensor([1.0, 0.0] * (num_samples // 2))
    return Experience(
        sequences=sequences,
        attention_mask=attention_mask,
        action_mask=action_mask,
        action_log_probs=(clean + noise) * action_mask,
        rollout_log_probs=(clean + noise) * action_mask,
        advantages=(2 * rewards - 1).unsqueeze(-1) * action_mask,
        rewards=rewards,
        response_length=action_mask.sum(-1),
        truncated=torch.zeros(num_samples, dtype=torch.bool),
        total_length=attention_mask.sum(-1),
        info={"reward": rewards, SAMPLE_ID: torch.arange(num_samples)},
    )


def update(actor: Any, **kwargs: Any) -> dict[str, float]:
    actor.append(rollouts(actor, **kwargs))
    return actor.fit()


def weights(actor: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in actor.actor.model.module.named_parameters()}


def test_a_learning_rate_of_0_computes_no_gradient_for_sigma(parse: Parse) -> None:
    actor = build_actor(parse("--alp.enable", *SIGMA, "--alp.lr", "0"))
    before = weights(actor)
    status = update(actor)
    after = weights(actor)
    assert len(actor.actor_optim.param_groups) == 2
    assert not actor.trainer.perturbation.delta["0"].requires_grad
    assert torch.equal(before["alp.delta.0"], after["alp.delta.0"])
    assert not torch.equal(before[UP], after[UP])
    assert status["alp/sigma_grad_snr"] == 0.0
    assert status["alp/layer_last_changed_share"] > 0


def test_sigma_has_its_own_group_with_its_own_rate_and_no_decay(parse: Parse) -> None:
    args = parse("--alp.enable", *SIGMA, "--alp.lr", "0.5", "--actor.adam.weight_decay", "0.1")
    actor = build_actor(args)
    groups = actor.actor_optim.param_groups
    assert [group["lr"] for group in groups] == [1e-3, 1e-3, 0.5]
    assert groups[-1]["weight_decay"] == 0.0
    assert actor.trainer.perturbation is not None


def test_an_update_moves_theta_and_sigma_and_reports_the_ratio(parse: Parse) -> None:
    actor = build_actor(parse("--alp.enable", *SIGMA, "--alp.method", "seq-alp"))
    before = weights(actor)
    status = update(actor)
    after = weights(actor)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"alp.delta.0", "alp.delta.1", UP} <= moved
    assert status["alp/num_tokens"] == 4 * 7 - 3
    assert status["alp/log_ratio_p01"] < 0 < status["alp/log_ratio_p99"]
    assert 0.009 < status["alp/sigma_mean"] < 0.011
    assert "alp/sample_id" not in status


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("aggregate", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("method", ["seq-alp", "token-alp"])
def test_an_update_on_void_episodes_only_changes_nothing(
    parse: Parse, monkeypatch: pytest.MonkeyPatch, method: str, aggregate: str, dynamic: bool
) -> None:
    """Nothing is left to train on: no normaliser of 0, no NaN, no gradient."""
    flags = ("--alp.method", method, "--actor.loss_agg_mode", aggregate)
    args = parse("--alp.enable", *SIGMA, *flags)
    args.train.dynamic_batch_enable = dynamic  # after parsing: it asks for flash attention
    args.train.max_tokens_per_gpu = 24
    actor = build_actor(args)
    before = weights(actor)
    losses: list[torch.Tensor] = []
    backward = actor.strategy.backward

    def spy(loss: torch.Tensor, *rest: Any) -> None:
        losses.append(loss.detach())
        backward(loss, *rest)

    monkeypatch.setattr(actor.strategy, "backward", spy)
    experience = rollouts(actor)
    experience.action_mask = torch.zeros_like(experience.action_mask)
    actor.append(experience)
    status = actor.fit()
    assert losses and all(loss == 0.0 for loss in losses)
    assert status["policy_loss"] == 0.0
    assert all(math.isfinite(value) for value in status.values())
    for name, parameter in weights(actor).items():
        assert torch.equal(parameter, before[name]), name


def test_bypass_has_no_sigma(parse: Parse) -> None:
    actor = build_actor(parse("--alp.enable", "--alp.method", "token-bypass"))
    assert actor.trainer.perturbation is None
    status = update(actor, mismatch=0.0)
    # Bit-equal weights and no noise: every log-ratio is exactly zero.
    assert status["alp/log_ratio_p99"] == status["alp/log_ratio_p01"] == 0.0


def test_with_alp_off_the_update_is_upstreams_bit_for_bit(parse: Parse) -> None:
    from openrlhf.trainer.ray import ppo_actor

    from openrlhf_alp.learner.compat import undecorated

    ours = build_actor(parse())
    upstream = build_actor(parse(), undecorated(ppo_actor.PolicyModelActor))
    assert type(upstream.trainer) is ppo_actor.ActorPPOTrainer
    for actor in (ours, upstream):
        torch.manual_seed(3)  # the shuffle of the replay buffer
        update(actor)
    reference = weights(upstream)
    for name, parameter in weights(ours).items():
        assert torch.equal(parameter, reference[name]), name


def test_a_checkpoint_resumes_with_the_same_sigma_and_the_same_next_noise(
    parse: Parse, tmp_path: Path
) -> None:
    flags = ("--alp.enable", "--alp.sigma0", "auto", "--ckpt.load_enable")
    first = build_actor(parse(*flags))
    update(first, seed=1)
    first.save_checkpoint("global_step1", {"global_step": 1})
    resumed = build_actor(parse(*flags))
    assert resumed.trainer.perturbation.start == first.trainer.perturbation.start
    assert resumed.trainer.perturbation.scales == first.trainer.perturbation.scales
    assert resumed.trainer.perturbation.sigma0 == first.trainer.perturbation.sigma0
    assert resumed.trainer.update_number == first.trainer.update_number == 1
    for layer, sigma in first.trainer.perturbation.sigmas().items():
        assert torch.equal(sigma, resumed.trainer.perturbation.sigmas()[layer])
    statuses = []
    for actor in (first, resumed):
        torch.manual_seed(3)
        statuses.append(update(actor, seed=2))
    for name in ("alp/log_ratio_p99", "alp/mismatch_k3_kl", "alp/noisy_outside_share"):
        assert statuses[0][name] == statuses[1][name]
    reference = weights(first)
    for name, parameter in weights(resumed).items():
        assert torch.equal(parameter, reference[name]), name


def test_another_seed_than_the_checkpoints_is_refused_by_name(parse: Parse) -> None:
    flags = ("--alp.enable", *SIGMA, "--ckpt.load_enable")
    first = build_actor(parse(*flags))
    update(first)
    first.save_checkpoint("global_step1", {"global_step": 1})
    with pytest.raises(ValueError, match=r"--alp\.seed is 7, .* Set --alp\.seed 42"):
        build_actor(parse(*flags, "--alp.seed", "7"))
    with pytest.raises(ValueError, match=r"Set --alp\.sigma_scale relative"):
        build_actor(parse(*flags, "--alp.sigma_scale", "absolute"))
    with pytest.raises(ValueError, match="this run has no sigma"):
        build_actor(parse(*flags, "--alp.method", "token-bypass"))


def test_a_run_without_sigma_continues_with_it(parse: Parse) -> None:
    flags = ("--alp.enable", "--ckpt.load_enable")
    first = build_actor(parse(*flags, "--alp.method", "token-bypass"))
    update(first)
    first.save_checkpoint("global_step1", {"global_step": 1})
    with pytest.raises(ValueError, match=r"with --alp\.method token-bypass, .*change_method"):
        build_actor(parse(*flags))
    resumed = build_actor(parse(*flags, "--alp.change_method"))
    before, after = weights(first), weights(resumed)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert resumed.checkpoint_states["global_step"] == 1
    status = update(resumed, seed=2)
    assert status["alp/mismatch_k3_kl"] > 0
    moved = weights(resumed)
    # The restored fp32 weights are stepped, not those of the folder that was loaded first.
    change = (moved[UP] - after[UP]).abs().max()
    assert 0 < change < 0.02


def test_auto_finds_noise_as_large_as_the_mismatch(parse: Parse) -> None:
    actor = build_actor(parse("--alp.enable"))
    status = update(actor, mismatch=0.03, num_samples=16)
    assert status["alp/noise_k3_kl"] == pytest.approx(status["alp/mismatch_k3_kl"], rel=0.2)
    # k3 of a normal difference with standard deviation s is close to s^2 / 2.
    assert status["alp/mismatch_k3_kl"] == pytest.approx(0.03**2 / 2, rel=0.4)


def test_the_exported_model_is_clean_and_loads(parse: Parse, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    args = parse("--alp.enable", *SIGMA)
    actor = build_actor(args)
    update(actor)
    actor.save_model()
    exported = load_file(Path(args.ckpt.output_dir) / "model.safetensors")
    assert not [name for name in exported if "alp" in name]
    assert actor.trainer.perturbation is not None
    loaded = AutoModelForCausalLM.from_pretrained(args.ckpt.output_dir, dtype=torch.bfloat16)
    ours = actor.actor.model.module.state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in loaded.state_dict().items())


def test_what_is_pushed_is_the_checkpoint_name_for_name_without_sigma(
    parse: Parse, tiny_model: Path
) -> None:
    from openrlhf_alp.learner.strategy import without_sigma
    from openrlhf_alp.learner.weight_sync import gathered_parameters

    actor = build_actor(parse("--alp.enable", *SIGMA))
    model = actor.actor.model.module
    with without_sigma(actor.actor):
        pushed = {n: t.clone() for n, t in gathered_parameters(model, zero_stage=2, keep=True)}
    served = load_file(tiny_model / "model.safetensors")
    assert pushed.keys() == served.keys()
    assert all(torch.equal(tensor, served[name]) for name, tensor in pushed.items())
    assert [name for name, _ in model.named_parameters() if name.startswith("alp.")]


def test_packing_gives_the_same_ratios_as_padding(parse: Parse) -> None:
    statuses = []
    for packing in ([], ["--ds.packing_samples"]):
        actor = build_actor(parse("--alp.enable", *SIGMA, *packing))
        torch.manual_seed(3)
        statuses.append(update(actor))
    padded, packed = statuses
    for name in ("alp/log_ratio_p01", "alp/log_ratio_p99", "alp/k3_kl"):
        assert padded[name] == pytest.approx(packed[name], rel=0.1, abs=2e-3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(parse: Parse, reentrant: bool) -> None:
    checkpointing = ["--actor.gradient_checkpointing_enable"]
    if reentrant:
        checkpointing.append("--actor.gradient_checkpointing_reentrant")
    results = []
    for flags in ([], checkpointing):
        actor = build_actor(parse("--alp.enable", *SIGMA, *flags))
        torch.manual_seed(3)
        update(actor)
        results.append(weights(actor))
    for name, parameter in results[0].items():
        assert torch.equal(parameter, results[1][name]), name


def test_a_nan_rollout_log_prob_stops_the_update_and_says_where(parse: Parse) -> None:
    actor = build_actor(parse("--alp.enable", *SIGMA))
    batch = rollouts(actor)
    batch.rollout_log_probs[1, 5] = float("nan")
    before = weights(actor)
    actor.append(batch)
    with pytest.raises(FloatingPointError, match="rollout_log_probs"):
        actor.fit()
    after = weights(actor)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_shorter_batch_is_a_whole_optimizer_step(parse: Parse) -> None:
    """Three micro-batches where four are accumulated: the same gradient as where three are."""
    flags = ("--rollout.batch_size", "4", "--alp.enable", "--alp.sigma0", "0.01")
    short = build_actor(parse(*flags, "--train.batch_size", "8"))
    exact = build_actor(parse(*flags, "--train.batch_size", "6"))
    norms = []
    for actor in (short, exact):
        torch.manual_seed(0)  # the order of the samples
        actor.append(rollouts(actor, num_samples=6))
        status = actor.fit()
        norms.append(status["actor_grad_norm"])
        assert actor.trainer.update_number == 1
    assert norms[0] == pytest.approx(norms[1], rel=1e-3) and norms[0] > 0
    short.append(rollouts(short, num_samples=8))
    short.fit()
    assert short.trainer.update_number == 2


def test_an_update_averages_its_draws_where_the_noise_goes(parse: Parse) -> None:
    """Noise on the logits too; the average is that of single passes with each draw's rows."""
    from openrlhf_alp.learner.policy_forward import averaging

    flags = ("--alp.enable", "--alp.layers", "embedding,logits", "--alp.sigma0", "auto")
    actor = build_actor(parse(*flags, "--alp.draws", "3", "--ckpt.load_enable"))
    status = update(actor)
    trainer = actor.trainer
    assert trainer.perturbation.layers == (0, 2) and status["alp/noise_k3_kl"] > 0
    assert status["alp/layer_last_changed_share"] > 0
    batch = rollouts(actor, seed=5)
    once = (batch.sequences, batch.action_mask)
    thrice = [rows.repeat(3, 1) for rows in (*once, batch.attention_mask)]
    noise = {"update": 7, "sample_ids": torch.arange(4), "attention_mask": batch.attention_mask}
    with torch.no_grad(), trainer.perturbation.enabled(**noise):
        single = actor.actor(*thrice).unflatten(0, (3, 4))
        with averaging(actor.actor, 3):
            mean = actor.actor(*once, attention_mask=batch.attention_mask)
    mask = batch.action_mask.bool()
    torch.testing.assert_close(mean[mask], single.exp().mean(0).log()[mask])
    assert not mean[~mask].any()
    actor.save_checkpoint("global_step1", {"global_step": 1})
    with pytest.raises(ValueError, match=r"--alp\.draws is 1, .* trained with 3"):
        build_actor(parse(*flags, "--ckpt.load_enable"))


def test_every_nth_step_compares_the_clean_learner_before_and_after_its_update(
    parse: Parse, caplog: pytest.LogCaptureFixture
) -> None:
    """Rollout log-probs are the learner's own, moved by 0.03.

    With 48 samples on the rank, 3 are measured; there are no versions, so their lag is 0.
    """
    from openrlhf_alp.objective.metric_names import MEASURED, METRICS

    sizes = ("--rollout.batch_size", "24", "--train.batch_size", "16")
    flags = ("--alp.enable", *SIGMA, *sizes, "--train.micro_batch_size", "16")
    actor = build_actor(parse(*flags, "--alp.telemetry_every", "2"))
    with caplog.at_level(logging.WARNING):
        first, second, third = (
            update(actor, mismatch=0.03, num_samples=48, seed=seed) for seed in range(3)
        )
    assert MEASURED.keys() & first.keys() == MEASURED.keys() & third.keys()
    assert not MEASURED.keys() & second.keys()
    # The layers are looked at in the same steps.
    assert {"alp/layer_0_sigma", "alp/layer_last_scale"} <= first.keys() & third.keys()
    assert not [name for name in second if name.startswith("alp/layer_")]
    assert first["alp/lag_0_share"] == 1.0
    assert first["alp/lag_0_mismatch_rms"] == pytest.approx(0.03, rel=0.4)
    assert first["alp/clean_start_k3_kl"] == pytest.approx(0.03**2 / 2, rel=0.8)
    assert first["alp/lag_0_staleness_rms"] > 0 and first["alp/lag_0_perturbation_rms"] > 0
    assert 0 < first["alp/entropy"] <= math.log(258)
    assert 0 < first["alp/sigma_grad_norm"] < first["actor_grad_norm"]
    assert sum(first[f"alp/envelope_{i}_share"] for i in range(10)) == pytest.approx(1.0)
    assert first["alp/advantage_positive_tokens"] + first["alp/advantage_negative_tokens"] == 333
    assert 0.5 <= first["alp/layer_variance_share_max"] < 1
    logged = {re.sub(r"layer_\d+_", "layer_<number>_", name) for name in first}
    assert {name for name in logged if name.startswith("alp/")} <= METRICS.keys()
    assert not [r for r in caplog.records if "This is said once" in r.message]


def test_a_step_without_advantages_is_explained_once(
    parse: Parse, caplog: pytest.LogCaptureFixture
) -> None:
    actor = build_actor(parse("--alp.enable", "--alp.method", "token-bypass"))
    with caplog.at_level(logging.WARNING):
        for seed in range(2):
            batch = rollouts(actor, seed=seed)
            batch.advantages = torch.zeros_like(batch.advantages)
            actor.append(batch)
            status = actor.fit()
    [message] = [r.message for r in caplog.records if "This is said once" in r.message]
    assert "all advantages" in message and "--rollout.n_samples_per_prompt" in message
    assert status["alp/weight_grad_norm"] == status["actor_grad_norm"] == 0.0
