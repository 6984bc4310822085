"""Tensors as both sides of a weight update name and digest them. Imports torch."""

import torch

from services.rollout.wire.fingerprint import tensor_digest
from services.rollout.wire.schemas import DtypeCode

DTYPE_CODES: dict[torch.dtype, DtypeCode] = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
"""The codes of safetensors."""
DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor of any dtype, without a copy."""
    view: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return view


def digest_tensor(tensor: torch.Tensor) -> str:
    """The digest both sides compute: over dtype, shape and bytes of a contiguous CPU tensor."""
    return tensor_digest(DTYPE_CODES[tensor.dtype], tensor.shape, tensor_bytes(tensor))
