"""The receiving routes alone: what goes wrong is told apart, and holds nothing up forever."""

from typing import Any

import pytest
import torch

from openrlhf_alp.clients.errors import ContractMismatch, WeightUpdateFailed
from services.rollout.gpu_transfer.receiver import link_backends
from services.rollout.wire.transfer import to_wire

OPEN, RECEIVE = "/v1/weights/transfer/open", "/v1/weights/transfer/receive"
CLOSE = "/v1/weights/transfer/close"


async def test_a_learner_that_is_killed_in_mid_bucket_holds_the_server_up_for_a_limited_time(
    fleet: Any, meeting: Any
) -> None:
    fleet.add()
    before = await fleet.answer(fleet.urls[0], "before")
    async with fleet.http() as http:
        with meeting() as port:
            opened = await http.post(OPEN, json=opening(port, timeout_s=4.0))
            assert opened.json() == {"backend": "nccl"}, opened.text
            cut = await http.post(RECEIVE, json=receiving())
        assert (cut.status_code, cut.json()["error"]["code"]) == (504, "transfer_timeout")
        refused = await http.post(RECEIVE, json=receiving())
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "no_link")
    assert await fleet.answer(fleet.urls[0], "after") == before
    assert (await fleet.push("nccl", fleet.weights(0.5).items())).version == 1


async def test_a_group_that_does_not_fill_up_is_an_answer_in_time(fleet: Any, meeting: Any) -> None:
    fleet.add()
    async with fleet.http() as http:
        with meeting(world_size=3) as port:
            reply = await http.post(OPEN, json=opening(port, world_size=3, timeout_s=0.2))
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "transfer_timeout")


def opening(port: int = 1, *, timeout_s: float = 20.0, **fields: Any) -> dict[str, Any]:
    place = {"backend": "nccl", "master_address": "127.0.0.1", "master_port": port}
    ranks = {"rank_offset": 1, "world_size": 2, "buffer_bytes": 2**20}
    return {"link": place | ranks | fields, "timeout_s": timeout_s}


def receiving(**fields: Any) -> dict[str, Any]:
    tensor = {"name": "model.norm.weight", "dtype": "F32", "shape": [16]}
    return {"name": "one.safetensors", "tensors": [tensor | fields]}


async def test_bad_requests_are_told_apart_and_name_the_field(
    fleet: Any, meeting: Any, cuda_args: Any
) -> None:
    fleet.add(num_gpus=2)
    handle = to_wire(cuda_args(torch.zeros(2), b"c"), "GPU-of-the-learner").model_dump(mode="json")
    too_much = receiving(shape=[2**40])
    twice = {"name": "x", "tensors": receiving()["tensors"] * 2}
    async with fleet.http() as http:
        for path, body, status, field in (
            (OPEN, opening(rank_offset=1, world_size=2), 422, "link.world_size"),
            (OPEN, opening(master_port=0), 422, "link.nccl.master_port"),
            (OPEN, opening(backend="rdma"), 422, "link"),
            (OPEN, opening(master_address="a b"), 422, "link.nccl.master_address"),
            (RECEIVE, receiving(), 409, None),
            (RECEIVE, receiving(dtype="bfloat16"), 422, "tensors.0.dtype"),
            (RECEIVE, receiving(shape=[-1]), 422, "tensors.0.shape.0"),
            (RECEIVE, receiving(name="__metadata__"), 422, "tensors.0.name"),
            (RECEIVE, receiving() | {"name": "../x"}, 422, "name"),
            (RECEIVE, twice, 422, "tensors"),
        ):
            reply = await http.post(path, json=body)
            assert (reply.status_code, reply.json()["error"]["field"]) == (status, field), body
        other_key = {"authorization": "Bearer api-key-for-tests"}
        for path in (OPEN, RECEIVE, CLOSE):
            assert (await http.post(path, json={}, headers=other_key)).status_code == 401
    fleet.add()
    async with fleet.http(1) as http:
        with meeting() as port:
            assert (await http.post(OPEN, json=opening(port))).status_code == 200
        for body, status, code in (
            (too_much, 413, "upload_too_large"),
            (receiving(handle=handle), 422, "wrong_handles"),
        ):
            reply = await http.post(RECEIVE, json=body)
            assert (reply.status_code, reply.json()["error"]["code"]) == (status, code), body
        closed = await http.post(CLOSE)
        assert closed.json() == {"backend": None}


async def test_a_file_that_cannot_be_written_is_not_half_there(fleet: Any) -> None:
    service = fleet.add()
    folder = service.uploads.reserve("x", 0).parent
    (folder / ".full-00000.safetensors").mkdir()
    async with (
        fleet.make_client(*fleet.urls).control as client,
        fleet.carrier(client, "full") as carrier,
    ):
        with pytest.raises(WeightUpdateFailed, match=r"cannot be written.*Free space"):
            await carrier.carry(0, {"model.norm.weight": torch.ones(16)})
    assert [path.name for path in folder.iterdir()] == [".full-00000.safetensors"]
    assert (await fleet.push("nccl", fleet.weights(0.5).items())).version == 1


async def test_an_engine_without_gpu_offers_files_only_and_says_so(fleet: Any) -> None:
    service = fleet.add(num_gpus=0)
    assert service.contract().weight_transports == ["file", "http"]
    assert link_backends(1) == (), "vLLM on a CPU has no receivers"
    async with fleet.http() as http:
        reply = await http.post(OPEN, json=opening())
    assert (reply.status_code, reply.json()["error"]["code"]) == (501, "transport_unavailable")
    with pytest.raises(ContractMismatch, match=r"http://s0 takes weights over file, http only"):
        await fleet.push("nccl", fleet.weights(0.5).items())
