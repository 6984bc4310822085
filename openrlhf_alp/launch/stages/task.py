"""The made tasks of a recipe: `[data] task`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from openrlhf_alp.data.tasks import (
    QuestionSplit,
    repeat_rows,
    split_additions,
    split_products,
    write_rows,
)

_TASKS: Mapping[str, tuple[str, Callable[..., QuestionSplit]]] = {
    "addition": ("sums", split_additions),
    "multiplication": ("products", split_products),
}
"""Made task -> what a question asks for, and what makes the questions."""


def noun_of(task: str) -> str:
    """What a question of the task asks for."""
    return _TASKS[task][0]


def write_task(task: str, prompts: Path, *, num_rows: int, seed: int) -> QuestionSplit:
    """Writes prompts to train on, and beside them `held_out.jsonl`; returns all questions."""
    _, split = _TASKS[task]
    questions = split(seed=seed)
    prompts.parent.mkdir(exist_ok=True)
    write_rows(prompts, repeat_rows(questions.train, count=num_rows, seed=seed))
    write_rows(prompts.with_name("held_out.jsonl"), questions.test)
    return questions
