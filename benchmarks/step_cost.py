"""What a step costs with ALP, against OpenRLHF's own GRPO, on the same recorded batch.

    stock GRPO   old log-probs: one forward   update: forward, backward   four forwards' worth
    ALP          none                         the same, perturbed         three forwards' worth,
                                              logits of actions only      less of the output layer

Both run through OpenRLHF's own policy actor and DeepSpeed on one CPU rank, interleaved, repetition
by repetition, so that what else the machine does hits both alike. Printed: medians of CPU seconds
over all threads, which other processes hardly change, and their ratio; then what telemetry costs of
a step of ALP: at every step, and what only every `--alp.telemetry_every`-th step measures, spread
over these. Compilation, once in a run, is not counted.
The perturbed forward and backward alone are in `perturbed_forward.py`.

    python benchmarks/step_cost.py [--repeats 5] [--samples 64] [--model DIR]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.utils import get_strategy

from openrlhf_alp.data.smollm2 import unpack_smollm2
from openrlhf_alp.learner import seams
from openrlhf_alp.learner.experience import SAMPLE_ID
from openrlhf_alp.learner.flags.config import AlpConfig
from openrlhf_alp.learner.flags.settle import add_arguments, settle

GOAL = 0.80
TELEMETRY_GOAL = 0.02
MICRO_BATCH = 16
PROMPT_TOKENS = 38
RESPONSE_TOKENS = 20


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repetitions of each")
    parser.add_argument("--samples", type=int, default=64, help=f"multiple of {MICRO_BATCH}")
    parser.add_argument("--model", type=Path, default=None, help="model folder (default: SmolLM2)")
    return parser.parse_args()


def upstream_args(model: Path, folder: str, samples: int, *flags: str) -> SimpleNamespace:
    base = {
        "--actor.model_name_or_path": model,
        "--actor.num_gpus_per_node": 1,
        "--algo.advantage.estimator": "group_norm",
        "--algo.kl.init_coef": 0,
        "--rollout.batch_size": samples // 8,
        "--rollout.n_samples_per_prompt": 8,
        "--rollout.micro_batch_size": MICRO_BATCH,
        "--train.batch_size": samples,
        "--train.micro_batch_size": MICRO_BATCH,
        "--actor.adam.lr": 1e-6,
        "--vllm.sync_backend": "none",
        "--vllm.num_engines": 1,
        "--reward.remote_url": "math-verify",
        "--ckpt.path": folder,
    }
    argv = [str(word) for pair in base.items() for word in pair]
    return seams.parsed_args([*argv, *flags], add_arguments, settle)


def build_actor(args: SimpleNamespace) -> Any:
    from openrlhf_alp.learner.actor import AlpPolicyModelActor

    actor = AlpPolicyModelActor(1, 0, None, None)
    with seams.installed():
        strategy = get_strategy(args)
    actor.init_model_from_pretrained(strategy, args.actor.model_name_or_path, 1000, None)
    return actor


def record_batch(actor: Any, samples: int) -> list[Experience]:
    """Random tokens in the demo's shapes; rollout log-probs are the learner's own, moved a bit."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = actor.actor.model.module.config.vocab_size
    batch = []
    for start in range(0, samples, MICRO_BATCH):
        shape = (MICRO_BATCH, PROMPT_TOKENS + RESPONSE_TOKENS)
        sequences = torch.randint(vocabulary, shape, generator=generator)
        attention_mask = torch.ones(shape, dtype=torch.long)
        action_mask = attention_mask[:, 1:].clone()
        action_mask[:, : PROMPT_TOKENS - 1] = 0
        log_probs = actor.forward(sequences, action_mask, attention_mask)
        moved = log_probs + 0.05 * torch.randn(log_probs.shape, generator=generator)
        rewards = (torch.rand(MICRO_BATCH, generator=generator) > 0.5).float()
        batch.append(
            Experience(
                sequences=sequences,
                attention_mask=attention_mask,
                action_mask=action_mask,
                rollout_log_probs=moved * action_mask,
                advantages=(2 * rewards - 1).unsqueeze(-1) * action_mask,
                rewards=rewards,
                response_length=action_mask.sum(-1),
                truncated=torch.zeros(MICRO_BATCH, dtype=torch.bool),
                total_length=attention_mask.sum(-1),
                info={"reward": rewards, SAMPLE_ID: torch.arange(start, start + MICRO_BATCH)},
            )
        )
    return batch


