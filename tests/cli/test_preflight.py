"""`preflight`: wrong options are found before torch is imported; what the report names."""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from openrlhf_alp.cli.main import main
from openrlhf_alp.cli.preflight import PreflightView, as_json, read_prompts
from openrlhf_alp.learner.mismatch.judge import LIMITS
from services.common.wire import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE


@pytest.fixture
def api_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, "a-key")
    monkeypatch.delenv(ADMIN_KEY_VARIABLE, raising=False)


def preflight(*flags: str) -> int:
    return main(["preflight", "--model", "nowhere", "--url", "http://127.0.0.1:9", *flags])


def test_help_states_every_limit(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["preflight", "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for limit in LIMITS:
        [line] = [line for line in shown.splitlines() if f"|{limit.figure}|" in line]
        assert line.split()[1:] == [f"{limit.suspicious:g}", f"{limit.broken:g}"]


def test_a_missing_key_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    assert preflight() == 2
    assert f"{API_KEY_VARIABLE} is not set" in capsys.readouterr().out


def test_pushing_needs_the_admin_key(api_key: None, capsys: pytest.CaptureFixture) -> None:
    assert preflight("--push") == 2
    assert f"{ADMIN_KEY_VARIABLE} is not set" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"input": "a"}\n{"question": "b"}\n', "line 2: no JSON object with the field 'input'"),
        ("What is 1 + 1?\n", "line 1: no JSON object with the field 'input'"),
        ("", "has no line"),
    ],
)
def test_a_prompt_file_that_cannot_be_read_is_named_with_the_line(
    api_key: None, tmp_path: Path, capsys: pytest.CaptureFixture, text: str, message: str
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    assert preflight("--prompts", str(file)) == 2
    assert message in capsys.readouterr().out


def test_a_prompt_may_hold_any_character(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('\ufeff{"input": "a\u2028b"}\n{"input": "c"}\n{"input": "d"}\n')
    asked = argparse.Namespace(prompts=file, num_prompts=2, input_key="input")
    assert read_prompts(asked) == ("a\u2028b", "c")


def test_a_prompt_file_that_is_not_there_is_named(
    api_key: None, capsys: pytest.CaptureFixture
) -> None:
    assert preflight("--prompts", "nowhere.jsonl") == 2
    assert "nowhere.jsonl" in capsys.readouterr().out


def test_a_service_that_rounds_its_weights_is_named_in_both_reports() -> None:
    from openrlhf_alp.learner.mismatch.judge import judge
    from openrlhf_alp.learner.mismatch.measure import Mismatch
    from openrlhf_alp.learner.mismatch.probe import ProbeReport, WeightComparison
    from openrlhf_alp.replay.files.records import RecordedBatch
    from openrlhf_alp.replay.files.schema import BatchInfo

    mismatch = Mismatch.of(np.array([0.1, -0.2], dtype=np.float32))
    report = ProbeReport(
        mismatch=mismatch,
        verdict=judge(mismatch.figures()),
        weights=WeightComparison(num_tensors=2, different=()),
        num_samples=1,
        versions=(0,),
        batch=RecordedBatch(info=BatchInfo(), samples=()),
        simulated="the service simulates int4 quantization",
    )
    console = Console(record=True, file=io.StringIO())
    PreflightView(console).report(report)
    assert "the service simulates int4 quantization" in console.export_text()
    assert as_json(report)["simulated"] == report.simulated
