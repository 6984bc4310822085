"""Which kind of episode a prompt becomes, and what of it is logged and trained on.

flags -> EpisodeRunner -> Episode -> to_response -> OpenRLHF's Experience
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from openrlhf_alp.clients.channel import Timeouts
from openrlhf_alp.clients.tool import ToolClient
from openrlhf_alp.episodes.observation import (
    ObservationTemplate,
    chat_template,
    plain_template,
)
from openrlhf_alp.episodes.protocols import Generate
from openrlhf_alp.episodes.records import Episode, SamplingConfig
from openrlhf_alp.episodes.single_turn import run_single_turn
from openrlhf_alp.episodes.tool_integrated import run_tool_integrated
from openrlhf_alp.episodes.void import VoidPolicy, trained_ranges
from openrlhf_alp.learner.flags.tool import ToolConfig
from openrlhf_alp.rewards.protocol import Reward
from openrlhf_alp.rollouts.interpreter import SessionInterpreter, StatelessInterpreter
from openrlhf_alp.rollouts.metrics import tool_metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One prompt of the dataset, tokenised."""

    prompt: str
    label: str
    prompt_ids: Sequence[int]

    @classmethod
    def tokenized(cls, *, prompt: str, label: str, tokenizer: Any) -> Task:
        """The prompt's ids as OpenRLHF makes them: no special token is added."""
        ids = tokenizer(text=prompt, add_special_tokens=False)["input_ids"]
        return cls(prompt=prompt, label=label, prompt_ids=ids)

    def budget(self, *, max_length: int, max_tokens: int | None) -> int:
        """Tokens that may follow the prompt; below 1 where it leaves no room.

        Args:
            max_length: of prompt and answer together.
            max_tokens: of the answer; None bounds it by `max_length` alone.
        """
        room = max_length - len(self.prompt_ids)
        return min(max_tokens or room, room)


class EpisodeRunner(Protocol):
    """Plays one episode; the same runner serves every prompt of a run."""

    async def __call__(
        self, *, request_id: str, task: Task, sampling: SamplingConfig
    ) -> Episode: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SingleTurnRunner:
    """One prompt, one answer."""

    generate: Generate
    reward: Reward
    tokenizer: Any

    async def __call__(self, *, request_id: str, task: Task, sampling: SamplingConfig) -> Episode:
        return await run_single_turn(
            request_id=request_id,
            prompt=task.prompt,
            label=task.label,
            prompt_ids=task.prompt_ids,
            generate=self.generate,
            decode=partial(self.tokenizer.decode, skip_special_tokens=True),
            reward=self.reward,
            sampling=sampling,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolIntegratedRunner:
    """Reason, run code, read, answer; `sampling.max_tokens` is the budget of the episode."""

    generate: Generate
    reward: Reward
    client: ToolClient
    tool: ToolConfig
    tokenizer: Any
    template: ObservationTemplate

    async def __call__(self, *, request_id: str, task: Task, sampling: SamplingConfig) -> Episode:
        interpreter = SessionInterpreter if self.tool.session else StatelessInterpreter
        return await run_tool_integrated(
            request_id=request_id,
            prompt=task.prompt,
            label=task.label,
            prompt_ids=task.prompt_ids,
            generate=self.generate,
            interpreter=interpreter(self.client, timeout_s=self.tool.timeout_s),
            # A special token that a program prints stays plain text.
            encode=partial(
                self.tokenizer.encode, add_special_tokens=False, split_special_tokens=True
            ),
            decode=partial(self.tokenizer.decode, skip_special_tokens=True),
            template=self.template,
            reward=self.reward,
            sampling=sampling,
            config=self.tool.limits(max_tokens=sampling.max_tokens),
        )


def build_runner(
    *,
    generate: Generate,
    reward: Reward,
    tokenizer: Any,
    tool: ToolConfig,
    client: ToolClient | None,
) -> EpisodeRunner:
    """The runner that the flags ask for: tool-integrated when there is a tool service."""
    if client is None:
        return SingleTurnRunner(generate=generate, reward=reward, tokenizer=tokenizer)
    template = chat_template if tool.template == "chat" else plain_template
    return ToolIntegratedRunner(
        generate=generate,
        reward=reward,
        client=client,
        tool=tool,
        tokenizer=tokenizer,
        template=template(tokenizer),
    )


def tool_client(tool: ToolConfig, key: str) -> ToolClient:
    """Connections to the tool services, with the time limits of the flags."""
    limit_s = tool.request_timeout_s
    timeouts = Timeouts(read_s=limit_s, total_s=limit_s)
    return ToolClient(tool.urls, api_key=key, timeouts=timeouts)


def to_response(episode: Episode, *, tool: ToolConfig | None = None) -> dict[str, Any]:
    """The dictionary that OpenRLHF's `_process_response_into_experience` reads.

    Args:
        tool: of a tool-integrated run; adds its metrics and leaves void turns out of the loss.
    """
    void: VoidPolicy = tool.void if tool else "off"
    return {
        "prompt": episode.prompt,
        "label": episode.label,
        "observation_tokens": list(episode.token_ids),
        "action_ranges": trained_ranges(episode, void),
        "rollout_log_probs": list(episode.logprobs),
        "reward": episode.reward,
        "scores": episode.reward,
        "truncated": episode.truncated,
        "token_versions": [(span.version, span.end - span.start) for span in episode.spans],
        "extra_logs": {
            "rollout/policy_version": float(episode.max_version),
            **{f"reward/{name}": value for name, value in episode.reward_detail.items()},
            **(tool_metrics(episode, tool) if tool else {}),
        },
    }
