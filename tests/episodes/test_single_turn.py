import math
import pickle
from collections.abc import Sequence

import pytest

from openrlhf_alp.episodes.protocols import Task
from openrlhf_alp.episodes.records import (
    BadCompletionError,
    Completion,
    SamplingConfig,
    StopReason,
    TurnKind,
    VersionSpan,
)
from openrlhf_alp.episodes.runners import SingleTurn
from openrlhf_alp.rewards.protocol import RewardResult, RewardUnavailable

EOS = 2
VOCABULARY = {10: "2", 11: " +", 12: " is", 13: " four"}
SAMPLING = SamplingConfig(max_tokens=8)


def decode(token_ids: Sequence[int], /) -> str:
    return "".join(VOCABULARY[token] for token in token_ids if token != EOS)


def completion(**changes: object) -> Completion:
    fields: dict[str, object] = {
        "token_ids": (12, 13, EOS),
        "logprobs": (-0.5, -0.25, -0.125),
        "finish_reason": "stop",
        "spans": (VersionSpan(version=7, digest="d", start=0, end=3),),
    }
    return Completion(**{**fields, **changes})  # type: ignore[arg-type]


class Engine:
    """Answers every request with one completion and remembers what it was asked."""

    def __init__(self, answer: Completion) -> None:
        self.answer = answer
        self.asked: list[tuple[str, tuple[int, ...], SamplingConfig]] = []

    async def __call__(self, *, request_id, prompt_ids, sampling):
        self.asked.append((request_id, tuple(prompt_ids), sampling))
        return self.answer


class Judge:
    """Gives 1.0 for the response it wants; None stands for a reward that cannot be computed."""

    def __init__(self, wanted: str | None) -> None:
        self.wanted = wanted
        self.seen: list[tuple[str, str, str]] = []

    async def score(self, *, prompt: str, response: str, label: str) -> RewardResult:
        self.seen.append((prompt, response, label))
        if self.wanted is None:
            raise RewardUnavailable(reason="timeout", detail="took 9 s")
        return RewardResult(
            value=float(response == self.wanted), detail={"chars": float(len(response))}
        )


async def run(engine: Engine, judge: Judge):
    runner = SingleTurn(generate=engine, decode=decode, reward=judge)
    task = Task(prompt="2 +", label="4", prompt_ids=[10, 11])
    return await runner(request_id="r1", task=task, sampling=SAMPLING)


async def test_the_episode_is_the_prompt_ids_followed_by_exactly_what_the_engine_sampled():
    engine, judge = Engine(completion()), Judge(" is four")
    episode = await run(engine, judge)

    assert engine.asked == [("r1", (10, 11), SAMPLING)]
    assert episode.token_ids == (10, 11, 12, 13, EOS)
    assert episode.logprobs == (0.0, 0.0, -0.5, -0.25, -0.125)
    assert episode.spans == (VersionSpan(version=7, digest="d", start=2, end=5),)
    assert [turn.kind for turn in episode.turns] == [TurnKind.PROMPT, TurnKind.ACTION]


async def test_a_sampled_end_of_sequence_is_an_action_but_is_not_shown_to_the_reward():
    engine, judge = Engine(completion()), Judge(" is four")
    episode = await run(engine, judge)

    assert episode.action_mask == (False, False, True, True, True)
    assert episode.action_ranges == ((2, 5),)
    assert judge.seen == [("2 +", " is four", "4")]
    assert episode.reward == 1.0
    assert episode.reward_detail == {"chars": 8.0}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"finish_reason": "stop"}, StopReason.EOS),
        ({"finish_reason": "stop", "stop_reason": "```"}, StopReason.STOP),
        ({"finish_reason": "stop", "stop_reason": 13}, StopReason.STOP),
        ({"finish_reason": "length"}, StopReason.LENGTH),
    ],
)
async def test_every_ending_of_the_engine_has_a_stop_reason(changes, expected):
    episode = await run(Engine(completion(**changes)), Judge(""))
    assert episode.stop_reason is expected
    assert episode.truncated is (expected is StopReason.LENGTH)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logprobs": (-0.5, math.nan, -0.1)}, r"nan at sampled position 1 \(token 13\)"),
        ({"logprobs": (-0.5, -0.1)}, "log-prob missing at sampled position 2"),
        ({"token_ids": (), "logprobs": (), "spans": ()}, "no tokens"),
        ({"finish_reason": "abort"}, "ended it with 'abort' after 3 tokens"),
    ],
)
async def test_a_reply_that_cannot_be_trained_on_is_refused_with_its_request_id(changes, message):
    judge = Judge("")
    with pytest.raises(BadCompletionError, match=message) as caught:
        await run(Engine(completion(**changes)), judge)
    assert "request r1" in str(caught.value)
    assert judge.seen == []


async def test_a_reward_that_cannot_be_computed_is_raised_and_never_becomes_a_zero():
    with pytest.raises(RewardUnavailable, match=r"\(timeout\): took 9 s"):
        await run(Engine(completion()), Judge(None))


def test_an_unavailable_reward_keeps_its_reason_through_pickling():
    """Ray carries exceptions between processes by pickling them."""
    error = pickle.loads(pickle.dumps(RewardUnavailable(reason="timeout", detail="took 9 s")))
    assert (error.reason, error.detail) == ("timeout", "took 9 s")


async def test_a_prompt_without_tokens_is_refused():
    runner = SingleTurn(generate=Engine(completion()), decode=decode, reward=Judge(""))
    task = Task(prompt="", label="4", prompt_ids=[])
    with pytest.raises(ValueError, match="request r9: the prompt has no tokens"):
        await runner(request_id="r9", task=task, sampling=SAMPLING)
