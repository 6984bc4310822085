"""Bearer keys: on by default, generated when none is given, never a published default."""

import hmac
import ipaddress
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from fastapi.security import HTTPBearer
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Scope

from services.common.errors import ApiError, ConfigError

_MIN_KEY_CHARS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A bearer key and whether the service made it up itself (then it has to be shown once)."""

    value: str
    generated: bool

    def __repr__(self) -> str:
        return f"ApiKey(generated={self.generated})"


def is_loopback(host: str) -> bool:
    """Whether a bind to `host` is reachable from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def resolve_api_key(configured: str | None, *, host: str, flag: str, variable: str) -> ApiKey:
    """Return the configured key, or a generated one when the service is on loopback.

    Args:
        configured: the operator's key, or None.
        host: address the service binds to.
        flag: name of the flag that sets this key, for the message.
        variable: name of the environment variable that sets it too.

    Raises:
        ConfigError: no key with a bind that other machines can reach, or a key of fewer than 8
            characters or with characters outside printable ASCII.
    """
    if configured is not None:
        sendable = configured.isascii() and configured.isprintable()
        if len(configured) < _MIN_KEY_CHARS or not sendable:
            raise ConfigError(
                f"{flag} or ${variable} must have at least {_MIN_KEY_CHARS} printable ASCII "
                "characters. Fix: generate one with: "
                'python -c "import secrets; print(secrets.token_urlsafe())"'
            )
        return ApiKey(value=configured, generated=False)
    if not is_loopback(host):
        raise ConfigError(
            f"Refusing to bind {host}: other machines can reach it and no key is configured. "
            f"Fix: set {flag} or ${variable}, or bind --host 127.0.0.1."
        )
    return ApiKey(value=secrets.token_urlsafe(32), generated=True)


class KeyGuard(HTTPBearer):
    """A FastAPI dependency that lets a request pass only with one of the `accepted` bearer keys.

    Answers 401 otherwise. A WireRoute asks it before the body is read.
    """

    def __init__(self, *accepted: str) -> None:
        super().__init__()
        self.scheme_name = HTTPBearer.__name__  # one scheme in the OpenAPI document, not one a key
        self._accepted = accepted

    # A coroutine function: FastAPI runs a plain one in a thread, which costs more than the request.
    async def __call__(self, request: Request) -> None:
        self.check(request.scope)

    def check(self, scope: Scope) -> None:
        """Raises:
        ApiError: 401.
        """
        if not key_is_accepted(scope, self._accepted):
            raise unauthorized()


def key_is_accepted(scope: Scope, accepted: Sequence[str]) -> bool:
    """Whether a request carries one of the keys; takes the same time for every wrong key."""
    scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
    matches = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in accepted]
    return scheme.lower() == "bearer" and any(matches)


def unauthorized() -> ApiError:
    """The answer to a missing or wrong key."""
    return ApiError(
        401,
        "unauthorized",
        "The bearer key is missing or wrong.",
        fix="Send 'Authorization: Bearer <key>' with the key given at start; control routes of a "
        "rollout service take its admin key only.",
        field="Authorization",
        headers={"WWW-Authenticate": "Bearer"},
    )
