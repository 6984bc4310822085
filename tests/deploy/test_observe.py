"""Queries of dashboard and alerts name metrics that are served, and targets what is scraped."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client import REGISTRY
from prometheus_client.metrics_core import Metric

import services.rollout.metrics
import services.tool.metrics  # noqa: F401 - both put their metrics into the registry
from openrlhf_alp.learner.experience import DROPPED_GROUPS, STALENESS_METRICS
from openrlhf_alp.objective.metric_names import METRICS
from openrlhf_alp.report.exporter import DEFAULT_PORT, RunCollector
from openrlhf_alp.report.metrics import REWARD

REPOSITORY = Path(__file__).parents[2]
OBSERVE = REPOSITORY / "deploy/observe"
DASHBOARD = json.loads((OBSERVE / "grafana/dashboards/run.json").read_text())
ALERTS = yaml.safe_load((OBSERVE / "alerts.yaml").read_text())
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
QUERIES = [t["expr"] for panel in DASHBOARD["panels"] for t in panel["targets"]]
QUERIES += [rule["expr"] for rule in RULES if "openrlhf_alp_" in rule["expr"]]

SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
LEARNER_METRICS = {*METRICS, *STALENESS_METRICS, DROPPED_GROUPS, REWARD}


def served(tmp_path: Path) -> dict[str, set[str]]:
    """Names of the series that /metrics of the three sources has, and their labels."""
    (tmp_path / "metrics.jsonl").write_text('{"global_step": 1, "rollout/reward_mean": 0.5}\n')
    series: dict[str, set[str]] = {}
    families: list[Metric] = [*REGISTRY.collect(), *RunCollector(tmp_path).collect()]
    for family in families:
        for suffix in SUFFIXES.get(family.type, ()):
            labels = {label for sample in family.samples for label in sample.labels}
            series[family.name + suffix] = labels
    return series


def declared_labels(name: str) -> set[str]:
    """Labels of a metric of the services, also before it has a value."""
    # The registry keeps collectors by the names of their series.
    collector = REGISTRY._names_to_collectors.get(name)
    return set(getattr(collector, "_labelnames", ()))


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_names_series_and_labels_that_are_served(query: str, tmp_path: Path) -> None:
    series = served(tmp_path)
    names = set(re.findall(r"\b(openrlhf_alp_\w+)", query))
    assert names and names <= series.keys()
    for by in re.findall(r"by \(([^)]*)\)", query):
        known = {"instance", "le"}  # set by Prometheus; every histogram's
        for name in names:
            known |= series[name] | declared_labels(name)
        assert {label.strip() for label in by.split(",")} <= known


@pytest.mark.parametrize("query", [q for q in QUERIES if "metric" in q.partition("{")[2]])
def test_a_metric_of_the_learner_is_one_that_it_logs(query: str) -> None:
    for names in re.findall(r'metric=~?"([^"]*)"', query):
        assert set(names.split("|")) <= LEARNER_METRICS


def test_the_first_error_of_the_sandbox_is_an_increase_over_0() -> None:
    """The counter is there before it; other tests of this process may have counted already."""
    name = "openrlhf_alp_tool_executions_total"
    assert REGISTRY.get_sample_value(name, {"status": "sandbox_error"}) is not None


def test_the_dashboard_shows_what_a_run_is_judged_by() -> None:
    titles = " ".join(panel["title"] for panel in DASHBOARD["panels"])
    for what in ("Reward", "Tails", "KL", "Versions", "Staleness", "Queues", "status", "Isolation"):
        assert what in titles


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool comes with Prometheus")
def test_every_alert_fires_when_it_should_and_only_then() -> None:
    cases = Path(__file__).with_name("alerts.yaml")
    run = subprocess.run(["promtool", "test", "rules", cases], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    tested = {
        alert["alertname"]
        for case in yaml.safe_load(cases.read_text())["tests"]
        for alert in case["alert_rule_test"]
        if "exp_alerts" in alert
    }
    assert tested == {rule["alert"] for rule in RULES}


def test_prometheus_scrapes_the_services_at_their_ports() -> None:
    jobs = yaml.safe_load((OBSERVE / "prometheus.yaml").read_text())["scrape_configs"]
    compose = yaml.safe_load((REPOSITORY / "compose.yaml").read_text())
    assert [job["job_name"] for job in jobs] == ["rollout", "tool", "learner"]
    for job in jobs[:2]:
        (where,) = job["dns_sd_configs"]
        assert set(where["names"]) <= compose["services"].keys()
        dockerfile = {"rollout": "stack", "tool": "tool"}[job["job_name"]]
        text = (REPOSITORY / f"dockerfiles/{dockerfile}.Dockerfile").read_text()
        assert f"EXPOSE {where['port']}\n" in text
    assert jobs[2]["static_configs"] == [{"targets": [f"run-metrics:{DEFAULT_PORT}"]}]
