"""A batch survives the disk whole; what is wrong with a file is named by file, sample and field."""

import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_batches import batch, sample

from openrlhf_alp.episodes.records import ToolCall
from openrlhf_alp.replay.files.checks import BatchFileError
from openrlhf_alp.replay.files.read import find_files, read_all, read_batch, require_model
from openrlhf_alp.replay.files.records import RecordedBatch
from openrlhf_alp.replay.files.schema import METADATA_KEY, SCHEMA
from openrlhf_alp.replay.files.write import BatchWriter, step_file, to_table, write_batch


def same(left: object, right: object) -> bool:
    """Whether two samples have equal fields, arrays by value."""
    pairs = [(getattr(left, f.name), getattr(right, f.name)) for f in fields(left)]
    return all(np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b for a, b in pairs)


def test_a_batch_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "step-000001.parquet"
    written = batch(sample(0), sample(1), method="token-alp", sampling={"temperature": 0.7})
    write_batch(written, path)
    found = read_batch(path)
    assert found.info == written.info
    assert found.info.temperature == 0.7
    assert all(same(a, b) for a, b in zip(found.samples, written.samples, strict=True))
    assert found.samples[0].versions.tolist() == [-1, -1, 3, 3, -1, 4]
    assert found.samples[0].action_mask.tolist() == [False, False, True, True, False, True]


def test_pandas_alone_reads_samples_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "step-000001.parquet"
    write_batch(batch(sample(0), sample(1), method="seq-alp"), path)
    table = pd.read_parquet(path)
    assert table["token_ids"][1].tolist() == [5, 6, 7, 8, 9, 10]
    assert table["tool_calls"][0][0]["code"] == "print(2 + 2)"
    assert table["spans"][0][1]["version"] == 4
    metadata = json.loads(pq.read_metadata(path).metadata[METADATA_KEY])
    assert metadata["method"] == "seq-alp"
    assert metadata["step"] == 1


HOSTILE = "\ud800 lone, NUL \0, \u202eright to left, \U0001f4a9, " + "x" * 100_000


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    path = tmp_path / "step-000001.parquet"
    call = ToolCall(code=HOSTILE, status="ok", total_s=0, run_s=0, output=HOSTILE)
    write_batch(batch(sample(prompt=HOSTILE, label=HOSTILE, tool_calls=(call,))), path)
    [found] = read_batch(path).samples
    # UTF-8 has no lone surrogate; everything else is as it was.
    expected = HOSTILE.replace("\ud800", "\\ud800")
    assert found.prompt == found.label == expected
    assert found.tool_calls[0].code == found.tool_calls[0].output == expected


def test_a_batch_takes_a_few_bytes_a_token(tmp_path: Path) -> None:
    """64 samples of 70 random ids and log-probs, which do not compress: 4 + 4 bytes and a rest."""
    path = tmp_path / "step-000001.parquet"
    random = np.random.default_rng(0)
    long = [
        sample(
            i,
            token_ids=random.integers(0, 49152, 70).astype(np.int32),
            rollout_log_probs=-random.exponential(size=70).astype(np.float32),
            action_ranges=((40, 70),),
            advantages=np.ones(70, dtype=np.float32),
        )
        for i in range(64)
    ]
    write_batch(batch(*long), path)
    assert path.stat().st_size / (64 * 70) < 12


def test_the_writer_works_beside_and_survives_a_folder_it_cannot_write(tmp_path: Path) -> None:
    writer = BatchWriter(tmp_path / "batches")
    for step in (1, 2, 3):
        writer.put(batch(step=step))
    writer.close()
    files, faults = find_files(tmp_path / "batches")
    assert [path.name for path in files] == [f"step-00000{i}.parquet" for i in (1, 2, 3)]
    assert not faults
    (tmp_path / "file").touch()
    broken = BatchWriter(tmp_path / "file" / "batches")
    broken.put(batch())
    broken.close()
    assert broken.num_failed == 1


