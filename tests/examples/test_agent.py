"""The agent of examples: a real model calls code_interpreter through vLLM and the tool service."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from openrlhf_alp.data.smollm2 import unpack_smollm2

EXAMPLES = Path(__file__).parents[2] / "examples"
KEYS = {
    "OPENRLHF_ALP_ROLLOUT_API_KEY": "rollout-key-of-the-tests",
    "OPENRLHF_ALP_ROLLOUT_ADMIN_KEY": "admin-key-of-the-tests",
    "OPENRLHF_ALP_TOOL_API_KEY": "tool-key-of-the-tests",
}
START_S = 400.0


@contextlib.contextmanager
def serving(folder: Path, *command: str) -> Iterator[Path]:
    """Run a service; yields the file into which it writes its URL when it is ready."""
    url_file = folder / f"{command[0]}.url"
    with url_file.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command, "--port", "0", "--url-file", str(url_file)],
            env={**os.environ, **KEYS},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield url_file
    finally:
        process.terminate()
        process.wait(timeout=60)


def url_in(file: Path) -> str:
    give_up_s = time.monotonic() + START_S
    while not file.exists():
        assert time.monotonic() < give_up_s, file.with_suffix(".log").read_text()[-3000:]
        time.sleep(0.1)
    return file.read_text().strip()


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_a_small_model_calls_the_interpreter_and_uses_its_answer(tmp_path: Path) -> None:
    rollout = (
        *("services.rollout", "--model", str(unpack_smollm2()), "--tool-call-parser", "hermes"),
        *("--chat-template", str(EXAMPLES / "hermes_tools.jinja"), "--max-model-len", "1024"),
        *("--kv-cache-gb", "0.1", "--num-threads", "1"),
    )
    tool = ("services.tool", "--presets", "numpy", "--slots", "1")
    with serving(tmp_path, *rollout) as rollout_file, serving(tmp_path, *tool) as tool_file:
        urls = ["--rollout-url", url_in(rollout_file), "--tool-url", url_in(tool_file)]
        done = subprocess.run(
            [sys.executable, EXAMPLES / "agent.py", *urls, "--show-how", "What is 37 * 41?"],
            env={**os.environ, **KEYS},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    asked, called, answered, said = done.stdout.splitlines()
    assert asked == "user: What is 37 * 41?"
    assert called.startswith('assistant calls code_interpreter {"code": ')
    assert answered == "tool: 1517"
    assert "1517" in said
