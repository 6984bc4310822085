"""Writing weights for the rollout service, and the digest that proves what was written."""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from openrlhf_alp.clients.errors import WeightUpdateFailed
from services.rollout.fingerprint import tensor_digest, weights_digest
from services.rollout.schemas import TensorSpec

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "I8": torch.int8,
    "BOOL": torch.bool,
}
TIED_HEAD = "lm_head.weight"
DEFAULT_BUCKET_BYTES = 512 * 2**20

NamedTensors = Iterable[tuple[str, torch.Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenWeights:
    """Files of one update, ready for prepare."""

    folder: Path
    files: tuple[str, ...]  # relative to the service's weights_dir
    digest: str  # of the merged result: written plus unchanged tensors
    num_bytes: int  # written
    num_unchanged: int  # tensors left out because the server has the same bytes

    def remove(self) -> None:
        """Remove the folder; a server that has staged it keeps its own link."""
        shutil.rmtree(self.folder, ignore_errors=True)


def write_weights(
    weights_dir: Path,
    name: str,
    named_tensors: NamedTensors,
    expected: Mapping[str, TensorSpec],
    *,
    skip_unchanged: bool = False,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
) -> WrittenWeights:
    """Write an update below `weights_dir/name`, whole or not at all.

    Args:
        weights_dir: the contract's weights_dir, shared with the server.
        name: folder of this update, new for each.
        named_tensors: (name, tensor) on any device; taken one at a time and cast to the serving
            dtype, so a generator that gathers shards on demand works.
        expected: `tensors` of GET /v1/weights. A tied `lm_head.weight` that the server does not
            list is left out.
        skip_unchanged: leave out tensors whose bytes the server already has; then prepare needs
            base_version.
        bucket_bytes: a file is closed when it holds this much.

    Raises:
        WeightUpdateFailed: names or shapes do not fit, or the folder cannot be written.
    """
    partial = weights_dir / f".{name}.partial"
    folder = weights_dir / name
    try:
        partial.mkdir(parents=True)
        digests: dict[str, str] = {}
        files: list[str] = []
        num_bytes = num_skipped = 0
        for bucket in _buckets(_checked(named_tensors, expected), bucket_bytes):
            fresh = {}
            for tensor_name, tensor in bucket.items():
                digests[tensor_name] = digest_tensor(tensor)
                if skip_unchanged and digests[tensor_name] == expected[tensor_name].digest:
                    num_skipped += 1
                else:
                    fresh[tensor_name] = tensor
            if fresh:
                file = f"{len(files):05d}.safetensors"
                save_file(fresh, partial / file)
                files.append(f"{name}/{file}")
                num_bytes += sum(tensor.nbytes for tensor in fresh.values())
        _require_all(digests.keys(), expected)
        os.rename(partial, folder)
    except OSError as error:
        raise WeightUpdateFailed(
            f"The update cannot be written to {weights_dir}: {error.strerror or error}. Fix: free "
            "space there, or start the service with a --weights-dir that both sides can write."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return WrittenWeights(
        folder=folder,
        files=tuple(files),
        digest=weights_digest(digests),
        num_bytes=num_bytes,
        num_unchanged=num_skipped,
    )


def digest_tensor(tensor: torch.Tensor) -> str:
    """The digest both sides compute: over dtype, shape and bytes of a contiguous CPU tensor."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    data = tensor.reshape(-1).view(torch.uint8).numpy().data
    return tensor_digest(codes[tensor.dtype], tensor.shape, data)


def _checked(
    named_tensors: NamedTensors, expected: Mapping[str, TensorSpec]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in named_tensors:
        spec = expected.get(name)
        if spec is None:
            if name == TIED_HEAD:
                continue
            raise WeightUpdateFailed(
                f"The server does not serve a tensor {name}. Fix: push Hugging Face names of the "
                "served model only; ALP's own parameters and LoRA adapters stay in the learner."
            )
        if list(tensor.shape) != spec.shape:
            raise WeightUpdateFailed(
                f"{name} has shape {list(tensor.shape)}, the server expects {spec.shape}. Fix: "
                "serve and train the same model; under ZeRO-3 gather the parameter first."
            )
        yield name, tensor.detach().to("cpu", DTYPES[spec.dtype]).contiguous()


def _buckets(
    tensors: Iterator[tuple[str, torch.Tensor]], bucket_bytes: int
) -> Iterator[dict[str, torch.Tensor]]:
    bucket: dict[str, torch.Tensor] = {}
    held_bytes = 0
    for name, tensor in tensors:
        if bucket and held_bytes + tensor.nbytes > bucket_bytes:
            yield bucket
            bucket, held_bytes = {}, 0
        bucket[name] = tensor
        held_bytes += tensor.nbytes
    if bucket:
        yield bucket


def _require_all(names: Iterable[str], expected: Mapping[str, TensorSpec]) -> None:
    missing = sorted(expected.keys() - set(names))
    if missing:
        raise WeightUpdateFailed(
            f"{len(missing)} tensors that the server expects were not pushed, first {missing[0]}. "
            "Fix: push every parameter of the model."
        )
