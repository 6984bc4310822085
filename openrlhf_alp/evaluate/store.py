"""The answers of one suite in a file of JSON lines that only grows: what resuming stands on.

An answer is written when it is finished, in one piece, before it counts. A run that is killed may
leave half a line; that answer alone is generated again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from openrlhf_alp.data.sources import DataError
from openrlhf_alp.evaluate.records import Answer, AnswerKey

_LISTED = 5


class StoreError(DataError):
    """The stored answers cannot be used or written; the message says what is kept and the fix."""


class AnswerStore:
    """Answers by problem and sample, on disk.

    Args:
        path: the file; made with the first answer.

    Attributes:
        num_broken: lines that could not be read. They are kept in `PATH.broken`.

    Raises:
        StoreError: the file holds an answer twice, or cannot be read or repaired.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_broken = 0
        self._answers: dict[AnswerKey, Answer] = {}
        try:
            self._read()
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error.strerror}") from error

    def __len__(self) -> int:
        return len(self._answers)

    def __iter__(self) -> Iterator[Answer]:
        return iter(self._answers.values())

    def get(self, key: AnswerKey) -> Answer | None:
        """The stored answer, or None."""
        return self._answers.get(key)

    def add(self, answer: Answer) -> None:
        """Writes an answer.

        Raises:
            StoreError: it is there already, or cannot be written (a full disk); what was stored
                before is safe.
        """
        if answer.key in self._answers:
            raise StoreError(f"{self.path} holds answer {answer.sample} of {answer.problem_id}")
        line = _line(answer.to_json())
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _append(self.path, line)
        except OSError as error:
            raise StoreError(
                f"{self.path} cannot be written: {error.strerror}. The {len(self)} answers before "
                "are safe. Fix: free space (or the rights), then run the same command again; it "
                "continues there"
            ) from error
        self._answers[answer.key] = answer

    def check_coverage(self, wanted: Iterable[AnswerKey]) -> None:
        """Checks that every wanted answer is there.

        Raises:
            StoreError: names how many are missing, and some of them.
        """
        missing = [key for key in wanted if key not in self._answers]
        if missing:
            shown = ", ".join(f"{problem} #{sample}" for problem, sample in missing[:_LISTED])
            raise StoreError(
                f"{len(missing)} answers are missing in {self.path}: {shown}"
                f"{' ...' if len(missing) > _LISTED else ''}. Fix: repeat the command that "
                "asked for them; it generates only these"
            )

    def _read(self) -> None:
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        good: list[bytes] = []
        broken: list[bytes] = []
        for line in content.splitlines(keepends=True):
            answer = _parsed(line)
            if answer is None:
                broken.append(line)
                continue
            if answer.key in self._answers:
                raise StoreError(
                    f"{self.path} holds answer {answer.sample} of problem {answer.problem_id} "
                    "twice, so it would count twice. Fix: remove one of the two lines"
                )
            self._answers[answer.key] = answer
            good.append(line)
        if broken:
            self.num_broken = len(broken)
            with self.path.with_name(f"{self.path.name}.broken").open("ab") as file:
                file.writelines(line.rstrip(b"\n") + b"\n" for line in broken)
            # Beside it and renamed: a kill in between leaves the old file or the new one.
            beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
            beside.write_bytes(b"".join(good))
            beside.replace(self.path)


def _append(path: Path, line: bytes) -> None:
    """Appends the whole line or, where the disk is full, nothing."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        written = 0
        try:
            while written < len(line):
                written += os.write(descriptor, line[written:])
        except OSError:
            if written:
                os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def _line(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def _parsed(line: bytes) -> Answer | None:
    if not line.endswith(b"\n"):
        return None
    try:
        return Answer.from_json(json.loads(line.decode("utf-8", "surrogatepass")))
    except (ValueError, KeyError, TypeError):
        return None
