"""Simulated quantization: linear weights are rounded as a quantized engine would hold them.

The rollout policy then really is another policy than the one that was pushed, at will and on any
machine, so that a method can be tested under a mismatch of known origin.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from services.rollout.weights.checkpoint import BadCheckpointError, TensorFile
from services.rollout.wire.schemas import Quantization
from services.rollout.wire.tensors import DTYPES

_LARGEST: dict[Quantization, float] = {"int8": 127.0, "int4": 7.0, "fp8-e4m3": 448.0}
"""The largest number of each grid. Integers are symmetric around 0, so the least is its negative.
"""

_SHOWN_NAMES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """What is rounded after each load, and to which grid."""

    scheme: Quantization
    names: frozenset[str]
    """Checkpoint names of the weights of linear layers."""

    def __call__(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor to serve under `name`: rounded, or itself. Keeps shape and dtype."""
        return round_weight(tensor, self.scheme) if name in self.names else tensor


def round_weight(weight: torch.Tensor, scheme: Quantization) -> torch.Tensor:
    """Round each output channel to `scale` times a grid, scale = largest |weight| / largest number.

    Args:
        weight: (num_outputs, num_inputs), of any floating dtype.
        scheme: int8 has 255 levels per channel, int4 15; fp8-e4m3 has 3 bits of mantissa.

    Returns:
        The rounded weight in the dtype of `weight`. Computed in float32; in a 16-bit dtype the
        result is rounded to that as well.
    """
    exact = weight.float()
    scale = exact.abs().amax(dim=1, keepdim=True) / _LARGEST[scheme]
    # A channel of zeros, or of numbers too small for a scale, becomes zeros instead of NaN.
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    scaled = exact / scale
    on_grid = scaled.to(torch.float8_e4m3fn).float() if scheme == "fp8-e4m3" else scaled.round()
    return (on_grid * scale).to(weight.dtype)


def linear_weights(config: Any, tensors: Mapping[str, TensorFile]) -> frozenset[str]:
    """Names of the weights of linear layers; embeddings, and a head tied to one, are not linear.

    Args:
        config: the model's Hugging Face config.
        tensors: of its checkpoint, without a tied head.

    Raises:
        BadCheckpointError: a matrix belongs to neither kind of layer, such as fused experts.
    """
    from transformers import AutoModelForCausalLM

    # The layers alone, without memory for their weights.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    # By the last part of the name: prefixes in files may differ from those in memory.
    linear, embedding = (
        {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, k)}
        for k in (torch.nn.Linear, torch.nn.Embedding)
    )
    names, unknown = set(), []
    for name, tensor in tensors.items():
        if len(tensor.shape) < 2 or not DTYPES[tensor.dtype].is_floating_point:
            continue
        layer, _, parameter = name.rpartition(".")
        kind = layer.rpartition(".")[2]
        if parameter == "weight" and len(tensor.shape) == 2 and kind in linear:
            names.add(name)
        elif kind not in embedding:
            unknown.append(name)
    if unknown:
        raise BadCheckpointError(
            f"--simulate-quantization rounds linear layers and leaves embeddings, but "
            f"{', '.join(sorted(unknown)[:_SHOWN_NAMES])} ({len(unknown)} in all) belong to neither"
        )
    return frozenset(names)
