"""Evaluation means are over the prompts that were asked, whatever became of their groups."""

from __future__ import annotations

from typing import Any

import torch
from openrlhf.trainer.ppo_utils.experience import Experience

from openrlhf_alp.learner.evaluation import eval_metrics

ROWS: list[Any] = [
    (["easy"], ["p"], ["1"], [None]),
    (["easy"], ["q"], ["1"], [None]),
    (["hard"], ["r"], ["1"], [None]),
]


def group(prompt: str, *rewards: float) -> list[Experience]:
    return [
        Experience(
            prompts=[prompt],
            labels=["1"],
            rewards=torch.tensor([reward]),
            response_length=torch.tensor([5]),
            truncated=torch.tensor([False]),
        )
        for reward in rewards
    ]


def test_a_dropped_group_is_not_solved() -> None:
    logs = eval_metrics(ROWS, group("p", 1.0, 0.0), 2)
    # easy: p has pass@2 1 and pass@1 0.5, q is missing; hard: nothing came.
    assert (logs["eval_easy_pass2"], logs["eval_easy_pass1"]) == (0.5, 0.25)
    assert (logs["eval_hard_pass2"], logs["eval_hard_pass1"]) == (0.0, 0.0)
    assert logs["eval_dropped_groups"] == 2


def test_with_every_group_there_the_means_are_upstreams() -> None:
    samples = [*group("q", 1.0), *group("r", 0.0), *group("p", 1.0)]
    logs = eval_metrics(ROWS, samples, 1)
    assert (logs["eval_easy_pass1"], logs["eval_hard_pass1"]) == (1.0, 0.0)
    assert (logs["eval_dropped_groups"], logs["eval_num_samples"]) == (0, 3)


def test_an_evaluation_without_any_answer_is_0_and_not_missing() -> None:
    logs = eval_metrics(ROWS, [], 4)
    assert logs["eval_easy_pass1"] == logs["eval_hard_pass4"] == 0.0
    assert logs["eval_dropped_groups"] == 3
