"""Settings of the tool service: flags win over OPENRLHF_ALP_TOOL_* variables."""

import os
from importlib.util import find_spec
from typing import Literal

from pydantic import Field, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from services.common.settings import ServiceSettings
from services.common.wire import TOOL_VARIABLES
from services.tool.sandbox.plan import PRESETS, USUAL_PRESETS, Level, SandboxConfig


class ToolSettings(ServiceSettings):
    """Untrusted Python in an OS sandbox, over REST, MCP and SandboxFusion's contract.

    levels of isolation, strongest first; at start each layer is tried with programs that must fail:
      full   needs user namespaces, root or not: own root directory, network, processes, tmpfs
      uid    needs root, no namespaces (Docker's default): a user id per program
      basic  needs nothing: resource limits, seccomp without fork, Landlock
    GET /v1/isolation says what was reached, what is missing and how to get it.

    Each flag is also an environment variable: OPENRLHF_ALP_TOOL_API_KEY and so on.
    """

    model_config = SettingsConfigDict(
        env_prefix=TOOL_VARIABLES, cli_prog_name="python -m services.tool"
    )

    port: int = Field(default=8090, ge=0, le=65535)
    """TCP port; 0 takes any free one and prints it."""
    open_loopback: bool = False
    """Require no key at all; only on a loopback address."""
    isolation: Literal["full", "uid", "basic"] | None = None
    """Level of isolation to use; the strongest that works when absent."""
    min_isolation: Literal["full", "uid", "basic"] = "basic"
    """Below this level, exit with 3 and a table of what is missing."""
    allow_insecure: bool = False
    """Run without any isolation."""
    presets: str = ",".join(USUAL_PRESETS)
    """Libraries that are loaded ahead: the first few of numpy,sympy,scipy,pandas,matplotlib.
    Programs import others themselves, which takes about a second for matplotlib."""
    launchers: int | None = Field(default=None, ge=1)
    """Fork servers; one per slot when absent."""
    warm_slots: int = Field(default=SandboxConfig().warm_slots, ge=1)
    """Slots kept ready per preset and launcher."""
    slots: int = Field(default=len(os.sched_getaffinity(0)), ge=1)
    """Executions at a time; one per usable core keeps time limits independent of load."""
    max_queue: int = 512
    """Executions that may wait for a slot."""
    max_wait_s: float = 30.0
    """Longest wait for a slot when the caller names no deadline."""
    run_code_wait_s: float = Field(default=3600.0, gt=0.0)
    """Longest wait for a slot on /run_code; blanks keep the client's connection alive meanwhile."""
    default_timeout_s: float = 10.0
    """Wall time when the caller names none."""
    max_timeout_s: float = 120.0
    """Largest wall time a caller may ask for."""
    default_memory_mb: int = 512
    """Memory when the caller names none."""
    max_memory_mb: int = 4096
    """Largest memory a caller may ask for."""
    default_output_bytes: int = 2**20
    """Stdout and stderr, each, when the caller names no limit."""
    max_output_bytes: int = 8 * 2**20
    """Largest output a caller may ask for."""
    max_code_bytes: int = 2**20
    """Largest program."""
    max_file_bytes: int = 8 * 2**20
    """Largest file of a session, and all files of one request."""
    keep_mb: float = Field(default=128.0, ge=0.0)
    """Memory of all kept answers, in MiB: half for steps of sessions, half for request ids."""
    keep_s: float = Field(default=900.0, ge=0.0)
    """Seconds that the answer to a request id is kept for a retry."""
    unsent_mb: float = Field(default=256.0, ge=1.0)
    """Memory of all answers of batches that their callers have not read yet, in MiB."""
    max_sessions: int = 64
    """Live sessions; one more ends the session that was idle longest."""
    session_ttl_s: float = 600.0
    """Idle seconds after which a session ends."""

    @field_validator("presets")
    @classmethod
    def _are_a_prefix(cls, presets: str) -> str:
        # Each zygote is forked from the one before, so a later preset needs the earlier ones.
        choices = [",".join(PRESETS[: count + 1]) for count in range(len(PRESETS))]
        if presets not in choices:
            raise ValueError(f"{presets} is none of {' '.join(choices)}")
        missing = [name for name in presets.split(",") if find_spec(name) is None]
        if missing:
            raise ValueError(
                f"{', '.join(missing)} cannot be loaded ahead: not installed. "
                "Fix: pip install 'openrlhf-alp[tool,figures]'"
            )
        return presets

    @model_validator(mode="after")
    def _fit_together(self) -> "ToolSettings":
        if self.default_timeout_s > self.max_timeout_s:
            raise ValueError(
                f"--default-timeout-s {self.default_timeout_s} is above the largest allowed "
                f"{self.max_timeout_s}: raise --max-timeout-s"
            )
        # Files travel as base64 inside of the body, which takes a third more than their bytes.
        if self.max_file_bytes * 2 > self.max_body_bytes:
            raise ValueError(
                f"files of {self.max_file_bytes} bytes do not fit a body of {self.max_body_bytes} "
                "bytes in base64: raise --max-body-bytes to twice --max-file-bytes"
            )
        return self

    @property
    def keep_bytes(self) -> int:
        """Memory of all kept answers."""
        return round(self.keep_mb * 2**20)

    @property
    def level(self) -> Level | None:
        """Level to use; None for the strongest that works."""
        if self.allow_insecure:
            return Level.NONE
        return None if self.isolation is None else Level(self.isolation)

    @property
    def min_level(self) -> Level:
        """Level below which the service does not start."""
        return Level.NONE if self.allow_insecure else Level(self.min_isolation)

    @property
    def sandbox(self) -> SandboxConfig:
        """How the sandbox is built, but for its level."""
        return SandboxConfig(
            presets=tuple(self.presets.split(",")),
            launchers=self.launchers or self.slots,
            warm_slots=self.warm_slots,
        )
