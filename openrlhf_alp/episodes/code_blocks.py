"""Find the code that the policy wrote, and render what came of it.

The policy writes a fenced block, the answer comes back as one:

    ```python                       ```output
    print(6 * 7)                    42
    ```                             ```

Text only: which ids the observation becomes is `observation.py`'s business.
"""

import re
from dataclasses import dataclass
from enum import StrEnum

STOP_AT_FENCE = "\n```\n"
"""Ends a turn right after a closing fence. An opening ```python cannot match it; a bare opening
fence can, and then the turn goes on (see `tool_integrated.py`)."""

_PYTHON_BLOCK = re.compile(
    r"^[ \t]*```(?:python3?|py)[ \t]*\r?\n(?P<code>.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE
)
_TRACEBACK = "Traceback (most recent call last):"
_FRAME = re.compile(r'^  File "', re.MULTILINE)


class CodeStatus(StrEnum):
    """How a program ended. The policy sees all of these; faults of the sandbox never reach it."""

    OK = "ok"
    ERROR = "error"
    """An uncaught exception."""
    EXIT = "exit"
    """A non-zero exit code."""
    TIMEOUT = "timeout"
    CPU_LIMIT = "cpu_limit"
    MEMORY_LIMIT = "memory_limit"
    OUTPUT_LIMIT = "output_limit"
    CRASHED = "crashed"
    REJECTED = "rejected"
    """Not runnable as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeResult:
    """What a program printed and how it ended."""

    status: CodeStatus
    stdout: str = ""
    stderr: str = ""
    result: str | None = None
    """repr of a cell's last expression, in sessions."""
    message: str = ""
    """Cause, for limits and for code that was rejected."""
    run_s: float = 0.0
    """Wall time of the program itself."""


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


def render_result(result: CodeResult, *, max_chars: int) -> str:
    """What the policy reads: output, the cause of a failure, each cut in its middle.

    stderr is shown when the program failed or printed nothing else: warnings of a library do not
    push out a result. Of a traceback the last frame and the exception stay.
    """
    parts = [cut_middle(result.stdout.rstrip(), max_chars)]
    if result.result is not None:
        parts.append(cut_middle(result.result, max_chars))
    failed = result.status is not CodeStatus.OK
    if failed or not any(parts):
        parts.append(cut_middle(last_frame(result.stderr).rstrip(), max_chars))
    if failed and result.status is not CodeStatus.ERROR:
        parts.append(f"[{result.message or result.status}]")
    shown = "\n".join(part for part in parts if part)
    return shown or "[nothing was printed]"


def cut_middle(text: str, max_chars: int) -> str:
    """`text` with its middle replaced by a marker that says how much is missing."""
    if len(text) <= max_chars:
        return text
    head, tail = max_chars - max_chars // 2, max_chars // 2
    missing = len(text) - head - tail
    return f"{text[:head]}\n[... {missing} characters left out ...]\n{text[-tail:]}"


def last_frame(stderr: str) -> str:
    """The last traceback with its innermost frame only; other text before it is kept."""
    before, found, traceback = stderr.rpartition(_TRACEBACK)
    frames = list(_FRAME.finditer(traceback))
    if not found or len(frames) < 2:
        return stderr
    return f"{before}{_TRACEBACK}\n  ...\n{traceback[frames[-1].start() :]}"
