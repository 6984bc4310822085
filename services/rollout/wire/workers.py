"""Reply of `GET /v1/rl/workers`, which gateways and trainers of others read.

It has every field that the same route of Shepherd Model Gateway (SMG) 1.13 and of NVIDIA Dynamo 1.6
has, under the name and with the meaning it has there, so that a reader of either finds this server.
Readers of both ignore fields that they do not know.
"""

from typing import Literal

from pydantic import Field

from services.rollout.wire.schemas import PauseMode, Wire

UpdateSource = Literal["disk", "http", "distributed", "tensor"]
"""SMG's words for the transports file, http, nccl and ipc."""


class WorkerCapabilities(Wire):
    """What can be asked of this server, in SMG's words."""

    source: Literal["static", "label"] = "static"
    pause_modes: list[PauseMode]
    """Accepted by POST /v1/pause and by a commit."""

    update_from: list[UpdateSource]
    abort: bool = True
    """DELETE /v1/generate/{request_id} ends a request."""

    flush_cache: bool = False
    """A commit drops the prefix cache; no route does so by itself."""

    sleep_wake: bool = True
    reports_weight_version: bool = True


class Worker(Wire):
    """This server as one row: SMG's fields first, then Dynamo's."""

    id: str
    """Changes when the server is started anew."""

    url: str
    base_url: str
    engine: str
    engine_version: str | None
    model_id: str
    worker_type: Literal["regular"] = "regular"
    connection_mode: Literal["http"] = "http"
    tp_size: int | None
    dp_size: int | None = 1
    pp_size: int | None = 1
    dp_ranks: int = 1
    role: str | None = None
    health: Literal["ready", "not_ready"]
    weight_version: str | None
    """The number of the serving version; every token's spans and the digest say more."""

    labels: dict[str, str]
    capabilities: WorkerCapabilities

    namespace: str
    component: Literal["rollout"] = "rollout"
    endpoint: Literal["rl"] = "rl"
    instance_id: int = Field(ge=0)
    transport: dict[str, str]
    request_plane_url: str
    system_url: str
    admin_base_url: str
    model: str
    routes: list[str]
    """Control routes, which need the admin key."""

    world_size: int = Field(gt=0)
    """Ranks that join the learner's NCCL group."""

    error: str | None = None
    """Why the server is not ready."""


class WorkerList(Wire):
    """The one worker that this server is."""

    protocol_version: Literal[1] = 1
    namespace: str
    workers: list[Worker]
    total: int
