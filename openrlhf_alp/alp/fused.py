"""Adding noise and reducing sigma's gradient, each as one compiled pass over the hidden states.

    add_noise        hidden + sigma * epsilon(keys)                 one kernel
    sigma_gradient   sum over rows of grad * epsilon(keys)          one kernel and its reduction

torch.compile fuses the noise (noise.py) into what uses it: read a number, write a number, and
nothing in between touches memory. Uncompiled, the same expressions make some 30 passes. They are
the reference, and what runs where no compiler is found, for models too narrow to gain, and for a
single row (torch.compile would make a second program for that size).

Letters: N rows (tokens), D columns (hidden size).
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import torch
from torch import Tensor
from torch._inductor.runtime.cache_dir_utils import cache_dir

from openrlhf_alp.alp.noise import columns, epsilon

logger = logging.getLogger(__name__)

# Below this width a layer's noise takes microseconds, and compiling it some seconds. The limit is
# on D alone, which a run does not change: all of its rows are drawn by the same program.
MIN_WIDTH = 512

# Rows of one uncompiled pass: its temporaries (8 bytes a number) then fit a CPU's caches.
_CHUNK_NUMBERS = 1 << 18

# How long a process waits for another that compiles the same program, in seconds.
_LOCK_TIMEOUT_S = 300.0


def add_noise(hidden: Tensor, sigma: Tensor, keys: Tensor, valid: Tensor | None) -> Tensor:
    """hidden + sigma * epsilon, summed in at least float32 and rounded once.

    Args:
        hidden: (N, D) floating point.
        sigma: (D,) or (1,).
        keys: (N,) int64 from `noise.row_keys`.
        valid: (N,) bool, rows that get noise; None for all of them.

    Returns:
        (N, D) in the dtype of `hidden`; rows that are not valid keep their bits.
    """
    constants = columns(hidden.shape[1], hidden.device)
    if _is_worth_compiling(hidden):
        noisy = _program(_add_noise)(hidden, sigma, keys, valid, *constants)
        if noisy is not None:
            return noisy
    noisy = torch.empty_like(hidden)
    for rows in _row_chunks(hidden):
        part = None if valid is None else valid[rows]
        noisy[rows] = _add_noise(hidden[rows], sigma, keys[rows], part, *constants)
    return noisy


def sigma_gradient(
    grad: Tensor, keys: Tensor, valid: Tensor | None, *, per_dimension: bool
) -> Tensor:
    """d loss / d sigma = sum over rows of grad * epsilon, in at least float32.

    Args:
        grad: (N, D), d loss / d (noisy hidden states).
        keys, valid: as in `add_noise`.
        per_dimension: sigma has one entry per column, not one for all.

    Returns:
        (D,), or (1,).
    """
    constants = columns(grad.shape[1], grad.device)
    reduce = _sum_columns if per_dimension else _sum_all
    if _is_worth_compiling(grad):
        total = _program(reduce)(grad, keys, valid, *constants)
        if total is not None:
            return total
    parts = [
        reduce(grad[rows], keys[rows], None if valid is None else valid[rows], *constants)
        for rows in _row_chunks(grad)
    ]
    return torch.stack(parts).sum(dim=0)


def _add_noise(
    hidden: Tensor,
    sigma: Tensor,
    keys: Tensor,
    valid: Tensor | None,
    steps: Tensor,
    offset: Tensor,
) -> Tensor:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    noise = epsilon(keys, steps, offset).to(wide)
    # bfloat16 has 8 bits: a small sigma added in it would vanish in the rounding of both the
    # product and the sum.
    noisy = torch.addcmul(hidden.to(wide), noise, sigma.to(wide)).to(hidden.dtype)
    return noisy if valid is None else torch.where(valid[:, None], noisy, hidden)


def _product(
    grad: Tensor, keys: Tensor, valid: Tensor | None, steps: Tensor, offset: Tensor
) -> Tensor:
    wide = torch.promote_types(grad.dtype, torch.float32)
    product = grad.to(wide) * epsilon(keys, steps, offset)
    return product if valid is None else torch.where(valid[:, None], product, 0.0)


def _sum_columns(*arguments: Any) -> Tensor:
    return _product(*arguments).sum(dim=0)


def _sum_all(*arguments: Any) -> Tensor:
    return _product(*arguments).sum().reshape(1)


def _is_worth_compiling(rows: Tensor) -> bool:
    return rows.shape[0] > 1 and rows.shape[1] >= MIN_WIDTH


def _row_chunks(rows: Tensor) -> Iterator[slice]:
    num_rows, width = rows.shape
    size = max(1, _CHUNK_NUMBERS // width)
    for start in range(0, num_rows, size):
        yield slice(start, start + size)


class _Program:
    """One function, compiled at its first call and shared by every later one."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._compiled = torch.compile(function, dynamic=True, fullgraph=True)
        self._known: set[tuple[Any, ...]] = set()
        self._failed = False

    def __call__(self, *arguments: Tensor | None) -> Tensor | None:
        """The result; None where the function cannot be compiled, after one warning."""
        if self._failed:
            return None
        # Sizes are free: dtypes, padding and a sigma of one entry make a program of their own.
        kind = tuple(
            a if a is None else (a.dtype, a.device.type, a.numel() == 1) for a in arguments
        )
        if kind in self._known:
            return self._compiled(*arguments)
        try:
            # Ranks of one machine start together. The first one compiles, and the others find its
            # program in inductor's cache on disk, which also outlives the run.
            with _compile_lock():
                result = self._compiled(*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._failed = True
            logger.warning(
                "torch.compile failed (%s: %s). The noise is drawn uncompiled, which costs more "
                "time and gives the same numbers. Fix: install a C++ compiler (on a GPU machine "
                "also Triton).",
                type(error).__name__,
                str(error).strip().splitlines()[0] if str(error).strip() else "no message",
            )
            return None
        self._known.add(kind)
        return result


_program = functools.cache(_Program)


@contextlib.contextmanager
def _compile_lock() -> Iterator[None]:
    """Held by one process of this user at a time; not worth more than a wait."""
    path = Path(cache_dir()) / "openrlhf_alp.lock"
    lock = filelock.FileLock(path, timeout=_LOCK_TIMEOUT_S)
    with contextlib.suppress(filelock.Timeout, OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
