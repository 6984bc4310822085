"""The file format of a recorded batch: one Parquet file of one row per sample.

    column             type                              needed
    token_ids          list<int32>, (T,)                 yes
    rollout_log_probs  list<float32>, (T,)               yes
    action_ranges      list<struct<start, end>>          yes, or
    action_mask        list<bool>, (T,)                  this one
    advantages         list<float32>, (T,)               yes, or
    group, reward      string, float64                   both of these

The other columns of SCHEMA are optional. All lists share the token axis of `episodes/records.py`.
The file's key-value metadata holds one JSON object, `BatchInfo`, under METADATA_KEY; a file without
it is read as a batch of an unknown model, sampled at temperature 1.
"""

from typing import Any

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

FORMAT_VERSION = 1
"""Version of columns and metadata. A reader refuses another one instead of guessing."""

METADATA_KEY = b"openrlhf_alp.batch"
"""Key of the JSON object in the Parquet file's metadata."""

SUFFIX = ".parquet"

_RANGE = pa.struct([("start", pa.int32()), ("end", pa.int32())])
_SPAN = pa.struct(
    [("version", pa.int64()), ("digest", pa.string()), ("start", pa.int32()), ("end", pa.int32())]
)
_TURN = pa.struct(
    [
        ("kind", pa.string()),
        ("start", pa.int32()),
        ("end", pa.int32()),
        ("text", pa.string()),
        ("void", pa.bool_()),
        ("finish_reason", pa.string()),
        ("stop", pa.string()),
    ]
)
_TOOL_CALL = pa.struct(
    [
        ("code", pa.string()),
        ("output", pa.string()),
        ("status", pa.string()),
        ("total_s", pa.float64()),
        ("run_s", pa.float64()),
    ]
)

SCHEMA = pa.schema(
    [
        ("sample", pa.int64()),
        ("group", pa.string()),
        ("request_id", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("rollout_log_probs", pa.list_(pa.float32())),
        ("action_ranges", pa.list_(_RANGE)),
        ("advantages", pa.list_(pa.float32())),
        ("reward", pa.float64()),
        ("reward_detail", pa.map_(pa.string(), pa.float64())),
        ("prompt", pa.string()),
        ("label", pa.string()),
        ("stop_reason", pa.string()),
        ("truncated", pa.bool_()),
        ("void", pa.bool_()),
        ("spans", pa.list_(_SPAN)),
        ("turns", pa.list_(_TURN)),
        ("tool_calls", pa.list_(_TOOL_CALL)),
    ]
)
"""Columns as a run records them."""

ACTION_MASK = pa.field("action_mask", pa.list_(pa.bool_()))
"""What a file from elsewhere may have in place of `action_ranges`."""


class BatchInfo(BaseModel):
    """What a file says about its batch as a whole; every field may be missing."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    format_version: int = FORMAT_VERSION
    package_version: str = ""
    """Version of openrlhf_alp that wrote the file."""

    step: int = 0
    """Training step that trained on the batch, from 1 on; 0 when unknown."""

    policy_version: int | None = None
    """Version of the weights that the step updated, in pushes of the run."""

    model: str = ""
    """Folder or Hugging Face id that the run started from."""

    model_digest: str = ""
    """Digest of the weights that the step updated, in their serving dtype."""

    method: str = ""
    """`--alp.method` of the run."""

    contract: dict[str, Any] = Field(default_factory=dict)
    """GET /v1/contract of the rollout service: tokenizer, vocabulary, dtype, engine."""

    sampling: dict[str, Any] = Field(default_factory=dict)
    """How the tokens were sampled: temperature, top_p, top_k, max_tokens."""

    seeds: dict[str, int] = Field(default_factory=dict)
    """`train` and `noise` seed."""

    training: dict[str, Any] = Field(default_factory=dict)
    """Settings of the update: learning rate, batch sizes, aggregation, `--alp.*`."""

    @property
    def temperature(self) -> float:
        """Divides the logits; 1 when the file does not say."""
        return float(self.sampling.get("temperature", 1.0))
