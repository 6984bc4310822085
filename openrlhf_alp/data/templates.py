"""Prompt templates: what the policy reads before it answers.

Four tasks and readers: single-turn mathematics and tool-integrated reasoning (TIR, section 4.1 of
arXiv 2603.19470), each for a base model (one text to go on from) and for a chat model (messages
that the tokenizer's chat template wraps). The paper does not print its prompts; these are our own.

A TIR prompt promises what the episode keeps: code stands in a fence that opens with three backticks
and `python`, and its output comes back in a fence that opens with three backticks and `output`.
"""

from dataclasses import dataclass

CODE_FENCE = "```python"
OUTPUT_FENCE = "```output"

Message = dict[str, str]
"""`role` and `content`, as chat templates take them."""

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
    """A named way to ask a problem.

    The problem stands between `before` and `after` untouched: braces, backslashes and dollar signs
    of LaTeX mean nothing to a template.
    """

    name: str
    summary: str
    """One line for `--help`."""

    is_chat: bool
    """Renders to messages, for `--data.apply_chat_template`; else to a text that is the prompt."""

    is_tool_integrated: bool
    """Tells the policy to write Python; for tool-integrated episodes."""

    system: str | None = None
    """The system message of a chat; None leaves it to the chat template, which may add its own."""

    before: str = ""
    after: str = ""

    def __post_init__(self) -> None:
        if self.system is not None and not self.is_chat:
            raise ValueError(
                f"template {self.name}: only a chat has a system message; use `before`"
            )

    def render(self, problem: str) -> str | list[Message]:
        """The value of the dataset's input field for one problem."""
        asked = f"{self.before}{problem}{self.after}"
        if not self.is_chat:
            return asked
        user = {"role": "user", "content": asked}
        return [user] if self.system is None else [{"role": "system", "content": self.system}, user]

    @property
    def train_flags(self) -> str:
        """The flags of `openrlhf_alp.cli.train_ppo_ray` that go with a file of such rows."""
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
