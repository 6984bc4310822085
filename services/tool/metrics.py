"""What the service counts, in one table.

tool_executions_total{status}   executions by how they ended, refused ones included
tool_wall_seconds               wall time of executions, without the queue
tool_queue_seconds              time spent waiting for a slot
tool_running, tool_waiting      executions now
tool_slots_waiting              fenced slots ready to run
tool_sessions                   live sessions
tool_sessions_evicted           sessions ended because another one needed their place
tool_launcher_restarts          launchers that died and were replaced
tool_isolation_layer{layer}     1 where every canary of the layer was blocked at start, else 0
"""

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from services.tool.sandbox.host.verdict import Outcome, Status

if TYPE_CHECKING:
    from services.tool.service import ToolService

_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 120)


class Metrics:
    """Prometheus metrics of one service, in a registry of its own."""

    def __init__(self, service: "ToolService") -> None:
        self.registry = CollectorRegistry()
        self._executions = Counter(
            "tool_executions", "Executions by how they ended", ["status"], registry=self.registry
        )
        self._wall = Histogram(
            "tool_wall_seconds", "Wall time of executions", buckets=_BUCKETS, registry=self.registry
        )
        self._queue = Histogram(
            "tool_queue_seconds", "Wait for a slot", buckets=_BUCKETS, registry=self.registry
        )
        gauges = {
            "tool_running": ("Executions running", lambda: service.admission.running),
            "tool_waiting": ("Executions waiting", lambda: service.admission.waiting),
            "tool_slots_waiting": ("Fenced slots ready", lambda: service.sandbox.waiting()),
            "tool_sessions": ("Live sessions", lambda: len(service.sessions)),
            "tool_sessions_evicted": ("Sessions evicted", lambda: service.sessions.num_evicted),
            "tool_launcher_restarts": ("Launchers replaced", lambda: service.sandbox.restarts),
        }
        for name, (text, read) in gauges.items():
            Gauge(name, text, registry=self.registry).set_function(read)
        layers = Gauge(
            "tool_isolation_layer", "Layers confirmed at start", ["layer"], registry=self.registry
        )
        for layer, report in service.isolation.layers.items():
            layers.labels(layer).set(report.active)

    def observe(self, outcome: Outcome) -> None:
        self._executions.labels(outcome.status.value).inc()
        self._wall.observe(outcome.wall_s)
        self._queue.observe(outcome.queue_s)

    def observe_refusal(self, status: Status) -> None:
        """Count an execution that never ran."""
        self._executions.labels(status.value).inc()

    def render(self) -> bytes:
        """The text that a Prometheus server scrapes."""
        return generate_latest(self.registry)
