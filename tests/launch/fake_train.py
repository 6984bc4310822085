"""A training run that logs made-up steps. Like Ray it leaves a daemon behind that nobody owns."""

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

DAEMON = (
    "import os, signal\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "os.setsid()\n"
    "print(os.getpid(), flush=True)\n"
    "signal.pause()\n"
)


def start_daemon() -> int:
    """Starts a process that ignores SIGTERM and whose parent, a shell, is gone at once."""
    shell = subprocess.Popen(
        ["sh", "-c", '"$0" -c "$1" &', sys.executable, DAEMON], stdout=subprocess.PIPE, text=True
    )
    assert shell.stdout is not None
    pid = int(shell.stdout.readline())
    shell.wait()
    return pid


def log_step(path: Path, step: int) -> None:
    row = {
        "global_step": step,
        "rollout/reward_mean": min(1.0, step / 10),
        "rollout/response_length_mean": 8.0,
        "rollout/num_samples": 64.0,
        "timing/generation": 2.0,
        **{f"alp/log_ratio_p{percent:02d}": 0.0 for percent in (1, 25, 50, 75, 99)},
    }
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--metrics", type=Path, required=True)
    parser.add_argument("--train-data", type=Path, required=True)
    parser.add_argument("--pids", type=Path, required=True)
    parser.add_argument("--mode", choices=["ok", "fails", "hangs", "kills_service"], required=True)
    arguments = parser.parse_args()
    daemon = start_daemon()
    earlier = arguments.pids.read_text().split()
    with arguments.pids.open("a") as file:
        file.write(f"{os.getpid()}\n{daemon}\n")
    num_steps = len(arguments.train_data.read_text().splitlines()) // 8
    for step in range(1, num_steps + 1):
        log_step(arguments.metrics, step)
        if arguments.mode == "fails":
            sys.exit("error: a loss of NaN; fix: lower the learning rate")
        if arguments.mode == "kills_service":
            os.kill(int(earlier[0]), signal.SIGKILL)
        if arguments.mode != "ok":
            signal.pause()
