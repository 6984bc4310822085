"""JSON lines of another trainer become a batch file; a faulty line is named."""

import json
from pathlib import Path

import pytest

from openrlhf_alp.cli.main import main
from openrlhf_alp.replay.files.checks import BatchFileError
from openrlhf_alp.replay.files.convert import read_json_lines
from openrlhf_alp.replay.files.read import read_batch
from openrlhf_alp.replay.files.schema import BatchInfo

SHORT = {
    "prompt_ids": [1, 2],
    "response_ids": [3, 4],
    "rollout_log_probs": [-0.5, -1.0],
    "group": "a",
    "reward": 1,
}
LONG = {
    "token_ids": [1, 2, 3, 4],
    "action_mask": [False, False, True, False],
    "rollout_log_probs": [0, 0, -0.5, 0],
    "advantages": 0.25,
}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_both_forms_of_a_line_mean_the_same_axis(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", SHORT, LONG)
    target = tmp_path / "batch.parquet"
    arguments = [str(source), str(target), "--temperature", "0.5", "--model", "policy"]
    assert main(["convert-batch", *arguments]) == 0
    found = read_batch(target)
    short, long = found.samples
    assert short.token_ids.tolist() == [1, 2, 3, 4]
    assert short.rollout_log_probs.tolist() == [0, 0, -0.5, -1]
    assert short.action_ranges == ((2, 4),)
    assert long.advantages.tolist() == [0, 0, 0.25, 0]
    assert (found.info.temperature, found.info.model) == (0.5, "policy")
    assert main(["convert-batch", *arguments]) == 2  # nothing is replaced unasked


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([1], "line 2: a list in place of an object"),
        ({**SHORT, "logprob": [1]}, "line 2: unknown field logprob"),
        ({"prompt_ids": [1]}, "line 2: field 'response_ids' is missing"),
        ({**SHORT, "rollout_log_probs": [-1]}, "line 2, field rollout_log_probs: 1 values for 4"),
        ({**SHORT, "rollout_log_probs": [-1, None]}, "line 2, field rollout_log_probs: nan at"),
        ({**SHORT, "reward": None}, "line 2, field reward: None, and no advantages"),
    ],
)
def test_a_faulty_line_is_named(tmp_path: Path, row: object, said: str) -> None:
    with pytest.raises(BatchFileError) as error:
        read_json_lines(write(tmp_path / "rows.jsonl", SHORT, row), BatchInfo())
    assert said in str(error.value)
