"""Rollouts become experience without an "old" pass; dropped groups are replaced."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator

from openrlhf_alp.learner.experience import (
    SAMPLE_ID,
    TOKEN_VERSIONS,
    AlpSamplesGenerator,
    _masked_rollout_log_probs,
)


def response(prompt: str) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "label": "7",
        "observation_tokens": [5, 6, 7, 8],
        "action_ranges": [(2, 4)],
        "rollout_log_probs": [0.0, 0.0, -0.5, -0.25],
        "reward": 1.0,
        "scores": 1.0,
        "truncated": False,
        "token_versions": [(3, 1), (4, 1)],
        "extra_logs": {},
    }


def generator(samples_per_prompt: int = 2) -> AlpSamplesGenerator:
    args = SimpleNamespace(
        rollout=SimpleNamespace(n_samples_per_prompt=samples_per_prompt),
        rollout_service=SimpleNamespace(urls=("http://127.0.0.1:1",)),
    )
    return AlpSamplesGenerator(SimpleNamespace(args=args), None, None, None, [])


def test_every_sample_of_a_run_has_its_own_number() -> None:
    ours = generator()
    ids = [
        int(ours._process_response_into_experience(response("a")).info[SAMPLE_ID]) for _ in range(4)
    ]
    assert ids == [0, 1, 2, 3]


def test_the_rollouts_log_probs_take_the_place_of_the_old_ones() -> None:
    experience = generator()._process_response_into_experience(response("a"))
    # Shifted to predictions: positions 1, 2, 3 of the episode; the first is still the prompt's.
    assert _masked_rollout_log_probs(experience).tolist() == [[0.0, -0.5, -0.25]]


def test_a_sample_says_which_version_sampled_each_of_its_tokens() -> None:
    experience = generator()._process_response_into_experience(response("a"))
    assert experience.info[TOKEN_VERSIONS] == [[(3, 1), (4, 1)]]


def test_a_rollout_without_log_probs_is_refused() -> None:
    with pytest.raises(ValueError, match="without log-probs"):
        _masked_rollout_log_probs(Experience(sequences=torch.zeros(1, 2)))


def fake_upstream(monkeypatch: pytest.MonkeyPatch, dropped: set[str]) -> list[list[str]]:
    """Upstream's `_generate_vllm` without engines; some prompts lose their group."""
    asked: list[list[str]] = []

    def generate(
        self: Any, prompts: Iterator[str], num_prompts: int, dynamic: bool, **kwargs: Any
    ) -> tuple[list[Experience], int, bool]:
        taken = [p for _, p in zip(range(num_prompts), prompts, strict=False)]
        asked.append(taken)
        kept = [
            self._process_response_into_experience(response(p))
            for p in taken
            if p not in dropped
            for _ in range(2)
        ]
        return kept, len(taken), len(taken) < num_prompts

    monkeypatch.setattr(SamplesGenerator, "_generate_vllm", generate)
    return asked


def test_a_dropped_group_is_replaced_by_the_next_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_upstream(monkeypatch, dropped={"b", "d"})
    experiences, consumed, exhausted = generator()._generate_vllm(iter("abcdef"), 3, False)
    assert [e.prompts[0] for e in experiences] == list("aaccee")
    assert asked == [["a", "b", "c"], ["d"], ["e"]]
    assert consumed == 5 and not exhausted


def test_a_data_set_that_runs_out_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_upstream(monkeypatch, dropped={"a", "b"})
    experiences, consumed, exhausted = generator()._generate_vllm(iter("ab"), 2, False)
    assert experiences == [] and consumed == 2 and exhausted
