"""What `--alp.record` costs a step: CPU time of controller and writer, and bytes a token.

Ids and log-probs are random, so they compress worse than those of a model. CPU time, not wall time,
because the writer works beside training.

    python benchmarks/recording.py
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from openrlhf.trainer.ppo_utils.experience import Experience

from openrlhf_alp.episodes.records import Episode, StopReason, Timings, Turn, TurnKind, VersionSpan
from openrlhf_alp.learner.experience import SAMPLE_ID
from openrlhf_alp.learner.telemetry.recording import recorded_sample
from openrlhf_alp.replay.files.records import RecordedBatch
from openrlhf_alp.replay.files.schema import BatchInfo
from openrlhf_alp.replay.files.write import write_batch

GROUP = 8
VOCABULARY = 49152
# Samples, prompt tokens, answer tokens: a step of the demo, and one of long answers.
SHAPES = {"demo": (64, 40, 20), "long": (512, 300, 700)}


def episode(number: int, prompt: int, answer: int, random: np.random.Generator) -> Episode:
    """An answer of random tokens with a word of text for each."""
    end = prompt + answer
    log_probs = -random.exponential(size=answer).astype(np.float32)
    text = " ".join(map(str, random.integers(0, 9999, answer)))
    return Episode(
        request_id=f"{number:032x}",
        prompt=f"What is {number // GROUP} + 3?",
        label="4",
        token_ids=tuple(random.integers(0, VOCABULARY, end).tolist()),
        logprobs=(0.0,) * prompt + tuple(log_probs.tolist()),
        action_mask=(False,) * prompt + (True,) * answer,
        turns=(
            Turn(kind=TurnKind.PROMPT, start=0, end=prompt, text=""),
            Turn(kind=TurnKind.ACTION, start=prompt, end=end, text=text),
        ),
        spans=(VersionSpan(version=3, digest="d" * 64, start=prompt, end=end),),
        stop_reason=StopReason.EOS,
        reward=float(number % 2),
        reward_detail={"parsed": 1.0},
        timings=Timings(generate_s=1.0, reward_s=0.0),
    )


def measure(samples: int, prompt: int, answer: int, path: Path) -> str:
    random = np.random.default_rng(0)
    episodes = [episode(number, prompt, answer, random) for number in range(samples)]
    experience = Experience(
        action_mask=torch.tensor([[0] * (prompt - 1) + [1] * answer] * samples),
        advantages=torch.randn(samples, 1).expand(samples, prompt + answer - 1),
        info={SAMPLE_ID: torch.arange(samples)},
    )
    started_s = time.process_time()
    rows = tuple(
        recorded_sample(one, experience, row, group=str(row // GROUP))
        for row, one in enumerate(episodes)
    )
    gathered_s = time.process_time()
    write_batch(RecordedBatch(info=BatchInfo(step=1), samples=rows), path)
    written_s = time.process_time()
    size = path.stat().st_size / (samples * (prompt + answer))
    return (
        f"{samples} x {prompt + answer} tokens: controller {gathered_s - started_s:.3f} s, writer "
        f"{written_s - gathered_s:.3f} s of CPU time, {size:.1f} bytes a token"
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step-000001.parquet"
        measure(*SHAPES["demo"], path)  # the first file loads libraries
        for name, shape in SHAPES.items():
            print(f"{name}: {measure(*shape, path)}")


if __name__ == "__main__":
    main()
