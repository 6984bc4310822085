"""A recorded step as a log of Inspect, so that its viewer and its tools take it."""

import math
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from inspect_ai.log import (
    EvalConfig,
    EvalDataset,
    EvalLog,
    EvalSample,
    EvalSpec,
    write_eval_log,
)
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageTool,
    ChatMessageUser,
    ModelOutput,
)
from inspect_ai.scorer import Score

from openrlhf_alp.episodes.records import ToolCall, TurnKind
from openrlhf_alp.replay.files.records import RecordedBatch, RecordedSample

_SCORER = "reward"
_UNKNOWN = "unknown"


def write_inspect_log(batch: RecordedBatch, out: Path) -> Path:
    """Writes `out`, a .eval file: a sample per group, an epoch per episode.

    Raises:
        OSError: the file cannot be written.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    groups = Counter(_group(sample, place) for place, sample in enumerate(batch.samples))
    info = batch.info
    log = EvalLog(
        status="success",
        eval=EvalSpec(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            task=f"training step {info.step}",
            dataset=EvalDataset(name="recorded batch", samples=len(groups)),
            model=f"openrlhf_alp/{Path(info.model).name or _UNKNOWN}",
            config=EvalConfig(epochs=max(groups.values())),
            metadata={
                "method": info.method,
                "policy_version": info.policy_version,
                "model_digest": info.model_digest,
            },
        ),
        samples=list(_samples(batch)),
    )
    write_eval_log(log, str(out))
    return out


def _samples(batch: RecordedBatch) -> Iterator[EvalSample]:
    epochs: Counter[str] = Counter()
    for place, sample in enumerate(batch.samples):
        group = _group(sample, place)
        epochs[group] += 1
        yield EvalSample(
            id=group,
            epoch=epochs[group],
            input=sample.prompt,
            target=sample.label,
            messages=_messages(sample),
            output=ModelOutput.from_content(
                model=batch.info.model or _UNKNOWN, content=_end(sample)
            ),
            scores=_scores(sample),
            metadata={
                "request_id": sample.request_id,
                "stop_reason": sample.stop_reason,
                "truncated": sample.truncated,
                "void": sample.void,
                "num_tokens": sample.num_tokens,
                "versions": sorted({span.version for span in sample.spans}),
            },
        )


def _group(sample: RecordedSample, place: int) -> str:
    return f"group {sample.group}" if sample.group else f"sample {place}"


def _messages(sample: RecordedSample) -> list[ChatMessage]:
    messages: list[ChatMessage] = [ChatMessageUser(content=sample.prompt)]
    calls = iter(sample.tool_calls)
    for turn in sample.turns:
        if turn.kind is TurnKind.ACTION:
            messages.append(ChatMessageAssistant(content=turn.text))
        elif turn.kind is TurnKind.OBSERVATION:
            messages.append(_tool(turn.text, next(calls, None)))
    return messages


def _tool(text: str, call: ToolCall | None) -> ChatMessage:
    metadata: dict[str, Any] = {} if call is None else {"code": call.code, "status": call.status}
    return ChatMessageTool(content=text, function="python", metadata=metadata)


def _end(sample: RecordedSample) -> str:
    answers = [turn.text for turn in sample.turns if turn.kind is TurnKind.ACTION]
    return answers[-1] if answers else ""


def _scores(sample: RecordedSample) -> dict[str, Score]:
    if sample.reward is None or not math.isfinite(sample.reward):
        return {}
    detail = ", ".join(f"{name} {value:g}" for name, value in sample.reward_detail.items())
    return {_SCORER: Score(value=sample.reward, answer=_end(sample), explanation=detail)}
