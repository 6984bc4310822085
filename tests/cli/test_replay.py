"""`openrlhf-alp replay` from a folder of batches to its table, files and pictures."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "replay"))

from made_batches import sampled_batch, tiny_llama

from openrlhf_alp.alp import PerturbationConfig, attach
from openrlhf_alp.cli.main import main
from openrlhf_alp.objective.methods import METHODS
from openrlhf_alp.replay.bench.sigma import start_sigma
from openrlhf_alp.replay.files.read import read_batch
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


def test_the_tables_fit_into_80_characters(
    model: Path,
    batches: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    output = str(tmp_path / "out")
    assert main(["replay", str(batches), "--model", str(model), "--output", output]) == 0
    tables = capsys.readouterr().out.partition("before the update")[2].partition("files ")[0]
    lines = tables.splitlines()
    assert max(map(len, lines)) <= 80
    # Each method has one row in both tables, and no cell was cut short.
    for method in METHODS:
        assert sum(line.split()[:1] == [method] for line in lines) == 2
    assert "…" not in tables


@pytest.mark.parametrize("layers", ["embedding", "logits", "0-1,logits"])
def test_the_noise_goes_where_it_is_asked_for(
    model: Path, batches: Path, tmp_path: Path, layers: str
) -> None:
    """Against the model itself, one sample at a time, with the noise in `enabled()` alone."""
    output = tmp_path / "out"
    command = ["replay", str(batches), "--model", str(model), "--output", str(output)]
    command += ["--methods", "token-bypass,token-alp", "--layers", layers, "--sigma0", "0.1"]
    assert main([*command, "--lr", "1e-12"]) == 0
    found = json.loads((output / "replay.json").read_text())["methods"]["token-alp"]["before"]
    noise = PerturbationConfig(sigma0=None, layers=layers)
    log_ratios = noisy_log_ratios(noise, read_batch(step_file(batches, 2)), sigma0=0.1)
    assert found["alp/log_ratio_mean"] == pytest.approx(log_ratios.mean().item(), abs=1e-4)
    assert found["alp/log_ratio_max"] == pytest.approx(log_ratios.max().item(), abs=1e-4)


def test_draws_are_averaged(model: Path, batches: Path, tmp_path: Path) -> None:
    """The mean probability of four draws, of the first of which a single draw consists."""
    before = {}
    for draws in (1, 4):
        output = tmp_path / str(draws)
        command = ["replay", str(batches), "--model", str(model), "--output", str(output)]
        command += ["--methods", "token-alp", "--draws", str(draws), "--sigma0", "0.1"]
        assert main(command) == 0
        found = json.loads((output / "replay.json").read_text())
        assert found["settings"]["draws"] == draws
        before[draws] = found["methods"]["token-alp"]["before"]
        noise = PerturbationConfig(sigma0=None, draws=draws)
        expected = noisy_log_ratios(noise, read_batch(step_file(batches, 2)), sigma0=0.1)
        assert before[draws]["alp/log_ratio_mean"] == pytest.approx(
            expected.mean().item(), abs=1e-4
        )
    assert before[4]["alp/k3_kl"] < before[1]["alp/k3_kl"]


def noisy_log_ratios(
    noise: PerturbationConfig, batch: RecordedBatch, *, sigma0: float
) -> torch.Tensor:
    """(N,) of the action tokens, sample by sample, through the model as `attach` leaves it."""
    model = tiny_llama()
    perturbation = attach(model, noise)
    scales = Learner(tiny_llama(), noise=noise)
    start_sigma(scales, batch.samples, 1024, sigma0)
    assert scales.perturbation is not None and scales.perturbation.scales is not None
    perturbation.set_scales(scales.perturbation.scales)
    perturbation.sigma0 = sigma0
    found = []
    for sample in batch.samples:
        ids = torch.tensor(sample.token_ids.tolist())[None]
        copies = ids.repeat(noise.draws, 1)
        with (
            torch.no_grad(),
            perturbation.enabled(
                update=0,
                sample_ids=torch.tensor([sample.sample]),
                attention_mask=torch.ones_like(ids),
            ),
        ):
            logits = model(copies, attention_mask=torch.ones_like(copies)).logits
        every = logits.float().log_softmax(-1)[:, :-1].gather(-1, copies[:, 1:, None])[..., 0]
        mean = every.exp().mean(0).log()
        ratio = mean - torch.from_numpy(sample.rollout_log_probs[1:].copy())
        found.append(ratio[torch.from_numpy(sample.action_mask[1:])])
    return torch.cat(found)


def test_a_faulty_batch_of_the_models_weights_is_named_and_the_next_one_taken(
    model: Path, batches: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = read_batch(step_file(batches, 2))
    first = replace(
        bad.samples[0], rollout_log_probs=np.full_like(bad.samples[0].rollout_log_probs, np.nan)
    )
    write_batch(replace(bad, samples=(first, *bad.samples[1:])), step_file(batches, 2))
    command = ["replay", str(batches), "--model", str(model), "--methods", "grpo"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "step-000002.parquet, sample 0, field rollout_log_probs" in said
    assert "step 1, 8 samples" in said
    step_file(batches, 1).unlink()
    assert main([*command, "--output", str(tmp_path / "none")]) == 2
    assert "Not replayed" in capsys.readouterr().out


def test_a_faulty_file_is_refused_before_the_model_is_loaded(
    model: Path, batches: Path, tmp_path: Path
) -> None:
    """In a process of its own, with a model folder that cannot be loaded: the file is named, and
    neither torch nor transformers was imported."""
    script = (
        "import sys\n"
        "from openrlhf_alp.cli.main import main\n"
        "status = main(sys.argv[1:])\n"
        "loaded = {'torch', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'loaded {loaded}' if loaded else status)\n"
    )
    command = ["replay", str(step_file(batches, 3)), "--model", str(tmp_path / "no-model")]
    done = subprocess.run(
        [sys.executable, "-c", script, *command], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2, done.stderr
    assert "cut short" in done.stdout


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
        (["--draws", "0"], "--draws is 0"),
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
    batch = step_file(tmp_path / "one", 1)
    write_batch(sampled_batch(tiny_llama()), batch)
    for path, folder in ((tmp_path / "none", model), (batch, tmp_path / "no-model")):
        assert main(["replay", str(path), "--model", str(folder)]) == 2
    assert main(["replay", str(tmp_path), "--model", str(model)]) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "neither a file nor a folder" in said
    assert "cannot be loaded as a causal LM" in said
    assert "has no batch file" in said
