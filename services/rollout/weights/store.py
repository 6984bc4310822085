"""Weight updates in two phases: prepare stages and proves, commit swaps, and nothing else can.

    prepare: link -> read names, shapes, dtypes -> merge with the tensors left out -> compare the
             digest.                                              The old version goes on serving.
    commit:  pause -> load -> reset the prefix cache -> stamp -> resume.  On failure: load the old.

Between sleep and wake_up an update can be prepared but not committed.

A learner that dies between or during these leaves the old version serving.
"""

import asyncio
import logging
import time

from services.common.errors import ApiError
from services.rollout import metrics
from services.rollout.engines.protocol import Engine, NoSleepModeError
from services.rollout.weights.staging import ServedModel, Staged, Staging, Tensors, load_plan
from services.rollout.weights.versions import Version, VersionLog
from services.rollout.wire.schemas import (
    CommitRequest,
    CommitResponse,
    PrepareRequest,
    SleepLevel,
    SleepRequest,
    TensorSpec,
    WeightsStatus,
    WeightState,
)

logger = logging.getLogger(__name__)


class WeightStore:
    """The serving weights, the staged update, and the only way from one to the other."""

    def __init__(
        self, engine: Engine, versions: VersionLog, model: ServedModel, staging: Staging
    ) -> None:
        self._engine = engine
        self._versions = versions
        self._model = model
        self._staging = staging
        self._serving: Tensors = model.tensors
        self._staged: Staged | None = None
        self._state: WeightState = "serving"
        self._detail: str | None = None
        self._sleep_level: SleepLevel = 1
        self._lock = asyncio.Lock()
        self._commit_task: asyncio.Task[CommitResponse] | None = None

    @property
    def state(self) -> WeightState:
        return self._state

    @property
    def detail(self) -> str | None:
        """Why the state is failed, and what to do."""
        return self._detail

    def status(self) -> WeightsStatus:
        """The serving version, what is staged, and what an update must carry."""
        current = self._versions.current
        staged = self._staged
        return WeightsStatus(
            version=current.number,
            digest=current.digest,
            state=self._state,
            staged_version=staged.version.number if staged else None,
            staged_digest=staged.version.digest if staged else None,
            detail=self._detail,
            tensors={
                name: TensorSpec(shape=list(shape), dtype=dtype, digest=self._serving[name].digest)
                for name, (shape, dtype) in self._model.expected().items()
            },
        )

    async def prepare(self, request: PrepareRequest) -> WeightsStatus:
        """Stage an update and prove it. Repeating a successful call changes nothing."""
        version = Version(number=request.version, digest=request.digest)
        async with self._exclusive():
            known = [self._versions.current, self._staged.version if self._staged else None]
            if version not in known or self._state == "failed":
                self._check_order(request)
                self._drop_staged()
                self._staged = await asyncio.to_thread(self._staging.stage, request, self._serving)
            return self.status()

    async def abort(self) -> WeightsStatus:
        """Forget the staged update, if any, and what was uploaded for it."""
        async with self._exclusive():
            self._drop_staged()
            self._staging.drop(self._staging.uploads_dir)
            return self.status()

    async def commit(self, request: CommitRequest) -> CommitResponse:
        """Serve the staged update. Runs to its end even when the caller goes away."""
        self._commit_task = asyncio.create_task(self._commit(request))
        return await asyncio.shield(self._commit_task)

    async def sleep(self, request: SleepRequest) -> None:
        """Free the engine's memory. Repeating it changes nothing.

        Raises:
            ApiError: 501 when the engine cannot sleep, 503 when its weights are unknown.
        """
        async with self._exclusive():
            if self._state == "sleeping":
                return
            self.require_serving()
            self._state, self._sleep_level = "sleeping", request.level
            try:
                await self._engine.sleep(request.level, request.mode)
            except NoSleepModeError as error:
                self._state = "serving"
                raise ApiError(
                    501,
                    "no_sleep_mode",
                    f"This server cannot sleep: {error}.",
                    fix="Start it on a GPU with --sleep-mode, or use /v1/pause.",
                ) from error

    async def wake_up(self) -> None:
        """Serve the version that was serving again. A server that is awake stays as it is.

        Raises:
            ApiError: 503 when the engine does not come back; nothing is served any more.
        """
        async with self._exclusive():
            if self._state != "sleeping":
                return
            try:
                dropped = self._sleep_level == 2
                await self._engine.wake_up(load_plan(self._serving) if dropped else None)
            except Exception as error:
                logger.exception("wake-up failed")
                self._state, self._detail = "failed", "The engine did not wake up."
                raise ApiError(
                    503, "wake_up_failed", self._detail, fix="Restart this service; see its log."
                ) from error
            self._state = "serving"

    def require_serving(self) -> None:
        """Refuse work while the engine sleeps, or a failed update has left its weights unknown.

        Raises:
            ApiError: 503.
        """
        if self._state == "sleeping":
            raise ApiError(
                503,
                "sleeping",
                "This server sleeps.",
                fix="Use another server, or POST /v1/wake_up with the admin key.",
                headers={"Retry-After": "1"},
            )
        if self._state == "failed":
            raise ApiError(
                503,
                "weights_failed",
                str(self._detail),
                fix="Use another server until this one has had a full update.",
            )

    def require_awake(self) -> None:
        """Refuse what a sleeping engine would not survive.

        Raises:
            ApiError: 409.
        """
        if self._state == "sleeping":
            raise ApiError(
                409,
                "sleeping",
                "This server sleeps: its weights are not in memory.",
                fix="POST /v1/wake_up first.",
            )

    async def close(self) -> None:
        """Let a running commit end, then remove what was staged."""
        if self._commit_task is not None and not self._commit_task.done():
            await asyncio.wait([self._commit_task])
        self._staging.close()

    def _exclusive(self) -> asyncio.Lock:
        if self._lock.locked():
            raise ApiError(
                409,
                "update_in_progress",
                "Another weight update call is still running.",
                fix="Wait for it to return; GET /v1/weights shows the state.",
                headers={"Retry-After": "1"},
            )
        return self._lock

    def _check_order(self, request: PrepareRequest) -> None:
        current = self._versions.current
        if request.version <= current.number:
            raise ApiError(
                409,
                "stale_version",
                f"Version {request.version} is not above the serving version {current.number}.",
                fix=f"Use version {current.number + 1} or more; GET /v1/weights tells it.",
                field="version",
            )
        if request.base_version is None:
            return
        if self._state == "failed":
            raise ApiError(
                409,
                "full_update_required",
                "The last update failed half-way, so there is no base to build on.",
                fix="Send every tensor and leave base_version out.",
                field="base_version",
            )
        if request.base_version != current.number:
            raise ApiError(
                409,
                "base_version_mismatch",
                f"base_version {request.base_version} is not the serving {current.number}.",
                fix="Send every tensor, or the changes against the serving version.",
                field="base_version",
            )

    async def _commit(self, request: CommitRequest) -> CommitResponse:
        wanted = Version(number=request.version, digest=request.digest)
        async with self._exclusive():
            if wanted == self._versions.current and self._state == "serving":
                return _response(wanted, pause_s=0.0, load_s=0.0, total_s=0.0)
            self.require_awake()
            staged = self._staged
            if staged is None or staged.version != wanted:
                raise ApiError(
                    409,
                    "not_prepared",
                    f"Version {wanted.number} with this digest has not been prepared.",
                    fix="Call /v1/weights/prepare first and commit exactly what it staged.",
                    field="version",
                )
            return await self._swap(staged, request)

    async def _swap(self, staged: Staged, request: CommitRequest) -> CommitResponse:
        before, self._state = self._state, "committing"
        started_s = time.perf_counter()
        try:
            async with asyncio.timeout(request.timeout_s):
                await self._engine.pause(request.pause)
        except Exception as error:
            self._state = before
            await self._engine.resume()
            raise self._failure("The engine did not pause for", staged) from error
        paused_s = time.perf_counter()
        try:
            async with asyncio.timeout(request.timeout_s):
                await self._engine.load_weights(load_plan(staged.tensors))
                await self._engine.reset_cache(recompute_running=request.recompute_running)
        except Exception as error:
            logger.exception("weight load failed", extra={"version": staged.version.number})
            await self._roll_back()
            raise self._failure("The engine did not take", staged) from error
        loaded_s = time.perf_counter()
        self._versions.advance(staged.version, self._engine.num_tokens)
        await self._engine.resume()
        self._serving, self._staged = staged.tensors, None
        self._state, self._detail = "serving", None
        self._staging.keep_only(self._serving)
        response = _response(
            staged.version,
            pause_s=paused_s - started_s,
            load_s=loaded_s - paused_s,
            total_s=time.perf_counter() - started_s,
        )
        metrics.WEIGHT_UPDATES.labels("ok").inc()
        metrics.WEIGHT_VERSION.set(staged.version.number)
        metrics.WEIGHT_PAUSE_SECONDS.observe(response.total_s)
        logger.info("weights committed", extra=response.model_dump())
        return response

    async def _roll_back(self) -> None:
        """Load the version that was serving again; without success nothing is served any more."""
        try:
            await self._engine.load_weights(load_plan(self._serving))
            await self._engine.reset_cache(recompute_running=True)
            await self._engine.resume()
            self._state, self._detail = "serving", None
        except Exception:
            logger.exception("roll-back failed")
            self._state = "failed"
            self._detail = (
                "An update failed half-way and the old weights could not be loaded again. "
                "Prepare and commit a full update, or restart the service."
            )

    def _failure(self, cause: str, staged: Staged) -> ApiError:
        metrics.WEIGHT_UPDATES.labels("failed").inc()
        outcome = self._detail or "The version that was serving goes on."
        return ApiError(
            503,
            "weight_update_failed",
            f"{cause} version {staged.version.number}. {outcome}",
            fix="See GET /v1/weights for the state, then prepare and commit again.",
        )

    def _drop_staged(self) -> None:
        if self._staged is not None:
            self._staging.drop(self._staged.folder)
            self._staged = None


def _response(version: Version, *, pause_s: float, load_s: float, total_s: float) -> CommitResponse:
    return CommitResponse(
        version=version.number,
        digest=version.digest,
        pause_s=pause_s,
        load_s=load_s,
        total_s=total_s,
    )
