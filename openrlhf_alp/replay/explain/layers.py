"""What each layer's rounding does: the learner in float32, one layer at a time in serving dtype.

One layer's output is replaced by what a copy of it computes in the serving dtype from the same
input; everything else stays float32. So the KL of a layer is that of its own rounding alone.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from openrlhf_alp.alp import find_decoder, find_decoder_layers
from openrlhf_alp.objective.ratio import k3_kl
from openrlhf_alp.replay.learner import Learner
from openrlhf_alp.replay.tensors import BatchTensors, MicroBatch

HEAD = "lm_head"
NORM = "final norm"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRounding:
    """Of one part of the model."""

    layer: str
    """Index of the decoder layer, `final norm` or `lm_head`."""
    k3_kl: float
    """KL that its rounding alone makes, float32 learner over the same with this part rounded."""
    relative_error: float
    """Norm of what rounding changes of its output, over the norm of what the layer adds."""


@torch.no_grad()
def rounding_by_layer(
    learner: Learner,
    batches: Sequence[MicroBatch],
    batch: BatchTensors,
    dtype: torch.dtype,
) -> Iterator[LayerRounding]:
    """One result for each decoder layer, the final norm and the head.

    Args:
        learner: in float32.
        batches: of the samples that are looked at.
        batch: the same samples, whole.
        dtype: that the engine serves in.
    """
    shape = batch.action_mask.shape
    exact = learner.score(batches, shape)
    for name, module in _parts(learner.model):
        with _rounded(module, dtype) as errors:
            rounded = learner.score(batches, shape)
        changed, added = (sum(column) for column in zip(*errors, strict=True))
        yield LayerRounding(
            layer=name,
            k3_kl=k3_kl(rounded, exact, batch.action_mask),
            relative_error=(changed / added) ** 0.5 if added > 0 else 0.0,
        )


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for index, layer in enumerate(find_decoder_layers(model)):
        yield str(index), layer
    norm = getattr(find_decoder(model), "norm", None)
    if norm is not None:
        yield NORM, norm
    head = model.get_output_embeddings()
    if head is not None:
        yield HEAD, head


@contextmanager
def _rounded(module: nn.Module, dtype: torch.dtype) -> Iterator[list[tuple[float, float]]]:
    """Replace the module's output inside the block; yields squared norms (changed, added)."""
    twin = copy.deepcopy(module).to(dtype)
    # The copy has the hooks of the perturbation too; they stay off here.
    errors: list[tuple[float, float]] = []

    def replace(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        found = twin(*_cast(args, dtype), **_cast(kwargs, dtype))
        exact, rounded = _first(output), _first(found).to(_first(output).dtype)
        before = args[0] if args else kwargs["hidden_states"]
        added = exact - before if exact.shape == before.shape else exact
        errors.append(
            ((rounded - exact).double().square().sum().item(), added.double().square().sum().item())
        )
        return (rounded, *output[1:]) if isinstance(output, tuple) else rounded

    handle = module.register_forward_hook(replace, with_kwargs=True)
    try:
        yield errors
    finally:
        handle.remove()


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in `dtype`, within tuples and dicts too."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    if isinstance(value, tuple):
        return tuple(_cast(entry, dtype) for entry in value)
    if isinstance(value, dict):
        return {name: _cast(entry, dtype) for name, entry in value.items()}
    return value
