"""Ray actors with the methods that OpenRLHF calls on a vLLM engine, each in front of a service.

    SamplesGenerator --generate_responses--> RolloutEngine --episode--> RolloutClient --HTTP-->

An actor runs episodes and has no model. `weight_sync` brings the weights to the services.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import ray
from openrlhf.utils.agent import SingleTurnAgentExecutor

from openrlhf_alp.clients.channel import Timeouts
from openrlhf_alp.clients.errors import DeadlineExceeded, InvalidReply, ServiceUnavailable
from openrlhf_alp.clients.rollout import RolloutClient
from openrlhf_alp.clients.server_watch import NoServerLeft, ServerWatch
from openrlhf_alp.episodes.protocols import EpisodeRunner, Task
from openrlhf_alp.episodes.records import (
    BadCompletionError,
    Episode,
    SamplingConfig,
    ToolLostError,
)
from openrlhf_alp.learner.flags.config import MATH_VERIFY, ServiceConfig
from openrlhf_alp.rewards.math import MathReward
from openrlhf_alp.rewards.protocol import Reward, RewardResult, RewardUnavailable
from openrlhf_alp.rollouts.response import to_response
from openrlhf_alp.rollouts.runners import ServiceGenerate, ToolConfig, build_runner, tool_client
from services.common.wire import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE, TOOL_KEY_VARIABLE

logger = logging.getLogger(__name__)

LOST_REQUESTS: dict[type[Exception], str] = {
    DeadlineExceeded: "request_too_slow",
    InvalidReply: "invalid_reply",
    BadCompletionError: "bad_completion",
    ServiceUnavailable: "request_lost",
}
"""What one request can suffer without the next one suffering it too -> reason of the drop."""


class RolloutEngine:
    """One per service URL. Upstream: the duck type of `RolloutRayActor`.

    Args:
        urls: base URLs of all services, its own first; the others replace it when it is lost.
        api_key, admin_key: bearer keys of the services.
        service: time limits.
        reward_urls: `--reward.remote_url`, already split.
        tool, tool_key: settings of tool-integrated episodes; without URLs episodes have one turn.
        whole: responses hold their episodes, for `--alp.record`.
    """

    def __init__(
        self,
        *,
        urls: Sequence[str],
        api_key: str,
        admin_key: str,
        service: ServiceConfig,
        reward_urls: Sequence[str],
        tool: ToolConfig | None = None,
        tool_key: str = "",
        whole: bool = False,
    ) -> None:
        self._keys = (api_key, admin_key)
        self.client = RolloutClient(
            urls,
            api_key=api_key,
            admin_key=admin_key,
            timeouts=Timeouts(total_s=service.queue_timeout_s, read_s=service.queue_timeout_s),
        )
        self.watch = ServerWatch(
            lambda: self.client.control.fleet.servers, patience_s=service.request_timeout_s
        )
        self.service = service
        self.reward = build_reward(reward_urls, service.reward_workers)
        self.tool = tool or ToolConfig()
        self.tool_client = tool_client(self.tool, tool_key) if self.tool.urls else None
        self.whole = whole
        self.version = 0
        self.dropped: Counter[str] = Counter()
        self.num_lost = 0
        self.unfinished = 0

    def get_num_unfinished_requests(self) -> int:
        """Number of running episodes, by which OpenRLHF balances prompts over engines."""
        return self.unfinished

    def take_dropped_groups(self) -> dict[str, int]:
        """Groups dropped since the last call, by reason."""
        dropped, self.dropped = self.dropped, Counter()
        return dict(dropped)

    def get_num_lost_groups(self) -> int:
        """Groups dropped so far because a request was lost, and not for what is in the data."""
        return self.num_lost

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
        """Exactly `num_samples` responses for one prompt, or none when the group is dropped.

        A group is dropped whole and counted under its reason: a baseline over the rest would be
        biased.

        Raises:
            ServiceUnavailable: no server is left.
            RequestRejected: the servers refuse such requests.
        """
        task = Task.tokenized(prompt=prompt, label=label, tokenizer=hf_tokenizer)
        max_tokens = task.budget(max_length=max_length, max_tokens=sampling_params.max_tokens)
        if max_tokens < 1:
            num_tokens = len(task.prompt_ids)
            self._drop("prompt_too_long", f"{num_tokens} tokens, --data.max_len {max_length}")
            return []
        runner = self._runner(hf_tokenizer)
        sampling = SamplingConfig(
            temperature=sampling_params.temperature,
            top_p=sampling_params.top_p,
            top_k=max(sampling_params.top_k, 0),
            max_tokens=max_tokens,
            # OpenRLHF asks for at least one token. That would forbid an immediate end of sequence
            # to the engine only, and so distort the ratio of the first token.
            min_tokens=0,
        )
        self.unfinished += num_samples
        try:
            episodes = await self.watch.unless_all_are_gone(
                _all_or_first_error(
                    [
                        runner(request_id=uuid4().hex, task=task, sampling=sampling)
                        for _ in range(num_samples)
                    ]
                )
            )
        except (RewardUnavailable, ToolLostError) as error:
            self._drop(error.reason, error.detail)
            return []
        except NoServerLeft:
            raise
        except tuple(LOST_REQUESTS) as error:
            self.num_lost += 1
            self._drop(_reason_of(error), str(error))
            return []
        finally:
            self.unfinished -= num_samples
        tool = self.tool if self.tool_client else None
        return [to_response(episode, tool=tool, whole=self.whole) for episode in episodes]

    def _runner(self, tokenizer: Any) -> EpisodeRunner:
        return build_runner(
            generate=ServiceGenerate(
                client=self.client,
                deadline_s=self.service.queue_timeout_s,
                work_limit_s=self.service.request_timeout_s,
            ),
            reward=self.reward,
            tokenizer=tokenizer,
            tool=self.tool,
            client=self.tool_client,
        )

    def _drop(self, reason: str, detail: str) -> None:
        self.dropped[reason] += 1
        logger.warning("group dropped (%s): %s", reason, detail)

    async def require_version(self, version: int) -> None:
        """From now on, send no request to a server that missed the push of `version`."""
        self.version = version
        self.client.require_version(version)

    async def all_lost_the_weights(self) -> bool:
        """Whether the servers answer but need another push, see `ServerWatch`."""
        return await self.watch.all_lost_the_weights()

    async def get_version(self) -> int:
        """The version of the last push, which the next update starts from."""
        return self.version

    async def get_contract(self) -> dict[str, Any]:
        """The service's contract, with the version and digest that it serves."""
        return (await self.client.control.contract()).model_dump(mode="json")

    def keys(self) -> tuple[str, str]:
        """API and admin key, for the rank that pushes weights."""
        return self._keys

    async def pause_generation(self) -> None:
        """Do nothing: a server pauses itself, and only for the swap.

        Upstream calls this in partial rollouts. A pause from here would also stop generation while
        the weights are gathered and written, and forever if the learner died meanwhile.
        """

    async def resume_generation(self) -> None:
        """Do nothing, see `pause_generation`."""


