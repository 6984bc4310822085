"""Settings of the rollout service, and the faults that its deterministic engine can inject."""

from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FilePath,
    SecretStr,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import SettingsConfigDict

from services.common.settings import ServiceSettings
from services.common.wire import ROLLOUT_VARIABLES
from services.rollout.wire.schemas import Quantization


class FaultPlan(BaseModel):
    """What the deterministic engine does wrong on purpose, and when. The default: nothing.

    Tokens are counted over all jobs since the engine started. Network faults (a refused or lost
    connection, a status, a body cut short) are injected between client and service, not here.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    kill_after_tokens: int | None = Field(default=None, ge=1)
    """The engine dies after drawing this many tokens, with its running jobs unfinished."""

    nan_at_token: int | None = Field(default=None, ge=1)
    """The log-prob of this token is NaN; 1 is the first token of all."""

    step_s: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    """Seconds to wait after each step of one token per job."""


class RolloutSettings(ServiceSettings):
    """Serve token-in/token-out generation over vLLM, with weights verified by digest.

    The weight transports nccl and ipc, offered on CUDA GPUs, have never been run on a GPU.

    Each flag is also an environment variable: OPENRLHF_ALP_ROLLOUT_API_KEY and so on.
    """

    model_config = SettingsConfigDict(
        env_prefix=ROLLOUT_VARIABLES, cli_prog_name="python -m services.rollout"
    )

    model: Path
    """Folder with config.json, tokenizer and .safetensors files, or a Hugging Face id."""

    port: int = Field(default=8000, ge=0, le=65535)
    """TCP port; 0 takes any free one and prints it."""

    admin_key: SecretStr | None = None
    """Bearer key of the control routes (weights, pause); generated and printed if not given."""

    engine: Literal["vllm", "hf"] = "vllm"
    """vllm; or hf, a plain Hugging Face model on CPU for tests, deterministic and slow."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Dtype of the served weights; weight updates carry this dtype."""

    simulate_quantization: Quantization | None = None
    """Round the weights of every linear layer to this grid, per output channel, after each load. A
    mismatch to order for experiments: it saves neither memory nor time. By default off."""

    max_model_len: int | None = Field(default=None, ge=2)
    """Prompt plus sampled tokens; by default the model's own maximum."""

    max_num_seqs: int = Field(default=64, ge=1)
    """Samples drawn at once; more wait in the engine's queue."""

    kv_cache_gb: float = Field(default=1.0, gt=0.0)
    """GiB of key/value cache (CPU engine)."""

    num_threads: int | None = Field(default=None, ge=1)
    """OpenMP threads of the engine (CPU); by default vLLM chooses."""

    thread_bind: str | None = None
    """VLLM_CPU_OMP_THREADS_BIND: auto, nobind or a list of cores such as 0-3. The default is
    nobind if --num-threads is given."""

    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs per engine."""

    gpu_memory_utilization: float = Field(default=0.9, gt=0.0, le=1.0)
    """Share of each GPU's memory that vLLM allocates (GPU engine)."""

    sleep_mode: bool = False
    """Let POST /v1/sleep free the GPU's memory (GPU engine)."""

    tool_call_parser: str | None = None
    """vLLM's parser of the tool calls in answers of /v1/chat/completions, such as hermes for Qwen
    models or llama3_json; without one, tools are never called (vLLM engine)."""

    chat_template: FilePath | None = None
    """File with the chat template of /v1/chat/completions, in place of the model's own; the other
    routes take tokens and never apply one (vLLM engine)."""

    weights_dir: Path | None = None
    """Folder for weight updates, shared with the learner; by default a new one in /dev/shm."""

    seed: int = Field(default=0, ge=0)
    """Seed of requests without one."""

    max_pending_samples: int = Field(default=4096, ge=1)
    """Largest number of unfinished samples; requests above it get 429 with Retry-After."""

    keep_s: float = Field(default=900.0, ge=0.0)
    """Seconds that a finished reply is stored for a retry of the same request id."""

    keep_mb: float = Field(default=256.0, ge=0.0)
    """Largest size of all stored replies, in MiB."""

    detach_grace_s: float = Field(default=30.0, ge=0.0)
    """Seconds that a request continues after its connection dropped, so that a retry can join."""

    faults: FaultPlan = FaultPlan()
    """Faults to inject, with --engine hf only."""

    @field_validator("faults")
    @classmethod
    def _only_on_purpose(cls, faults: FaultPlan, info: ValidationInfo) -> FaultPlan:
        if faults != FaultPlan() and info.data.get("engine") != "hf":
            raise ValueError("only the deterministic engine can inject faults: --engine hf")
        return faults

    @field_validator("tool_call_parser", "chat_template")
    @classmethod
    def _with_openai_routes(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and info.data.get("engine") == "hf":
            raise ValueError("only the vLLM engine has OpenAI routes: --engine vllm")
        return value
