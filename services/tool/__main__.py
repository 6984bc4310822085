"""`python -m services.tool`: read the flags, establish the sandbox, serve."""

import argparse
import asyncio
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path

import uvloop

from services.common.auth import is_loopback, resolve_api_key
from services.common.errors import ConfigError
from services.common.logging import configure_logging
from services.common.serve import bind_socket, serve
from services.tool.app import create_app
from services.tool.isolation import IsolationError
from services.tool.sandbox.plan import Level
from services.tool.sandbox.preload import PRESETS
from services.tool.service import ToolService
from services.tool.settings import Settings

logger = logging.getLogger(__name__)

_EXIT_CONFIG = 2
_EXIT_ISOLATION = 3
_KEY_VARIABLE = "OPENRLHF_ALP_TOOL_API_KEY"
_NUMBERS = {
    "slots": "executions at a time (default: one per usable core)",
    "max_queue": "executions that may wait",
    "max_wait_s": "longest wait when the caller names no deadline",
    "default_timeout_s": "wall time when the caller names none",
    "max_timeout_s": "largest wall time a caller may ask for",
    "default_memory_mb": "memory when the caller names none",
    "max_memory_mb": "largest memory a caller may ask for",
    "max_code_bytes": "largest program",
    "max_body_bytes": "largest request body",
    "max_file_bytes": "largest file, and all files of one request",
    "max_sessions": "live sessions",
    "session_ttl_s": "idle seconds after which a session ends",
}


def build_parser() -> argparse.ArgumentParser:
    """Flags; numbers carry the defaults of Settings."""
    parser = argparse.ArgumentParser(prog="python -m services.tool", description=__doc__)
    levels = [level.value for level in (Level.FULL, Level.UID, Level.BASIC)]
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8090, help="0 takes any free one")
    parser.add_argument("--url-file", type=Path, help="written when the service is ready")
    parser.add_argument(
        "--api-key", default=os.environ.pop(_KEY_VARIABLE, None), help=f"or ${_KEY_VARIABLE}"
    )
    parser.add_argument(
        "--open-loopback", action="store_true", help="no key at all; only on a loopback address"
    )
    parser.add_argument("--isolation", choices=levels, help="use this level (default: strongest)")
    parser.add_argument("--min-isolation", choices=levels, default=Level.BASIC.value)
    parser.add_argument("--allow-insecure", action="store_true", help="run without any isolation")
    parser.add_argument("--presets", default=",".join(PRESETS), help="a prefix of the default")
    parser.add_argument("--launchers", type=int, help="fork servers (default: one per slot)")
    parser.add_argument("--warm-slots", type=int, help="slots kept ready per zygote")
    parser.add_argument("--log-level", default="INFO")
    defaults = Settings()
    for name, text in _NUMBERS.items():
        value = getattr(defaults, name)
        parser.add_argument(
            "--" + name.replace("_", "-"), type=type(value), default=value, help=text
        )
    return parser


def settings_from(arguments: argparse.Namespace) -> Settings:
    """Turn flags into settings. Raises ValueError with cause and fix."""
    presets = tuple(arguments.presets.split(","))
    if not presets or presets != PRESETS[: len(presets)]:
        raise ValueError(f"--presets is {arguments.presets}, a prefix of {PRESETS} is required")
    numbers = {name: getattr(arguments, name) for name in _NUMBERS}
    isolation = Level(arguments.isolation) if arguments.isolation else None
    minimum = Level(arguments.min_isolation)
    if arguments.allow_insecure:
        isolation, minimum = Level.NONE, Level.NONE
    settings = Settings(isolation=isolation, min_isolation=minimum, **numbers)
    sandbox = replace(
        settings.sandbox,
        presets=presets,
        launchers=arguments.launchers or settings.slots,
        warm_slots=arguments.warm_slots or settings.sandbox.warm_slots,
    )
    return replace(settings, sandbox=sandbox)


async def run(arguments: argparse.Namespace) -> None:
    """Serve until a signal. Raises ConfigError, ValueError, IsolationError."""
    settings = settings_from(arguments)
    key: str | None = None
    if arguments.open_loopback:
        if not is_loopback(arguments.host):
            raise ConfigError(
                "--open-loopback needs a loopback --host. Fix: set --api-key instead."
            )
    else:
        resolved = resolve_api_key(arguments.api_key, host=arguments.host, flag="--api-key")
        key = resolved.value
        if resolved.generated:
            print(f"api key: {key}", flush=True)
    sock = bind_socket(arguments.host, arguments.port)
    async with ToolService.running(settings) as service:
        level = service.isolation.level
        logger.info("sandbox level %s, %s", level, service.isolation.canaries_passed)
        print(f"isolation: {level}", flush=True)
        await serve(create_app(service, key), sock, url_file=arguments.url_file)


def main() -> None:
    """Entry point: exit 2 for a wrong configuration, 3 for too little isolation."""
    arguments = build_parser().parse_args()
    configure_logging(arguments.log_level)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run(arguments))
    except IsolationError as error:
        print(error, file=sys.stderr)
        sys.exit(_EXIT_ISOLATION)
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(_EXIT_CONFIG)


if __name__ == "__main__":
    main()
