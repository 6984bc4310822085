"""Shims that let OpenRLHF 0.11.2 import and run where flash-attn or CUDA is missing.

Each shim is installed only when what it stands for is absent, so on a GPU machine with the full
requirements `install()` does nothing. It is idempotent, and it runs before OpenRLHF or DeepSpeed is
imported: through the import hook that `openrlhf_alp/learner/__init__.py` sets, here and in every
worker of Ray. The module imports no torch, so that flags and limits can be shown without waiting
for it.

    shim                                      why                                     upstream
    flash_attn.bert_padding, .utils           imported by openrlhf.models             PR #1302
    torch.cuda.current_device and two more    used as "the device" everywhere         PR #1301
    deepspeed_shm_comm switched off           compiled for a minute on first use      DeepSpeed
    convert_to_torch_dtype takes fp32         bf16 is slow on many CPUs               OpenRLHF
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


_USERS = {"openrlhf", "deepspeed"}
"""Packages that need the shims when they are imported."""


class _InstallFirst(importlib.abc.MetaPathFinder):
    """Finds no module; calls `install()` when one of _USERS is about to be imported."""

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        if name in _USERS:
            sys.meta_path.remove(self)
            install()


def install_before_use() -> None:
    """Let the first import of one of _USERS call `install()`. Idempotent."""
    if _USERS & sys.modules.keys():  # OpenRLHF itself may import `agent.py`
        install()
    elif not any(isinstance(finder, _InstallFirst) for finder in sys.meta_path):
        sys.meta_path.insert(0, _InstallFirst())


def install() -> None:
    """Install every shim this machine needs. Safe to call any number of times."""
    import torch

    if importlib.util.find_spec("flash_attn") is None:
        _install_flash_attn()
    if not torch.cuda.is_available():
        _install_cpu_device()


def disable_shm_collectives() -> None:
    """Keep DeepSpeed on gloo instead of compiling its shared-memory collectives on first use."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def allow_float32() -> None:
    """Teach OpenRLHF's loader of models `--ds.param_dtype fp32`. Idempotent.

    DeepSpeed trains in float32 by itself when neither bf16 nor fp16 is asked for.
    """
    import openrlhf.utils.utils as upstream
    import torch

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

    def convert_to_torch_dtype(param_dtype: str) -> torch.dtype:
        return dtypes[param_dtype]

    # For good: every model of this process is loaded through it, the reference's too.
    upstream.convert_to_torch_dtype = convert_to_torch_dtype


def undecorated(actor_class: Any) -> type:
    """The plain class under a `@ray.remote` one, which Ray does not allow to be subclassed.

    Raises:
        RuntimeError: Ray keeps it elsewhere than in 2.55; the message names the pin.
    """
    try:
        return actor_class.__ray_metadata__.modified_class.__ray_actor_class__
    except AttributeError as error:
        raise RuntimeError(
            f"cannot find the class under {actor_class!r}; Ray moved it. Install ray==2.55.0."
        ) from error


class _CpuDevice(str):
    """The answer of `torch.cuda.current_device()` on a CPU machine.

    OpenRLHF passes that answer to `.to(...)` and `device=...`, where "cpu" is right, and also
    formats it as `f"cuda:{device}"`-like labels, where an index is expected.
    """

    __slots__ = ()

    def __format__(self, spec: str) -> str:
        return "0"


def _install_cpu_device() -> None:
    import torch

    # DeepSpeed picks its accelerator by what is installed; a CUDA-less machine must say CPU.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    device = _CpuDevice("cpu")
    torch.cuda.current_device = lambda: device
    torch.cuda.set_device = lambda _index: None
    torch.cuda.synchronize = lambda _device=None: None


def _install_flash_attn() -> None:
    from einops import rearrange

    _register("flash_attn")
    _register(
        "flash_attn.bert_padding",
        index_first_axis=_index_first_axis,
        pad_input=_pad_input,
        unpad_input=_unpad_input,
        rearrange=rearrange,
    )
    _register("flash_attn.utils")
    _register("flash_attn.utils.distributed", all_gather=_all_gather)


def _register(name: str, **functions: Callable) -> None:
    module = types.ModuleType(name)
    # transformers looks for `__spec__` (and then for the installed distribution, which is absent).
    module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None)
    vars(module).update(functions)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


def _index_first_axis(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Rows `indices` (N,) of x (R, ...)."""
    return x[indices]


def _unpad_input(
    hidden_states: torch.Tensor, attention_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """Drop the padding of x (B, T, ...): valid rows (N, ...), their flat indices, cumulative
    lengths.
    """
    import torch

    lengths = attention_mask.sum(dim=-1, dtype=torch.int32)  # (B,)
    indices = attention_mask.flatten().nonzero().flatten()  # (N,)
    boundaries = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))  # (B + 1,)
    rows = hidden_states.flatten(0, 1)[indices]
    return rows, indices, boundaries, int(lengths.max()), lengths


def _pad_input(
    hidden_states: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int
) -> torch.Tensor:
    """Put rows x (N, ...) back to (B, T, ...) with zeros at the padding; differentiable in x."""
    padded = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return padded.index_copy(0, indices, hidden_states).unflatten(0, (batch, seqlen))


def _all_gather(*_args: object, **_kwargs: object) -> torch.Tensor:
    raise NotImplementedError(
        "ring attention needs the flash-attn package, which is not installed. "
        "Install flash-attn 2.8.3 on a GPU machine, or set --ds.ring_attn_size 1."
    )
