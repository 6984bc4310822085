"""Accuracy on held-out questions: episodes over the running services, played as training does."""

import asyncio
import itertools
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from openrlhf_alp.clients.rollout import RolloutClient
from openrlhf_alp.data.tasks import Question
from openrlhf_alp.episodes.records import Episode, SamplingConfig, ToolLostError
from openrlhf_alp.learner.flags.tool import ToolConfig
from openrlhf_alp.rewards.math import MathReward
from openrlhf_alp.rewards.protocol import RewardUnavailable
from openrlhf_alp.rollouts.generate import ServiceGenerate
from openrlhf_alp.rollouts.runners import EpisodeRunner, Task, build_runner, tool_client

_SAMPLES_PER_QUESTION = 8
_GREEDY, _SAMPLED = 0.0, 1.0
_CHECK_EVERY_S = 0.5
_REQUEST_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """The running services and their keys."""

    rollout_url: str
    rollout_key: str
    tool: ToolConfig = field(default_factory=ToolConfig)
    """Without URLs the episodes have one turn."""
    tool_key: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """How many held-out questions were answered right."""

    greedy: float
    """Share in [0, 1] with the most likely tokens, one episode a question."""

    sampled: float
    """Share in [0, 1] at temperature 1, several episodes a question."""

    num_not_scored: int
    """Episodes whose reward could not be computed; they count in neither share."""

    greedy_episodes: tuple[Episode | None, ...]
    """In the order of the questions; None where there is no reward."""


def measure_accuracy(
    rows: Sequence[Question],
    *,
    model: Path,
    services: Services,
    max_tokens: int,
    seed: int,
    check_services: Callable[[], None],
) -> Accuracy:
    """Plays every question of `rows`, greedily and at temperature 1.

    Args:
        model: folder of the tokenizer, which turns questions into the ids training uses.
        max_tokens: budget of an episode after its prompt.
        seed: of the sampled answers.
        check_services: called every half second; raises when a service is gone, which the client
            cannot know and would retry for minutes.

    Raises:
        ServiceError: a service refuses a request or does not answer.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)

    async def measure() -> Accuracy:
        reward = MathReward()
        async with AsyncExitStack() as stack:
            stack.callback(reward.close)
            client = await stack.enter_async_context(
                RolloutClient([services.rollout_url], api_key=services.rollout_key)
            )
            tool = services.tool
            runner = build_runner(
                generate=ServiceGenerate(client=client, deadline_s=_REQUEST_S),
                reward=reward,
                tokenizer=tokenizer,
                tool=tool,
                client=await stack.enter_async_context(tool_client(tool, services.tool_key))
                if tool.urls
                else None,
            )
            examiner = Examiner(runner, tokenizer, max_tokens=max_tokens, seed=seed)
            examination = asyncio.create_task(examiner.examine(rows))
            while not examination.done():
                await asyncio.wait([examination], timeout=_CHECK_EVERY_S)
                check_services()
            return examination.result()

    return asyncio.run(measure())


class Examiner:
    """Asks every question and counts the right answers."""

    def __init__(
        self,
        runner: EpisodeRunner,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_tokens: int,
        seed: int,
    ) -> None:
        self._run = runner
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._seeds = itertools.count(seed)

    async def examine(self, rows: Sequence[Question]) -> Accuracy:
        """Greedy episodes first, then sampled ones; no two share a seed."""
        greedy = await self._play_all(rows, _GREEDY)
        repeated = [row for row in rows for _ in range(_SAMPLES_PER_QUESTION)]
        sampled = await self._play_all(repeated, _SAMPLED)
        return Accuracy(
            greedy=_share_right(greedy),
            sampled=_share_right(sampled),
            num_not_scored=[*greedy, *sampled].count(None),
            greedy_episodes=tuple(greedy),
        )

    async def _play_all(self, rows: Sequence[Question], temperature: float) -> list[Episode | None]:
        played = (self._play(row, temperature, next(self._seeds)) for row in rows)
        return list(await asyncio.gather(*played))

    async def _play(self, row: Question, temperature: float, seed: int) -> Episode | None:
        prompt = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": row.question}], tokenize=False, add_generation_prompt=True
        )
        prompt_ids = self._tokenizer(prompt, add_special_tokens=False)["input_ids"]
        try:
            return await self._run(
                request_id=f"demo-{uuid4().hex}",
                task=Task(prompt=row.question, label=row.label, prompt_ids=prompt_ids),
                sampling=SamplingConfig(
                    max_tokens=self._max_tokens, temperature=temperature, seed=seed
                ),
            )
        except (RewardUnavailable, ToolLostError):
            return None


def _share_right(episodes: Sequence[Episode | None]) -> float:
    rewards = [episode.reward for episode in episodes if episode is not None]
    return sum(rewards) / len(rewards) if rewards else float("nan")
