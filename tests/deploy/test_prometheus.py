"""A real Prometheus with our configuration scrapes real services, and every query of ours answers.

Only names and times differ from what the compose file starts: Docker's names are addresses here.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import yaml

from benchmarks.policies.tiny_policy import make_tokenizer, tiny_config
from openrlhf_alp.learner.experience import STALENESS_METRICS
from openrlhf_alp.objective.metric_names import METRICS
from openrlhf_alp.report.metrics import REWARD

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        shutil.which("prometheus") is None, reason="needs Prometheus (Debian: prometheus)"
    ),
]

OBSERVE = Path(__file__).parents[2] / "deploy/observe"
DASHBOARD = json.loads((OBSERVE / "grafana/dashboards/run.json").read_text())
KEY = "key-of-the-tests"
START_S = 120.0


def wait_until(holds: Callable[[], bool], what: str) -> None:
    give_up_s = time.monotonic() + START_S
    while not holds():
        assert time.monotonic() < give_up_s, what
        time.sleep(0.2)


@contextlib.contextmanager
def process(*command: object) -> Iterator[subprocess.Popen]:
    """A process that ends with the block."""
    names = ("ROLLOUT_API_KEY", "ROLLOUT_ADMIN_KEY", "TOOL_API_KEY")
    keys = {f"OPENRLHF_ALP_{name}": f"{KEY}-{name}" for name in names}
    started = subprocess.Popen([str(part) for part in command], env={**os.environ, **keys})
    try:
        yield started
    finally:
        started.terminate()
        started.wait(START_S)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Address by job: both services after a call, and the exporter of a run that logged a step."""
    folder = tmp_path_factory.mktemp("services")
    model, runs, port = folder / "model", folder / "runs", free_port()
    make_model(model)
    (runs / "demo").mkdir(parents=True)
    step = dict.fromkeys([*METRICS, *STALENESS_METRICS, REWARD], 0.5)
    (runs / "demo/metrics.jsonl").write_text(json.dumps({"global_step": 1, **step}) + "\n")
    python = [sys.executable, "-m"]
    urls = {name: folder / f"{name}.url" for name in ("rollout", "tool")}
    with contextlib.ExitStack() as stack:
        flags = ["--model", model, "--engine", "hf", "--dtype", "float32"]
        for name, more in (("rollout", flags), ("tool", ["--slots", 1, "--presets", "numpy"])):
            where = ["--port", 0, "--url-file", urls[name]]
            stack.enter_context(process(*python, f"services.{name}", *where, *more))
        stack.enter_context(process(*python, "openrlhf_alp.report.exporter", runs, "--port", port))
        wait_until(lambda: all(file.exists() for file in urls.values()), "the services start")
        served = {name: urlsplit(file.read_text().strip()).netloc for name, file in urls.items()}
        use(served)
        yield {**served, "learner": f"127.0.0.1:{port}"}


def make_model(folder: Path) -> None:
    from transformers import LlamaForCausalLM

    tokenizer = make_tokenizer()
    LlamaForCausalLM(tiny_config(tokenizer, max_positions=64)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def use(served: dict[str, str]) -> None:
    """One call of each service, which some of their series begin with."""
    sampling = {"max_tokens": 2, "temperature": 1.0, "top_p": 1.0}
    calls = (
        ("rollout", "generate", {"request_id": "a", "token_ids": [5], "sampling": sampling}),
        ("tool", "execute", {"code": "print(1 + 1)"}),
    )
    for name, route, body in calls:
        headers = {"authorization": f"Bearer {KEY}-{name.upper()}_API_KEY"}
        url = f"http://{served[name]}/v1/{route}"
        httpx.post(url, json=body, headers=headers, timeout=60).raise_for_status()


@pytest.fixture(scope="module")
def prometheus(
    targets: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("prometheus")
    shutil.copy(OBSERVE / "alerts.yaml", folder)
    config = yaml.safe_load((OBSERVE / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s"}
    for job in config["scrape_configs"]:
        job.pop("dns_sd_configs", None)
        job["static_configs"] = [{"targets": [targets[job["job_name"]]]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    options = {
        "config.file": folder / "prometheus.yml",
        "storage.tsdb.path": folder / "data",
        "web.listen-address": f"127.0.0.1:{port}",
    }
    with (
        process("prometheus", *(f"--{name}={value}" for name, value in options.items())),
        httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1/") as http,
    ):
        yield http


def ask(prometheus: httpx.Client, route: str, **parameters: str) -> dict:
    try:
        answer = prometheus.get(route, params=parameters).raise_for_status()
    except httpx.HTTPError:
        return {}
    data: dict = answer.json()["data"]
    return data


def test_every_target_is_up(prometheus: httpx.Client) -> None:
    def health() -> dict[str, str]:
        active = ask(prometheus, "targets").get("activeTargets", [])
        return {target["labels"]["job"]: target["health"] for target in active}

    up = {"rollout": "up", "tool": "up", "learner": "up"}
    wait_until(lambda: health() == up, f"every target is up, not {health()}")


def test_every_panel_has_data(prometheus: httpx.Client) -> None:
    queries = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]

    def empty() -> list[str]:
        return [q for q in queries if not ask(prometheus, "query", query=q).get("result")]

    wait_until(lambda: not empty(), f"every panel has data, not: {empty()}")


def test_every_rule_is_loaded_and_can_be_evaluated(prometheus: httpx.Client) -> None:
    def rules() -> list[dict]:
        groups = ask(prometheus, "rules").get("groups", [])
        return [rule for group in groups for rule in group["rules"]]

    written = yaml.safe_load((OBSERVE / "alerts.yaml").read_text())["groups"]
    names = {rule["alert"] for group in written for rule in group["rules"]}
    assert {rule["name"] for rule in rules()} == names
    for rule in rules():
        answer = prometheus.get("query", params={"query": rule["query"]})
        assert answer.json()["status"] == "success", answer.text
