"""One self-contained HTML file of a recorded step."""

import json
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from openrlhf_alp.replay.files.records import RecordedBatch
from openrlhf_alp.report.episodes.ratios import Ratios
from openrlhf_alp.report.episodes.texts import local_vocabulary, token_texts
from openrlhf_alp.report.episodes.view import (
    columns_of,
    group_rows,
    mode_rows,
    packed_columns,
    sample_rows,
)
from openrlhf_alp.report.html.render import packed, render
from openrlhf_alp.report.visible import visible


def write_page(
    batch: RecordedBatch,
    out: Path,
    *,
    tokenizer: Any | None,
    ratios: Ratios | None,
    notes: Sequence[str] = (),
) -> Path:
    """Writes the page of a batch.

    Args:
        out: the file.
        tokenizer: None shows ids in place of texts.
        ratios: None leaves surprise as the only colour.
        notes: sentences that stand above the episodes.

    Raises:
        OSError: the file cannot be written.
    """
    ids, tokens = local_vocabulary(batch.samples)
    columns = columns_of(batch, ratios)
    info = batch.info
    data = {
        "modes": mode_rows(columns),
        "groups": group_rows(batch.samples),
        "samples": sample_rows(batch),
        "vocabulary": token_texts(ids, tokenizer),
        "ids": ids,
        "notes": [*notes, *(ratios.notes if ratios else ())],
    }
    step = f"step {info.step}" if info.step else "one batch"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        render(
            "episodes.html",
            title=visible(" / ".join(filter(None, [step, info.method, Path(info.model).name]))),
            subtitle=_subtitle(batch),
            # ASCII, so that lone surrogates of a policy's text survive the file's encoding.
            data=packed(json.dumps(data, separators=(",", ":"), allow_nan=False).encode("ascii")),
            tokens=packed(tokens.astype("<u4").tobytes()),
            numbers=packed(packed_columns(columns)),
        ),
        encoding="utf-8",
    )
    return out


def _subtitle(batch: RecordedBatch) -> str:
    rewards = [s.reward for s in batch.samples if s.reward is not None and isfinite(s.reward)]
    parts = [
        f"{len(batch.samples)} episodes in {len(group_rows(batch.samples))} groups",
        f"{sum(s.num_tokens for s in batch.samples):,} tokens, {batch.num_action_tokens:,} trained",
    ]
    if rewards:
        missing = len(batch.samples) - len(rewards)
        without = f" ({missing} episodes have none)" if missing else ""
        parts.append(f"mean reward {sum(rewards) / len(rewards):.3f}{without}")
    if batch.info.policy_version is not None:
        parts.append(f"weights {batch.info.policy_version} ({batch.info.model_digest[:12]})")
    return ", ".join(parts)
