import math
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from transformers import AutoTokenizer

from openrlhf_alp.data.tasks import Question
from openrlhf_alp.episodes.records import Completion, SamplingConfig, VersionSpan
from openrlhf_alp.launch.stages.accuracy import Accuracy, examine
from openrlhf_alp.rewards.protocol import RewardResult, RewardUnavailable
from openrlhf_alp.rollouts.runners import build_runner

ROWS = [Question(question=f"What is 1 + {n}?", label=str(1 + n)) for n in (1, 2, 3, 4)]


class Generate:
    """Answers every question with 3 greedily and with 4 otherwise, and remembers the requests."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, SamplingConfig]] = []

    async def __call__(
        self, *, request_id: str, prompt_ids: Any, sampling: SamplingConfig
    ) -> Completion:
        self.requests.append((request_id, sampling))
        answer = "3" if sampling.temperature == 0.0 else "4"
        return Completion(
            token_ids=(ord(answer), 1),
            logprobs=(-1.0, -1.0),
            finish_reason="stop",
            spans=(VersionSpan(version=1, digest="d", start=0, end=2),),
        )


class Reward:
    """Right when equal; cannot score the label in `broken`."""

    def __init__(self, broken: str | None = None) -> None:
        self.broken = broken

    async def score(self, *, prompt: str, response: str, label: str) -> RewardResult:
        if label == self.broken:
            raise RewardUnavailable(reason="timeout", detail="")
        return RewardResult(value=float(response == label))


@pytest.fixture
def generate() -> Generate:
    return Generate()


@pytest.fixture
def measure(generate, character_model) -> Callable[..., Awaitable[Accuracy]]:
    """Accuracy on `rows` when the label `broken` cannot be scored."""
    tokenizer = AutoTokenizer.from_pretrained(character_model)

    def run(rows: list[Question], broken: str | None = None) -> Awaitable[Accuracy]:
        reward = Reward(broken)
        runner = build_runner(generate=generate, reward=reward, tokenizer=tokenizer)
        return examine(rows, runner=runner, tokenizer=tokenizer, max_tokens=20, seed=100)

    return run


async def test_both_shares_are_counted_over_their_own_answers(measure):
    """The labels are 2, 3, 4, 5: one of four is 3, one of four is 4."""
    accuracy = await measure(ROWS)
    assert (accuracy.greedy, accuracy.sampled) == (0.25, 0.25)
    assert [episode.turns[-1].text for episode in accuracy.greedy_episodes] == ["3"] * 4
    assert accuracy.num_not_scored == 0


async def test_an_answer_without_a_reward_is_left_out_and_counted(measure):
    """Without label 2 one of three is right; 1 greedy and 8 sampled answers are not scored."""
    accuracy = await measure(ROWS, broken="2")
    assert accuracy.greedy == pytest.approx(1 / 3)
    assert accuracy.num_not_scored == 9
    assert accuracy.greedy_episodes[0] is None


async def test_nothing_scored_is_not_a_number_rather_than_zero(measure):
    accuracy = await measure(ROWS[:1], broken="2")
    assert math.isnan(accuracy.greedy)


async def test_no_two_answers_share_a_seed_or_a_request_id(generate, measure):
    """Per question one greedy and eight sampled answers."""
    await measure(ROWS)
    seeds = [sampling.seed for _, sampling in generate.requests]
    assert sorted(seeds) == list(range(100, 136))
    assert len({request_id for request_id, _ in generate.requests}) == 36
    sampled = [sampling for _, sampling in generate.requests if sampling.temperature == 1.0]
    assert len(sampled) == 32
