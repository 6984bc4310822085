"""A tiny real model and real OpenRLHF args for the learner's tests."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.policies.tiny_policy import CHAT_TEMPLATE, save_tiny_policy, tiny_config
from openrlhf_alp.learner import compat

compat.install()  # some tests use a shim without importing OpenRLHF


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
    model = LlamaForCausalLM(tiny_config(fast, max_positions=256))
    model.to(torch.bfloat16).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def actors() -> Any:
    """The helpers of test_actor.py: a real actor and samples of a known mismatch."""
    spec = importlib.util.spec_from_file_location("actors", Path(__file__).parent / "test_actor.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def service_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, key in KEYS.items():
        monkeypatch.setenv(name, key)


@pytest.fixture
def parse(tiny_model: Path, tmp_path: Path) -> Callable[..., SimpleNamespace]:
    """Args as OpenRLHF itself parses and validates them, for a run on one CPU rank."""
    from openrlhf_alp.learner import seams
    from openrlhf_alp.learner.flags.settle import add_arguments, settle

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
        return seams.parsed_args([*base, *flags], add_arguments, settle)

    return parse_flags


API_KEY = "api-key-of-a-test"
ADMIN_KEY = "admin-key-of-a-test"
TOOL_KEY = "tool-key-of-a-test"
KEYS = {
    "OPENRLHF_ALP_ROLLOUT_API_KEY": API_KEY,
    "OPENRLHF_ALP_ROLLOUT_ADMIN_KEY": ADMIN_KEY,
    "OPENRLHF_ALP_TOOL_API_KEY": TOOL_KEY,
}
START_S = 240.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Service:
    """A service in its own process."""

    url: str
    process: subprocess.Popen
    log: Path


@contextlib.contextmanager
def rollout_service(model: Path, folder: Path, *flags: str) -> Iterator[Service]:
    """`python -m services.rollout` on a free port, ended with the block."""
    arguments = ["services.rollout", "--model", str(model), "--max-model-len", "256", *flags]
    with _service(arguments, folder) as service:
        yield service


@contextlib.contextmanager
def _service(arguments: list[str], folder: Path) -> Iterator[Service]:
    """`python -m ARGUMENTS` on a free port, ended with the block."""
    url_file, log = folder / f"{arguments[0]}.url", folder / f"{arguments[0]}.log"
    command = [sys.executable, "-m", *arguments, "--port", "0", "--url-file", str(url_file)]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **KEYS}, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        give_up_s = time.monotonic() + START_S
        while not url_file.exists():
            assert process.poll() is None and time.monotonic() < give_up_s, log.read_text()[-3000:]
            time.sleep(0.2)
        yield Service(url=url_file.read_text().strip(), process=process, log=log)
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def tool_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The real sandbox, at whatever isolation level this machine allows."""
    arguments = ["services.tool", "--presets", "numpy", "--slots", "2", "--log-level", "WARNING"]
    with _service(arguments, tmp_path_factory.mktemp("tool-service")) as service:
        yield service


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that knows four prompts, "Task K" and a new line for K in 0..3.

    It calls a tool once to print K, and boxes what it reads.
    """
    dialogues = [
        (
            f"Task {k}\n",
            f"```python\nprint({k})\n```\n```output\n{k}\n```\n\\boxed{{{k}}}<eos>",
        )
        for k in range(4)
    ]
    return save_tiny_policy(tmp_path_factory.mktemp("tiny-policy"), dialogues)


@pytest.fixture(scope="session")
def hf_service(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Plain Hugging Face engine: starts in seconds, exact log-probs."""
    folder = tmp_path_factory.mktemp("hf-service")
    with rollout_service(tiny_model, folder, "--engine", "hf") as service:
        yield service


@pytest.fixture
def start_service() -> Callable[..., contextlib.AbstractContextManager[Service]]:
    """For a test that ends its service itself."""
    return rollout_service
