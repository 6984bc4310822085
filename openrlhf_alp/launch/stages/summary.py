"""The numbers of a finished run: `summary.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openrlhf_alp.report.metrics import StepMetrics, reward_at_edges

if TYPE_CHECKING:
    from openrlhf_alp.launch.stages.accuracy import Accuracy


def write_summary(
    path: Path,
    steps: Sequence[StepMetrics],
    *,
    restarts: Mapping[str, int],
    before: Accuracy | None,
    after: Accuracy | None,
) -> None:
    """Writes rewards at both ends of the run, restarts by service, and the held-out accuracy."""
    first, last = reward_at_edges(steps) or (None, None)
    summary: dict[str, Any] = {
        "steps": len(steps),
        "reward_first_steps": first,
        "reward_last_steps": last,
        "restarts": dict(restarts),
    }
    if before and after:
        summary |= {"before": _numbers(before), "after": _numbers(after)}
    path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def _numbers(accuracy: Accuracy) -> dict[str, float | None]:
    shares = {"greedy": accuracy.greedy, "temperature_1": accuracy.sampled}
    # JSON has no NaN; null says that nothing could be scored.
    return {name: None if math.isnan(share) else share for name, share in shares.items()}
