"""A training run that logs made-up steps. Like Ray it leaves a daemon behind that nobody owns."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

MODES = (
    *("ok", "fails", "fails_later", "hangs", "stubborn", "is_killed"),
    *("kills_service", "kills_always", "holds"),
)
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


def kill(url_file: Path, pid: int) -> None:
    """Kills a service, and waits until it is there again."""
    os.kill(pid, signal.SIGKILL)
    while url_file.exists():
        time.sleep(0.05)
    while not url_file.exists():
        time.sleep(0.05)


def wait_to_be_evaluated(hold: Path) -> None:
    hold.with_suffix(".partial").write_text("2")
    hold.with_suffix(".partial").rename(hold)
    while hold.exists():
        time.sleep(0.05)


def run(arguments: argparse.Namespace) -> None:
    services = arguments.pids.read_text().split()
    with arguments.pids.open("a") as file:
        file.write(f"{os.getpid()}\n{start_daemon()}\n")
    latest = arguments.run / "checkpoints" / "_actor" / "latest"
    first = int(latest.read_text().removeprefix("global_step")) + 1 if arguments.resume else 1
    if arguments.resume and arguments.mode == "holds" and first == 3:
        wait_to_be_evaluated(arguments.run / "hold")
    num_steps = len(arguments.train_data.read_text().splitlines()) // 8
    for step in range(first, num_steps + 1):
        log_step(arguments.run / "metrics.jsonl", step)
        if step % 2 == 0:
            (latest.parent / f"global_step{step}").mkdir(parents=True, exist_ok=True)
            latest.write_text(f"global_step{step}")
        misbehave(arguments, step, services)


def misbehave(arguments: argparse.Namespace, step: int, services: list[str]) -> None:
    mode = arguments.mode
    if mode == "fails" or (mode == "fails_later" and step == 3):
        sys.exit("error: a loss of NaN; fix: lower the learning rate")
    if mode == "is_killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if mode in ("kills_service", "kills_always") and step == 2:
        kill(arguments.run / "logs" / "rollout-0.url", int(services[-2]))
        if mode == "kills_always":
            os.kill(int(arguments.pids.read_text().split()[-2]), signal.SIGKILL)
            signal.pause()
    if mode == "holds" and step == 2:
        wait_to_be_evaluated(arguments.run / "hold")
    if mode in ("hangs", "stubborn"):
        while True:
            signal.pause()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--train-data", type=Path, required=True)
    parser.add_argument("--pids", type=Path, required=True)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--mode", choices=MODES, required=True)
    arguments = parser.parse_args()
    if arguments.mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    run(arguments)


if __name__ == "__main__":
    main()
