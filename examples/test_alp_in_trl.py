"""`make trl`: the example trains a tiny model inside the pinned TRL. Not a part of `make test`."""

import torch
from alp_in_trl import NOISE, AlpGRPOTrainer
from datasets import Dataset
from transformers import LlamaForCausalLM
from trl import GRPOConfig

from benchmarks.policies.tiny_policy import make_tokenizer, tiny_config


def even_share(completions: list[str], **_: object) -> list[float]:
    """Rewards letters of even code, which a random policy can learn to write."""
    return [sum(ord(c) % 2 == 0 for c in text) / max(1, len(text)) for text in completions]


def trained(tmp_path, **changes):
    """The trainer after two generations of two updates each."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = LlamaForCausalLM(tiny_config(tokenizer, max_positions=64))
    settings = {
        **{"output_dir": str(tmp_path), "num_iterations": 2, "num_generations": 4},
        **{"per_device_train_batch_size": 4, "max_completion_length": 8, "max_steps": 4},
        **{"learning_rate": 1e-2, "logging_steps": 1, "report_to": [], "use_cpu": True},
        **{"save_strategy": "no", "bf16": False, "gradient_checkpointing": False},
    }
    trainer = AlpGRPOTrainer(
        model,
        args=GRPOConfig(**{**settings, **changes}),
        sigma_lr=1e-2,
        reward_funcs=even_share,
        train_dataset=Dataset.from_list([{"prompt": "What is 1 + 1?"}] * 8),
        processing_class=tokenizer,
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    return trainer, model, before


def test_weights_and_sigma_learn_and_the_noise_is_off_afterwards(tmp_path):
    trainer, model, before = trained(tmp_path)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert any(name.startswith("alp.") for name in changed)
    assert any(name.startswith("model.layers") for name in changed)
    assert model.alp.summary().maximum > NOISE.sigma0 or model.alp.summary().minimum < NOISE.sigma0
    ids = torch.arange(3, 11)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert [entry for entry in trainer.state.log_history if "alp/clip_fraction" in entry]


def test_gradient_checkpointing_meets_the_same_noise(tmp_path):
    """The layers run again in the backward pass; other noise there would give other weights."""
    _, plain, _ = trained(tmp_path / "plain")
    _, checkpointed, _ = trained(tmp_path / "again", gradient_checkpointing=True)
    for (name, one), two in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-5), name
