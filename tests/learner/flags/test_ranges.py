"""Numbers that OpenRLHF takes and that no run can have are refused with their range."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from openrlhf_alp.learner.flags.ranges import RANGES, WINDOWS, numbers

Parse = Callable[..., SimpleNamespace]


@pytest.mark.parametrize(
    ("flag", "wrong", "words"),
    [
        ("rollout.n_samples_per_prompt", ["0"], "1 or more"),
        ("rollout.max_new_tokens", ["0"], "1 or more"),
        ("train.batch_size", ["-4"], "1 or more"),
        ("data.max_len", ["-5"], "1 or more"),
        ("logger.logging_steps", ["0"], "1 or more"),
        ("ckpt.save_steps", ["0"], "1 or more, or -1 for never"),
        ("eval.steps", ["-2"], "1 or more, or -1 for never"),
        ("actor.adam.lr", ["-0.5"], "0 or more"),
        ("actor.adam.lr", ["inf"], "0 or more"),
        ("rollout.temperature", ["0"], "above 0"),
        ("rollout.top_p", ["1.5"], "above 0 and at most 1"),
        ("actor.adam.betas", ["0.9", "1.0"], "0 or more and below 1"),
        ("actor.lr_warmup_ratio", ["3"], "from 0 to 1"),
        ("ds.zero_stage", ["7"], "0, 1, 2 or 3"),
        ("actor.adam.eps", ["0"], "above 0"),
        ("ds.lora.dropout", ["1"], "0 or more and below 1"),
        ("actor.dual_clip", ["0.5"], "above 1"),
        ("train.seed", ["4294967296"], "from 0 to 4294967295"),
        ("vllm.gpu_memory_utilization", ["0"], "above 0 and at most 1"),
        ("reward.stop_properly_penalty_coef", ["2"], "from 0 to 1"),
    ],
)
def test_a_number_out_of_its_range_is_refused_by_name(
    parse: Parse, flag: str, wrong: list[str], words: str
) -> None:
    with pytest.raises(ValueError) as refused:
        parse(f"--{flag}", *wrong)
    assert str(refused.value).startswith(f"--{flag} is ")
    assert str(refused.value).endswith(f". Set it to {words}.")


@pytest.mark.parametrize(
    "flag",
    ["actor.adam.lr", "alp.lr", "tool.timeout_s", "rollout.max_lost_share", "reward.clip_range"],
)
def test_nan_is_refused_for_every_flag_of_ours_and_of_openrlhf(parse: Parse, flag: str) -> None:
    both = ["nan", "1"] if flag == "reward.clip_range" else ["nan"]
    with pytest.raises(ValueError, match=rf"--{flag} is nan\. Give it a number"):
        parse(f"--{flag}", *both)


@pytest.mark.parametrize("window", [("10", "-10"), ("0", "0")])
def test_a_window_without_room_is_refused(parse: Parse, window: tuple[str, str]) -> None:
    """It would make every reward the same number."""
    with pytest.raises(ValueError, match=r"clip_range is .* Give the lower number first"):
        parse("--reward.clip_range", *window)


def test_lengths_that_leave_nothing_are_refused(parse: Parse) -> None:
    with pytest.raises(ValueError, match=r"leaves no token of --data\.max_len 64 for the prompt"):
        parse("--rollout.max_new_tokens", "64", "--data.max_len", "64")
    with pytest.raises(ValueError, match="overlong_buffer_len 30 is more than"):
        parse("--rollout.max_new_tokens", "20", "--reward.overlong_buffer_len", "30")


def test_every_range_is_one_of_a_flag_that_there_is(parse: Parse) -> None:
    """A flag that upstream renames would lose its range without a word."""
    known = dict(numbers(parse()))
    named = [*(name for _, _, names in RANGES for name in names), *WINDOWS]
    assert [name for name in named if name not in known] == []


def test_the_edges_of_the_ranges_are_taken(parse: Parse) -> None:
    parse("--actor.adam.lr", "0", "--eval.steps", "-1", "--eval.temperature", "0")
    parse(
        "--ds.zero_stage",
        "0",
        "--actor.max_norm",
        "inf",
        "--algo.kl.target",
        "0",
        "--rollout.top_p",
        "1",
    )
