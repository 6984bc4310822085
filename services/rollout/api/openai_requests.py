"""What a request to an OpenAI route passes before it reaches vLLM: admission, and one default."""

import json
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.rollout.engines.protocol import Hold
from services.rollout.ledger import LedgerError
from services.rollout.wire.schemas import MAX_SAMPLES


class AdmittedApp:
    """An ASGI app whose requests count for --max-pending-samples until they are answered.

    vLLM gives no log-probs for `logprobs: true` while `top_logprobs` is null; OpenAI's contract,
    where that means no alternatives, is kept by sending it 0.
    """

    def __init__(self, app: ASGIApp, hold: Hold) -> None:
        self._app = app
        self._hold = hold

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await Request(scope, receive).body()
        try:
            fields = json.loads(body)
        except (ValueError, RecursionError):
            fields = None  # vLLM says what is wrong with it
        if not isinstance(fields, dict):
            await self._app(scope, _replaying(body, receive), send)
            return
        if _asks_for_sampled_logprobs(fields):
            body = json.dumps({**fields, "top_logprobs": 0}).encode()
            headers = [(k, v) for k, v in scope["headers"] if k != b"content-length"]
            headers.append((b"content-length", str(len(body)).encode()))
            scope = {**scope, "headers": headers}
        with self._hold(num_samples(fields)):
            await self._app(scope, _replaying(body, receive), send)


def num_samples(fields: dict[str, Any]) -> int:
    """Samples that a request asks for: `n` of every prompt. What vLLM will refuse counts as 1.

    Raises:
        LedgerError: `too_many_samples`, where /v1/generate would take no such `n` either.
    """
    n, prompt = fields.get("n"), fields.get("prompt")
    prompts = prompt if isinstance(prompt, list) else [prompt]
    several = any(isinstance(part, str | list) for part in prompts)
    per_prompt = n if isinstance(n, int) and n > 0 else 1
    if per_prompt > MAX_SAMPLES:
        message = f"n is {per_prompt}; one prompt is sampled at most {MAX_SAMPLES} times."
        raise LedgerError("too_many_samples", message)
    return int(per_prompt) * (len(prompts) if several else 1)


def _asks_for_sampled_logprobs(fields: dict[str, Any]) -> bool:
    return (
        "messages" in fields
        and fields.get("logprobs") is True
        and fields.get("top_logprobs") is None
        and not fields.get("logprob_token_ids")
    )


def _replaying(body: bytes, receive: Receive) -> Receive:
    """`receive` of a request whose body was read: the body again, then what the client does."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return first.pop() if first else await receive()

    return next_message
