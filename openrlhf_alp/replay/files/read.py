"""Reads recorded batches and checks them; a bad file does not keep its neighbours from being read.

folder or file --find_files--> paths --read_batch--> RecordedBatch, or BatchFileError
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from openrlhf_alp.episodes.records import ToolCall, Turn, TurnKind, VersionSpan
from openrlhf_alp.replay.files.checks import BatchFileError, Fault, sample_faults, vocabulary_fault
from openrlhf_alp.replay.files.records import RecordedBatch, RecordedSample
from openrlhf_alp.replay.files.schema import (
    ACTION_MASK,
    FORMAT_VERSION,
    METADATA_KEY,
    SCHEMA,
    SUFFIX,
    BatchInfo,
)
from openrlhf_alp.replay.files.write import PARTIAL_SUFFIX

_FIELDS = {field.name: field for field in (*SCHEMA, ACTION_MASK)}
_NEEDED = ("token_ids", "rollout_log_probs")


def find_files(path: Path) -> tuple[list[Path], list[Fault]]:
    """The batch files at `path`, a file or folder, in the order of their names.

    Returns:
        The files, and a fault for every half-written one beside them.

    Raises:
        FileNotFoundError: nothing is there.
    """
    if path.is_file():
        return [path], []
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is neither a file nor a folder; --alp.record makes one")
    faults = [
        Fault(
            file=str(partial),
            text="half written: its writer was interrupted, or is still at work. Delete it when "
            "no run records here",
        )
        for partial in sorted(path.glob(f"*{PARTIAL_SUFFIX}"))
    ]
    return sorted(path.glob(f"*{SUFFIX}")), faults


def read_all(files: Sequence[Path]) -> Iterator[tuple[Path, RecordedBatch | list[Fault]]]:
    """Every file with its batch or its faults."""
    for path in files:
        try:
            yield path, read_batch(path)
        except BatchFileError as error:
            yield path, error.faults


def find_batches(
    path: Path, step: int | None, say: Callable[[str, str], None]
) -> dict[Path, BatchInfo]:
    """What the readable files at `path` say about their batches; no sample is read yet.

    Args:
        step: of a folder, the only one that is returned; None for all.
        say: takes "skipped" and what is wrong with one file.

    Raises:
        BatchFileError: the file, or every file of the folder, is faulty.
        ValueError: the folder has no such step, or no batch.
        OSError: nothing is there.
    """
    if path.is_file():
        return {path: read_info(path)}
    files, faults = find_files(path)
    infos: dict[Path, BatchInfo] = {}
    for file in files:
        try:
            infos[file] = read_info(file)
        except BatchFileError as error:
            faults += error.faults
    for fault in faults:
        say("skipped", str(fault))
    if not infos:
        raise (
            BatchFileError(faults)
            if faults
            else ValueError(f"{path} has no batch file; --alp.record writes them")
        )
    if step is None:
        return infos
    chosen = {file: info for file, info in infos.items() if info.step == step}
    if not chosen:
        steps = sorted(info.step for info in infos.values())
        raise ValueError(f"--step {step} is not in {path}; readable are {steps}")
    return chosen


def read_info(path: Path) -> BatchInfo:
    """What the file says about its batch, without reading the samples.

    Raises:
        BatchFileError: it cannot be read, or has another version.
    """
    with _opened(path) as file:
        return _info(path, file.schema_arrow.metadata or {})


def read_batch(path: Path) -> RecordedBatch:
    """Read and check one file.

    Raises:
        BatchFileError: the file is cut short, of another version, or has a bad sample.
    """
    with _opened(path) as file:
        info = _info(path, file.schema_arrow.metadata or {})
        columns = _columns(path, file)
    samples, faults = [], []
    for place in range(len(columns["token_ids"])):
        row = {name: column[place] for name, column in columns.items()}
        try:
            sample, found = _sample(row, place)
        except (ValueError, TypeError) as error:
            faults.append(Fault(file=str(path), sample=place, text=str(error)))
            continue
        samples.append(sample)
        faults += [Fault(file=str(path), sample=place, field=f, text=t) for f, t in found]
    if not samples and not faults:
        faults.append(Fault(file=str(path), text="it has no sample"))
    if faults:
        raise BatchFileError(faults)
    return RecordedBatch(info=info, samples=tuple(samples))


def require_model(
    batch: RecordedBatch, path: Path, *, vocab_size: int, tokenizer_hash: str | None
) -> None:
    """Refuse a model that cannot have sampled the batch.

    Args:
        vocab_size: rows of the model's embedding.
        tokenizer_hash: of the model's tokenizer; None when it has none.

    Raises:
        BatchFileError: ids outside the vocabulary, or another tokenizer.
    """
    recorded = batch.info.contract.get("tokenizer_hash")
    faults = []
    if recorded and tokenizer_hash and recorded != tokenizer_hash:
        faults.append(
            Fault(
                file=str(path),
                field="contract.tokenizer_hash",
                text=f"the batch was sampled with tokenizer {recorded[:12]}, the model has "
                f"{tokenizer_hash[:12]}: the same ids mean other text. Give the model that "
                f"sampled it with --model ({batch.info.model or 'not recorded'})",
            )
        )
    for place, sample in enumerate(batch.samples):
        if text := vocabulary_fault(sample, vocab_size):
            faults.append(Fault(file=str(path), sample=place, field="token_ids", text=text))
    if faults:
        raise BatchFileError(faults)


def _opened(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except UnicodeEncodeError as error:
        text = "its path has bytes that are not UTF-8, which pyarrow cannot open. Rename it"
        raise BatchFileError([Fault(file=str(path), text=text)]) from error
    except (pa.ArrowException, OSError) as error:
        cause = str(error).splitlines()[0]
        text = f"cut short, or no Parquet file ({cause}). Record or convert it again"
        raise BatchFileError([Fault(file=str(path), text=text)]) from error


def _info(path: Path, metadata: dict[bytes, bytes]) -> BatchInfo:
    if METADATA_KEY not in metadata:
        return BatchInfo()
    key = METADATA_KEY.decode()
    try:
        info = BatchInfo.model_validate_json(metadata[METADATA_KEY])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        # A newer version may have fields that this one does not know.
        text = f"{where}: {first['msg']}. Written by another version of openrlhf_alp? Use that one"
        raise BatchFileError([Fault(file=str(path), field=key, text=text)]) from error
    if info.format_version != FORMAT_VERSION:
        text = (
            f"format version {info.format_version} (openrlhf_alp {info.package_version}); this "
            f"one reads version {FORMAT_VERSION}. Use the version that wrote it"
        )
        raise BatchFileError([Fault(file=str(path), field=key, text=text)])
    return info


def _columns(path: Path, file: pq.ParquetFile) -> dict[str, pa.Array]:
    """Known columns of the file in our types."""
    names = [name for name in file.schema_arrow.names if name in _FIELDS]
    missing = [name for name in _NEEDED if name not in names]
    if not {"action_ranges", "action_mask"} & set(names):
        missing.append("action_ranges or action_mask")
    if "advantages" not in names and not {"group", "reward"} <= set(names):
        missing.append("advantages, or group and reward")
    if missing:
        text = f"the column is missing; docs/replay.md has the schema. Columns: {', '.join(names)}"
        raise BatchFileError([Fault(file=str(path), field=m, text=text) for m in missing])
    try:
        table = file.read(columns=names)
    except (pa.ArrowException, OSError) as error:
        text = f"its data cannot be read ({str(error).splitlines()[0]}). Record it again"
        raise BatchFileError([Fault(file=str(path), text=text)]) from error
    columns, faults = {}, []
    for name in names:
        try:
            columns[name] = table[name].cast(_FIELDS[name].type).combine_chunks()
        except pa.ArrowException as error:
            cause = str(error).splitlines()[0]
            text = f"{table[name].type} in place of {_FIELDS[name].type} ({cause})"
            faults.append(Fault(file=str(path), field=name, text=text))
    if faults:
        raise BatchFileError(faults)
    return columns


def _sample(row: dict[str, pa.Scalar], place: int) -> tuple[RecordedSample, list[tuple[str, str]]]:
    """The sample of one row, and its faults."""
    ids, log_probs = _numbers(row, "token_ids"), _numbers(row, "rollout_log_probs")
    ranges, faults = _ranges(row, len(ids))
    sample = RecordedSample(
        # A missing id becomes -1, which the checks report.
        token_ids=np.nan_to_num(ids, nan=-1).astype(np.int32),
        rollout_log_probs=log_probs.astype(np.float32),
        action_ranges=ranges,
        advantages=_advantages(row),
        sample=_value(row, "sample", place),
        group=_value(row, "group", ""),
        reward=_value(row, "reward", None),
        reward_detail=dict(_value(row, "reward_detail", ())),
        request_id=_value(row, "request_id", ""),
        prompt=_value(row, "prompt", ""),
        label=_value(row, "label", ""),
        stop_reason=_value(row, "stop_reason", ""),
        truncated=_value(row, "truncated", False),
        void=_value(row, "void", False),
        spans=tuple(VersionSpan(**span) for span in _value(row, "spans", ())),
        turns=tuple(_turn(turn) for turn in _value(row, "turns", ())),
        tool_calls=tuple(ToolCall(**call) for call in _value(row, "tool_calls", ())),
    )
    return sample, faults + list(sample_faults(sample))


def _numbers(row: dict[str, pa.Scalar], name: str) -> np.ndarray:
    values = row[name].values
    # A null becomes NaN, which the checks report as missing.
    return np.zeros(0) if values is None else values.to_numpy(zero_copy_only=False)


def _advantages(row: dict[str, pa.Scalar]) -> np.ndarray | None:
    if "advantages" not in row or row["advantages"].values is None:
        return None
    return _numbers(row, "advantages").astype(np.float32)


def _ranges(
    row: dict[str, pa.Scalar], num_tokens: int
) -> tuple[tuple[tuple[int, int], ...], list[tuple[str, str]]]:
    """(start, end) of the actions, from whichever column the file has."""
    if "action_ranges" in row:
        ranges = _value(row, "action_ranges", ())
        return tuple((r["start"], r["end"]) for r in ranges), []
    mask: np.ndarray = _numbers(row, "action_mask").astype(bool)
    if len(mask) != num_tokens:
        text = f"{len(mask)} values for {num_tokens} tokens; one is needed for each"
        return (), [("action_mask", text)]
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]])))
    return tuple((int(s), int(e)) for s, e in edges.reshape(-1, 2)), []


def _value(row: dict[str, pa.Scalar], name: str, default: Any) -> Any:
    value = row[name].as_py() if name in row else None
    return default if value is None else value


def _turn(turn: dict[str, Any]) -> Turn:
    return Turn(**{**turn, "kind": TurnKind(turn["kind"])})
