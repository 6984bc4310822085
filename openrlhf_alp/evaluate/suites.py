"""The registry of problem sets, and how one is read: every problem exactly once, or an error."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from openrlhf_alp.data.formats import first_filled, text_of
from openrlhf_alp.data.labels import label_texts
from openrlhf_alp.data.sources import LOCAL_SUFFIXES, DataError, Row, SourceError, read_rows
from openrlhf_alp.rewards.answers import last_box
from openrlhf_alp.rewards.labels import LabelNotParsableError
from openrlhf_alp.rewards.values import Tolerance
from services.rollout.wire.fingerprint import object_hash

_REGISTRY = Path(__file__).with_name("suites.toml")
_BOXED = "boxed:"
_LONGEST_NAME = 100
"""Letters of a file's name that become the name of its set, and of files of a run."""
_LISTED = 10
"""Rows that an error names one by one."""


class SuiteError(DataError):
    """A problem set cannot be evaluated on; the message names the rows and the fix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """One problem set: where it is read and which fields hold what. See suites.toml."""

    name: str
    title: str
    source: str
    problem: tuple[str, ...]
    label: tuple[str, ...]
    revision: str | None = None
    split: str = "test"
    files: tuple[str, ...] = ()
    id: tuple[str, ...] = ()
    subject: tuple[str, ...] = ()
    level: tuple[str, ...] = ()
    solution: tuple[str, ...] = ()
    unit: tuple[str, ...] = ()
    error: tuple[str, ...] = ()
    size: int | None = None
    """Number of problems; None for a user's own file."""

    relative: float = 0.0
    """Relative tolerance of numeric answers."""

    corrections: Mapping[str, str] = field(default_factory=dict)
    """Labels by the text that stands in their place in the published set."""

    answer_form: str = ""
    licence: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One problem of a set."""

    id: str
    text: str
    label: str
    tolerance: Tolerance | None
    subject: str | None
    level: str | None
    solution: str | None
    """The reference solution, where the set has one; only the grader's own check uses it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedSuite:
    """A problem set as it is asked."""

    suite: Suite
    problems: tuple[Problem, ...]
    origin: str
    """The file, or the Hugging Face id with its revision."""

    is_whole: bool
    """False under `--limit`."""

    @property
    def name(self) -> str:
        return self.suite.name

    @property
    def title(self) -> str:
        title = self.suite.title
        return title if self.is_whole else f"{title} (first {len(self.problems)})"

    @property
    def digest(self) -> str:
        """Hash of ids, problems, labels and tolerances: equal digests ask and grade the same."""
        return object_hash([[p.id, p.text, p.label, _numbers(p.tolerance)] for p in self.problems])


@cache
def registry() -> tuple[dict[str, Suite], dict[str, tuple[str, ...]]]:
    """The suites and the groups of suites.toml, by name."""
    tables = tomllib.loads(_REGISTRY.read_text(encoding="utf-8"))
    suites = {name: _suite(name, table) for name, table in tables["suites"].items()}
    return suites, {name: tuple(members) for name, members in tables["groups"].items()}


def _suite(name: str, table: Mapping[str, Any]) -> Suite:
    values: dict[str, Any] = {
        field: tuple(value) if isinstance(value, list) else value for field, value in table.items()
    }
    return Suite(name=name, **values)


