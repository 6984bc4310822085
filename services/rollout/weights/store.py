"""Weight updates in two phases: prepare stages and verifies, commit swaps.

    prepare: link -> read names, shapes, dtypes -> merge with the tensors left out -> compare the
             digest.                                             The old version keeps serving.
    commit:  pause -> load -> reset the prefix cache -> stamp -> resume.  On failure: load the old.

A learner that dies before, between or during these calls leaves the old version serving. While the
engine sleeps an update can be prepared but not committed.
"""

import asyncio
import logging
import time

from services.rollout import metrics
from services.rollout.engines.protocol import Engine, LoadPlan
from services.rollout.weights.serving import ServingState, WeightsError
from services.rollout.weights.staging import ServedModel, Staged, Staging, Tensors, load_plan
from services.rollout.weights.versions import Version, VersionLog
from services.rollout.wire.schemas import (
    CommitRequest,
    CommitResponse,
    PrepareRequest,
    TensorSpec,
    WeightsStatus,
)

logger = logging.getLogger(__name__)


class WeightStore:
    """The serving weights, the staged update, and the only way from one to the other."""

    def __init__(
        self, engine: Engine, versions: VersionLog, model: ServedModel, staging: Staging
    ) -> None:
        self.state = ServingState()
        self._engine = engine
        self._versions = versions
        self._model = model
        self._staging = staging
        self._serving: Tensors = model.tensors
        self._staged: Staged | None = None
        self._commit_task: asyncio.Task[CommitResponse] | None = None

    def status(self) -> WeightsStatus:
        """The serving version, what is staged, and what an update must carry."""
        current = self._versions.current
        staged = self._staged
        return WeightsStatus(
            version=current.number,
            digest=current.digest,
            state=self.state.name,
            staged_version=staged.version.number if staged else None,
            staged_digest=staged.version.digest if staged else None,
            detail=self.state.detail,
            tensors={
                name: TensorSpec(shape=list(shape), dtype=dtype, digest=self._serving[name].digest)
                for name, (shape, dtype) in self._model.expected().items()
            },
        )

    def serving_plan(self) -> LoadPlan:
        """Where the serving weights are on disk."""
        return load_plan(self._serving)

    async def prepare(self, request: PrepareRequest) -> WeightsStatus:
        """Stage an update and verify its digest. Repeating a successful call changes nothing.

        Raises:
            WeightsError: the version is out of order, or as `Staging.stage`.
        """
        version = Version(number=request.version, digest=request.digest)
        async with self.state.exclusive():
            known = [self._versions.current, self._staged.version if self._staged else None]
            # After a failed roll-back the engine may hold neither, so nothing counts as done.
            if version not in known or self.state.name == "failed":
                self._check_order(request)
                self._drop_staged()
                self._staged = await asyncio.to_thread(self._staging.stage, request, self._serving)
            return self.status()

    async def abort(self) -> WeightsStatus:
        """Forget the staged update, if any, and what was uploaded for it."""
        async with self.state.exclusive():
            self._drop_staged()
            self._staging.drop(self._staging.uploads_dir)
            return self.status()

    async def commit(self, request: CommitRequest) -> CommitResponse:
        """Serve the staged update.

        Raises:
            WeightsError: `not_prepared`, `must_be_awake`, or `weight_update_failed` when the
                engine did not take it; `status` then says what is serving.
        """
        # Shielded: when the learner disconnects in mid-swap the engine is still swapped to the end
        # and resumed.
        self._commit_task = asyncio.create_task(self._commit(request))
        return await asyncio.shield(self._commit_task)

    async def close(self) -> None:
        """Let a running commit end, then remove what was staged."""
        if self._commit_task is not None and not self._commit_task.done():
            await asyncio.wait([self._commit_task])
        self._staging.close()

    def _check_order(self, request: PrepareRequest) -> None:
        current = self._versions.current
        if request.version <= current.number:
            raise WeightsError(
                "stale_version",
                f"Version {request.version} is not above the serving version {current.number}.",
                next_version=current.number + 1,
            )
        if request.base_version is None:
            return
        if self.state.name == "failed":
            message = "The last update failed half-way, so there is no base to build on."
            raise WeightsError("full_update_required", message)
        if request.base_version != current.number:
            message = f"base_version {request.base_version} is not the serving {current.number}."
            raise WeightsError("base_version_mismatch", message)

    async def _commit(self, request: CommitRequest) -> CommitResponse:
        wanted = Version(number=request.version, digest=request.digest)
        async with self.state.exclusive():
            # A repeated commit, whose first reply the learner did not get.
            if wanted == self._versions.current and self.state.name == "serving":
                return _response(wanted)
            self.state.require_awake()
            staged = self._staged
            if staged is None or staged.version != wanted:
                message = f"Version {wanted.number} with this digest has not been prepared."
                raise WeightsError("not_prepared", message)
            return await self._swap(staged, request)

    async def _swap(self, staged: Staged, request: CommitRequest) -> CommitResponse:
        before, self.state.name = self.state.name, "committing"
        started_s = time.perf_counter()
        try:
            # A pause that waits for running requests ends only when the longest of them does.
            async with asyncio.timeout(request.timeout_s):
                await self._engine.pause(request.pause)
        except Exception as error:
            # Nothing was loaded yet, so the state is what it was; a half-made pause is undone.
            self.state.name = before
            await self._engine.resume()
            raise self._failure("The engine did not pause for", staged) from error
        paused_s = time.perf_counter()
        try:
            async with asyncio.timeout(request.timeout_s):
                await self._engine.load_weights(load_plan(staged.tensors))
                # After the load: a prefix computed by the old weights must not serve the new.
                await self._engine.reset_cache(recompute_running=request.recompute_running)
        except Exception as error:
            logger.exception("weight load failed", extra={"version": staged.version.number})
            await self._roll_back()
            raise self._failure("The engine did not take", staged) from error
        loaded_s = time.perf_counter()
        # Between load and resume: the token counts of running jobs are exact only while the
        # engine is paused, and the next token must already belong to the new version.
        self._versions.advance(staged.version, self._engine.num_tokens)
        await self._engine.resume()
        self._serving, self._staged = staged.tensors, None
        self.state.serve()
        # Last: a roll-back above would have read the files of the old version.
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
        """Load the version that was serving again; if that fails too, stop serving."""
        try:
            await self._engine.load_weights(self.serving_plan())
            # Whatever the update asked for: some cached keys may come from half-loaded weights.
            await self._engine.reset_cache(recompute_running=True)
            await self._engine.resume()
            self.state.serve()
        except Exception:
            logger.exception("roll-back failed")
            # The engine stays paused, so no token is drawn from weights that nobody can name.
            self.state.fail(
                "An update failed half-way and the old weights could not be loaded again. "
                "Prepare and commit a full update, or restart the service."
            )

    def _failure(self, cause: str, staged: Staged) -> WeightsError:
        metrics.WEIGHT_UPDATES.labels("failed").inc()
        outcome = self.state.detail or "The version that was serving continues to serve."
        message = f"{cause} version {staged.version.number}. {outcome}"
        return WeightsError("weight_update_failed", message)

    def _drop_staged(self) -> None:
        if self._staged is not None:
            self._staging.drop(self._staged.folder)
            self._staged = None


def _response(
    version: Version, *, pause_s: float = 0.0, load_s: float = 0.0, total_s: float = 0.0
) -> CommitResponse:
    return CommitResponse(
        version=version.number,
        digest=version.digest,
        pause_s=pause_s,
        load_s=load_s,
        total_s=total_s,
    )
