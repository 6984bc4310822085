"""Typed settings of the tool service; every one is a flag of `python -m services.tool`."""

import os
from dataclasses import dataclass, field

from services.tool.sandbox.host.pool import SandboxConfig
from services.tool.sandbox.plan import Level


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the operator decides. Raises ValueError with cause and fix when values contradict."""

    isolation: Level | None = None
    """Level to use; None takes the strongest that works here."""
    min_isolation: Level = Level.BASIC
    """Refuse to start below this level."""
    slots: int = field(default_factory=usable_cores)
    """Executions at a time. One per core keeps verdicts independent of load."""
    max_queue: int = 512
    """Executions that may wait for a slot."""
    max_wait_s: float = 30.0
    """Longest wait for a slot, when the caller names no deadline."""
    default_timeout_s: float = 10.0
    max_timeout_s: float = 120.0
    default_memory_mb: int = 512
    max_memory_mb: int = 4096
    default_output_bytes: int = 1 << 20
    max_output_bytes: int = 8 << 20
    max_code_bytes: int = 1 << 20
    max_body_bytes: int = 16 << 20
    max_file_bytes: int = 8 << 20
    """All files of one request, or one file of a session."""
    max_sessions: int = 64
    session_ttl_s: float = 600.0
    """A session idle for this long is ended."""
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise ValueError(f"slots is {self.slots}, at least 1 is required (--slots)")
        if self.default_timeout_s > self.max_timeout_s:
            raise ValueError(
                f"the default timeout {self.default_timeout_s} s is above the largest allowed "
                f"{self.max_timeout_s} s: raise --max-timeout-s"
            )
        if self.max_file_bytes * 2 > self.max_body_bytes:
            raise ValueError(
                f"files of {self.max_file_bytes} bytes do not fit a body of {self.max_body_bytes} "
                "bytes in base64: raise --max-body-bytes to twice --max-file-bytes"
            )
