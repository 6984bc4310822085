"""`openrlhf-alp metrics` and the page about metrics know the names that training logs."""

import re
from pathlib import Path

import pytest

from openrlhf_alp.cli.main import main
from openrlhf_alp.objective.metric_names import METRICS


def test_a_word_selects_metrics_by_name_or_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["metrics", "Envelope_9"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        f"alp/envelope_9_{suffix}" for suffix in ("share", "p01", "p50", "p99")
    ]
    assert main(["metrics"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(METRICS)
    assert main(["metrics", "no such word"]) == 1
    assert "no such word" in capsys.readouterr().err


def test_whole_names_on_the_page_exist() -> None:
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    names = set(re.findall(r"`(alp/\w+)`", page))
    assert len(names) > 10 and names <= METRICS.keys()
