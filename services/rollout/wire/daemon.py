"""A blocking call in a thread that nobody has to wait for."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")

DAEMON_NAME = "weight-transfer"


def in_daemon(call: Callable[[], Result]) -> Future[Result]:
    """Run `call` in a daemon thread.

    Neither `asyncio.run` nor the interpreter waits for it at their end, unlike for a thread of an
    executor: what waits inside NCCL may never come back.
    """
    outcome: Future[Result] = Future()
    outcome.set_running_or_notify_cancel()  # cancelling what waits for it leaves it alone

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name=DAEMON_NAME, daemon=True).start()
    return outcome
