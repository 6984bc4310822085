"""What the tool service and its callers send each other."""

import base64
import binascii
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from services.common.wire import Number, Whole

StatusName = Literal[
    "ok", "error", "exit", "timeout", "cpu_limit", "memory_limit", "output_limit", "crashed",
    "rejected", "overloaded", "sandbox_error",
]  # fmt: skip
"""`Status` in services/tool/sandbox/host/verdict.py says what each means."""

_MAX_FILES = 64
_MAX_PATH_CHARS = 512
_MAX_PART_BYTES = 255


def _relative_path(path: str) -> str:
    parts = path.split("/")
    if path.startswith("/") or any(part in ("", ".", "..") for part in parts):
        raise ValueError("must be relative, without empty parts, '.' or '..'")
    if "\x00" in path or any(len(part.encode("utf-8")) > _MAX_PART_BYTES for part in parts):
        raise ValueError(f"must have no NUL and no part above {_MAX_PART_BYTES} bytes")
    return path


def _base64_text(content: str) -> str:
    try:
        base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("must be base64") from error
    return content


SafePath = Annotated[
    str, Field(min_length=1, max_length=_MAX_PATH_CHARS), AfterValidator(_relative_path)
]
Base64Text = Annotated[str, AfterValidator(_base64_text)]


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ExecuteRequest(_Wire):
    """Run one program in a fresh interpreter. Limits left out take the server's defaults."""

    code: str = Field(description="Python source", examples=["print(1 + 1)"])
    stdin: str = ""
    files: dict[SafePath, Base64Text] = Field(default_factory=dict, max_length=_MAX_FILES)
    """Relative path to base64 content, written before the code runs."""
    fetch: list[SafePath] = Field(default_factory=list, max_length=_MAX_FILES)
    """Files to return after the code has ended."""
    figures: bool = False
    """Return matplotlib's figures in `files`, as figure-1.png and so on: those that `plt.show()`
    showed, then those that are open when the code ends."""
    timeout_s: Number | None = Field(default=None, gt=0)
    """Wall time of the execution; waiting for a slot does not count."""
    cpu_s: Whole | None = Field(default=None, ge=1, le=86_400)
    """CPU time of each process; when left out, what four threads use in the wall time."""
    memory_mb: Whole | None = Field(default=None, ge=1)
    """Memory in MiB, on top of the interpreter and its preloaded libraries."""
    output_bytes: Whole | None = Field(default=None, ge=1)
    """Largest stdout and largest stderr that is kept; a program that prints more is killed."""
    seed: Whole | None = Field(default=None, ge=0, lt=2**32)
    """For `random` and numpy's global generator; fresh entropy when left out."""
    deadline_s: Number | None = Field(default=None, gt=0)
    """Longest wait for a slot in seconds; beyond it the answer is 429 `overloaded`."""
    request_id: str | None = Field(default=None, max_length=128)
    """Returned as given, to match answers of a batch. Outside of batches, sending an id again joins
    the running program or returns its kept answer; with another body it is a 409."""


class BatchRequest(_Wire):
    """Several programs; answers stream back as NDJSON in the order they finish."""

    requests: list[ExecuteRequest] = Field(min_length=1, max_length=4096, fail_fast=True)


class ErrorReport(_Wire):
    """An uncaught exception."""

    type: str
    message: str
    line: int | None
    """Line of the snippet, 1-based."""


class Usage(_Wire):
    """What an execution used."""

    wall_ms: float
    cpu_ms: float
    """User and system time. It is 0, as is `peak_mb`, for a cell that ended with its session."""
    peak_mb: float
    """Largest resident memory of the first process, including the preloaded libraries, or what all
    processes held together where a cgroup counts it and that is more."""
    queue_ms: float


class ExecuteResult(_Wire):
    """How an execution ended. A failing snippet is HTTP 200."""

    status: StatusName
    exit_code: int | None
    signal: str | None
    error: ErrorReport | None
    message: str
    """Cause, if a limit was exceeded or the code did not run."""
    stdout: str
    stderr: str
    stdout_truncated: bool
    stderr_truncated: bool
    files: dict[str, str]
    missing: dict[str, str]
    usage: Usage
    isolation: str
    request_id: str | None


class BatchItem(ExecuteResult):
    """One line of a batch answer."""

    index: int
    """Position in the request's list."""


class SessionRequest(_Wire):
    """Open a persistent interpreter."""

    memory_mb: Whole | None = Field(default=None, ge=1)
    """Of each process, on top of the interpreter. All together may hold twice as much, because a
    snapshot keeps the old copy of what a cell changes."""
    seed: Whole | None = Field(default=None, ge=0, lt=2**32)
    ttl_s: Number | None = Field(default=None, gt=0)
    """Idle seconds after which the session is ended; at most the server's own."""


class SessionInfo(_Wire):
    """A live session."""

    session_id: str
    next_step: int
    """Step number that the next cell must carry."""
    idle_s: float
    ttl_s: float
    isolation: str


class CellRequest(_Wire):
    """Run one cell in a session."""

    code: str = Field(examples=["x = 1"])
    step: Whole | None = Field(default=None, ge=0)
    """Exactly-once number: the same step with the same code returns the stored answer; without it,
    the next number is taken."""
    timeout_s: Number | None = Field(default=None, gt=0)
    cpu_s: Whole | None = Field(default=None, ge=1, le=86_400)
    output_bytes: Whole | None = Field(default=None, ge=1)
    deadline_s: Number | None = Field(default=None, gt=0)
    figures: bool = False
    """Return matplotlib's figures in `files`, as for a program."""


class CellResult(ExecuteResult):
    """How a cell ended, and what became of the session's state."""

    session_id: str
    step: int
    result: str | None
    """repr of the last expression."""
    snapshot: bool
    """Whether the state before the cell was kept while it ran."""
    rolled_back: bool
    """Whether the state is that before the cell."""
    state_lost: bool
    """Whether the interpreter's state is gone."""
    replayed: bool
    """Whether this is the stored answer of an earlier, identical step."""


class FileInfo(_Wire):
    path: str
    size_bytes: int


class FileList(_Wire):
    files: list[FileInfo]


class LayerReport(_Wire):
    """One layer of the sandbox, as the canaries found it."""

    active: bool
    required: bool
    """Whether the level in force needs it."""
    detail: str
    fix: str
    """How to get it, where it is missing."""


class IsolationReport(_Wire):
    """Which layers isolate a program, as tested at start."""

    level: str
    requested: str
    layers: dict[str, LayerReport]
    canaries_passed: int
    canaries: int
    kernel: str
    checked_at: str
