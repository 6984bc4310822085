"""Hashes that the learner and the service compute alike: tensors, weights, tokenizer, contract.

Imports blake3 and the standard library only. Tensors are passed as memory views, the tokenizer as
any object with the Hugging Face tokenizer interface.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from blake3 import blake3

_STATE_THAT_CALLS_CHANGE = ("truncation", "padding")


def tensor_digest(dtype: str, shape: Sequence[int], data: memoryview) -> str:
    """blake3 over a tensor's dtype, shape and bytes, as 64 hex digits.

    Args:
        dtype: safetensors dtype code, for example "BF16".
        shape: dimensions.
        data: the tensor's contiguous little-endian bytes.
    """
    hasher = blake3(f"{dtype}{list(shape)}".encode())
    hasher.update(data)
    return hasher.hexdigest()


def weights_digest(tensor_digests: Mapping[str, str]) -> str:
    """One digest for a whole set of weights: name -> `tensor_digest`, combined in name order."""
    lines = [f"{name} {tensor_digests[name]}\n" for name in sorted(tensor_digests)]
    return blake3("".join(lines).encode()).hexdigest()


def manifest_hash(specs: Mapping[str, tuple[Sequence[int], str]]) -> str:
    """Hash of names, shapes and dtypes, without contents: name -> (shape, dtype code)."""
    return object_hash({name: [list(shape), dtype] for name, (shape, dtype) in specs.items()})


def object_hash(value: Any) -> str:
    """blake3 of the canonical JSON of `value`, as 64 hex digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return blake3(text.encode()).hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of everything that maps text to ids and back, and of the ids that end a sequence.

    Covers vocabulary, merges, normaliser, pre-tokeniser, decoder, added tokens, bos and eos.
    Padding and truncation settings are left out: every call may change them and they decide no id.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and hasattr(backend, "to_str"):
        definition = json.loads(backend.to_str())
        for key in _STATE_THAT_CALLS_CHANGE:
            definition.pop(key, None)
    else:
        definition = dict(tokenizer.get_vocab())
    return object_hash(
        {
            "definition": definition,
            "bos": tokenizer.bos_token_id,
            "eos": tokenizer.eos_token_id,
        }
    )


def chat_template_hash(tokenizer: Any) -> str:
    """Hash of the chat template; that of an empty string when there is none."""
    return object_hash(tokenizer.chat_template or "")
