"""The `--tool.*` and `--tir.*` flags: episodes that call a Python interpreter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from openrlhf_alp.episodes.tool_integrated import ToolIntegratedConfig
from openrlhf_alp.episodes.void import VoidPolicy

_TIR = {"prefix": "tir"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolConfig:
    """Where code runs, and the limits of an episode. The key comes from the environment."""

    urls: tuple[str, ...] = field(default=(), metadata={"name": "service_urls", "metavar": "URL"})
    """Tool services (python -m services.tool): episodes become tool-integrated, code that the
    policy writes in ```python blocks runs there. The key comes from $OPENRLHF_ALP_TOOL_API_KEY."""
    session: bool = False
    """Keep one interpreter with its state for a whole episode instead of a new one per program."""
    timeout_s: float = 5.0
    """Time limit of one program, in seconds."""
    request_timeout_s: float = 120.0
    """Longest wait for one program's result in seconds, queueing and retries included."""
    max_tool_turns: int = field(default=5, metadata=_TIR)
    """Most programs that an episode may run."""
    max_tokens_per_turn: int | None = field(default=None, metadata={**_TIR, "metavar": "N"})
    """Most sampled tokens of one turn; default: what is left of --rollout.max_new_tokens, the
    budget of the whole episode after its prompt."""
    max_output_chars: int = field(default=512, metadata=_TIR)
    """Characters that are kept of each output stream of a program."""
    void: VoidPolicy = field(default="trajectory", metadata=_TIR)
    """What a turn with neither code nor \\boxed{} answer removes from the loss: its whole episode
    (trajectory), itself (turn), or nothing (off)."""
    void_baseline: Literal["keep", "drop"] = field(default="keep", metadata=_TIR)
    """Whether a void episode's reward counts in its group's baseline."""
    template: Literal["auto", "chat", "plain"] = field(default="auto", metadata=_TIR)
    """Show a program's output as a user message of the chat template or as a plain fence; auto is
    chat with --data.apply_chat_template."""

    def __post_init__(self) -> None:
        # Clients join the path of a route to it.
        object.__setattr__(self, "urls", tuple(url.rstrip("/") for url in self.urls))
        self.limits(max_tokens=1)
        for flag, seconds in (
            ("--tool.timeout_s", self.timeout_s),
            ("--tool.request_timeout_s", self.request_timeout_s),
        ):
            if seconds <= 0:
                raise ValueError(f"{flag} is {seconds}; it must be above 0")

    def limits(self, *, max_tokens: int) -> ToolIntegratedConfig:
        """The limits of an episode that has `max_tokens` after its prompt.

        Raises:
            ValueError: a limit is out of range.
        """
        return ToolIntegratedConfig(
            max_tokens=max_tokens,
            max_tokens_per_turn=self.max_tokens_per_turn,
            max_tool_turns=self.max_tool_turns,
            max_output_chars=self.max_output_chars,
        )
