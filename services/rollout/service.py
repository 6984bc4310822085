"""The parts of a running rollout service, wired once; routes only call into this."""

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.common.errors import ConfigError
from services.rollout.engines.protocol import LOGPROBS_MODE, Engine
from services.rollout.generator import Generator, SampleSink, check_request
from services.rollout.ledger import Ledger, LedgerLimits
from services.rollout.settings import RolloutSettings
from services.rollout.weights.checkpoint import BadCheckpointError, model_files, scan
from services.rollout.weights.staging import (
    TIED_HEAD,
    ServedModel,
    Staging,
    digest_of,
    remove_if_abandoned,
)
from services.rollout.weights.store import WeightStore
from services.rollout.weights.uploads import Uploads
from services.rollout.weights.versions import Version, VersionLog
from services.rollout.wire.fingerprint import (
    chat_template_hash,
    manifest_hash,
    object_hash,
    tokenizer_hash,
)
from services.rollout.wire.schemas import API_VERSION, Contract, DtypeCode, GenerateRequest

_DTYPE_CODES: dict[str, DtypeCode] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_PRIVATE_PREFIX = "openrlhf-alp-weights-"
_HEADER_BYTES = 64 * 2**20
_CHANGING = (
    "version", "digest", "weights_dir", "weight_transports", "num_workers", "contract_hash"
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolder:
    """A model folder that was found complete: configuration, tokenizer and weights."""

    path: Path
    config: Any  # transformers configuration
    tokenizer: Any
    eos_token_ids: tuple[int, ...]
    served: ServedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutService:
    """Everything behind the routes."""

    engine: Engine
    versions: VersionLog
    weights: WeightStore
    generator: Generator
    ledger: Ledger
    uploads: Uploads
    static_contract: Contract

    def contract(self) -> Contract:
        """The contract with the version that is serving now."""
        current = self.versions.current
        return self.static_contract.model_copy(
            update={"version": current.number, "digest": current.digest}
        )

    def start(
        self,
        request: GenerateRequest,
        limit_s: float | None,
        on_tokens: SampleSink | None = None,
    ) -> None:
        """Make sure that a request is running or finished; `ledger.attach` waits for its reply.

        Args:
            request: what to draw.
            limit_s: seconds from now; the tighter of this and the request's own holds.
            on_tokens: told of tokens as they are drawn, when this call starts the run.

        Raises:
            ApiError: 422 for what can never run, 503 without whole weights, 409, 429 as
                `Ledger.submit`.
        """
        check_request(request, self.engine.info)
        self.weights.require_serving()
        self.ledger.submit(request, lambda: self.generator.run(request, limit_s, on_tokens))

    async def close(self) -> None:
        """Cancel what runs, end the engine and remove staged files."""
        await self.ledger.close()
        await self.weights.close()
        await self.engine.close()


def resolve_model(model: Path) -> Path:
    """The folder of `--model`: itself, or the local copy of a Hugging Face id such as org/name.

    Raises:
        ConfigError: it looks like an id, but neither hub nor local cache has it.
    """
    from huggingface_hub import snapshot_download

    if model.exists() or model.is_absolute() or len(model.parts) != 2:
        return model
    try:
        return Path(snapshot_download(str(model)))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--model {model} is no folder here and cannot be fetched as a Hugging Face id "
            f"({type(error).__name__}). Fix: check the spelling and the network, or give a folder."
        ) from error


