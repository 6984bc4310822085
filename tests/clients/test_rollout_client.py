import asyncio
import logging
from dataclasses import replace
from typing import Any

import httpx
import msgpack
import pytest

from openrlhf_alp.clients.errors import (
    DeadlineExceeded,
    InvalidReply,
    RequestRejected,
    ServiceUnavailable,
    Unauthorized,
)
from openrlhf_alp.clients.fleet import ServerState
from openrlhf_alp.clients.rollout import RolloutClient
from services.common.wire import MSGPACK_TYPE, decode
from services.rollout.wire.schemas import GenerateRequest, Sampling


def request(request_id: str = "r-1", **changes: Any) -> GenerateRequest:
    fields = {"request_id": request_id, "token_ids": [1, 2, 3], "sampling": Sampling(max_tokens=4)}
    return GenerateRequest.model_validate({**fields, **changes})


async def test_a_request_comes_back_whole(
    make_service: Any, network: Any, make_client: Any
) -> None:
    async with make_client(network.add("a", make_service())) as client:
        contract = await client.control.contract()
        reply = await client.generate(request(n=3))
    assert [len(s.token_ids) == len(s.logprobs) > 0 for s in reply.samples] == [True] * 3
    assert reply.contract_hash == contract.contract_hash
    assert {span.version for s in reply.samples for span in s.spans} == {0}


@pytest.mark.parametrize("failure", ["refused", "cut", "429", "503"])
async def test_a_failed_attempt_is_repeated_under_the_same_id(
    make_service: Any, network: Any, make_client: Any, failure: str
) -> None:
    urls = [network.add("a", make_service()), network.add("b", make_service())]
    ids = []

    def before(sent: httpx.Request) -> httpx.Response | None:
        ids.append(GenerateRequest.model_validate(_decoded(sent)).request_id)
        if len(ids) > 1:
            return None
        if failure == "refused":
            raise httpx.ConnectError("refused")
        if failure == "cut":
            raise httpx.RemoteProtocolError("cut")
        return httpx.Response(int(failure), headers={"retry-after": "0"}, request=sent)

    network.before = before
    async with make_client(*urls) as client:
        reply = await client.generate(request("same"))
    assert reply.request_id == "same"
    assert ids == ["same", "same"]
    # A connection lost in mid-request may have left a run behind, to which the retry attaches.
    assert [host for host, _ in network.calls] == ["a", "a" if failure == "cut" else "b"]


