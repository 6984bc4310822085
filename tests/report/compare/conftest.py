import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Writes a run folder as a launch leaves it; step s has the s-th of `rewards`."""

    def make(
        name: str,
        rewards: list[float],
        *,
        method: str = "seq-alp",
        seed: int = 1,
        recipe: str = "",
        condition: str = "",
        finished: bool = True,
        metrics: Callable[[int], dict[str, float]] = lambda step: {"alp/k3_kl": 0.01},
        environment: dict[str, Any] | None = None,
    ) -> Path:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "recipe.toml").write_text(
            f'{recipe}\n[run]\nseed = {seed}\ncondition = "{condition}"\n'
            f'[train]\nalp.method = "{method}"\n'
        )
        kept = {"commit": "0123456789abcdef", "versions": {"torch": "2.13.0"}}
        (folder / "environment.json").write_text(json.dumps(environment or kept))
        rows = [
            {"global_step": step, "rollout/reward_mean": reward, **metrics(step)}
            for step, reward in enumerate(rewards, start=1)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if finished:
            (folder / "summary.json").write_text("{}")
        return folder

    return make
