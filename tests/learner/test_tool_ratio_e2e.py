"""With equal weights, several turns move the log-ratio no further than one: nothing is re-encoded.

vLLM serves a tiny model in bfloat16 and samples the same kind of text twice: as one turn in which
the policy writes the tool's output itself, and as a tool-integrated episode. The learner's own
forward then scores the sampled tokens.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.policies.tiny_policy import save_tiny_policy
from openrlhf_alp.learner.flags.config import ServiceConfig
from openrlhf_alp.learner.rollout_engine import RolloutEngine
from openrlhf_alp.rollouts.runners import ToolConfig

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(900),
]

NUM_SAMPLES = 192
SAMPLING = SimpleNamespace(temperature=1.0, top_p=1.0, top_k=-1, max_tokens=60)
SERVICE = ServiceConfig(
    urls=(),
    request_timeout_s=300.0,
    ready_timeout_s=60.0,
    max_staleness=None,
    preflight_every=0,
    preflight_stop=False,
    metrics_jsonl=None,
)
LARGEST_RATIO = 1.5


@pytest.fixture(scope="module")
def half_precision_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dialogues = [
        (
            f"Task {k}\n",
            f"```python\nprint({k})\n```\n```output\n{k}\n```\n\\boxed{{{k}}}<eos>",
        )
        for k in range(4)
    ]
    folder = tmp_path_factory.mktemp("half-precision-policy")
    # Not learnt to the last digit: a policy without entropy has no log-ratio to compare.
    return save_tiny_policy(folder, dialogues, dtype=torch.bfloat16, good_loss=0.05)


async def rollouts(engine: RolloutEngine, tokenizer: Any) -> list[dict[str, Any]]:
    responses = []
    for k in range(4):
        responses += await engine.generate_responses(
            prompt=f"Task {k}\n",
            label=str(k),
            sampling_params=SAMPLING,
            max_length=128,
            hf_tokenizer=tokenizer,
            num_samples=NUM_SAMPLES,
        )
    return responses


def log_ratios(model: Any, responses: list[dict[str, Any]]) -> np.ndarray:
    """Learner minus served log-prob of every sampled token."""
    found = []
    for response in responses:
        ids = torch.tensor([response["observation_tokens"]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].float()
        own = torch.log_softmax(logits, -1).gather(-1, ids[0, 1:, None])[:, 0]
        served = torch.tensor(response["rollout_log_probs"][1:])
        for start, end in response["action_ranges"]:
            found.append((own - served)[start - 1 : end - 1])
    return torch.cat(found).numpy()


async def test_tool_turns_leave_the_spread_of_the_log_ratio_where_one_turn_has_it(
    half_precision_policy: Path, tool_service: Any, start_service: Any, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(half_precision_policy)
    model = AutoModelForCausalLM.from_pretrained(half_precision_policy, dtype=torch.bfloat16)
    tool = ToolConfig(urls=(tool_service.url,), void="off", template="plain")
    with start_service(half_precision_policy, tmp_path) as service:
        measured = {}
        for name, setting in (("one", None), ("several", tool)):
            engine = RolloutEngine(
                urls=[service.url],
                api_key="api-key-of-a-test",
                admin_key="admin-key-of-a-test",
                service=SERVICE,
                reward_urls=["math-verify"],
                tool=setting,
                tool_key="tool-key-of-a-test",
            )
            responses = await rollouts(engine, tokenizer)
            await engine.client.aclose()
            if engine.tool_client is not None:
                await engine.tool_client.aclose()
            measured[name] = np.abs(log_ratios(model, responses))
    calls = sum(response["extra_logs"]["tir/tool_calls"] for response in responses)
    assert calls > NUM_SAMPLES
    one, several = (np.quantile(measured[name], 0.99) for name in ("one", "several"))
    print(f"P99 of |log-ratio|: one turn {one:.4f}, several turns {several:.4f}")
    assert 0 < several <= LARGEST_RATIO * one
