"""Helpers of this folder are plain modules: importlib mode adds no folder to the path by itself.

`service` is one real service, sandbox and all, per test module; `client` speaks HTTP to its app in
process.
"""

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest_asyncio
from fastapi import FastAPI

from services.tool.api.app import create_app
from services.tool.service import ToolService
from services.tool.settings import ToolSettings

sys.path.insert(0, str(Path(__file__).parent))

KEY = "key-of-the-tests"


def small_settings() -> ToolSettings:
    """One launcher with the numpy zygote: starts in well under a second."""
    return ToolSettings(slots=2, launchers=1, session_ttl_s=300.0, max_sessions=4, presets="numpy")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service() -> AsyncIterator[ToolService]:
    async with ToolService.running(small_settings()) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def app(service: ToolService) -> AsyncIterator[FastAPI]:
    # The lifespan belongs to MCP alone and wants one task from start to end; test_mcp.py serves it.
    yield create_app(service, service.settings, api_key=KEY)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(
        transport=transport, base_url="http://tool", headers=headers, timeout=60
    ) as ready:
        yield ready
