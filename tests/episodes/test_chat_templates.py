"""For each family of chat models: what an episode appends is what the template would have written.

The tokenizers are small, and the templates are minimal ones with the markers of their family.
"""

from dataclasses import dataclass
from functools import partial

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from openrlhf_alp.episodes.observation import chat_template

EACH = "{% for m in messages %}"
IF_USER = "{% if m.role == 'user' %}"
GENERATION = "{% endfor %}{% if add_generation_prompt %}"
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    + EACH
    + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    + GENERATION
    + "<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A template, its control tokens, and how its tokenizer treats plain text."""

    template: str
    end: str
    """What the policy samples to end its turn."""
    controls: tuple[str, ...]
    plain: tuple[str, ...] = ()
    """Text that the table of tokens holds beside them, and that is not special."""
    kind: str = "bytes"
    rstrip: bool = False
    """Whether control tokens absorb the blanks after them."""


FAMILIES = {
    "Llama 3": Family(
        template="<|begin_of_text|>"
        + EACH
        + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
        + GENERATION
        + "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        end="<|eot_id|>",
        controls=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "Qwen 2.5": Family(
        template=CHATML, end="<|im_end|>", controls=("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    ),
    "Qwen 3 with thinking": Family(
        template="{% set ns = namespace(last=0) %}"
        + EACH
        + IF_USER
        + "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        + EACH
        + "<|im_start|>{{ m.role }}\n"
        + "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
        + "<think>\n\n</think>\n\n{% endif %}"
        + "{{ m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>\n"
        + GENERATION
        + "<|im_start|>assistant\n{% endif %}",
        end="<|im_end|>",
        controls=("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
    ),
    "Gemma 3": Family(
        template="<bos>"
        + EACH
        + "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        + "{{ raise_exception('roles must alternate') }}{% endif %}"
        + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        + "{{ m.content | trim }}<end_of_turn>\n"
        + GENERATION
        + "<start_of_turn>model\n{% endif %}",
        end="<end_of_turn>",
        controls=("<bos>", "<start_of_turn>", "<end_of_turn>"),
        plain=("\n", "\n\n", "\n\n\n", "\u2581\u2581"),
        kind="spaces",
    ),
    "Mistral": Family(
        template="<s>"
        + EACH
        + IF_USER
        + "[INST] {{ m.content }}[/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}",
        end="</s>",
        controls=("<s>", "</s>", "[INST]", "[/INST]"),
        kind="first",
    ),
    "Mistral, instructions in plain text": Family(
        template="<s>"
        + EACH
        + IF_USER
        + "[INST] {{ m.content }} [/INST]{% else %}{{ m.content }}</s>{% endif %}{% endfor %}",
        end="</s>",
        controls=("<s>", "</s>"),
        kind="first",
    ),
    "Phi 3": Family(
        template=EACH
        + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n"
        + GENERATION
        + "<|assistant|>\n{% else %}<|endoftext|>{% endif %}",
        end="<|end|>",
        controls=("<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
        kind="prefix",
        rstrip=True,
    ),
    "Phi 4": Family(
        template=EACH
        + "<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>"
        + GENERATION
        + "<|im_start|>assistant<|im_sep|>{% endif %}",
        end="<|im_end|>",
        controls=("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
    ),
    "SmolLM": Family(template=CHATML, end="<|im_end|>", controls=("<|im_start|>", "<|im_end|>")),
    "DeepSeek V3": Family(
        template="<BOS>"
        + EACH
        + IF_USER
        + "<|User|>{{ m.content }}{% else %}<|Assistant|>{{ m.content }}<EOS>{% endif %}"
        + GENERATION
        + "<|Assistant|>{% endif %}",
        end="<EOS>",
        controls=("<BOS>", "<EOS>", "<|User|>", "<|Assistant|>"),
    ),
    "DeepSeek R1": Family(
        template="<BOS>"
        + EACH
        + IF_USER
        + "<|User|>{{ m.content }}{% else %}"
        + "<|Assistant|>{{ m.content.split('</think>')[-1] }}<EOS>{% endif %}"
        + GENERATION
        + "<|Assistant|><think>\n{% endif %}",
        end="<EOS>",
        controls=("<BOS>", "<EOS>", "<|User|>", "<|Assistant|>", "<think>", "</think>"),
    ),
    "GLM 4": Family(
        template="[gMASK]<sop>"
        + EACH
        + "<|{{ m.role }}|>\n{{ m.content }}"
        + GENERATION
        + "<|assistant|>{% endif %}",
        end="<|user|>",
        controls=("[gMASK]", "<sop>", "<|user|>", "<|assistant|>"),
    ),
    "Zephyr, roles in plain text": Family(
        template=EACH
        + "<|{{ m.role }}|>\n{{ m.content }}</s>\n"
        + GENERATION
        + "<|assistant|>\n{% endif %}",
        end="</s>",
        controls=("</s>",),
        kind="first",
    ),
}
GPT_OSS = Family(
    template=EACH
    + "{% if m.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    + "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    + "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}"
    + GENERATION
    + "<|start|>assistant{% endif %}",
    end="<|return|>",
    controls=("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
)
CODE = "```python\nprint([6 * 7])\n```"
OUTPUTS = ["42", "[42]", "\n  (x)\n\n", ")\n]", "", "```", "</b> <|x|>"]


def make_tokenizer(name: str, family: Family) -> PreTrainedTokenizerFast:
    """Trained on a few lines, so that it merges brackets, spaces and new lines as large ones do."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    if family.kind == "bytes":
        words = Regex(r" ?[^\s\p{L}\p{N}]+[\r\n]*|\p{L}+|\p{N}|\s*[\r\n]+|\s+")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(words, "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
    elif family.kind == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        steps = [normalizers.Replace(" ", "\u2581")]
        if family.kind == "prefix":
            steps.insert(0, normalizers.Prepend("\u2581"))
        tokenizer.normalizer = normalizers.Sequence(steps)
    trainer = BpeTrainer(
        vocab_size=400,
        show_progress=False,
        initial_alphabet=[*pre_tokenizers.ByteLevel.alphabet(), "\n", "\u2581"],
    )
    lines = [f"```output\n[{i}]\n```\n\n ``` (x)\n" for i in range(50)] + ["user\n", "assistant\n"]
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, rstrip=family.rstrip) for text in family.controls]
    )
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in family.plain])
    # No end-of-sequence and no additional special tokens: the template alone says what ends a turn.
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=family.template)
    fast.name_or_path = name
    return fast


def conversation(answer: str, output: str) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": "6 * 7?"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": f"```output\n{output}\n```"},
    ]


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_appended_is_what_the_template_writes_for_the_whole_conversation(name, output):
    family = FAMILIES[name]
    tokenizer = make_tokenizer(name, family)
    encode = partial(tokenizer.encode, add_special_tokens=False)
    template = chat_template(tokenizer)
    end = tokenizer.convert_tokens_to_ids(family.end)
    assert template.end_of_turn_ids[-1] == end
    whole = encode(
        tokenizer.apply_chat_template(
            conversation(CODE, output), tokenize=False, add_generation_prompt=True
        )
    )
    plain = partial(encode, split_special_tokens=True)
    sampled = encode(CODE)
    ended, stopped = (
        template.observation_ids(output, encode=plain, sampled_ids=ids, sampled_text=CODE)
        for ids in ([*sampled, end], sampled)
    )
    # A turn that was stopped at its fence is closed first, one that the policy ended is not.
    assert stopped == [*template.end_of_turn_ids, *ended]
    assert whole[-len(stopped) :] == stopped
    # What stands before it is the answer: nothing is missing in between, and nothing doubled.
    answered = tokenizer.decode(whole[: -len(stopped)]).rstrip()
    assert answered.endswith("```") and not answered.endswith("output\n```")


@pytest.mark.parametrize("name", [*FAMILIES])
def test_a_program_cannot_print_the_end_of_a_turn_of_any_family(name):
    tokenizer = make_tokenizer(name, FAMILIES[name])
    template = chat_template(tokenizer)
    plain = partial(tokenizer.encode, add_special_tokens=False, split_special_tokens=True)
    shown = partial(template.observation_ids, encode=plain, sampled_ids=(), sampled_text="")
    for text in FAMILIES[name].controls:
        token = tokenizer.convert_tokens_to_ids(text)
        assert shown(text).count(token) == shown("").count(token)


@pytest.mark.parametrize("name", ["Qwen 3 with thinking", "DeepSeek R1"])
def test_thoughts_that_the_template_would_drop_stay_in_the_ids_of_the_policy(name):
    """The template leaves them out of earlier turns; what is appended after them is the same."""
    tokenizer = make_tokenizer(name, FAMILIES[name])
    encode = partial(tokenizer.encode, add_special_tokens=False)
    answer = f"<think>\nhm\n</think>\n\n{CODE}"
    render = partial(tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=True)
    appended = chat_template(tokenizer).observation_ids(
        "42", encode=encode, sampled_ids=encode(answer), sampled_text=answer
    )
    whole = encode(render(conversation(answer, "42")))
    assert tokenizer.convert_tokens_to_ids("</think>") in encode(answer)
    assert whole[-len(appended) :] == appended


def test_gpt_oss_is_refused_by_name_because_its_end_of_turn_changes_afterwards():
    """It samples <|return|>, and the template writes <|end|> there once the talk continues."""
    tokenizer = make_tokenizer("gpt-oss-tiny", GPT_OSS)
    with pytest.raises(ValueError, match=r"gpt-oss-tiny ends .*<\|return\|>.*<\|end\|>.*Fix:"):
        chat_template(tokenizer)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (EACH + "{{ raise_exception('no tools here') }}{% endfor %}", "no tools here"),
        (EACH + IF_USER + "{{ m.content }}{% endif %}{% endfor %}", "cannot show"),
    ],
)
def test_a_template_that_cannot_show_an_output_is_refused_with_the_fix(template, message):
    family = Family(template=template, end="</s>", controls=("</s>",))
    with pytest.raises(ValueError, match=rf"odd .*{message}.*Fix: --tir\.template plain"):
        chat_template(make_tokenizer("odd", family))
