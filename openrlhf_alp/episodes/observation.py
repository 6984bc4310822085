"""From the output of a tool to the ids that the policy reads next.

The policy's own ids are never touched: an observation is what a person would have typed in between,
encoded by itself and appended. What stands around it comes from the model's chat template, or is a
plain fence for a base model:

    plain   [the policy's turn] ```output NEWLINE 42 NEWLINE ``` NEWLINE
    chat    [the policy's turn] END_OF_TURN USER ```output NEWLINE 42 NEWLINE ``` END ASSISTANT
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from openrlhf_alp.episodes.protocols import Encode

_OPEN, _CLOSE = "```output\n", "\n```"
_ANSWER, _OUTPUT = "THE-ANSWER-STANDS-HERE", "THE-OUTPUT-STANDS-HERE"


class ChatTokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is needed here."""

    all_special_ids: list[int]

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...

    def encode(self, text: str, **options: Any) -> list[int]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservationTemplate:
    """The ids around an observation. Encoded once: every episode of a run has the same."""

    end_of_turn_ids: tuple[int, ...]
    """Closes the policy's turn; appended when the policy was stopped before it sampled that. Empty
    for the plain form."""
    newline_ids: tuple[int, ...]
    """Begins a new line, for the plain form, when the policy did not."""
    before_ids: tuple[int, ...]
    after_ids: tuple[int, ...]

    def observation_ids(
        self, output: str, *, encode: Encode, sampled_ids: Sequence[int], sampled_text: str
    ) -> list[int]:
        """Ids to append after a turn of the policy.

        Args:
            output: what the policy shall read.
            encode: encodes `output`; a special token spelled out in it must stay plain text, so
                that a program cannot print the end of a turn.
            sampled_ids, sampled_text: the turn that asked for it.
        """
        gap: tuple[int, ...] = ()
        if self.end_of_turn_ids:
            closed = tuple(sampled_ids[-len(self.end_of_turn_ids) :]) == self.end_of_turn_ids
            gap = () if closed else self.end_of_turn_ids
        elif not sampled_text.endswith("\n"):
            gap = self.newline_ids
        return [*gap, *self.before_ids, *encode(output), *self.after_ids]


def plain_template(tokenizer: ChatTokenizer) -> ObservationTemplate:
    """For a base model: the output in a fence of its own, then the policy goes on writing."""
    return ObservationTemplate(
        end_of_turn_ids=(),
        newline_ids=_ids(tokenizer, "\n"),
        before_ids=_ids(tokenizer, _OPEN),
        after_ids=_ids(tokenizer, f"{_CLOSE}\n"),
    )


def chat_template(tokenizer: ChatTokenizer) -> ObservationTemplate:
    """For a chat model: the output is a message of the user, as the model's template writes it.

    Raises:
        ValueError: the tokenizer has no chat template, or one that alters what it is given.
    """
    conversation = [
        {"role": "user", "content": "question"},
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": f"{_OPEN}{_OUTPUT}{_CLOSE}"},
    ]
    try:
        text = tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True
        )
        between = text.split(_ANSWER)[1]
        before, after = between.split(_OUTPUT)
    except Exception as error:
        raise ValueError(
            f"the tokenizer's chat template cannot show a tool's output as a user message ({error})"
            ". Fix: --tir.template plain, or give the tokenizer a chat template."
        ) from error
    before_ids = _ids(tokenizer, before)
    num_closing = 1 if before_ids[0] in tokenizer.all_special_ids else 0
    return ObservationTemplate(
        end_of_turn_ids=before_ids[:num_closing],
        newline_ids=(),
        before_ids=before_ids[num_closing:],
        after_ids=_ids(tokenizer, after),
    )


def _ids(tokenizer: ChatTokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))
