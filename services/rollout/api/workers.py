"""`GET /v1/rl/workers`: this server, for gateways and trainers that look for rollout workers."""

import secrets
from collections.abc import Sequence
from typing import Any, get_args

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from services.common.errors import ErrorBody
from services.common.routes import WireRoute, reply
from services.rollout.engines.protocol import EngineDeadError
from services.rollout.service import RolloutService
from services.rollout.weights.serving import WeightsError
from services.rollout.wire.schemas import Contract, PauseMode, WeightTransport
from services.rollout.wire.workers import UpdateSource, Worker, WorkerCapabilities, WorkerList

NAMESPACE = "openrlhf-alp"
_ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorBody} for status in (400, 401)}
_SOURCES: dict[WeightTransport, UpdateSource] = {
    "file": "disk",
    "http": "http",
    "nccl": "distributed",
    "ipc": "tensor",
}


def worker_routes(service: RolloutService, control_paths: Sequence[str]) -> APIRouter:
    """The route; it takes the data key.

    Args:
        control_paths: paths of the control routes, which the reply names.
    """
    router = APIRouter(prefix="/v1/rl", route_class=WireRoute, responses=_ERRORS, tags=["data"])
    instance_id = secrets.randbits(53)  # a number that every JSON parser keeps
    paths = sorted(set(control_paths))

    @router.get("/workers", response_model=WorkerList)
    async def workers(request: Request) -> Response:
        """This server as the one worker of a list, as SMG and Dynamo describe theirs."""
        # The address by which the caller found this server is one that works for the caller.
        url = str(request.base_url).rstrip("/")
        worker = _worker(service.contract(), url, instance_id, paths, await _failure(service))
        return reply(request, WorkerList(namespace=NAMESPACE, workers=[worker], total=1))

    return router


async def _failure(service: RolloutService) -> str | None:
    """Why a request would not be served now; None if it would."""
    try:
        await service.engine.check()
        service.weights.state.require_serving()
    except (EngineDeadError, WeightsError) as error:
        return str(error)
    return None


def _worker(
    contract: Contract, url: str, instance_id: int, paths: list[str], failure: str | None
) -> Worker:
    labels = {"api": f"{NAMESPACE}/{contract.api_version}", "digest": contract.digest}
    return Worker(
        id=f"{instance_id:014x}",
        url=url,
        base_url=url,
        engine=contract.engine,
        engine_version=contract.engine_version,
        model_id=contract.model,
        tp_size=contract.num_workers,
        health="ready" if failure is None else "not_ready",
        weight_version=str(contract.version),
        labels={**labels, "contract_hash": contract.contract_hash, "dtype": contract.dtype},
        capabilities=WorkerCapabilities(
            pause_modes=list(get_args(PauseMode)),
            update_from=[_SOURCES[transport] for transport in contract.weight_transports],
        ),
        namespace=NAMESPACE,
        instance_id=instance_id,
        transport={"http": url},
        request_plane_url=f"{url}/v1/generate",
        system_url=url,
        admin_base_url=url,
        model=contract.model,
        routes=paths,
        world_size=contract.num_workers,
        error=failure,
    )
