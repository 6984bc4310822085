"""Batches by hand, the tiny model of the replay's tests, and a tokenizer of its 40 words."""

import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[2] / "replay"))

from made_batches import VOCABULARY, sampled_batch, tiny_llama


@pytest.fixture(scope="session")
def words():
    """Word i says "w<i>"."""
    model = WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, words):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def recorded():
    return sampled_batch(tiny_llama())
