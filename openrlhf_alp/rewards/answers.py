"""Finds the final answer in a policy's text. docs/grading.md states the rule.

1. Code blocks are not searched: neither closed ones nor one that was never closed.
2. The last `\\boxed{}` or `\\fbox{}` is the answer. Boxes count together only where one sentence
   lists them: "\\boxed{3}, \\boxed{5} and \\boxed{7}". Boxes on different lines are never joined.
3. Without a box: what follows the last "final answer is", "answer:" or `####`, otherwise the last
   formula or number of the text.
"""

import functools
import re
from dataclasses import dataclass

from markdown_it import MarkdownIt

_MAX_TEXT_CHARS = 400_000
"""Only the end of a longer text is searched: a policy that never stops must not stop the reward."""

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*")
_UNBRACED = re.compile(r"[-+]?\d+(?:\.\d+)?|[A-Za-z]|\\[A-Za-z]+")

_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
"""An escaped brace of `\\{1, 2\\}` is skipped."""

_BETWEEN_BOXES = re.compile(
    r"(?:[ \t$&*]|\\[,;:! ()]|\\q?quad|\\(?:text|mbox|textrm|textbf)\{[ ,]*(?:and|or)?[ ,]*\}"
    r"|[,;]|\b(?:and|or)\b|[A-Za-z](?:_\{?\w\}?)?[ ]*=)*"
)
_LISTS = re.compile(r"[,;&]|\b(?:and|or)\b")

_FINAL = re.compile(r"(?i)\bfinal\s+answer\b[^\n.]{0,100}?(?:\bis\b|:)\s*\**:?|####")
_ANSWER = re.compile(r"(?i)\banswers?\b(?:[^\n.:=]{0,60}?\b(?:is|are)\b|\s*\**\s*[:=])\s*\**:?")

_SPAN = re.compile(
    r"\$\$(?P<dollars>.+?)\$\$|\\\[(?P<bracket>.+?)\\\]|\\\((?P<paren>.+?)\\\)"
    r"|(?<![\\\d])\$(?P<dollar>(?:\\.|[^$\n\\])+)\$",
    re.DOTALL,
)

_NUMBER = (
    r"(?:\\?[$\u20ac\u00a3\u00a5\u20b9]\s?)?"
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d{1,3}(?: \d{3})+(?!\d)(?:\.\d+)?"
    r"|\d+[\u00bc-\u00be\u2150-\u215e]|[\u00bc-\u00be\u2150-\u215e]"
    r"|\d+\.(?=/\d)|\d+(?:\.\d+)?(?:[eE][-+]?\d+(?![A-Za-z\d]))?|\.\d+"
    r"|\\[dt]?frac\s?\{[^{}]*\}\{[^{}]*\}|\\sqrt\{[^{}]*\}|\\pi)"
)
_OPERATOR = (
    r"(?:\s*(?:\*\*|[-+*/^\u00d7\u00f7\u00b7=:\u2212]|\\times|\\cdot|\\div|[xX](?=\s*10\b))\s*[-+\u2212]?\(?"
    r"|\s+(?=\d+\s*/\s*\d))"
)
_EXPRESSION = re.compile(
    rf"(?<![\w.\\}}])[-+\u2212]?\(?{_NUMBER}[)!]?(?:{_OPERATOR}{_NUMBER}[)!]?)*\s?\\?%?"
)
_LIST_WORD = re.compile(r"\s*(?:,\s*(?:and|or)\b|,|;|\band\b|\bor\b)\s*")

_LEAD_IN = re.compile(
    r"(?i)[\s${*]*(?:\\(?:text|textbf|mbox|mathrm)\s*\{\s*)?(?:(?:so|thus|hence|therefore),?\s+)?"
    r"(?:(?:the\s+)?(?:final\s+)?answer\s*)?(?:is|=|:|equals|about|approximately)?[\s:${}*]*"
)
"""What may stand before it: after "more than" or "not", the number is not the answer."""

_MORE = re.compile(r"(?i)\b(?:and|or|to|not|but|through|between|versus)\b")

_SENTENCE_END = re.compile(r"[.!?](?=\s|\*|$)|\n")


@dataclass(frozen=True, slots=True)
class _Found:
    """A piece of text that may be an answer, with its place."""

    start: int
    end: int
    content: str


def final_answer(text: str, *, several: bool = False) -> str | None:
    """Returns the text of the final answer, or None when there is none.

    Args:
        text: what the policy wrote, without tool output.
        several: the label lists several answers, so that a sentence without a box may list them
            too. Otherwise the last number of such a sentence is its answer.
    """
    prose = outside_code(text[-_MAX_TEXT_CHARS:])
    # A box outranks any sentence: the prompts ask for one.
    if boxes := _boxes(prose):
        return _joined(prose, boxes)
    # The last one, because a policy may correct itself.
    anchors = list(_FINAL.finditer(prose)) or list(_ANSWER.finditer(prose))
    if anchors and (segment := _segment(prose, anchors[-1].end())):
        return segment
    return _last_expression(prose, several)


