"""One request in, n samples out, each stamped with the weight versions that drew it."""

import asyncio
import contextlib
import itertools
import math
import time
from collections.abc import AsyncIterator, Callable
from functools import partial

from services.rollout import metrics
from services.rollout.engines.protocol import BadJobError, Engine, EngineDeadError, EngineInfo, Job
from services.rollout.errors import RolloutError
from services.rollout.weights.versions import VersionLog
from services.rollout.wire.schemas import (
    MIN_SAMPLED_TEMPERATURE,
    GenerateRequest,
    GenerateResponse,
    Sample,
    Timings,
)

SampleSink = Callable[[int, list[int], list[float]], None]
"""Receives (sample index, new token ids, their log-probs) as they are drawn."""

_LOOK_EVERY_S = 1.0
"""How late the start of `work_limit_s` may be noticed."""


class GenerateError(RolloutError):
    """A request that this engine cannot run, or a run that failed."""


def check_request(request: GenerateRequest, info: EngineInfo) -> None:
    """Refuse what this engine could never run.

    Raises:
        GenerateError: the code says which rule is broken, and the table which field breaks it.
    """
    sampling, prompt_length = request.sampling, len(request.token_ids)
    if prompt_length >= info.max_model_len:
        raise GenerateError(
            "prompt_too_long",
            f"The prompt has {prompt_length} tokens; the model takes {info.max_model_len} with at "
            "least one to sample.",
        )
    room = info.max_model_len - prompt_length
    if sampling.max_tokens > room:
        raise GenerateError(
            "max_tokens_too_large",
            f"max_tokens is {sampling.max_tokens}; a prompt of {prompt_length} tokens leaves room "
            f"for {room} in a model of {info.max_model_len}.",
        )
    limit = f"not below the vocabulary size {info.vocab_size}."
    largest = max(request.token_ids)
    if largest >= info.vocab_size:
        message = f"Token id {largest} is {limit}"
        raise GenerateError("token_out_of_range", message, field="token_ids")
    if any(token >= info.vocab_size for token in sampling.stop_token_ids):
        message, field = f"A stop token id is {limit}", "sampling.stop_token_ids"
        raise GenerateError("token_out_of_range", message, field=field)
    if 0.0 < sampling.temperature < MIN_SAMPLED_TEMPERATURE:
        raise GenerateError(
            "temperature_too_low",
            f"The engine would replace a temperature between 0 and {MIN_SAMPLED_TEMPERATURE} by "
            "another one.",
        )
    if sampling.min_tokens > sampling.max_tokens:
        raise GenerateError(
            "min_above_max",
            f"min_tokens {sampling.min_tokens} is above max_tokens {sampling.max_tokens}.",
        )


