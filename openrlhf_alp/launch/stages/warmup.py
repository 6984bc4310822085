"""A short supervised warm-up: a small model learns the form of a tool call, not when to use it.

    python -m openrlhf_alp.launch.stages.warmup --model DIR --output DIR [--steps N] [--seed N]

A third of the dialogues call the tool, the others guess; reinforcement learning then finds out that
calling pays. The warm-up is a process of its own, so that its memory is free again before vLLM and
DeepSpeed start.
"""

import argparse
import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from openrlhf_alp.data.tasks import Dialogue, sample_dialogues
from openrlhf_alp.episodes.observation import chat_template

BATCH_SIZE = 8
_IGNORED = -100
"""The label that the loss of transformers leaves out."""
_LEARNING_RATE = 1e-4
_MAX_NORM = 1.0


def main() -> None:
    """Trains and writes a model folder; prints one line a step."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=42)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    losses = warm_up(model, tokenizer, num_steps=arguments.steps, seed=arguments.seed)
    for step, loss in enumerate(losses, start=1):
        print(f"warm-up step {step}/{arguments.steps}  loss {loss:.3f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)


def warm_up(model: Any, tokenizer: Any, *, num_steps: int, seed: int) -> Iterator[float]:
    """Trains `model` in place on the policy's turns of fresh dialogues; yields each step's loss."""
    dialogues = sample_dialogues(seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=0.0)
    model.train()
    for _ in range(num_steps):
        # Fresh dialogues each step: on repeated ones the model would learn products by heart.
        batch = list(itertools.islice(dialogues, BATCH_SIZE))
        ids, labels = collate([encode(tokenizer, dialogue) for dialogue in batch])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _MAX_NORM)
        optimizer.step()
        yield loss.item()


def encode(tokenizer: Any, dialogue: Dialogue) -> tuple[list[int], list[int]]:
    """Ids and labels (T,) of a dialogue, put together exactly as in an episode.

    Only what the policy writes has labels, its end of turn included.
    """
    question = [{"role": "user", "content": dialogue.question}]
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    to_ids = partial(tokenizer.encode, add_special_tokens=False)
    ids = to_ids(prompt)
    labels = [_IGNORED] * len(ids)
    if dialogue.call is not None:
        call = to_ids(dialogue.call)
        observed = chat_template(tokenizer).observation_ids(
            dialogue.output, encode=to_ids, sampled_ids=call, sampled_text=dialogue.call
        )
        ids += call + observed
        labels += call + [_IGNORED] * len(observed)
    answer = [*to_ids(dialogue.answer), tokenizer.eos_token_id]
    return ids + answer, labels + answer


def collate(rows: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels (B, T) int64, padded on the right, where a causal model does not look."""
    ids, labels = ([torch.tensor(part) for part in parts] for parts in zip(*rows, strict=True))
    return (
        pad_sequence(ids, batch_first=True),
        pad_sequence(labels, batch_first=True, padding_value=_IGNORED),
    )


if __name__ == "__main__":
    main()
