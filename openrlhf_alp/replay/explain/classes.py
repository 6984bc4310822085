"""Where learner and engine differ: the log-ratio of tokens by position, probability and kind.

Letters: N action tokens of all samples, in their order; T tokens of a sample.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from openrlhf_alp.objective.metric_names import ENVELOPE_EDGES
from openrlhf_alp.objective.ratio import k3_kl
from openrlhf_alp.replay.files.records import RecordedSample

POSITION_EDGES = (0, 1, 4, 16, 64, 256, 1024)
"""Tokens since the first action of a sample; the last bin is open."""

FIRST, AFTER_TOOL, DIGIT, END, OTHER = (
    "first token of a turn", "first after a tool's output", "digits", "end of sequence", "other",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassFigures:
    """Of the tokens of one class; log-ratios are clean learner over rollout engine."""

    view: str
    """What the classes of the table differ in."""
    name: str
    num_tokens: int
    k3_kl: float
    """Nats per token."""
    mean: float
    p01: float
    p99: float
    share: float
    """Of the whole KL, in 0..1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionTokens:
    """The action tokens of a batch, one entry each."""

    log_ratio: np.ndarray
    """(N,) float64, clean learner over rollout engine."""
    rollout_log_probs: np.ndarray
    """(N,) float64."""
    positions: np.ndarray
    """(N,) tokens since the first action of the sample."""
    kinds: np.ndarray
    """(N,) names of token classes."""
    lags: np.ndarray
    """(N,) weight pushes since the token was sampled; -1 where unknown."""


def action_tokens(
    samples: Sequence[RecordedSample],
    log_probs: torch.Tensor,
    *,
    policy_version: int | None,
    decode: Callable[[int], str],
    end_ids: frozenset[int],
) -> ActionTokens:
    """Collect the action tokens.

    Args:
        samples: of the batch.
        log_probs: (B, A) of the clean learner.
        policy_version: that the step updated; None when unknown.
        decode: one id to its text.
        end_ids: ids that end a sequence.
    """
    parts: list[tuple[np.ndarray, ...]] = []
    for row, sample in enumerate(samples):
        at = np.flatnonzero(sample.action_mask)
        if at.size == 0:
            continue
        rollout = sample.rollout_log_probs[at].astype(np.float64)
        learner = log_probs[row].double().numpy()[at - 1]
        versions = sample.versions[at]
        known = (versions >= 0) & (policy_version is not None)
        parts.append(
            (
                learner - rollout,
                rollout,
                at - at[0],
                _kinds(sample, at, decode, end_ids),
                np.where(known, (policy_version or 0) - versions, -1),
            )
        )
    if not parts:
        raise ValueError("no sample of the batch has an action token; there is nothing to explain")
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return ActionTokens(
        log_ratio=columns[0],
        rollout_log_probs=columns[1],
        positions=columns[2],
        kinds=columns[3],
        lags=columns[4],
    )


def by_class(tokens: ActionTokens) -> list[ClassFigures]:
    """Figures of every class that has a token, view by view."""
    everything: np.ndarray = np.ones(tokens.log_ratio.size, dtype=bool)
    rows = [_figures(tokens, "all", "all action tokens", everything)]
    for low, high in _bins((*POSITION_EDGES, np.inf)):
        inside = (tokens.positions >= low) & (tokens.positions < high)
        name = f"{low:g}" if high == low + 1 else f"{low:g} to {high - 1:g}"
        rows.append(_figures(tokens, "position in the answer", name, inside))
    probability = np.exp(tokens.rollout_log_probs)
    for low, high in _bins(ENVELOPE_EDGES):
        inside = (probability >= low) & ((probability < high) | (high == 1))
        rows.append(_figures(tokens, "rollout probability", f"{low:g} to {high:g}", inside))
    for kind in (FIRST, AFTER_TOOL, DIGIT, END, OTHER):
        rows.append(_figures(tokens, "token class", kind, tokens.kinds == kind))
    for lag in np.unique(tokens.lags):
        name = "unknown" if lag < 0 else f"{lag} pushes"
        rows.append(_figures(tokens, "version lag", name, tokens.lags == lag))
    return [row for row in rows if row.num_tokens]


def _figures(tokens: ActionTokens, view: str, name: str, inside: np.ndarray) -> ClassFigures:
    ratio = tokens.log_ratio[inside]
    if ratio.size == 0:
        return ClassFigures(
            view=view, name=name, num_tokens=0, k3_kl=0.0, mean=0.0, p01=0.0, p99=0.0, share=0.0
        )
    kl, whole = _kl(ratio), _kl(tokens.log_ratio) * tokens.log_ratio.size
    return ClassFigures(
        view=view,
        name=name,
        num_tokens=int(ratio.size),
        k3_kl=kl,
        mean=float(ratio.mean()),
        p01=float(np.quantile(ratio, 0.01)),
        p99=float(np.quantile(ratio, 0.99)),
        share=kl * ratio.size / whole if whole > 0 else 0.0,
    )


def _kl(log_ratio: np.ndarray) -> float:
    wide = torch.from_numpy(log_ratio)
    return k3_kl(wide, torch.zeros_like(wide), torch.ones_like(wide))


def _kinds(
    sample: RecordedSample,
    at: np.ndarray,
    decode: Callable[[int], str],
    end_ids: frozenset[int],
) -> np.ndarray:
    """The class of each action; the first that fits, in the order of the names above."""
    starts = {start for start, _ in sample.action_ranges}
    after_tool = {start for start, _ in sample.action_ranges[1:]}
    kinds = []
    for place in at:
        token = int(sample.token_ids[place])
        if place in starts:
            kinds.append(AFTER_TOOL if place in after_tool else FIRST)
        elif token in end_ids:
            kinds.append(END)
        elif decode(token).strip().isdigit():
            kinds.append(DIGIT)
        else:
            kinds.append(OTHER)
    return np.array(kinds)


def _bins(edges: Sequence[float]) -> list[tuple[float, float]]:
    return list(itertools.pairwise(edges))
