"""Evaluation means are over the prompts that were asked, whatever became of their groups."""

from __future__ import annotations

from typing import Any

import torch
from openrlhf.trainer.ppo_utils.experience import Experience

from openrlhf_alp.evaluate.numbers import average
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


def test_the_curve_and_its_interval_are_those_of_the_evaluation_command() -> None:
    """p: 2 of 4 right, q is missing; pass@2 of p is 1 - 1/6."""
    samples = [*group("p", 1.0, 0.0, 1.0, 0.0), *group("r", 0.0, 0.0, 0.0, 0.0)]
    logs = eval_metrics(ROWS, samples, 4)
    assert (logs["eval_easy_pass1"], logs["eval_easy_pass4"]) == (0.25, 0.5)
    assert abs(logs["eval_easy_pass2"] - 5 / 12) < 1e-12
    estimate = average([2, 0], 4)
    assert logs["eval_easy_pass1_low"] == estimate.low < 0.25 < logs["eval_easy_pass1_high"]
    assert logs["eval_hard_pass2"] == 0.0


def test_rewards_that_are_no_verdicts_have_no_curve() -> None:
    logs = eval_metrics(ROWS, [*group("p", 0.5, 0.25), *group("q", 1.0, 0.0)], 2)
    assert logs["eval_easy_pass2"] == 0.75 and "eval_easy_pass1_low" not in logs
