"""Reads the rows of a problem set from a local file or from the Hugging Face hub.

Local JSON is read line by line and not through `datasets`, which would refuse the whole file for
one broken line or for a field that is a list in one row and a string in the next.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATTERN_CHARS = "[]*?"
"""In a path, `datasets` takes these for a pattern of several files."""
LOCAL_SUFFIXES = (".jsonl", ".json", ".parquet")

_PARQUET_BATCH_ROWS = 1024


class DataError(Exception):
    """Problem sets could not be prepared; the message says what to do. Nothing was written."""


class SourceError(DataError):
    """A file or hub dataset cannot be read at all. A single broken row is rejected instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row, unchanged."""

    source: str
    """The file or Hugging Face id as the user wrote it."""

    number: int
    """From 1, within its source; the line number in JSON lines."""

    content: Any
    """A dict of fields; anything else is a broken row, such as an invalid JSON line."""


def read_rows(source: str, *, split: str = "train", revision: str | None = None) -> Iterator[Row]:
    """Yields the rows of one source in order.

    Args:
        source: a .jsonl, .json (a list, or lines) or .parquet file, a Hugging Face id
            (`org/name`), or one file of a Hugging Face dataset (`org/name:folder/file.parquet`).
        split: split of a Hugging Face id; ignored for files.
        revision: commit, tag or branch of a Hugging Face id; None: its main branch.

    Raises:
        SourceError: there is no such file, or it cannot be read or downloaded.
    """
    path = Path(source)
    if not path.is_file() and _names_the_hub(source):
        yield from _hub_rows(source, split, revision)
        return
    if not path.is_file():
        raise SourceError(
            f"{source}: there is no such file. Give a file that ends in {', '.join(LOCAL_SUFFIXES)}"
            ", a Hugging Face id (org/name), or org/name:path/of/one/file.parquet"
        )
    readers = {".jsonl": _json_lines, ".json": _json_rows, ".parquet": _parquet_rows}
    reader = readers.get(path.suffix)
    if reader is None:
        raise SourceError(f"{source}: expected a name that ends in {', '.join(LOCAL_SUFFIXES)}")
    try:
        yield from reader(source)
    except (OSError, ValueError) as error:
        raise SourceError(f"{source} cannot be read: {error}") from error


def source_stem(source: str) -> str:
    """Returns a short name of a source, for rows without a `data_source`."""
    return Path(source).stem if Path(source).suffix in LOCAL_SUFFIXES else source


def _names_the_hub(source: str) -> bool:
    repository, _, file = source.partition(":")
    looks_local = repository.endswith(LOCAL_SUFFIXES) or repository.startswith((".", "/", "~"))
    return repository.count("/") == 1 and not looks_local and (not file or "." in file)


def _json_lines(source: str) -> Iterator[Row]:
    # Files from Windows begin with a byte order mark, which is no JSON.
    with open(source, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield Row(source=source, number=number, content=_parsed(line))


def _json_rows(source: str) -> Iterator[Row]:
    try:
        found = json.loads(Path(source).read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError:
        # Many ".json" sets are JSON lines; read like this, one broken line does not cost the file.
        yield from _json_lines(source)
        return
    rows = found if isinstance(found, list) else [found]
    for number, content in enumerate(rows, start=1):
        yield Row(source=source, number=number, content=content)


def _parsed(line: str) -> Any:
    # Files that were joined have a mark in the middle, too.
    line = line.lstrip("\ufeff")
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return line.rstrip("\n")


def _parquet_rows(source: str) -> Iterator[Row]:
    # Imported here because `--help` loads this module and pyarrow takes long to import.
    import pyarrow.parquet

    number = 0
    with pyarrow.parquet.ParquetFile(source) as file:
        for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS):
            for content in batch.to_pylist():
                number += 1
                yield Row(source=source, number=number, content=content)


def _hub_rows(source: str, split: str, revision: str | None) -> Iterator[Row]:
    # Imported here because it takes a second and local files do not need it.
    import datasets

    repository, _, file = source.partition(":")
    try:
        rows = datasets.load_dataset(
            repository, data_files=file or None, split=split, revision=revision
        )
    except Exception as error:
        raise SourceError(
            f"{source} (split {split}) cannot be loaded from the Hugging Face hub or its cache: "
            f"{type(error).__name__}: {error}. Check id, split and network, or download the file "
            "and give its path"
        ) from error
    for number, content in enumerate(rows, start=1):
        yield Row(source=source, number=number, content=content)
