"""Train one step against a rollout service on another vLLM: `make vllm-next`.

    python requirements/check_vllm.py PYTHON [--folder DIR]

PYTHON is the interpreter of an environment with that vLLM. The learner runs in the environment of
this script, on OpenRLHF's own pins: the two sides share nothing but HTTP and weight files. Model
and recipe are those of `make docker-test`; its programs run in a tool service on this machine.
"""

import argparse
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
TINY = REPOSITORY / "dockerfiles/tiny"
START_S = 300.0
KEYS = ("OPENRLHF_ALP_ROLLOUT_API_KEY", "OPENRLHF_ALP_ROLLOUT_ADMIN_KEY")


def main() -> int:
    """Run the step; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("python", help="interpreter of an environment with the other vLLM")
    parser.add_argument("--folder", type=Path, help="keep everything here (default: nothing)")
    arguments = parser.parse_args()
    # Keys first, and for this process too: launch takes them from its environment.
    os.environ.update({name: secrets.token_hex(16) for name in KEYS})
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        make_model(folder)
        step = train(arguments.python, folder)
    for name in ("tir/status_ok", "reward", "alp/weight_grad_norm", "alp/clean_start_k3_kl"):
        print(f"check-vllm: {name} {step[name]:.3g}")
    sys.path.append(str(REPOSITORY))
    from dockerfiles.tiny.judge import faults_of

    faults = faults_of(step)
    for fault in faults:
        print(f"check-vllm: FAILED: {fault}", file=sys.stderr)
    return int(bool(faults))


def make_model(folder: Path) -> None:
    """Write model and prompts into `folder`."""
    paths = [str(REPOSITORY / "benchmarks/policies"), os.environ["PYTHONPATH"]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run(
        [sys.executable, TINY / "make_model.py"], cwd=folder, env=environment, check=True
    )


def train(python: str, folder: Path) -> dict[str, Any]:
    """Serve with `python`, train with this interpreter; return the first line of the metrics."""
    url_file = folder / "url"
    service = subprocess.Popen(
        [
            *(python, "-m", "services.rollout", "--model", folder / "model", "--port", "0"),
            *("--url-file", url_file, "--max-model-len", "128", "--num-threads", "1"),
            *("--kv-cache-gb", "0.1"),
        ]
    )
    try:
        url = wait_for_url(service, url_file)
        print(
            f"check-vllm: {contract(url)['engine']} {contract(url)['engine_version']}", flush=True
        )
        settings = {
            "model.path": folder / "model",
            "data.path": folder / "prompts.jsonl",
            "rollout.urls": json.dumps([url]),
        }
        options = [o for name, value in settings.items() for o in ("--set", f"{name}={value}")]
        launch = [sys.executable, "-m", "openrlhf_alp.cli.main", "launch", TINY / "recipe.toml"]
        before = contract(url)["version"]
        subprocess.run([*launch, "--output", folder / "run", *options], check=True)
        after = contract(url)["version"]
        print(f"check-vllm: weight version {before} before training, {after} after it")
        if after < before + 2:
            raise SystemExit("check-vllm: the weights of the step were not pushed")
    finally:
        service.terminate()
        service.wait(START_S)
    first: dict[str, Any] = json.loads((folder / "run/metrics.jsonl").read_text().splitlines()[0])
    return first


def wait_for_url(service: subprocess.Popen[bytes], url_file: Path) -> str:
    deadline = time.monotonic() + START_S
    while not url_file.exists():
        if service.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"check-vllm: the service did not start in {START_S:.0f} s")
        time.sleep(0.2)
    return url_file.read_text().strip()


def contract(url: str) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {os.environ[KEYS[0]]}"}
    with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/contract", headers=headers)) as r:
        answer: dict[str, Any] = json.load(r)
    return answer


if __name__ == "__main__":
    sys.exit(main())
