"""What the service needs from an engine; vllm_engine.py and hf_engine.py implement it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fastapi import FastAPI

from services.rollout.errors import RolloutError
from services.rollout.wire.schemas import (
    FinishReason,
    LinkBackend,
    PauseMode,
    Sampling,
    SleepLevel,
    SleepMode,
)
from services.rollout.wire.transfer import OpenRequest, ReceiveRequest

LoadPlan = Mapping[Path, Sequence[str]]
"""safetensors file -> names of the tensors to take from it; together the whole model."""

TokenSink = Callable[[list[int], list[float]], None]
"""Receives newly drawn token ids and their log-probs, in order, as they are drawn."""

LOGPROBS_MODE = "processed_logprobs"

Hold = Callable[[int], AbstractContextManager[None]]
"""Admits a number of samples for as long as it is entered; raises LedgerError if there is no room.
"""


class EngineDeadError(RuntimeError):
    """The engine will never answer again; the process has to be restarted."""


class NoSleepModeError(RuntimeError):
    """This engine cannot sleep as it was started; the message says why and what to do."""


class BadJobError(ValueError):
    """The engine refuses this job whatever its state; the message says why."""


class TransferError(RolloutError):
    """No link to the learner could be opened, or weights did not arrive over it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """Facts that do not change while the engine runs."""

    engine: str
    engine_version: str
    architecture: str
    dtype: str  # bfloat16, float16 or float32
    vocab_size: int  # ids below this may be sent
    max_model_len: int  # prompt plus sampled tokens
    eos_token_ids: tuple[int, ...]
    link_backends: tuple[LinkBackend, ...] = ()  # over which weights can be received
    num_workers: int = 1  # GPUs, each with its own rank in a transfer


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One sample to draw."""

    job_id: str  # unique among all jobs ever given to this engine
    token_ids: list[int]
    sampling: Sampling
    index: int  # which of the request's n samples; added to the seed
    cache_salt: str  # jobs share cached prefixes only within one salt


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """One drawn sample. token_ids and logprobs have the same length."""

    token_ids: list[int]
    logprobs: list[float]  # float32 values
    finish_reason: FinishReason
    stop_reason: int | str | None


class WeightReceiver(Protocol):
    """Receives weights from the learner's GPU without touching what is served.

    After a TransferError from any method no link is open. Never run on a GPU.
    """

    async def open(self, request: OpenRequest) -> None:
        """Leave the group joined before, if any, and join the learner's."""

    async def receive(self, request: ReceiveRequest, path: Path) -> None:
        """Take part in sending one bucket, and write it to `path` as a safetensors file."""

    async def close(self) -> None:
        """Leave the group, if any."""


class Engine(Protocol):
    """Draws samples and swaps weights. All methods are called from one event loop."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def receiver(self) -> WeightReceiver | None:
        """None: weights come as files only, and `info.link_backends` is empty."""

    async def sample(self, job: Job, on_tokens: TokenSink | None = None) -> JobResult:
        """Draw one sample. Cancelling the call frees the slot at once.

        Args:
            job: what to draw.
            on_tokens: called with new tokens as they are drawn; the result holds all of them too.

        Raises:
            BadJobError: the job can never run.
            EngineDeadError: the engine died.
        """

    def num_tokens(self, job_id: str) -> int | None:
        """Tokens drawn so far; exact while paused. None: the job has ended, all were drawn."""

    async def pause(self, mode: PauseMode) -> None:
        """Return when no token is being drawn and every drawn token is counted."""

    async def resume(self) -> None:
        """Draw again; jobs that were kept, or arrived while paused, continue."""

    async def is_paused(self) -> bool:
        """Whether jobs wait for `resume`."""

    async def sleep(self, level: SleepLevel, mode: SleepMode) -> None:
        """Free the cache's memory; level 1 moves the weights to host memory, level 2 drops them.

        Raises:
            NoSleepModeError: before anything changed.
        """

    async def wake_up(self, plan: LoadPlan | None) -> None:
        """Take the memory back, load `plan` into dropped weights, and draw again."""

    async def load_weights(self, plan: LoadPlan) -> None:
        """Load the whole model as `plan` says. The engine is paused."""

    async def reset_cache(self, *, recompute_running: bool) -> None:
        """Forget cached prefixes. Kept jobs rebuild theirs when `recompute_running`."""

    async def check(self) -> None:
        """Return when the engine answers; raise EngineDeadError when it is dead."""

    async def add_native_routes(self, app: FastAPI, keys: tuple[str, ...], hold: Hold) -> None:
        """Add the engine's own public routes to `app`, behind `keys`, if it has any; each holds
        room for its samples while they are drawn."""

    async def close(self) -> None:
        """End the engine and all its processes."""
