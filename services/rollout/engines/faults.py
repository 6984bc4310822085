"""Faults that the deterministic engine commits on purpose, so that what follows can be rehearsed.

Tokens are counted over all jobs, from the start of the engine. Faults of the network (a refused or
lost connection, a status, a body cut short) belong between client and service, not here.
"""

from pydantic import BaseModel, ConfigDict, Field


class FaultPlan(BaseModel):
    """What goes wrong in the engine, and when. The default: nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    kill_after_tokens: int | None = Field(default=None, ge=1)
    """The engine dies when it has drawn this many tokens, with all its jobs half done."""

    nan_at_token: int | None = Field(default=None, ge=1)
    """The log-prob of this token is NaN; 1 is the first ever drawn."""

    step_s: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    """Seconds of idling after each step of one token per job."""
