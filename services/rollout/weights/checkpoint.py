"""Safetensors files on disk: what is in them, the digests of their tensors, and their tensors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from services.rollout.wire.schemas import DtypeCode
from services.rollout.wire.tensors import DTYPE_CODES, digest_tensor


class BadCheckpointError(ValueError):
    """A checkpoint cannot be read or does not fit; the message says which file or tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFile:
    """Where one tensor is stored and what it is."""

    path: Path
    shape: tuple[int, ...]
    dtype: DtypeCode
    digest: str  # 64 hex digits over dtype, shape and bytes


def read_tensors(
    path: Path, names: Sequence[str] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of a file; the tensors are memory-mapped. `names`: only these.

    Raises:
        BadCheckpointError: the file is missing, cut short, not safetensors, or lacks a name.
    """
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys() if names is None else names:
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise BadCheckpointError(f"{path.name} is not a whole safetensors file: {error}") from error


def scan(paths: Sequence[Path]) -> dict[str, TensorFile]:
    """Read every tensor of `paths` once and return name -> TensorFile with its digest.

    Raises:
        BadCheckpointError: a file is unreadable, or two files hold the same name.
    """
    found: dict[str, TensorFile] = {}
    for path in paths:
        for name, tensor in read_tensors(path):
            if name in found:
                raise BadCheckpointError(
                    f"tensor {name} is in both {found[name].path.name} and {path.name}"
                )
            found[name] = TensorFile(
                path=path,
                shape=tuple(tensor.shape),
                dtype=DTYPE_CODES[tensor.dtype],
                digest=digest_tensor(tensor),
            )
    return found


def model_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in name order.

    Raises:
        BadCheckpointError: there are none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BadCheckpointError(f"{folder} holds no .safetensors file")
    return files
