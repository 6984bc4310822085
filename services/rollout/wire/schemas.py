"""The wire contract v1 of the rollout service. Clients import it: pydantic only, no engine.

Requests and replies carry token ids and no text, so there are no options that shape text. Every
sampling field has a neutral default that belongs to this contract; nothing is filled in from the
model's generation config.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from services.common.wire import Number, Whole

API_VERSION = "v1"
VERSION_HEADER = "x-weight-version"
"""Response header of generate routes: the version serving when the reply was sent."""

MAX_SAMPLES = 1024
MAX_BATCH = 1024
MAX_TOKEN_ID = 2**31 - 1  # msgpack carries ids as int32
MIN_SAMPLED_TEMPERATURE = 0.01  # vLLM raises what is below to this, and so changes the log-probs

TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID, strict=True)]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$")]
RequestId = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,128}$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FinishReason = Literal["stop", "length", "abort"]
WeightState = Literal["serving", "committing", "sleeping", "failed"]
SleepLevel = Literal[1, 2]
SleepMode = Literal["wait", "abort"]
PauseMode = Literal["keep", "wait", "abort"]
DtypeCode = Literal[
    "BF16", "F16", "F32", "F64", "U8", "I8", "I32", "I64", "BOOL", "F8_E4M3", "F8_E5M2"
]
"""Dtype codes of safetensors."""

LinkBackend = Literal["nccl", "ipc"]
WeightTransport = Literal["file", "http", "nccl", "ipc"]
Quantization = Literal["int8", "int4", "fp8-e4m3"]


class Wire(BaseModel):
    """Base of every message: unknown fields, NaN and infinity are refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Sampling(Wire):
    """How tokens are drawn. The reply's log-probs are those of the distribution described here."""

    max_tokens: Whole = Field(ge=1, le=10_000_000)
    """Largest number of sampled tokens, including an end-of-sequence token. Together with the
    prompt they have to fit into the contract's max_model_len."""

    min_tokens: Whole = Field(default=0, ge=0, le=10_000_000)
    """End-of-sequence and stop tokens are forbidden before this many tokens."""

    temperature: Number = Field(default=1.0, ge=0.0, le=2.0)
    """Divides the logits; 0 is greedy. Values between 0 and 0.01 are refused, because the engine
    would replace them."""

    top_p: Number = Field(default=1.0, gt=0.0, le=1.0)
    """Keep the smallest set of tokens with at least this mass; 1 keeps all."""

    top_k: Whole = Field(default=0, ge=0, le=MAX_TOKEN_ID)
    """Keep the k most likely tokens; 0 keeps all."""

    min_p: Number = Field(default=0.0, ge=0.0, le=1.0)
    """Drop tokens less likely than this share of the most likely one; 0 drops none."""

    presence_penalty: Number = Field(default=0.0, ge=-2.0, le=2.0)
    """Subtracted once from the logit of every token sampled before."""

    frequency_penalty: Number = Field(default=0.0, ge=-2.0, le=2.0)
    """Subtracted from the logit of a token for each time it was sampled before."""

    repetition_penalty: Number = Field(default=1.0, gt=0.0, le=100.0)
    """Divides positive and multiplies negative logits of seen tokens; 1 changes nothing."""

    stop: tuple[Annotated[str, Field(min_length=1, max_length=1024)], ...] = Field(
        default=(), max_length=64
    )
    """Strings that end a sample. The tokens that spell the string stay in the reply."""

    stop_token_ids: tuple[TokenId, ...] = Field(default=(), max_length=1024)
    """Extra tokens that end a sample. The token stays in the reply."""

    ignore_eos: bool = False
    """Continue after an end-of-sequence token."""

    seed: Whole | None = Field(default=None, ge=0, le=2**62)
    """Seed of sample 0; sample i uses seed + i. None: not reproducible."""


class GenerateRequest(Wire):
    """One prompt, n samples."""

    request_id: RequestId
    """The caller's id, which makes the request idempotent: a retry sends the same id and body."""

    token_ids: list[TokenId] = Field(min_length=1, fail_fast=True)
    """The prompt, (T,) ids."""

    n: Whole = Field(default=1, ge=1, le=MAX_SAMPLES)
    """Independent samples of this prompt."""

    sampling: Sampling

    deadline_s: Number | None = Field(default=None, gt=0.0, le=86_400.0)
    """Seconds from arrival after which the request is cancelled and answered with 504."""

    work_limit_s: Number | None = Field(default=None, gt=0.0, le=86_400.0)
    """The same, but from the first sampled token on: waiting for a slot of the engine is free."""


class BatchRequest(Wire):
    """Many generate requests in one call; each has its own id, by which it is retried."""

    requests: list[GenerateRequest] = Field(min_length=1, max_length=MAX_BATCH, fail_fast=True)


class Span(Wire):
    """Positions [start, end) of a sample were drawn by this version of the weights."""

    version: int
    digest: str
    start: int
    end: int


