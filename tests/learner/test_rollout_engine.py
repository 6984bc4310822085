"""Prompts become episodes over a real service, and exactly the dictionary OpenRLHF reads."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from openrlhf_alp.clients.errors import (
    DeadlineExceeded,
    IncompleteReply,
    InvalidReply,
    RequestRejected,
    ServiceUnavailable,
)
from openrlhf_alp.clients.rollout import RolloutClient
from openrlhf_alp.clients.server_watch import NoServerLeft, ServerWatch
from openrlhf_alp.episodes.records import BadCompletionError
from openrlhf_alp.learner.flags.config import ServiceConfig
from openrlhf_alp.learner.rollout_engine import RolloutEngine
from openrlhf_alp.rewards.protocol import RewardResult, RewardUnavailable

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore")]

SERVICE = ServiceConfig(
    urls=(),
    request_timeout_s=60.0,
    ready_timeout_s=60.0,
    max_staleness=None,
    preflight_every=0,
    preflight_stop=False,
    metrics_jsonl=None,
)
SAMPLING = SimpleNamespace(temperature=1.0, top_p=1.0, top_k=-1, max_tokens=6, min_tokens=1)
PROMPT = "What is 3 + 4?"


class LengthReward:
    """Scores the answer's length; fails on the answers it is told to."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures

    async def score(self, *, prompt: str, response: str, label: str) -> RewardResult:
        if self.failures > 0:
            self.failures -= 1
            raise RewardUnavailable(reason="timeout", detail="no answer in 1 s")
        return RewardResult(value=float(len(response)), detail={"answered": 1.0})


@pytest.fixture
async def engine(hf_service: Any) -> AsyncIterator[RolloutEngine]:
    engine = RolloutEngine(
        urls=[hf_service.url],
        api_key="api-key-of-a-test",
        admin_key="admin-key-of-a-test",
        service=SERVICE,
        reward_urls=["math-verify"],
    )
    engine.reward = LengthReward()
    yield engine
    await engine.client.aclose()


async def generate(engine: RolloutEngine, model: Path, **kwargs: Any) -> list[dict[str, Any]]:
    arguments = {
        "prompt": PROMPT,
        "label": "7",
        "sampling_params": SAMPLING,
        "max_length": 64,
        "hf_tokenizer": AutoTokenizer.from_pretrained(model),
        "num_samples": 3,
    }
    return await engine.generate_responses(**{**arguments, **kwargs})


async def test_a_prompt_gives_exactly_n_responses(engine: RolloutEngine, tiny_model: Path) -> None:
    responses = await generate(engine, tiny_model)
    prompt_ids = AutoTokenizer.from_pretrained(tiny_model)(PROMPT)["input_ids"]
    assert len(responses) == 3
    for response in responses:
        tokens = response["observation_tokens"]
        assert tokens[: len(prompt_ids)] == prompt_ids
        assert response["action_ranges"] == [(len(prompt_ids), len(tokens))]
        logprobs = response["rollout_log_probs"]
        assert len(logprobs) == len(tokens)
        assert set(logprobs[: len(prompt_ids)]) == {0.0}
        assert all(value < 0 for value in logprobs[len(prompt_ids) :])
        assert (response["prompt"], response["label"]) == (PROMPT, "7")
    assert len({tuple(response["extra_logs"]) for response in responses}) == 1
    assert engine.get_num_unfinished_requests() == 0


async def test_one_failed_reward_drops_the_whole_group_and_is_counted(
    engine: RolloutEngine, tiny_model: Path
) -> None:
    engine.reward = LengthReward(failures=1)
    assert await generate(engine, tiny_model) == []
    assert Counter(engine.take_dropped_groups()) == {"timeout": 1}
    assert engine.take_dropped_groups() == {}


class BrokenClient(RolloutClient):
    """The real client, until it is told what the first requests suffer."""

    errors: list[Exception]

    async def generate(self, request: Any) -> Any:
        if self.errors:
            raise self.errors.pop()
        return await super().generate(request)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (DeadlineExceeded("too slow"), "request_too_slow"),
        (InvalidReply("no log-probs"), "invalid_reply"),
        (IncompleteReply("cut"), "invalid_reply"),
        (ServiceUnavailable("gone for a while"), "request_lost"),
        (BadCompletionError("empty"), "bad_completion"),
    ],
)
async def test_one_lost_request_drops_its_group_by_name(
    engine: RolloutEngine, hf_service: Any, tiny_model: Path, error: Exception, reason: str
) -> None:
    engine.client = BrokenClient([hf_service.url], api_key="api-key-of-a-test")
    engine.client.errors = [error]
    assert await generate(engine, tiny_model) == []
    assert engine.take_dropped_groups() == {reason: 1}
    assert engine.get_num_lost_groups() == 1
    # The next group is not touched by it.
    assert len(await generate(engine, tiny_model)) == 3
    assert engine.get_num_lost_groups() == 1 and engine.get_num_unfinished_requests() == 0


async def test_a_refused_request_ends_the_run(engine: RolloutEngine, tiny_model: Path) -> None:
    wrong = SimpleNamespace(**{**vars(SAMPLING), "max_tokens": 10_000})
    with pytest.raises(RequestRejected):
        await generate(engine, tiny_model, sampling_params=wrong, max_length=20_000)


async def test_without_any_server_the_wait_ends_with_their_names() -> None:
    client = RolloutClient(["http://127.0.0.1:9"], api_key="k")
    watch = ServerWatch(lambda: client.control.fleet.servers, patience_s=0.5)
    with pytest.raises(
        NoServerLeft, match=r"none of http://127\.0\.0\.1:9 has been ready for 0\.5 s"
    ):
        await asyncio.gather(*(watch.unless_all_are_gone(asyncio.sleep(60)) for _ in range(3)))
    await client.aclose()


async def test_a_wait_longer_than_the_patience_is_no_loss_while_a_server_is_there(
    hf_service: Any,
) -> None:
    client = RolloutClient(["http://127.0.0.1:9", hf_service.url], api_key="k")
    watch = ServerWatch(lambda: client.control.fleet.servers, patience_s=3.0)
    assert await watch.unless_all_are_gone(asyncio.sleep(4, "answer")) == "answer"
    await client.aclose()


async def test_a_server_without_the_weights_is_told_from_one_that_is_gone(hf_service: Any) -> None:
    for url, lost in ((hf_service.url, True), ("http://127.0.0.1:9", False)):
        client = RolloutClient([url], api_key="k")
        fleet = client.control.fleet
        watch = ServerWatch(lambda fleet=fleet: fleet.servers, patience_s=1.0)
        assert not await watch.all_lost_the_weights()
        fleet.mark_stale(fleet.servers[0], "serves version 0, needed is 3")
        assert await watch.all_lost_the_weights() is lost
        await client.aclose()


async def test_a_prompt_without_room_for_an_answer_is_dropped_by_name(
    engine: RolloutEngine, tiny_model: Path
) -> None:
    assert await generate(engine, tiny_model, max_length=5) == []
    assert engine.take_dropped_groups() == {"prompt_too_long": 1}


async def test_answers_fill_the_context_when_no_limit_is_given(
    engine: RolloutEngine, tiny_model: Path
) -> None:
    unlimited = SimpleNamespace(**{**vars(SAMPLING), "max_tokens": None})
    responses = await generate(engine, tiny_model, sampling_params=unlimited, max_length=24)
    assert max(len(response["observation_tokens"]) for response in responses) <= 24
