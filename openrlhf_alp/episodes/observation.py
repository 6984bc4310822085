"""From the result of a program to the ids that the policy reads next.

The policy's own ids are never changed: an observation is appended to them, as if a person had typed
it. What stands around it comes from the model's chat template, or is a plain fence for a base
model:

    plain   [the policy's turn] ```output NEWLINE 42 NEWLINE ``` NEWLINE
    chat    [the policy's turn] END_OF_TURN USER ```output NEWLINE 42 NEWLINE ``` END ASSISTANT
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any, Protocol

Encode = Callable[[str], Sequence[int]]
"""Turns text into ids; it adds no special token."""

_OPEN, _CLOSE = "```output\n", "\n```"
_ANSWER, _OUTPUT = "THE-ANSWER-STANDS-HERE", "THE-OUTPUT-STANDS-HERE"
_LEADS = ("", "\n", ".", "x")
_BLANKS = " \t\r\n\u2581"  # the last one is SentencePiece's space

_TRACEBACK = "Traceback (most recent call last):"
_FRAME = re.compile(r'^  File "', re.MULTILINE)


class CodeStatus(StrEnum):
    """How a program ended. The policy sees all of these; failures of the sandbox never reach it."""

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
    """The service does not run it, for example because it is too long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeResult:
    """What a program printed and how it ended."""

    status: CodeStatus
    stdout: str = ""
    stderr: str = ""
    result: str | None = None
    """The repr of a cell's last expression, in sessions."""
    message: str = ""
    """The cause, for limits and for code that was rejected."""
    run_s: float = 0.0
    """Wall time of the program itself."""


def render_result(result: CodeResult, *, max_chars: int) -> str:
    """Return what the policy reads: output and the cause of a failure, each cut in its middle.

    stderr is shown only when the program failed or printed nothing else, so that a library's
    warnings do not use up the tokens of a result. Of a traceback, the last frame and the exception
    are kept.
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
    """Return `text` with its middle replaced by a marker that says how much is missing."""
    if len(text) <= max_chars:
        return text
    head, tail = max_chars - max_chars // 2, max_chars // 2
    missing = len(text) - head - tail
    return f"{text[:head]}\n[... {missing} characters left out ...]\n{text[-tail:]}"


def last_frame(stderr: str) -> str:
    """Return the last traceback with its innermost frame only; text before it is kept."""
    before, found, traceback = stderr.rpartition(_TRACEBACK)
    frames = list(_FRAME.finditer(traceback))
    if not found or len(frames) < 2:
        return stderr
    return f"{before}{_TRACEBACK}\n  ...\n{traceback[frames[-1].start() :]}"


class ChatTokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is needed here."""

    name_or_path: str
    added_tokens_decoder: dict[int, Any]
    """Id to token, for all tokens that are matched before the rest of a text is encoded. The lists
    of special tokens are incomplete: none of them holds Gemma 3's `<end_of_turn>`."""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...

    def encode(self, text: str, **options: Any) -> list[int]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservationTemplate:
    """What stands around an observation. It is the same for every episode of a run."""

    end_of_turn_ids: tuple[int, ...] = ()
    """Closes the policy's turn; appended unless the policy has sampled the last of these ids. Empty
    for the plain form."""

    before_ids: tuple[int, ...] = ()
    """Ids after the end of the turn, up to the last control token before the output."""

    open_text: str = _OPEN
    close_text: str = f"{_CLOSE}\n"
    """Text around the output. It is encoded together with the output, because tokenizers merge
    characters across the border, for example a bracket and a new line."""

    after_ids: tuple[int, ...] = ()
    """Ids from the first control token after the output."""

    begins_line: bool = True
    """Whether a new line is added in front when the policy's turn did not end with one."""

    lead: str = ""
    """Text that is encoded in front and whose ids are dropped again, for tokenizers that encode the
    start of a text in a special way."""

    def observation_ids(
        self, output: str, *, encode: Encode, sampled_ids: Sequence[int], sampled_text: str
    ) -> list[int]:
        """Return the ids to append after a turn of the policy.

        Args:
            output: what the policy shall read.
            encode: encodes the output. The text of a special token in it must stay plain text, so
                that a program cannot print the end of a turn.
            sampled_ids, sampled_text: the turn that asked for the output.
        """
        # A turn that the policy ended itself must not be ended twice.
        closing = () if self._is_closed(sampled_ids) else self.end_of_turn_ids
        begin = self.lead
        if self.begins_line and not sampled_text.endswith("\n"):
            begin += "\n"
        ids = encode(f"{begin}{self.open_text}{output}{self.close_text}")
        num_lead = len(encode(self.lead)) if self.lead else 0
        return [*closing, *self.before_ids, *ids[num_lead:], *self.after_ids]

    def own_ids(self, sampled_ids: Sequence[int]) -> Sequence[int]:
        """Return the ids of a turn without the end that the policy sampled.

        It is no text of the policy, and some tokenizers do not count it among the special tokens
        that they leave out: a closing fence would then end in `<|im_end|>` and close nothing.
        """
        return sampled_ids[:-1] if self._is_closed(sampled_ids) else sampled_ids

    def _is_closed(self, sampled_ids: Sequence[int]) -> bool:
        return bool(self.end_of_turn_ids and sampled_ids) and (
            sampled_ids[-1] == self.end_of_turn_ids[-1]
        )


