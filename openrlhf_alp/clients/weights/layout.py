"""A model's tensors under the names and in the shapes of its checkpoint.

Memory and checkpoint differ: transformers 5 holds the experts of a layer as one parameter, and
multimodal models under other prefixes than their files. `save_pretrained` reverts that for a whole
model at once; here the same function of transformers does it for a few parameters at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from openrlhf_alp.clients.errors import WeightUpdateFailed

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointLayout:
    """Which parameters have to be converted together, and what they become."""

    groups: tuple[tuple[str, ...], ...]
    """Names of parameters and persistent buffers as in memory, in the model's order. Most stand
    alone; those of which one tensor of the checkpoint is made stand together."""

    tensors: Mapping[str, torch.Tensor]
    """Name in the checkpoint -> tensor on the meta device, of the full shape and its dtype."""

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """The layout of `model`, whose parameters may be sharded by ZeRO-3. Takes no memory.

        Tied parameters count once, under their first name, as they do in a Hugging Face checkpoint.
        """
        stand_ins: dict[str, torch.Tensor] = {
            name: _Traced.of(name, tensor) for name, tensor in stored_tensors(model).items()
        }
        converted = to_checkpoint(model, stand_ins)
        groups = _connected(stand_ins, [tensor.sources for tensor in converted.values()])
        plain = {name: tensor.as_subclass(torch.Tensor) for name, tensor in converted.items()}
        return cls(groups=groups, tensors=plain)

    def require_convertible(self, model: nn.Module) -> None:
        """Refuse a model of which a part cannot be converted without the rest.

        Raises:
            WeightUpdateFailed: names the first tensor of the checkpoint that would be missing.
        """
        stored = stored_tensors(model)
        found: Tensors = {}
        for group in self.groups:
            found |= to_checkpoint(model, {name: _stand_in(stored[name]) for name in group})
        for name, tensor in self.tensors.items():
            if name not in found or found[name].shape != tensor.shape:
                raise WeightUpdateFailed(
                    f"{name} of {type(model).__name__}'s checkpoint cannot be made from a part of "
                    "the model in memory, so its weights cannot be pushed bucket by bucket. Fix: "
                    "train a model of another architecture, or without the rollout service."
                )


def stored_tensors(model: nn.Module) -> Tensors:
    """Parameters and persistent buffers by name, as save_pretrained takes them: of tied ones only
    the name that is loaded, and none that the model never saves."""
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    # `state_dict` alone knows which buffers are persistent, `named_*` which tensors are tied: under
    # ZeRO-3 all shards of a rank may have the same empty storage.
    saved = model.state_dict(keep_vars=True).keys() - ignored
    names: dict[int, list[str]] = {}
    tensors: Tensors = {}
    for of in (model.named_parameters, model.named_buffers):
        for name, tensor in of(remove_duplicate=False):
            if name in saved:
                names.setdefault(id(tensor), []).append(name)
                tensors[name] = tensor
    tied_to_others = getattr(model, "all_tied_weights_keys", None) or {}
    loaded = [
        next((n for n in same if n not in tied_to_others), same[0]) for same in names.values()
    ]
    return {name: tensors[name] for name in loaded}


def to_checkpoint(model: nn.Module, tensors: Tensors) -> Tensors:
    """`tensors` under the names and in the shapes in which save_pretrained writes them.

    Args:
        model: what they belong to. Anything but a model of transformers is left as it is.
        tensors: all tensors of one group or several, by their name in memory.
    """
    if not isinstance(model, PreTrainedModel):
        return tensors
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        # Under ZeRO-3, transformers 5.15 also notes conversions that did nothing when the model was
        # loaded; reverting these would invent prefixes.
        model._weight_conversions = [c for c in conversions if c.was_used()]
    reverted: Tensors = revert_weight_conversion(model, tensors)
    return reverted


class _Traced(torch.Tensor):
    """A tensor without memory that remembers which parameters it was made of."""

    sources: frozenset[str]

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> _Traced:
        traced: _Traced = _stand_in(tensor).as_subclass(cls)
        traced.sources = frozenset({name})
        return traced

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls)]
        sources = frozenset().union(*(leaf.sources for leaf in inputs))
        for leaf in tree_leaves(result):
            if isinstance(leaf, cls):
                leaf.sources = sources
        return result


def _stand_in(tensor: torch.Tensor) -> torch.Tensor:
    # `ds_shape` is the full shape of a parameter of which this rank holds only a shard.
    shape = getattr(tensor, "ds_shape", tensor.shape)
    return torch.empty(tuple(shape), dtype=tensor.dtype, device="meta")


def _connected(
    names: Iterable[str], made_of: Iterable[frozenset[str]]
) -> tuple[tuple[str, ...], ...]:
    """`names` in groups, so that every set of `made_of` lies within one; all in the given order."""
    place = {name: index for index, name in enumerate(names)}
    group_of = {name: [name] for name in place}
    for sources in made_of:
        first, *others = sources
        merged = group_of[first]
        for name in others:
            if group_of[name] is not merged:
                merged += group_of[name]
                group_of |= dict.fromkeys(group_of[name], merged)
    groups = {id(group): sorted(group, key=place.__getitem__) for group in group_of.values()}
    return tuple(tuple(group) for group in groups.values())
