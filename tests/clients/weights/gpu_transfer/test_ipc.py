"""CUDA IPC handles travel field by field, and only to where they can be opened."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.multiprocessing import reductions

from openrlhf_alp.clients.errors import WeightUpdateFailed
from services.common.wire import JSON_TYPE, MSGPACK_TYPE, decode, encode
from services.rollout.wire.transfer import IpcHandle, from_wire, to_wire

OWN_GPU = "GPU-of-this-test"
OPEN, RECEIVE = "/v1/weights/transfer/open", "/v1/weights/transfer/receive"


def test_a_handle_of_ipc_comes_back_as_torchs_own_arguments(
    cuda_args: Callable[..., tuple[Any, ...]],
) -> None:
    tensor = torch.arange(12.0).reshape(3, 4)[1:, ::2]
    args = cuda_args(tensor, b"c" + bytes(range(64)))
    handle = to_wire(args, OWN_GPU)
    for media_type in (MSGPACK_TYPE, JSON_TYPE):
        arrived = IpcHandle.model_validate(decode(encode(handle, media_type), media_type))
        again = from_wire(arrived, tensor.shape, tensor.dtype)
        assert again == args
        assert [type(value) for value in again] == [type(value) for value in args]
    names = list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)
    assert len(names) == len(args)
    assert [names[index] for index in (0, 1, 6, 7, 10, 14)] == [
        *("tensor_cls", "tensor_size", "storage_device", "storage_handle", "requires_grad"),
        "event_sync_required",
    ]
    for wrong in (args[:-1], (torch.nn.Parameter, *args[1:])):
        with pytest.raises(ValueError, match=r"another way than this release knows\. Fix"):
            to_wire(wrong, OWN_GPU)


async def test_ipc_is_refused_where_one_handle_cannot_reach(
    fleet: Any, shared_memory: dict[bytes, torch.Tensor]
) -> None:
    fleet.add()
    async with fleet.http() as http:
        foreign = await http.post(OPEN, json=opening("GPU-of-somebody-else"))
        error = foreign.json()["error"]
        assert (foreign.status_code, error["code"]) == (422, "foreign_gpu")
        assert error["field"] == "link.gpu_uuid"
        assert (await http.post(OPEN, json=opening(OWN_GPU))).status_code == 200
        tensor = {"name": "model.norm.weight", "dtype": "F32", "shape": [16]}
        bare = await http.post(RECEIVE, json={"name": "one.safetensors", "tensors": [tensor]})
        assert bare.json()["error"]["code"] == "wrong_handles"
    fleet.add()
    with pytest.raises(WeightUpdateFailed, match=r"one worker, not 1 and 2\. Fix"):
        await fleet.push("ipc", fleet.weights(0.5).items())
    assert shared_memory == {}


def opening(gpu_uuid: str) -> dict[str, Any]:
    return {"link": {"backend": "ipc", "gpu_uuid": gpu_uuid}}
