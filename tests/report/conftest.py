import json
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def metrics_file(tmp_path: Path) -> Path:
    """Three steps as the trainer writes them; the log-ratio of step s spreads by s / 10."""
    path = tmp_path / "metrics.jsonl"
    lines = []
    for step, reward in ((1, 0.25), (2, 0.5), (3, 0.75)):
        row = {
            "global_step": step,
            "rollout/reward_mean": reward,
            "rollout/response_length_mean": 10.0,
            "rollout/num_samples": 64.0,
            "timing/generation": 4.0,
            "alp/log_ratio_p01": -step / 10,
            "alp/log_ratio_p25": -step / 100,
            "alp/log_ratio_p50": 0.0,
            "alp/log_ratio_p75": step / 100,
            "alp/log_ratio_p99": step / 10,
        }
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))
    return path


@pytest.fixture
def append(metrics_file: Path) -> Callable[[str], None]:
    def write(text: str) -> None:
        with metrics_file.open("a") as file:
            file.write(text)

    return write
