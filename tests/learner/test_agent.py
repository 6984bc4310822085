"""The agent as plain OpenRLHF loads and calls it: on an engine that speaks vLLM's own types."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from openrlhf_alp.learner import agent
from openrlhf_alp.rewards.protocol import RewardUnavailable

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore")]

PROMPT = "Task 2\n"


class LocalEngine:
    """`RolloutRayActor.generate` on a Hugging Face model: greedy, with vLLM's own types."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.seen: list[tuple[list[int], Any]] = []

    async def generate(self, prompt_token_ids: list[int], params: Any) -> Any:
        from vllm import CompletionOutput, RequestOutput
        from vllm.logprobs import Logprob

        self.seen.append((prompt_token_ids, params))
        drawn: list[int] = []
        logprobs = []
        finish_reason, stop_reason = "length", None
        while len(drawn) < params.max_tokens and finish_reason == "length":
            with torch.no_grad():
                logits = self.model(torch.tensor([prompt_token_ids + drawn])).logits[0, -1]
            token = int(logits.argmax())
            drawn.append(token)
            logprobs.append({token: Logprob(torch.log_softmax(logits, -1)[token].item())})
            text = self.tokenizer.decode(drawn)
            hit = next((stop for stop in params.stop if stop in text), None)
            if token == self.tokenizer.eos_token_id or hit:
                finish_reason, stop_reason = "stop", hit
        output = CompletionOutput(
            index=0,
            text=self.tokenizer.decode(drawn),
            token_ids=drawn,
            cumulative_logprob=None,
            logprobs=logprobs,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
        )
        return RequestOutput("r", None, prompt_token_ids, None, [output], finished=True)


@pytest.fixture
async def executor(tool_service: Any, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
    from openrlhf.trainer.ray.vllm_engine import _load_agent_executor

    monkeypatch.setenv("OPENRLHF_ALP_TOOL_URLS", tool_service.url)
    monkeypatch.setenv("OPENRLHF_ALP_TOOL_API_KEY", "tool-key-of-a-test")
    monkeypatch.setenv("OPENRLHF_ALP_TIR", '{"template": "plain", "session": true}')
    executor = _load_agent_executor(agent.__file__)
    yield executor
    executor._reward.close()
    await executor._client.aclose()


async def execute(executor: Any, engine: LocalEngine, **changes: Any) -> dict[str, Any]:
    from vllm import SamplingParams

    arguments = {
        "prompt": PROMPT,
        "label": "2",
        "sampling_params": SamplingParams(max_tokens=60, min_tokens=1, logprobs=1),
        "max_length": 128,
        "hf_tokenizer": engine.tokenizer,
        "llm_engine": engine,
        "images": None,
    }
    return await executor.execute(**{**arguments, **changes})


async def test_openrlhf_gets_an_episode_over_its_own_engine(
    executor: Any, tiny_policy: Path
) -> None:
    from vllm import SamplingParams

    engine = LocalEngine(tiny_policy)
    response = await execute(executor, engine)
    text = engine.tokenizer.decode(response["observation_tokens"])
    assert text == f"{PROMPT}```python\nprint(2)\n```\n```output\n2\n```\n\\boxed{{2}}<eos>"
    assert (response["prompt"], response["label"], response["reward"]) == (PROMPT, "2", 1.0)
    (first, second), logprobs = response["action_ranges"], response["rollout_log_probs"]
    assert len(logprobs) == len(response["observation_tokens"])
    assert set(logprobs[first[1] : second[0]]) == {0.0}
    assert all(value < 0 for value in logprobs[second[0] : second[1]])
    # Turn by turn the engine saw the ids of the episode, and its caller's parameters otherwise.
    assert engine.seen[1][0] == response["observation_tokens"][: second[0]]
    params = engine.seen[0][1]
    assert (params.min_tokens, params.temperature) == (0, 1.0) and "```\n" in params.stop

    without = await execute(executor, engine, sampling_params=SamplingParams(max_tokens=60))
    assert without["rollout_log_probs"] is None
    assert without["observation_tokens"] == response["observation_tokens"]


async def test_what_the_agent_cannot_do_is_an_error_by_name(
    executor: Any, tiny_policy: Path
) -> None:
    engine = LocalEngine(tiny_policy)
    with pytest.raises(ValueError, match="leaves no room"):
        await execute(executor, engine, max_length=5)
    with pytest.raises(ValueError, match="text only"):
        await execute(executor, engine, images=["a"])
    with pytest.raises(RewardUnavailable, match="label_not_parsable"):
        await execute(executor, engine, label="")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "set OPENRLHF_ALP_TOOL_URLS"),
        ({"OPENRLHF_ALP_TIR": "{"}, "OPENRLHF_ALP_TIR is not a JSON object"),
        ({"OPENRLHF_ALP_TIR": '{"tools": 1}'}, "OPENRLHF_ALP_TIR is not a JSON object"),
        ({"OPENRLHF_ALP_TIR": '{"max_tool_turns": -1}'}, "max_tool_turns=-1"),
        ({"OPENRLHF_ALP_TIR": '{"void": "turn"}'}, "cannot leave void turns out"),
        ({"OPENRLHF_ALP_TIR": '{"template": "auto"}'}, 'must know its "template"'),
    ],
)
def test_a_wrong_environment_names_the_variable(environment: dict[str, str], message: str) -> None:
    right = {
        "OPENRLHF_ALP_TOOL_URLS": "http://127.0.0.1:1 http://127.0.0.1:2",
        "OPENRLHF_ALP_TOOL_API_KEY": "k",
    }
    assert agent.read_environment(right).urls == ("http://127.0.0.1:1", "http://127.0.0.1:2")
    wrong = {**right, **environment} if environment else {}
    with pytest.raises(ValueError, match=message):
        agent.read_environment(wrong)
