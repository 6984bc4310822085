"""Shows the newest step of a training run to Prometheus, beside the learner that writes it.

    python -m openrlhf_alp.report.exporter runs --port 9400

The learner writes one JSON line per step; this reads the file that was written to last. Its names
have slashes and dots, so they are the values of one label:

    openrlhf_alp_learner_step{run="demo"}
    openrlhf_alp_learner{run="demo", metric="rollout/reward_mean"}
"""

import argparse
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from openrlhf_alp.report.metrics import METRICS, MetricsFileError, MetricsFollower, StepMetrics

NAME = "openrlhf_alp_learner"
DEFAULT_PORT = 9400


class RunCollector(Collector):
    """Reads what was written since the last scrape; one scrape at a time."""

    def __init__(self, runs: Path) -> None:
        self._runs = runs
        self._path: Path | None = None
        self._follower: MetricsFollower | None = None
        self._latest: StepMetrics | None = None
        self._lock = threading.Lock()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The newest step of the newest run; nothing before the first one, or from a bad file."""
        step = GaugeMetricFamily(f"{NAME}_step", "Newest global step.", labels=["run"])
        values = GaugeMetricFamily(
            NAME, "What the learner logged for its newest step.", labels=["run", "metric"]
        )
        with self._lock:
            latest, path = self._read()
        if latest is not None and path is not None:
            run = str(path.parent.relative_to(self._runs))
            step.add_metric([run], latest.step)
            for name, value in latest.values.items():
                values.add_metric([run, name], value)
        yield step
        yield values

    def _read(self) -> tuple[StepMetrics | None, Path | None]:
        path = newest_metrics(self._runs)
        if path != self._path:
            self._path, self._latest = path, None
            self._follower = None if path is None else MetricsFollower(path)
        if self._follower is not None:
            try:
                for step in self._follower.new_steps():
                    self._latest = step
            except MetricsFileError as error:
                # A gap in the curves says it; the run itself must not suffer.
                print(error, file=sys.stderr, flush=True)
                self._latest = None
        return self._latest, path


def newest_metrics(runs: Path) -> Path | None:
    """The metrics.jsonl below `runs` that was written to last; None before there is one."""
    dated = []
    for path in runs.rglob(METRICS):
        try:
            dated.append((path.stat().st_mtime, path))
        except FileNotFoundError:
            continue  # a run was moved aside meanwhile
    return max(dated)[1] if dated else None


def main() -> int:
    """Serve until a stop signal."""
    parser = argparse.ArgumentParser(
        prog="python -m openrlhf_alp.report.exporter", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("runs", type=Path, help="folder with the run folders")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind (default: localhost)")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="default: %(default)s")
    arguments = parser.parse_args()
    if not arguments.runs.is_dir():
        parser.error(f"{arguments.runs} is no folder: name the one that holds the run folders")
    registry = CollectorRegistry()
    registry.register(RunCollector(arguments.runs))
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    server, thread = start_http_server(arguments.port, arguments.host, registry)
    print(f"metrics on http://{arguments.host}:{arguments.port}/metrics", flush=True)
    stop.wait()
    server.shutdown()
    thread.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
