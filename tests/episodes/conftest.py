import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

# Test modules are imported by path: their shared helper has to be found by name.
sys.path.insert(0, str(Path(__file__).parent))

from scripted_policy import make_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Characters as tokens, with a chat template."""
    return make_tokenizer()
