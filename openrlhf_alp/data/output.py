"""The three files of a preparation, written whole or not at all."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openrlhf_alp.data.errors import OutputError
from openrlhf_alp.data.prepare import Prepared
from openrlhf_alp.data.summary import Summary


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

    def check(self, *, sources: Sequence[str], overwrite: bool) -> None:
        """Finds out before the work whether the result may be written.

        Args:
            sources: what is read; a file of these is never written over.

        Raises:
            OutputError: not a .jsonl name, or a file is there and may not be replaced.
        """
        if self.prompts.suffix != ".jsonl":
            raise OutputError(f"--to {self.prompts}: give a name that ends in .jsonl")
        read = {Path(source).resolve() for source in sources}
        for path in (self.prompts, self.rejected, self.summary):
            if path.resolve() in read:
                raise OutputError(f"{path} is read and would be written over. Give another --to")
        there = [path for path in (self.prompts, self.rejected, self.summary) if path.exists()]
        if there and not overwrite:
            names = ", ".join(map(str, there))
            raise OutputError(f"there already: {names}. Give another --to, or --overwrite")

    def write(self, prepared: Prepared, summary: Summary) -> None:
        """The prompts last: when they are there, all is there. No prompts, no file of prompts."""
        self.prompts.parent.mkdir(parents=True, exist_ok=True)
        _replace(self.rejected, _lines(one.to_json() for one in prepared.rejected))
        _replace(self.summary, [json.dumps(summary.to_json(), indent=2) + "\n"])
        if prepared.prompts:
            _replace(self.prompts, _lines(one.to_json() for one in prepared.prompts))
        else:
            self.prompts.unlink(missing_ok=True)


def _lines(rows: Iterable[dict[str, Any]]) -> Iterable[str]:
    # Parquet has dates, bytes and decimals, which JSON has not: a rejected row shows them as text.
    return (json.dumps(row, default=str) + "\n" for row in rows)


def _replace(path: Path, lines: Iterable[str]) -> None:
    """Writes beside `path` and renames: whoever reads it sees the old file or the new one."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _umask() -> int:
    """mkstemp makes files for one user only; a dataset follows the user's own setting."""
    current = os.umask(0)
    os.umask(current)
    return current
