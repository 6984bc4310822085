"""The app behind a real socket, on the loop of the test."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import uvicorn

from services.common.serve import bind_socket, bound_url, server_config
from services.tool.api.app import create_app
from services.tool.service import ToolService

KEY = "key-of-the-tests"


@contextlib.asynccontextmanager
async def served(service: ToolService) -> AsyncIterator[str]:
    sock = bind_socket("127.0.0.1", 0)
    app = create_app(service, service.settings, api_key=KEY)
    server = uvicorn.Server(server_config(app))
    task = asyncio.create_task(server.serve(sockets=[sock]))
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield bound_url(sock)
    finally:
        server.should_exit = True
        await task
        sock.close()