class Sample(Wire):
    """One sampled continuation. token_ids and logprobs have the same length, at least 0."""

    token_ids: list[int]
    """(N,) sampled ids; a sampled end-of-sequence or stop token is included."""

    logprobs: list[float]
    """(N,) float32 values: log-probability of each sampled id under the processed distribution."""

    finish_reason: FinishReason
    stop_reason: int | str | None
    """The stop token id or stop string that ended the sample; None for the model's own EOS."""

    spans: list[Span]
    """Cover [0, N) in order, without gaps."""


class Timings(Wire):
    """Seconds spent inside the service."""

    total_s: float


class GenerateResponse(Wire):
    """All n samples of one request, in sample order."""

    request_id: str
    samples: list[Sample]
    contract_hash: str
    version: int
    """The version that served when the reply was made; the spans say which drew each token."""

    timings: Timings


class ItemError(Wire):
    """What went wrong with one request of a batch, as in the error body of a single request."""

    code: str
    message: str
    fix: str
    field: str | None


class BatchItem(Wire):
    """One finished request of a batch: its reply or its error."""

    index: int
    """Place in the batch; items come in the order in which they finish."""

    request_id: str
    status: int
    """The HTTP status that the request would have had alone."""

    response: GenerateResponse | None = None
    error: ItemError | None = None


class TokensEvent(Wire):
    """SSE event `tokens`: newly drawn tokens of one sample."""

    index: int
    token_ids: list[int]
    logprobs: list[float]


class RunningReply(Wire):
    """The request is still running; ask again."""

    request_id: str
    state: Literal["running"] = "running"


class ForgetReply(Wire):
    """What DELETE found: a run that it cancelled, a stored reply that it dropped, or nothing."""

    request_id: str
    state: Literal["cancelled", "dropped", "unknown"]


class Contract(Wire):
    """What a learner has to agree with before it trains on this service's tokens."""

    api_version: str
    model: str
    architecture: str
    tokenizer_hash: str
    chat_template_hash: str
    vocab_size: int
    eos_token_ids: list[int]
    dtype: str
    """Serving dtype of the weights: bfloat16, float16 or float32."""

    logprobs_mode: str
    """processed_logprobs: after temperature, penalties, top-k, top-p and min-p."""

    max_model_len: int
    """Largest sum of prompt and sampled tokens."""

    engine: str
    engine_version: str
    weights_manifest_hash: str
    """Hash of the names, shapes and dtypes that a weight update has to carry."""

    simulated_quantization: Quantization | None = None
    """The weights of linear layers are rounded to this grid after each load; None: not rounded.
    Digests stay those of the weights before the rounding."""

    contract_hash: str
    """Hash of every field above; the same in each reply."""

    version: int
    digest: str
    weights_dir: str
    weight_transports: list[WeightTransport]
    """How a weight update can reach this server; nccl and ipc on CUDA GPUs only."""

    num_workers: int
    """GPUs of the engine; each joins a group of the transport nccl as a rank."""


class TensorSpec(Wire):
    """One tensor of a checkpoint. dtype is the safetensors code, for example BF16."""

    shape: list[int]
    dtype: DtypeCode
    digest: str
    """blake3 of the tensor's bytes, as served now."""


class WeightsStatus(Wire):
    """The serving version, what is staged, and what an update must carry."""

    version: int
    digest: str
    state: WeightState
    staged_version: int | None
    staged_digest: str | None
    detail: str | None
    """Why the state is failed, and what to do."""

    tensors: dict[str, TensorSpec]


class PrepareRequest(Wire):
    """Stage an update. The serving version keeps serving whatever happens here."""

    version: Whole = Field(gt=0, le=2**62)
    """Must be above the serving version."""

    digest: Digest
    """`weights_digest` over the merged result: the tensors sent plus the serving ones not sent."""

    files: list[Annotated[str, Field(min_length=1, max_length=512)]] = Field(max_length=4096)
    """safetensors files, relative to the contract's weights_dir. Tensors that did not change may be
    left out when `base_version` names the serving version."""

    base_version: Whole | None = Field(default=None, ge=0)
    """Version from which the tensors left out are taken; None: nothing is left out."""


class UploadStatus(Wire):
    """How much of an uploaded file has arrived."""

    name: str
    num_bytes: int


class CommitRequest(Wire):
    """Make the staged update the serving one."""

    version: Whole = Field(gt=0, le=2**62)
    digest: Digest
    pause: PauseMode = "keep"
    """Running requests continue after the swap (keep), finish first (wait), or end (abort)."""

    recompute_running: bool = True
    """Running requests rebuild their KV cache under the new weights; False keeps the old KV."""

    timeout_s: Number = Field(default=300.0, gt=0.0, le=3600.0)


class CommitResponse(Wire):
    """The update is loaded and serving."""

    version: int
    digest: str
    pause_s: float
    load_s: float
    total_s: float


class PauseRequest(Wire):
    """Stop drawing tokens."""

    mode: PauseMode = "keep"


class SleepRequest(Wire):
    """Free the accelerator's memory until wake_up; generation is refused meanwhile."""

    level: SleepLevel = 1
    """1 keeps the weights in host memory; 2 drops them, and wake_up reads the serving files."""

    mode: SleepMode = "wait"
    """Running requests finish first (wait), or end (abort)."""


class Health(Wire):
    """State of a probe."""

    status: Literal["ok", "unavailable"]
    detail: str | None = None
    version: int | None = None