def test_a_half_written_file_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    write_batch(batch(step=1), step_file(tmp_path, 1))
    write_batch(batch(step=2), step_file(tmp_path, 2))
    whole = step_file(tmp_path, 2).read_bytes()
    step_file(tmp_path, 2).write_bytes(whole[: len(whole) // 2])
    (tmp_path / "step-000003.parquet.partial").write_bytes(whole[:100])
    files, faults = find_files(tmp_path)
    assert [fault.file.endswith("step-000003.parquet.partial") for fault in faults] == [True]
    first, second = read_all(files)
    assert isinstance(first[1], RecordedBatch)
    assert "step-000002.parquet: cut short" in str(second[1][0])


def rewritten(path: Path, *, drop: str = "", **columns: pa.Array) -> Path:
    """A good file of two samples with other columns."""
    table = to_table(batch(sample(0), sample(1)))
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        if place < 0:
            table = table.append_column(name, values)
        else:
            table = table.set_column(place, name, values)
    pq.write_table(table.drop_columns([drop]) if drop else table, path)
    return path


GOOD = [0.0, 0.0, -0.5, -1.25, 0.0, -2.0]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (
            {"rollout_log_probs": pa.array([GOOD, [*GOOD[:3], float("nan"), *GOOD[4:]]])},
            "sample 1, field rollout_log_probs: nan at position 3, an action, is missing",
        ),
        (
            {"rollout_log_probs": pa.array([GOOD, [*GOOD[:3], None, *GOOD[4:]]])},
            "sample 1, field rollout_log_probs: nan at position 3, an action, is missing",
        ),
        (
            {"rollout_log_probs": pa.array([[*GOOD[:2], 0.5, *GOOD[3:]], GOOD])},
            "sample 0, field rollout_log_probs: 0.5 at position 2, an action, is positive",
        ),
        (
            {"rollout_log_probs": pa.array([GOOD, GOOD[:4]])},
            "sample 1, field rollout_log_probs: 4 values for 6 tokens",
        ),
        (
            {"token_ids": pa.array([[5, 6, 7, 8, 9, 10], [5, 6, 7, None, 9, 10]])},
            "sample 1, field token_ids: id -1 at position 3",
        ),
        (
            {"advantages": pa.array([[0.0] * 6, [float("inf")] * 6])},
            "sample 1, field advantages: inf at position 2",
        ),
        (
            {"drop": "action_ranges", "action_mask": pa.array([[True] * 5, [False, True] * 3])},
            "sample 0, field action_mask: 5 values for 6 tokens",
        ),
        (
            {"action_ranges": pa.array([[{"start": 2, "end": 9}], [{"start": 0, "end": 2}]])},
            "sample 0, field action_ranges: 2..9 does not follow 0 or ends beyond the 6 tokens",
        ),
        (
            {"action_ranges": pa.array([[{"start": 2, "end": 4}], [{"start": 0, "end": 2}]])},
            "sample 1, field action_ranges: position 0 is an action",
        ),
        ({"drop": "rollout_log_probs"}, "field rollout_log_probs: the column is missing"),
        (
            {"token_ids": pa.array(["five", "six"])},
            "field token_ids: string in place of list<item: int32>",
        ),
    ],
)
def test_a_fault_is_named_with_file_sample_and_field(
    tmp_path: Path, columns: dict[str, pa.Array], said: str
) -> None:
    path = rewritten(tmp_path / "bad.parquet", **columns)
    with pytest.raises(BatchFileError) as error:
        read_batch(path)
    assert f"{path}" in str(error.value)
    assert said in str(error.value)


def test_another_version_of_the_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "new.parquet"
    write_batch(batch(format_version=99, package_version="9.9"), path)
    with pytest.raises(BatchFileError, match=r"format version 99 \(openrlhf_alp 9\.9\)"):
        read_batch(path)
    unknown = SCHEMA.with_metadata({METADATA_KEY: b'{"invented": 1}'})
    pq.write_table(to_table(batch()).cast(unknown), path)
    with pytest.raises(BatchFileError, match="invented"):
        read_batch(path)


def test_a_model_with_another_tokenizer_or_vocabulary_is_refused() -> None:
    ours = batch(sample(0), sample(1), contract={"tokenizer_hash": "aaaa"}, model="policy")
    path = Path("batch.parquet")
    require_model(ours, path, vocab_size=11, tokenizer_hash="aaaa")
    with pytest.raises(BatchFileError, match="sampled with tokenizer aaaa, the model has bbbb"):
        require_model(ours, path, vocab_size=11, tokenizer_hash="bbbb")
    with pytest.raises(BatchFileError, match="sample 1, field token_ids: id 10 at position 5"):
        require_model(ours, path, vocab_size=10, tokenizer_hash=None)


def test_a_minimal_file_of_another_trainer_is_read(tmp_path: Path) -> None:
    path = tmp_path / "minimal.parquet"
    pd.DataFrame(
        {
            "token_ids": [[1, 2, 3], [1, 2, 4]],
            "rollout_log_probs": [[0.0, -0.5, -0.25], [0.0, -0.5, -1.0]],
            "action_mask": [[False, True, True], [False, False, True]],
            "group": [7, 7],
            "reward": [1.0, 0.0],
        }
    ).to_parquet(path)
    found = read_batch(path)
    assert [s.action_ranges for s in found.samples] == [((1, 3),), ((2, 3),)]
    assert [s.group for s in found.samples] == ["7", "7"]
    assert found.info.temperature == 1.0
    assert found.num_action_tokens == 3
    assert found.samples[0].advantages is None


def test_samples_without_any_trained_token_are_kept(tmp_path: Path) -> None:
    """A void episode is in the batch, for its group's baseline, and trains nothing."""
    path = tmp_path / "void.parquet"
    void = replace(sample(), action_ranges=(), void=True)
    write_batch(batch(void), path)
    assert not read_batch(path).samples[0].action_mask.any()
