"""Every label of the training set against the reward, before anything starts.

A row whose label no answer can earn costs its group in every epoch, and is only seen as a count of
dropped groups. The comparison is the one that training makes, and takes seconds.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openrlhf_alp.data.sources import LOCAL_SUFFIXES, DataError, Row, read_rows
from openrlhf_alp.data.verdicts import Verdict, check_labels

logger = logging.getLogger(__name__)

_NUM_NAMED = 10
"""Rows named for one reason; more would hide the others."""


def check_labels_of(datasets: str, label_key: str, *, split: str) -> None:
    """Log which rows no answer can earn the reward of, with their numbers, by reason.

    Args:
        datasets: `--data.prompt_dataset`, which may name several with commas between them.
        label_key: the field with the label.
        split: split of a Hugging Face id.

    Raises:
        ValueError: no row can be earned, a file cannot be read, or its labels are of types that
            OpenRLHF cannot load together.
    """
    for name in datasets.split(","):
        source = name.strip()
        if not _is_readable(source):
            logger.warning("labels of %s are not checked: it is no file and no id", source)
            continue
        try:
            _check(source, list(_labels(source, label_key, split)))
        except DataError as error:
            raise ValueError(f"--data.prompt_dataset {source}: {error}") from error


def _is_readable(source: str) -> bool:
    if Path(source).is_file():
        return Path(source).suffix in LOCAL_SUFFIXES
    return not Path(source).exists() and source.count("/") == 1 and "@" not in source


def _labels(source: str, label_key: str, split: str) -> Iterator[tuple[Row, Any]]:
    for row in read_rows(source, split=split):
        content = row.content
        yield row, content.get(label_key) if isinstance(content, dict) else None


def _check(source: str, labelled: list[tuple[Row, Any]]) -> None:
    _require_one_type(source, labelled)
    verdicts = check_labels([label for _, label in labelled], num_workers=os.cpu_count() or 1)
    rows_by_reason: dict[str, list[str]] = {}
    for (row, label), verdict in zip(labelled, verdicts, strict=True):
        if not verdict.equal:
            named = f"{row.number} ({label!r:.60})"
            rows_by_reason.setdefault(_reason(verdict), []).append(named)
    num_refused = sum(map(len, rows_by_reason.values()))
    for reason, rows in rows_by_reason.items():
        more = f" and {len(rows) - _NUM_NAMED} more" if len(rows) > _NUM_NAMED else ""
        logger.warning(
            "%s: no answer can earn the reward of row %s%s: %s",
            *(source, ", ".join(rows[:_NUM_NAMED]), more, reason),
        )
    if num_refused:
        logger.warning(
            "%s: %d of %d rows cannot be earned; openrlhf-alp prepare-data writes a file without "
            "them",
            *(source, num_refused, len(labelled)),
        )
    if labelled and num_refused == len(labelled):
        first = next(iter(rows_by_reason))
        raise DataError(
            f"no answer can earn the reward of any of its {num_refused} labels ({first}). Check "
            "--data.label_key, or give a reward of your own with --reward.remote_url"
        )


def _reason(verdict: Verdict) -> str:
    if verdict.unavailable:
        return f"{verdict.unavailable}: {verdict.detail}" if verdict.detail else verdict.unavailable
    return "the label does not equal itself"


def _require_one_type(source: str, labelled: list[tuple[Row, Any]]) -> None:
    """Name the first row whose label is of another type than those before.

    Raises:
        DataError: a file of text and numbers, which `datasets` refuses as a whole.
    """
    first: tuple[Row, str] | None = None
    for row, label in labelled:
        kind = _arrow_kind(label)
        if kind is None:
            continue
        if first is None:
            first = (row, kind)
        elif kind != first[1]:
            raise DataError(
                f"the label of row {first[0].number} is a {first[1]} and that of row {row.number} "
                f"a {kind}, which cannot be loaded together. Run openrlhf-alp prepare-data, which "
                "writes every label as text"
            )


def _arrow_kind(label: Any) -> str | None:
    """The type that `datasets` gives a column of such labels; None goes with every type."""
    if label is None:
        return None
    if isinstance(label, bool):
        return "truth value"
    return {str: "text", int: "number", float: "number", list: "list", dict: "object"}.get(
        type(label), type(label).__name__
    )
