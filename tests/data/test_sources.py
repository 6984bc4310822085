import json

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from openrlhf_alp.data.sources import SourceError, read_rows, source_stem

ROWS = [{"problem": "What is 3 + 4?", "answer": "7"}, {"problem": "What is 2 + 2?", "answer": "4"}]


def contents(path):
    return [row.content for row in read_rows(str(path))]


def test_json_lines_keep_a_broken_line_and_its_number(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text(f'{json.dumps(ROWS[0])}\n\n{{"problem": \n{json.dumps(ROWS[1])}\n')
    rows = list(read_rows(str(path)))
    assert [(row.number, row.content) for row in rows] == [
        (1, ROWS[0]),
        (3, '{"problem": '),
        (4, ROWS[1]),
    ]


def test_fields_may_change_their_type_from_row_to_row(tmp_path):
    path = tmp_path / "set.jsonl"
    mixed = [{"answer": "7"}, {"answer": ["7", "8"]}, {"answer": 7.5}]
    path.write_text("".join(json.dumps(row) + "\n" for row in mixed))
    assert contents(path) == mixed


@pytest.mark.parametrize("text", [json.dumps(ROWS), "\n".join(map(json.dumps, ROWS))])
def test_a_json_file_is_a_list_or_lines(tmp_path, text):
    path = tmp_path / "set.json"
    path.write_text(text)
    assert contents(path) == ROWS


def test_parquet_rows_come_with_their_nested_fields(tmp_path):
    path = tmp_path / "set.parquet"
    rows = [
        {"prompt": [{"role": "user", "content": "?"}], "reward_model": {"ground_truth": str(i)}}
        for i in range(1500)  # more than one batch
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert contents(path) == rows
    assert [row.number for row in read_rows(str(path))][-1] == 1500


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("set.csv", "a,b", r"ends in \.jsonl, \.json, \.parquet"),
        ("set.parquet", "not parquet", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(SourceError, match=message):
        list(read_rows(str(tmp_path / name)))


@pytest.mark.parametrize("source", ["nowhere.jsonl", "folder/nowhere.jsonl", "./a/b", "word"])
def test_a_missing_file_is_not_looked_for_on_the_hub(source):
    with pytest.raises(SourceError, match="there is no such file"):
        list(read_rows(source))


@pytest.mark.parametrize("source", ["org/name", "org/name:train.jsonl"])
def test_an_id_is_read_by_datasets_which_takes_a_folder_of_that_name_too(
    tmp_path, monkeypatch, source
):
    (tmp_path / "org" / "name").mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "org" / "name" / "train.jsonl").write_text(lines)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = list(read_rows(source))
    assert [(row.source, row.number, row.content) for row in rows] == [
        (source, 1, ROWS[0]),
        (source, 2, ROWS[1]),
    ]


def test_an_id_that_is_nowhere_is_an_error_with_the_fix(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match=r"nobody/nothing \(split train\) cannot be loaded"):
        list(read_rows("nobody/nothing"))


def test_the_name_of_a_source_is_its_stem_or_its_id():
    assert source_stem("data/math500.jsonl") == "math500"
    assert source_stem("org/name") == "org/name"
