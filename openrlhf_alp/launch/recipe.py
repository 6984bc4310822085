"""The demo's command lines: what is trained, how, and why each group of flags is what it is."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from openrlhf_alp.data.templates import INPUT_KEY, LABEL_KEY
from openrlhf_alp.learner.flags.tool import ToolConfig

PROMPTS_PER_STEP = 8
SAMPLES_PER_PROMPT = 8
_SAMPLES_PER_STEP = PROMPTS_PER_STEP * SAMPLES_PER_PROMPT
_MICRO_BATCH = 16
WARM_UP_STEPS = 12
TOOL = ToolConfig(max_tool_turns=2, max_tokens_per_turn=32, template="chat")
"""Limits of a tool-integrated episode; its URL is known once the service runs."""
_MAX_LENGTH = 256
"""Tokens of prompt and answer; the task's prompts have about 40."""

Flags = Mapping[str, str | int | float | Path | tuple[str | float, ...] | None]
"""Flag name to value; None for a switch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What the command lines depend on."""

    model: Path
    train_data: Path
    run_folder: Path
    service_url: str
    method: str
    seed: int
    max_new_tokens: int
    """Budget of an episode after its prompt."""
    tool_url: str | None = None
    """Tool service; None for episodes of one turn."""


def service_command(*, model: Path, url_file: Path, seed: int) -> list[str]:
    """The rollout service: loopback only, any free port, which it writes to `url_file`."""
    flags: Flags = {
        "--model": model,
        "--host": "127.0.0.1",
        "--port": 0,
        "--url-file": url_file,
        "--max-model-len": _MAX_LENGTH,
        "--max-num-seqs": _SAMPLES_PER_STEP,
        "--seed": seed,
        # Learner and engine take turns, so each may have every core.
        "--num-threads": os.cpu_count() or 1,
    }
    return [sys.executable, "-m", "services.rollout", *_arguments(flags)]


def tool_command(*, url_file: Path) -> list[str]:
    """The tool service: loopback only, any free port, at the best isolation there is here."""
    flags: Flags = {
        "--host": "127.0.0.1",
        "--port": 0,
        "--url-file": url_file,
        "--presets": "numpy",
    }
    return [sys.executable, "-m", "services.tool", *_arguments(flags)]


def warm_up_command(*, model: Path, output: Path, seed: int) -> list[str]:
    """The supervised warm-up that shows a model the form of a tool call."""
    flags: Flags = {"--model": model, "--output": output, "--steps": WARM_UP_STEPS, "--seed": seed}
    return [sys.executable, "-m", "openrlhf_alp.launch.warmup", *_arguments(flags)]


def train_command(recipe: Recipe) -> list[str]:
    """One PPO run over the rows of `recipe.train_data`: PROMPTS_PER_STEP of them a step."""
    groups = (
        _model_flags(recipe),
        _rollout_flags(recipe),
        _tool_flags(recipe),
        _algorithm_flags(recipe),
        _optimizer_flags(recipe),
        _output_flags(recipe),
    )
    flags = [argument for group in groups for argument in _arguments(group)]
    return [sys.executable, "-m", "openrlhf_alp.cli.train_ppo_ray", *flags]


def _model_flags(recipe: Recipe) -> Flags:
    """One DeepSpeed worker; SDPA because flash attention needs a GPU."""
    return {
        "--actor.model_name_or_path": recipe.model,
        "--actor.num_nodes": 1,
        "--actor.num_gpus_per_node": 1,
        "--ds.zero_stage": 2,
        "--ds.param_dtype": "bf16",
        "--ds.attn_implementation": "sdpa",
    }


def _rollout_flags(recipe: Recipe) -> Flags:
    """Plain sampling from the whole distribution: the single ratio is only right for that."""
    return {
        "--rollout.service_urls": recipe.service_url,
        "--data.prompt_dataset": recipe.train_data,
        "--data.input_key": INPUT_KEY,
        "--data.label_key": LABEL_KEY,
        "--data.apply_chat_template": None,
        "--data.max_len": _MAX_LENGTH,
        "--rollout.max_new_tokens": recipe.max_new_tokens,
        "--rollout.n_samples_per_prompt": SAMPLES_PER_PROMPT,
        "--rollout.batch_size": PROMPTS_PER_STEP,
        "--rollout.micro_batch_size": _MICRO_BATCH,
        "--rollout.temperature": 1.0,
        "--rollout.top_p": 1.0,
        "--reward.remote_url": "math-verify",
    }


def _tool_flags(recipe: Recipe) -> Flags:
    """A turn is a line of code or an answer: one that rambles is cut where it stands."""
    if recipe.tool_url is None:
        return {}
    return {
        "--tool.service_urls": recipe.tool_url,
        "--tir.max_tool_turns": TOOL.max_tool_turns,
        "--tir.max_tokens_per_turn": TOOL.max_tokens_per_turn or 0,
        "--tir.template": TOOL.template,
    }


def _algorithm_flags(recipe: Recipe) -> Flags:
    """The paper's loss on group-normalised rewards, without a KL penalty and so without a
    reference model; sigma starts where the noise equals the measured mismatch."""
    return {
        "--alp.enable": None,
        "--alp.method": recipe.method,
        "--alp.sigma0": "auto",
        "--alp.seed": recipe.seed,
        "--algo.advantage.estimator": "group_norm",
        "--algo.kl.init_coef": 0,
    }


def _optimizer_flags(recipe: Recipe) -> Flags:
    """One update a step on all its samples; the rate teaches a 135M model in a dozen steps."""
    return {
        "--train.batch_size": _SAMPLES_PER_STEP,
        "--train.micro_batch_size": _MICRO_BATCH,
        "--train.num_episodes": 1,
        "--train.seed": recipe.seed,
        "--actor.adam.lr": 4e-5,
        "--actor.adam.betas": (0.9, 0.95),
        "--actor.lr_scheduler": "cosine_with_min_lr",
        "--actor.lr_warmup_ratio": 0.0,
        "--actor.min_lr_ratio": 0.5,
        "--actor.max_norm": 1.0,
    }


def _output_flags(recipe: Recipe) -> Flags:
    """Numbers for the progress bar and the plots; the trained model; no checkpoints."""
    return {
        "--logger.metrics_jsonl": recipe.run_folder / "metrics.jsonl",
        "--logger.tensorboard_dir": recipe.run_folder / "tensorboard",
        "--ckpt.output_dir": recipe.run_folder / "model",
        "--ckpt.path": recipe.run_folder / "checkpoints",
        "--ckpt.save_steps": -1,
    }


def _arguments(flags: Flags) -> list[str]:
    arguments: list[str] = []
    for name, value in flags.items():
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        arguments += [name, *map(str, values)]
    return arguments
