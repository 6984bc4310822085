"""`openrlhf-alp preflight`: sample from running services and score with the learner; no update.

    prompts -> SingleTurn -> Episode -> upstream's Experience -> OpenRLHF's Actor -> log-ratio

Every part is the one that a training run uses, except that no DeepSpeed engine wraps the actor.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from openrlhf.models import Actor
from openrlhf.trainer.ppo_utils.experience import make_experience_batch
from openrlhf.utils import get_tokenizer

from openrlhf_alp.clients.channel import Timeouts
from openrlhf_alp.clients.contract import (
    LearnerExpectation,
    check_contract,
    simulated_mismatch,
)
from openrlhf_alp.clients.rollout import RolloutClient
from openrlhf_alp.clients.weights.carry import SERVED_DTYPES
from openrlhf_alp.clients.weights.push import WeightPusher
from openrlhf_alp.episodes.protocols import Task
from openrlhf_alp.episodes.records import Episode, SamplingConfig
from openrlhf_alp.learner import compat
from openrlhf_alp.learner.mismatch.judge import Verdict, judge
from openrlhf_alp.learner.mismatch.measure import Mismatch, log_ratio, scorable
from openrlhf_alp.learner.weight_sync import gathered_buckets, gathered_parameters
from openrlhf_alp.replay.files.records import RecordedBatch, RecordedSample
from openrlhf_alp.replay.files.schema import BatchInfo
from openrlhf_alp.rewards.protocol import RewardResult
from openrlhf_alp.rollouts.response import to_response
from openrlhf_alp.rollouts.runners import ServiceGenerate, build_runner
from services.rollout.wire.fingerprint import weights_digest
from services.rollout.wire.schemas import Contract, TensorSpec
from services.rollout.wire.tensors import digest_tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeConfig:
    """What is asked of which services, and how the learner loads the model."""

    model: str
    """Folder or Hugging Face id of the weights that the services should hold."""
    urls: tuple[str, ...]
    api_key: str
    admin_key: str | None
    """Needed to push only."""
    prompts: tuple[str | list[dict[str, str]], ...]
    """Text, or chat messages."""
    chat_template: bool
    """Put the model's chat template around each prompt."""
    samples_per_prompt: int
    max_tokens: int
    temperature: float
    dtype: str
    """`bf16`, `fp16` or `fp32`, as `--ds.param_dtype`."""
    attention: str
    """As `--ds.attn_implementation`."""
    micro_batch_size: int
    push: bool
    """Push the model's weights first, as a training run does."""
    timeout_s: float
    """Longest wait for the services to be ready, and for one answer."""

    def __post_init__(self) -> None:
        for name in ("samples_per_prompt", "max_tokens", "micro_batch_size", "timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.temperature <= 0:
            raise ValueError(
                f"the temperature is {self.temperature}; greedy answers have no log-prob to "
                "compare, so it must be above 0"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightComparison:
    """Tensors of the model against the digests of the served ones."""

    num_tensors: int
    different: tuple[str, ...]
    """Names of tensors that differ, or that only one side has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    """Result of a preflight."""

    mismatch: Mismatch
    verdict: Verdict
    weights: WeightComparison
    num_samples: int
    versions: tuple[int, ...]
    """Policy versions that sampled; more than one when another process pushed meanwhile."""
    batch: RecordedBatch
    """What was sampled, for `--explain`."""
    simulated: str | None
    """What the services do to the weights on purpose, in one sentence."""


def probe(config: ProbeConfig) -> ProbeReport:
    """Measure the mismatch of the services in `config` against a learner of the same model.

    Raises:
        ValueError: the model folder or a prompt is not usable.
        ServiceError: a service is not ready, refuses, or has another contract than the model.
    """
    tokenizer = get_tokenizer(config.model, None, "left")
    actor = load_actor(config)
    tasks = [_task(prompt, config, tokenizer) for prompt in config.prompts]
    contract = asyncio.run(_check_services(config, tokenizer, actor, tasks))
    if config.push:
        admin_key = config.admin_key or config.api_key
        pusher = WeightPusher(config.urls, api_key=config.api_key, admin_key=admin_key)
        pusher.push(gathered_buckets(actor.model, 0, keep=True))
    episodes, served = asyncio.run(_sample(config, tasks, tokenizer))
    mismatch = Mismatch.of(score(actor, episodes, config.micro_batch_size))
    return ProbeReport(
        mismatch=mismatch,
        verdict=judge(mismatch.figures()),
        weights=compare_weights(actor, served),
        num_samples=len(episodes),
        versions=tuple(sorted({span.version for e in episodes for span in e.spans})),
        batch=_recorded(config, episodes, contract, served),
        simulated=simulated_mismatch(contract),
    )


def _recorded(
    config: ProbeConfig,
    episodes: Sequence[Episode],
    contract: Contract,
    served: dict[str, TensorSpec],
) -> RecordedBatch:
    # Version and digest of now: the contract is from before a push.
    return RecordedBatch(
        info=BatchInfo(
            policy_version=max(episode.max_version for episode in episodes),
            model=config.model,
            model_digest=weights_digest({name: spec.digest for name, spec in served.items()}),
            contract=contract.model_dump(mode="json"),
            sampling={"temperature": config.temperature, "max_tokens": config.max_tokens},
        ),
        samples=tuple(
            RecordedSample.of_episode(episode, action_ranges=episode.action_ranges)
            for episode in episodes
        ),
    )


def load_actor(config: ProbeConfig) -> Actor:
    """OpenRLHF's policy as a training run builds it, without DeepSpeed around it."""
    compat.allow_float32()
    actor = Actor(
        config.model,
        attn_implementation=config.attention,
        param_dtype=config.dtype,
        temperature=config.temperature,
    )
    return actor.to(torch.cuda.current_device())


def score(actor: Actor, episodes: Sequence[Episode], micro_batch_size: int) -> np.ndarray:
    """(num_actions,) float32 log-ratio of every sampled token, learner over rollout."""
    samples = scorable([to_response(episode) for episode in episodes])
    batches = [
        make_experience_batch(samples[start : start + micro_batch_size])
        for start in range(0, len(samples), micro_batch_size)
    ]
    device = torch.cuda.current_device()
    return np.concatenate([log_ratio(actor, batch.to_device(device)) for batch in batches])


def compare_weights(actor: Actor, served: dict[str, TensorSpec]) -> WeightComparison:
    """Which of the actor's tensors are not, byte for byte, the served ones."""
    ours = dict(gathered_parameters(actor.model, 0, keep=True))
    different = ours.keys() ^ served.keys()
    for name in ours.keys() & served.keys():
        tensor = ours[name].to("cpu", SERVED_DTYPES[served[name].dtype]).contiguous()
        if digest_tensor(tensor) != served[name].digest:
            different.add(name)
    return WeightComparison(num_tensors=len(ours), different=tuple(sorted(different)))


def _task(prompt: str | list[dict[str, str]], config: ProbeConfig, tokenizer: Any) -> Task:
    if config.chat_template:
        if not tokenizer.chat_template:
            raise ValueError(
                f"{config.model} has no chat template; send plain text with --no-chat-template"
            )
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if not isinstance(prompt, str):
        raise ValueError("a prompt is a list of messages; drop --no-chat-template")
    return Task.tokenized(prompt=prompt, label="", tokenizer=tokenizer)


def _client(config: ProbeConfig) -> RolloutClient:
    return RolloutClient(
        config.urls,
        api_key=config.api_key,
        timeouts=Timeouts(read_s=config.timeout_s, total_s=config.timeout_s),
    )


async def _check_services(
    config: ProbeConfig, tokenizer: Any, actor: Actor, tasks: Sequence[Task]
) -> Contract:
    longest = max(len(task.prompt_ids) for task in tasks) + config.max_tokens
    expected = LearnerExpectation.of(tokenizer, actor.model.config, min_model_len=longest)
    async with _client(config) as client:
        await client.control.wait_ready(config.timeout_s)
        contract = await client.control.contract()
    check_contract(contract, expected)
    return contract


async def _sample(
    config: ProbeConfig, tasks: Sequence[Task], tokenizer: Any
) -> tuple[list[Episode], dict[str, TensorSpec]]:
    """All episodes, and the tensors of the first service."""
    sampling = SamplingConfig(max_tokens=config.max_tokens, temperature=config.temperature)
    async with _client(config) as client:
        runner = build_runner(
            generate=ServiceGenerate(client=client, deadline_s=config.timeout_s),
            reward=_NoReward(),
            tokenizer=tokenizer,
        )
        async with asyncio.TaskGroup() as group:
            running = [
                group.create_task(
                    runner(request_id=f"preflight-{uuid4().hex}", task=task, sampling=sampling)
                )
                for task in tasks
                for _ in range(config.samples_per_prompt)
            ]
        return [task.result() for task in running], (await client.control.weights())[0].tensors


class _NoReward:
    """0 for every answer: a preflight looks at log-probs only."""

    async def score(self, *, prompt: str, response: str, label: str) -> RewardResult:
        return RewardResult(value=0.0)
