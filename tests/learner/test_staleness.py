"""Which groups are too old to train on, and how old the tokens of a step are."""

from __future__ import annotations

import pytest
import torch
from openrlhf.trainer.ppo_utils.experience import Experience

from openrlhf_alp.learner.experience import (
    STALENESS,
    STALENESS_METRICS,
    TOKEN_VERSIONS,
    StalenessGate,
)

GROUP, STEP = 2, 4


def group(name: str, *spans: tuple[int, int]) -> list[Experience]:
    """Two samples of one prompt; `spans` are (version, number of tokens)."""
    return [
        Experience(prompts=[name], info={TOKEN_VERSIONS: [list(spans)], "reward": torch.ones(1)})
        for _ in range(GROUP)
    ]


def gate(max_staleness: int | None) -> StalenessGate:
    return StalenessGate(
        samples_per_prompt=GROUP, samples_per_step=STEP, max_staleness=max_staleness
    )


def names(samples: list[Experience]) -> str:
    return "".join(sample.prompts[0] for sample in samples)


def test_without_a_bound_everything_passes_and_its_age_is_reported() -> None:
    ours = gate(None)
    admitted = ours.admit(group("a", (3, 1), (5, 3)) + group("b", (5, 4)), version=5)
    assert names(admitted) == "aabb"
    # Two samples with one token of age 2 each, of 16 tokens.
    assert ours.take_metrics() == {
        "rollout/staleness_mean": 2 * 2 / 16,
        "rollout/staleness_max": 2.0,
        "rollout/stale_share": 0.0,
    }
    assert [sample.info[STALENESS].tolist() for sample in admitted] == [[2], [2], [0], [0]]
    assert not any(TOKEN_VERSIONS in sample.info for sample in admitted)


def test_one_old_token_drops_its_whole_group_and_the_others_wait_for_a_full_step() -> None:
    ours = gate(1)
    assert ours.admit(group("a", (3, 1), (5, 3)) + group("b", (4, 4)), version=5) == []
    assert ours.take_dropped_groups() == 1
    assert names(ours.waiting) == "bb"
    admitted = ours.admit(group("c", (5, 4)) + group("d", (5, 4)), version=5)
    assert names(admitted) == "bbcc"
    assert names(ours.waiting) == "dd"
    metrics = ours.take_metrics()
    assert metrics["rollout/staleness_max"] == 1.0
    # Of the 32 tokens that came, 2 were older than the bound; those of group a that were not count.
    assert metrics["rollout/stale_share"] == 2 / 32
    assert ours.take_dropped_groups() == 0


def test_waiting_samples_grow_older_with_the_next_update() -> None:
    ours = gate(1)
    ours.admit(group("a", (1, 2)) + group("b", (4, 2)), version=5)
    ours.admit(group("c", (5, 2)) + group("d", (4, 2)), version=5)
    assert names(ours.waiting) == "dd"
    assert names(ours.admit(group("e", (6, 2)) + group("f", (6, 2)), version=6)) == "eeff"
    assert ours.take_dropped_groups() == 2  # a, then d


def test_a_short_last_batch_is_trained_on_when_nothing_of_it_is_old() -> None:
    assert names(gate(0).admit(group("a", (2, 2)), version=2)) == "aa"
    ours = gate(0)
    assert ours.admit(group("a", (1, 2)), version=2) == []
    assert ours.waiting == []


def test_a_token_from_the_future_means_another_learner_and_is_refused() -> None:
    with pytest.raises(ValueError, match="sampled by version 7, but the version updated is 5"):
        gate(None).admit(group("a", (7, 2)), version=5)


def test_every_metric_is_explained() -> None:
    ours = gate(None)
    ours.admit(group("a", (1, 2)), version=1)
    assert {STALENESS, *ours.take_metrics()} == STALENESS_METRICS.keys()
