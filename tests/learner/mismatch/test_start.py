"""The measurement before the first update, through OpenRLHF's own actor on one CPU rank."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

Parse = Callable[..., SimpleNamespace]
pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore")]


def forward_shapes(actor: Any) -> list[tuple[int, ...]]:
    """Shapes of all forward passes from now on."""
    shapes: list[tuple[int, ...]] = []
    model = actor.actor.model.module
    model.get_input_embeddings().register_forward_pre_hook(
        lambda _module, args: shapes.append(tuple(args[0].shape))
    )
    return shapes


@pytest.mark.parametrize("size", [1, 2, 4])
def test_no_forward_is_larger_than_the_updates(parse: Parse, actors: Any, size: int) -> None:
    flags = ("--train.micro_batch_size", str(size), "--rollout.micro_batch_size", "1")
    # Without the telemetry's own forwards, which are smaller where it takes fewer samples.
    actor = actors.build_actor(parse("--alp.enable", "--alp.telemetry_every", "0", *flags))
    batch = actors.rollouts(actor, num_samples=16)
    shapes = forward_shapes(actor)
    actor.append(batch)
    actor.fit()
    assert {rows for rows, _ in shapes} == {size}


def test_under_dynamic_batching_no_forward_has_more_tokens_than_the_budget(
    parse: Parse, actors: Any
) -> None:
    flags = ("--train.dynamic_batch_enable", "--train.max_tokens_per_gpu", "30")
    actor = actors.build_actor(parse("--alp.enable", *flags, "--rollout.preflight_every", "1"))
    batch = actors.rollouts(actor, num_samples=16)
    shapes = forward_shapes(actor)
    actor.append(batch)
    status = actor.fit()
    assert max(rows * tokens for rows, tokens in shapes) <= 30
    # Nine tokens of the first sample and twelve of each other: 21 with it, 24 in the others.
    assert status["preflight/num_tokens"] > 0


def test_void_samples_are_passed_over(parse: Parse, actors: Any) -> None:
    """The first eight have no action token; a calibration on them alone once ended the run."""
    actor = actors.build_actor(parse("--alp.enable"))
    batch = actors.rollouts(actor, num_samples=16)
    batch.action_mask[:8] = 0
    actor.append(batch)
    status = actor.fit()
    assert 0 < status["alp/mismatch_k3_kl"] < 1e-3
    assert actor.trainer.perturbation.start is not None


def test_a_step_of_void_samples_only_puts_the_measurement_off(parse: Parse, actors: Any) -> None:
    actor = actors.build_actor(parse("--alp.enable"))
    batch = actors.rollouts(actor)
    batch.action_mask = torch.zeros_like(batch.action_mask)
    actor.append(batch)
    status = actor.fit()
    assert actor.trainer.perturbation.start is None
    assert status["policy_loss"] == 0.0
    assert actors.update(actor)["alp/mismatch_k3_kl"] > 0


def test_a_given_relative_sigma_is_checked_too_and_its_layers_are_logged(
    parse: Parse, actors: Any
) -> None:
    actor = actors.build_actor(parse("--alp.enable", "--alp.sigma0", "0.02"))
    status = actors.update(actor)
    assert status["alp/sigma0"] == 0.02
    for place in ("first", "middle", "last"):
        assert status[f"alp/layer_{place}_sigma_over_scale"] == pytest.approx(0.02, rel=0.25)
        assert status[f"alp/layer_{place}_changed_share"] > 0.5
    assert status["alp/noise_k3_kl"] > 0


def test_noise_that_leaves_the_clip_window_is_refused_with_the_shares(
    parse: Parse, actors: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Sigma of the median entry of every layer; the paper's window of a token."""
    window = ("--alp.clip_low_high", "0.0005", "0.0005")
    actor = actors.build_actor(parse("--alp.enable", "--alp.sigma0", "1", *window))
    before = actors.weights(actor)
    with pytest.raises(RuntimeError, match=r"Most of the batch .* Set --alp\.sigma0 auto"):
        actors.update(actor, mismatch=1e-5)
    after = actors.weights(actor)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_sequence_method_gets_less_noise_than_a_token_method(
    parse: Parse, actors: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A mismatch of 0.3 has a KL of 0.045; 7 tokens may have 0.347**2 / 2 / 7 = 0.0086 each."""
    targets = {}
    for method in ("token-alp", "seq-alp"):
        actor = actors.build_actor(parse("--alp.enable", "--alp.method", method))
        with caplog.at_level(logging.INFO):
            actors.update(actor, mismatch=0.3, num_samples=16)
        targets[method] = [r.args[1] for r in caplog.records if "noise may" in r.msg][-1]
        caplog.clear()
    assert targets["token-alp"] == pytest.approx(0.1116**2 / 2, rel=1e-2)
    assert targets["seq-alp"] == pytest.approx(0.3466**2 / 2 / 7, rel=0.05)
