"""Rows of a problem set: a local file, or a dataset of the Hugging Face hub.

Local JSON is read line by line and not through `datasets`: one broken line, or a field that is a
list in one row and a string in the next, would there cost the whole file.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openrlhf_alp.data.errors import SourceError

LOCAL_SUFFIXES = (".jsonl", ".json", ".parquet")

_PARQUET_BATCH_ROWS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row as it was found."""

    source: str
    """The file or Hugging Face id as the user wrote it."""

    number: int
    """From 1, within its source; the line number in JSON lines."""

    content: Any
    """An object of field names and values; anything else is broken, text that is not JSON too."""


def read_rows(source: str, *, split: str = "train") -> Iterator[Row]:
    """The rows of one source, in order.

    Args:
        source: a .jsonl, .json (a list, or lines) or .parquet file, a Hugging Face id
            (`org/name`), or one file of a Hugging Face dataset (`org/name:folder/file.parquet`).
        split: of a Hugging Face id; a file has no splits.

    Raises:
        SourceError: there is no such file, or it cannot be read or downloaded.
    """
    path = Path(source)
    if not path.is_file() and _names_the_hub(source):
        yield from _hub_rows(source, split)
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
    """A short name of a source, for rows that do not say where they come from."""
    return Path(source).stem if Path(source).suffix in LOCAL_SUFFIXES else source


def _names_the_hub(source: str) -> bool:
    repository, _, file = source.partition(":")
    looks_local = repository.endswith(LOCAL_SUFFIXES) or repository.startswith((".", "/", "~"))
    return repository.count("/") == 1 and not looks_local and (not file or "." in file)


def _json_lines(source: str) -> Iterator[Row]:
    with open(source, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield Row(source=source, number=number, content=_parsed(line))


def _json_rows(source: str) -> Iterator[Row]:
    try:
        found = json.loads(Path(source).read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        # Many ".json" sets are JSON lines; as such, only a broken line is lost and not the file.
        yield from _json_lines(source)
        return
    rows = found if isinstance(found, list) else [found]
    for number, content in enumerate(rows, start=1):
        yield Row(source=source, number=number, content=content)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return line.rstrip("\n")


def _parquet_rows(source: str) -> Iterator[Row]:
    # Here and not above: `--help` reads this module, and pyarrow takes its time.
    import pyarrow.parquet

    number = 0
    with pyarrow.parquet.ParquetFile(source) as file:
        for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS):
            for content in batch.to_pylist():
                number += 1
                yield Row(source=source, number=number, content=content)


def _hub_rows(source: str, split: str) -> Iterator[Row]:
    # Here and not above: it takes a second to import, and local files do without it.
    import datasets

    repository, _, file = source.partition(":")
    try:
        rows = datasets.load_dataset(repository, data_files=file or None, split=split)
    except Exception as error:
        raise SourceError(
            f"{source} (split {split}) cannot be loaded from the Hugging Face hub or its cache: "
            f"{type(error).__name__}: {error}. Check id, split and network, or download the file "
            "and give its path"
        ) from error
    for number, content in enumerate(rows, start=1):
        yield Row(source=source, number=number, content=content)
