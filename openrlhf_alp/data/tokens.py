"""Prompt lengths in the policy's tokens."""

from collections.abc import Sequence
from typing import Any

import jinja2

from openrlhf_alp.data.errors import TokenizerError
from openrlhf_alp.data.templates import Message


class TokenCounter:
    """Counts tokens of rendered prompts exactly as training encodes them."""

    def __init__(self, name_or_path: str) -> None:
        """Loads a tokenizer from a model folder or by its Hugging Face id.

        Raises:
            TokenizerError: it cannot be loaded.
        """
        # Here and not above: transformers takes seconds to import.
        from transformers import AutoTokenizer

        self._name = name_or_path
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name_or_path)
        except Exception as error:
            raise TokenizerError(
                f"--tokenizer {name_or_path}: cannot be loaded ({error}). Give the model folder of "
                "the policy, or an id that the Hugging Face hub or its local cache knows"
            ) from error

    def __call__(self, inputs: Sequence[str | list[Message]]) -> list[int]:
        """Token counts, in order; messages are put into the chat template first.

        Raises:
            TokenizerError: messages, but the tokenizer has no chat template or one that refuses
                them: some know no system message.
        """
        texts = [self._as_text(one) for one in inputs]
        if not texts:
            return []
        encoded = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [len(token_ids) for token_ids in encoded]

    def _as_text(self, prompt: str | list[Message]) -> str:
        if isinstance(prompt, str):
            return prompt
        if not self._tokenizer.chat_template:
            raise TokenizerError(
                f"--tokenizer {self._name} has no chat template, so --data.apply_chat_template "
                "would fail too; choose a --template that starts with base-"
            )
        try:
            text: str = self._tokenizer.apply_chat_template(
                prompt, tokenize=False, add_generation_prompt=True
            )
        except jinja2.TemplateError as error:
            raise TokenizerError(
                f"--tokenizer {self._name}: its chat template refuses {prompt[0]['role']} messages "
                f"of --template: {error}. Choose one that suits it, such as chat-bare"
            ) from error
        return text
