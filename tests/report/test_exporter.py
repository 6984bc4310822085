import json
import os
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest

from openrlhf_alp.report.exporter import RunCollector


def write(runs: Path, run: str, *steps: dict[str, float], written_s: int = 1) -> None:
    folder = runs / run
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.jsonl"
    with path.open("a") as file:
        file.writelines(json.dumps(step) + "\n" for step in steps)
    os.utime(path, (written_s, written_s))


def scrape(registry: CollectorRegistry) -> list[str]:
    return [line for line in generate_latest(registry).decode().splitlines() if line[0] != "#"]


def test_the_newest_step_of_the_newest_run_is_shown(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    registry.register(RunCollector(tmp_path))
    assert scrape(registry) == []
    write(tmp_path, "old", {"global_step": 9, "rollout/reward_mean": 0.25})
    assert scrape(registry) == [
        'openrlhf_alp_learner_step{run="old"} 9.0',
        'openrlhf_alp_learner{metric="rollout/reward_mean",run="old"} 0.25',
    ]
    write(tmp_path, "sweep/new", {"global_step": 1}, {"global_step": 2}, written_s=2)
    assert scrape(registry) == ['openrlhf_alp_learner_step{run="sweep/new"} 2.0']
    # Nothing new is no reason to forget the step.
    assert scrape(registry) == ['openrlhf_alp_learner_step{run="sweep/new"} 2.0']


def test_a_damaged_file_is_a_gap_and_named(tmp_path: Path, capsys) -> None:
    registry = CollectorRegistry()
    registry.register(RunCollector(tmp_path))
    write(tmp_path, "run", {"global_step": 1})
    (tmp_path / "run/metrics.jsonl").write_text("no JSON\n")
    assert scrape(registry) == []
    assert "metrics.jsonl, line 1" in capsys.readouterr().err
