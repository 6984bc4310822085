"""The tool service on Ray Serve, with as many replicas as its queue needs.

    export OPENRLHF_ALP_TOOL_API_KEY=...              # on every node, before Ray starts there
    serve run deploy.ray_serve:tool max_replicas=8    # from the root of the repository

A replica is the whole service, sandbox and all, in a process of its own. Clients name Serve's
address as the one URL of the service, and repeat what a replica leaves unanswered when it ends.
Settings come from the variables OPENRLHF_ALP_TOOL_*; those of the network are Serve's own.

Sessions live in one replica, and Serve gives each request to any. Routes that need them answer 501.
"""

import contextlib
import os
from collections.abc import AsyncIterator

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp

from services.common.errors import ApiError, ConfigError, error_response
from services.common.wire import TOOL_KEY_VARIABLE, read_key_files
from services.tool.api.app import create_app
from services.tool.service import ToolService
from services.tool.settings import ToolSettings

WITH_SESSIONS = ("/v1/sessions", "/v1/sessions/{path:path}", "/mcp", "/mcp/{path:path}")
METHODS = ("GET", "POST", "PUT", "DELETE")


class Scale(BaseModel):
    """Arguments of `serve run deploy.ray_serve:tool`, as NAME=VALUE."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    min_replicas: int = Field(default=1, ge=1)
    """Replicas when nothing is asked for."""

    max_replicas: int = Field(default=4, ge=1)
    """Replicas under the highest load."""

    slots: int = Field(default=1, ge=1)
    """Programs that a replica runs at a time; Ray reserves one CPU for each."""


def tool(scale: Scale) -> serve.Application:
    """Build the application.

    Serve adds replicas while more programs run and wait than there are slots, and removes them when
    slots stay free. A replica is given at most four programs a slot; further ones wait in front.
    """

    def app() -> ASGIApp:
        return served_app(scale.slots)

    deployment = serve.deployment(
        serve.ingress(app)(Replica),
        name="tool",
        ray_actor_options={"num_cpus": scale.slots},
        max_ongoing_requests=4 * scale.slots,
        autoscaling_config={
            "min_replicas": scale.min_replicas,
            "max_replicas": scale.max_replicas,
            "target_ongoing_requests": scale.slots,
        },
    )
    return deployment.bind()


class Replica:
    """What Serve asks of a replica beside its app."""

    app: Starlette
    """Set by serve.ingress."""

    async def check_health(self) -> None:
        """Have Serve replace a replica that can run no program any more."""
        sandbox = self.app.state.service.sandbox
        if sandbox.down:
            raise RuntimeError(f"the sandbox is down: {sandbox.failure}")


def served_app(slots: int) -> Starlette:
    """The tool service as an ASGI app that starts and ends its sandbox in its lifespan."""

    @contextlib.asynccontextmanager
    async def lifespan(front: Starlette) -> AsyncIterator[None]:
        read_key_files()
        settings = ToolSettings(slots=slots)
        if settings.api_key is None:
            # A key of its own would be known to nobody, and differ from that of other replicas.
            raise ConfigError(f"No key. Fix: set ${TOOL_KEY_VARIABLE} on every node of Ray.")
        key = settings.resolve_key(settings.api_key, "api_key")
        # Subprocesses inherit the environment; the launchers get a fixed one in any case.
        os.environ.pop(TOOL_KEY_VARIABLE, None)
        async with ToolService.running(settings) as service:
            app = create_app(service, settings, api_key=key)
            front.state.service = service
            front.router.routes.append(Mount("/", app))
            async with app.router.lifespan_context(app):
                yield

    routes = [Route(path, _refuse_sessions, methods=METHODS) for path in WITH_SESSIONS]
    return Starlette(routes=routes, lifespan=lifespan)


async def _refuse_sessions(_: Request) -> Response:
    return error_response(
        ApiError(
            501,
            "sessions_not_served",
            "Sessions live in one process, and Ray Serve gives each request to any replica.",
            fix="Send single programs, or run `python -m services.tool` on a URL of its own.",
        )
    )