def step(actor: Any, batch: list[Experience]) -> tuple[float, float]:
    """CPU seconds of experience making and of the update, as `PPOTrainer.train_step` runs them."""
    started = time.process_time()
    for experience in batch:
        if actor.trainer.alp.enable:
            experience.action_log_probs = experience.rollout_log_probs
        else:
            experience.action_log_probs = actor.forward(
                experience.sequences, experience.action_mask, experience.attention_mask
            )
    made = time.process_time()
    for experience in batch:
        actor.append(experience)
    actor.fit()
    return made - started, time.process_time() - made


@contextmanager
def timed(seconds: dict[str, float]) -> Iterator[None]:
    """Add the CPU seconds of every call of the step's telemetry, by what it is for."""
    from openrlhf_alp.alp.observe import LayerObserver
    from openrlhf_alp.learner.telemetry.clean import CleanProbe
    from openrlhf_alp.learner.telemetry.step import Adviser, StepTelemetry

    def timing(kind: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            try:
                return method(*args, **kwargs)
            finally:
                seconds[kind] = seconds.get(kind, 0.0) + time.process_time() - started

        return call

    with ExitStack() as stack:
        for kind, owner, names in (
            ("ratios", StepTelemetry, ("__init__", "add", "end_update", "metrics")),
            ("ratios", Adviser, ("look",)),
            ("layers", LayerObserver, ("see", "see_gradient", "figures")),
            ("clean", CleanProbe, ("__init__", "metrics")),
        ):
            for name in names:
                wrapped = timing(kind, getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, wrapped))
        yield


def measure_telemetry_every(actor: Any, every: int) -> None:
    trainer = actor.trainer
    trainer.args.alp = replace(trainer.alp, telemetry_every=every)


def main() -> None:
    options = parse_args()
    model = options.model or unpack_smollm2(say=print)
    with tempfile.TemporaryDirectory() as folder:
        common = (model, folder, options.samples)
        alp = ("--alp.enable", "--alp.sigma0", "0.003")
        actors = {
            "stock GRPO": build_actor(upstream_args(*common)),
            # The step that warms up measures everything, so that all shapes are compiled then.
            "token-ALP": build_actor(upstream_args(*common, *alp, "--alp.telemetry_every", "1")),
        }
        batch = record_batch(actors["stock GRPO"], options.samples)
        for actor in actors.values():
            step(actor, batch)
        measure_telemetry_every(actors["token-ALP"], 0)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in actors}
        usual: dict[str, float] = {}
        detailed: dict[str, float] = {}
        for _ in range(options.repeats):
            for name, actor in actors.items():
                with timed(usual):
                    times[name].append(step(actor, batch))
                print(f"{name:12} {sum(times[name][-1]):8.2f} s", flush=True)
        measure_telemetry_every(actors["token-ALP"], 1)
        for _ in range(options.repeats):
            with timed(detailed):
                step(actors["token-ALP"], batch)
    alp_s = report(times, options.samples)
    for found in (usual, detailed):
        found.update({kind: spent / options.repeats for kind, spent in found.items()})
    report_telemetry(usual, detailed, alp_s)


def report(times: dict[str, list[tuple[float, float]]], samples: int) -> float:
    """Print the table; seconds of a step of ALP."""
    print(
        f"\n{samples} samples of {PROMPT_TOKENS} + {RESPONSE_TOKENS} tokens, CPU seconds (median)"
    )
    print(f"{'':12} {'experience':>11} {'update':>8} {'both':>8}")
    both = {}
    for name, rows in times.items():
        making, updating = (statistics.median(column) for column in zip(*rows, strict=True))
        both[name] = statistics.median(sum(row) for row in rows)
        print(f"{name:12} {making:11.2f} {updating:8.2f} {both[name]:8.2f}")
    stock, alp = both.values()
    print(f"\nALP / stock GRPO: {alp / stock:.3f}   (goal: at most {GOAL})")
    return alp


def report_telemetry(usual: dict[str, float], detailed: dict[str, float], step_s: float) -> None:
    """Print the parts.

    Args:
        usual: CPU seconds of each part at a step that measures nothing more.
        detailed: the same at one of `--alp.telemetry_every`.
        step_s: CPU seconds of a step.
    """
    every = AlpConfig().telemetry_every
    print(f"\ntelemetry, CPU seconds: {'usual':>8} {'detailed':>9} {'of a step':>10}")
    total = 0.0
    for kind in detailed:
        first, second = usual.get(kind, 0.0), detailed[kind]
        share = (first * (every - 1) + second) / every / step_s
        total += share
        print(f"{kind:>23} {first:8.3f} {second:9.3f} {share:10.2%}")
    print(f"{'together':>23} {'':18} {total:10.2%}   (goal: at most {TELEMETRY_GOAL:.0%})")


if __name__ == "__main__":
    main()