def leading_expression(sentence: str) -> str | None:
    """Returns the number of "7 apples, as shown" or "7, since 3 + 4 = 7", but none of "7 or 8"."""
    found = _expressions(sentence)
    if not found or not _LEAD_IN.fullmatch(sentence[: found[0].start]):
        return None
    between = sentence[found[0].end : found[1].start] if len(found) > 1 else ""
    goes_on = len(found) > 1 and (not re.search(r"\w", between) or _MORE.search(between))
    return None if goes_on else found[0].content


def outside_code(text: str) -> str:
    """Returns the text without its Markdown code blocks; an unclosed one reaches to the end."""
    if "```" not in text and "~~~" not in text:
        return text
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    for token in _markdown().parse("\n".join(lines)):
        if token.type == "fence" and token.map:
            begin, end = token.map
            # An empty line stays: boxes before and after the block must not look adjacent.
            lines[begin:end] = [""] * (end - begin)
    return "\n".join(lines)


@functools.cache
def _markdown() -> MarkdownIt:
    # Indented text stays prose, because solutions indent formulas. HTML and link definitions would
    # hide a fence, and what stands inside a paragraph does not matter here.
    return MarkdownIt("commonmark").disable(["code", "html_block", "reference", "inline"])


def last_box(text: str) -> str | None:
    """Returns the content of the last box, as the answer of a reference solution."""
    boxes = _boxes(text)
    return boxes[-1].content if boxes else None


def _boxes(text: str) -> list[_Found]:
    """Returns the outermost boxes. A box that is not closed was cut off and is none."""
    boxes = []
    position = 0
    closing = _closing_braces(text) if _BOX.search(text) else {}
    while match := _BOX.search(text, position):
        position = match.end()
        if text[position : position + 1] == "{":
            end = closing.get(position)
            if end is None:
                continue
            boxes.append(_Found(match.start(), end + 1, text[position + 1 : end].strip()))
            position = end + 1
        elif bare := _UNBRACED.match(text, position):
            boxes.append(_Found(match.start(), bare.end(), bare[0]))
            position = bare.end()
    return boxes


def _closing_braces(text: str) -> dict[int, int]:
    """Maps each closed brace to its end, in one pass: a search per box takes quadratic time."""
    closing = {}
    opened = []
    for match in _BRACE.finditer(text):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            closing[opened.pop()] = match.start()
    return closing


def _joined(text: str, boxes: list[_Found]) -> str:
    """Returns the last box, or the boxes that one sentence lists before it."""
    listed = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        between = text[box.end : listed[0].start]
        if not (_BETWEEN_BOXES.fullmatch(between) and _LISTS.search(between)):
            break
        listed.insert(0, box)
    # "\\boxed{4}, that is \\boxed{4}" is one answer that was repeated.
    return ", ".join(dict.fromkeys(box.content for box in listed))


def _segment(text: str, start: int) -> str | None:
    """Returns the rest of the sentence, or the next line that is not empty."""
    rest = text[start:].lstrip(" \t*:_")
    if not rest.strip():
        return None
    rest = rest.lstrip()
    if span := _SPAN.match(rest):
        return _listed_spans(rest, span)
    end = _SENTENCE_END.search(rest)
    return (rest[: end.start()] if end else rest).strip(" \t*_`") or None


def _listed_spans(text: str, first: re.Match[str]) -> str:
    contents = [_content(first)]
    position = first.end()
    while (word := _LIST_WORD.match(text, position)) and (span := _SPAN.match(text, word.end())):
        contents.append(_content(span))
        position = span.end()
    return ", ".join(contents)


def _content(span: re.Match[str]) -> str:
    return next(group for group in span.groups() if group is not None)


def _last_expression(text: str, several: bool) -> str | None:
    found = _expressions(text)
    if not found:
        return None
    listed = [found[-1]]
    for one in reversed(found[:-1]) if several else ():
        if not _LIST_WORD.fullmatch(text[one.end : listed[0].start]):
            break
        listed.insert(0, one)
    return ", ".join(one.content for one in listed)


def _expressions(text: str) -> list[_Found]:
    """Returns formulas and plain expressions in order; what stands inside a formula is not one."""
    spans = [_Found(m.start(), m.end(), _content(m)) for m in _SPAN.finditer(text)]
    plain = []
    position = 0
    for span in [*spans, _Found(len(text), len(text), "")]:
        for match in _EXPRESSION.finditer(text, position, span.start):
            plain.append(_Found(match.start(), match.end(), match[0].strip()))
        position = span.end
    return sorted([*spans, *plain], key=lambda one: one.start)
