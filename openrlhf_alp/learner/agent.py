"""Tool-integrated episodes as an agent of plain OpenRLHF, on its own vLLM engines.

    export OPENRLHF_ALP_TOOL_URLS="http://127.0.0.1:8090"  OPENRLHF_ALP_TOOL_API_KEY=...
    python -m openrlhf.cli.train_ppo_ray --train.agent_func_path openrlhf_alp/learner/agent.py ...

OpenRLHF builds the agent without arguments, so its settings come from the environment;
OPENRLHF_ALP_TIR may hold a JSON object with fields of `ToolConfig`. Two things need our own
command line: removing void turns from the loss, and dropping a group whose tool or reward was lost.
Here such a loss stops the run with an error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

import msgspec
from openrlhf.utils.agent import AgentExecutorBase

from openrlhf_alp.episodes.protocols import Task
from openrlhf_alp.episodes.records import Completion, SamplingConfig, VersionSpan
from openrlhf_alp.rewards.math import MathReward
from openrlhf_alp.rollouts.response import to_response
from openrlhf_alp.rollouts.runners import ToolConfig, build_runner, tool_client
from services.common.wire import TOOL_KEY_VARIABLE

URLS_VARIABLE = "OPENRLHF_ALP_TOOL_URLS"
SETTINGS_VARIABLE = "OPENRLHF_ALP_TIR"


class AgentExecutor(AgentExecutorBase):
    """Upstream: `openrlhf.utils.agent.AgentExecutorBase`; one per engine actor.

    Raises:
        ValueError: a variable is missing or wrong; the message names it.
    """

    def __init__(self) -> None:
        self._tool = read_environment(os.environ)
        self._client = tool_client(self._tool, os.environ[TOOL_KEY_VARIABLE])
        self._reward = MathReward()

    async def execute(
        self,
        prompt: str,
        label: str,
        sampling_params: Any,
        max_length: int,
        hf_tokenizer: Any,
        llm_engine: Any,
        images: Any = None,
    ) -> dict[str, Any]:
        """One episode, as the dictionary that OpenRLHF reads.

        Raises:
            ValueError: the prompt leaves no room for an answer, or comes with images.
            ToolLostError: code could not be run, through no fault of the policy.
            RewardUnavailable: the reward could not be computed.
        """
        if images:
            raise ValueError("tool-integrated episodes are text only: the prompt has images")
        task = Task.tokenized(prompt=prompt, label=label, tokenizer=hf_tokenizer)
        max_tokens = task.budget(max_length=max_length, max_tokens=sampling_params.max_tokens)
        if max_tokens < 1:
            raise ValueError(
                f"a prompt of {len(task.prompt_ids)} tokens leaves no room below --data.max_len "
                f"{max_length}; drop it from the dataset"
            )
        runner = build_runner(
            generate=EngineGenerate(llm_engine, sampling_params),
            reward=self._reward,
            tokenizer=hf_tokenizer,
            tool=self._tool,
            client=self._client,
        )
        episode = await runner(
            request_id=uuid4().hex, task=task, sampling=SamplingConfig(max_tokens=max_tokens)
        )
        response = to_response(episode, tool=self._tool)
        if sampling_params.logprobs is None:
            # No correction was asked for, so the engine gave raw log-probs, not processed ones.
            response["rollout_log_probs"] = None
        return response


class EngineGenerate:
    """OpenRLHF's own engine as the episode's `Generate`.

    Args:
        llm_engine: upstream's `RolloutRayActor`.
        sampling_params: vLLM's, as the run set them; the episode sets length and stop strings.
    """

    def __init__(self, llm_engine: Any, sampling_params: Any) -> None:
        self._engine = llm_engine
        self._params = sampling_params

    async def __call__(
        self, *, request_id: str, prompt_ids: Sequence[int], sampling: SamplingConfig
    ) -> Completion:
        # A copy: OpenRLHF passes the same object to every episode. vLLM's is a msgspec struct.
        params = msgspec.structs.replace(
            self._params,
            max_tokens=sampling.max_tokens,
            min_tokens=sampling.min_tokens,
            stop=list(sampling.stop),
            logprobs=self._params.logprobs or 0,
        )
        output = (await self._engine.generate(list(prompt_ids), params)).outputs[0]
        pairs = zip(output.token_ids, output.logprobs, strict=True)
        num_sampled = len(output.token_ids)
        return Completion(
            token_ids=tuple(output.token_ids),
            logprobs=tuple(choices[token].logprob for token, choices in pairs),
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
            # Upstream's engine does not say which weights sampled a token.
            spans=(VersionSpan(version=0, digest="", start=0, end=num_sampled),),
        )


def read_environment(environment: Mapping[str, str]) -> ToolConfig:
    """ToolConfig from OPENRLHF_ALP_TOOL_URLS and OPENRLHF_ALP_TIR.

    Raises:
        ValueError: a variable is missing or wrong; the message names it and the fix.
    """
    urls = environment.get(URLS_VARIABLE, "").split()
    if not urls or not environment.get(TOOL_KEY_VARIABLE):
        raise ValueError(
            f"set {URLS_VARIABLE} to the URLs of the tool services, separated by spaces, and "
            f"{TOOL_KEY_VARIABLE} to their key"
        )
    try:
        settings = json.loads(environment.get(SETTINGS_VARIABLE, "{}"))
        config = ToolConfig(**{"void": "off", "template": "chat", **settings, "urls": tuple(urls)})
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{SETTINGS_VARIABLE} is not a JSON object with fields of ToolConfig: {error}"
        ) from error
    if config.void != "off" or config.template == "auto":
        raise ValueError(
            f"{SETTINGS_VARIABLE}: an agent of plain OpenRLHF cannot leave void turns out of the "
            'loss ("void" must be "off") and must know its "template" ("chat" or "plain")'
        )
    return config
