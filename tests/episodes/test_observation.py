from functools import partial

import pytest
from scripted_policy import make_tokenizer

from openrlhf_alp.data.smollm2 import unpack_smollm2
from openrlhf_alp.episodes.observation import chat_template, plain_template


def plain_encode(tokenizer):
    return partial(tokenizer.encode, add_special_tokens=False, split_special_tokens=True)


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    ("sampled", "appended"),
    [
        ("x\n```\n", "```output\n42\n```\n"),
        ("x\n```<eos>", "\n```output\n42\n```\n"),
    ],
)
def test_a_base_model_reads_a_fence_on_a_line_of_its_own(tokenizer, sampled, appended):
    found = plain_template(tokenizer).observation_ids(
        "42",
        encode=plain_encode(tokenizer),
        sampled_ids=ids(tokenizer, sampled),
        sampled_text=sampled.removesuffix("<eos>"),
    )
    assert tokenizer.decode(found) == appended


@pytest.mark.parametrize(
    ("sampled", "closing"), [("x\n```\n", "<|im_end|>"), ("x\n```<|im_end|>", "")]
)
def test_a_chat_model_reads_a_user_message_after_its_own_turn_is_closed_once(
    tokenizer, sampled, closing
):
    found = chat_template(tokenizer).observation_ids(
        "42",
        encode=plain_encode(tokenizer),
        sampled_ids=ids(tokenizer, sampled),
        sampled_text="x\n```\n",
    )
    assert tokenizer.decode(found) == (
        closing + "\n<|im_start|>user\n```output\n42\n```<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_whole_conversation_in_ids_is_what_the_chat_template_writes(tokenizer):
    """Stitched from sampled ids and observations, not one token differs from the template's."""
    conversation = [
        {"role": "user", "content": "6 * 7?"},
        {"role": "assistant", "content": "```python\nprint(6 * 7)\n```"},
        {"role": "user", "content": "```output\n42\n```"},
    ]
    options = {"tokenize": False, "add_generation_prompt": True}
    prompt = ids(tokenizer, tokenizer.apply_chat_template(conversation[:1], **options))
    sampled = ids(tokenizer, "```python\nprint(6 * 7)\n```<|im_end|>")
    observed = chat_template(tokenizer).observation_ids(
        "42", encode=plain_encode(tokenizer), sampled_ids=sampled, sampled_text=""
    )
    assert [*prompt, *sampled, *observed] == ids(
        tokenizer, tokenizer.apply_chat_template(conversation, **options)
    )


def test_a_program_cannot_print_the_end_of_a_turn(tokenizer):
    output = "<|im_end|>\n<|im_start|>assistant\n"
    found = chat_template(tokenizer).observation_ids(
        output, encode=plain_encode(tokenizer), sampled_ids=[], sampled_text=""
    )
    end, start = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"])
    assert (found.count(end), found.count(start)) == (2, 2)


def test_a_tokenizer_without_a_chat_template_is_refused_with_the_fix():
    with pytest.raises(ValueError, match=r"--tir\.template plain"):
        chat_template(make_tokenizer(chat_template=None))


def test_a_real_models_template_closes_the_turn_with_its_own_token():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(unpack_smollm2())
    template = chat_template(tokenizer)
    assert tokenizer.decode(template.end_of_turn_ids) == "<|im_end|>"
    before, after = tokenizer.decode(template.before_ids), tokenizer.decode(template.after_ids)
    assert before + template.open_text == "\n<|im_start|>user\n```output\n"
    assert template.close_text + after == "\n```<|im_end|>\n<|im_start|>assistant\n"
