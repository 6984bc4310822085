import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from openrlhf_alp.data.templates import TEMPLATES, TokenCounter, TokenizerError

NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


@pytest.fixture
def counter(tmp_path):
    """Makes a counter whose tokens are bytes."""

    def make(chat_template=None):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE(vocab={b: i for i, b in enumerate(alphabet)}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=chat_template)
        tokenizer.save_pretrained(tmp_path)
        return TokenCounter(str(tmp_path))

    return make


def test_a_text_is_counted_as_it_is(counter):
    assert counter()(["four", "", "seven 7"]) == [4, 0, 7]


def test_messages_are_counted_with_the_chat_template_and_its_call_for_an_answer(counter):
    """Four letters and the sign behind which the answer begins."""
    assert counter(NO_SYSTEM)([TEMPLATES["chat-bare"].render("four")]) == [5]


def test_messages_without_a_chat_template_are_an_error(counter):
    with pytest.raises(TokenizerError, match=r"no chat template.*starts with base-"):
        counter()([TEMPLATES["chat-math"].render("four")])


def test_a_template_that_knows_no_system_message_is_named(counter):
    with pytest.raises(TokenizerError, match=r"refuses system messages.*no system.*chat-bare"):
        counter(NO_SYSTEM)([TEMPLATES["chat-math"].render("four")])
