"""What an episode is asked to do, and what it asks of the outside world.

The reward's protocol is in `rewards/protocol.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from openrlhf_alp.episodes.observation import CodeResult
from openrlhf_alp.episodes.records import Completion, Episode, SamplingConfig

Decode = Callable[[Sequence[int]], str]
"""Turns sampled ids into text for people and rewards, without special tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One prompt of the dataset, tokenised."""

    prompt: str
    label: str
    prompt_ids: Sequence[int]

    @classmethod
    def tokenized(cls, *, prompt: str, label: str, tokenizer: Any) -> "Task":
        """Return the task with the ids that OpenRLHF makes: no special token is added."""
        # A chat template has already written the begin-of-sequence token into the text; adding it
        # here would double it.
        ids = tokenizer(text=prompt, add_special_tokens=False)["input_ids"]
        return cls(prompt=prompt, label=label, prompt_ids=ids)

    def budget(self, *, max_length: int, max_tokens: int | None) -> int:
        """Return how many tokens may follow the prompt; below 1 when it leaves no room.

        Args:
            max_length: limit of prompt and answer together.
            max_tokens: limit of the answer; None leaves it to `max_length` alone.
        """
        room = max_length - len(self.prompt_ids)
        return min(max_tokens or room, room)


class EpisodeRunner(Protocol):
    """Plays one episode; one runner serves every prompt of a run.

    Raises:
        BadCompletionError: a reply is empty or unfinished, or lacks a finite log-prob.
        ToolLostError: code could not be run, and the policy is not to blame.
        RewardUnavailable: the reward could not be computed.
        Exception: whatever `Generate` raises after its own retries.
    """

    async def __call__(
        self, *, request_id: str, task: Task, sampling: SamplingConfig
    ) -> Episode: ...


class Generate(Protocol):
    """Samples one continuation of token ids."""

    async def __call__(
        self, *, request_id: str, prompt_ids: Sequence[int], sampling: SamplingConfig
    ) -> Completion:
        """Return the sampled tokens, after as many retries as the implementation chooses.

        `request_id` makes a retry idempotent: the same id and body give the same answer.
        """
        ...


class Interpreter(Protocol):
    """Runs the code of one episode; it is opened and closed with the episode."""

    async def run(self, code: str) -> CodeResult:
        """Run `code` once and return how it ended; a failing program is a result.

        Raises:
            ToolLostError: the code could not be run, after as many retries as the implementation
                chooses.
        """
        ...

    async def close(self) -> None:
        """Free what the interpreter holds."""
        ...
