"""Finds the code in the policy's text, and the prose around it.

The policy writes a fenced block, and its result comes back as one:

    ```python                       ```output
    print(6 * 7)                    42
    ```                             ```
"""

import re

STOP_AT_FENCE = "\n```\n"
"""Ends a turn right after a closing fence. An opening ```python cannot match it; a bare opening
fence can, and then the turn goes on."""

_PYTHON_BLOCK = re.compile(
    r"^[ \t]*```(?:python3?|py)[ \t]*\r?\n(?P<code>.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE
)


def find_code(text: str) -> str | None:
    """The code of a turn: its closed Python blocks, in order; None when there is none.

    An empty block is a call too: the policy is told that nothing was printed.
    """
    blocks = [match["code"] for match in _PYTHON_BLOCK.finditer(text)]
    return "\n".join(blocks) if blocks else None


def without_code(text: str) -> str:
    """The policy's prose: what a final answer may be read from."""
    return _PYTHON_BLOCK.sub("", text)


def has_boxed_answer(text: str) -> bool:
    """Whether the policy's prose holds a \\boxed{...} with something in it."""
    return re.search(r"\\boxed\s*\{\s*[^\s}]", without_code(text)) is not None
