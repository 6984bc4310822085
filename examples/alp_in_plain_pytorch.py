"""Read this first: one ALP update in plain PyTorch, without OpenRLHF, Ray or a service.

A model samples answers to a prompt (the rollout policy mu), another copy is updated with the
perturbed forward and the single ratio. The task is made up: prefer answers with many even token
ids. It shows every call of `openrlhf_alp.alp` and `openrlhf_alp.objective` that the real
learner makes.

    python examples/alp_in_plain_pytorch.py [--model DIR] [--steps 20]
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from openrlhf_alp.alp import PerturbationConfig, attach
from openrlhf_alp.objective.loss import policy_loss
from openrlhf_alp.objective.methods import METHODS
from openrlhf_alp.objective.ratio import k3_kl

NUM_SAMPLES = 16
PROMPT_TOKENS = 4
ANSWER_TOKENS = 12


def build_model(folder: str | None) -> torch.nn.Module:
    if folder:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    return LlamaForCausalLM(config)


def answer_log_probs(model: torch.nn.Module, sequences: torch.Tensor) -> torch.Tensor:
    """(B, T) ids -> (B, T - 1) log-prob of each next token."""
    logits = model(sequences).logits[:, :-1].float()
    return torch.log_softmax(logits, -1).gather(-1, sequences[:, 1:, None]).squeeze(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Hugging Face folder; default is a tiny random model")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    torch.manual_seed(0)
    policy = build_model(options.model)
    preset = METHODS["token-alp"]

    # One learned sigma per hidden dimension of every decoder layer, in the model as `policy.alp`.
    perturbation = attach(
        policy,
        PerturbationConfig(
            sigma0=0.01,
            kind="vector",
            sigma_scale="absolute",  # "relative" needs `policy.alp.observed()` and `set_scales()`
            sigma_min=1e-5,
            sigma_max=0.1,
            layers="all",
            seed=0,
        ),
    )
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in policy.named_parameters() if not n.startswith("alp.")]},
            {"params": perturbation.parameters(), "lr": 1e-2, "weight_decay": 0.0},
        ],
        lr=3e-3,
    )
    prompt = torch.randint(policy.config.vocab_size, (1, PROMPT_TOKENS))
    for update in range(options.steps):
        # Rollout: the clean policy samples, its log-probs are the only denominator.
        with torch.no_grad():
            sequences = policy.generate(
                prompt.repeat(NUM_SAMPLES, 1),
                attention_mask=torch.ones(NUM_SAMPLES, PROMPT_TOKENS, dtype=torch.long),
                do_sample=True,
                max_new_tokens=ANSWER_TOKENS,
                min_new_tokens=ANSWER_TOKENS,
                top_k=0,
                pad_token_id=0,
            )
            rollout_log_probs = answer_log_probs(policy, sequences)
        action_mask = torch.zeros(rollout_log_probs.shape, dtype=torch.bool)
        action_mask[:, PROMPT_TOKENS - 1 :] = True
        rewards = (sequences[:, PROMPT_TOKENS:] % 2 == 0).float().mean(-1)
        advantages = ((rewards - rewards.mean()) / (rewards.std() + 1e-6))[:, None] * action_mask

        # Update: noise is on inside the block, through forward and backward, and nowhere else.
        with perturbation.enabled(
            update=update,
            sample_ids=torch.arange(NUM_SAMPLES) + update * NUM_SAMPLES,
            attention_mask=torch.ones_like(sequences),
        ):
            log_probs = answer_log_probs(policy, sequences)
            output = policy_loss(
                log_probs=log_probs,
                rollout_log_probs=rollout_log_probs,
                advantages=advantages,
                action_mask=action_mask,
                config=preset.objective,
            )
            optimizer.zero_grad()
            output.loss.backward()
        optimizer.step()
        noise_kl = k3_kl(log_probs, rollout_log_probs, action_mask)
        sigma = perturbation.summary()
        print(
            f"update {update:2d}  reward {rewards.mean():.3f}  clipped {output.clip_fraction:.3f}  "
            f"noise KL {noise_kl:.1e}  sigma {sigma.minimum:.4f}..{sigma.maximum:.4f}"
        )


if __name__ == "__main__":
    main()
