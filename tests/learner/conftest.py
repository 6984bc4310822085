"""A tiny real model and real OpenRLHF args for the learner's tests."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import openrlhf_alp.learner  # noqa: F401  (installs the shims that OpenRLHF needs to import)

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def save_tiny_model(folder: Path, *, seed: int = 0) -> Path:
    """A random 2-layer Llama of width 64 with a byte-level tokenizer; bfloat16 safetensors."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        chat_template=CHAT_TEMPLATE,
    )
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,  # vLLM on CPU needs heads of 32 or more
        num_key_value_heads=1,
        max_position_embeddings=256,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture
def service_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENRLHF_ALP_ROLLOUT_API_KEY", "api-key-of-a-test")
    monkeypatch.setenv("OPENRLHF_ALP_ROLLOUT_ADMIN_KEY", "admin-key-of-a-test")


@pytest.fixture
def parse(tiny_model: Path, tmp_path: Path) -> Callable[..., SimpleNamespace]:
    """Args as OpenRLHF itself parses and validates them, for a run on one CPU rank."""
    from openrlhf_alp.learner import config, seams

    def parse_flags(*flags: str) -> SimpleNamespace:
        base = [
            *("--actor.model_name_or_path", str(tiny_model)),
            *("--actor.num_gpus_per_node", "1"),
            *("--algo.advantage.estimator", "group_norm"),
            *("--algo.kl.init_coef", "0"),
            *("--rollout.batch_size", "2"),
            *("--rollout.n_samples_per_prompt", "2"),
            *("--rollout.micro_batch_size", "2"),
            *("--train.batch_size", "4"),
            *("--train.micro_batch_size", "2"),
            *("--actor.adam.lr", "1e-3"),
            *("--actor.lr_scheduler", "constant"),
            *("--reward.remote_url", "math-verify"),
            *("--vllm.sync_backend", "none"),
            *("--vllm.num_engines", "1"),
            *("--ckpt.path", str(tmp_path / "checkpoints")),
            *("--ckpt.output_dir", str(tmp_path / "export")),
        ]
        return seams.parsed_args([*base, *flags], config.add_arguments, config.settle)

    return parse_flags


@contextlib.contextmanager
def single_rank() -> Iterator[None]:
    """One gloo rank in this process, taken down afterwards."""
    import torch.distributed as dist

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
