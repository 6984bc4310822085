"""`python -m services.tool`: parse, wire, serve. Exit codes: 2 configuration, 3 isolation."""

import logging
import os
import sys

from services.common.errors import ConfigError
from services.common.serve import bind_socket, serve
from services.common.settings import is_loopback, start
from services.common.wire import TOOL_KEY_VARIABLE
from services.tool.api.app import create_app
from services.tool.isolation import IsolationError
from services.tool.service import ToolService
from services.tool.settings import ToolSettings

logger = logging.getLogger(__name__)

EXIT_ISOLATION = 3


def main() -> int:
    """Run the service until a stop signal; return the exit code."""
    try:
        return start(ToolSettings, _serve)
    except IsolationError as error:
        print(error, file=sys.stderr)
        return EXIT_ISOLATION


async def _serve(settings: ToolSettings) -> None:
    # Subprocesses inherit the environment; the launchers get a fixed one, but nothing relies on it.
    os.environ.pop(TOOL_KEY_VARIABLE, None)
    key = _key(settings)
    # Before the sandbox: a port that is taken should not cost the start of all launchers.
    sock = bind_socket(settings.host, settings.port)
    async with ToolService.running(settings) as service:
        level = service.isolation.level
        passed, total = service.isolation.canaries_passed, service.isolation.canaries
        logger.info("sandbox level %s: %d of %d canaries blocked", level, passed, total)
        print(f"isolation: {level}", flush=True)
        app = create_app(service, settings, api_key=key)
        await serve(app, sock, url_file=settings.url_file, drain_s=settings.drain_s)


def _key(settings: ToolSettings) -> str | None:
    """The bearer key, or None for an open loopback service."""
    if not settings.open_loopback:
        key = settings.resolve_key(settings.api_key, "api_key")
        if settings.api_key is None:
            print(f"api key: {key}", flush=True)
        return key
    if not is_loopback(settings.host):
        raise ConfigError(
            "--open-loopback needs a loopback --host. "
            f"Fix: set --api-key or ${TOOL_KEY_VARIABLE} instead."
        )
    return None


if __name__ == "__main__":
    sys.exit(main())
