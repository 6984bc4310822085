"""A real Hugging Face model on CPU behind the Engine protocol: small, exact and deterministic.

It recomputes the whole sequence in float32 for every token, so each log-prob can be checked with
one plain forward pass. For tests, fault injection and machines without vLLM; not for speed.
"""

import asyncio
import math
import threading
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from fastapi import FastAPI

from services.rollout.engines.protocol import (
    EngineDeadError,
    EngineInfo,
    Hold,
    Job,
    JobResult,
    LoadPlan,
    TokenSink,
    WeightReceiver,
)
from services.rollout.model_folder import ModelFolder
from services.rollout.settings import RolloutSettings
from services.rollout.weights.checkpoint import BadCheckpointError, read_tensors
from services.rollout.wire.schemas import PauseMode, Sampling, SleepLevel, SleepMode

_LOADING = threading.Lock()
"""Transformers' from_pretrained swaps state of the whole process, such as torch's initialisers."""


def _processors(sampling: Sampling) -> transformers.LogitsProcessorList:
    """Transformers' own processors in vLLM's order: penalties, temperature, min-p, top-k, top-p."""
    chain: list[Any] = []
    if sampling.repetition_penalty != 1.0:
        chain.append(transformers.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature not in (0.0, 1.0):
        chain.append(transformers.TemperatureLogitsWarper(sampling.temperature))
    if sampling.temperature > 0.0:
        if sampling.min_p > 0.0:
            chain.append(transformers.MinPLogitsWarper(sampling.min_p))
        if sampling.top_k > 0:
            chain.append(transformers.TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            chain.append(transformers.TopPLogitsWarper(sampling.top_p))
    return transformers.LogitsProcessorList(chain)


@dataclass(slots=True)
class _Running:
    """A job being drawn, one token per step."""

    job: Job
    generator: torch.Generator | None
    done: asyncio.Future[JobResult]
    processors: transformers.LogitsProcessorList
    on_tokens: TokenSink | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def finish(self, reason: Any, stop_reason: int | str | None = None) -> None:
        if not self.done.done():
            result = JobResult(
                token_ids=self.token_ids,
                logprobs=self.logprobs,
                finish_reason=reason,
                stop_reason=stop_reason,
            )
            self.done.set_result(result)


class HfEngine:
    """Draws one token per step for each of the first `max_num_seqs` jobs, in order of arrival."""

    def __init__(
        self, model: Any, folder: ModelFolder, info: EngineInfo, settings: RolloutSettings
    ) -> None:
        self._model = model
        self._tokenizer = folder.tokenizer
        self._rounding = folder.rounding
        self._info = info
        self._max_num_seqs = settings.max_num_seqs
        self._faults = settings.faults
        self._shared_generator = torch.Generator().manual_seed(settings.seed)
        self._running: dict[str, _Running] = {}
        self._unpaused = asyncio.Event()
        self._unpaused.set()
        self._stepper: asyncio.Task[None] | None = None
        self._dead: str | None = None
        self.num_jobs = 0
        """Jobs ever started; an idempotent retry must not increase it."""
        self.num_drawn = 0
        """Tokens ever drawn, including those of unfinished jobs."""

    @classmethod
    def load(cls, folder: ModelFolder, settings: RolloutSettings) -> "HfEngine":
        """Load a model folder. Weights keep the precision of `dtype`; arithmetic is float32."""
        model = transformers.AutoModelForCausalLM.from_pretrained(folder.path, dtype=settings.dtype)
        model = model.float().eval()
        text = model.config.get_text_config()  # of a multimodal model its language model's
        info = EngineInfo(
            engine="hf",
            engine_version=transformers.__version__,
            architecture=model.config.architectures[0],
            dtype=settings.dtype,
            vocab_size=text.vocab_size,
            max_model_len=settings.max_model_len or text.max_position_embeddings,
            eos_token_ids=folder.eos_token_ids,
        )
        return cls(model, folder, info, settings)

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def receiver(self) -> WeightReceiver | None:
        return None

    async def sample(self, job: Job, on_tokens: TokenSink | None = None) -> JobResult:
        await self.check()
        self.num_jobs += 1
        seed = job.sampling.seed
        # A generator for each job, so that a seeded sample does not depend on what runs beside it.
        generator = None if seed is None else torch.Generator().manual_seed(seed + job.index)
        running = _Running(
            job=job,
            generator=generator,
            done=asyncio.get_running_loop().create_future(),
            processors=_processors(job.sampling),
            on_tokens=on_tokens,
        )
        self._running[job.job_id] = running
        if self._stepper is None or self._stepper.done():
            self._stepper = asyncio.create_task(self._step_while_running())
        try:
            return await running.done
        finally:
            self._running.pop(job.job_id, None)

    async def _step_while_running(self) -> None:
        while self._running:
            await self._unpaused.wait()
            for running in list(self._running.values())[: self._max_num_seqs]:
                # Checked again: a pause may have come after the event and before this turn.
                if not running.done.done() and self._unpaused.is_set():
                    try:
                        self._step(running)
                    except Exception as error:
                        running.done.set_exception(error)  # one bad job must not end the loop
                    if self.num_drawn == self._faults.kill_after_tokens:
                        self._die("it was killed by its fault plan")
            # Also at 0 seconds: a step blocks the event loop, so others get their turn here.
            await asyncio.sleep(self._faults.step_s)

    @torch.no_grad()
    def _step(self, running: _Running) -> None:
        sampling = running.job.sampling
        ids = torch.tensor([running.job.token_ids + running.token_ids])  # (1, T)
        logits = self._model(ids, use_cache=False).logits[:, -1].float()  # (1, V)
        if len(running.token_ids) < sampling.min_tokens:
            banned = [*self._info.eos_token_ids, *sampling.stop_token_ids]
            logits[0, banned] = -torch.inf
        self._penalise(running, logits)
        log_probs = torch.log_softmax(running.processors(ids, logits), dim=-1)  # (1, V)
        if sampling.temperature == 0.0:
            token = int(log_probs.argmax())
        else:
            generator = running.generator or self._shared_generator
            token = int(torch.multinomial(log_probs.exp(), 1, generator=generator))
        self.num_drawn += 1
        logprob = float(log_probs[0, token])
        running.token_ids.append(token)
        running.logprobs.append(
            math.nan if self.num_drawn == self._faults.nan_at_token else logprob
        )
        if running.on_tokens is not None:
            running.on_tokens(running.token_ids[-1:], running.logprobs[-1:])
        self._maybe_finish(running, token)

    @staticmethod
    def _penalise(running: _Running, logits: torch.Tensor) -> None:
        sampling = running.job.sampling
        if not running.token_ids or not (sampling.presence_penalty or sampling.frequency_penalty):
            return
        counts = torch.bincount(torch.tensor(running.token_ids), minlength=logits.shape[-1])
        logits -= sampling.frequency_penalty * counts + sampling.presence_penalty * (counts > 0)

    def _maybe_finish(self, running: _Running, token: int) -> None:
        sampling = running.job.sampling
        drawn = len(running.token_ids)
        if drawn > sampling.min_tokens or sampling.min_tokens == 0:
            if token in self._info.eos_token_ids and not sampling.ignore_eos:
                running.finish("stop")
            elif token in sampling.stop_token_ids:
                running.finish("stop", token)
        if sampling.stop and not running.done.done():
            text = self._tokenizer.decode(running.token_ids)
            for stop in sampling.stop:
                if stop in text:
                    running.finish("stop", stop)
                    break
        if drawn >= sampling.max_tokens:
            running.finish("length")

    def num_tokens(self, job_id: str) -> int | None:
        running = self._running.get(job_id)
        return None if running is None or running.done.done() else len(running.token_ids)

    async def pause(self, mode: PauseMode) -> None:
        if mode == "wait":
            waiting = [running.done for running in self._running.values()]
            await asyncio.gather(*waiting, return_exceptions=True)
        self._unpaused.clear()
        if mode == "abort":
            for running in list(self._running.values())[: self._max_num_seqs]:
                running.finish("abort")

    async def resume(self) -> None:
        self._unpaused.set()

    async def is_paused(self) -> bool:
        return not self._unpaused.is_set()

    async def sleep(self, level: SleepLevel, mode: SleepMode) -> None:
        """Free nothing; at level 2 zero the weights, so that a missing reload would be noticed."""
        await self.pause(mode)
        if level == 2:
            with torch.no_grad():
                for parameter in self._model.parameters():
                    parameter.zero_()

    async def wake_up(self, plan: LoadPlan | None) -> None:
        if plan is not None:
            await self.load_weights(plan)
        await self.resume()

    async def load_weights(self, plan: LoadPlan) -> None:
        def load() -> Any:
            tensors = {
                name: self._served(name, tensor)
                for path, names in plan.items()
                for name, tensor in read_tensors(path, names)
            }
            # As from a folder: a checkpoint's names and shapes may differ from those in memory.
            with _LOADING:
                model, info = type(self._model).from_pretrained(
                    None,
                    config=self._model.config,
                    dtype=torch.float32,
                    state_dict=tensors,
                    output_loading_info=True,
                )
            # Transformers would fill what is missing with random numbers, and warn.
            wrong = [info[part] for part in ("missing_keys", "unexpected_keys", "mismatched_keys")]
            if any(wrong):
                raise BadCheckpointError(f"the model does not take {wrong}")
            return model.float().eval()

        self._model = await asyncio.to_thread(load)

    def _served(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of a file as this engine computes with it: float32 of the served dtype."""
        if not tensor.is_floating_point():
            return tensor
        served = tensor.to(getattr(torch, self._info.dtype))
        return (served if self._rounding is None else self._rounding(name, served)).float()

    async def reset_cache(self, *, recompute_running: bool) -> None:
        """Do nothing: every token is drawn from a full forward pass."""

    async def check(self) -> None:
        if self._dead is not None:
            raise EngineDeadError(self._dead)

    async def add_native_routes(self, app: FastAPI, keys: tuple[str, ...], hold: Hold) -> None:
        """Add nothing: this engine has no routes of its own."""

    async def close(self) -> None:
        self._die("the engine is closed")
        if self._stepper is not None:
            self._stepper.cancel()

    def _die(self, cause: str) -> None:
        self._dead = cause
        for running in self._running.values():
            if not running.done.done():
                running.done.set_exception(EngineDeadError(cause))
