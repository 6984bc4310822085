"""How late the event loop runs its timers: the earliest sign that a handler blocks it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

_INTERVAL_S = 0.25


@contextlib.asynccontextmanager
async def watch_loop_lag(observe: Callable[[float], None]) -> AsyncIterator[None]:
    """While the body runs, call `observe` four times a second with the lag in seconds."""
    watcher = asyncio.create_task(_watch(observe))
    try:
        yield
    finally:
        watcher.cancel()


async def _watch(observe: Callable[[float], None]) -> None:
    loop = asyncio.get_running_loop()
    while True:
        due_s = loop.time() + _INTERVAL_S
        await asyncio.sleep(_INTERVAL_S)
        observe(max(0.0, loop.time() - due_s))
