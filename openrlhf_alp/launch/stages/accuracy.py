"""Accuracy on held-out questions: episodes over the running services, played as training does."""

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from openrlhf_alp.clients.rollout import RolloutClient
from openrlhf_alp.data.tasks import Question
from openrlhf_alp.episodes.protocols import EpisodeRunner, Task
from openrlhf_alp.episodes.records import Episode, SamplingConfig, ToolLostError
from openrlhf_alp.rewards.math import MathReward
from openrlhf_alp.rewards.protocol import RewardUnavailable
from openrlhf_alp.rollouts.runners import ServiceGenerate, ToolConfig, build_runner, tool_client
from services.common.wire import API_KEY_VARIABLE, TOOL_KEY_VARIABLE


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


_SAMPLES_PER_QUESTION = 8
_CHECK_EVERY_S = 0.5
_REQUEST_S = 1800.0


def measure_accuracy(
    rows: Sequence[Question],
    *,
    model: Path,
    rollout_urls: Sequence[str],
    tool_urls: Sequence[str],
    flags: Mapping[str, Any],
    keys: Mapping[str, str],
    seed: int,
    check_services: Callable[[], None],
) -> Accuracy:
    """Plays every question of `rows`, greedily and at temperature 1.

    Args:
        model: folder of the tokenizer, which turns questions into the ids that training uses.
        tool_urls: URLs of tool services; without one episodes have one turn.
        flags: of the trainer; those of the episodes count here too.
        keys: the services' keys, under the names of their environment variables.
        seed: seed of the first episode; each later one adds 1.
        check_services: called every half second; raises when a service has ended. The client
            cannot tell that from a slow one and would retry for minutes.

    Raises:
        ServiceError: a service refuses a request or does not answer.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    episode_flags = {
        name: value
        for flag, value in flags.items()
        for prefix, _, name in (flag.partition("."),)
        if prefix in ("tool", "tir")
    }
    tool = ToolConfig(**{**episode_flags, "urls": tuple(tool_urls), "template": "chat"})
    max_tokens = int(flags["rollout.max_new_tokens"])

    async def measure() -> Accuracy:
        async with AsyncExitStack() as stack:
            rollouts = RolloutClient(rollout_urls, api_key=keys[API_KEY_VARIABLE])
            await stack.enter_async_context(rollouts)
            tools = tool_client(tool, keys[TOOL_KEY_VARIABLE]) if tool.urls else None
            if tools:
                await stack.enter_async_context(tools)
            reward = MathReward()
            stack.callback(reward.close)
            runner = build_runner(
                generate=ServiceGenerate(client=rollouts, deadline_s=_REQUEST_S),
                reward=reward,
                tokenizer=tokenizer,
                tool=tool,
                client=tools,
            )
            examination = asyncio.create_task(
                examine(rows, runner=runner, tokenizer=tokenizer, max_tokens=max_tokens, seed=seed)
            )
            while not examination.done():
                await asyncio.wait([examination], timeout=_CHECK_EVERY_S)
                check_services()
            return examination.result()

    return asyncio.run(measure())


async def examine(
    rows: Sequence[Question],
    *,
    runner: EpisodeRunner,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    seed: int,
) -> Accuracy:
    """Plays greedy episodes first, then sampled ones. No two episodes share a seed."""
    seeds = itertools.count(seed)

    async def play(row: Question, temperature: float, seed: int) -> Episode | None:
        chat = [{"role": "user", "content": row.question}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        # The template has written the special tokens; a second begin token would be off-policy.
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        try:
            return await runner(
                request_id=f"launch-{uuid4().hex}",
                task=Task(prompt=row.question, label=row.label, prompt_ids=prompt_ids),
                sampling=SamplingConfig(max_tokens=max_tokens, temperature=temperature, seed=seed),
            )
        except (RewardUnavailable, ToolLostError):
            return None

    async def play_all(rows: Sequence[Question], temperature: float) -> list[Episode | None]:
        return await asyncio.gather(*(play(row, temperature, next(seeds)) for row in rows))

    greedy = await play_all(rows, 0.0)
    sampled = await play_all([row for row in rows for _ in range(_SAMPLES_PER_QUESTION)], 1.0)
    return Accuracy(
        greedy=_share_right(greedy),
        sampled=_share_right(sampled),
        num_not_scored=[*greedy, *sampled].count(None),
        greedy_episodes=tuple(greedy),
    )


def _share_right(episodes: Sequence[Episode | None]) -> float:
    rewards = [episode.reward for episode in episodes if episode is not None]
    # Not 0.0: that would read as "every answer was wrong".
    return sum(rewards) / len(rewards) if rewards else float("nan")
