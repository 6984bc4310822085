"""Builds an episode on its token axis, turn by turn: ids are only ever appended."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from openrlhf_alp.episodes.records import (
    BadCompletionError,
    Completion,
    Episode,
    StopReason,
    Timings,
    ToolCall,
    Turn,
    TurnKind,
    VersionSpan,
)
from openrlhf_alp.rewards.protocol import RewardResult


@dataclass(slots=True, kw_only=True)
class Transcript:
    """What prompt, policy and tools have said so far.

    `token_ids` is the prompt of the engine's next request.
    """

    request_id: str
    prompt: str
    label: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    action_mask: list[bool] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    spans: list[VersionSpan] = field(default_factory=list)
    tool_calls: list[ToolCall] = field(default_factory=list)
    _finish_reason: str = field(default="", init=False)
    _stop: str = field(default="", init=False)

    @classmethod
    def begin(
        cls, *, request_id: str, prompt: str, label: str, prompt_ids: Sequence[int]
    ) -> "Transcript":
        """Return a transcript that holds the prompt.

        Raises:
            ValueError: the prompt has no tokens.
        """
        if not prompt_ids:
            raise ValueError(f"request {request_id}: the prompt has no tokens")
        transcript = cls(request_id=request_id, prompt=prompt, label=label)
        transcript._add_unsampled(TurnKind.PROMPT, prompt_ids, prompt)
        return transcript

    @property
    def num_after_prompt(self) -> int:
        """Number of tokens of all kinds after the prompt."""
        return len(self.token_ids) - self.turns[0].end

    @property
    def open_ids(self) -> list[int]:
        """Ids sampled since the last turn was closed."""
        return self.token_ids[self.turns[-1].end :]

    def add_sampled(self, completion: Completion, *, request_id: str) -> StopReason:
        """Append what the policy sampled and return why it stopped; `close_turn` makes it a turn.

        Args:
            request_id: names the engine's request in errors; an episode may need several.

        Raises:
            BadCompletionError: the reply is empty or unfinished, or lacks a finite log-prob.
        """
        stop_reason = _check(completion, request_id)
        # A completion's spans count its own tokens; from here on they are on the episode's axis.
        offset = len(self.token_ids)
        self.token_ids += completion.token_ids
        self.logprobs += completion.logprobs
        self.action_mask += [True] * len(completion.token_ids)
        self.spans += [span.shifted(offset) for span in completion.spans]
        self._finish_reason = completion.finish_reason
        self._stop = "" if completion.stop_reason is None else str(completion.stop_reason)
        return stop_reason

    def close_turn(self, text: str, *, void: bool = False) -> None:
        """Make one ACTION turn of everything sampled since the last turn."""
        self.turns.append(
            Turn(
                kind=TurnKind.ACTION,
                start=self.turns[-1].end,
                end=len(self.token_ids),
                text=text,
                void=void,
                finish_reason=self._finish_reason,
                stop=self._stop,
            )
        )

    def add_observation(self, token_ids: Sequence[int], text: str) -> None:
        """Append what the environment said: its log-probs are 0.0 and it is never trained on."""
        self._add_unsampled(TurnKind.OBSERVATION, token_ids, text)

    def episode(
        self, *, stop_reason: StopReason, reward: RewardResult, timings: Timings
    ) -> Episode:
        """Return the finished, checked record.

        Raises:
            EpisodeError: no token was sampled, or the record breaks the token axis.
        """
        return Episode(
            request_id=self.request_id,
            prompt=self.prompt,
            label=self.label,
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs),
            action_mask=tuple(self.action_mask),
            turns=tuple(self.turns),
            spans=tuple(self.spans),
            stop_reason=stop_reason,
            reward=reward.value,
            reward_detail=reward.detail,
            tool_calls=tuple(self.tool_calls),
            timings=timings,
        )

    def _add_unsampled(self, kind: TurnKind, token_ids: Sequence[int], text: str) -> None:
        start = len(self.token_ids)
        self.token_ids += token_ids
        self.logprobs += [0.0] * len(token_ids)
        self.action_mask += [False] * len(token_ids)
        self.turns.append(Turn(kind=kind, start=start, end=len(self.token_ids), text=text))


def _check(completion: Completion, request_id: str) -> StopReason:
    """Return why the answer ended, after checking that it can be trained on."""
    num_sampled = len(completion.token_ids)
    if num_sampled == 0:
        raise BadCompletionError(f"request {request_id}: the engine returned no tokens")
    if len(completion.logprobs) != num_sampled:
        raise BadCompletionError(
            f"request {request_id}: log-prob missing at sampled position "
            f"{min(len(completion.logprobs), num_sampled)}: the engine returned {num_sampled} "
            f"tokens and {len(completion.logprobs)} log-probs"
        )
    for position, logprob in enumerate(completion.logprobs):
        if not math.isfinite(logprob):
            raise BadCompletionError(
                f"request {request_id}: log-prob {logprob} at sampled position {position} (token "
                f"{completion.token_ids[position]}). Usual causes: the pushed weights contain NaN, "
                "or the engine overflowed in half precision. Check the last update's gradient norm"
            )
    if completion.finish_reason == "length":
        return StopReason.LENGTH
    if completion.finish_reason == "stop":
        # The engine names a stop string or token, but not the model's own end of sequence.
        return StopReason.EOS if completion.stop_reason is None else StopReason.STOP
    raise BadCompletionError(
        f"request {request_id}: the engine ended it with {completion.finish_reason!r} after "
        f"{num_sampled} tokens, before the answer was finished"
    )
