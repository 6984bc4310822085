"""Finds the code in the policy's text, as CommonMark reads it, and the prose around it.

The policy writes a fenced block, and its result comes back as one:

    ```python                       ```output
    print(6 * 7)                    42
    ```                             ```

A fence has three or more backticks or tildes, may be indented, for example in a list, and its lines
may end in CR LF; its first word names the language in any case. Only closed Python blocks are run.
A block that was never closed is code too.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock, fence
from markdown_it.token import Token

FENCE_STOPS = tuple(mark * 3 + end for mark in "`~" for end in ("\n", "\r", " ", "\t"))
"""End a request after a closing fence of any length and indentation. They also match a bare opening
fence and a fence inside a line; `ends_in_code` tells whether the turn is over."""

LINE_STOPS = ("\n", "\r")
"""End a request that only completes a line, for example the blanks after a closing fence."""

_PYTHON = re.compile(r"[{.\s]*(?:python3?|py3?|ipython3?)(?![\w-])", re.IGNORECASE)
"""The info string of a block that is run, also with attributes: `{.python .numberLines}`."""

_BOXED = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*(?:\{\s*[^\s}]|[-+\\\w])")
_CODE_INDENT = 4  # CommonMark: a line indented this far opens and closes no fence


def find_code(text: str) -> str | None:
    """Return the code of a turn: its closed Python blocks, in order; None when there is none.

    An empty block is a call too: the policy is told that nothing was printed.
    """
    closed = [block for block in _blocks(text) if block.meta["closed"]]
    codes = [block.content for block in closed if _PYTHON.match(block.info)]
    return "\n".join(codes) if codes else None


def ends_in_code(text: str) -> bool:
    """Return whether a Python block is closed and the line of its closing fence is complete."""
    # In "``` x" the fence closes nothing, so the verdict waits for the end of the line.
    complete = text[: max(map(text.rfind, LINE_STOPS)) + 1]
    return find_code(complete) is not None


def without_code(text: str) -> str:
    """Return the policy's prose, with a blank line in place of each block of code."""
    lines = _lines(text)
    for block in reversed(_blocks(text)):
        lines[slice(*block.map or ())] = [""]
    return "\n".join(lines)


def answer_text(turns: Sequence[str]) -> str:
    """Return what a final answer may be read from: the prose of all turns, in order.

    A turn with a block that was never closed gives no answer: it was cut before it reached one.
    """
    # Code becomes a blank line, so that boxes around it stay in separate paragraphs: otherwise
    # a corrected answer would be read together with the first one, as a set.
    return "\n".join(without_code(turn) for turn in turns if not _is_cut(turn))


def has_boxed_answer(text: str) -> bool:
    """Return whether a turn's prose holds a \\boxed{...} or \\fbox{...} that is not empty."""
    return _BOXED.search(answer_text([text])) is not None


def _is_cut(text: str) -> bool:
    return not all(block.meta["closed"] for block in _blocks(text))


def _lines(text: str) -> list[str]:
    # The parser counts lines after the same replacement.
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


@lru_cache(maxsize=64)  # each turn is asked several questions
def _blocks(text: str) -> tuple[Token, ...]:
    """Return the fenced blocks of `text`, in order; `map` holds their half-open range of lines."""
    blocks = [token for token in _PARSER.parse(text) if token.type == "fence"]
    # An empty fence at the end of a text, with no language, has opened nothing.
    return tuple(b for b in blocks if b.meta["closed"] or b.info.strip() or b.content.strip())


class _FromContainer:
    """The indentation of lines, in columns, measured from the container of a fence."""

    def __init__(self, columns: Sequence[int], base: int) -> None:
        self._columns = columns
        self._base = base

    def __getitem__(self, line: int) -> int:
        # The parser marks a line that only continues a paragraph by -1.
        columns = self._columns[line]
        return columns if columns < 0 else max(columns - self._base, 0)


def _fence(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """CommonMark's rule for fences, more tolerant of how models indent.

    A fence opens at any indentation, and the lines of a block may stand to the left of the list
    item that holds it. Adds `closed` to the token's metadata.
    """
    columns, container = state.sCount, state.blkIndent
    indent = columns[start]
    base = container if indent - container < _CODE_INDENT else indent
    state.sCount, state.blkIndent = _FromContainer(columns, base), 0  # type: ignore[assignment]
    try:
        found = fence(state, start, end, silent)
    finally:
        state.sCount, state.blkIndent = columns, container
    if not found or silent:
        return found
    token, last = state.tokens[-1], state.line - 1
    tail = state.src[state.bMarks[last] + state.tShift[last] : state.eMarks[last]].strip()
    closed = (
        last > start
        and columns[last] - base < _CODE_INDENT
        and len(tail) >= len(token.markup)
        and not tail.strip(token.markup[0])
    )
    token.meta["closed"] = closed
    after_code = last if closed else last + 1
    # Code that does not follow the indentation of its fence keeps all of its own: its first line
    # says which of the two it is.
    first = next((columns[i] for i in range(start + 1, after_code) if not state.isEmpty(i)), 0)
    token.content = state.getLines(start + 1, after_code, min(indent, first), True)
    return True


def _one_line(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """Take one line of prose, so that a fence may open on the next one at any indentation.

    CommonMark's paragraphs would take indented lines too, and lines after a quote into the quote.
    """
    state.line = start + 1
    return True


def _parser() -> MarkdownIt:
    # Containers and fences are all that decides what is code. Without HTML blocks, a fence right
    # after a tag such as <think> is found too.
    parser = MarkdownIt("zero").enable(["code", "blockquote", "list"])
    parser.core.ruler.enableOnly(["normalize", "block"])
    alternatives = {"alt": ["paragraph", "blockquote", "list"]}
    # Before `code`, which takes every line that is indented by four columns.
    parser.block.ruler.before("code", "indented_fence", _fence, alternatives)  # type: ignore[arg-type]
    parser.block.ruler.at("paragraph", _one_line, {"alt": ["blockquote"]})
    return parser


_PARSER = _parser()
