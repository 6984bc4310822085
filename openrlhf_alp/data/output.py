"""Summarises a preparation and writes its three files atomically."""

import contextlib
import json
import os
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from openrlhf_alp.data.labels import label_kind
from openrlhf_alp.data.prepare import Prepared
from openrlhf_alp.data.sources import DataError


class OutputError(DataError):
    """The result may not be written under this name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLengths:
    """Lengths of the kept prompts in tokens."""

    shortest: int
    median: float
    p95: int
    longest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Counts of one preparation. `rows_read` equals `rows_kept` plus the sum of `rejected`."""

    template: str
    train_flags: str
    """The flags of train_ppo_ray that go with the file."""

    formats: Mapping[str, str]
    """Name of the format that was used, by source."""

    rows_read: int
    rows_kept: int
    rejected: Mapping[str, int]
    """Number of rows by reason."""

    kept_by_datasource: Mapping[str, int]
    label_kinds: Mapping[str, int]
    """Kinds of the kept labels; see `labels.LabelKind`."""

    instructions_cut: int
    """Kept rows from which an instruction on the form of the answer was removed."""

    prompt_tokens: TokenLengths | None
    """None when no tokenizer was given, or nothing was kept."""

    def to_json(self) -> dict[str, Any]:
        """The content of the summary file."""
        return asdict(self)


def summarise(
    prepared: Prepared, *, template: str, train_flags: str, formats: Mapping[str, str]
) -> Summary:
    """Counts kept and rejected rows."""
    prompts = prepared.prompts
    return Summary(
        template=template,
        train_flags=train_flags,
        formats=dict(formats),
        rows_read=len(prompts) + len(prepared.rejected),
        rows_kept=len(prompts),
        rejected=_counts(one.reason.value for one in prepared.rejected),
        kept_by_datasource=_counts(prompt.problem.datasource for prompt in prompts),
        label_kinds=_counts(label_kind(prompt.problem.label).value for prompt in prompts),
        instructions_cut=sum(prompt.problem.had_instructions for prompt in prompts),
        prompt_tokens=_lengths([p.num_tokens for p in prompts if p.num_tokens is not None]),
    )


def _counts(names: Any) -> dict[str, int]:
    """Counts by name, the most frequent first."""
    return dict(Counter(names).most_common())


def _lengths(counts: Sequence[int]) -> TokenLengths | None:
    if not counts:
        return None
    ordered = sorted(counts)
    return TokenLengths(
        shortest=ordered[0],
        median=statistics.median(ordered),
        p95=ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))],
        longest=ordered[-1],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFiles:
    """`math.jsonl`, `math.rejected.jsonl` and `math.summary.json`."""

    prompts: Path

    @property
    def rejected(self) -> Path:
        return self.prompts.with_suffix(".rejected.jsonl")

    @property
    def summary(self) -> Path:
        return self.prompts.with_suffix(".summary.json")

    @property
    def _all(self) -> tuple[Path, ...]:
        return self.prompts, self.rejected, self.summary, self.overlaps

    @property
    def overlaps(self) -> Path:
        """Problems that a benchmark has too; only with --check-against."""
        return self.prompts.with_suffix(".overlaps.jsonl")

    def write_overlaps(self, rows: Iterable[dict[str, Any]]) -> None:
        """Writes the overlaps file."""
        replace_file(self.overlaps, _lines(rows))

    def check(self, *, sources: Sequence[str], overwrite: bool) -> None:
        """Checks before the work starts that the result may be written.

        Args:
            sources: the inputs; none of these files is ever overwritten.

        Raises:
            OutputError: the name does not end in .jsonl, or a file exists and `overwrite` is off.
        """
        if self.prompts.suffix != ".jsonl":
            raise OutputError(f"--to {self.prompts}: give a name that ends in .jsonl")
        read = {Path(source).resolve() for source in sources}
        for path in self._all:
            if path.resolve() in read:
                raise OutputError(f"{path} is read and would be written over. Give another --to")
        there = [path for path in self._all if path.exists()]
        if there and not overwrite:
            names = ", ".join(map(str, there))
            raise OutputError(f"there already: {names}. Give another --to, or --overwrite")

    def write(self, prepared: Prepared, summary: Summary) -> None:
        """Writes the prompts last, so that their file exists only when the other two do.

        Without any prompt, no prompts file is left.
        """
        self.prompts.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.rejected, _lines(one.to_json() for one in prepared.rejected))
        replace_file(self.summary, [json.dumps(summary.to_json(), indent=2) + "\n"])
        if prepared.prompts:
            replace_file(self.prompts, _lines(one.to_json() for one in prepared.prompts))
        else:
            self.prompts.unlink(missing_ok=True)


def _lines(rows: Iterable[dict[str, Any]]) -> Iterable[str]:
    # JSON has no dates, bytes or decimals, but Parquet rows may: a rejected row shows them as text.
    return (json.dumps(row, default=str) + "\n" for row in rows)


def replace_file(path: Path, lines: Iterable[str], *, errors: str = "strict") -> None:
    """Writes beside `path` and renames, so that a reader sees the old file or the new one.

    Args:
        errors: what becomes of lone surrogates, as for `open`.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "w", encoding="utf-8", errors=errors) as file:
            file.writelines(lines)
            # Otherwise a crash after the rename could leave an empty file under the final name.
            file.flush()
            os.fsync(file.fileno())
        # Before the rename, so that nobody meets the file with the wrong rights.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _umask() -> int:
    """The user's umask: mkstemp creates private files, a data set should follow the umask."""
    current = os.umask(0)
    os.umask(current)
    return current
