"""Accuracy on held-out questions, asked of the running rollout service."""

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from openrlhf_alp.clients.rollout import RolloutClient
from openrlhf_alp.data.addition import AdditionRow
from openrlhf_alp.rewards.math import MathReward
from openrlhf_alp.rewards.protocol import Reward, RewardUnavailable
from services.rollout.schemas import GenerateRequest, Sampling

_SAMPLES_PER_QUESTION = 8
_GREEDY, _SAMPLED = 0.0, 1.0
_CHECK_EVERY_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """How many held-out questions were answered right."""

    greedy: float
    """Share in [0, 1] with the most likely answer, one a question."""

    sampled: float
    """Share in [0, 1] at temperature 1, several answers a question."""

    num_not_scored: int
    """Answers whose reward could not be computed; they count in neither share."""

    greedy_answers: tuple[str, ...]
    """Text of the greedy answers, in the order of the questions."""


def measure_accuracy(
    rows: Sequence[AdditionRow],
    *,
    model: Path,
    service_url: str,
    api_key: str,
    max_tokens: int,
    seed: int,
    check_service: Callable[[], None],
) -> Accuracy:
    """Asks the service every question of `rows`, greedily and at temperature 1.

    Args:
        model: folder of the tokenizer, which turns questions into the ids training uses.
        max_tokens: longest answer.
        seed: of the sampled answers.
        check_service: called every half second; raises when the service is gone, which the client
            cannot know and would retry for minutes.

    Raises:
        ServiceError: the service refuses a request or does not answer.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)

    async def measure() -> Accuracy:
        reward = MathReward()
        try:
            async with RolloutClient([service_url], api_key=api_key) as client:
                examiner = _Examiner(client, tokenizer, reward, max_tokens=max_tokens, seed=seed)
                examination = asyncio.create_task(examiner.examine(rows))
                while not examination.done():
                    await asyncio.wait([examination], timeout=_CHECK_EVERY_S)
                    check_service()
                return examination.result()
        finally:
            reward.close()

    return asyncio.run(measure())


class _Examiner:
    def __init__(
        self,
        client: RolloutClient,
        tokenizer: PreTrainedTokenizerBase,
        reward: Reward,
        *,
        max_tokens: int,
        seed: int,
    ) -> None:
        self._client = client
        self._tokenizer = tokenizer
        self._reward = reward
        self._max_tokens = max_tokens
        self._seed = seed

    async def examine(self, rows: Sequence[AdditionRow]) -> Accuracy:
        greedy = await self._ask_all(rows, 1, _GREEDY)
        sampled = await self._ask_all(rows, _SAMPLES_PER_QUESTION, _SAMPLED)
        greedy_scores = await self._score(rows, greedy)
        sampled_scores = await self._score(rows, sampled)
        all_scores = greedy_scores + sampled_scores
        return Accuracy(
            greedy=_mean(greedy_scores),
            sampled=_mean(sampled_scores),
            num_not_scored=all_scores.count(None),
            greedy_answers=tuple(answers[0] for answers in greedy),
        )

    async def _ask_all(
        self, rows: Sequence[AdditionRow], num_answers: int, temperature: float
    ) -> list[list[str]]:
        # The service gives answer i of a request the seed + i: no two answers share a seed.
        seeds = itertools.count(self._seed, num_answers)
        asked = (self._ask(row, num_answers, temperature, next(seeds)) for row in rows)
        return await asyncio.gather(*asked)

    async def _ask(
        self, row: AdditionRow, num_answers: int, temperature: float, seed: int
    ) -> list[str]:
        prompt = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": row.question}], tokenize=False, add_generation_prompt=True
        )
        request = GenerateRequest(
            request_id=f"demo-{uuid4().hex}",
            token_ids=self._tokenizer(prompt, add_special_tokens=False)["input_ids"],
            n=num_answers,
            sampling=Sampling(max_tokens=self._max_tokens, temperature=temperature, seed=seed),
        )
        reply = await self._client.generate(request)
        return [
            self._tokenizer.decode(sample.token_ids, skip_special_tokens=True)
            for sample in reply.samples
        ]

    async def _score(
        self, rows: Sequence[AdditionRow], answers: Sequence[Sequence[str]]
    ) -> list[float | None]:
        pairs = [(row, text) for row, texts in zip(rows, answers, strict=True) for text in texts]
        return await asyncio.gather(*(self._score_one(row, text) for row, text in pairs))

    async def _score_one(self, row: AdditionRow, answer: str) -> float | None:
        try:
            result = await self._reward.score(prompt=row.question, response=answer, label=row.label)
        except RewardUnavailable:
            return None
        return result.value


def _mean(scores: Sequence[float | None]) -> float:
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known else float("nan")
