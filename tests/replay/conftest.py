"""A tiny model and a batch that it sampled."""

import sys
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

# Test modules are imported by path: their shared helper has to be found by name.
sys.path.insert(0, str(Path(__file__).parent))

from made_batches import sampled_batch, tiny_llama

from openrlhf_alp.replay.files.records import RecordedBatch


@pytest.fixture(scope="session")
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="session")
def recorded(model: LlamaForCausalLM) -> RecordedBatch:
    return sampled_batch(model)
