"""A recipe with real services, Ray, DeepSpeed and a tiny model; killed in training, continued."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.policies.tiny_policy import make_tokenizer, tiny_config

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]

RECIPE = """\
[model]
path = "{model}"
[data]
path = "{prompts}"
[rollout]
engine = "hf"
max_model_len = 64
[train]
data.max_len = 64
data.apply_chat_template = true
ds.attn_implementation = "sdpa"
rollout.max_new_tokens = 6
rollout.batch_size = 2
rollout.n_samples_per_prompt = 2
rollout.micro_batch_size = 2
train.batch_size = 4
train.micro_batch_size = 2
train.num_episodes = 1
alp.enable = true
alp.sigma0 = 0.01
alp.lr = 1e-2
algo.advantage.estimator = "group_norm"
algo.kl.init_coef = 0
actor.adam.lr = 1e-3
actor.lr_scheduler = "constant"
actor.lr_warmup_ratio = 0.0
reward.remote_url = "{reward}"
ckpt.save_steps = 2
"""


REWARD = """\
import torch

def reward_func(queries, prompts, labels, **_):
    return {"rewards": torch.tensor([float(sum(map(ord, query)) % 3) for query in queries])}
"""


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `openrlhf-alp launch`; what still runs at the end of the test is ended."""
    started = []

    def launch(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "openrlhf_alp.cli.main", "launch", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            },
        )
        started.append(process)
        return process

    yield launch
    for process in started:
        process.terminate()
        process.communicate(timeout=60)


def kill(launch: subprocess.Popen[str], module: str) -> None:
    (found,) = [c for c in psutil.Process(launch.pid).children() if module in c.cmdline()]
    found.send_signal(signal.SIGKILL)


def wait_for_steps(launch: subprocess.Popen[str], metrics: Path, count: int) -> None:
    while not metrics.exists() or len(metrics.read_text().splitlines()) < count:
        assert launch.poll() is None, launch.communicate()[0]
        time.sleep(0.1)


def test_a_killed_server_comes_back_and_a_killed_trainer_continues_where_it_was(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(tokenizer, max_positions=64)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    recipe, run = tmp_path / "r.toml", tmp_path / "run"
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"input": f"What is {n} + 1?", "label": str(n + 1)} for n in range(8)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # Answers of a random model are never right; this reward tells them apart.
    reward = tmp_path / "reward.py"
    reward.write_text(REWARD)
    recipe.write_text(RECIPE.format(model=tmp_path / "model", prompts=prompts, reward=reward))
    metrics = run / "metrics.jsonl"

    launch = start(str(recipe), "--output", str(run))
    wait_for_steps(launch, metrics, 1)
    # The only one: it comes back without the learner's weights and needs another push.
    kill(launch, "services.rollout")
    wait_for_steps(launch, metrics, 3)
    family = psutil.Process(launch.pid).children(recursive=True)
    kill(launch, "openrlhf_alp.cli.train_ppo_ray")
    output, _ = launch.communicate(timeout=60)
    assert launch.returncode == 1, output
    assert "Training was ended by SIGKILL" in output
    assert "preflight" in output
    assert "rollout-0 was ended by SIGKILL; started again (1 of 3)" in output
    assert not [process for process in family if process.is_running()]

    again = start("--resume", str(run))
    output, _ = again.communicate(timeout=900)
    assert again.returncode == 0, output
    assert "continues after step 2" in output
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    # The data ends with step 4: another order or a second start would give more or fewer steps.
    assert [step["global_step"] for step in steps] == [1, 2, 3, 4]
    assert {step["alp/sigma0"] for step in steps} == {0.01}
    # Adam moves log sigma by at most its rate, 0.01, in a step: a new start at step 3 would have
    # come to 0.02 at most, and one that continues has gone further in some dimension.
    assert math.log(steps[-1]["alp/sigma_max"] / 0.01) > 0.0205
    assert json.loads((run / "summary.json").read_text())["steps"] == 4
