"""What a page knows of a batch: plain data for JSON, and one array of numbers per token.

Numbers of a token travel as int16 in thousandths of a nat, which is finer than a colour shows: from
-32.7 to 32.7 nats, -32768 where there is none.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from openrlhf_alp.episodes.records import TurnKind
from openrlhf_alp.replay.files.records import RecordedBatch, RecordedSample
from openrlhf_alp.replay.tensors import advantages_of
from openrlhf_alp.report.episodes.ratios import Ratios

UNIT = 1000
NOTHING = -32768
_LARGEST = 32767
_NUM_WORST = 200
_SCALE_PERCENTILE = 99.0
"""Full colour is this percentile of the sizes, so that a few giants do not bleach the rest."""
_LEAST_SCALE = 0.05

_KINDS = {TurnKind.PROMPT: 0, TurnKind.ACTION: 1, TurnKind.OBSERVATION: 2}

MODES = {
    "total": "learner with noise over rollout",
    "clean": "learner without noise over rollout",
    "noise": "learner with noise over without",
    "surprise": "surprise of the rollout engine, -log mu",
}
"""What the colour can stand for; the first three need a model."""


def columns_of(batch: RecordedBatch, ratios: Ratios | None) -> dict[str, list[np.ndarray]]:
    """(T,) float32 of every sample for each mode that can be shown; NaN off the actions."""
    surprise = [
        np.where(sample.action_mask, -sample.rollout_log_probs, np.float32(np.nan))
        for sample in batch.samples
    ]
    if ratios is None:
        return {"surprise": surprise}
    total = [clean + noise for clean, noise in zip(ratios.clean, ratios.noise, strict=True)]
    return {
        "total": total,
        "clean": list(ratios.clean),
        "noise": list(ratios.noise),
        "surprise": surprise,
    }


def packed_columns(columns: dict[str, list[np.ndarray]]) -> bytes:
    """The columns one after the other, little-endian int16."""
    parts = []
    for column in columns.values():
        values = np.concatenate(column) * UNIT
        whole = np.clip(np.nan_to_num(np.round(values)), -_LARGEST, _LARGEST)
        parts.append(np.where(np.isnan(values), NOTHING, whole).astype("<i2").tobytes())
    return b"".join(parts)


def mode_rows(columns: dict[str, list[np.ndarray]]) -> list[dict[str, Any]]:
    """Name, meaning, full colour and worst tokens of each mode."""
    rows = []
    for name, column in columns.items():
        sizes = np.abs(np.concatenate(column))
        known = np.flatnonzero(~np.isnan(sizes))
        order = known[np.argsort(-sizes[known], kind="stable")][:_NUM_WORST]
        # A token that the learner holds impossible is the worst, and no measure for the others.
        finite = sizes[np.isfinite(sizes)]
        scale = float(np.percentile(finite, _SCALE_PERCENTILE)) if finite.size else 0.0
        rows.append(
            {
                "name": name,
                "meaning": MODES[name],
                "scale": round(max(scale, _LEAST_SCALE), 4),
                "signed": name != "surprise",
                "worst": [int(place) for place in order],
            }
        )
    return rows


def sample_rows(batch: RecordedBatch) -> list[dict[str, Any]]:
    """What is shown of each sample besides its tokens."""
    rows, start = [], 0
    for sample, advantages in zip(batch.samples, advantages_of(batch.samples), strict=True):
        first = next((a for a, _ in sample.action_ranges), None)
        rows.append(
            {
                "id": sample.request_id or str(sample.sample),
                "start": start,
                "size": sample.num_tokens,
                "reward": _finite(sample.reward),
                "detail": {name: _finite(v) for name, v in sample.reward_detail.items()},
                "advantage": None if first is None else round(float(advantages[first]), 4),
                "stop": sample.stop_reason,
                "truncated": sample.truncated,
                "void": sample.void,
                "trained": [list(pair) for pair in sample.action_ranges],
                "spans": [[s.version, s.digest[:12], s.start, s.end] for s in sample.spans],
                "turns": _turns(sample),
                "tools": [
                    {
                        "code": c.code,
                        "output": c.output,
                        "status": c.status,
                        "s": _finite(c.total_s),
                    }
                    for c in sample.tool_calls
                ],
            }
        )
        start += sample.num_tokens
    return rows


def group_rows(samples: Sequence[RecordedSample]) -> list[dict[str, Any]]:
    """Samples of one prompt stand together; a sample without a group stands by itself."""
    groups: dict[str, dict[str, Any]] = {}
    for place, sample in enumerate(samples):
        key = f"group {sample.group}" if sample.group else f"sample {place}"
        blank = {"name": key, "prompt": sample.prompt, "label": sample.label, "samples": []}
        groups.setdefault(key, blank)["samples"].append(place)
    return list(groups.values())


def _finite(value: float | None) -> float | None:
    """JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None


def _turns(sample: RecordedSample) -> list[list[int]]:
    """[kind, start, end, void] that cover the tokens; by the action ranges where none are known."""
    if sample.turns:
        return [[_KINDS[t.kind], t.start, t.end, int(t.void)] for t in sample.turns]
    turns, at = [], 0
    for start, end in sample.action_ranges:
        if start > at:
            turns.append([0 if at == 0 else 2, at, start, 0])
        turns.append([1, start, end, 0])
        at = end
    if at < sample.num_tokens:
        turns.append([0 if at == 0 else 2, at, sample.num_tokens, 0])
    return turns
