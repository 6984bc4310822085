"""Whether the weights in the engine may be used now, and sleep and wake-up.

serving -- commit --> committing -- loaded, or rolled back --> serving
                          `-- roll-back failed --> failed -- a full update --> serving
serving -- sleep --> sleeping -- wake_up --> serving
"""

import asyncio
import logging
from collections.abc import Callable

from services.rollout.engines.protocol import Engine, LoadPlan, NoSleepModeError
from services.rollout.errors import RolloutError
from services.rollout.wire.schemas import SleepLevel, SleepRequest, WeightState

logger = logging.getLogger(__name__)


class WeightsError(RolloutError):
    """A weight update, an upload or a switch of state is refused, or failed."""


class ServingState:
    """The state in the drawing above, and the lock of every call that may change it."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self.name: WeightState = "serving"
        self.detail: str | None = None
        """Why the state is failed, and what to do."""

    def serve(self) -> None:
        """The engine holds one whole version."""
        self.name, self.detail = "serving", None

    def fail(self, detail: str) -> None:
        """Nobody knows what the engine holds."""
        self.name, self.detail = "failed", detail

    def exclusive(self) -> asyncio.Lock:
        """The lock, free at this moment. A second update is refused instead of queued, because
        the first may change what the second would have to contain.

        Raises:
            WeightsError: `update_in_progress`.
        """
        if self._lock.locked():
            message = "Another weight update call is still running."
            raise WeightsError("update_in_progress", message)
        return self._lock

    def require_serving(self) -> None:
        """Refuse to draw while the engine sleeps, or after a failed update.

        Raises:
            WeightsError: `sleeping` or `weights_failed`.
        """
        if self.name == "sleeping":
            raise WeightsError("sleeping", "This server sleeps.")
        if self.name == "failed":
            raise WeightsError("weights_failed", str(self.detail))

    def require_awake(self) -> None:
        """Refuse a call that would use weights which are not in memory.

        Raises:
            WeightsError: `must_be_awake`.
        """
        if self.name == "sleeping":
            message = "This server sleeps: its weights are not in memory."
            raise WeightsError("must_be_awake", message)


class SleepSwitch:
    """Puts the engine to sleep and wakes it up.

    Args:
        engine: what sleeps.
        state: set to sleeping and back.
        serving_plan: where the serving weights are on disk, for a wake-up after level 2.
    """

    def __init__(
        self, engine: Engine, state: ServingState, serving_plan: Callable[[], LoadPlan]
    ) -> None:
        self._engine = engine
        self._state = state
        self._serving_plan = serving_plan
        self._level: SleepLevel = 1

    async def sleep(self, request: SleepRequest) -> None:
        """Free the engine's memory. Repeating the call changes nothing.

        Raises:
            WeightsError: `no_sleep_mode`, or `weights_failed` when there is no version to wake to.
        """
        async with self._state.exclusive():
            if self._state.name == "sleeping":
                return
            self._state.require_serving()
            # Before the engine is asked: a request that arrives meanwhile is refused, not queued
            # in an engine that is about to lose its memory.
            self._state.name, self._level = "sleeping", request.level
            try:
                await self._engine.sleep(request.level, request.mode)
            except NoSleepModeError as error:
                self._state.serve()
                raise WeightsError(
                    "no_sleep_mode", f"This server cannot sleep: {error}."
                ) from error

    async def wake_up(self) -> None:
        """Serve again the version that was serving. A server that is awake stays as it is.

        Raises:
            WeightsError: `wake_up_failed`; nothing is served any more.
        """
        async with self._state.exclusive():
            if self._state.name != "sleeping":
                return
            try:
                # Level 1 kept the weights in host memory; reading them again would be slower.
                await self._engine.wake_up(self._serving_plan() if self._level == 2 else None)
            except Exception as error:
                logger.exception("wake-up failed")
                message = "The engine did not wake up."
                self._state.fail(message)
                raise WeightsError("wake_up_failed", message) from error
            self._state.serve()
