"""What a run of the demo is: its options, its task, and the command line of each process.

Imports neither torch nor anything of the learner, so that `--help` answers at once.
"""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from openrlhf_alp.data.tasks import QuestionSplit, split_additions, split_products
from openrlhf_alp.data.templates import INPUT_KEY, LABEL_KEY

METHODS = ("seq-alp", "token-alp", "seq-bypass", "token-bypass")
"""Values of `--method`; the first is the default."""

PROMPTS_PER_STEP = 8
SAMPLES_PER_PROMPT = 8
_SAMPLES_PER_STEP = PROMPTS_PER_STEP * SAMPLES_PER_PROMPT
_MICRO_BATCH = 16
_MAX_LENGTH = 256
"""Tokens of prompt and answer; the prompts of both tasks have about 40."""
WARM_UP_STEPS = 12
MAX_TOOL_TURNS = 2
MAX_TOKENS_PER_TURN = 32
"""A turn is a line of code or an answer; longer ones are cut."""
TOOL_TEMPLATE: Literal["chat"] = "chat"

Flags = Mapping[str, str | int | float | Path | tuple[float, ...] | None]
"""Flag name to value; None for a switch."""

_LOOPBACK: Flags = {"--host": "127.0.0.1", "--port": 0}
"""Any free port, so that two demos can run at once; the service writes it to its URL file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoTask:
    """What the policy learns."""

    noun: str
    """What a question asks for, in the plural: "sums"."""
    split: Callable[..., QuestionSplit]
    """Takes `seed`."""
    max_new_tokens: int
    """Budget of an episode after its prompt, observations included."""
    uses_tool: bool
    """The policy may run Python, and gets a supervised warm-up first."""


SUMS = DemoTask(noun="sums", split=split_additions, max_new_tokens=20, uses_tool=False)
"""One-digit sums, which a 135M model learns to answer by itself."""

PRODUCTS = DemoTask(noun="products", split=split_products, max_new_tokens=120, uses_tool=True)
"""Products of two-digit numbers, which it can only learn to compute with the tool."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """The options of `openrlhf-alp demo`."""

    steps: int
    method: str
    model: str | None
    """Folder or Hugging Face id; None unpacks SmolLM2."""
    seed: int
    output: Path
    overwrite: bool
    tir: bool = False
    """Tool-integrated episodes instead of single answers."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"--steps {self.steps}: at least 1 step is needed")

    @property
    def task(self) -> DemoTask:
        return PRODUCTS if self.tir else SUMS


def service_command(*, model: Path, url_file: Path, seed: int) -> list[str]:
    """The rollout service."""
    flags: Flags = {
        **_LOOPBACK,
        "--model": model,
        "--url-file": url_file,
        "--max-model-len": _MAX_LENGTH,
        "--max-num-seqs": _SAMPLES_PER_STEP,
        "--seed": seed,
        # Learner and engine take turns, so each may use every core.
        "--num-threads": os.cpu_count() or 1,
    }
    return _python("services.rollout", flags)


def tool_command(*, url_file: Path) -> list[str]:
    """The tool service, with the best isolation that this machine allows."""
    return _python("services.tool", {**_LOOPBACK, "--url-file": url_file, "--presets": "numpy"})


def warm_up_command(*, model: Path, output: Path, seed: int) -> list[str]:
    """The supervised warm-up that shows a model the form of a tool call."""
    flags: Flags = {"--model": model, "--output": output, "--steps": WARM_UP_STEPS, "--seed": seed}
    return _python("openrlhf_alp.launch.warmup", flags)


_TRAINING: Flags = {
    "--actor.num_nodes": 1,
    "--actor.num_gpus_per_node": 1,
    "--ds.zero_stage": 2,
    "--ds.param_dtype": "bf16",
    # Flash attention, the default upstream, needs a GPU.
    "--ds.attn_implementation": "sdpa",
    "--data.input_key": INPUT_KEY,
    "--data.label_key": LABEL_KEY,
    "--data.apply_chat_template": None,
    "--data.max_len": _MAX_LENGTH,
    "--rollout.n_samples_per_prompt": SAMPLES_PER_PROMPT,
    "--rollout.batch_size": PROMPTS_PER_STEP,
    "--rollout.micro_batch_size": _MICRO_BATCH,
    # The single ratio is right only for samples from the whole distribution.
    "--rollout.temperature": 1.0,
    "--rollout.top_p": 1.0,
    "--reward.remote_url": "math-verify",
    "--alp.enable": None,
    # Sigma starts where the noise has the same KL as the measured mismatch.
    "--alp.sigma0": "auto",
    "--algo.advantage.estimator": "group_norm",
    # Without a KL penalty no reference model has to fit into memory.
    "--algo.kl.init_coef": 0,
    # One update per step, on all of its samples.
    "--train.batch_size": _SAMPLES_PER_STEP,
    "--train.micro_batch_size": _MICRO_BATCH,
    "--train.num_episodes": 1,
    # A rate at which a 135M model learns the task in a dozen steps.
    "--actor.adam.lr": 4e-5,
    "--actor.adam.betas": (0.9, 0.95),
    "--actor.lr_scheduler": "cosine_with_min_lr",
    "--actor.lr_warmup_ratio": 0.0,
    "--actor.min_lr_ratio": 0.5,
    "--actor.max_norm": 1.0,
    "--ckpt.save_steps": -1,
}
"""What every run trains with."""

_TOOL: Flags = {
    "--tir.max_tool_turns": MAX_TOOL_TURNS,
    "--tir.max_tokens_per_turn": MAX_TOKENS_PER_TURN,
    "--tir.template": TOOL_TEMPLATE,
}


def train_command(
    config: DemoConfig,
    *,
    model: Path,
    train_data: Path,
    run_folder: Path,
    rollout_url: str,
    tool_url: str | None,
) -> list[str]:
    """One PPO run over the rows of `train_data`, PROMPTS_PER_STEP of them a step.

    Args:
        tool_url: URL of the tool service; None for episodes of one turn.
    """
    flags: Flags = {
        "--actor.model_name_or_path": model,
        "--data.prompt_dataset": train_data,
        "--rollout.service_urls": rollout_url,
        "--rollout.max_new_tokens": config.task.max_new_tokens,
        "--alp.method": config.method,
        "--alp.seed": config.seed,
        "--train.seed": config.seed,
        "--logger.metrics_jsonl": run_folder / "metrics.jsonl",
        "--logger.tensorboard_dir": run_folder / "tensorboard",
        "--ckpt.output_dir": run_folder / "model",
        "--ckpt.path": run_folder / "checkpoints",
    }
    tool: Flags = {"--tool.service_urls": tool_url, **_TOOL} if tool_url else {}
    return _python("openrlhf_alp.cli.train_ppo_ray", {**_TRAINING, **flags, **tool})


def _python(module: str, flags: Flags) -> list[str]:
    """The command that runs `module` with `flags`."""
    command = [sys.executable, "-m", module]
    for name, value in flags.items():
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        command += [name, *map(str, values)]
    return command
