"""`openrlhf-alp replay` from a folder of batches to its table, files and pictures."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "replay"))

from made_batches import sampled_batch, tiny_llama

from openrlhf_alp.cli.main import main
from openrlhf_alp.replay.files.records import RecordedBatch
from openrlhf_alp.replay.files.write import step_file, write_batch
from openrlhf_alp.replay.learner import Learner


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture
def batches(tmp_path: Path) -> Path:
    """Steps 1 and 2; the second was recorded at the weights of `model`. And half a third."""
    folder = tmp_path / "batches"
    found = sampled_batch(tiny_llama())
    for step, digest in ((1, "f" * 64), (2, Learner(tiny_llama()).digests()[torch.bfloat16])):
        update = {"step": step, "model_digest": digest, "training": {"learning_rate": 1e-3}}
        info = found.info.model_copy(update=update)
        write_batch(RecordedBatch(info=info, samples=found.samples), step_file(folder, step))
    step_file(folder, 3).write_bytes(step_file(folder, 1).read_bytes()[:100])
    return folder


def test_all_methods_of_the_batch_of_the_models_weights(
    model: Path, batches: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "replay"
    command = ["replay", str(batches), "--model", str(model), "--output", str(output)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "step 2" in said and "step-000003.parquet: cut short" in said
    assert "digest" not in said
    found = json.loads((output / "replay.json").read_text())
    rows = found["methods"]
    assert found["settings"]["learning_rate"] == 1e-3
    assert {"grpo", "seq-mis", "dppo-tv", "token-alp", "seq-alp-mis"} <= rows.keys()
    assert rows["grpo"]["cosine"] == pytest.approx(1.0)
    assert all(row["kl_after"] > 0 for row in rows.values())
    assert (output / "envelope.png").stat().st_size > 10_000
    assert (output / "tails.png").exists()

    # The same command again finds everything done; after a loss of results it makes the missing.
    assert main(command) == 0
    assert "methods are in" in capsys.readouterr().out
    kept = {name: rows[name] for name in ("grpo", "token-alp")}
    (output / "replay.json").write_text(json.dumps({**found, "methods": kept}))
    assert main(command) == 0
    again = json.loads((output / "replay.json").read_text())["methods"]
    for name, row in rows.items():
        assert again[name]["cosine"] == pytest.approx(row["cosine"])
        assert again[name]["after"] == row["after"]


def test_weights_that_are_not_the_recorded_ones_are_said(
    model: Path, batches: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["replay", str(batches), "--model", str(model), "--step", "1"]
    assert main([*command, "--methods", "grpo", "--output", str(tmp_path / "out")]) == 0
    assert "the batch was recorded at ffffffffffff" in capsys.readouterr().out


def test_explain_prints_and_writes_where_and_why(
    model: Path, batches: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["replay", str(batches), "--model", str(model), "--output", str(tmp_path)]
    assert main([*command, "--explain"]) == 0
    said = capsys.readouterr().out
    assert "rollout probability" in said and "lm_head" in said and "temperature" in said
    assert json.loads((tmp_path / "explain.json").read_text())["hypotheses"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--methods", "ppo"], "--methods 'ppo' is unknown"),
        (["--step", "7"], "--step 7 is not in"),
        (["--updates", "0"], "--updates is 0"),
        (["--lr", "-1"], "--lr is -1.0"),
        (["--sigma0", "small"], "--sigma0 is small"),
        (["--layers", "9"], "--alp.layers is '9'"),
    ],
)
def test_a_wrong_option_is_named(
    model: Path, batches: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", str(batches), "--model", str(model), *options]) == 2
    assert said in " ".join(capsys.readouterr().out.split())


def test_what_is_not_there_is_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, folder in ((tmp_path / "none", model), (tmp_path, tmp_path / "no-model")):
        assert main(["replay", str(path), "--model", str(folder)]) == 2
    assert main(["replay", str(tmp_path), "--model", str(model)]) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "neither a file nor a folder" in said
    assert "cannot be loaded as a causal LM" in said
    assert "has no batch file" in said
