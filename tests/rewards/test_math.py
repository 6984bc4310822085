import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import psutil
import pytest

from openrlhf_alp.rewards.math import MathReward
from openrlhf_alp.rewards.protocol import RewardUnavailable

HANGS = r"\sum_{k=1}^{100000000} \frac{1}{k^3+k}"
"""A label that takes minutes to work out, inside C code."""


@pytest.fixture
def reward():
    made = MathReward(timeout_s=2.0)
    yield made
    made.close()


async def test_right_is_one_and_wrong_is_zero(reward):
    right = await reward.score(prompt="What is 3 + 4?", response="It is 7.", label="7")
    wrong = await reward.score(prompt="What is 3 + 4?", response="It is 8.", label="7")
    assert (right.value, wrong.value) == (1.0, 0.0)
    assert reward.counts == Counter(scored=2)


async def test_every_result_names_the_same_details_in_the_same_order(reward):
    responses = ("It is 7.", "3 + 4", "no idea")
    results = [await reward.score(prompt="", response=text, label="7") for text in responses]
    assert [list(result.detail) for result in results] == [["answered", "unevaluated"]] * 3
    assert [tuple(result.detail.values()) for result in results] == [(1, 0), (1, 1), (0, 0)]


async def test_a_hanging_comparison_is_killed_named_and_counted_and_the_next_one_works(reward):
    with pytest.raises(RewardUnavailable, match="longer than 2") as caught:
        await reward.score(prompt="", response="7", label=HANGS)
    assert caught.value.reason == "timeout"
    assert (await reward.score(prompt="", response="7", label="7")).value == 1.0
    assert reward.counts == Counter(timeout=1, scored=1)


async def test_a_label_that_is_no_mathematics_has_no_reward(reward):
    with pytest.raises(RewardUnavailable, match="drop the row") as caught:
        await reward.score(prompt="", response="7", label="???")
    assert caught.value.reason == "label_not_parsable"
    assert reward.counts == Counter(label_not_parsable=1)


async def test_a_worker_that_dies_is_named_and_replaced():
    reward = MathReward(timeout_s=60.0)
    await reward.score(prompt="", response="7", label="7")
    before = set(psutil.Process().children(recursive=True))
    pending = asyncio.create_task(reward.score(prompt="", response="7", label=HANGS))
    await asyncio.wait_for(_until_busy(before), timeout=60)
    for process in before:
        if _is_worker(process):
            process.send_signal(signal.SIGKILL)
    with pytest.raises(RewardUnavailable) as caught:
        await pending
    assert caught.value.reason == "crashed"
    assert (await reward.score(prompt="", response="7", label="7")).value == 1.0
    reward.close()


async def test_sixty_four_answers_are_scored_in_about_a_second(reward):
    """A training step waits for this. It takes 0.1 s on two quiet cores; the bound allows for busy
    ones, but not for a process per answer."""
    await reward.score(prompt="", response="7", label="7")
    started_s = time.monotonic()
    results = await asyncio.gather(
        *(
            reward.score(prompt="", response=f"3 + {number} = {number + 3}", label=str(number + 3))
            for number in range(64)
        )
    )
    assert time.monotonic() - started_s < 5.0
    assert sum(result.value for result in results) == 64


@pytest.mark.parametrize("arguments", [{"num_workers": 0}, {"timeout_s": 0.0}])
def test_a_pool_that_could_never_work_is_refused(arguments):
    with pytest.raises(ValueError, match="at least one worker and a time above 0"):
        MathReward(**arguments)


def test_no_worker_outlives_a_parent_that_was_killed(tmp_path):
    """What happens when Ray kills an actor: SIGKILL, no clean-up code runs."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import asyncio\n"
        "from openrlhf_alp.rewards.math import MathReward\n"
        "if __name__ == '__main__':\n"
        "    reward = MathReward()\n"
        "    asyncio.run(reward.score(prompt='', response='7', label='7'))\n"
        "    print('ready', flush=True)\n"
        "    input()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    with parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        children = psutil.Process(parent.pid).children(recursive=True)
        assert any(_is_worker(child) for child in children)
        parent.kill()
        parent.wait()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []


def _is_worker(process: psutil.Process) -> bool:
    """Workers are the grandchildren: this process starts the fork server, which forks them."""
    parent = process.parent()
    return parent is not None and "forkserver" in " ".join(parent.cmdline())


async def _until_busy(processes: set[psutil.Process]) -> None:
    workers = [process for process in processes if _is_worker(process)]
    start_s = {worker: worker.cpu_times().user for worker in workers}
    while not any(worker.cpu_times().user > start_s[worker] + 0.1 for worker in workers):
        await asyncio.sleep(0)
