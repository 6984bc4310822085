"""Whole runs: OpenRLHF's loop on Ray and DeepSpeed, rollouts from a service in its own process."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from openrlhf_alp.objective.metric_names import LAGS
from openrlhf_alp.replay.files.read import find_files, read_batch
from openrlhf_alp.replay.files.records import RecordedBatch

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

KEYS = {
    "OPENRLHF_ALP_ROLLOUT_API_KEY": "api-key-of-a-test",
    "OPENRLHF_ALP_ROLLOUT_ADMIN_KEY": "admin-key-of-a-test",
    "OPENRLHF_ALP_TOOL_API_KEY": "tool-key-of-a-test",
}
RUN_S = 400
PROMPTS_PER_STEP = 2


def command(
    model: Path, folder: Path, url: str, *, steps: int, flags: tuple[str, ...]
) -> list[str]:
    data = folder / "train.jsonl"
    rows = [{"input": f"What is {i} + 1?", "label": str(i + 1)} for i in range(steps * 2)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        *(sys.executable, "-m", "openrlhf_alp.cli.train_ppo_ray"),
        *("--actor.model_name_or_path", str(model), "--actor.num_gpus_per_node", "1"),
        *("--rollout.service_urls", url, "--data.max_len", "128", "--rollout.max_new_tokens", "6"),
        *("--data.prompt_dataset", str(data), "--data.input_key", "input"),
        *("--data.label_key", "label", "--data.apply_chat_template"),
        *("--rollout.batch_size", str(PROMPTS_PER_STEP), "--rollout.n_samples_per_prompt", "2"),
        *("--rollout.micro_batch_size", "2", "--train.batch_size", "4"),
        *("--train.micro_batch_size", "2", "--algo.advantage.estimator", "group_norm"),
        *("--algo.kl.init_coef", "0", "--actor.adam.lr", "1e-3"),
        *("--ckpt.path", str(folder / "checkpoints"), "--ckpt.output_dir", str(folder / "export")),
        *("--logger.metrics_jsonl", str(folder / "metrics.jsonl")),
        *flags,
    ]


def start(arguments: list[str], log: Path) -> subprocess.Popen:
    environment = {**os.environ, **KEYS, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    with log.open("w") as output:
        return subprocess.Popen(arguments, env=environment, stdout=output, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen, log: Path) -> tuple[int, str, list[psutil.Process]]:
    """Exit status, output, and what is left of the processes it had started."""
    started: dict[int, psutil.Process] = {}
    give_up_s = time.monotonic() + RUN_S
    while process.poll() is None and time.monotonic() < give_up_s:
        for child in psutil.Process(process.pid).children(recursive=True):
            started.setdefault(child.pid, child)
        time.sleep(0.5)
    if process.poll() is None:
        process.terminate()
    status = process.wait(timeout=60)
    _, alive = psutil.wait_procs(started.values(), timeout=20)
    return status, log.read_text(), [p for p in alive if p.is_running()]


def metrics(folder: Path) -> list[dict[str, float]]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.parametrize(
    ("method", "transport", "dtype"), [("token-alp", "file", "bf16"), ("token-mis", "http", "fp32")]
)
def test_a_run_trains_pushes_and_exports_a_clean_model(
    tiny_model: Path, start_service: Any, tmp_path: Path, method: str, transport: str, dtype: str
) -> None:
    other = shutil.copytree(tiny_model, tmp_path / "other-weights") / "model.safetensors"
    save_file(
        {name: 2 * tensor for name, tensor in load_file(other).items()}, other, {"format": "pt"}
    )
    flags = (
        *("--alp.enable", "--alp.method", method, "--alp.sigma0", "0.01"),
        *("--rollout.weight_transport", transport, "--alp.record", str(tmp_path / "batches")),
        *("--ds.param_dtype", dtype),
    )
    log = tmp_path / "train.log"
    with start_service(other.parent, tmp_path, "--engine", "hf") as service:
        arguments = command(tiny_model, tmp_path, service.url, steps=2, flags=flags)
        status, output, left = finish(start(arguments, log), log)
        served = service.log.read_text()
    assert status == 0, output[-4000:]
    assert not left
    steps = metrics(tmp_path)
    assert [step["global_step"] for step in steps] == [1, 2]
    # The first push makes the service's weights the learner's; each step adds one.
    assert [step["rollout/policy_version"] for step in steps] == [1, 2]
    assert ("/v1/weights/files/update-1-" in served) == (transport == "http")
    assert all(step["alp/num_tokens"] > 0 and step["rollout/num_samples"] == 4 for step in steps)
    with safe_open(tmp_path / "export" / "model.safetensors", framework="pt") as exported:
        names = list(exported.keys())
        dtypes = {exported.get_slice(name).get_dtype() for name in names}
    assert not [name for name in names if "alp" in name]
    assert dtypes == {"F32" if dtype == "fp32" else "BF16"}
    check_recording(tmp_path / "batches", steps, method=method)


def check_recording(folder: Path, steps: list[dict[str, float]], *, method: str) -> None:
    """Every step is there, with what it was trained on."""
    files, faults = find_files(folder)
    assert not faults
    batches = [read_batch(path) for path in files]
    assert [batch.info.step for batch in batches] == [step["global_step"] for step in steps]
    for batch, step in zip(batches, steps, strict=True):
        assert batch.info.method == method
        assert batch.num_action_tokens == step["alp/num_tokens"]
        assert batch.info.policy_version == step["rollout/policy_version"]
        spans = [span for sample in batch.samples for span in sample.spans]
        # Synchronous: the weights that sampled are those that the step updates.
        assert {(s.version, s.digest) for s in spans} == {
            (batch.info.policy_version, batch.info.model_digest)
        }
        assert all(sample.turns[-1].text for sample in batch.samples)


def test_partial_rollouts_train_while_generating_and_old_tokens_are_dropped_and_counted(
    tiny_model: Path, hf_service: Any, tmp_path: Path
) -> None:
    batches = 6
    flags = (
        *("--alp.enable", "--alp.sigma0", "0.01", "--rollout.max_new_tokens", "40"),
        *("--train.async_enable", "--train.partial_rollout_enable", "--rollout.max_staleness", "0"),
        *("--rollout.preflight_every", "2"),
    )
    arguments = command(tiny_model, tmp_path, hf_service.url, steps=batches, flags=flags)
    log = tmp_path / "train.log"
    status, output, left = finish(start(arguments, log), log)
    assert status == 0, output[-4000:]
    assert not left
    steps = metrics(tmp_path)
    # How many batches an update overtakes depends on the machine. The first is never one of them,
    # and one that was generated after a drop is fresh: nothing was pushed meanwhile.
    assert [step["global_step"] for step in steps] == list(range(1, len(steps) + 1))
    assert len(steps) >= batches // 2
    assert all(step["rollout/staleness_max"] == 0 for step in steps)
    assert all(step["rollout/num_samples"] == 4 for step in steps)
    versions = [step["rollout/policy_version"] for step in steps]
    assert versions == [versions[0] + i for i in range(len(steps))]
    # Fresh answers of the service, float32, against a learner in bfloat16.
    measured = [step.get("preflight/k3_kl") for step in steps]
    assert all((kl is None) == bool(i % 2) for i, kl in enumerate(measured))
    assert all(0 < kl < 1e-3 for kl in measured[::2])
    # Every group was trained on or dropped, but for those after the last step.
    dropped = sum(step["rollout/dropped_groups"] for step in steps)
    missing = (batches - len(steps)) * PROMPTS_PER_STEP - dropped
    assert 0 <= missing <= 2 * PROMPTS_PER_STEP


def test_an_asynchronous_run_splits_its_log_ratios_by_the_lag_of_its_samples(
    tiny_model: Path, hf_service: Any, tmp_path: Path
) -> None:
    """Two batches wait in the queue while one is trained on, so later ones are some pushes old."""
    folder, reward = tmp_path / "batches", tmp_path / "reward.py"
    # Nothing that a random model says is right, and without a reward no weight would move.
    reward.write_text(
        "def reward_func(queries, prompts, labels):\n"
        "    return {'rewards': float(sum(map(ord, queries[0])) % 97)}\n"
    )
    flags = (
        *("--alp.enable", "--alp.sigma0", "0.01", "--alp.telemetry_every", "1"),
        *("--train.async_enable", "--train.async_queue_size", "2", "--alp.record", str(folder)),
        *("--reward.remote_url", str(reward), "--actor.lr_scheduler", "constant"),
        *("--actor.lr_warmup_ratio", "0"),
    )
    arguments = command(tiny_model, tmp_path, hf_service.url, steps=6, flags=flags)
    log = tmp_path / "train.log"
    status, output, left = finish(start(arguments, log), log)
    assert status == 0, output[-4000:]
    assert not left
    steps = metrics(tmp_path)
    files, _ = find_files(folder)
    lags = [lag_of(read_batch(file)) for file in files]
    # How far generation runs ahead depends on the machine; the first batch is never overtaken.
    assert len(steps) == len(lags) == 6
    assert lags[0] == 0 and max(lags) > 0
    assert [step["rollout/staleness_max"] for step in steps] == lags
    for step, lag in zip(steps, lags, strict=True):
        [name] = [f"lag_{n}" for n in LAGS if f"alp/lag_{n}_share" in step]
        assert name == f"lag_{LAGS[min(lag, 3)]}"
        assert step[f"alp/{name}_share"] == 1.0
        assert step[f"alp/{name}_perturbation_rms"] > 0
        parts = ("staleness_and_mismatch",) if lag else ("staleness", "mismatch")
        assert all(step[f"alp/{name}_{part}_rms"] > 0 for part in parts)
    # Weights that moved by 1e-3 a step are further away than the rounding of the engine.
    oldest = max(range(6), key=lags.__getitem__)
    stale = steps[oldest][f"alp/lag_{LAGS[min(lags[oldest], 3)]}_staleness_and_mismatch_rms"]
    assert stale > 2 * steps[0]["alp/lag_0_mismatch_rms"]


def lag_of(batch: RecordedBatch) -> int:
    """Pushes since its samples were made; all of a batch are of one version."""
    [version] = {span.version for sample in batch.samples for span in sample.spans}
    assert batch.info.policy_version is not None
    return batch.info.policy_version - version


def test_a_service_that_dies_in_a_step_ends_the_run_with_its_name(
    tiny_model: Path, tmp_path: Path, start_service: Any
) -> None:
    with start_service(tiny_model, tmp_path, "--engine", "hf") as service:
        flags = ("--alp.enable", "--alp.sigma0", "0.01", "--rollout.request_timeout_s", "15")
        arguments = command(tiny_model, tmp_path, service.url, steps=200, flags=flags)
        log = tmp_path / "train.log"
        process = start(arguments, log)
        give_up_s = time.monotonic() + RUN_S
        while not metrics(tmp_path) and process.poll() is None and time.monotonic() < give_up_s:
            time.sleep(0.2)
        service.process.kill()
        status, output, left = finish(process, log)
    assert metrics(tmp_path), output[-4000:]
    assert status == 1
    assert not left
    # Lost while it generates, or while new weights are on their way.
    assert re.search(r"error: training stopped: (NoServerLeft|WeightUpdateFailed)", output)
    assert service.url in output[-2000:]


def test_a_run_that_loses_every_group_is_a_failure(
    tiny_model: Path, hf_service: Any, tmp_path: Path
) -> None:
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def reward_func(queries, prompts, labels):\n    raise OSError('disk gone')\n"
    )
    flags = ("--alp.enable", "--alp.sigma0", "0.01", "--reward.remote_url", str(reward))
    arguments = command(tiny_model, tmp_path, hf_service.url, steps=1, flags=flags)
    log = tmp_path / "train.log"
    status, output, left = finish(start(arguments, log), log)
    assert status == 1 and not left
    assert "no step was made: every group was dropped (2 x OSError)" in output
    assert not metrics(tmp_path)


def test_wrong_flags_end_with_status_2_and_start_nothing(tiny_model: Path, tmp_path: Path) -> None:
    flags = ("--alp.enable", "--rollout.top_p", "0.9")
    arguments = command(tiny_model, tmp_path, "http://127.0.0.1:9", steps=1, flags=flags)
    log = tmp_path / "train.log"
    status, output, left = finish(start(arguments, log), log)
    assert status == 2 and not left
    assert "error: --rollout.top_p is 0.9" in output
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_policy_that_calls_its_tool_is_trained_with_both_services(
    tiny_policy: Path, start_service: Any, tool_service: Any, tmp_path: Path
) -> None:
    data = tmp_path / "tasks.jsonl"
    rows = [{"input": f"Task {k}\n", "label": str(k)} for k in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [
        *("--alp.enable", "--alp.method", "seq-alp", "--alp.sigma0", "1e-3"),
        *("--data.prompt_dataset", str(data), "--rollout.max_new_tokens", "60"),
        *("--tir.template", "plain", "--tool.session", "--actor.adam.lr", "1e-6"),
        *("--rollout.ready_timeout_s", "10"),
    ]
    log = tmp_path / "train.log"
    with start_service(tiny_policy, tmp_path, "--engine", "hf") as service:

        def run(tool_url: str) -> tuple[int, str, list[psutil.Process]]:
            arguments = command(
                tiny_policy,
                tmp_path,
                service.url,
                steps=2,
                flags=(*flags, "--tool.service_urls", tool_url),
            )
            arguments.remove("--data.apply_chat_template")
            return finish(start(arguments, log), log)

        status, output, _ = run("http://127.0.0.1:9")
        assert status == 2
        assert re.search(r"error: .*http://127\.0\.0\.1:9 does not answer", output), output
        status, output, left = run(tool_service.url)
    assert status == 0, output[-4000:]
    assert not left
    steps = metrics(tmp_path)
    assert [step["global_step"] for step in steps] == [1, 2]
    for step in steps:
        assert all(math.isfinite(value) for value in step.values())
        # The policy knows its dialogues by heart, near enough at temperature 1.
        assert step["reward"] > 0.5 and step["tir/tool_calls"] > 0.5
        assert step["tir/status_ok"] > 0.5 and step["tir/tool_latency_s"] > 0
        assert 0 < step["tir/action_share"] < 1
        assert step["rollout/dropped_groups"] == 0


def test_prompts_that_do_not_divide_among_two_ranks_end_in_an_export(
    tiny_model: Path, hf_service: Any, tmp_path: Path
) -> None:
    """Seven prompts: a full step, then three groups that make three forwards for two ranks."""
    flags = (
        *("--alp.enable", "--alp.sigma0", "0.01", "--actor.num_gpus_per_node", "2"),
        *("--rollout.batch_size", "4", "--train.batch_size", "8"),
    )
    arguments = command(tiny_model, tmp_path, hf_service.url, steps=1, flags=flags)
    rows = [{"input": f"What is {i} + 1?", "label": i + 1} for i in range(7)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    log = tmp_path / "train.log"
    status, output, left = finish(start(arguments, log), log)
    assert status == 0, output[-4000:]
    assert not left
    steps = metrics(tmp_path)
    assert [step["rollout/num_samples"] for step in steps] == [8, 4]
    assert [step["rollout/left_out_samples"] for step in steps] == [0, 2]
    assert "left out 2 of 6 samples" in output
    assert (tmp_path / "export" / "model.safetensors").exists()
