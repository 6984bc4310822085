"""Runs a service in a child process for as long as a benchmark needs it."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
_START_S = 600.0
"""vLLM loads and may compile."""
_STOP_S = 60.0


def environment(**variables: str) -> dict[str, str]:
    """The environment of a child process, which imports this checkout."""
    return {**os.environ, **variables, "PYTHONPATH": str(REPOSITORY)}


@contextlib.contextmanager
def serving(*command: str, **variables: str) -> Iterator[tuple[str, int]]:
    """Runs `python COMMAND --url-file FILE`; yields the URL it writes and its process id.

    Args:
        variables: added to the environment.
    """
    with tempfile.TemporaryDirectory() as folder:
        url_file = Path(folder) / "url"
        arguments = [sys.executable, *command, "--url-file", str(url_file)]
        with running(arguments, **variables) as process:
            give_up_s = time.monotonic() + _START_S
            while not url_file.exists():
                if process.poll() is not None or time.monotonic() > give_up_s:
                    raise SystemExit(f"{command[1]} did not start; see its message above.")
                time.sleep(0.05)
            yield url_file.read_text().strip(), process.pid


@contextlib.contextmanager
def running(arguments: list[str], **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """A child process that is ended on the way out; its errors stay visible."""
    process = subprocess.Popen(
        arguments, cwd=REPOSITORY, env=environment(**variables), stdout=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
