"""Random faults on every hop while the weights keep changing: nothing lost, doubled or mislabelled.

The faults of the plan, each drawn for a share of the calls to two servers:

    refuse    the connection is refused                  drop_request  it breaks before the service
    503, 429  an overloaded or restarting service        drop_reply    it breaks after the service
    500       a bug in the service                       truncate      the reply is cut short
    slow      other work runs first

Then the faults of the engine itself: killed after k tokens, a NaN.
"""

import asyncio
import random
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import LlamaForCausalLM

from openrlhf_alp.clients.errors import InvalidReply
from openrlhf_alp.clients.weights.carry import in_buckets
from openrlhf_alp.clients.weights.push import WeightPusher
from services.rollout.settings import FaultPlan as EngineFaults
from services.rollout.wire.schemas import GenerateRequest, GenerateResponse, Sampling

NUM_REQUESTS = 300
NUM_UPDATES = 5
MIN_FAULTS = 1_000
PROMPT = [1, 2, 3]
FAULTS = ("refuse", "drop_request", "drop_reply", "truncate", "429", "500", "503", "slow")
FAULT_SHARE = 0.85


class FaultPlan(httpx.AsyncBaseTransport):
    """Stands between client and services and breaks generate calls as a seeded generator says."""

    def __init__(self, network: httpx.AsyncBaseTransport, seed: int) -> None:
        self._network = network
        self._random = random.Random(seed)
        self.num_faults = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        is_generate = request.url.path == "/v1/generate"
        if not is_generate or self._random.random() > FAULT_SHARE:
            return await self._network.handle_async_request(request)
        self.num_faults += 1
        fault = self._random.choice(FAULTS)
        if fault == "refuse":
            raise httpx.ConnectError("refused")
        if fault == "drop_request":
            raise httpx.RemoteProtocolError("cut before")
        if fault.isdigit():
            return httpx.Response(int(fault), headers={"retry-after": "0"}, request=request)
        if fault == "slow":
            for _ in range(self._random.randrange(50)):
                await asyncio.sleep(0)
        response = await self._network.handle_async_request(request)
        if fault == "drop_reply":
            raise httpx.ReadError("cut after")
        if fault == "truncate":
            content = await response.aread()
            half = content[: len(content) // 2]
            headers = {"content-type": response.headers["content-type"]}
            return httpx.Response(response.status_code, headers=headers, content=half)
        return response


def log_probs(model: LlamaForCausalLM, token_ids: list[int]) -> torch.Tensor:
    """(N,) log-probs of a sample by one plain forward pass."""
    ids = torch.tensor([PROMPT + token_ids])
    with torch.no_grad():
        logits = model(ids).logits[0, len(PROMPT) - 1 : -1]
    return torch.log_softmax(logits, -1).gather(-1, ids[0, len(PROMPT) :, None])[:, 0]


def assert_labelled(reply: GenerateResponse, models: dict[str, LlamaForCausalLM]) -> None:
    """Each token's log-prob is that of the weights whose digest its span names."""
    for sample in reply.samples:
        served = torch.tensor(sample.logprobs)
        for span in sample.spans:
            own = log_probs(models[span.digest], sample.token_ids)[span.start : span.end]
            torch.testing.assert_close(served[span.start : span.end], own, atol=1e-4, rtol=0)


async def test_a_thousand_faults_lose_double_and_mislabel_nothing(
    make_service: Any, network: Any, make_client: Any, model_folder: Path
) -> None:
    services = {host: make_service() for host in "ab"}
    urls = [network.add(host, service) for host, service in services.items()]
    pusher = WeightPusher(
        urls, api_key="x", admin_key="x", make_client=lambda: make_client(*urls).control
    )
    plan = FaultPlan(network, seed=0)
    model = LlamaForCausalLM.from_pretrained(model_folder)
    models = {services["a"].contract().digest: LlamaForCausalLM.from_pretrained(model_folder)}
    replies: dict[str, GenerateResponse] = {}

    async with make_client(*urls, transport=plan) as client:

        async def one(index: int) -> None:
            request = GenerateRequest(
                request_id=f"q-{index}", token_ids=PROMPT, sampling=Sampling(max_tokens=4)
            )
            reply = await client.generate(request)
            assert request.request_id not in replies
            replies[request.request_id] = reply

        async def update() -> None:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.1)
            tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            pushed = await pusher.push_async(in_buckets(tensors.items()))
            copy = LlamaForCausalLM.from_pretrained(model_folder)
            copy.load_state_dict(tensors)
            models[pushed.digest] = copy

        share = NUM_REQUESTS // NUM_UPDATES
        for wave in range(NUM_UPDATES):
            requests = [
                asyncio.create_task(one(index)) for index in range(wave * share, (wave + 1) * share)
            ]
            while len(replies) < wave * share + share // 2:
                await asyncio.sleep(0)
            await update()
            await asyncio.gather(*requests)

    assert plan.num_faults >= MIN_FAULTS
    assert len(replies) == NUM_REQUESTS
    for reply in replies.values():
        assert_labelled(reply, models)
    spans = [s for reply in replies.values() for sample in reply.samples for s in sample.spans]
    assert {span.version for span in spans} >= set(range(NUM_UPDATES))


async def test_what_an_engine_killed_after_k_tokens_left_is_drawn_by_another_server(
    make_service: Any, network: Any, make_client: Any, model_folder: Path
) -> None:
    killed = make_service(faults=EngineFaults(kill_after_tokens=11))
    healthy = make_service()
    urls = [network.add("a", killed), network.add("b", healthy)]
    models = {killed.contract().digest: LlamaForCausalLM.from_pretrained(model_folder)}
    sampling = Sampling(max_tokens=4, ignore_eos=True)
    requests = [
        GenerateRequest(request_id=f"q-{i}", token_ids=PROMPT, n=2, sampling=sampling)
        for i in range(8)
    ]
    async with make_client(*urls) as client:
        replies = await asyncio.gather(*(client.generate(request) for request in requests))
    assert [reply.request_id for reply in replies] == [f"q-{i}" for i in range(8)]
    for reply in replies:
        assert [len(sample.token_ids) for sample in reply.samples] == [4, 4]
        assert_labelled(reply, models)
    # Four requests were balanced to each; the killed engine had eight jobs and finished none.
    assert (killed.engine.num_drawn, killed.versions.num_running) == (11, 0)
    assert (healthy.engine.num_jobs, healthy.engine.num_drawn) == (16, 64)


async def test_a_nan_log_prob_of_the_engine_is_never_a_reply(
    make_service: Any, network: Any, make_client: Any
) -> None:
    service = make_service(faults=EngineFaults(nan_at_token=3))
    sampling = Sampling(max_tokens=4, ignore_eos=True)
    request = GenerateRequest(request_id="q", token_ids=PROMPT, sampling=sampling)
    async with make_client(network.add("a", service)) as client:
        with pytest.raises(InvalidReply, match=r"not a finite number.*Fix:"):
            await client.generate(request)
        assert len((await client.generate(request)).samples[0].logprobs) == 4
