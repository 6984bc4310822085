"""The Engine protocol over vLLM's AsyncLLM, in process, token in and token out."""

import asyncio
import contextlib
import importlib.metadata
import logging
import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMClientError
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.tool_parsers import ToolParserManager
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError as VllmDeadError
from vllm.v1.executor import Executor

from services.common.errors import ConfigError
from services.common.owned_folders import OwnedFolder
from services.rollout.api.openai import add_openai_routes
from services.rollout.engines.protocol import (
    LOGPROBS_MODE,
    BadJobError,
    EngineDeadError,
    EngineInfo,
    Hold,
    Job,
    JobResult,
    LoadPlan,
    NoSleepModeError,
    TokenSink,
    WeightReceiver,
)
from services.rollout.engines.vllm_processes import SERVICE_PID, TIED
from services.rollout.gpu_transfer.receiver import RpcReceiver, link_backends
from services.rollout.settings import RolloutSettings
from services.rollout.weights.quantization import Rounding
from services.rollout.wire.schemas import FinishReason, PauseMode, Sampling, SleepLevel, SleepMode

logger = logging.getLogger(__name__)

_SOCKETS_PREFIX = "alp-ipc-"
# A socket's path has at most 107 bytes (sockaddr_un); vLLM names each one by a UUID.
_LONGEST_SOCKETS_FOLDER = 107 - len("/00000000-0000-0000-0000-000000000000")
_PROBE_TIMEOUT_S = 10.0
_CLOSE_TIMEOUT_S = 10.0
_FINISH_REASONS: dict[str | None, FinishReason] = {
    "stop": "stop", "length": "length", "abort": "abort"
}  # fmt: skip


def prepare_environment(settings: RolloutSettings) -> None:
    """Set what vLLM reads from the environment; call before the engine is built."""
    # As `vllm serve` does. A forked engine would not import vllm_processes, and so would survive a
    # SIGKILL of this process.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    os.environ[SERVICE_PID] = str(os.getpid())
    if settings.num_threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(settings.num_threads)
    bind = settings.thread_bind or ("nobind" if settings.num_threads is not None else None)
    if bind is not None:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = bind
    if current_platform.is_cpu():
        preloaded = os.environ.get("LD_PRELOAD", "")
        missing = [lib for lib in ("libtcmalloc", "libiomp5") if lib not in preloaded]
        if missing:
            logger.info("faster on CPU with LD_PRELOAD of %s", " and ".join(missing))


def engine_args(settings: RolloutSettings) -> AsyncEngineArgs:
    """Map our settings to vLLM's; everything that touches log-probs is fixed here."""
    extra: dict[str, Any] = {}
    if current_platform.is_cpu():
        extra["kv_cache_memory_bytes"] = int(settings.kv_cache_gb * 2**30)
        # vLLM 0.29 rewinds a seeded request's generator when its prompt was prefilled only in part;
        # CPU generators cannot be rewound and the engine dies. Whole prompts avoid that.
        extra["enable_chunked_prefill"] = False
        # Tracing the model takes a minute at every start and gains nothing without Inductor.
        extra["enforce_eager"] = True
    else:
        extra["gpu_memory_utilization"] = settings.gpu_memory_utilization
    return AsyncEngineArgs(
        model=str(settings.model),
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        seed=settings.seed,
        tensor_parallel_size=settings.tensor_parallel_size,
        logprobs_mode=LOGPROBS_MODE,
        # Sampling defaults of the model's generation config never apply.
        generation_config="vllm",
        enable_prefix_caching=True,
        enable_sleep_mode=settings.sleep_mode,
        worker_extension_cls="services.rollout.engines.vllm_processes.WorkerExtension",
        enable_log_requests=False,
        **extra,
    )


def sampling_params(sampling: Sampling, index: int) -> SamplingParams:
    """vLLM's parameters for sample `index`: one final result with the sampled tokens' log-probs."""
    # Our fields have vLLM's names and meanings.
    fields = sampling.model_dump(exclude={"seed", "stop", "stop_token_ids"})
    return SamplingParams(
        n=1,
        **fields,
        stop=list(sampling.stop),
        stop_token_ids=list(sampling.stop_token_ids),
        seed=None if sampling.seed is None else sampling.seed + index,
        logprobs=0,  # of the sampled token alone
        flat_logprobs=True,  # one list and not a dictionary for each token
        # Text is needed for stop strings only.
        detokenize=bool(sampling.stop),
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,  # these parameters are used once
    )


