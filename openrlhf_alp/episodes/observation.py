"""From the result of a program to the ids that the policy reads next.

The policy's own ids are never touched: an observation is what a person would have typed in between,
encoded by itself and appended. What stands around it comes from the model's chat template, or is a
plain fence for a base model:

    plain   [the policy's turn] ```output NEWLINE 42 NEWLINE ``` NEWLINE
    chat    [the policy's turn] END_OF_TURN USER ```output NEWLINE 42 NEWLINE ``` END ASSISTANT
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

Encode = Callable[[str], Sequence[int]]
"""Turns text into ids; it adds no special token."""

_OPEN, _CLOSE = "```output\n", "\n```"
_ANSWER, _OUTPUT = "THE-ANSWER-STANDS-HERE", "THE-OUTPUT-STANDS-HERE"

_TRACEBACK = "Traceback (most recent call last):"
_FRAME = re.compile(r'^  File "', re.MULTILINE)


class CodeStatus(StrEnum):
    """How a program ended. The policy sees all of these; faults of the sandbox never reach it."""

    OK = "ok"
    ERROR = "error"
    """An uncaught exception."""
    EXIT = "exit"
    """A non-zero exit code."""
    TIMEOUT = "timeout"
    CPU_LIMIT = "cpu_limit"
    MEMORY_LIMIT = "memory_limit"
    OUTPUT_LIMIT = "output_limit"
    CRASHED = "crashed"
    REJECTED = "rejected"
    """Not runnable as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeResult:
    """What a program printed and how it ended."""

    status: CodeStatus
    stdout: str = ""
    stderr: str = ""
    result: str | None = None
    """repr of a cell's last expression, in sessions."""
    message: str = ""
    """Cause, for limits and for code that was rejected."""
    run_s: float = 0.0
    """Wall time of the program itself."""


def render_result(result: CodeResult, *, max_chars: int) -> str:
    """What the policy reads: output, the cause of a failure, each cut in its middle.

    stderr is shown when the program failed or printed nothing else: warnings of a library do not
    push out a result. Of a traceback the last frame and the exception stay.
    """
    parts = [cut_middle(result.stdout.rstrip(), max_chars)]
    if result.result is not None:
        parts.append(cut_middle(result.result, max_chars))
    failed = result.status is not CodeStatus.OK
    if failed or not any(parts):
        parts.append(cut_middle(last_frame(result.stderr).rstrip(), max_chars))
    if failed and result.status is not CodeStatus.ERROR:
        parts.append(f"[{result.message or result.status}]")
    shown = "\n".join(part for part in parts if part)
    return shown or "[nothing was printed]"


def cut_middle(text: str, max_chars: int) -> str:
    """`text` with its middle replaced by a marker that says how much is missing."""
    if len(text) <= max_chars:
        return text
    head, tail = max_chars - max_chars // 2, max_chars // 2
    missing = len(text) - head - tail
    return f"{text[:head]}\n[... {missing} characters left out ...]\n{text[-tail:]}"


def last_frame(stderr: str) -> str:
    """The last traceback with its innermost frame only; other text before it is kept."""
    before, found, traceback = stderr.rpartition(_TRACEBACK)
    frames = list(_FRAME.finditer(traceback))
    if not found or len(frames) < 2:
        return stderr
    return f"{before}{_TRACEBACK}\n  ...\n{traceback[frames[-1].start() :]}"


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
