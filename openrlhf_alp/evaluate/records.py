"""One answer as it is stored, and one grade. Both are lines of JSON in the run folder."""

from __future__ import annotations

import array
import base64
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from openrlhf_alp.episodes.records import Episode, TurnKind

AnswerKey = tuple[str, int]
"""Id of the problem, and number of the answer from 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaidTurn:
    """What one party wrote, decoded."""

    kind: str
    """A value of `episodes.records.TurnKind`."""
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One finished episode: what is graded, and what names the weights that wrote it."""

    problem_id: str
    sample: int
    """From 0 to n - 1."""

    response: str
    """The policy's own words, exactly as the reward of training gets them."""

    turns: tuple[SaidTurn, ...]
    stop_reason: str
    truncated: bool
    void: bool
    num_tokens: int
    """Sampled tokens."""

    tool_calls: tuple[str, ...]
    """How each program ended: values of `observation.CodeStatus`."""

    token_ids: str
    """(T,) ids of the whole episode: base64 of little-endian int32."""

    logprobs: str
    """(T,) log-probs of the sampled tokens, 0.0 elsewhere: base64 of little-endian float32."""

    action_ranges: tuple[tuple[int, int], ...]
    """Half-open stretches of the T positions that the policy sampled."""

    versions: tuple[tuple[int, str], ...]
    """Version and digest of the weights that sampled it; one pair unless they changed meanwhile."""

    generate_s: float
    tool_s: float

    @property
    def key(self) -> AnswerKey:
        return self.problem_id, self.sample

    @classmethod
    def of(cls, episode: Episode, *, problem_id: str, sample: int, response: str) -> Answer:
        """The record of an episode."""
        spans = dict.fromkeys((span.version, span.digest) for span in episode.spans)
        return cls(
            problem_id=problem_id,
            sample=sample,
            response=response,
            turns=tuple(
                SaidTurn(kind=turn.kind.value, text=turn.text)
                for turn in episode.turns
                if turn.kind is not TurnKind.PROMPT
            ),
            stop_reason=episode.stop_reason.value,
            truncated=episode.truncated,
            void=episode.void,
            num_tokens=episode.num_actions,
            tool_calls=tuple(call.status for call in episode.tool_calls),
            token_ids=pack("i", episode.token_ids),
            logprobs=pack("f", episode.logprobs),
            action_ranges=episode.action_ranges,
            versions=tuple(spans),
            generate_s=episode.timings.generate_s,
            tool_s=episode.timings.tool_s,
        )

    def to_json(self) -> dict[str, Any]:
        """A line of the store."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Answer:
        """Reads a line of the store.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        return cls(
            **{
                **fields,
                "turns": tuple(SaidTurn(**turn) for turn in fields["turns"]),
                "tool_calls": tuple(fields["tool_calls"]),
                "action_ranges": tuple((start, end) for start, end in fields["action_ranges"]),
                "versions": tuple((version, digest) for version, digest in fields["versions"]),
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Grade:
    """The verdict on one answer."""

    right: bool | None
    """None when it could not be graded, which is neither right nor wrong."""

    answer: str | None
    """The final answer as the text spells it; None when there is none."""

    choice: str | None = None
    """The same in one spelling: what a majority votes on."""

    unevaluated: bool = False
    """Equal to the label only once its sums are worked out; such an answer is wrong."""

    reason: str | None = None
    """Why it could not be graded: a name of `MathReward.counts`."""

    detail: str = ""


def pack(code: str, values: Sequence[float]) -> str:
    """base64 of little-endian numbers: `i` int32, `f` float32. A third of the size of JSON."""
    block = array.array(code, values)
    if sys.byteorder == "big":
        block.byteswap()
    return base64.b64encode(block.tobytes()).decode("ascii")


def unpack(code: str, text: str) -> list[Any]:
    """The numbers that `pack` wrote."""
    block = array.array(code)
    block.frombytes(base64.b64decode(text))
    if sys.byteorder == "big":
        block.byteswap()
    return block.tolist()
