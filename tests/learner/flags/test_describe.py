"""What `--dry_run` prints, and that it needs nothing but flags."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from openrlhf_alp.learner.flags.describe import describe
from openrlhf_alp.objective.methods import METHODS

Parse = Callable[..., SimpleNamespace]
FIELDS = [
    *("method", "source", "paper", "denominator", "level", "clip", "correction"),
    *("trust region", "aggregation", "numerator", "comparable"),
]


def described(args: SimpleNamespace) -> dict[str, str]:
    return {line[:15].strip(): line[15:] for line in describe(args).splitlines()}


@pytest.mark.e2e
def test_a_dry_run_needs_no_model_data_service_or_key_and_ends_with_0(tmp_path: Path) -> None:
    flags = ("--alp.method", "token-mis", "--rollout.service_urls", "http://127.0.0.1:9")
    environment = {k: v for k, v in os.environ.items() if "OPENRLHF_ALP" not in k}
    done = subprocess.run(
        [sys.executable, "-m", "openrlhf_alp.cli.train_ppo_ray", *flags, "--dry_run"],
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "paper          Table 5, Token-MIS" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["grpo", "dppo-tv", "trm", "seq-alp"])
def test_every_choice_has_its_line(parse: Parse, method: str) -> None:
    lines = described(parse("--alp.method", method))
    assert [name for name in lines if name != "choice"] == FIELDS
    assert lines["method"].startswith(f"{method}: ")
    assert lines["source"] == METHODS[method].source


def test_the_line_of_a_correction_by_hand(parse: Parse) -> None:
    lines = described(parse("--alp.method", "icepop"))
    assert lines["denominator"].startswith("old policy: one clean forward pass")
    assert lines["clip"] == "ratio in [0.8, 1.28], dual clip 10.0"
    assert lines["correction"] == (
        "mask by token: ratio of old policy over rollout engine in [0.5, 5], factor its ratio"
    )
    assert lines["paper"].startswith("no row")


def test_alp_and_its_baselines_are_said_to_share_clip_and_aggregation(parse: Parse) -> None:
    shared = described(parse("--alp.method", "seq-alp"))["comparable"]
    assert shared == (
        "window, dual clip and aggregation are those of seq-mis, seq-bypass, seq-alp-mis"
    )


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--alp.clip_low_high", "0.1", "0.2"], "--alp.clip_low_high differ"),
        (["--alp.dual_clip", "3"], "--alp.dual_clip differ"),
        (["--actor.loss_agg_mode", "seq-mean-token-mean"], "--actor.loss_agg_mode differ"),
    ],
)
def test_a_change_that_makes_a_comparison_unfair_is_named(
    parse: Parse, flags: list[str], named: str
) -> None:
    lines = described(parse("--alp.method", "token-alp", *flags))
    assert lines["comparable"].startswith(named)


def test_the_noise_is_described_and_said_to_have_no_effect_without_it(parse: Parse) -> None:
    noise = ("--alp.draws", "2", "--alp.layers", "late", "--alp.sigma0", "0.1")
    assert described(parse("--alp.method", "token-alp", *noise))["numerator"] == (
        "perturbed learner: sigma0 0.1 (relative), one sigma per dimension and layer, layers late, "
        "2 draws in one forward pass of 2 times the samples and memory, learning rate 0.0005, "
        "seed 42"
    )
    clean = described(parse("--alp.method", "grpo", *noise))["numerator"]
    assert clean.startswith("clean learner; ") and "--alp.draws" in clean


def test_without_a_method_it_says_so(parse: Parse) -> None:
    assert "OpenRLHF's own policy loss" in describe(parse())
