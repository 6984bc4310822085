"""Tiny random Hugging Face models and perturbation settings shared by the tests of alp/."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from openrlhf_alp.alp import PerturbationConfig

VOCAB = 61
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
_FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES, num_key_value_heads=2)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SIZES, num_key_value_heads=2)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_SIZES)),
}


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    """Tiny tensors: a second thread only adds waiting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=sorted(_FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def build_model() -> Callable[[str], nn.Module]:
    """family -> the same random float32 model at every call."""

    def build(family: str = "llama") -> nn.Module:
        torch.manual_seed(0)
        return _FAMILIES[family]()

    return build


@pytest.fixture
def settings() -> Callable[..., PerturbationConfig]:
    """PerturbationConfig with test defaults: noticeable noise, wide bounds."""

    def make(**changes: Any) -> PerturbationConfig:
        defaults = {
            "sigma0": 0.05,
            "kind": "vector",
            "sigma_scale": "absolute",
            "sigma_min": 0.0,
            "sigma_max": 1.0,
            "layers": "all",
            "seed": 7,
        }
        return PerturbationConfig(**{**defaults, **changes})

    return make


@pytest.fixture
def log_probs_of() -> Callable[..., Tensor]:
    """(model, tokens (B, T), mask (B, T)) -> log-probs (B, T - 1) of each next token."""

    def compute(model: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        logits = model(
            tokens, attention_mask=mask, position_ids=positions, use_cache=False
        ).logits.float()
        return logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)

    return compute
