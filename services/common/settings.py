"""Settings and start of a service: command line, environment, keys, exit codes.

Each setting is stated once, as a field with a docstring and a default. That makes a flag, its help
and an environment variable (the service's prefix and the field's name). Flags win. Keys may also
come from files (`read_key_files`).
"""

import secrets
import signal
import sys
from collections.abc import Callable, Coroutine
from ipaddress import IPv4Network, IPv6Network, ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict, SettingsError

from services.common.errors import ConfigError
from services.common.logging import configure_logging
from services.common.serve import run
from services.common.wire import read_key_files

EXIT_CONFIG = 2

_LOOPBACK = (IPv4Network("127.0.0.0/8"), IPv6Network("::1/128"))
_MIN_KEY_CHARS = 8


def is_loopback(host: str) -> bool:
    """Whether a bind to `host` is reachable from this machine only."""
    try:
        address = ip_address(host)
    except ValueError:
        # Any other name may resolve to an address that other machines can reach.
        return host == "localhost"
    return any(address in network for network in _LOOPBACK)


class ServiceSettings(BaseSettings):
    """What every service lets its operator decide."""

    model_config = SettingsConfigDict(
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        use_attribute_docstrings=True,
        extra="forbid",
    )

    host: str = "127.0.0.1"
    """Address to bind. An address that other machines can reach needs configured keys."""
    port: int = Field(default=0, ge=0, le=65535)
    """TCP port; 0 takes any free one and prints it."""
    url_file: Path | None = None
    """File that receives the bound URL once the service accepts connections."""
    api_key: SecretStr | None = None
    """Bearer key of the service's routes; generated and printed once when absent."""
    max_body_bytes: int = Field(default=16 * 2**20, ge=1024)
    """Largest request body."""
    drain_s: float = Field(default=10.0, ge=0.0)
    """Seconds that running requests get after a stop signal."""
    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(str.upper)
    ] = "INFO"
    """Level of the JSON log on stderr."""
    check: bool = False
    """Say what is wrong with the settings, and end without serving."""

    def resolve_key(self, configured: SecretStr | None, field: str) -> str:
        """The key of `field`, for example "api_key", or a generated one, for the caller to print.

        Raises:
            ConfigError: no key with a bind that other machines can reach, or a key of fewer than 8
                characters or with characters outside printable ASCII.
        """
        flag = "--" + field.replace("_", "-")
        source = f"{flag} or ${self.model_config['env_prefix']}{field.upper()}"
        if configured is None:
            if not is_loopback(self.host):
                raise ConfigError(
                    f"Refusing to bind {self.host}: other machines can reach it and no key is "
                    f"configured. Fix: set {source}, or bind --host 127.0.0.1."
                )
            return secrets.token_urlsafe(32)
        key = configured.get_secret_value()
        # Anything else could not be sent in an HTTP header.
        if len(key) < _MIN_KEY_CHARS or not (key.isascii() and key.isprintable()):
            raise ConfigError(
                f"{source} must have at least {_MIN_KEY_CHARS} printable ASCII characters. "
                'Fix: generate one with: python -c "import secrets; print(secrets.token_urlsafe())"'
            )
        return key


Settings = TypeVar("Settings", bound=ServiceSettings)


def start(kind: type[Settings], serve: Callable[[Settings], Coroutine[Any, Any, None]]) -> int:
    """Read the settings, configure the log and run `serve` until a stop signal.

    Returns:
        The exit code: 0 after a stop signal or a check, EXIT_CONFIG with cause and fix on stderr
        when the service cannot start as configured, 130 for an interrupt before it was ready.
    """
    try:
        read_key_files()
    except ValueError as error:
        print(error, file=sys.stderr)
        return EXIT_CONFIG
    try:
        settings = CliApp.run(kind)
    except ValidationError as error:
        for problem in error.errors():
            print(_wrong_setting(problem), file=sys.stderr)
        return EXIT_CONFIG
    except SettingsError as error:
        print(f"Bad configuration: {error}", file=sys.stderr)
        return EXIT_CONFIG
    if settings.check:
        return 0
    configure_logging(settings.log_level)
    # Until the server handles the signals, a stop must unwind the stack and so end subprocesses.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        run(serve(settings))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_CONFIG
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def _wrong_setting(problem: Any) -> str:
    """One line for a setting that pydantic refuses; a check of several settings names its own."""
    cause = problem["msg"].removeprefix("Value error, ")
    if problem["loc"]:
        flag = "-".join(map(str, problem["loc"])).replace("_", "-")
        cause = f"--{flag}: {cause}"
    return f"{cause}. See --help."
