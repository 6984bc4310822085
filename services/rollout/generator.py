"""One request in, n stamped samples out."""

import asyncio
import itertools
import math
import time
from collections.abc import Callable
from functools import partial

from services.common.errors import ApiError
from services.rollout import metrics
from services.rollout.engines.protocol import BadJobError, Engine, EngineDeadError, EngineInfo, Job
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


def check_request(request: GenerateRequest, info: EngineInfo) -> None:
    """Refuse what this engine can never do, naming the field.

    Raises:
        ApiError: 422.
    """
    prompt_length = len(request.token_ids)
    if prompt_length >= info.max_model_len:
        raise _unprocessable(
            "prompt_too_long",
            f"The prompt has {prompt_length} tokens; the model takes {info.max_model_len} with at "
            "least one to sample.",
            "Shorten the prompt, or start the service with a larger --max-model-len.",
            "token_ids",
        )
    room = info.max_model_len - prompt_length
    if request.sampling.max_tokens > room:
        raise _unprocessable(
            "max_tokens_too_large",
            f"max_tokens is {request.sampling.max_tokens}; a prompt of {prompt_length} tokens "
            f"leaves room for {room} in a model of {info.max_model_len}.",
            "Ask for what fits: a sample cut short by the context would pass for a long answer.",
            "sampling.max_tokens",
        )
    largest = max(request.token_ids)
    if largest >= info.vocab_size:
        raise _unprocessable(
            "token_out_of_range",
            f"Token id {largest} is not below the vocabulary size {info.vocab_size}.",
            "Tokenise with the served model's tokenizer.",
            "token_ids",
        )
    sampling = request.sampling
    if any(token >= info.vocab_size for token in sampling.stop_token_ids):
        raise _unprocessable(
            "token_out_of_range",
            f"A stop token id is not below the vocabulary size {info.vocab_size}.",
            "Tokenise with the served model's tokenizer.",
            "sampling.stop_token_ids",
        )
    if 0.0 < sampling.temperature < MIN_SAMPLED_TEMPERATURE:
        raise _unprocessable(
            "temperature_too_low",
            f"A temperature between 0 and {MIN_SAMPLED_TEMPERATURE} would be bent by the engine.",
            f"Use 0 for greedy, or at least {MIN_SAMPLED_TEMPERATURE}.",
            "sampling.temperature",
        )
    if sampling.min_tokens > sampling.max_tokens:
        raise _unprocessable(
            "min_above_max",
            f"min_tokens {sampling.min_tokens} is above max_tokens {sampling.max_tokens}.",
            "Lower min_tokens or raise max_tokens.",
            "sampling.min_tokens",
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
        """Draw all samples of a request. Cancelling frees every slot it holds.

        Args:
            request: what to draw.
            deadline_s: seconds from now; the tighter of this and the request's own holds.
            on_tokens: told of (sample index, new ids, their log-probs) as they are drawn.

        Raises:
            ApiError: 422 for a request the engine refuses, 503 for a dead engine, 504 when the
                deadline passed, 500 when the engine returned a log-prob that is no number.
        """
        limits_s = [limit for limit in (deadline_s, request.deadline_s) if limit is not None]
        started_s = time.perf_counter()
        outcome = "cancelled"
        try:
            response = await self._run(request, min(limits_s, default=None), on_tokens)
            outcome = "ok"
        except ApiError as error:
            outcome = error.code
            raise
        finally:
            metrics.REQUESTS.labels(outcome).inc()
            metrics.GENERATE_SECONDS.observe(time.perf_counter() - started_s)
        metrics.SAMPLED_TOKENS.inc(sum(len(sample.token_ids) for sample in response.samples))
        return response

    async def _run(
        self, request: GenerateRequest, limit_s: float | None, on_tokens: SampleSink | None
    ) -> GenerateResponse:
        started_s = time.perf_counter()
        try:
            async with asyncio.timeout(limit_s):
                samples = await self._draw(request, on_tokens)
        except TimeoutError as error:
            raise ApiError(
                504,
                "deadline_exceeded",
                f"The request was not done within its deadline of {limit_s} s.",
                fix="Allow more time, ask for fewer tokens, or add a server.",
                field="deadline_s",
            ) from error
        return GenerateResponse(
            request_id=request.request_id,
            samples=samples,
            contract_hash=self._contract_hash,
            version=self._versions.current.number,
            timings=Timings(total_s=time.perf_counter() - started_s),
        )

    async def _draw(self, request: GenerateRequest, on_tokens: SampleSink | None) -> list[Sample]:
        """All samples side by side; the first failure cancels the others."""
        serial = next(self._serials)  # a request id may come again, a job id may not
        job_ids = [f"{request.request_id}:{serial}:{index}" for index in range(request.n)]
        if request.n == 1:
            return [await self._sample(request, job_ids[0], 0, on_tokens)]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._sample(request, job_id, index, on_tokens))
                    for index, job_id in enumerate(job_ids)
                ]
        except ExceptionGroup as failures:
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
            # A number is never reused, so no request can meet a prefix cached by older weights.
            cache_salt=str(self._versions.current.number),
        )
        self._versions.begin(job_id)
        total = 0
        try:
            sink = None if on_tokens is None else partial(on_tokens, index)
            result = await self._engine.sample(job, sink)
            total = len(result.token_ids)
        except BadJobError as error:
            raise _unprocessable(
                "refused_by_engine",
                f"The engine refuses this request: {error}",
                "Correct the request as the message says.",
                "body",
            ) from error
        except EngineDeadError as error:
            raise ApiError(
                503,
                "engine_dead",
                "The engine behind this service is dead.",
                fix="Use another server; the operator has to restart this one.",
            ) from error
        finally:
            spans = self._versions.end(job_id, total)
        if len(result.logprobs) != total or not math.isfinite(sum(result.logprobs)):
            raise ApiError(
                500,
                "invalid_logprobs",
                "The engine returned a log-probability that is missing or not a finite number.",
                fix="Check the last weight update for NaN; the sample must not be trained on.",
            )
        return Sample(
            token_ids=result.token_ids,
            logprobs=result.logprobs,
            finish_reason=result.finish_reason,
            stop_reason=result.stop_reason,
            spans=spans,
        )


def _unprocessable(code: str, message: str, fix: str, field: str) -> ApiError:
    return ApiError(422, code, message, fix=fix, field=field)