async def _all_or_first_error(episodes: list[Any]) -> list[Episode]:
    """Wait for all; on the first error cancel the others, because the group is lost anyway."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(episode) for episode in episodes]
    except ExceptionGroup as errors:
        # A fatal error must not be hidden by a lost episode, which only drops the group.
        lost: tuple[type[Exception], ...] = (RewardUnavailable, ToolLostError, *LOST_REQUESTS)
        fatal = [e for e in errors.exceptions if not isinstance(e, lost)]
        raise (fatal or errors.exceptions)[0] from None
    return [task.result() for task in tasks]


def _reason_of(error: Exception) -> str:
    return next(reason for kind, reason in LOST_REQUESTS.items() if isinstance(error, kind))


def build_reward(remote_urls: Sequence[str], num_workers: int = 1) -> Reward:
    """The reward that `--reward.remote_url` names: ours, a Python file, or an HTTP reward model.

    Args:
        remote_urls: `["math-verify"]`, one `*.py` with OpenRLHF's `reward_func`, or reward servers.
        num_workers: processes of the math reward, `--reward.num_workers`.
    """
    if list(remote_urls) == [MATH_VERIFY]:
        return MathReward(num_workers=num_workers)
    return UpstreamReward(remote_urls)


class UpstreamReward:
    """OpenRLHF's own reward protocols, a `reward_func` file or an HTTP server, as our Protocol."""

    def __init__(self, remote_urls: Sequence[str]) -> None:
        self._executor = SingleTurnAgentExecutor(list(remote_urls))

    async def score(self, *, prompt: str, response: str, label: str) -> RewardResult:
        """Ask for `rewards` of prompt + response.

        Raises:
            RewardUnavailable: the function or server failed, or gave no reward.
        """
        call = (
            self._executor._fetch_rewards_via_func
            if self._executor.reward_func
            else self._executor._fetch_rewards_via_http
        )
        try:
            answers = await call([prompt + response], [prompt], [label])
            value = float(answers[0]["rewards"])
        except Exception as error:
            raise RewardUnavailable(
                reason=type(error).__name__, detail=f"{error} (--reward.remote_url)"
            ) from error
        return RewardResult(value=value)


# A name that differs from the class's, because Ray then pickles the class by reference and workers
# import it from here.
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
            tool=args.tool_service,
            tool_key=os.environ.get(TOOL_KEY_VARIABLE, ""),
            whole=args.alp.record is not None,
        )
        for index in range(len(urls))
    ]
