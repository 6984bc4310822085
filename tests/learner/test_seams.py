"""The seams fit the installed OpenRLHF, and say so when they do not."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from openrlhf_alp.learner import seams
from openrlhf_alp.learner.flags.settle import add_arguments, settle
from openrlhf_alp.learner.launch import ray_options


def test_the_installed_openrlhf_fits_every_seam() -> None:
    seams.check_upstream()


def test_another_version_is_refused_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: "0.12.0")
    with pytest.raises(seams.UpstreamDriftError, match=r"0\.12\.0 .*pip install .*==0\.11\.2"):
        seams.check_upstream()


def test_a_changed_signature_is_named() -> None:
    drifted = dataclasses.replace(seams.SEAMS[0], parameters=("self", "models"))
    with pytest.raises(seams.UpstreamDriftError, match=r"DeepspeedStrategy\.prepare takes"):
        seams._check_seam(drifted)


def test_a_symbol_that_is_gone_is_named() -> None:
    gone = dataclasses.replace(seams.SEAMS[0], symbol="openrlhf.models:PolicyLoss.backwards")
    with pytest.raises(seams.UpstreamDriftError, match=r"PolicyLoss\.backwards is gone"):
        seams._check_seam(gone)


def test_every_replacement_of_ours_exists() -> None:
    for seam in seams.SEAMS:
        if seam.replaced_by.startswith("openrlhf_alp"):
            assert seams._resolve(seam.replaced_by)


def test_our_flags_and_upstreams_are_parsed_together(
    parse: Callable[..., SimpleNamespace],
) -> None:
    args = parse("--alp.enable", "--alp.method", "seq-alp", "--alp.sigma0", "0.003")
    assert args.alp.method == "seq-alp" and args.alp.noise.sigma0 == 0.003
    assert args.actor.adam.lr == 1e-3
    assert args.actor.eps_clip_low_high == (0.2, 0.2)  # set by upstream's validation


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--alp.method", "ppo"), "argument --alp.method: invalid choice: 'ppo'"),
        (("--alp.sigmaO", "0.1"), "unrecognized arguments: --alp.sigmaO 0.1"),
    ],
)
def test_a_wrong_flag_shows_one_line_of_usage_and_the_error(
    parse: Callable[..., SimpleNamespace],
    capsys: pytest.CaptureFixture,
    flags: tuple[str, ...],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(*flags)
    assert stopped.value.code == 2
    usage, error = capsys.readouterr().err.splitlines()
    assert usage == f"usage: {seams.USAGE}"
    assert message in error


@pytest.mark.e2e
def test_one_help_shows_both_sets_of_flags() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "openrlhf_alp.cli.train_ppo_ray", "--help"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    for flag in ("--alp.sigma0", "--rollout.service_urls", "--actor.adam.lr", "--train.max_epochs"):
        assert flag in result.stdout


@pytest.mark.e2e
def test_openrlhfs_own_test_suite_passes_with_the_shims() -> None:
    folder = importlib.metadata.distribution("openrlhf").locate_file("tests")
    run = (
        "import sys, pytest; import openrlhf_alp.learner; "
        "options = ['-q', '-p', 'no:cacheprovider', '-c', '/dev/null']; "
        f"sys.exit(pytest.main([*options, {str(folder)!r}]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", run], capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert "221 passed" in result.stdout


def test_openrlhf_starts_ray_with_its_own_variables_and_ours(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends where OpenRLHF builds its strategy, right after `ray.init`."""
    import openrlhf.utils
    import ray

    class Reached(Exception):
        pass

    def stop(_args: SimpleNamespace) -> None:
        raise Reached

    started: list[dict] = []
    flags = ("--actor.model_name_or_path", str(tiny_model), "--actor.num_gpus_per_node", "1")
    flags += ("--algo.advantage.estimator", "reinforce", "--reward.remote_url", "math-verify")
    monkeypatch.setattr(sys, "argv", ["train", *flags])
    monkeypatch.setattr(ray, "init", lambda **options: started.append(options))
    monkeypatch.setattr(openrlhf.utils, "get_strategy", stop)
    with pytest.raises(Reached):
        seams.run_upstream(add_arguments, settle, ray_options)
    environment = started[0]["runtime_env"]["env_vars"]
    assert {"TOKENIZERS_PARALLELISM", "NCCL_DEBUG"} <= environment.keys()
    hook = started[0]["runtime_env"]["worker_process_setup_hook"]
    assert hook.endswith("compat.install_before_use")
