"""Pushes from GPU to GPU serve what a shared folder would have brought, or nothing new at all."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch

from openrlhf_alp.clients.channel import Timeouts
from openrlhf_alp.clients.errors import WeightUpdateFailed
from openrlhf_alp.clients.weights.carry import carry_weights, in_buckets
from services.rollout.service import RolloutService
from services.rollout.wire.schemas import CommitRequest, PrepareRequest

OPEN, RECEIVE = "/v1/weights/transfer/open", "/v1/weights/transfer/receive"


def served(service: RolloutService) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = service.engine._model.state_dict()  # type: ignore[attr-defined]
    return state


@pytest.mark.parametrize("transport", ["nccl", "ipc"])
async def test_what_is_served_after_a_transfer_is_what_a_shared_folder_would_have_brought(
    fleet: Any, meetings: Any, shared_memory: dict[bytes, torch.Tensor], transport: str
) -> None:
    service = fleet.add()
    first, second = fleet.weights(0.5), fleet.weights(0.25)
    by_file = await fleet.push("file", first.items())
    expected = await fleet.answer(fleet.urls[0], "file")
    await fleet.push("file", second.items())
    pushed = await fleet.push(transport, first.items())
    assert (pushed.version, pushed.digest) == (3, by_file.digest)
    assert service.contract().digest == by_file.digest
    assert pushed.num_bytes == by_file.num_bytes
    answer = await fleet.answer(fleet.urls[0], transport)
    assert answer[:2] == expected[:2]
    assert (expected[2], answer[2]) == ({1}, {3})
    again = await fleet.push(transport, first.items())
    assert (again.version, again.num_bytes, again.digest) == (4, 0, by_file.digest)
    assert bool(shared_memory) == (transport == "ipc")
    assert sorted(meetings.ranks) == ([0, 1] if transport == "nccl" else [])


async def test_servers_of_one_and_two_workers_share_a_group_and_only_one_worker_of_each_writes(
    fleet: Any, meetings: Any
) -> None:
    fleet.add(), fleet.add(num_gpus=2), fleet.add()
    new = fleet.weights(0.5)
    pushed = await fleet.push("nccl", new.items())
    assert sorted(meetings.ranks) == [0, 1, 2, 3, 4]
    for service in fleet.services:
        assert service.contract().digest == pushed.digest
        assert all(torch.equal(served(service)[name], tensor) for name, tensor in new.items())


async def test_buckets_and_their_chunks_are_put_together_again(fleet: Any, meetings: Any) -> None:
    service = fleet.add()
    new = fleet.weights(0.5)
    expected = service.weights.status().tensors
    async with fleet.make_client(*fleet.urls).control as client:
        async with fleet.carrier(client, "u", buffer_bytes=2500) as carrier:
            carried = await carry_weights(carrier, in_buckets(new.items(), 6000), expected)
            assert len(carried.files) > 1
            prepare = PrepareRequest(version=1, digest=carried.digest, files=list(carried.files))
            await client.prepare_weights(prepare)
        await client.commit_weights(CommitRequest(version=1, digest=carried.digest))
    (group,) = (g for g in meetings.groups.values() if len(g.sent) > len(carried.files))
    assert all(taken == 1 for taken in group.num_taken.values())
    assert all(torch.equal(served(service)[name], tensor) for name, tensor in new.items())


async def test_a_server_that_does_not_answer_is_left_out_and_the_others_are_updated(
    fleet: Any, meetings: Any
) -> None:
    fleet.add(), fleet.add()

    def lose_the_first(sent: httpx.Request) -> None:
        if sent.url.host == "s0":
            raise httpx.ConnectError("refused")

    fleet.network.before = lose_the_first
    pushed = await fleet.push("nccl", fleet.weights(0.5).items())
    assert sorted(meetings.ranks) == [0, 1]
    assert [service.contract().version for service in fleet.services] == [0, pushed.version]


async def test_the_meeting_place_is_found_by_the_way_to_the_servers(
    fleet: Any, meetings: Any
) -> None:
    service = fleet.add()
    fleet.urls[:] = [fleet.network.add("127.0.0.1", service)]
    pushed = await fleet.push("nccl", fleet.weights(0.5).items(), meeting=None)
    assert sorted(meetings.ranks) == [0, 1]
    assert service.contract().digest == pushed.digest
    fleet.urls[:] = [fleet.network.add("[::1]", service)]
    fleet.network.apps["::1"] = fleet.network.apps["[::1]"]
    with pytest.raises(
        WeightUpdateFailed, match=r"no place .* Fix: set --rollout\.weight_sync_host"
    ):
        await fleet.push("nccl", fleet.weights(0.25).items(), meeting=None)


def cut_after(tensors: dict[str, torch.Tensor], number: int) -> Iterator[tuple[str, torch.Tensor]]:
    for index, item in enumerate(tensors.items()):
        if index == number:
            raise RuntimeError("the learner lost a shard")
        yield item


async def test_a_learner_that_fails_between_two_buckets_leaves_the_old_version_serving(
    fleet: Any,
) -> None:
    service = fleet.add()
    before = await fleet.answer(fleet.urls[0], "before")
    with pytest.raises(RuntimeError, match="lost a shard"):
        await fleet.push("nccl", cut_after(fleet.weights(0.5), 3), bucket_bytes=1)
    assert await fleet.answer(fleet.urls[0], "after") == before
    assert service.weights.status().staged_version is None
    assert list(service.uploads.reserve("x", 0).parent.iterdir()) == [], "nothing half-sent is left"
    new = fleet.weights(0.5)
    assert (await fleet.push("http", new.items())).version == 1
    assert all(torch.equal(served(service)[name], tensor) for name, tensor in new.items())
    assert (await fleet.push("nccl", fleet.weights(0.25).items())).version == 2


@pytest.mark.parametrize("path", [OPEN, RECEIVE])
async def test_a_server_that_is_lost_in_a_transfer_fails_it_for_all_and_the_next_push_is_whole(
    fleet: Any, path: str
) -> None:
    fleet.add(), fleet.add()

    def lose_the_first(sent: httpx.Request) -> None:
        if (sent.url.host, sent.url.path) == ("s0", path):
            raise httpx.ReadError("connection lost")

    fleet.network.before = lose_the_first
    with pytest.raises(WeightUpdateFailed, match=r"over nccl broke off: http://s0 .*Fix"):
        await fleet.push("nccl", fleet.weights(0.5).items(), timeouts=Timeouts(transfer_s=4.0))
    assert [service.contract().version for service in fleet.services] == [0, 0]
    fleet.network.before = lambda _: None
    assert (await fleet.push("nccl", fleet.weights(0.5).items())).version == 1
    assert [service.contract().version for service in fleet.services] == [1, 1]


async def test_what_a_transfer_brought_is_verified_before_it_is_served(fleet: Any) -> None:
    service = fleet.add()
    norm = fleet.weights(0.5)["model.norm.weight"]
    wrong = {
        "unknown_tensors": {"model.sigma": norm},
        "shape_mismatch": {"model.norm.weight": norm[:-1].clone()},
        "dtype_mismatch": {"model.norm.weight": norm.double()},
        "digest_mismatch": {"model.norm.weight": norm},
    }
    for code, bucket in wrong.items():
        async with fleet.make_client(*fleet.urls).control as client:
            async with fleet.carrier(client, code) as carrier:
                file = await carrier.carry(0, bucket)
            prepare = PrepareRequest(version=1, digest="0" * 64, files=[file], base_version=0)
            with pytest.raises(WeightUpdateFailed):
                await client.prepare_weights(prepare)
            async with fleet.http() as http:
                reply = await http.post("/v1/weights/prepare", json=prepare.model_dump())
        assert (reply.status_code, reply.json()["error"]["code"]) == (422, code)
    assert service.contract().version == 0