def find_suites(names: Sequence[str], *, fields: Mapping[str, str | None]) -> list[Suite]:
    """The suites that `--suite` names: groups, names of the registry, and files.

    Args:
        fields: the user's `problem`, `label`, `id`, `subject` and `level` fields, for files.

    Raises:
        SuiteError: a name is unknown or given twice, or a file comes without its fields.
    """
    suites, groups = registry()
    found: list[Suite] = []
    for name in names:
        if name in groups:
            found += [suites[member] for member in groups[name]]
        elif name in suites:
            found.append(suites[name])
        elif Path(name).suffix in LOCAL_SUFFIXES:
            found.append(_own_suite(name, fields))
        else:
            known = ", ".join([*groups, *suites])
            raise SuiteError(
                f"--suite {name}: unknown. Give one of {known}, or a file that ends in "
                f"{', '.join(LOCAL_SUFFIXES)}"
            )
    for name, times in Counter(suite.name for suite in found).items():
        if times > 1:
            sources = {suite.source for suite in found if suite.name == name}
            raise SuiteError(
                f"--suite names {name} {times} times; give each set once"
                if len(sources) == 1
                else f"--suite: {' and '.join(sorted(sources))} are both called {name}, and "
                "results go by that name. Fix: rename one of the files"
            )
    if any(fields.values()) and all(suite.name in suites for suite in found):
        given = ", ".join(f"--{name}_field" for name, value in fields.items() if value)
        raise SuiteError(f"{given}: only a file of your own has fields to name. Drop it")
    return found


def _own_suite(path: str, fields: Mapping[str, str | None]) -> Suite:
    if not (fields.get("problem") and fields.get("label")):
        raise SuiteError(
            f"--suite {path}: a file of your own needs --problem_field NAME and --label_field NAME"
        )
    named: dict[str, Any] = {name: (given,) for name, given in fields.items() if given}
    # The name becomes a file name in the run folder and a part of request ids.
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(path).stem)[:_LONGEST_NAME].strip("-.") or "own"
    if stem in registry()[0]:
        stem += "-own"
    return Suite(name=stem, title=Path(path).stem, source=path, **named)


def load_suite(suite: Suite, *, data_dir: Path | None, limit: int | None = None) -> LoadedSuite:
    """Reads a suite from `data_dir`, or else from its own source.

    Args:
        limit: ask only the first so many problems.

    Raises:
        SuiteError: there is no `data_dir`, a field is missing, a label cannot be read, an id or a
            problem comes twice, or the number of problems is not that of the registry.
        SourceError: the file or hub dataset cannot be read.
    """
    source = _find_file(suite, data_dir) or suite.source
    revision = None if Path(source).is_file() else suite.revision
    try:
        rows = list(read_rows(source, split=suite.split, revision=revision))
    except SourceError as error:
        if revision is None:
            raise
        # The reader's advice, to give the file's path, is for files of one's own.
        raise SourceError(
            f"{error}. For {suite.title}: put the file into a folder, as {' or '.join(suite.files)}"
            ", and name the folder with --data_dir"
        ) from error
    problems = [_problem(suite, row) for row in rows]
    _check_once(suite, source, problems)
    return LoadedSuite(
        suite=suite,
        problems=tuple(problems[:limit]),
        origin=source if revision is None else f"{source}@{revision}",
        is_whole=limit is None or limit >= len(problems),
    )


def _find_file(suite: Suite, data_dir: Path | None) -> str | None:
    if data_dir is None:
        return None
    if not data_dir.is_dir():
        raise SuiteError(f"--data_dir {data_dir}: there is no such folder")
    paths = [data_dir / name for name in suite.files]
    return next((str(path) for path in paths if path.is_file()), None)


def _check_once(suite: Suite, source: str, problems: Sequence[Problem]) -> None:
    if suite.size is not None and len(problems) != suite.size:
        raise SuiteError(
            f"{source} has {len(problems)} problems, {suite.title} has {suite.size}: one is "
            "missing or doubled, and a mean over them would be of another set. Fix: get the whole "
            "file, or evaluate it under another name with --problem_field and --label_field"
        )
    if not problems:
        raise SuiteError(f"{source} has no problems")
    for what, values in (("id", [p.id for p in problems]), ("problem", [p.text for p in problems])):
        doubled = [value for value, times in Counter(values).items() if times > 1]
        if doubled:
            raise SuiteError(
                f"{source}: {len(doubled)} {what}s come twice, so a problem would count twice: "
                f"{_shown(doubled)}. Fix: remove the repeated rows, or name a better --id_field"
            )


