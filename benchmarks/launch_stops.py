"""Seconds to the last process gone after Ctrl-C, and after kill -9 of the launch and of each of its
children, at every stage of a launch of real programs on a tiny model; fails above 20 s.

    python benchmarks/launch_stops.py [--stages "warm-up" training] [--only Ctrl-C launch children]

A service that is killed while the learner runs is started again: a test sees to that. Training goes
on without an evaluation that is killed; exit status 0 then says that the run came to its end, and
its seconds do not count. Earlier stages are left out where what runs in the stage itself stays the
same.
"""

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.common.launching import STAGES, RealLaunch, start_until, wait_until_gone

MOST_S = 20.0
_GIVE_UP_S = 4 * MOST_S
_MODULES = {
    **{word: word for word in ("services.tool", "services.rollout", "prepare-data")},
    **{"flags.check": "the check", "stages.warmup": "the warm-up", "evaluation/": "evaluate"},
    "cli.train_ppo_ray": "the learner",
}
"""Word of a command line -> the child's name in the table."""


def measure(stage: str, end: Callable[[RealLaunch], object]) -> tuple[int, int, float, list[str]]:
    """Exit status, processes of the run, seconds until all are gone, and words of its children."""
    with tempfile.TemporaryDirectory() as folder:
        launch = start_until(stage, RealLaunch, Path(folder), directly=True)
        try:
            family = launch.family()
            words = [word for word in _MODULES if launch.child(word)]
            began_s = time.monotonic()
            end(launch)
            output, _ = launch.process.communicate(timeout=_GIVE_UP_S)
            left = wait_until_gone(family, _GIVE_UP_S)
            took_s = time.monotonic() - began_s
        finally:
            launch.process.terminate()
            launch.process.communicate(timeout=_GIVE_UP_S)
        if left:
            raise RuntimeError(f"{stage}: {[p.cmdline() for p in left]} still run\n{output}")
        return launch.process.returncode, len(family), took_s, words


def kill(launch: RealLaunch, word: str) -> None:
    """Kills a child of the stage, which in this launch may come a moment later."""
    launch.wait_until(lambda: launch.child(word))
    launch.kill(word)


def main() -> int:
    """Prints a line per trial; returns 1 when one took too long."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    ways = ["Ctrl-C", "launch", "children"]
    parser.add_argument("--only", nargs="+", choices=ways, default=ways)
    options = parser.parse_args()
    slowest = 0.0
    print(
        "| stage | ended | exit status | processes | seconds |\n|---|---|---|---|---|", flush=True
    )

    def trial(stage: str, what: str, end: Callable[[RealLaunch], object]) -> list[str]:
        nonlocal slowest
        status, count, took_s, words = measure(stage, end)
        slowest = max(slowest, took_s if status else 0.0)
        print(f"| {stage} | {what} | {status} | {count} | {took_s:.1f} |", flush=True)
        return words

    for stage in options.stages:
        if options.only != ["launch"]:
            # Also for the children alone: it says which ones there are.
            words = trial(stage, "Ctrl-C", lambda launch: launch.process.send_signal(signal.SIGINT))
        if "launch" in options.only:
            trial(stage, "kill -9 of the launch", lambda launch: launch.process.kill())
        for word in words if "children" in options.only else ():
            if word.startswith("services.") and "cli.train_ppo_ray" in words:
                continue
            trial(stage, f"kill -9 of {_MODULES[word]}", partial(kill, word=word))
    print(f"slowest: {slowest:.1f} s, asked: at most {MOST_S:g} s")
    return int(slowest > MOST_S)


if __name__ == "__main__":
    sys.exit(main())