async def test_a_burst_that_is_told_to_come_back_later_is_one_warning_per_server(
    make_service: Any, network: Any, make_client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    urls = [network.add("a", make_service()), network.add("b", make_service())]
    seen: set[str] = set()

    def full_at_first(sent: httpx.Request) -> httpx.Response | None:
        request_id = GenerateRequest.model_validate(_decoded(sent)).request_id
        if request_id in seen:
            return None
        seen.add(request_id)
        return httpx.Response(429, headers={"retry-after": "0"}, request=sent)

    network.before = full_at_first
    caplog.set_level(logging.DEBUG, "openrlhf_alp.clients.fleet")
    async with make_client(*urls) as client:
        await asyncio.gather(*(client.generate(request(f"r{index}")) for index in range(8)))
    retries = [record for record in caplog.records if "attempt 1" in record.message]
    warnings = [record.message for record in retries if record.levelno == logging.WARNING]
    assert len(retries) == 8
    assert [sum(url in message for message in warnings) for url in urls] == [1, 1]


async def test_a_reply_lost_on_the_way_back_costs_the_engine_nothing(
    make_service: Any, network: Any, make_client: Any
) -> None:
    service = make_service()
    num_lost = 0

    def lose_the_first_reply(sent: httpx.Request, _: httpx.Response) -> None:
        nonlocal num_lost
        if num_lost == 0:
            num_lost += 1
            raise httpx.ReadError("connection reset")

    network.after = lose_the_first_reply
    async with make_client(network.add("a", service)) as client:
        reply = await client.generate(request(n=2))
    assert len(reply.samples) == 2
    assert (num_lost, service.engine.num_jobs) == (1, 2)


async def test_a_cancelled_call_frees_the_slot_on_the_server(
    make_service: Any, network: Any, make_client: Any
) -> None:
    service = make_service()
    await service.engine.pause("keep")
    async with make_client(network.add("a", service)) as client:
        call = asyncio.create_task(client.generate(request()))
        while service.versions.num_running == 0:
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait([call])
    assert ("a", "/v1/generate/r-1") in network.calls
    assert service.versions.num_running == 0


async def test_the_least_loaded_server_is_asked(
    make_service: Any, network: Any, make_client: Any
) -> None:
    services = {host: make_service() for host in "ab"}
    urls = [network.add(host, service) for host, service in services.items()]
    for service in services.values():
        await service.engine.pause("keep")
    async with make_client(*urls) as client:
        heavy = asyncio.create_task(client.generate(request("heavy", n=4)))
        light = [asyncio.create_task(client.generate(request(f"l{i}"))) for i in range(3)]
        while sum(service.versions.num_running for service in services.values()) < 7:
            await asyncio.sleep(0)
        assert services["a"].versions.num_running == 4
        assert services["b"].versions.num_running == 3
        for service in services.values():
            await service.engine.resume()
        await asyncio.gather(heavy, *light)


async def test_no_server_is_service_unavailable_with_a_fix_and_in_time(
    network: Any, make_client: Any
) -> None:
    def refuse(_: httpx.Request) -> None:
        raise httpx.ConnectError("refused")

    network.before = refuse
    async with make_client("http://a", total_s=0.2) as client:
        async with asyncio.timeout(5):
            with pytest.raises(ServiceUnavailable, match=r"http://a.*Fix:"):
                await client.generate(request())
            with pytest.raises(ServiceUnavailable, match=r"Not ready.*http://a"):
                await client.control.wait_ready(0.05)
    assert len(network.calls) > 2


async def test_a_server_that_never_answers_runs_into_the_total_limit(
    make_service: Any, network: Any, make_client: Any
) -> None:
    service = make_service()
    await service.engine.pause("keep")
    async with make_client(network.add("a", service), total_s=0.2) as client:
        async with asyncio.timeout(5):
            with pytest.raises(ServiceUnavailable):
                await client.generate(request())


async def test_a_wrong_request_is_not_repeated(
    make_service: Any, network: Any, make_client: Any
) -> None:
    async with make_client(network.add("a", make_service())) as client:
        with pytest.raises(RequestRejected, match="vocabulary") as raised:
            await client.generate(request(token_ids=[34]))
    assert (raised.value.status, raised.value.field) == (422, "token_ids")
    assert len(network.calls) == 1


async def test_a_wrong_key_says_so(make_service: Any, network: Any, make_client: Any) -> None:
    url = network.add("a", make_service())
    async with make_client(url, api_key="not-the-key") as client:
        with pytest.raises(Unauthorized, match="key"):
            await client.generate(request())


async def test_a_deadline_is_its_own_error(
    make_service: Any, network: Any, make_client: Any
) -> None:
    service = make_service()
    await service.engine.pause("keep")
    async with make_client(network.add("a", service)) as client:
        with pytest.raises(DeadlineExceeded):
            await client.generate(request(deadline_s=0.02))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"logprobs": []}, "log-probs"),
        ({"logprobs": [float("inf")] * 4}, "finite"),
        ({"spans": []}, "spans"),
    ],
)
async def test_a_reply_that_must_not_be_trained_on_is_refused(
    network: Any, make_client: Any, change: dict[str, Any], match: str
) -> None:
    sample = {
        "token_ids": [1, 2, 3, 4],
        "logprobs": [-1.0] * 4,
        "finish_reason": "length",
        "stop_reason": None,
        "spans": [{"version": 0, "digest": "d", "start": 0, "end": 4}],
        **change,
    }
    body = {
        "request_id": "r-1",
        "samples": [sample],
        "contract_hash": "c",
        "version": 0,
        "timings": {"total_s": 0.0},
    }
    content = msgpack.packb(body)
    network.before = lambda sent: httpx.Response(
        200, content=content, headers={"content-type": MSGPACK_TYPE}, request=sent
    )
    async with make_client("http://a") as client:
        with pytest.raises(InvalidReply, match=match):
            await client.generate(request())


async def test_servers_with_different_contracts_are_refused(
    make_service: Any, network: Any, make_client: Any
) -> None:
    odd = make_service()
    static = odd.static_contract.model_copy(update={"contract_hash": "another"})
    urls = [
        network.add("a", make_service()),
        network.add("b", replace(odd, static_contract=static)),
    ]
    async with make_client(*urls) as client:
        with pytest.raises(InvalidReply, match="http://b and http://a"):
            await client.control.contract()


async def test_a_request_under_way_while_weights_are_pushed_may_bring_older_tokens(
    make_service: Any, network: Any, make_client: Any
) -> None:
    async with make_client(network.add("a", make_service()), total_s=1.0) as client:
        # The server answers with version 0; before the reply is read, version 1 is required.
        network.after = lambda *_: client.require_version(1)
        reply = await client.generate(request())
        assert {span.version for span in reply.samples[0].spans} == {0}
        assert states(client) == {"http://a": ServerState.HEALTHY}
        with pytest.raises(ServiceUnavailable, match="No server serves version 1"):
            await client.generate(request("r-2"))


def test_a_client_without_urls_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="service_urls"):
        RolloutClient([], api_key="x")


def states(client: RolloutClient) -> dict[str, ServerState]:
    return {server.channel.url: server.state for server in client.control.fleet.servers}


def _decoded(sent: httpx.Request) -> Any:
    return decode(sent.content, MSGPACK_TYPE)
