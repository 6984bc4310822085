"""Renders problems to prompts and counts their tokens.

There are templates for single-turn mathematics and for tool-integrated reasoning (TIR, section 4.1
of arXiv 2603.19470), each for a base model (one text that the model continues) and for a chat model
(messages that the tokenizer's chat template wraps). The paper does not print its prompts.

A TIR prompt describes what the episode does: code is read from a fence that opens with three
backticks and `python`, and its output comes back in one that opens with three backticks and
`output`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from openrlhf_alp.data.sources import DataError

INPUT_KEY = "input"
LABEL_KEY = "label"

CODE_FENCE = "```python"
OUTPUT_FENCE = "```output"

Message = dict[str, str]
"""A message with `role` and `content`, as chat templates take it."""

_BOXED = "Give the final answer as \\boxed{answer}, once, at the end."

_REASON = f"Work through the problem step by step. {_BOXED}"

_TOOLS = f"""\
You can run Python on the way. Write the code in a block of its own:

{CODE_FENCE}
print(sum(range(1, 11)))
```

The block is run as soon as it is closed, and what it printed comes back below it:

{OUTPUT_FENCE}
55
```

Never write an output block yourself. Print every value that you want to see, and define in each \
block whatever it uses. Use code for calculations, for search and to check a result; read its \
output, errors included, before you go on. When you are sure, answer in your own words: only they \
count, not what a program printed. {_BOXED}"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTemplate:
    """A named prompt template.

    The problem is inserted unchanged between `before` and `after`: braces, backslashes and dollar
    signs of LaTeX have no meaning to a template.
    """

    name: str
    summary: str
    """One line for `--help`."""

    is_chat: bool
    """Renders messages for `--data.apply_chat_template`; otherwise a text that is the prompt."""

    is_tool_integrated: bool
    """Asks the policy to write Python, for tool-integrated episodes."""

    system: str | None = None
    """System message of a chat; with None the chat template may add its own."""

    before: str = ""
    after: str = ""

    def __post_init__(self) -> None:
        if self.system is not None and not self.is_chat:
            raise ValueError(
                f"template {self.name}: only a chat has a system message; use `before`"
            )

    def render(self, problem: str) -> str | list[Message]:
        """Returns the value of the data set's input field for one problem."""
        asked = f"{self.before}{problem}{self.after}"
        if not self.is_chat:
            return asked
        user = {"role": "user", "content": asked}
        return [user] if self.system is None else [{"role": "system", "content": self.system}, user]

    @property
    def train_flags(self) -> str:
        """Flags of `openrlhf_alp.cli.train_ppo_ray` that a file of such rows needs."""
        flags = "--data.input_key input --data.label_key label"
        if self.is_chat:
            flags += " --data.apply_chat_template"
        if self.is_tool_integrated:
            flags += f" --tir.template {'chat' if self.is_chat else 'plain'}"
        return flags


_BEFORE_PROBLEM = "Problem: "
_AFTER_PROBLEM = "\n\nSolution:\n"

TEMPLATES = {
    template.name: template
    for template in (
        PromptTemplate(
            name="base-math",
            summary="a text for a base model: reason, then \\boxed{}",
            is_chat=False,
            is_tool_integrated=False,
            before=f"{_REASON}\n\n{_BEFORE_PROBLEM}",
            after=_AFTER_PROBLEM,
        ),
        PromptTemplate(
            name="base-tir",
            summary="a text for a base model: reason with Python blocks, then \\boxed{}",
            is_chat=False,
            is_tool_integrated=True,
            before=f"Solve the problem below. {_TOOLS}\n\n{_BEFORE_PROBLEM}",
            after=_AFTER_PROBLEM,
        ),
        PromptTemplate(
            name="chat-math",
            summary="system and user messages: reason, then \\boxed{} (paper, appendix E)",
            is_chat=True,
            is_tool_integrated=False,
            system=_REASON,
        ),
        PromptTemplate(
            name="chat-tir",
            summary="system and user messages: reason with Python blocks, then \\boxed{}",
            is_chat=True,
            is_tool_integrated=True,
            system=f"You solve problems. {_TOOLS}",
        ),
        PromptTemplate(
            name="chat-bare",
            summary="the problem alone, as the user's message",
            is_chat=True,
            is_tool_integrated=False,
        ),
    )
}
"""By name, as `--template` takes them."""


class TokenizerError(DataError):
    """The tokenizer cannot be loaded, or it has no chat template for messages."""


class TokenCounter:
    """Counts tokens of rendered prompts exactly as training encodes them."""

    def __init__(self, name_or_path: str) -> None:
        """Loads a tokenizer from a model folder or by its Hugging Face id.

        Raises:
            TokenizerError: it cannot be loaded.
        """
        # Imported here because transformers takes seconds to import.
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
        """Returns token counts in order; messages go through the chat template first.

        Raises:
            TokenizerError: the tokenizer has no chat template for messages, or its template
                refuses them; some refuse system messages.
        """
        texts = [self._as_text(one) for one in inputs]
        if not texts:
            return []
        # Chat templates write their special tokens themselves, so that none is added twice.
        encoded = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [len(token_ids) for token_ids in encoded]

    def _as_text(self, prompt: str | list[Message]) -> str:
        return prompt_text(prompt, self._tokenizer, named=f"--tokenizer {self._name}")


def prompt_text(prompt: str | list[Message], tokenizer: Any, *, named: str) -> str:
    """Returns a rendered prompt as the text that the policy continues.

    Args:
        prompt: what `PromptTemplate.render` returned.
        named: the flag and value that gave the tokenizer, for messages.

    Raises:
        TokenizerError: the tokenizer has no chat template for messages, or its template refuses
            them.
    """
    if isinstance(prompt, str):
        return prompt
    if not tokenizer.chat_template:
        raise TokenizerError(
            f"{named} has no chat template, which messages need (with --data.apply_chat_template "
            "too); choose a --template that starts with base-"
        )
    try:
        text: str = tokenizer.apply_chat_template(
            prompt, tokenize=False, add_generation_prompt=True
        )
    except jinja2.TemplateError as error:
        raise TokenizerError(
            f"{named}: its chat template refuses {prompt[0]['role']} messages of --template: "
            f"{error}. Choose one that suits it, such as chat-bare"
        ) from error
    return text
