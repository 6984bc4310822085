"""The folder of a run: what was asked, every answer, every grade, the numbers.

RUN/run.json               what the run is; a second start must agree with it
RUN/problems/SUITE.json    the problems and labels as they were asked
RUN/answers/SUITE.jsonl    the answers, see store.py
RUN/grades/SUITE.jsonl     one verdict per answer
RUN/logs/*.eval            logs of Inspect
RUN/results.json, results.md, pass_at_k.png, ungraded.jsonl
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import filelock
from pydantic import ConfigDict, StrictInt, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from openrlhf_alp.data.output import replace_file
from openrlhf_alp.data.sources import DataError
from openrlhf_alp.evaluate.records import AnswerKey, Grade
from openrlhf_alp.evaluate.store import AnswerStore
from openrlhf_alp.evaluate.suites import LoadedSuite, Problem, Suite, registry

RUN_FILE = "run.json"
RESULTS_FILE = "results.json"

_SURROGATES = "surrogatepass"
"""Half of a pair of UTF-16, as JSON can spell it, is written and read like any character."""

_with_more = with_config(ConfigDict(extra="allow"))
"""What a file must hold at least; its further keys are kept."""


@_with_more
class _Run(TypedDict):
    run_id: str
    n: StrictInt
    plan: dict[str, Any]
    suites: dict[str, str]
    weights_digest: str


@_with_more
class _Average(TypedDict):
    value: float


@_with_more
class _Suite(TypedDict):
    suite: str
    title: str
    num_problems: StrictInt
    problems_digest: str
    avg: _Average


@_with_more
class _Results(TypedDict):
    model: str
    n: StrictInt
    plan: dict[str, Any]
    suites: list[_Suite]


class _Problems(TypedDict):
    title: str
    origin: str
    is_whole: bool
    problems: list[Problem]


_RUN, _RESULTS, _PROBLEMS = TypeAdapter(_Run), TypeAdapter(_Results), TypeAdapter(_Problems)

_OURS = (".lock", "services")
"""What may be there before a run begins: the services are started first."""


class FolderError(DataError):
    """A run folder cannot be used; nothing in it was changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What makes two starts one run: another value would mix answers of two policies."""

    model: str
    weights_digest: str
    weights_version: int
    contract_hash: str
    tokenizer_hash: str
    plan: Mapping[str, Any]
    suites: Mapping[str, str]
    """Digest of each problem set, by name."""


class RunFolder:
    """A run on disk; one process at a time.

    Args:
        path: the folder; it is made by `open`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = filelock.FileLock(path / ".lock")

    def open(self) -> None:
        """Makes the folder if needed and keeps other processes out until `release`.

        Raises:
            FolderError: it is in use, holds something else than a run, or cannot be written.
        """
        with self._written():
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock()
            if not (self.path / RUN_FILE).exists():
                self._check_empty()

    def begin(self, identity: Identity, suites: Sequence[LoadedSuite], *, n: int) -> str:
        """Starts the run, or continues it; returns its id.

        Raises:
            FolderError: the folder holds another run, or cannot be written.
        """
        is_new = not (self.path / RUN_FILE).exists()
        run_id = secrets.token_hex(6) if is_new else self._check_same(identity)
        with self._written():
            for loaded in suites:
                problems = {**_described(loaded), "problems": [asdict(p) for p in loaded.problems]}
                write_json(self.path / "problems" / f"{loaded.name}.json", problems)
            described = {"run_id": run_id, "n": n, **asdict(identity)}
            write_json(self.path / RUN_FILE, described)
        return run_id

    def lock(self) -> None:
        """Keeps other processes out until this one ends.

        Raises:
            FolderError: another process has it.
        """
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise FolderError(
                f"{self.path} is in use by another evaluation. Fix: wait for it, or name another "
                "--output"
            ) from error

    def release(self) -> None:
        """Lets other processes in."""
        self._lock.release()

    def described(self) -> dict[str, Any]:
        """The content of run.json.

        Raises:
            FolderError: there is none, or it is broken.
        """
        fix = "restore it, or evaluate into another --output; the answers are unchanged"
        return self._read_json(RUN_FILE, _RUN, fix)

    def results(self) -> dict[str, Any]:
        """The content of results.json.

        Raises:
            FolderError: there is none, or it is broken.
        """
        fix = f"openrlhf-alp evaluate --regrade {self.path}"
        return self._read_json(RESULTS_FILE, _RESULTS, fix)

    def suites(self) -> list[LoadedSuite]:
        """The problem sets as they were asked, for grading again."""
        return [self._suite(name) for name in self.described()["suites"]]

    def others(self, given: Sequence[LoadedSuite]) -> list[LoadedSuite]:
        """What earlier starts have asked besides: a run has the numbers of all that it holds."""
        if not (self.path / RUN_FILE).exists():
            return []
        names = {loaded.name for loaded in given}
        return [self._suite(name) for name in self.described()["suites"] if name not in names]

    def store(self, suite: str) -> AnswerStore:
        """The answers of a suite."""
        return AnswerStore(self.path / "answers" / f"{suite}.jsonl")

    @property
    def logs(self) -> Path:
        """Where Inspect writes."""
        return self.path / "logs"

    def write_grades(self, suite: str, grades: Mapping[AnswerKey, Grade]) -> None:
        """Writes a verdict per answer, in order of problems and samples."""
        rows = (
            {"problem_id": key[0], "sample": key[1], **asdict(grade)}
            for key, grade in grades.items()
        )
        write_lines(self.path / "grades" / f"{suite}.jsonl", rows)

    def shares(self, suite: str, *, num_problems: int, n: int) -> dict[str, float]:
        """Share of right answers by problem, as graded last.

        Raises:
            FolderError: the grades are missing or broken, or not `n` of each problem.
        """
        verdicts = self._verdicts(suite, num_problems=num_problems, n=n)
        return {name: sum(v is True for v in found) / n for name, found in verdicts.items()}

    def _verdicts(self, suite: str, *, num_problems: int, n: int) -> dict[str, list[bool | None]]:
        path = self.path / "grades" / f"{suite}.jsonl"
        by_sample: dict[str, dict[int, bool | None]] = {}
        try:
            # Not str.splitlines: an answer may hold a U+2028, at which that splits too.
            with path.open(encoding="utf-8", errors=_SURROGATES) as lines:
                for row in map(json.loads, lines):
                    by_sample.setdefault(row["problem_id"], {})[row["sample"]] = row["right"]
            sizes = {len(found) for found in by_sample.values()}
            if len(by_sample) != num_problems or sizes - {n}:
                raise ValueError(f"it has not {n} grades of each of {num_problems} problems")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise FolderError(
                f"{path} cannot be read ({error}). Fix: openrlhf-alp evaluate --regrade {self.path}"
            ) from error
        return {problem: list(found.values()) for problem, found in by_sample.items()}

    def pass_rates(self) -> Iterator[tuple[str, float]]:
        """Text of every problem, and the share of right answers among those that were graded.

        A problem without a graded answer is left out: nobody knows whether the policy solves it.

        Raises:
            FolderError: it is not a finished run, or the grades are of other problems.
        """
        results = self.results()
        sizes = {suite["suite"]: suite["num_problems"] for suite in results["suites"]}
        for loaded in self.suites():
            size = sizes.get(loaded.name, 0)
            verdicts = self._verdicts(loaded.name, num_problems=size, n=results["n"])
            for problem in loaded.problems:
                if problem.id not in verdicts:
                    raise FolderError(
                        f"grades/{loaded.name}.jsonl of {self.path} has no grade of the problem "
                        f"{problem.id}. Fix: openrlhf-alp evaluate --regrade {self.path}"
                    )
                graded = [right for right in verdicts[problem.id] if right is not None]
                if graded:
                    yield problem.text, sum(graded) / len(graded)

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise FolderError(
                f"--output {self.path} cannot be written: {error.strerror}. Fix: free space or "
                "name another folder; what is stored stays"
            ) from error

    def _check_empty(self) -> None:
        others = [path.name for path in self.path.iterdir() if path.name not in _OURS]
        if others:
            raise FolderError(
                f"--output {self.path} holds {', '.join(sorted(others)[:3])} and no {RUN_FILE}: it "
                "is not a run of evaluate. Nothing was touched. Fix: name a new or an empty folder"
            )

    def _check_same(self, identity: Identity) -> str:
        before = self.described()
        now = json.loads(json.dumps(asdict(identity)))
        differing = [
            f"{name}: {then} then, {given} now"
            for name, then, given in _pairs(before, now)
            if then != given
        ]
        if differing:
            raise FolderError(
                f"--output {self.path} holds another run:\n  "
                + "\n  ".join(differing)
                + "\nFix: name another --output, or repeat the command of that run to continue it"
            )
        return str(before["run_id"])

    def _suite(self, name: str) -> LoadedSuite:
        fix = "run the command of this run again, which writes it"
        table = self._read_json(f"problems/{name}.json", _PROBLEMS, fix)
        known = registry()[0].get(name)
        own = Suite(name=name, title=table["title"], source=table["origin"], problem=(), label=())
        return LoadedSuite(
            suite=known or own,
            problems=tuple(table["problems"]),
            origin=table["origin"],
            is_whole=table["is_whole"],
        )

    def _read_json(self, name: str, shape: TypeAdapter[Any], fix: str) -> dict[str, Any]:
        path = self.path / name
        try:
            text = path.read_text(encoding="utf-8", errors=_SURROGATES)
            found: dict[str, Any] = shape.validate_python(json.loads(text))
        except FileNotFoundError as error:
            raise FolderError(
                f"{path} does not exist: {self.path} is not a finished run of evaluate. Fix: check "
                "the path, or run openrlhf-alp evaluate --output for it again"
            ) from error
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise FolderError(
                f"{path} cannot be read: {place}: {first['msg']}. Fix: {fix}"
            ) from error
        except (OSError, ValueError) as error:
            raise FolderError(f"{path} cannot be read: {error}. Fix: {fix}") from error
        return found


def _pairs(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """What two starts of a run must share: its name, its value then and now."""
    for name in ("weights_digest", "contract_hash", "tokenizer_hash"):
        yield name, before.get(name), now[name]
    for name, value in now["plan"].items():
        yield f"plan, {name}", before["plan"].get(name), value
    for suite, digest in now["suites"].items():
        # A suite may be added to a run.
        yield f"problems of {suite}", before["suites"].get(suite, digest), digest


def write_json(path: Path, content: Any) -> None:
    """Replaces a file of JSON, whole or not at all."""
    _replace(path, [json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"])


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replaces a file of JSON lines, whole or not at all."""
    _replace(path, (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    """Replaces a file of text, whole or not at all."""
    _replace(path, [text])


def _replace(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lines, errors=_SURROGATES)


def _described(loaded: LoadedSuite) -> dict[str, Any]:
    return {
        "title": loaded.suite.title,
        "origin": loaded.origin,
        "is_whole": loaded.is_whole,
        "licence": loaded.suite.licence,
        "digest": loaded.digest,
    }
