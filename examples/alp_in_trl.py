"""ALP inside TRL's GRPOTrainer: its own rollouts and rewards, our noise and objective.

    make trl                                    # an environment with the pinned TRL, and the test
    .venv-trl/bin/python examples/alp_in_trl.py --model /models/policy --prompts math.jsonl

The noise is on from the forward pass of the update to the end of its backward pass, and nowhere
else: TRL generates inside `training_step`, so it is switched on only when the loss is computed.
"""

import argparse
from contextlib import ExitStack
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from openrlhf_alp.alp import PerturbationConfig, attach
from openrlhf_alp.objective.loss import policy_loss
from openrlhf_alp.objective.methods import METHODS

METHOD = METHODS["token-alp"]
NOISE = PerturbationConfig(sigma0=0.01, sigma_scale="absolute", sigma_min=1e-5, sigma_max=0.1)


class AlpGRPOTrainer(GRPOTrainer):
    """Trains on the single ratio of the perturbed policy over the policy that sampled.

    `num_iterations` of the config must be at least 2 without vLLM: only then does TRL compute the
    log-probs of the policy that sampled, which are the only denominator.
    """

    def __init__(self, model: Any, args: GRPOConfig, sigma_lr: float = 5e-4, **kwargs: Any) -> None:
        perturbation = attach(model, NOISE)
        weights = [p for name, p in model.named_parameters() if not name.startswith("alp.")]
        groups = [
            {"params": weights, "weight_decay": args.weight_decay},
            {"params": perturbation.parameters(), "lr": sigma_lr, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=args.learning_rate)
        super().__init__(model, args=args, optimizers=(optimizer, None), **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with ExitStack() as self._noise:
            return super().training_step(*args, **kwargs)

    def _compute_loss(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        update = self.state.global_step
        sample_ids = torch.arange(len(ids), device=ids.device) + update * len(ids)
        perturbation = self.accelerator.unwrap_model(model).alp
        if model.training:
            self._noise.enter_context(
                perturbation.enabled(update=update, sample_ids=sample_ids, attention_mask=mask)
            )
        kept = inputs["completion_ids"].size(1)
        log_probs, _, _ = self._get_per_token_logps_and_entropies(model, ids, mask, kept)
        served = inputs.get("sampling_per_token_logps", inputs.get("old_per_token_logps"))
        action_mask = inputs["completion_mask"].bool()
        output = policy_loss(
            log_probs=log_probs.float(),
            rollout_log_probs=served.float(),
            advantages=inputs["advantages"][:, None] * action_mask,
            action_mask=action_mask,
            config=METHOD.objective,
        )
        self._metrics["train" if model.training else "eval"]["alp/clip_fraction"].append(
            float(output.clip_fraction)
        )
        return output.loss


def main() -> None:
    from datasets import load_dataset
    from trl.rewards import accuracy_reward

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Hugging Face folder or id")
    parser.add_argument("--prompts", required=True, help="JSON lines with prompt and solution")
    options = parser.parse_args()
    trainer = AlpGRPOTrainer(
        AutoModelForCausalLM.from_pretrained(options.model),
        args=GRPOConfig(output_dir="runs/trl", num_iterations=2, num_generations=8),
        reward_funcs=accuracy_reward,
        train_dataset=load_dataset("json", data_files=options.prompts, split="train"),
    )
    trainer.train()


if __name__ == "__main__":
    main()
