"""The records of an episode, and the one statement of the token axis.

T is the number of tokens of the whole episode: prompt, sampled answers and, with tools,
observations, in the order in which the engine saw them. Three fields share the axis:

    token_ids    (T,) int
    logprobs     (T,) float32 values; 0.0 where action_mask is False
    action_mask  (T,) bool; True where the policy sampled the token, also an end-of-sequence

Predictions live on (T - 1,): the logits at position t - 1 predict token t. The learner makes that
shift in one function; nothing in this package knows about it.

Ids are decoded into text for people, rewards and the parser of code blocks. The text is never
encoded again.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from typing import Any, Literal

VoidPolicy = Literal["trajectory", "turn", "off"]
"""What a void turn removes from the loss: its whole episode (the authors' code), the turn alone, or
nothing. What is removed counts in neither the ratio, the loss nor its normaliser; the episode's
reward still counts in its group's baseline."""


class EpisodeError(Exception):
    """An episode cannot be trained on. The message names the request."""


class BadCompletionError(EpisodeError):
    """The engine's reply cannot be trained on (NaN, missing, empty, cut short)."""


class ToolLostError(EpisodeError):
    """Code could not be run, and the policy is not to blame: drop the group and count it.

    Attributes:
        reason: short stable name, used as a metric (for example `tool_sandbox_error`).
    """

    def __init__(self, *, reason: str, detail: str) -> None:
        super().__init__(f"code could not be run ({reason}): {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[Any, ...]:
        # Ray pickles exceptions, and by default pickle rebuilds one from positional arguments only.
        return partial(ToolLostError, reason=self.reason, detail=self.detail), ()


class StopReason(StrEnum):
    """Why the policy stopped. Every episode has exactly one."""

    EOS = "eos"
    """The policy sampled an end-of-sequence token. The token is an action and is trained on."""

    STOP = "stop"
    """A stop string or an extra stop token of the request ended the answer."""

    LENGTH = "length"
    """The token budget ran out in the middle of the answer: the episode is truncated."""

    TOOL_LIMIT = "tool_limit"
    """The policy asked for one tool call more than the limit; that call was not run."""

    NO_ROOM = "no_room"
    """The token budget has no room for a program's output and an answer: truncated."""


class TurnKind(StrEnum):
    """Who wrote a stretch of tokens."""

    PROMPT = "prompt"
    """The task, as the caller tokenised it."""

    ACTION = "action"
    """The policy. Only these positions are trained on."""

    OBSERVATION = "observation"
    """The environment, for example the output of a tool. The policy reads it; it is never trained
    on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """How one answer is sampled. Every field is sent, because a default of the server would change
    the sampling distribution, and so the log-probs."""

    temperature: float = 1.0
    """Divides the logits; 0 is greedy. Reported log-probs are those after this division."""

    top_p: float = 1.0
    """Nucleus mass in (0, 1]. Below 1 the engine's distribution is not the learner's."""

    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""

    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one; 0 drops none."""

    repetition_penalty: float = 1.0
    """Divides the logits of seen tokens; 1 changes nothing."""

    max_tokens: int
    """At most this many sampled tokens, the end-of-sequence token included."""

    min_tokens: int = 0
    """Forbid the end of sequence before this many tokens. Above 0 the engine's distribution is not
    the learner's."""

    stop: tuple[str, ...] = ()
    """Strings after which the answer ends."""

    stop_token_ids: tuple[int, ...] = ()
    """Token ids, in addition to the end of sequence, after which the answer ends."""

    seed: int | None = None
    """Makes a request repeatable on the same engine and batch; None draws a fresh seed."""

    def __post_init__(self) -> None:
        longest = self.max_tokens
        checks = (
            ("temperature", self.temperature, self.temperature >= 0, "0 or above"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (all tokens) or above"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "above 0"),
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, "1 or above"),
            ("min_tokens", self.min_tokens, 0 <= self.min_tokens <= longest, f"in [0, {longest}]"),
        )
        for name, given, is_right, required in checks:
            if not is_right:
                raise ValueError(f"{name}={given!r} is not possible: it must be {required}")


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSpan:
    """Tokens start..end (half-open) were sampled by one version of the policy.

    In a Completion the positions count sampled tokens; in an Episode they are on its axis.
    """

    version: int
    """Number of weight updates the rollout service had applied."""

    digest: str
    """Digest of the weights of that version."""

    start: int
    end: int

    def shifted(self, offset: int) -> "VersionSpan":
        """The same span on an axis that begins `offset` tokens earlier."""
        return replace(self, start=self.start + offset, end=self.end + offset)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What an engine sampled for one request, N tokens long."""

    token_ids: tuple[int, ...]
    """(N,) every sampled id: end of sequence, stop token and the tokens of a stop string too."""

    logprobs: tuple[float, ...]
    """(N,) float32 values: log mu(token) under the distribution that the engine sampled from."""

    finish_reason: str
    """As the engine reports it: `stop`, `length`, or another word for an unfinished request."""

    stop_reason: int | str | None = None
    """With `stop`: the stop token or string that ended it; None for end of sequence."""

    spans: tuple[VersionSpan, ...]
    """Versions that sampled positions 0..N, in order and without gaps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A stretch start..end (half-open) of the episode's axis, written by one party."""

    kind: TurnKind
    start: int
    end: int
    text: str
    """Decoded without special tokens; for an observation the program's output alone, without the
    fence and the template around it."""

    void: bool = False
    """An ACTION turn that neither calls a tool nor gives a final answer (paper, appendix E)."""

    finish_reason: str = ""
    """Of an ACTION turn: `Completion.finish_reason` of its last request."""

    stop: str = ""
    """Of an ACTION turn: the stop string or token id that ended it; empty for end of sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """One piece of code that was run, as metrics and transcripts show it."""

    code: str
    status: str
    """How it ended: a value of `observation.CodeStatus`."""

    total_s: float
    """From the request to the result, with queueing and retries."""

    run_s: float
    """The part of `total_s` in which the code ran."""

    output: str = ""
    """What the policy was shown of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where an episode's time went, in seconds."""

    generate_s: float
    """Waiting for the rollout service, with queueing."""

    reward_s: float
    """Waiting for the reward, with queueing."""

    tool_s: float = 0.0
    """Waiting for the tool service, with queueing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """One finished episode on the token axis of the module docstring."""

    request_id: str
    """The caller's id, for logs and for re-attaching to the rollout service."""

    prompt: str
    """The dataset's string, unchanged: OpenRLHF uses it as a key."""

    label: str
    """The correct answer, as the dataset gives it."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    action_mask: tuple[bool, ...]

    turns: tuple[Turn, ...]
    """Cover the axis from 0 to T in order; ACTION turns are where action_mask is True."""

    spans: tuple[VersionSpan, ...]
    """Cover exactly the ACTION turns, in order."""

    stop_reason: StopReason
    reward: float

    reward_detail: Mapping[str, float] = field(default_factory=dict)
    """Named numbers for metrics: the same names, in the same order, for every episode."""

    tool_calls: tuple[ToolCall, ...] = ()
    """Code that was run, in order."""

    timings: Timings

    def __post_init__(self) -> None:
        _check_lengths(self)
        _check_turns(self)
        _check_logprobs(self)
        _check_spans(self)
        if not math.isfinite(self.reward):
            raise EpisodeError(
                f"request {self.request_id}: the reward is {self.reward}. A reward that cannot be "
                "computed must raise RewardUnavailable, so that the group is dropped and counted"
            )

    def trained_ranges(self, void: VoidPolicy) -> list[tuple[int, int]]:
        """Half-open (start, end) of the ACTION turns that enter the loss, as OpenRLHF wants them.

        The list is empty for a void episode under `trajectory`.
        """
        if void == "trajectory" and self.void:
            return []
        return [
            (turn.start, turn.end)
            for turn in self.turns
            if turn.kind is TurnKind.ACTION and not (void == "turn" and turn.void)
        ]

    @property
    def action_ranges(self) -> tuple[tuple[int, int], ...]:
        """Half-open (start, end) of every ACTION turn."""
        return tuple(self.trained_ranges("off"))

    @property
    def num_actions(self) -> int:
        """Number of sampled tokens."""
        return sum(self.action_mask)

    @property
    def truncated(self) -> bool:
        """Whether the token budget, not the policy, ended the episode."""
        return self.stop_reason in (StopReason.LENGTH, StopReason.NO_ROOM)

    @property
    def void(self) -> bool:
        """Whether some turn of the policy has neither a tool call nor a final answer."""
        return any(turn.void for turn in self.turns)

    @property
    def min_version(self) -> int:
        """The oldest policy version that sampled a token of this episode."""
        return min(span.version for span in self.spans)

    @property
    def max_version(self) -> int:
        """The newest policy version that sampled a token of this episode."""
        return max(span.version for span in self.spans)


def _check_lengths(episode: Episode) -> None:
    lengths = (len(episode.token_ids), len(episode.logprobs), len(episode.action_mask))
    if len(set(lengths)) != 1:
        raise EpisodeError(
            f"request {episode.request_id}: token_ids, logprobs and action_mask share one axis, "
            f"but have lengths {lengths}"
        )
    if not any(episode.action_mask):
        raise EpisodeError(
            f"request {episode.request_id}: no token was sampled, nothing to train on"
        )


def _check_turns(episode: Episode) -> None:
    # Every token belongs to exactly one turn: a gap or an overlap would train on tool output.
    position = 0
    for turn in episode.turns:
        is_action = turn.kind is TurnKind.ACTION
        stretch = episode.action_mask[turn.start : turn.end]
        agrees = all(sampled is is_action for sampled in stretch)
        if not (turn.start == position <= turn.end and agrees):
            raise EpisodeError(
                f"request {episode.request_id}: {turn.kind} turn {turn.start}..{turn.end} does not "
                f"follow position {position}, or disagrees with action_mask"
            )
        position = turn.end
    if position != len(episode.token_ids):
        raise EpisodeError(
            f"request {episode.request_id}: turns end at {position}, "
            f"tokens at {len(episode.token_ids)}"
        )


def _check_logprobs(episode: Episode) -> None:
    pairs = zip(episode.logprobs, episode.action_mask, strict=True)
    for position, (logprob, is_action) in enumerate(pairs):
        if is_action and not math.isfinite(logprob):
            raise EpisodeError(
                f"request {episode.request_id}: log-prob {logprob} at sampled position {position}"
            )
        if not is_action and logprob != 0.0:
            raise EpisodeError(
                f"request {episode.request_id}: position {position} was not sampled, "
                f"its log-prob must be 0.0 and is {logprob}"
            )


def _check_spans(episode: Episode) -> None:
    # Staleness is counted per token: each sampled token has a version, and no other token has one.
    stamped = [position for span in episode.spans for position in range(span.start, span.end)]
    sampled = [position for position, is_action in enumerate(episode.action_mask) if is_action]
    if stamped != sampled:
        raise EpisodeError(
            f"request {episode.request_id}: version spans cover {len(stamped)} positions, "
            f"{len(sampled)} tokens were sampled; they must be the same positions in order"
        )