def _problem(suite: Suite, row: Row) -> Problem:
    where = f"{row.source}, row {row.number}"
    if not isinstance(row.content, dict):
        raise SuiteError(f"{where} is not a JSON object: {str(row.content)[:80]!r}. Fix the row")
    text = text_of(_value(row.content, suite.problem)).strip()
    if not text:
        raise _missing(where, suite.problem, row.content, flag="--problem_field")
    given_id = _value(row.content, suite.id)
    problem_id = f"{suite.name}:{row.number}" if given_id is None else str(given_id)
    solution = _value(row.content, suite.solution)
    problem = Problem(
        id=problem_id,
        text=text,
        label=_label(suite, row.content, where),
        tolerance=_tolerance(suite, row.content, where),
        subject=_text_or_none(_value(row.content, suite.subject)),
        level=_text_or_none(_value(row.content, suite.level)),
        solution=_text_or_none(solution[0] if isinstance(solution, list) else solution),
    )
    asked = (problem.id, problem.text, problem.label, problem.subject, problem.level)
    try:
        "".join(part for part in asked if part).encode()
    except UnicodeEncodeError as error:
        raise SuiteError(
            f"{where}: {error.object[error.start : error.end]!r} is half of a character (a lone "
            "surrogate of UTF-16), which no tokenizer takes. Fix the row"
        ) from error
    return problem


def _label(suite: Suite, row: Mapping[str, Any], where: str) -> str:
    value = _value(row, suite.label)
    published = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(published, str):
        value = suite.corrections.get(published, value)
    try:
        texts = label_texts(value)
    except LabelNotParsableError as error:
        raise SuiteError(
            f"{where}: its reference answer cannot be read: {error}. Fix the row, or name the "
            "field with --label_field"
        ) from error
    if not texts:
        raise _missing(where, suite.label, row, flag="--label_field")
    if len(texts) > 1:
        raise SuiteError(
            f"{where}: its reference answer lists {', '.join(map(repr, texts))} and does not say "
            "whether one of them or all are asked. Fix: write one text, such as '1, 2' for both"
        )
    unit = _value(row, suite.unit)
    return texts[0] if unit is None else f"{texts[0]} {_unit_text(str(unit))}"


def _unit_text(unit: str) -> str:
    unit = unit.strip("$ ")
    if unit == "%":
        return "\\%"
    # `^{\circ}` is written behind the number, `km` as text.
    return unit if unit.startswith("^") else f"\\text{{ {unit}}}"


def _tolerance(suite: Suite, row: Mapping[str, Any], where: str) -> Tolerance | None:
    error = _value(row, suite.error)
    try:
        absolute = 0.0 if error is None else float(error)
    except (TypeError, ValueError) as problem:
        raise SuiteError(f"{where}: the tolerance {error!r} is no number") from problem
    if not (absolute or suite.relative):
        return None
    return Tolerance(relative=suite.relative, absolute=absolute)


def _value(row: Mapping[str, Any], fields: Iterable[str]) -> Any:
    """The first filled field; `boxed:A` is the last box in the text of field A."""
    for name in fields:
        value = first_filled(row, (name.removeprefix(_BOXED),))
        if name.startswith(_BOXED) and value is not None:
            value = last_box(str(value))
        if value is not None:
            return value
    return None


def _missing(where: str, fields: Sequence[str], row: Mapping[str, Any], *, flag: str) -> SuiteError:
    return SuiteError(
        f"{where}: nothing in {' or '.join(fields)}. Its fields are {', '.join(sorted(row))}. Fix "
        f"the row, or name the field with {flag}"
    )


def _text_or_none(value: Any) -> str | None:
    return None if value is None else str(value)


def _numbers(tolerance: Tolerance | None) -> list[float]:
    return [] if tolerance is None else [tolerance.relative, tolerance.absolute]


def _shown(values: Sequence[str]) -> str:
    shown = ", ".join(repr(value[:60]) for value in values[:_LISTED])
    return shown if len(values) <= _LISTED else f"{shown} and {len(values) - _LISTED} more"