def plain_template(tokenizer: ChatTokenizer) -> ObservationTemplate:
    """Return the form for a base model: the output in a fence, after which the policy continues."""
    return ObservationTemplate()


def chat_template(tokenizer: ChatTokenizer) -> ObservationTemplate:
    """Return the form for a chat model: the output is a message of the user.

    The model's own template renders a conversation in which the output follows an answer. What it
    writes between the two, and after them, is what an episode appends.

    Raises:
        ValueError: the tokenizer has no chat template, or one whose conversations an episode cannot
            continue without changing sampled ids.
    """
    turns = [
        {"role": "user", "content": "question"},
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": f"{_OPEN}{_OUTPUT}{_CLOSE}"},
    ]
    render = partial(tokenizer.apply_chat_template, tokenize=False)
    try:
        whole = render(turns, add_generation_prompt=True)
        before, after = whole.split(_ANSWER)[1].split(_OUTPUT)
        at_the_end = render(turns[:2], add_generation_prompt=False).split(_ANSWER)[1]
    except Exception as error:
        raise _refused(
            tokenizer, f"cannot show a tool's output as a user message: {error}"
        ) from error
    control = _control_pattern(tokenizer, whole + at_the_end)
    first, last = (control.search(text) for text in (before, at_the_end))
    # gpt-oss samples <|return|>, which must become <|end|> when the conversation continues.
    if last and (first is None or first[0].strip() != last[0].strip()):
        inside = first[0].strip() if first else "no token"
        raise _refused(
            tokenizer, f"ends the last message with {last[0].strip()}, but others with {inside}"
        )
    # Some tokenizers put a space in front of any text; the first lead that hides it is taken.
    for lead in _LEADS:
        template = _around_output(tokenizer, control, before, after, lead)
        appended = template.observation_ids(
            _OUTPUT, encode=partial(_ids, tokenizer), sampled_ids=(), sampled_text=""
        )
        if tuple(appended) == _ids(tokenizer, whole)[-len(appended) :]:
            return template
    raise _refused(tokenizer, "is encoded in other ids as a whole than message by message")


def _around_output(
    tokenizer: ChatTokenizer, control: re.Pattern[str], before: str, after: str, lead: str
) -> ObservationTemplate:
    """Split at control tokens, the only borders across which no tokenizer merges characters."""
    ends = [match.end() for match in control.finditer(before)]
    begin = ends[-1] if ends else 0
    start = match.start() if (match := control.search(after)) else len(after)
    before_ids = _ids(tokenizer, before[:begin])
    first_control = match.end() if (match := control.search(before)) else 0
    num_closing = len(_ids(tokenizer, before[:first_control]))
    return ObservationTemplate(
        end_of_turn_ids=before_ids[:num_closing],
        before_ids=before_ids[num_closing:],
        open_text=before[begin:],
        close_text=after[:start],
        after_ids=_ids(tokenizer, after[start:]),
        begins_line=False,
        lead=lead,
    )


def _control_pattern(tokenizer: ChatTokenizer, text: str) -> re.Pattern[str]:
    """Match the control tokens that occur in `text`, each with the blanks that it absorbs."""
    # Gemma's table also holds runs of new lines and spaces. They are no borders: a longer run is
    # another token.
    found = [
        token
        for token in tokenizer.added_tokens_decoder.values()
        if token.content in text and token.content.strip(_BLANKS)
    ]
    patterns = (
        r"\s*" * token.lstrip + re.escape(token.content) + r"\s*" * token.rstrip
        # The longest first, as tokenizers match: one token's text may begin with another's.
        for token in sorted(found, key=lambda token: -len(token.content))
    )
    return re.compile("|".join(patterns) or r"(?!)")


def _ids(tokenizer: ChatTokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def _refused(tokenizer: ChatTokenizer, reason: str) -> ValueError:
    name = tokenizer.name_or_path or "this tokenizer"
    return ValueError(
        f"the chat template of {name} {reason}. Fix: --tir.template plain, or give the tokenizer "
        "another chat template."
    )
