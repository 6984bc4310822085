"""A recipe with real services, Ray, DeepSpeed and a tiny model; killed in training, continued."""

import json
import math
from pathlib import Path

import pytest

from benchmarks.common.launching import StartLaunch, wait_until_gone, write_recipe

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]


def test_a_killed_server_comes_back_and_a_killed_trainer_continues_where_it_was(
    start_real: StartLaunch, tmp_path: Path
) -> None:
    recipe, run = write_recipe(tmp_path, stages=False), tmp_path / "run"
    launch = start_real(str(recipe), "--output", str(run), run=run)
    launch.wait_until(lambda: launch.num_steps() >= 1)
    # The only one: it comes back without the learner's weights and needs another push.
    launch.kill("services.rollout")
    launch.wait_until(lambda: launch.num_steps() >= 3)
    family = launch.family()
    launch.kill("openrlhf_alp.cli.train_ppo_ray")
    status, output = launch.finish(timeout=60)
    assert status == 1, output
    assert "Training was ended by SIGKILL" in output
    assert "preflight" in output
    assert "rollout-0 was ended by SIGKILL; started again (1 of 3)" in output
    assert wait_until_gone(family, 0) == []

    status, output = start_real("--resume", str(run), run=run).finish()
    assert status == 0, output
    assert "continues after step 2" in output
    metrics = (run / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in metrics]
    # The data ends with step 4: another order or a second start would give more or fewer steps.
    assert [step["global_step"] for step in steps] == [1, 2, 3, 4]
    assert {step["alp/sigma0"] for step in steps} == {0.01}
    # Adam moves log sigma by at most its rate, 0.01, in a step: a new start at step 3 would have
    # come to 0.02 at most, and one that continues has gone further in some dimension.
    assert math.log(steps[-1]["alp/sigma_max"] / 0.01) > 0.0205
    assert json.loads((run / "summary.json").read_text())["steps"] == 4
