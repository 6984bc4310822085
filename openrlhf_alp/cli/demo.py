"""`openrlhf-alp demo`: its options. `launch/demo.py` does the work."""

import argparse
from pathlib import Path

from rich.console import Console

from openrlhf_alp.launch.recipe import METHODS, DemoConfig
from openrlhf_alp.launch.view import DemoView

HELP = "watch a small model learn to add, start to finish, on this machine"

DESCRIPTION = """\
A real pretrained model (SmolLM2-135M-Instruct, from an installed package) learns to add one-digit
numbers by reinforcement learning with Adaptive Layerwise Perturbation. Nothing is simulated:
OpenRLHF trains on Ray and DeepSpeed, vLLM samples behind the rollout service, math-verify scores.

With --tir it learns to multiply two-digit numbers by writing Python, which the tool service runs in
its sandbox: tool-integrated reasoning, several turns an episode. A model this small cannot invent a
tool call, so a short supervised warm-up shows it the form first, and twice as often a wrong guess.
It learns from the reward that calling the tool pays.

On two quiet CPU cores it takes ten to twelve minutes. It needs no network and no GPU.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `openrlhf-alp demo`."""
    add = parser.add_argument
    add("--tir", action="store_true", help="products with a Python tool instead of sums")
    add("--steps", type=int, help="PPO steps (default: 16 of about 22 s; --tir: 10 of about 50 s)")
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
        help="run folder, an earlier run there is moved aside (default: runs/demo, runs/demo-tir)",
    )
    add("--overwrite", action="store_true", help="replace an earlier run instead")


def run(arguments: argparse.Namespace) -> int:
    """Runs the demo; returns 0, 1 (something failed), 2 (wrong options) or 128 + a stop signal."""
    view = DemoView(Console())
    tir = arguments.tir
    try:
        config = DemoConfig(
            steps=(10 if tir else 16) if arguments.steps is None else arguments.steps,
            method=arguments.method,
            model=arguments.model,
            seed=arguments.seed,
            output=arguments.output or Path("runs/demo-tir" if tir else "runs/demo"),
            overwrite=arguments.overwrite,
            tir=tir,
        )
    except ValueError as error:
        view.error(str(error))
        return 2
    goal = "multiply with a tool" if tir else "add"
    view.title(f"Learning to {goal} with {config.method}: {config.steps} steps, seed {config.seed}")
    # Here and not above: it imports torch and transformers, which takes seconds.
    from openrlhf_alp.launch.demo import run_demo

    return run_demo(config, view)
