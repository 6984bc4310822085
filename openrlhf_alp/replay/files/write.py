"""Writes a batch as one Parquet file, at once or beside a running training.

A file appears under its name whole or not at all: it is written beside it, flushed to the disk and
renamed. What an interrupted process leaves has a name that `read.py` recognises.
"""

import dataclasses
import logging
import os
import queue
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from openrlhf_alp.replay.files.records import RecordedBatch, RecordedSample
from openrlhf_alp.replay.files.schema import METADATA_KEY, SCHEMA, SUFFIX, BatchInfo

logger = logging.getLogger(__name__)

PARTIAL_SUFFIX = f"{SUFFIX}.partial"
"""Ending of a file that is still being written, or whose writer was interrupted."""

_FLOATS = ("rollout_log_probs.list.element", "advantages.list.element")
_WAITING_BATCHES = 2
"""Batches that may wait for the disk; a training that is faster than that waits for it."""


def step_file(folder: Path, step: int) -> Path:
    """Where `step` is recorded."""
    return folder / f"step-{step:06d}{SUFFIX}"


def write_batch(batch: RecordedBatch, path: Path) -> None:
    """Write `batch` to `path`, replacing what is there, in one atomic step.

    Raises:
        OSError: the folder cannot be written, for example because the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name.removesuffix(SUFFIX) + PARTIAL_SUFFIX)
    with partial.open("wb") as file:
        pq.write_table(
            to_table(batch),
            file,
            compression="zstd",
            # The bytes of floats compress only when equal bytes stand together.
            use_byte_stream_split=list(_FLOATS),
            use_dictionary=[name for name in _leaves(SCHEMA) if name not in _FLOATS],
            write_statistics=False,
        )
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    _flush_folder(path.parent)


def to_table(batch: RecordedBatch) -> pa.Table:
    """The rows of `batch` with its `BatchInfo` in the schema's metadata."""
    rows = [_row(sample) for sample in batch.samples]
    columns = [pa.array([row[f.name] for row in rows], type=f.type) for f in SCHEMA]
    return pa.Table.from_arrays(columns, schema=SCHEMA.with_metadata(_metadata(batch.info)))


def clean_text(text: str) -> str:
    """`text` with lone surrogates, which no UTF-8 can hold, written as \\udXXX."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _metadata(info: BatchInfo) -> dict[bytes, bytes]:
    # JSON escapes everything beyond ASCII, so that surrogates cannot break it.
    return {METADATA_KEY: clean_text(info.model_dump_json()).encode()}


def _row(sample: RecordedSample) -> dict[str, Any]:
    row = {field.name: getattr(sample, field.name) for field in dataclasses.fields(sample)}
    return {
        **row,
        "action_ranges": [{"start": start, "end": end} for start, end in sample.action_ranges],
        "reward_detail": [(clean_text(k), v) for k, v in sample.reward_detail.items()],
        "spans": [dataclasses.asdict(span) for span in sample.spans],
        "turns": [_clean(dataclasses.asdict(turn)) for turn in sample.turns],
        "tool_calls": [_clean(dataclasses.asdict(call)) for call in sample.tool_calls],
        **{k: clean_text(v) for k, v in row.items() if isinstance(v, str)},
    }


def _clean(record: dict[str, Any]) -> dict[str, Any]:
    return {k: clean_text(v) if isinstance(v, str) else v for k, v in record.items()}


def _leaves(schema: pa.Schema) -> Iterable[str]:
    """Parquet names of the schema's leaf columns."""
    empty = pq.ParquetFile(_empty_file(schema)).schema
    return [empty.column(i).path for i in range(len(empty))]


def _empty_file(schema: pa.Schema) -> pa.BufferReader:
    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    return pa.BufferReader(sink.getvalue())


def _flush_folder(folder: Path) -> None:
    """Make the new name itself durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class BatchWriter:
    """Writes batches on a thread of its own while training goes on.

    A batch that cannot be written is logged and counted, and training continues: a full disk must
    not end a run.

    Args:
        folder: gets one file per step.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.num_failed = 0
        self._waiting: queue.Queue[RecordedBatch | None] = queue.Queue(_WAITING_BATCHES)
        self._thread = threading.Thread(target=self._run, name="batch-writer", daemon=True)
        self._thread.start()

    def put(self, batch: RecordedBatch) -> None:
        """Hand over a batch; waits while the disk is behind by more than a few."""
        self._waiting.put(batch)

    def close(self) -> None:
        """Return when everything is on the disk, and say how much is not."""
        if self._thread.is_alive():
            self._waiting.put(None)
            self._thread.join()
        if self.num_failed:
            logger.warning(
                "%d step(s) could not be recorded in %s; the lines above say why",
                *(self.num_failed, self.folder),
            )

    def _run(self) -> None:
        while (batch := self._waiting.get()) is not None:
            path = step_file(self.folder, batch.info.step)
            try:
                write_batch(batch, path)
            except (OSError, ValueError, pa.ArrowException) as error:
                self.num_failed += 1
                logger.warning(
                    "step %d was not recorded in %s: %s. Free space there, or set --alp.record "
                    "to another folder",
                    *(batch.info.step, path, error),
                )