class Generator:
    """Runs requests on the engine and stamps each sample with the versions that drew it."""

    def __init__(self, engine: Engine, versions: VersionLog, contract_hash: str) -> None:
        self._engine = engine
        self._versions = versions
        self._contract_hash = contract_hash
        self._serials = itertools.count()

    async def run(
        self,
        request: GenerateRequest,
        deadline_s: float | None = None,
        on_tokens: SampleSink | None = None,
    ) -> GenerateResponse:
        """Draw all samples of a request. Cancelling the call frees every slot that it holds.

        Args:
            request: what to draw.
            deadline_s: seconds from now; the tighter of this and the request's own applies.
            on_tokens: called with the tokens of each sample as they are drawn.

        Raises:
            GenerateError: `refused_by_engine`, `engine_dead`, `deadline_exceeded`, or
                `invalid_logprobs` when the engine returned a log-prob that is not a finite number.
        """
        limits_s = [limit for limit in (deadline_s, request.deadline_s) if limit is not None]
        started_s = time.perf_counter()
        outcome = "cancelled"
        try:
            samples = await self._within(min(limits_s, default=None), request, on_tokens)
            outcome = "ok"
        except GenerateError as error:
            outcome = error.code
            raise
        finally:
            elapsed_s = time.perf_counter() - started_s
            metrics.REQUESTS.labels(outcome).inc()
            metrics.GENERATE_SECONDS.observe(elapsed_s)
        metrics.SAMPLED_TOKENS.inc(sum(len(sample.token_ids) for sample in samples))
        return GenerateResponse(
            request_id=request.request_id,
            samples=samples,
            contract_hash=self._contract_hash,
            version=self._versions.current.number,
            timings=Timings(total_s=elapsed_s),
        )

    async def _within(
        self, limit_s: float | None, request: GenerateRequest, on_tokens: SampleSink | None
    ) -> list[Sample]:
        # A request id is used again when a failed run is retried; a job id never is.
        serial = next(self._serials)
        job_ids = [f"{request.request_id}:{serial}:{index}" for index in range(request.n)]
        started_s = time.monotonic()
        try:
            async with asyncio.timeout(limit_s) as limit, self._work_limit(request, job_ids, limit):
                return await self._draw(request, job_ids, on_tokens)
        except TimeoutError as error:
            message = (
                f"The request was not done after {time.monotonic() - started_s:.3g} s (deadline_s "
                f"{limit_s}, work_limit_s {request.work_limit_s})."
            )
            raise GenerateError("deadline_exceeded", message) from error

    @contextlib.asynccontextmanager
    async def _work_limit(
        self, request: GenerateRequest, job_ids: list[str], limit: asyncio.Timeout
    ) -> AsyncIterator[None]:
        """Lower `limit` to `work_limit_s` once the engine draws tokens for one of the jobs."""
        work_s = request.work_limit_s
        if work_s is None:
            yield
            return

        async def lower() -> None:
            # Engines tell a caller of each token only at a cost, but can always be asked.
            while not any(self._engine.num_tokens(job_id) for job_id in job_ids):
                await asyncio.sleep(min(_LOOK_EVERY_S, work_s / 20))
            due_s = asyncio.get_running_loop().time() + work_s
            limit.reschedule(min(due_s, limit.when() or due_s))

        watch = asyncio.create_task(lower())
        try:
            yield
        finally:
            watch.cancel()

    async def _draw(
        self, request: GenerateRequest, job_ids: list[str], on_tokens: SampleSink | None
    ) -> list[Sample]:
        """All samples concurrently; the first failure cancels the others."""
        if request.n == 1:  # the usual case, without the cost of a task
            return [await self._sample(request, job_ids[0], 0, on_tokens)]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._sample(request, job_id, index, on_tokens))
                    for index, job_id in enumerate(job_ids)
                ]
        except ExceptionGroup as failures:
            # The samples of one request fail for the same reason, so the first says enough.
            raise failures.exceptions[0] from failures
        return [task.result() for task in tasks]

    async def _sample(
        self, request: GenerateRequest, job_id: str, index: int, on_tokens: SampleSink | None
    ) -> Sample:
        job = Job(
            job_id=job_id,
            token_ids=request.token_ids,
            sampling=request.sampling,
            index=index,
            # A version number is never reused, so no prefix cached by older weights is ever hit.
            cache_salt=str(self._versions.current.number),
        )
        self._versions.begin(job_id)
        total = 0
        try:
            sink = None if on_tokens is None else partial(on_tokens, index)
            result = await self._engine.sample(job, sink)
            total = len(result.token_ids)
        except BadJobError as error:
            message = f"The engine refuses this request: {error}"
            raise GenerateError("refused_by_engine", message) from error
        except EngineDeadError as error:
            message = "The engine behind this service is dead."
            raise GenerateError("engine_dead", message) from error
        finally:
            # Also after a failure or a cancellation: a job that is never ended would be followed
            # by every later update.
            spans = self._versions.end(job_id, total)
        # The sum is NaN or infinite if any term is, and costs less than a test of each.
        if len(result.logprobs) != total or not math.isfinite(sum(result.logprobs)):
            raise GenerateError(
                "invalid_logprobs",
                "The engine returned a log-probability that is missing or not a finite number.",
            )
        return Sample(
            token_ids=result.token_ids,
            logprobs=result.logprobs,
            finish_reason=result.finish_reason,
            stop_reason=result.stop_reason,
            spans=spans,
        )
