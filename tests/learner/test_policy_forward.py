"""Logits of actions only: the same log-probs, entropies and gradients of fewer logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from openrlhf.models import Actor
from transformers import LlamaForCausalLM

from openrlhf_alp.alp import PerturbationConfig, attach
from openrlhf_alp.learner.policy_forward import averaging, logits_of_actions

Parse = Callable[..., SimpleNamespace]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def actor(tiny_model: Path) -> Actor:
    """In float32, since bfloat16 rounds a matrix product of another size otherwise."""
    model = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    actor = Actor(model)
    actor.packing_samples = False
    return actor


def make_batch() -> Any:
    """Three samples of 12 tokens; one is shorter, and one has a tool's token between actions."""
    generator = torch.Generator().manual_seed(0)
    sequences = torch.randint(2, 250, (3, 12), generator=generator)
    attention_mask = torch.ones_like(sequences)
    attention_mask[0, -3:] = 0
    action_mask = attention_mask[:, 1:].clone()
    action_mask[:, :4] = 0
    action_mask[1, 6] = 0
    return SimpleNamespace(
        sequences=sequences, attention_mask=attention_mask, action_mask=action_mask
    )


def forward(actor: Actor, batch: Any) -> Any:
    """(log-probs, output) as an update asks for them."""
    return actor(
        batch.sequences,
        batch.action_mask,
        attention_mask=batch.attention_mask,
        return_output=True,
        return_entropy=True,
    )


def gradients(actor: Actor, log_probs: torch.Tensor) -> dict[str, torch.Tensor]:
    actor.zero_grad()
    log_probs.square().sum().backward()
    return {name: p.grad.clone() for name, p in actor.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("packing", [False, True])
def test_logits_of_actions_change_neither_log_probs_nor_gradients(
    actor: Actor, packing: bool
) -> None:
    actor.packing_samples = packing
    batch = make_batch()
    mask = batch.action_mask.bool()
    expected, whole = forward(actor, batch)
    expected_gradients = gradients(actor, expected)
    with logits_of_actions(actor, batch):
        log_probs, output = forward(actor, batch)
        found = gradients(actor, log_probs)
    assert output.logits.shape == (1, 7 + 7 + 6 - 3, whole.logits.shape[-1])
    torch.testing.assert_close(log_probs, expected)
    torch.testing.assert_close(output.entropy[mask], whole.entropy[mask])
    assert not output.entropy[~mask].any()
    assert found.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4, msg=name)
    # Outside, upstream's functions and the output layer are as before.
    again, output = forward(actor, batch)
    assert torch.equal(again, expected) and output.logits.shape == whole.logits.shape


def test_a_batch_without_an_action_has_log_probs_and_gradients_of_0(actor: Actor) -> None:
    batch = make_batch()
    batch.action_mask.zero_()
    with logits_of_actions(actor, batch):
        log_probs, _ = forward(actor, batch)
    assert not log_probs.any()
    assert not any(gradient.any() for gradient in gradients(actor, log_probs).values())


def test_every_draw_has_its_own_logits(actor: Actor) -> None:
    config = PerturbationConfig(sigma0=0.05, sigma_scale="absolute", draws=3)
    perturbation = attach(actor.model, config)
    batch = make_batch()
    noise = {"update": 3, "sample_ids": torch.arange(3), "attention_mask": batch.attention_mask}
    with perturbation.enabled(**noise), averaging(actor, 3):
        expected, _ = forward(actor, batch)
        with logits_of_actions(actor, batch):
            log_probs, output = forward(actor, batch)
    assert output.logits.shape[1] == 3 * int(batch.action_mask.sum())
    torch.testing.assert_close(log_probs, expected)


def test_a_perturbed_output_layer_keeps_all_its_logits(actor: Actor) -> None:
    attach(actor.model, PerturbationConfig(sigma0=0.05, layers="0,logits"))
    batch = make_batch()
    with logits_of_actions(actor, batch):
        _, output = forward(actor, batch)
    assert output.logits.shape[:2] == batch.sequences.shape


@pytest.mark.e2e
def test_an_update_asks_the_output_layer_for_actions_only(parse: Parse, actors: Any) -> None:
    actor = actors.build_actor(parse("--alp.enable", *actors.SIGMA))
    batch = actors.rollouts(actor)
    num_logits: list[int] = []
    output_layer = actor.actor.model.module.get_output_embeddings()
    output_layer.register_forward_hook(
        lambda _module, _args, logits: num_logits.append(logits.shape[:2].numel())
    )
    actor.append(batch)
    status = actor.fit()
    # Besides, the first step's unit of sigma and telemetry take one sample or more, four times.
    assert sum(num_logits) <= 5 * status["alp/num_tokens"]
    assert max(num_logits) <= 2 * 7  # a micro-batch of two samples with 7 actions of 12 tokens
