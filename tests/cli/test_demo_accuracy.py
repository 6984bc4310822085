import math

import pytest
from transformers import AutoTokenizer

from openrlhf_alp.cli.demo_accuracy import _Examiner
from openrlhf_alp.data.addition import AdditionRow
from openrlhf_alp.rewards.protocol import RewardResult, RewardUnavailable
from services.rollout.schemas import GenerateRequest, GenerateResponse, Sample, Timings

ROWS = [AdditionRow(question=f"What is 1 + {n}?", label=str(1 + n)) for n in (1, 2, 3, 4)]


class Client:
    """Answers every question with 3 greedily and with 4 otherwise, and remembers the requests."""

    def __init__(self) -> None:
        self.requests: list[GenerateRequest] = []

    async def generate(self, request: GenerateRequest) -> GenerateResponse:
        self.requests.append(request)
        answer = "3" if request.sampling.temperature == 0.0 else "4"
        sample = Sample(
            token_ids=[ord(answer), 1],
            logprobs=[-1.0, -1.0],
            finish_reason="stop",
            stop_reason=None,
            spans=[],
        )
        return GenerateResponse(
            request_id=request.request_id,
            samples=[sample] * request.n,
            contract_hash="c",
            version=0,
            timings=Timings(total_s=0.0),
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
def client() -> Client:
    return Client()


def examiner(client, character_model, reward) -> _Examiner:
    tokenizer = AutoTokenizer.from_pretrained(character_model)
    return _Examiner(client, tokenizer, reward, max_tokens=20, seed=100)


async def test_both_shares_are_counted_over_their_own_answers(client, character_model):
    """The labels are 2, 3, 4, 5: one of four is 3, one of four is 4."""
    accuracy = await examiner(client, character_model, Reward()).examine(ROWS)
    assert (accuracy.greedy, accuracy.sampled) == (0.25, 0.25)
    assert accuracy.greedy_answers == ("3", "3", "3", "3")
    assert accuracy.num_not_scored == 0


async def test_an_answer_without_a_reward_is_left_out_and_counted(client, character_model):
    """Without label 2 one of three is right; 1 greedy and 8 sampled answers are not scored."""
    accuracy = await examiner(client, character_model, Reward(broken="2")).examine(ROWS)
    assert accuracy.greedy == pytest.approx(1 / 3)
    assert accuracy.num_not_scored == 9


async def test_nothing_scored_is_not_a_number_rather_than_zero(client, character_model):
    accuracy = await examiner(client, character_model, Reward(broken="2")).examine(ROWS[:1])
    assert math.isnan(accuracy.greedy)


async def test_no_two_answers_share_a_seed_or_a_request_id(client, character_model):
    await examiner(client, character_model, Reward()).examine(ROWS)
    sampled = [request for request in client.requests if request.sampling.temperature == 1.0]
    assert [(request.n, request.sampling.seed) for request in sampled] == [
        (8, 100),
        (8, 108),
        (8, 116),
        (8, 124),
    ]
    assert len({request.request_id for request in client.requests}) == len(client.requests) == 8
