"""`openrlhf-alp demo`: its options. `demo_run.py` does the work."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from openrlhf_alp.cli.demo_recipe import METHODS
from openrlhf_alp.cli.demo_view import DemoView

DESCRIPTION = """\
A real pretrained model (SmolLM2-135M-Instruct, from an installed package) learns to add one-digit
numbers by reinforcement learning with Adaptive Layerwise Perturbation. Nothing is simulated:
OpenRLHF trains on Ray and DeepSpeed, vLLM samples behind the rollout service, math-verify scores.

On two quiet CPU cores it takes about ten minutes. It needs no network and no GPU.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """The options of the command."""

    steps: int
    method: str
    model: str | None
    """Folder or Hugging Face id; None unpacks SmolLM2."""
    seed: int
    output: Path
    overwrite: bool

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"--steps {self.steps}: at least 1 step is needed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `openrlhf-alp demo`."""
    add = parser.add_argument
    add("--steps", type=int, default=16, help="PPO steps, about 22 s each (default: 16)")
    add(
        "--method",
        choices=METHODS,
        default=METHODS[0],
        help="token or sequence ratio; *-alp perturbs the update, *-bypass is the same without "
        f"noise, to compare (default: {METHODS[0]})",
    )
    add("--model", help="folder or Hugging Face id of another chat model (default: SmolLM2)")
    add("--seed", type=int, default=42, help="seed of data, sampling and noise (default: 42)")
    add(
        "--output",
        type=Path,
        default=Path("runs/demo"),
        help="run folder; an earlier run there is moved aside (default: runs/demo)",
    )
    add("--overwrite", action="store_true", help="replace an earlier run instead")


def run(arguments: argparse.Namespace) -> int:
    """Runs the demo; returns 0, 1 (something failed), 2 (wrong options) or 128 + a stop signal."""
    view = DemoView(Console())
    try:
        config = DemoConfig(
            steps=arguments.steps,
            method=arguments.method,
            model=arguments.model,
            seed=arguments.seed,
            output=arguments.output,
            overwrite=arguments.overwrite,
        )
    except ValueError as error:
        view.error(str(error))
        return 2
    view.title(f"Learning to add with {config.method}: {config.steps} steps, seed {config.seed}")
    # Here and not above: it imports torch and transformers, which takes seconds.
    from openrlhf_alp.cli.demo_run import run_demo

    return run_demo(config, view)
