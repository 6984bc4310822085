"""What is wrong with the options of `preflight` is found before torch is imported."""

from __future__ import annotations

from pathlib import Path

import pytest

from openrlhf_alp.cli.main import main
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
    assert f"{API_KEY_VARIABLE} not set" in capsys.readouterr().out


def test_pushing_needs_the_admin_key(api_key: None, capsys: pytest.CaptureFixture) -> None:
    assert preflight("--push") == 2
    assert f"{ADMIN_KEY_VARIABLE} not set" in capsys.readouterr().out


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


def test_a_prompt_file_that_is_not_there_is_named(
    api_key: None, capsys: pytest.CaptureFixture
) -> None:
    assert preflight("--prompts", "nowhere.jsonl") == 2
    assert "nowhere.jsonl" in capsys.readouterr().out
