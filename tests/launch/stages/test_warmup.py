import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.policies.tiny_policy import make_tokenizer
from openrlhf_alp.data.tasks import Dialogue
from openrlhf_alp.launch.stages.warmup import collate, encode, warm_up

CALL = Dialogue(question="Q?", call="```python\nprint(2)\n```\n", output="2", answer="A.")
GUESS = Dialogue(question="Q?", call=None, output="2", answer="A.")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def labelled(tokenizer, labels: list[int]) -> str:
    return tokenizer.decode([label for label in labels if label != -100])


def test_a_dialogue_is_stitched_as_an_episode_is_and_labelled_where_the_policy_writes(tokenizer):
    ids, labels = encode(tokenizer, CALL)
    assert tokenizer.decode(ids) == (
        "user: Q?\nassistant: ```python\nprint(2)\n```\n\n"
        "user: ```output\n2\n```\nassistant: A.<eos>"
    )
    assert labelled(tokenizer, labels) == "```python\nprint(2)\n```\nA.<eos>"
    assert len(ids) == len(labels)


def test_a_guess_has_no_tool_turn(tokenizer):
    ids, labels = encode(tokenizer, GUESS)
    assert tokenizer.decode(ids) == "user: Q?\nassistant: A.<eos>"
    assert labelled(tokenizer, labels) == "A.<eos>"


def test_padding_is_no_label():
    ids, labels = collate([([1, 2, 3], [-100, 2, 3]), ([4], [4])])
    assert ids.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert labels.tolist() == [[-100, 2, 3], [4, -100, -100]]


def test_the_loss_falls_and_every_step_is_reported(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    losses = list(warm_up(LlamaForCausalLM(config), tokenizer, num_steps=20, seed=0))
    assert len(losses) == 20 and all(map(math.isfinite, losses))
    assert sum(losses[-5:]) < sum(losses[:5])
