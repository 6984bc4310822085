"""Where published problem sets keep the problem and its answer.

A format names fields: dots descend into objects, `A+B` joins two fields with a space, and of
several names, the first filled one is used. Of chat messages, the last user message is used.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openrlhf_alp.data.labels import label_texts
from openrlhf_alp.data.sources import DataError, Row, source_stem
from openrlhf_alp.rewards.labels import LabelNotParsableError

IMAGE_TAG = "<image>"
"""OpenRLHF replaces it in a prompt by a picture."""

_ROWS_LOOKED_AT = 100
"""Number of rows in which a field is searched, because the first rows may leave it empty."""

_INSTRUCTIONS = re.compile(
    r"""
    ^\s*solve\ the\ following\ math\ problem\ step\ by\ step\.\ the\ last\ line\ .{0,200}?
        answer\ to\ the\ problem\.
    | remember\ to\ put\ your\ answer\ on\ its\ own\ line\ after\ "answer:"\.?\s*$
    | (?:please|(?:please\ reason|let's\ think)\ step\ by\ step,?\ and)
        \ (?:put|output)\ (?:your|the)\ final
        \ answer\ (?:within|in)\ (?:\\\\?boxed\{\}|\$\\boxed\{\}\$)\.?\s*$
    """,
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)
"""Instructions that DAPO-Math, Guru and Qwen add to a problem. They ask for other answer forms than
our templates do, and they hide that two sets contain the same problem."""


class UnknownFormatError(DataError):
    """No format fits the rows; the message lists the fields found and the fields known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFormat:
    """The fields of one kind of problem set."""

    name: str
    found_in: str
    """Data sets of this kind, for help texts."""

    problem: tuple[str, ...]
    label: tuple[str, ...]
    id: tuple[str, ...] = ("id", "unique_id", "ID", "idx", "extra_info.index")

    def fits(self, rows: Iterable[Mapping[str, Any]]) -> bool:
        """Whether some row has a problem and some row has a label."""
        seen = list(rows)
        return all(
            any(first_filled(row, fields) is not None for row in seen)
            for fields in (self.problem, self.label)
        )

    @property
    def fields(self) -> str:
        """The fields of such a row, for messages."""
        return f"{' or '.join(self.problem)}, with {' or '.join(self.label)}"


FORMATS = {
    row_format.name: row_format
    for row_format in (
        RowFormat(
            name="simplerl",
            found_in="SimpleRL, SimpleRL-Zoo",
            problem=("question",),
            label=("gt_answer", "ground_truth_answer"),
        ),
        RowFormat(
            name="rstar2",
            found_in="rStar2-Agent, DAPO-Math, Guru: the rows of verl",
            problem=("extra_info.question", "prompt"),
            label=("reward_model.ground_truth",),
        ),
        RowFormat(
            name="deepscaler",
            found_in="DeepScaleR, MATH, AIME, OlympiadBench, Minerva",
            problem=("problem",),
            label=("answer", "gt"),
        ),
        RowFormat(
            name="plain",
            found_in="files of this command's own kind, GSM8K, SVAMP",
            problem=("input", "Body+Question", "question"),
            label=("label", "answer", "Answer"),
        ),
    )
}
"""In the order in which `auto` tries them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A problem and its answer, without a prompt."""

    text: str
    """Empty when the row has none."""

    labels: tuple[str, ...]
    """The answer, or the members of a list of answers. Empty when the row has none."""

    label_fault: str
    """Why the label cannot be read; empty when it can."""

    datasource: str
    id: str
    had_instructions: bool
    """Whether instructions on the form of the answer were removed from the text."""

    row: Row

    @property
    def label(self) -> str:
        """The answer; the first of several."""
        return self.labels[0]


def plain_format(problem_field: str, label_field: str) -> RowFormat:
    """Returns the format of a file whose fields the user names."""
    return RowFormat(
        name="plain", found_in="your fields", problem=(problem_field,), label=(label_field,)
    )


def detect_format(rows: Sequence[Row]) -> RowFormat:
    """Returns the first format that fits the first rows.

    Raises:
        UnknownFormatError: none fits.
    """
    objects = [row.content for row in rows[:_ROWS_LOOKED_AT] if isinstance(row.content, dict)]
    # In their order: rows of verl have the fields of other formats, too.
    for row_format in FORMATS.values():
        if row_format.fits(objects):
            return row_format
    raise UnknownFormatError(_unknown(rows[0].source, objects))


def check_format(row_format: RowFormat, rows: Sequence[Row]) -> None:
    """Checks that the format named by the user fits the first rows.

    Raises:
        UnknownFormatError: it does not fit.
    """
    objects = [row.content for row in rows[:_ROWS_LOOKED_AT] if isinstance(row.content, dict)]
    if not row_format.fits(objects):
        raise UnknownFormatError(
            f"{_unknown(rows[0].source, objects)}\n"
            f"asked for was {row_format.name}: {row_format.fields}"
        )


def to_problem(row: Row, row_format: RowFormat) -> Problem:
    """Extracts problem, labels, data source and id from a row whose content is an object."""
    text = text_of(first_filled(row.content, row_format.problem))
    problem = without_instructions(text)
    datasource = first_filled(row.content, ("data_source", "datasource", "extra_info.data_source"))
    given_id = first_filled(row.content, row_format.id)
    labels: tuple[str, ...] = ()
    label_fault = ""
    try:
        labels = label_texts(first_filled(row.content, row_format.label))
    except LabelNotParsableError as error:
        label_fault = str(error)
    return Problem(
        text=problem,
        labels=labels,
        label_fault=label_fault,
        datasource=str(datasource or source_stem(row.source)),
        id=f"{source_stem(row.source)}:{row.number}" if given_id is None else str(given_id),
        had_instructions=problem != text.strip(),
        row=row,
    )


def without_instructions(text: str) -> str:
    """Returns a problem without what its set adds on the form of the answer."""
    return _INSTRUCTIONS.sub("", text).strip()


def _unknown(source: str, objects: Sequence[Mapping[str, Any]]) -> str:
    names = sorted({name for row in objects for name in row})
    lines = [
        f"{source}: no format fits. Its rows have the fields: {', '.join(names) or '(no objects)'}",
        *(f"  {known.name:<10} needs {known.fields}" for known in FORMATS.values()),
        "Name the fields yourself: --problem-field NAME --label-field NAME",
    ]
    return "\n".join(lines)


def first_filled(row: Mapping[str, Any], fields: Iterable[str]) -> Any:
    """Returns the value of the first field that is present and filled, otherwise None."""
    for field in fields:
        parts = [_descend(row, name) for name in field.split("+")]
        if None not in parts:
            return parts[0] if len(parts) == 1 else " ".join(map(text_of, parts))
    return None


def _descend(row: Any, path: str) -> Any:
    for name in path.split("."):
        if not isinstance(row, Mapping):
            return None
        row = row.get(name)
    return None if isinstance(row, (str, list)) and not row else row


def text_of(value: Any) -> str:
    """Returns a text, the last user message of a chat, or the text parts of such a message."""
    # Parquet through numpy gives arrays where JSON gives lists.
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, (list, tuple)):
        said = [m for m in value if isinstance(m, Mapping) and m.get("role") == "user"]
        return text_of(said[-1].get("content")) if said else "\n".join(map(_part, value))
    return value if isinstance(value, str) else ""


def _part(part: Any) -> str:
    """Returns the text of one part of a message, `{"type": "text", "text": ...}`."""
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, Mapping) else None
    # A part without text is a picture or a sound, without which the problem cannot be asked.
    return text if isinstance(text, str) else IMAGE_TAG
