"""A link to real vLLM processes: what arrives over it is served as if it had come by file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROCESS = Path(__file__).with_name("vllm_transfer_process.py")


@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_weights_over_a_link_to_vllms_workers_serve_what_a_file_would_have_brought(
    model_folder: Path, tmp_path: Path
) -> None:
    log = tmp_path / "vllm.log"
    with log.open("w") as output:
        done = subprocess.run(
            [sys.executable, PROCESS, model_folder, tmp_path],
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
            timeout=270,
        )
    assert done.returncode == 0, log.read_text()[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["offered_on_a_cpu"] == []
    assert report["failure"] == "transfer_failed", "the worker says so, and keeps drawing"
    before, by_link, back, by_file = report["answers"]
    assert [answer[2] for answer in report["answers"]] == [[0], [1], [2], [3]]
    assert by_link[:2] == by_file[:2] != before[:2] == back[:2]
    assert report["digests"][0] == report["digests"][2] != report["digests"][1]
    assert len(set(report["num_bytes"])) == 1 and report["num_bytes"][0] > 100_000
