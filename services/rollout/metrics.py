"""What the rollout service counts, beside vLLM's own metrics in the same registry.

The names on /metrics start with `openrlhf_alp_rollout_`.

requests_total{outcome}       generate calls by outcome: ok or the error code
sampled_tokens_total          tokens drawn and returned
generate_seconds              time of a generate call inside the service
pending_samples               samples admitted and not yet finished
repeated_requests_total{kind} retries answered without new work: attached or replayed
rejected_requests_total       429 replies
kept_bytes                    estimated bytes of replies kept for retries
weight_version                serving version
weight_updates_total{outcome} commits: ok or failed
weight_pause_seconds          time without drawing around a commit
loop_lag_seconds              how late the event loop runs a timer
"""

from prometheus_client import Counter, Gauge, Histogram

_PREFIX = "openrlhf_alp_rollout_"
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
_LAG_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)

REQUESTS = Counter(_PREFIX + "requests", "Generate calls by outcome.", ["outcome"])
SAMPLED_TOKENS = Counter(_PREFIX + "sampled_tokens", "Tokens drawn and returned.")
GENERATE_SECONDS = Histogram(_PREFIX + "generate_seconds", "Generate calls.", buckets=_SECONDS)
PENDING_SAMPLES = Gauge(_PREFIX + "pending_samples", "Samples admitted, not yet finished.")
REPEATED_REQUESTS = Counter(_PREFIX + "repeated_requests", "Retries without new work.", ["kind"])
REJECTED_REQUESTS = Counter(_PREFIX + "rejected_requests", "Requests answered 429.")
KEPT_BYTES = Gauge(_PREFIX + "kept_bytes", "Estimated bytes of kept replies.")
WEIGHT_VERSION = Gauge(_PREFIX + "weight_version", "Serving weight version.")
WEIGHT_UPDATES = Counter(_PREFIX + "weight_updates", "Commits by outcome.", ["outcome"])
WEIGHT_PAUSE_SECONDS = Histogram(
    _PREFIX + "weight_pause_seconds", "Time without drawing around a commit.", buckets=_SECONDS
)
LOOP_LAG_SECONDS = Histogram(
    _PREFIX + "loop_lag_seconds", "How late the event loop runs a timer.", buckets=_LAG_SECONDS
)
