"""A launch of real programs: a tiny model, both services, Ray and DeepSpeed, evaluation."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil
import torch
from transformers import LlamaForCausalLM

from benchmarks.policies.tiny_policy import make_tokenizer, tiny_config

TRAIN = """\
[model]
path = "{model}"
{warm_up}
[data]
{data}
[rollout]
engine = "hf"
max_model_len = {length}
[train]
data.max_len = {length}
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
EVALUATE = """\
[evaluate]
suite = ["{suite}"]
every = 1
n = 2
problem_field = "question"
label_field = "answer"
max_new_tokens = 8
workers = 1
"""
REWARD = """\
import torch

def reward_func(queries, prompts, labels, **_):
    return {"rewards": torch.tensor([float(sum(map(ord, query)) % 3) for query in queries])}
"""
"""Answers of a random model are never right; this reward tells them apart."""


class RealLaunch:
    """`openrlhf-alp launch` as a process of its own."""

    def __init__(self, *arguments: str, run: Path, environment: Mapping[str, str] = {}) -> None:
        self.run = run
        self.process = subprocess.Popen(
            [sys.executable, "-m", "openrlhf_alp.cli.main", "launch", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                **os.environ,
                **environment,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            },
        )

    def family(self) -> list[psutil.Process]:
        """Every process that descends from the launch."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def child(self, *words: str) -> psutil.Process | None:
        """The child below its guardian whose command line has all `words`, if there is one now."""
        for guardian in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.Error):
                for child in guardian.children():
                    command = child.cmdline()
                    # Between fork and exec it is not yet what it is going to be.
                    if command == guardian.cmdline():
                        continue
                    if all(any(word in part for part in command) for word in words):
                        return child
        return None

    def runs(self, name: str, word: str) -> bool:
        """Whether the process `name` runs; the check runs programs with the same options before."""
        return (self.run / "logs" / f"{name}.log").exists() and self.child(word) is not None

    def kill(self, *words: str) -> psutil.Process:
        """Kills the child whose command line has all `words`."""
        child = self.child(*words)
        assert child is not None
        child.kill()
        return child

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Returns once `condition` is true.

        Raises:
            AssertionError: the launch ended first; shows its output.
        """
        while not condition():
            assert self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.05)

    def num_steps(self) -> int:
        metrics = self.run / "metrics.jsonl"
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    def finish(self, timeout: float = 900) -> tuple[int, str]:
        """Exit status and output."""
        output, _ = self.process.communicate(timeout=timeout)
        return self.process.returncode, output


STAGES: dict[str, Callable[[RealLaunch], object]] = {
    "check": lambda launch: launch.child("flags.check"),
    "data": lambda launch: launch.child("prepare-data"),
    "tool service": lambda launch: launch.runs("tool-0", "services.tool"),
    "warm-up": lambda launch: launch.child("stages.warmup"),
    "rollout service": lambda launch: launch.runs("rollout-0", "services.rollout"),
    "evaluation before": lambda launch: launch.runs("evaluate-before", "evaluation/before"),
    "held-out questions": lambda launch: (launch.run / "evaluation/before/results.json").exists(),
    "learner starts": lambda launch: launch.child("cli.train_ppo_ray"),
    "training": lambda launch: launch.num_steps() >= 1,
    "evaluation of a step": lambda launch: launch.runs("evaluate-step-1", "evaluation/step-1"),
    "evaluation after": lambda launch: launch.runs("evaluate-after", "evaluation/after"),
}
"""Stage -> whether a launch of a recipe with all stages is there."""

StartLaunch = Callable[..., RealLaunch]
"""The constructor, under a fixture that ends what still runs at the end of the test."""


_WITHOUT_WARM_UP = ("model.warm_up_steps=0",)
_WITHOUT_QUESTIONS = (*_WITHOUT_WARM_UP, "evaluate.before=false", "train.data.max_samples=2")
_SHORT_CUTS = {
    "rollout service": _WITHOUT_WARM_UP,
    "evaluation before": _WITHOUT_WARM_UP,
    "held-out questions": _WITHOUT_WARM_UP,
    "learner starts": _WITHOUT_QUESTIONS,
    "training": _WITHOUT_QUESTIONS,
    "evaluation of a step": _WITHOUT_QUESTIONS,
    "evaluation after": (*_WITHOUT_QUESTIONS, "evaluate.every=0"),
}
"""Stage -> settings that leave out earlier stages. What runs in the stage itself is the same."""


def start_until(
    stage: str,
    start: StartLaunch,
    folder: Path,
    *,
    directly: bool = False,
    settings: Sequence[str] = (),
) -> RealLaunch:
    """A launch in `folder` that has come to `stage`, `directly` without most earlier stages.

    Args:
        settings: of the recipe, as `--set` takes them.
    """
    settings = [*settings, *(_SHORT_CUTS.get(stage, ()) if directly else ())]
    data = "sources" if stage == "data" else "made"
    if "evaluate.before=false" in settings:
        data = "path"  # of a made task questions are asked before training
    recipe, run = write_recipe(folder, stages=True, data=data), folder / "run"
    flags = (part for setting in settings for part in ("--set", setting))
    launch = start(str(recipe), "--output", str(run), *flags, run=run)
    launch.wait_until(lambda: STAGES[stage](launch))
    return launch


def wait_until_gone(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that still run after so many seconds; a process that nobody reaps has ended too."""
    give_up_s = time.monotonic() + seconds
    while running := [p for p in processes if _runs(p)]:
        if time.monotonic() > give_up_s:
            break
        time.sleep(0.1)
    return running


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def write_recipe(folder: Path, *, stages: bool, data: str = "path") -> Path:
    """A recipe in `folder`, with its model.

    Args:
        stages: with a tool service and evaluations.
        data: "made", a task with warm-up and held-out questions; "path", a prompt file; "sources",
            prompts that have to be prepared.
    """
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    length = 1536 if stages else 64
    model = LlamaForCausalLM(tiny_config(tokenizer, max_positions=length)).to(torch.bfloat16)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"input": f"What is {n} + 1?", "label": str(n + 1)} for n in range(8)]
    _write_rows(folder / "prompts.jsonl", rows)
    suite = [{"question": f"What is {n} + 2?", "answer": str(n + 2)} for n in range(3)]
    _write_rows(folder / "suite.jsonl", suite)
    reward = folder / "reward.py"
    reward.write_text(REWARD)
    kinds = {
        "made": 'task = "multiplication"\nsteps = 2',
        "path": f'path = "{folder}/prompts.jsonl"',
        "sources": f'sources = ["{folder}/suite.jsonl"]',
    }
    text = TRAIN.format(
        model=folder / "model",
        warm_up="warm_up_steps = 1" if data == "made" else "",
        data=kinds[data],
        length=length,
        reward=reward,
    )
    if stages:
        # A random model writes neither code nor boxes; its episodes are trained on all the same.
        text += "tir.void = 'off'\n[tool]\npresets = 'numpy'\n"
        text += EVALUATE.format(suite=folder / "suite.jsonl")
    recipe = folder / "recipe.toml"
    recipe.write_text(text)
    return recipe


def _write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
