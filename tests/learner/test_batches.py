"""A batch of any size is cut to what all ranks can train on together; nothing else is left out."""

from __future__ import annotations

import itertools
import json
import math
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from openrlhf_alp.learner.batches import BatchShape, fitting_part

Parse = Callable[..., SimpleNamespace]


def shape(**changes: Any) -> BatchShape:
    values: dict[str, Any] = {
        "num_ranks": 2,
        "group_size": 2,
        "rollout_micro_batch_size": 2,
        "train_micro_batch_size": 2,
        "train_batch_size": 8,
        "dynamic": False,
    }
    return BatchShape(**{**values, **changes})


def dealt_out(num_items: int, num_ranks: int) -> list[int]:
    """Items of each rank as `RayActorGroup.async_run_method_batch` deals them out."""
    chunk = math.ceil(num_items / num_ranks)
    return [len(range(num_items)[rank * chunk : (rank + 1) * chunk]) for rank in range(num_ranks)]


STATIC = list(itertools.product((1, 2, 3, 4, 8), (1, 2, 3, 5, 8), (1, 2, 3, 4), (1, 2, 3, 4)))


@pytest.mark.parametrize("num_groups", [1, 2, 3, 7, 125, 127, 128])
def test_every_rank_gets_equally_many_samples_forwards_and_micro_batches(num_groups: int) -> None:
    for ranks, group, forward, micro in STATIC:
        fit = shape(
            num_ranks=ranks,
            group_size=group,
            rollout_micro_batch_size=forward,
            train_micro_batch_size=micro,
        ).fit(num_groups * group)
        assert fit.num_samples % group == 0
        # No whole unit of a micro-batch per rank is given away.
        assert num_groups * group - fit.num_samples < math.lcm(group, ranks * micro)
        size = fit.rollout_micro_batch_size
        assert 1 <= size <= forward and fit.num_samples % size == 0
        [forwards] = set(dealt_out(fit.num_samples // size, ranks))
        assert forwards * size % micro == 0


@pytest.mark.parametrize("num_groups", [1, 2, 3, 7, 125, 127, 128])
def test_dynamic_steps_use_all_that_is_kept_on_every_rank(num_groups: int) -> None:
    for ranks, group, per_rank in itertools.product(
        (1, 2, 3, 4, 8), (1, 2, 3, 5, 8), (1, 2, 4, 16)
    ):
        asked = ranks * per_rank
        own = shape(num_ranks=ranks, group_size=group, train_batch_size=asked, dynamic=True)
        fit = own.fit(num_groups * group)
        assert fit.num_samples % group == 0
        if fit.num_samples == 0:
            continue
        share, rest = divmod(fit.num_samples, ranks)
        # As upstream's `setup_dynamic_batch` counts, on a rank that knows its own share only.
        step = own.dynamic_batch_size(share) // ranks
        assert rest == 0 and share % step == 0 and step * ranks <= asked


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_batch_that_divides_is_left_as_it_is(dynamic: bool) -> None:
    fit = shape(num_ranks=4, group_size=8, train_batch_size=256, dynamic=dynamic).fit(1024)
    assert (fit.num_samples, fit.train_batch_size) == (1024, 256)


def test_a_step_that_lost_three_of_128_groups_loses_no_more_than_it_must() -> None:
    # 125 groups of 8 on 4 ranks with micro-batches of 4: 1000 = 62 x 16 + 8.
    assert shape(num_ranks=4, group_size=8, train_micro_batch_size=4).fit(1000).num_samples == 992
    dynamic = shape(num_ranks=4, group_size=8, train_batch_size=256, dynamic=True).fit(1000)
    assert (dynamic.num_samples, dynamic.train_batch_size) == (992, 248)


def test_fewer_samples_than_a_micro_batch_per_rank_are_no_batch() -> None:
    assert shape(num_ranks=4).fit(6).num_samples == 0
    assert fitting_part([1] * 6, shape(num_ranks=4).fit(6), group_size=2, seed=0) == []


def test_groups_stay_whole_and_the_last_to_arrive_are_not_always_left_out() -> None:
    samples = [f"{group}{sample}" for group in "abc" for sample in "01"]
    fit = shape().fit(6)
    left_out = set()
    for seed in range(20):
        kept = fitting_part(samples, fit, group_size=2, seed=seed)
        assert len(kept) == 4 and kept == sorted(kept)
        [missing] = {sample[0] for sample in samples} - {sample[0] for sample in kept}
        left_out.add(missing)
    assert left_out == {"a", "b", "c"}


RANK = Path(__file__).with_name("uneven_rank.py")


@pytest.mark.e2e
@pytest.mark.timeout(600)
@pytest.mark.parametrize("dynamic", [False, True])
def test_two_ranks_train_on_a_batch_that_does_not_divide(
    parse: Parse, tmp_path: Path, dynamic: bool
) -> None:
    args = parse(
        *("--alp.enable", "--alp.sigma0", "0.01", "--actor.num_gpus_per_node", "2"),
        *("--rollout.batch_size", "4", "--train.batch_size", "8"),
    )
    args.train.dynamic_batch_enable = dynamic  # after parsing: it asks for flash attention
    args.train.max_tokens_per_gpu = 24
    args_file = tmp_path / "args.pickle"
    args_file.write_bytes(pickle.dumps(args))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, RANK, str(rank), port, args_file, tmp_path / f"{rank}.json"],
            env={**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=400)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)[-4000:]
    reports = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    # 8 of 8, 4 (dynamic: 6) of 6 and 8 of 8 samples: three updates on both.
    assert [report["updates"] for report in reports] == [[1, 2, 3], [1, 2, 3]]
    # Rank 0 logs what all ranks trained on, and it alone.
    assert reports[0]["logged_tokens"] == [
        sum(own) for own in zip(*(report["own_tokens"] for report in reports), strict=True)
    ]
    assert reports[1]["logged_tokens"] == [None, None, None]