def read_model_folder(settings: RolloutSettings) -> ModelFolder:
    """Read configuration, tokenizer and weight hashes before the slow start of an engine.

    Raises:
        ConfigError: the folder is missing or incomplete; says what is missing and what to do.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    folder = settings.model
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "does not exist"
        raise ConfigError(
            f"--model {folder} {what}. Fix: give a folder written by save_pretrained, with "
            "config.json, tokenizer files and .safetensors weights."
        )
    try:
        config = AutoConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tensors = scan(model_files(folder))
    except (OSError, ValueError, KeyError, BadCheckpointError) as error:
        raise ConfigError(
            f"--model {folder} cannot be loaded: {error}. Fix: save model and tokenizer again with "
            "save_pretrained(folder, safe_serialization=True)."
        ) from error
    eos: set[int] = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    if (folder / "generation_config.json").is_file():
        listed = GenerationConfig.from_pretrained(folder).eos_token_id
        eos |= set([listed] if isinstance(listed, int) else listed or [])
    tied = bool(config.get_text_config().tie_word_embeddings)
    if tied:
        tensors.pop(TIED_HEAD, None)
    served = ServedModel(
        tensors=tensors, dtype_code=_DTYPE_CODES[settings.dtype], head_is_tied=tied
    )
    return ModelFolder(
        path=folder,
        config=config,
        tokenizer=tokenizer,
        eos_token_ids=tuple(sorted(eos)),
        served=served,
    )


def make_weights_dir(settings: RolloutSettings) -> Path:
    """The folder for weight updates: the configured one, or a private one in shared memory.

    Raises:
        ConfigError: it cannot be made or written.
    """
    try:
        if settings.weights_dir is not None:
            settings.weights_dir.mkdir(parents=True, exist_ok=True)
            return settings.weights_dir
        shared_memory = Path("/dev/shm")
        parent = shared_memory if shared_memory.is_dir() else None
        for abandoned in Path(parent or tempfile.gettempdir()).glob(f"{_PRIVATE_PREFIX}*"):
            remove_if_abandoned(abandoned)
        return Path(tempfile.mkdtemp(prefix=_PRIVATE_PREFIX, dir=parent))
    except OSError as error:
        raise ConfigError(
            f"--weights-dir cannot be used: {error}. Fix: name a folder this user can write."
        ) from error


def build_service(
    engine: Engine, model: ModelFolder, settings: RolloutSettings, weights_dir: Path
) -> RolloutService:
    """Wire engine, versions, weights and contract together. Version 0 is the model folder."""
    versions = VersionLog(Version(number=0, digest=digest_of(model.served.tensors)))
    staging = Staging(model.served, weights_dir)
    contract = _contract(engine, model, versions.current, staging.weights_dir)
    return RolloutService(
        engine=engine,
        versions=versions,
        weights=WeightStore(engine, versions, model.served, staging),
        generator=Generator(engine, versions, contract.contract_hash),
        ledger=Ledger(
            LedgerLimits(
                max_pending_samples=settings.max_pending_samples,
                keep_s=settings.keep_s,
                keep_bytes=int(settings.keep_mb * 2**20),
                detach_grace_s=settings.detach_grace_s,
            )
        ),
        uploads=Uploads(staging.uploads_dir, _upload_limit(model.served)),
        static_contract=contract,
    )


def _upload_limit(served: ServedModel) -> int:
    """Bytes of two full updates in 8-byte elements, and room for headers."""
    num_elements = sum(math.prod(shape) for shape, _ in served.expected().values())
    return 2 * 8 * num_elements + _HEADER_BYTES


def _contract(engine: Engine, model: ModelFolder, version: Version, weights_dir: Path) -> Contract:
    info = engine.info
    contract = Contract(
        api_version=API_VERSION,
        model=model.path.name,
        architecture=info.architecture,
        tokenizer_hash=tokenizer_hash(model.tokenizer),
        chat_template_hash=chat_template_hash(model.tokenizer),
        vocab_size=info.vocab_size,
        eos_token_ids=list(info.eos_token_ids),
        dtype=info.dtype,
        logprobs_mode=LOGPROBS_MODE,
        max_model_len=info.max_model_len,
        engine=info.engine,
        engine_version=info.engine_version,
        weights_manifest_hash=manifest_hash(model.served.expected()),
        contract_hash="",
        version=version.number,
        digest=version.digest,
        weights_dir=str(weights_dir),
        weight_transports=["file", "http", *info.link_backends],
        num_workers=info.num_workers,
    )
    static = contract.model_dump(exclude=set(_CHANGING))
    return contract.model_copy(update={"contract_hash": object_hash(static)})
