"""From an episode with tool output to the gradient: only what the policy sampled is trained on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from openrlhf.models import aggregate_loss

from openrlhf_alp.episodes.records import (
    Episode,
    StopReason,
    Timings,
    Turn,
    TurnKind,
    VersionSpan,
)
from openrlhf_alp.learner.actor import AlpPolicyLoss
from openrlhf_alp.learner.experience import AlpSamplesGenerator
from openrlhf_alp.objective.methods import METHODS
from openrlhf_alp.rollouts.response import to_response
from openrlhf_alp.rollouts.runners import ToolConfig

VOCABULARY = 11
EPISODE = Episode(
    request_id="r",
    prompt="q",
    label="l",
    token_ids=(1, 2, 3, 4, 5, 6, 7, 8, 9, 10),
    logprobs=(0.0, 0.0, -1.0, -2.0, 0.0, 0.0, 0.0, -1.0, -2.0, -0.5),
    action_mask=(False,) * 2 + (True,) * 2 + (False,) * 3 + (True,) * 3,
    turns=(
        Turn(kind=TurnKind.PROMPT, start=0, end=2, text="q"),
        Turn(kind=TurnKind.ACTION, start=2, end=4, text="code"),
        Turn(kind=TurnKind.OBSERVATION, start=4, end=7, text="output"),
        Turn(kind=TurnKind.ACTION, start=7, end=10, text="answer and its end of sequence"),
    ),
    spans=(
        VersionSpan(version=1, digest="d", start=2, end=4),
        VersionSpan(version=1, digest="d", start=7, end=10),
    ),
    stop_reason=StopReason.EOS,
    reward=1.0,
    timings=Timings(generate_s=0.0, reward_s=0.0),
)
PREDICTS_ACTION = [1, 2, 6, 7, 8]
"""Positions whose logits predict tokens 2, 3, 7, 8, 9; the last of these ends the sequence."""


@pytest.mark.parametrize("method", sorted(METHODS))
def test_logits_that_predict_tool_tokens_get_no_gradient_at_all(method: str) -> None:
    args = SimpleNamespace(
        rollout=SimpleNamespace(n_samples_per_prompt=1),
        rollout_service=SimpleNamespace(urls=("http://127.0.0.1:1",)),
    )
    generator = AlpSamplesGenerator(SimpleNamespace(args=args), None, None, None, [])
    response = to_response(EPISODE, tool=ToolConfig(urls=("http://127.0.0.1:2",)))
    experience = generator._process_response_into_experience(response)
    torch.manual_seed(0)
    logits = torch.randn(1, 10, VOCABULARY, requires_grad=True)
    predicted = torch.log_softmax(logits[:, :-1], -1)
    log_probs = predicted.gather(-1, experience.sequences[:, 1:, None])[..., 0]
    loss_of = AlpPolicyLoss(
        METHODS[method].objective, aggregate=aggregate_loss, token_level_loss=True
    )
    # Rollout log-probs close by, so that no ratio is clipped, and noise where nothing was sampled:
    # whatever stands at a tool token must not matter.
    rollout = log_probs.detach() + 0.01 * experience.action_mask
    rollout += torch.randn(rollout.shape) * (1 - experience.action_mask)
    loss, *_ = loss_of(
        log_probs,
        rollout,
        torch.ones_like(log_probs),
        action_mask=experience.action_mask,
        rollout_log_probs=rollout,
        dp_size=1,
        batch_num_tokens=experience.action_mask.sum().float(),
        global_batch_size=torch.tensor(1.0),
    )
    loss.backward()
    assert logits.grad is not None
    touched = logits.grad[0].abs().amax(-1).nonzero().flatten().tolist()
    assert touched == PREDICTS_ACTION
