"""Ray actors with the method names OpenRLHF calls on a vLLM engine; behind each stands a service.

    SamplesGenerator --generate_responses--> RolloutEngine --episode--> RolloutClient --HTTP-->

An actor runs episodes; it holds no model. Weights go to the services by `weight_sync`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
from collections import Counter
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import ray

from openrlhf_alp.clients.http import Timeouts
from openrlhf_alp.clients.keys import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE
from openrlhf_alp.clients.rollout import RolloutClient
from openrlhf_alp.episodes.records import Completion, Episode, SamplingConfig, VersionSpan
from openrlhf_alp.episodes.single_turn import run_single_turn
from openrlhf_alp.learner.config import ServiceConfig
from openrlhf_alp.learner.reward import build_reward
from openrlhf_alp.rewards.protocol import RewardUnavailable
from services.rollout.schemas import GenerateRequest, Sampling

logger = logging.getLogger(__name__)


class RolloutEngine:
    """One per service URL. Upstream: the duck type of `RolloutRayActor`.

    Args:
        urls: base URLs of all services; its own first, the others take over when that one is lost.
        api_key, admin_key: its bearer keys.
        service: time limits.
        reward_urls: `--reward.remote_url`, already split.
    """

    def __init__(
        self,
        *,
        urls: Sequence[str],
        api_key: str,
        admin_key: str,
        service: ServiceConfig,
        reward_urls: Sequence[str],
    ) -> None:
        self._keys = (api_key, admin_key)
        self.client = RolloutClient(
            urls,
            api_key=api_key,
            admin_key=admin_key,
            timeouts=Timeouts(total_s=service.request_timeout_s),
        )
        self.service = service
        self.reward = build_reward(reward_urls)
        self.version = 0
        self.dropped: Counter[str] = Counter()
        self.unfinished = 0

    def get_num_unfinished_requests(self) -> int:
        """Episodes running; OpenRLHF balances prompts over engines by it."""
        return self.unfinished

    def take_dropped_groups(self) -> dict[str, int]:
        """Groups dropped since the last call, by reason."""
        dropped, self.dropped = self.dropped, Counter()
        return dict(dropped)

    async def generate_responses(
        self,
        prompt: str,
        label: str,
        sampling_params: Any,
        max_length: int,
        hf_tokenizer: Any,
        num_samples: int = 1,
        images: Any = None,
    ) -> list[dict[str, Any]]:
        """Exactly `num_samples` responses for one prompt, or none when the group cannot be kept.

        A group is dropped whole, counted and named: a baseline over the rest would be biased.

        Raises:
            ServiceError: the service cannot be reached or refused the request.
            BadCompletionError: a log-prob is missing or not finite.
        """
        prompt_ids = hf_tokenizer(text=prompt, add_special_tokens=False)["input_ids"]
        room = max_length - len(prompt_ids)
        max_tokens = min(sampling_params.max_tokens or room, room)
        if max_tokens < 1:
            self._drop("prompt_too_long", f"{len(prompt_ids)} tokens, --data.max_len {max_length}")
            return []
        run = partial(
            run_single_turn,
            prompt=prompt,
            label=label,
            prompt_ids=prompt_ids,
            generate=self._generate,
            decode=partial(hf_tokenizer.decode, skip_special_tokens=True),
            reward=self.reward,
            sampling=SamplingConfig(
                temperature=sampling_params.temperature,
                top_p=sampling_params.top_p,
                top_k=max(sampling_params.top_k, 0),
                max_tokens=max_tokens,
                # OpenRLHF asks for one token at least; that would forbid an immediate end of
                # sequence to the engine alone, and bend the ratio of the first token.
                min_tokens=0,
            ),
        )
        self.unfinished += num_samples
        try:
            episodes = await _all_or_first_error(
                [run(request_id=uuid4().hex) for _ in range(num_samples)]
            )
        except RewardUnavailable as error:
            self._drop(error.reason, error.detail)
            return []
        finally:
            self.unfinished -= num_samples
        return [to_response(episode) for episode in episodes]

    def _drop(self, reason: str, detail: str) -> None:
        self.dropped[reason] += 1
        logger.warning("group dropped (%s): %s", reason, detail)

    async def _generate(
        self, *, request_id: str, prompt_ids: Sequence[int], sampling: SamplingConfig
    ) -> Completion:
        reply = await self.client.generate(
            GenerateRequest(
                request_id=request_id,
                token_ids=list(prompt_ids),
                # Field by field: the records are those of an episode, the schema that of the wire.
                sampling=Sampling(**dataclasses.asdict(sampling)),
                deadline_s=self.service.request_timeout_s,
            )
        )
        sample = reply.samples[0]
        return Completion(
            token_ids=tuple(sample.token_ids),
            logprobs=tuple(sample.logprobs),
            finish_reason=sample.finish_reason,
            stop_reason=sample.stop_reason,
            spans=tuple(
                VersionSpan(version=s.version, digest=s.digest, start=s.start, end=s.end)
                for s in sample.spans
            ),
        )

    async def require_version(self, version: int) -> None:
        """Refuse, from now on, a server that missed the push of `version`."""
        self.version = version
        self.client.require_version(version)

    async def get_version(self) -> int:
        """The version last pushed: the one that the next update starts from."""
        return self.version

    def keys(self) -> tuple[str, str]:
        """API and admin key, for the rank that pushes weights."""
        return self._keys

    async def pause_generation(self) -> None:
        """Nothing to do before a push: a server pauses itself for the swap alone.

        Upstream asks for it in partial rollouts. A pause from here would stop generation while the
        weights are gathered and written too, and for ever if the learner died meanwhile.
        """

    async def resume_generation(self) -> None:
        """Nothing was paused, see `pause_generation`."""


async def _all_or_first_error(episodes: list[Any]) -> list[Episode]:
    """Wait for all; on the first error cancel the others: no work goes on for a lost group."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(episode) for episode in episodes]
    except ExceptionGroup as errors:
        fatal = [e for e in errors.exceptions if not isinstance(e, RewardUnavailable)]
        raise (fatal or errors.exceptions)[0] from None
    return [task.result() for task in tasks]


def to_response(episode: Episode) -> dict[str, Any]:
    """The dictionary that OpenRLHF's `_process_response_into_experience` reads."""
    return {
        "prompt": episode.prompt,
        "label": episode.label,
        "observation_tokens": list(episode.token_ids),
        "action_ranges": list(episode.action_ranges),
        "rollout_log_probs": list(episode.logprobs),
        "reward": episode.reward,
        "scores": episode.reward,
        "truncated": episode.truncated,
        "token_versions": [(span.version, span.end - span.start) for span in episode.spans],
        "extra_logs": {
            "rollout/policy_version": float(episode.max_version),
            **{f"reward/{name}": value for name, value in episode.reward_detail.items()},
        },
    }


# Another name than the class: Ray then ships the class by reference and workers import it from
# here.
RemoteRolloutEngine = ray.remote(num_cpus=0)(RolloutEngine)


def create_rollout_engines(args: SimpleNamespace) -> list[Any]:
    """One Ray actor per service URL of `args`; keys come from this process's environment."""
    urls = args.rollout_service.urls
    return [
        RemoteRolloutEngine.options(max_concurrency=1024).remote(
            urls=(*urls[index:], *urls[:index]),
            api_key=os.environ[API_KEY_VARIABLE],
            admin_key=os.environ[ADMIN_KEY_VARIABLE],
            service=args.rollout_service,
            reward_urls=args.reward.remote_url,
        )
        for index in range(len(urls))
    ]
