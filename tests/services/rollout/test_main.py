"""The command line: what a user gets for a wrong start, and a whole life of the service."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest


def run(*flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "services.rollout", *flags],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_missing_model_folder_is_exit_2_with_cause_and_fix(tmp_path: Path) -> None:
    result = run("--model", str(tmp_path / "nowhere"), "--port", "0")
    assert result.returncode == 2
    assert "does not exist" in result.stderr and "Fix:" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_folder_without_weights_is_exit_2(tmp_path: Path, model_folder: Path) -> None:
    for file in model_folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    result = run("--model", str(tmp_path), "--port", "0")
    assert result.returncode == 2
    assert "no .safetensors file" in result.stderr and "Fix:" in result.stderr


def test_an_id_that_no_hub_or_cache_knows_is_exit_2(tmp_path: Path) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    result = run("--model", "some-org/some-model", "--port", "0", **offline)
    assert result.returncode == 2
    assert "cannot be fetched as a Hugging Face id" in result.stderr and "Fix:" in result.stderr


def test_an_id_in_the_local_cache_is_used_without_network(
    tmp_path: Path, model_folder: Path
) -> None:
    repository = tmp_path / "models--some-org--some-model"
    snapshot = repository / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c0ffee")
    for file in model_folder.iterdir():
        if file.suffix != ".safetensors":
            (snapshot / file.name).write_bytes(file.read_bytes())
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    result = run("--model", "some-org/some-model", "--port", "0", **offline)
    # It got as far as the snapshot, which has no weights.
    assert result.returncode == 2
    assert f"{snapshot} holds no .safetensors file" in result.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "model"),
        (["--model", "m", "--port", "70000"], "port"),
        (["--model", "m", "--surprise", "1"], "surprise"),
        (
            ["--model", "m", "--host", "0.0.0.0", "--port", "0"],
            "--api-key or $OPENRLHF_ALP_ROLLOUT_API_KEY",
        ),
        (
            ["--model", "m", "--host", "0.0.0.0", "--port", "0", "--api-key", "long-enough"],
            "--admin-key or $OPENRLHF_ALP_ROLLOUT_ADMIN_KEY",
        ),
        (["--model", "m", "--api-key", "short", "--port", "0"], "--api-key"),
        (["--model", "m", "--faults.kill-after-tokens", "9"], "--engine hf"),
    ],
)
def test_bad_flags_are_exit_2_and_named(flags: list[str], message: str) -> None:
    result = run(*flags)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_flags_win_over_the_environment(tmp_path: Path) -> None:
    result = run("--model", str(tmp_path / "flag"), OPENRLHF_ALP_ROLLOUT_MODEL="environment")
    assert "flag" in result.stderr and "environment" not in result.stderr


def test_a_service_with_generated_keys_serves_and_stops(tmp_path: Path, model_folder: Path) -> None:
    url_file = tmp_path / "url"
    flags = ["--model", str(model_folder), "--engine", "hf", "--port", "0"]
    with subprocess.Popen(
        [sys.executable, "-m", "services.rollout", *flags, "--url-file", str(url_file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline().strip() for _ in range(3)]
            keys = [line.rpartition(": ")[2] for line in lines[:2]]
            assert lines[2] == f"listening on {url_file.read_text().strip()}"
            headers = {"authorization": f"Bearer {keys[0]}"}
            with httpx.Client(base_url=url_file.read_text().strip()) as http:
                assert http.get("/v1/contract").status_code == 401
                contract = http.get("/v1/contract", headers=headers).json()
                weights_dir = Path(contract["weights_dir"])
                assert weights_dir.is_dir()
                assert http.post("/v1/resume", headers=headers).status_code == 401
            stopping_s = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 0
            assert time.monotonic() - stopping_s < 15
            assert not weights_dir.exists()
        finally:
            process.kill()
