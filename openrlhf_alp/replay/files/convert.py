"""From JSON lines to a batch file, for batches of other trainers and engines.

One object per sample, with the columns of `schema.py` as fields. Two short forms are understood
too, because most engines answer in them:

    prompt_ids, response_ids    in place of token_ids and action_ranges
    rollout_log_probs           of the response alone, when they are as many as its tokens
    advantages                  one number for the whole sample
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from openrlhf_alp.replay.files.checks import BatchFileError, Fault, sample_faults
from openrlhf_alp.replay.files.records import RecordedBatch, RecordedSample
from openrlhf_alp.replay.files.schema import BatchInfo

_KNOWN = {
    *("token_ids", "prompt_ids", "response_ids", "rollout_log_probs", "action_ranges"),
    *("action_mask", "advantages", "sample", "group", "reward", "reward_detail", "request_id"),
    *("prompt", "label", "stop_reason", "truncated", "void"),
}


def read_json_lines(path: Path, info: BatchInfo) -> RecordedBatch:
    """The batch in a file of JSON lines.

    Raises:
        BatchFileError: a line is no such object, or its sample is faulty; names line and field.
        OSError: the file cannot be read.
    """
    samples: list[RecordedSample] = []
    faults: list[Fault] = []
    # Not splitlines(), which also breaks at characters that may stand inside a JSON string.
    lines = path.read_text(encoding="utf-8", errors="strict").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name = f"{path}, line {number}"
        try:
            sample = _sample(json.loads(line), place=len(samples))
        except (ValueError, TypeError, KeyError) as error:
            what = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
            faults.append(Fault(file=name, text=what))
            continue
        samples.append(sample)
        faults += [Fault(file=name, field=field, text=t) for field, t in sample_faults(sample)]
    if not samples and not faults:
        faults.append(Fault(file=str(path), text="it has no line"))
    if faults:
        raise BatchFileError(faults)
    return RecordedBatch(info=info, samples=tuple(samples))


def _sample(row: Any, *, place: int) -> RecordedSample:
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__} in place of an object with fields")
    if unknown := sorted(row.keys() - _KNOWN):
        raise ValueError(f"unknown field {unknown[0]}; known are {', '.join(sorted(_KNOWN))}")
    ids, ranges = _tokens(row)
    reward = row.get("reward")
    return RecordedSample(
        token_ids=np.asarray(ids, dtype=np.int32),
        rollout_log_probs=_on_axis(row["rollout_log_probs"], ranges, len(ids)),
        action_ranges=ranges,
        advantages=_advantages(row.get("advantages"), ranges, len(ids)),
        sample=int(row.get("sample", place)),
        group=str(row.get("group", "")),
        reward=None if reward is None else float(reward),
        reward_detail={k: float(v) for k, v in (row.get("reward_detail") or {}).items()},
        truncated=bool(row.get("truncated", False)),
        void=bool(row.get("void", False)),
        request_id=str(row.get("request_id", "")),
        prompt=str(row.get("prompt", "")),
        label=str(row.get("label", "")),
        stop_reason=str(row.get("stop_reason", "")),
    )


def _tokens(row: Mapping[str, Any]) -> tuple[list[int], tuple[tuple[int, int], ...]]:
    """All ids, and the ranges that the policy sampled."""
    if "token_ids" not in row:
        prompt, response = row["prompt_ids"], row["response_ids"]
        return [*prompt, *response], ((len(prompt), len(prompt) + len(response)),)
    ids = row["token_ids"]
    if "action_ranges" in row:
        return ids, tuple((int(start), int(end)) for start, end in row["action_ranges"])
    mask = row["action_mask"]
    if len(mask) != len(ids):
        raise ValueError(f"action_mask has {len(mask)} values for {len(ids)} tokens")
    edges = np.flatnonzero(np.diff(np.array([False, *map(bool, mask), False])))
    return ids, tuple((int(start), int(end)) for start, end in edges.reshape(-1, 2))


def _on_axis(
    values: list[float], ranges: tuple[tuple[int, int], ...], num_tokens: int
) -> np.ndarray:
    """(T,) float32 of values that are given for all tokens or for the actions alone."""
    given = np.array([np.nan if v is None else v for v in values], dtype=np.float32)
    num_actions = sum(end - start for start, end in ranges)
    if len(given) == num_tokens or len(given) != num_actions:
        return given  # a wrong length is reported with the other faults
    on_axis: np.ndarray = np.zeros(num_tokens, dtype=np.float32)
    on_axis[np.concatenate([np.arange(start, end) for start, end in ranges])] = given
    return on_axis


def _advantages(
    given: Any, ranges: tuple[tuple[int, int], ...], num_tokens: int
) -> np.ndarray | None:
    if given is None:
        return None
    num_actions = sum(end - start for start, end in ranges)
    values = [float(given)] * num_actions if isinstance(given, int | float) else given
    return _on_axis(values, ranges, num_tokens)
