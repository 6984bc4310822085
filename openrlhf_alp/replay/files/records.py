"""A recorded batch in process: its samples on the token axis, and what is known of the whole."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from openrlhf_alp.episodes.records import Episode, ToolCall, Turn, VersionSpan
from openrlhf_alp.replay.files.schema import BatchInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedSample:
    """One episode as it was trained on; T tokens on the axis of `episodes/records.py`."""

    token_ids: np.ndarray
    """(T,) int32."""

    rollout_log_probs: np.ndarray
    """(T,) float32; 0.0 where nothing was sampled."""

    action_ranges: tuple[tuple[int, int], ...]
    """Half-open (start, end) of the tokens that are trained on. A void turn is in none of them."""

    advantages: np.ndarray | None = None
    """(T,) float32; 0.0 off the action ranges. None: to be computed from `group` and `reward`."""

    sample: int = 0
    """Number of the sample in its run, part of the key of its noise."""

    group: str = ""
    """Samples of one prompt share it; rewards are compared within a group."""

    reward: float | None = None
    reward_detail: Mapping[str, float] = field(default_factory=dict)
    request_id: str = ""
    prompt: str = ""
    label: str = ""
    stop_reason: str = ""
    truncated: bool = False
    void: bool = False
    spans: tuple[VersionSpan, ...] = ()
    """Versions that sampled the tokens; empty when unknown."""

    turns: tuple[Turn, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()

    @classmethod
    def of_episode(
        cls,
        episode: Episode,
        *,
        action_ranges: tuple[tuple[int, int], ...],
        advantages: np.ndarray | None = None,
        sample: int = 0,
        group: str = "",
    ) -> "RecordedSample":
        """The sample of an episode; the arguments are what only its training step knows."""
        return cls(
            token_ids=np.array(episode.token_ids, dtype=np.int32),
            rollout_log_probs=np.array(episode.logprobs, dtype=np.float32),
            action_ranges=action_ranges,
            advantages=advantages,
            sample=sample,
            group=group,
            reward=episode.reward,
            reward_detail=episode.reward_detail,
            request_id=episode.request_id,
            prompt=episode.prompt,
            label=episode.label,
            stop_reason=episode.stop_reason,
            truncated=episode.truncated,
            void=episode.void,
            spans=episode.spans,
            turns=episode.turns,
            tool_calls=episode.tool_calls,
        )

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def action_mask(self) -> np.ndarray:
        """(T,) bool of the tokens that are trained on."""
        mask: np.ndarray = np.zeros(self.num_tokens, dtype=bool)
        for start, end in self.action_ranges:
            mask[start:end] = True
        return mask

    @property
    def versions(self) -> np.ndarray:
        """(T,) int64 version that sampled each token; -1 where none did or it is unknown."""
        versions: np.ndarray = np.full(self.num_tokens, -1, dtype=np.int64)
        for span in self.spans:
            versions[span.start : span.end] = span.version
        return versions


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedBatch:
    """The samples of one training step."""

    info: BatchInfo
    samples: tuple[RecordedSample, ...]

    @property
    def num_action_tokens(self) -> int:
        return sum(end - start for s in self.samples for start, end in s.action_ranges)
