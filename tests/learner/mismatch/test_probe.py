"""`openrlhf-alp preflight` on a real service: agreement, other weights, what cannot be used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from openrlhf_alp.cli.main import main

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]

HEAD = "lm_head.weight"


def preflight(model: Path, url: str, *flags: str) -> int:
    return main(["preflight", "--model", str(model), "--url", url, "--max-tokens", "8", *flags])


@pytest.fixture
def sharper_model(tiny_model: Path, tmp_path: Path) -> Path:
    """The same architecture and tokenizer with another head: a much surer policy."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "sharper"))
    tensors = load_file(folder / "model.safetensors")
    tensors[HEAD] = tensors[HEAD] * 40
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_same_weights_are_ok_and_the_report_says_how_close(
    tiny_model: Path, hf_service: Any, service_keys: None, capsys: pytest.CaptureFixture
) -> None:
    # Other tests train against the same service; the push makes its weights the folder's.
    assert preflight(tiny_model, hf_service.url, "--push", "--explain", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"] == "ok" and report["causes"] == report["findings"] == []
    assert report["weights"]["num_tensors"] > 10 and report["weights"]["different"] == []
    assert report["num_samples"] == 8 * 4
    figures = report["figures"]
    assert 32 <= figures["num_tokens"] <= 8 * 32
    # The engine computes in float32, the learner in bfloat16: close, and not the same.
    assert 0 < figures["k3_kl"] < 1e-3
    assert figures["p01"] <= figures["p50"] <= figures["p99"] <= figures["max_abs"]
    causes = {cause["name"]: cause["verdict"] for cause in report["explanation"]["hypotheses"]}
    assert causes["other weights"] == causes["temperature"] == causes["chat template"] == "ok"
    assert causes["prefix cache"] == "not tested"


def test_other_weights_are_broken_and_the_tensor_is_named(
    tiny_model: Path,
    sharper_model: Path,
    hf_service: Any,
    service_keys: None,
    capsys: pytest.CaptureFixture,
) -> None:
    assert preflight(tiny_model, hf_service.url, "--push") == 0
    assert preflight(sharper_model, hf_service.url, "--explain") == 1
    shown = capsys.readouterr().out
    assert f"tensors are not those of the model folder, first {HEAD}" in shown
    assert "other weights" in shown and "likely" in shown
    assert "broken: they do not compute the same thing" in shown
    assert "the service holds other weights" in shown


def test_prompts_come_from_a_file(
    tiny_model: Path, hf_service: Any, service_keys: None, tmp_path: Path, capsys: Any
) -> None:
    rows = [{"question": "What is 1 + 1?"}, {"question": [{"role": "user", "content": "Hello"}]}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    flags = ("--prompts", str(file), "--input-key", "question", "--samples", "3", "--json")
    assert preflight(tiny_model, hf_service.url, "--push", *flags) == 0
    assert json.loads(capsys.readouterr().out)["num_samples"] == 6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--max-tokens", "400"), "max_model_len: learner needs"),
        (("--max-tokens", "0"), "max_tokens is 0; it must be above 0"),
        (("--temperature", "0"), "greedy answers have no log-prob"),
    ],
)
def test_what_cannot_be_measured_ends_with_status_2_and_the_fix(
    tiny_model: Path,
    hf_service: Any,
    service_keys: None,
    capsys: pytest.CaptureFixture,
    flags: tuple[str, ...],
    message: str,
) -> None:
    assert preflight(tiny_model, hf_service.url, *flags) == 2
    assert message in capsys.readouterr().out


def test_a_service_that_rounds_its_weights_is_measured_and_named(
    sharper_model: Path,
    start_service: Any,
    service_keys: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    flags = ("--engine", "hf", "--simulate-quantization", "int4")
    with start_service(sharper_model, tmp_path, *flags) as service:
        preflight(sharper_model, service.url, "--push", "--json")
    report = json.loads(capsys.readouterr().out)
    assert "simulates int4 quantization" in report["simulated"]
    assert report["weights"]["different"] == [], "digests are those of what was pushed"
    assert report["figures"]["k3_kl"] > 0.01
