"""The command as a process that starts its own services, killed twice and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.common.launching import wait_until_gone
from benchmarks.policies.tiny_policy import make_tokenizer, tiny_config

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

MOST_S = 20.0
NUM_PROBLEMS = 12


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Greedy answers of a random model: long, and different from problem to problem."""
    folder = tmp_path_factory.mktemp("evaluate")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(tokenizer, max_positions=256))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"q": f"What is {n} + 1?", "a": str(n + 1)} for n in range(NUM_PROBLEMS)]
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        *("--model", str(folder / "model"), "--engine", "hf", "--dtype", "float32"),
        *("--suite", str(folder / "own.jsonl"), "--problem_field", "q", "--label_field", "a"),
        *("--template", "chat-bare", "--temperature", "0", "--n", "2", "--max_new_tokens", "48"),
        *("--max_model_len", "128", "--workers", "1", "--concurrency", "4"),
    ]


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(options: list[str]) -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def begin(run: Path, num_servers: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "openrlhf_alp.cli.main", "evaluate", *options]
        command += ["--output", str(run), "--num_servers", str(num_servers)]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        started.append(
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
            )
        )
        return started[-1]

    yield begin
    for process in started:
        process.terminate()
        process.communicate(timeout=60)


def answers(run: Path) -> dict[tuple[str, int], tuple[str, str]]:
    """(problem, number) -> token ids and log-probs."""
    path = run / "answers" / "own.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    return {(a["problem_id"], a["sample"]): (a["token_ids"], a["logprobs"]) for a in whole}


def kill_after(start: Start, run: Path, num_servers: int, count: int) -> int:
    """Kills the command once so many answers are stored; returns how many there are then."""
    process = start(run, num_servers)
    while len(answers(run)) < count:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    family = psutil.Process(process.pid).children(recursive=True)
    # Below its guardian, whose command line ends in the service's.
    servers = [p for p in family if p.cmdline()[1:3] == ["-m", "services.rollout"]]
    assert len(servers) == num_servers
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert wait_until_gone(family, MOST_S) == []
    return len(answers(run))


def test_killed_twice_with_three_servers_the_answers_are_those_of_one(
    start: Start, tmp_path: Path
) -> None:
    run = tmp_path / "three"
    stored = kill_after(start, run, 3, 2)
    assert stored < 2 * NUM_PROBLEMS
    again = kill_after(start, run, 3, stored + 2)
    process = start(run, 3)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert f"{again} of {2 * NUM_PROBLEMS} answers are there already" in output
    one = start(tmp_path / "one", 1)
    output, _ = one.communicate(timeout=300)
    assert one.returncode == 0, output
    expected = answers(tmp_path / "one")
    assert len(expected) == 2 * NUM_PROBLEMS
    assert len({ids for ids, _ in expected.values()}) > 1
    assert answers(run) == expected
    for name in ("three", "one"):
        (suite,) = json.loads((tmp_path / name / "results.json").read_text())["suites"]
        assert (suite["num_problems"], suite["n"]) == (NUM_PROBLEMS, 2)
