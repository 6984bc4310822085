"""The parts of a running rollout service, wired once; routes only call into this."""

import math
from dataclasses import dataclass
from pathlib import Path

from services.common.errors import ConfigError
from services.rollout.engines.protocol import LOGPROBS_MODE, Engine
from services.rollout.generator import Generator, SampleSink, check_request
from services.rollout.gpu_transfer.link import WeightTransfer
from services.rollout.ledger import Ledger, LedgerLimits
from services.rollout.model_folder import ModelFolder
from services.rollout.settings import RolloutSettings
from services.rollout.weights.serving import SleepSwitch
from services.rollout.weights.staging import ServedModel, Staging, digest_of, load_plan
from services.rollout.weights.store import WeightStore
from services.rollout.weights.uploads import Uploads
from services.rollout.weights.versions import Version, VersionLog
from services.rollout.wire.fingerprint import (
    chat_template_hash,
    manifest_hash,
    object_hash,
    tokenizer_hash,
)
from services.rollout.wire.schemas import API_VERSION, Contract, GenerateRequest

_HEADER_BYTES = 64 * 2**20
# What may differ between servers that are interchangeable, or change while one runs.
_NOT_IN_CONTRACT_HASH = {
    "version", "digest", "weights_dir", "weight_transports", "num_workers", "contract_hash"
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutService:
    """Everything behind the routes."""

    engine: Engine
    versions: VersionLog
    weights: WeightStore
    sleep_switch: SleepSwitch
    generator: Generator
    ledger: Ledger
    uploads: Uploads
    transfer: WeightTransfer
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
            limit_s: seconds from now; the tighter of this and the request's own applies.
            on_tokens: called with tokens as they are drawn, if this call starts the run.

        Raises:
            GenerateError: the request could never run.
            WeightsError: the weights are asleep or unknown.
            LedgerError: as `Ledger.submit`.
        """
        check_request(request, self.engine.info)
        self.weights.state.require_serving()
        self.ledger.submit(request, lambda: self.generator.run(request, limit_s, on_tokens))

    async def close(self) -> None:
        """Cancel running requests, end the engine and remove staged files."""
        # In this order: runs use the engine, and a commit must end before its engine does.
        await self.ledger.close()
        await self.weights.close()
        await self.engine.close()


async def start_engine(settings: RolloutSettings, model: ModelFolder) -> Engine:
    """Start the engine that the settings name. Takes seconds to minutes and blocks.

    Raises:
        ConfigError: vLLM is not installed or does not start.
    """
    engine = _load_engine(settings, model)
    if model.rounding is not None:
        # Engines read the folder in their own ways; only this load rounds, as each later one does.
        try:
            await engine.load_weights(load_plan(model.served.tensors))
        except BaseException:
            await engine.close()
            raise
    return engine


def _load_engine(settings: RolloutSettings, model: ModelFolder) -> Engine:
    if settings.engine == "hf":
        from services.rollout.engines.hf_engine import HfEngine

        return HfEngine.load(model, settings)
    try:
        from services.rollout.engines.vllm_engine import VllmEngine
    except ImportError as error:
        raise ConfigError(
            f"vLLM cannot be imported: {error}. Fix: pip install -e .[rollout], or --engine hf."
        ) from error
    try:
        return VllmEngine.start(settings, model.eos_token_ids, model.rounding)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"vLLM does not start: {error}. Fix: see its log above; --kv-cache-gb, --max-model-len "
            "and --dtype are the usual causes."
        ) from error


def build_service(
    engine: Engine, model: ModelFolder, settings: RolloutSettings, weights_dir: Path
) -> RolloutService:
    """Wire engine, versions, weights and contract together. Version 0 is the model folder."""
    versions = VersionLog(Version(number=0, digest=digest_of(model.served.tensors)))
    staging = Staging(model.served, weights_dir)
    weights = WeightStore(engine, versions, model.served, staging)
    uploads = Uploads(staging.uploads_dir, _upload_limit(model.served))
    contract = _contract(engine, model, versions.current, staging.weights_dir)
    limits = LedgerLimits(
        max_pending_samples=settings.max_pending_samples,
        keep_s=settings.keep_s,
        keep_bytes=int(settings.keep_mb * 2**20),
        detach_grace_s=settings.detach_grace_s,
    )
    return RolloutService(
        engine=engine,
        versions=versions,
        weights=weights,
        sleep_switch=SleepSwitch(engine, weights.state, weights.serving_plan),
        generator=Generator(engine, versions, contract.contract_hash),
        ledger=Ledger(limits),
        uploads=uploads,
        transfer=WeightTransfer(engine, uploads),
        static_contract=contract,
    )


def _upload_limit(served: ServedModel) -> int:
    """Bytes of two full updates in 8-byte elements, plus room for headers."""
    # Two: a learner that died may have left the files of its whole update behind.
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
        simulated_quantization=None if model.rounding is None else model.rounding.scheme,
        contract_hash="",
        version=version.number,
        digest=version.digest,
        weights_dir=str(weights_dir),
        weight_transports=["file", "http", *info.link_backends],
        num_workers=info.num_workers,
    )
    hashed = contract.model_dump(exclude=_NOT_IN_CONTRACT_HASH)
    return contract.model_copy(update={"contract_hash": object_hash(hashed)})
