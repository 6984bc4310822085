"""Reads the folder of `--model` before the slow start of an engine, so that mistakes show early."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.common.errors import ConfigError
from services.rollout.settings import RolloutSettings
from services.rollout.weights.checkpoint import BadCheckpointError, model_files, scan
from services.rollout.weights.quantization import Rounding, linear_weights
from services.rollout.weights.staging import TIED_HEAD, ServedModel, Tensors
from services.rollout.wire.schemas import DtypeCode

logger = logging.getLogger(__name__)

_DTYPE_CODES: dict[str, DtypeCode] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolder:
    """A complete model folder: tokenizer and weights."""

    path: Path
    tokenizer: Any
    eos_token_ids: tuple[int, ...]
    served: ServedModel
    rounding: Rounding | None
    """Of simulated quantization."""


def resolve_model(model: Path) -> Path:
    """The folder of `--model`: itself, or the local copy of a Hugging Face id such as org/name.

    Raises:
        ConfigError: it looks like an id, but neither the hub nor the local cache has it.
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
    """Read configuration, tokenizer and the digests of the weights.

    Raises:
        ConfigError: the folder is missing or incomplete; says what is missing and what to do.
    """
    from transformers import AutoConfig, AutoTokenizer

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
    tied = bool(config.get_text_config().tie_word_embeddings)
    if tied:
        # Some files hold the head although it is the embedding; the engine loads one of the two.
        tensors.pop(TIED_HEAD, None)
    return ModelFolder(
        path=folder,
        tokenizer=tokenizer,
        eos_token_ids=_eos_token_ids(folder, tokenizer),
        served=ServedModel(
            tensors=tensors, dtype_code=_DTYPE_CODES[settings.dtype], head_is_tied=tied
        ),
        rounding=_rounding(settings, config, tensors),
    )


def _rounding(settings: RolloutSettings, config: Any, tensors: Tensors) -> Rounding | None:
    scheme = settings.simulate_quantization
    if scheme is None:
        return None
    try:
        names = linear_weights(config, tensors)
    except (BadCheckpointError, ValueError) as error:
        raise ConfigError(
            f"--model {settings.model} cannot be rounded: {error}. Fix: leave out "
            "--simulate-quantization, or take a dense model that transformers knows."
        ) from error
    logger.warning(
        "simulating %s: %d linear weights are rounded after each load", scheme, len(names)
    )
    return Rounding(scheme=scheme, names=names)


def _eos_token_ids(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    from transformers import GenerationConfig

    eos: set[int] = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    # Chat models often end a turn with a second token that only this file names.
    if (folder / "generation_config.json").is_file():
        listed = GenerationConfig.from_pretrained(folder).eos_token_id
        eos |= set([listed] if isinstance(listed, int) else listed or [])
    return tuple(sorted(eos))
