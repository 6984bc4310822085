"""The `--rollout.weight_*` flags: how the policy's weights reach the rollout services."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import get_args

from openrlhf_alp.clients.weights.gpu_carrier import Meeting
from services.rollout.wire.schemas import WeightTransport


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportConfig:
    """How theta travels; every way ends in the same prepare and commit."""

    kind: WeightTransport = "file"
    """`file`: the services' shared folder. `http`: files to each. `nccl`, `ipc`: from GPU to GPU.
    """
    meeting: Meeting = field(default_factory=Meeting)
    """Where learner and servers meet for nccl."""


def add_transport_arguments(group: argparse._ArgumentGroup) -> None:
    """The flags of `TransportConfig`."""
    add = group.add_argument
    add(
        "--rollout.weight_transport",
        default="file",
        choices=get_args(WeightTransport),
        help="how a push reaches the services; each proves it by digest before it serves it. file: "
        "through --weights-dir of the services, which the learner must see (on one host /dev/shm, "
        "nothing to set). http: no shared folder. nccl: broadcast to services on other GPUs. ipc: "
        "one learner process and one service on the same GPU",
    )
    add(
        "--rollout.weight_sync_host",
        default=None,
        metavar="ADDRESS",
        help="nccl: the learner's address as the services reach it; default: found by the way "
        "to the services",
    )
    add(
        "--rollout.weight_sync_port",
        type=int,
        default=None,
        metavar="PORT",
        help="nccl: TCP port where the services meet the learner; default: a free one per push",
    )


def read_transport(args: SimpleNamespace) -> TransportConfig:
    """TransportConfig from the parsed `args`."""
    rollout = args.rollout
    return TransportConfig(
        kind=rollout.weight_transport,
        meeting=Meeting(host=rollout.weight_sync_host, port=rollout.weight_sync_port),
    )


def check_transport(args: SimpleNamespace) -> None:
    """Compare `args.rollout_service.weights` with the other flags.

    Raises:
        ValueError: flags that contradict each other; the message names them and the fix.
    """
    weights: TransportConfig = args.rollout_service.weights
    urls = args.rollout_service.urls
    if weights.kind != "file" and not urls:
        raise ValueError(
            f"--rollout.weight_transport {weights.kind} needs --rollout.service_urls: OpenRLHF's "
            "own engines are synchronised by --vllm.sync_backend."
        )
    if weights.meeting != Meeting() and weights.kind != "nccl":
        raise ValueError(
            "--rollout.weight_sync_host and --rollout.weight_sync_port say where an NCCL group "
            f"meets, but --rollout.weight_transport is {weights.kind}. Set it to nccl, or drop "
            "them."
        )
    port = weights.meeting.port
    if port is not None and not 0 < port < 65_536:
        raise ValueError(f"--rollout.weight_sync_port is {port}; it must be 1 to 65535.")
    num_ranks = args.actor.num_nodes * args.actor.num_gpus_per_node
    if weights.kind == "ipc" and (num_ranks, len(urls)) != (1, 1):
        raise ValueError(
            "--rollout.weight_transport ipc maps the memory of one GPU: it takes one learner "
            f"process and one service on that GPU, not {num_ranks} and {len(urls)}. Use nccl or "
            "http."
        )
