"""Rollouts become experience, with an "old" pass where it is read; lost groups are replaced."""

from __future__ import annotations

import asyncio
import sys
from collections import defaultdict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from openrlhf.trainer.ppo_utils.experience import Experience

from openrlhf_alp.learner.experience import (
    SAMPLE_ID,
    TOKEN_VERSIONS,
    AlpExperienceMaker,
    AlpSamplesGenerator,
    _masked_rollout_log_probs,
)
from openrlhf_alp.learner.flags.config import AlpConfig, ServiceConfig
from openrlhf_alp.objective.methods import METHODS


def response(prompt: str) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "label": "7",
        "observation_tokens": [5, 6, 7, 8],
        "action_ranges": [(2, 4)],
        "rollout_log_probs": [0.0, 0.0, -0.5, -0.25],
        "reward": 1.0,
        "scores": 1.0,
        "truncated": False,
        "token_versions": [(3, 1), (4, 1)],
        "extra_logs": {},
    }


def generator(samples_per_prompt: int = 2) -> AlpSamplesGenerator:
    args = SimpleNamespace(
        rollout=SimpleNamespace(n_samples_per_prompt=samples_per_prompt),
        rollout_service=ServiceConfig(urls=("http://127.0.0.1:1",)),
    )
    return AlpSamplesGenerator(SimpleNamespace(args=args), None, None, None, [])


def test_every_sample_of_a_run_has_its_own_number() -> None:
    ours = generator()
    ids = [
        int(ours._process_response_into_experience(response("a")).info[SAMPLE_ID]) for _ in range(4)
    ]
    assert ids == [0, 1, 2, 3]


def test_the_rollouts_log_probs_take_the_place_of_the_old_ones() -> None:
    experience = generator()._process_response_into_experience(response("a"))
    # Shifted to predictions: positions 1, 2, 3 of the episode; the first is still the prompt's.
    assert _masked_rollout_log_probs(experience).tolist() == [[0.0, -0.5, -0.25]]


class Group:
    """In place of the policy's workers: counts the forward passes that are asked for."""

    def __init__(self) -> None:
        self.methods: list[str] = []

    def async_run_method_batch(self, *, method_name: str, **kwargs: Any) -> str:
        self.methods.append(method_name)
        return "log-probs of the old policy"


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_forward_pass_of_the_old_policy_is_made_only_for_methods_that_read_it(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "put", lambda value: value)
    maker = object.__new__(AlpExperienceMaker)
    maker.args = SimpleNamespace(
        alp=AlpConfig(method=method), ds=SimpleNamespace(ring_attn_size=1, tensor_parallel_size=1)
    )
    maker.actor_model_group = Group()
    maker._samples_list = [generator()._process_response_into_experience(response("a"))]
    found = maker._dispatch_forward(maker.actor_model_group, False)
    if METHODS[method].objective.denominator == "old":
        assert maker.actor_model_group.methods == ["forward"]
        assert found == "log-probs of the old policy"
    else:
        assert maker.actor_model_group.methods == []
        assert found[0][0].tolist() == [[0.0, -0.5, -0.25]]


def test_a_sample_says_which_version_sampled_each_of_its_tokens() -> None:
    experience = generator()._process_response_into_experience(response("a"))
    assert experience.info[TOKEN_VERSIONS] == [[(3, 1), (4, 1)]]


def test_a_rollout_without_log_probs_is_refused() -> None:
    with pytest.raises(ValueError, match="without log-probs"):
        _masked_rollout_log_probs(Experience(sequences=torch.zeros(1, 2)))


@ray.remote
class Engine:
    """Answers a prompt when its turn has come; loses the groups that it is told to."""

    def __init__(self, dropped: str, slow: dict[str, str], num_lost: int = 0) -> None:
        self.dropped, self.slow, self.num_lost = set(dropped), slow, num_lost
        self.started: list[str] = []
        self.events: dict[str, asyncio.Event] = defaultdict(asyncio.Event)

    async def generate_responses(
        self, prompt: str, num_samples: int, **_: Any
    ) -> list[dict[str, Any]]:
        self.started.append(prompt)
        self.events[prompt].set()
        if prompt in self.slow:  # until another prompt has been asked for
            await asyncio.wait_for(self.events[self.slow[prompt]].wait(), 20)
        if prompt in self.dropped:
            return []
        return [response(prompt)] * num_samples

    def get_num_unfinished_requests(self) -> int:
        return 0

    def get_num_lost_groups(self) -> int:
        lost = self.dropped & set(self.started)
        return len(lost) if self.num_lost else 0

    def get_started(self) -> list[str]:
        return self.started


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    # The worker cannot import a test module by name.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    ray.shutdown()


def batch(engine: Any, prompts: str, num_prompts: int) -> tuple[list[str], int, bool]:
    """Prompts of the samples that came, prompts taken, and whether the data ran out."""
    ours = generator()
    ours.vllm_engines = [engine]
    ours.args.algo = SimpleNamespace(advantage=SimpleNamespace(is_correction_level="off"))
    rows = iter([(["set"], [prompt], ["7"], [None]) for prompt in prompts])
    experiences, consumed, exhausted = ours._generate_vllm(
        rows, num_prompts, False, max_new_tokens=4
    )
    return sorted(e.prompts[0] for e in experiences), consumed, exhausted


@pytest.mark.e2e
@pytest.mark.filterwarnings("ignore")  # Ray leaves pipes open
def test_a_dropped_group_is_replaced_while_the_others_still_run(local_ray: None) -> None:
    # c ends only once e has been asked for, so a second wave after c would never begin.
    engine = Engine.remote("bd", {"c": "e"})
    came, consumed, exhausted = batch(engine, "abcdef", 3)
    assert came == list("aaccee")
    assert ray.get(engine.get_started.remote()) == list("abcde")
    assert consumed == 5 and not exhausted


@pytest.mark.e2e
@pytest.mark.filterwarnings("ignore")  # Ray leaves pipes open
def test_a_data_set_that_runs_out_ends_the_search(local_ray: None) -> None:
    assert batch(Engine.remote("ab", {}), "ab", 2) == ([], 2, True)
    assert batch(Engine.remote("a", {}), "abc", 3) == (list("bbcc"), 3, True)
    assert batch(Engine.remote("", {}), "", 3) == ([], 0, True)


@pytest.mark.e2e
@pytest.mark.filterwarnings("ignore")  # Ray leaves pipes open
def test_a_batch_that_loses_most_of_its_requests_ends_the_run(local_ray: None) -> None:
    assert batch(Engine.remote("ab", {}, 1), "abcdefgh", 4)[0] == list("ccddeeff")
    with pytest.raises(RuntimeError, match=r"3 groups of a batch of 4 .*max_lost_share 0\.5"):
        batch(Engine.remote("abc", {}, 1), "abcdefgh", 4)
    # What the data is to blame for does not end it.
    assert batch(Engine.remote("abc", {}), "abcdefgh", 4)[0] == list("ddeeffgg")