class _OutputBarrier:
    """Waits until vLLM's output handler has processed everything that the engine core sent.

    The engine acknowledges a pause on the socket that carries the outputs, after them. Once the
    handler asks for more and its queue is empty, every token drawn before the pause is counted.
    """

    def __init__(self, core: Any) -> None:
        self._queue: asyncio.Queue[Any] = core.outputs_queue
        self._take = core.get_output_async
        self._idle = asyncio.Event()
        core.get_output_async = self._get_output

    async def _get_output(self) -> Any:
        if self._queue.empty():
            self._idle.set()
        output = await self._take()
        self._idle.clear()
        return output

    async def passed(self) -> None:
        """Return when nothing is queued and nothing is being processed."""
        while not (self._queue.empty() and self._idle.is_set()):
            self._idle.clear()
            await self._idle.wait()


class VllmEngine:
    """vLLM behind the Engine protocol. Build with `start`, inside the event loop."""

    def __init__(
        self,
        llm: AsyncLLM,
        info: EngineInfo,
        settings: RolloutSettings,
        sockets: OwnedFolder,
        rounding: Rounding | None = None,
    ) -> None:
        self._llm = llm
        self._sockets = sockets
        self._settings = settings
        self._info = info
        self._rounding = rounding
        self._barrier = _OutputBarrier(llm.engine_core)
        self._live: dict[str, str | None] = {}  # job -> vLLM's own request id, None until added

    @classmethod
    def start(
        cls,
        settings: RolloutSettings,
        eos_token_ids: tuple[int, ...],
        rounding: Rounding | None = None,
    ) -> "VllmEngine":
        """Load the model. Takes seconds to minutes and blocks; later loads apply `rounding`."""
        parsers = ToolParserManager.list_registered()
        if settings.tool_call_parser not in (None, *parsers):
            raise ConfigError(
                f"vLLM has no --tool-call-parser {settings.tool_call_parser}. Fix: one of "
                f"{', '.join(sorted(parsers))}."
            )
        prepare_environment(settings)
        # vLLM never removes the sockets to its processes, by default in the temporary folder.
        sockets = OwnedFolder.create(Path(tempfile.gettempdir()), _SOCKETS_PREFIX)
        os.environ["VLLM_RPC_BASE_PATH"] = str(sockets.path)
        try:
            if len(str(sockets.path)) > _LONGEST_SOCKETS_FOLDER:
                raise ConfigError(
                    f"TMPDIR {sockets.path.parent} is too long for a socket. Fix: a shorter TMPDIR."
                )
            llm = _start_llm(settings)
        except BaseException:
            sockets.remove()
            raise
        config = llm.model_config
        info = EngineInfo(
            engine="vllm",
            engine_version=importlib.metadata.version(_vllm_distribution()),
            architecture=config.architecture,
            dtype=settings.dtype,
            vocab_size=config.get_vocab_size(),
            max_model_len=config.max_model_len,
            eos_token_ids=eos_token_ids,
            link_backends=link_backends(settings.tensor_parallel_size),
            num_workers=settings.tensor_parallel_size,
        )
        return cls(llm, info, settings, sockets, rounding)

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def receiver(self) -> WeightReceiver | None:
        return RpcReceiver(self._llm.collective_rpc) if self._info.link_backends else None

    async def sample(self, job: Job, on_tokens: TokenSink | None = None) -> JobResult:
        prompt = {"prompt_token_ids": job.token_ids, "cache_salt": job.cache_salt}
        params = sampling_params(job.sampling, job.index)
        if on_tokens is not None:
            # One output for each step instead of one in all: only a caller that streams pays that.
            params.output_kind = RequestOutputKind.DELTA
        token_ids: list[int] = []
        logprobs: list[float] = []
        # Before the first await: an update during `add_request` has to find the job.
        self._live[job.job_id] = None
        try:
            # Not `generate`, which hides vLLM's own request id; num_tokens finds the job by it.
            queue = await self._llm.add_request(job.job_id, prompt, params)
            self._live[job.job_id] = queue.request_id  # vLLM appends a suffix to our id
            async with self._freeing(queue):
                finished = False
                while not finished:
                    output = await queue.get()
                    finished = output.finished
                    completion = output.outputs[0]
                    # A last output may carry a finish reason and no token.
                    new = list(completion.logprobs.logprobs) if completion.logprobs else []
                    token_ids += completion.token_ids
                    logprobs += new
                    if on_tokens is not None and new:
                        on_tokens(list(completion.token_ids), new)
        except VLLMClientError as error:
            # vLLM's own checks of a request go beyond ours; its state is as before.
            raise BadJobError(str(error)) from error
        except VllmDeadError as error:
            raise EngineDeadError("vLLM's engine process is dead") from error
        finally:
            del self._live[job.job_id]  # its tokens are all drawn, whatever the outcome
        return JobResult(
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=_FINISH_REASONS[completion.finish_reason],
            stop_reason=completion.stop_reason,
        )

    @contextlib.asynccontextmanager
    async def _freeing(self, queue: Any) -> AsyncIterator[None]:
        """Free the engine's slot if the body is cancelled before its output arrived."""
        try:
            yield
        except asyncio.CancelledError:
            # Shielded: a second cancellation would leave the engine drawing for nobody.
            await asyncio.shield(self._llm.abort(queue.request_id, internal=True))
            raise
        finally:
            queue.close()

    def num_tokens(self, job_id: str) -> int | None:
        if job_id not in self._live:
            return None
        states = self._llm.output_processor.request_states
        request_id = self._live[job_id]
        if request_id is None:
            # `add_request` has not returned, but vLLM may have registered it under a longer id.
            known = self._llm.output_processor.external_req_ids.get(job_id)
            if not known:
                return 0
            request_id = known[0]
        state = states.get(request_id)
        if state is None:
            return None
        count: int = state.detokenizer.num_output_tokens()
        return count

    async def pause(self, mode: PauseMode) -> None:
        # The cache is reset after the load: under the new salt, or by `reset_cache`.
        await self._llm.pause_generation(mode=mode, clear_cache=False)
        # Without a handler there was no request yet, so no output can be in flight.
        if self._llm.output_handler is not None:
            await self._barrier.passed()

    async def resume(self) -> None:
        await self._llm.resume_generation()

    async def is_paused(self) -> bool:
        return bool(await self._llm.is_paused())

    async def sleep(self, level: SleepLevel, mode: SleepMode) -> None:
        if not self._llm.model_config.enable_sleep_mode:
            # vLLM would abort every request and then not free any memory.
            raise NoSleepModeError(
                "vLLM has no sleep mode on CPUs"
                if current_platform.is_cpu()
                else "the service was started without --sleep-mode"
            )
        await self._llm.sleep(level, mode)

    async def wake_up(self, plan: LoadPlan | None) -> None:
        # vLLM schedules again after the last tag, so no request runs before the weights are loaded.
        await self._llm.wake_up(["weights"])
        if plan is not None:
            await self.load_weights(plan)
        await self._llm.wake_up(["kv_cache"])

    async def load_weights(self, plan: LoadPlan) -> None:
        by_path = {str(path): list(names) for path, names in plan.items()}
        rounding = self._rounding
        # Plain values, which vLLM's RPC carries.
        how = () if rounding is None else (rounding.scheme, sorted(rounding.names))
        await self._llm.collective_rpc("alp_reload_weights", args=(by_path, *how))

    async def reset_cache(self, *, recompute_running: bool) -> None:
        await self._llm.reset_prefix_cache(reset_running_requests=recompute_running)

    async def check(self) -> None:
        """Ask the engine process a question, so that a hung one fails the probe too."""
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT_S):
                await self._llm.check_health()
                await self._llm.is_paused()
        except (VllmDeadError, TimeoutError) as error:
            raise EngineDeadError("vLLM's engine process does not answer") from error

    async def add_native_routes(self, app: FastAPI, keys: tuple[str, ...], hold: Hold) -> None:
        """vLLM's OpenAI routes: chat completions, completions, models."""
        await add_openai_routes(app, self._llm, self._settings, keys=keys, hold=hold)

    async def close(self) -> None:
        await asyncio.to_thread(self._llm.shutdown, _CLOSE_TIMEOUT_S)
        self._sockets.remove()


def _start_llm(settings: RolloutSettings) -> AsyncLLM:
    vllm_config = engine_args(settings).create_engine_config()
    executor_class = Executor.get_class(vllm_config)
    return AsyncLLM(
        vllm_config,
        executor_class=TIED.get(executor_class, executor_class),
        log_stats=True,
        log_requests=False,
    )


def _vllm_distribution() -> str:
    """The installed distribution that provides the module vllm: vllm, or vllm-cpu."""
    return importlib.metadata.packages_distributions()["vllm"][0]
