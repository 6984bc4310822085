"""How weights reach the services is chosen by a flag, and checked before Ray starts."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from openrlhf_alp.clients.errors import ContractMismatch
from openrlhf_alp.clients.weights.gpu_carrier import Meeting
from openrlhf_alp.learner.launch import check_model, check_services

Parse = Callable[..., SimpleNamespace]
URL = ("--rollout.service_urls", "http://127.0.0.1:1")
TRANSPORT = "--rollout.weight_transport"


def test_weights_go_through_a_shared_folder_by_default(parse: Parse, service_keys: None) -> None:
    service = parse(*URL).rollout_service
    assert (service.weight_transport, service.meeting) == ("file", Meeting())


def test_a_transport_and_its_meeting_place_are_read(parse: Parse, service_keys: None) -> None:
    place = ("--rollout.weight_sync_host", "10.0.0.7", "--rollout.weight_sync_port", "29600")
    service = parse(*URL, TRANSPORT, "nccl", *place).rollout_service
    assert service.weight_transport == "nccl"
    assert service.meeting == Meeting(host="10.0.0.7", port=29600)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((TRANSPORT, "http"), "http needs --rollout.service_urls"),
        ((*URL, "--rollout.weight_sync_port", "29600"), "transport is file. Set it to nccl"),
        ((*URL, TRANSPORT, "nccl", "--rollout.weight_sync_port", "0"), "port is 0; it must be 1"),
        ((*URL, "http://127.0.0.1:2", TRANSPORT, "ipc"), "not 1 and 2. Use nccl"),
        ((*URL, TRANSPORT, "ipc", "--actor.num_gpus_per_node", "2"), "not 2 and 1. Use nccl"),
    ],
)
def test_flags_that_do_not_fit_the_transport_are_named(
    parse: Parse, service_keys: None, flags: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        parse(*flags)


@pytest.mark.e2e
@pytest.mark.filterwarnings("ignore")
def test_a_transport_that_the_service_lacks_is_found_before_ray_starts(
    parse: Parse, service_keys: None, hf_service: Any
) -> None:
    flags = ("--rollout.service_urls", hf_service.url, "--data.max_len", "128")
    args = parse(*flags, TRANSPORT, "nccl")
    with pytest.raises(ContractMismatch, match=rf"nccl: {hf_service.url} .*file, http only\. Fix"):
        check_services(args, check_model(args.actor.model_name_or_path))
