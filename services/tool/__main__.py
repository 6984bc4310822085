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
from services.tool.api.app import create_app
from services.tool.isolation import IsolationError
from services.tool.sandbox.host.pool import SandboxConfig
from services.tool.sandbox.plan import PRESETS, Level
from services.tool.service import ToolService
from services.tool.settings import Settings

logger = logging.getLogger(__name__)

_EXIT_CONFIG = 2
_EXIT_ISOLATION = 3
_KEY_VARIABLE = "OPENRLHF_ALP_TOOL_API_KEY"
_DESCRIPTION = """Untrusted Python in an OS sandbox, over REST, MCP and SandboxFusion's contract.

levels of isolation, strongest first; at start each layer is tried with programs that must fail:
  full   needs user namespaces, root or not: own root directory, network, processes, tmpfs
  uid    needs root, no namespaces (Docker's default): a user id per program
  basic  needs nothing: resource limits, seccomp without fork, Landlock
GET /v1/isolation says what was reached, what is missing and how to get it."""
_NUMBERS = {
    "slots": "executions at a time, one per usable core",
    "max_queue": "executions that may wait",
    "max_wait_s": "longest wait when the caller names no deadline",
    "default_timeout_s": "wall time when the caller names none",
    "max_timeout_s": "largest wall time a caller may ask for",
    "default_memory_mb": "memory when the caller names none",
    "max_memory_mb": "largest memory a caller may ask for",
    "default_output_bytes": "stdout and stderr, each, when the caller names none",
    "max_output_bytes": "largest output a caller may ask for",
    "max_code_bytes": "largest program",
    "max_body_bytes": "largest request body",
    "max_file_bytes": "largest file, and all files of one request",
    "max_sessions": "live sessions; one more ends the one that is idle longest",
    "session_ttl_s": "idle seconds after which a session ends",
}


def build_parser() -> argparse.ArgumentParser:
    """Flags; numbers carry the defaults of Settings."""
    parser = argparse.ArgumentParser(
        prog="python -m services.tool",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    levels = [level.value for level in (Level.FULL, Level.UID, Level.BASIC)]
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address; beyond loopback a key is required")
    add("--port", type=int, default=8090, help="0 takes any free one (default: 8090)")
    add("--url-file", type=Path, help="written when the service is ready")
    key = os.environ.pop(_KEY_VARIABLE, None)
    add("--api-key", default=key, help=f"or ${_KEY_VARIABLE}; made up and printed when absent")
    add("--open-loopback", action="store_true", help="no key at all; only on a loopback address")
    add("--isolation", choices=levels, help="use this level (default: the strongest that works)")
    minimum = "exit with 3 and a table of what is missing below this level (default: basic)"
    add("--min-isolation", choices=levels, default=Level.BASIC.value, help=minimum)
    add("--allow-insecure", action="store_true", help="run without any isolation")
    presets = f"libraries loaded ahead, the first one, two or all of (default): {','.join(PRESETS)}"
    add("--presets", default=",".join(PRESETS), help=presets)
    add("--launchers", type=int, help="fork servers (default: one per slot)")
    warm = SandboxConfig().warm_slots
    add(
        "--warm-slots", type=int, help=f"slots kept ready per preset and launcher (default: {warm})"
    )
    drain = "seconds that running programs get after SIGTERM (default: 10)"
    add("--drain-s", type=float, default=10.0, help=drain)
    add("--log-level", default="INFO", help="DEBUG, INFO, WARNING or ERROR (default: INFO)")
    defaults = Settings()
    for name, text in _NUMBERS.items():
        value = getattr(defaults, name)
        flag = "--" + name.replace("_", "-")
        add(flag, type=type(value), default=value, help=f"{text} (default: {value})")
    return parser


def settings_from(arguments: argparse.Namespace) -> Settings:
    """Turn flags into settings. Raises ValueError with cause and fix."""
    presets = tuple(arguments.presets.split(","))
    if not presets or presets != PRESETS[: len(presets)]:
        choices = [",".join(PRESETS[: count + 1]) for count in range(len(PRESETS))]
        raise ValueError(f"--presets is {arguments.presets}; it must be one of {' '.join(choices)}")
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
                "--open-loopback needs a loopback --host. "
                f"Fix: set --api-key or ${_KEY_VARIABLE} instead."
            )
    else:
        resolved = resolve_api_key(
            arguments.api_key, host=arguments.host, flag="--api-key", variable=_KEY_VARIABLE
        )
        key = resolved.value
        if resolved.generated:
            print(f"api key: {key}", flush=True)
    sock = bind_socket(arguments.host, arguments.port)
    async with ToolService.running(settings) as service:
        level = service.isolation.level
        passed, total = service.isolation.canaries_passed, service.isolation.canaries
        logger.info("sandbox level %s: %d of %d canaries blocked", level, passed, total)
        print(f"isolation: {level}", flush=True)
        await serve(
            create_app(service, key), sock, url_file=arguments.url_file, drain_s=arguments.drain_s
        )


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
