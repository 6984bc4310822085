"""What the tool service counts; the names on /metrics start with `openrlhf_alp_tool_`.

executions_total{status}  executions by how they ended, refused ones included
wall_seconds              wall time of executions, without the wait for a slot
queue_seconds             time spent waiting for a slot
running, waiting          executions now
slots_waiting             sandboxed slots ready to run
sessions                  live sessions
sessions_evicted          sessions ended because another one needed their place
launcher_restarts         launchers that died and were replaced
isolation_layer{layer}    1 where every canary of the layer was blocked at start, else 0
"""

from typing import get_args

from prometheus_client import Counter, Gauge, Histogram

from services.tool.wire.schemas import StatusName

_PREFIX = "openrlhf_alp_tool_"
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 120)

EXECUTIONS = Counter(_PREFIX + "executions", "Executions by how they ended.", ["status"])
for _status in get_args(StatusName):
    # From 0 on: the increase from no value to 1 would be none to Prometheus.
    EXECUTIONS.labels(_status)
WALL_SECONDS = Histogram(_PREFIX + "wall_seconds", "Wall time of executions.", buckets=_SECONDS)
QUEUE_SECONDS = Histogram(_PREFIX + "queue_seconds", "Wait for a slot.", buckets=_SECONDS)
RUNNING = Gauge(_PREFIX + "running", "Executions running.")
WAITING = Gauge(_PREFIX + "waiting", "Executions waiting for a slot.")
SLOTS_WAITING = Gauge(_PREFIX + "slots_waiting", "Sandboxed slots ready to run.")
SESSIONS = Gauge(_PREFIX + "sessions", "Live sessions.")
SESSIONS_EVICTED = Gauge(_PREFIX + "sessions_evicted", "Sessions evicted for a new one.")
LAUNCHER_RESTARTS = Gauge(_PREFIX + "launcher_restarts", "Launchers replaced.")
ISOLATION_LAYER = Gauge(_PREFIX + "isolation_layer", "Layers confirmed at start.", ["layer"])
