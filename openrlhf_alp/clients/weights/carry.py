"""One update, bucket by bucket: what is new is carried to the servers, all of it is digested.

    checked -> buckets -> digest -> leave out what the servers have -> Carrier

How a bucket travels is the Carrier's business; the digest is always that of the bytes in host
memory, so that prepare proves what arrived, whichever way it came.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

import torch

from openrlhf_alp.clients.errors import WeightUpdateFailed
from services.rollout.wire.fingerprint import tensor_digest, weights_digest
from services.rollout.wire.schemas import DtypeCode, TensorSpec

DTYPES: dict[DtypeCode, torch.dtype] = {
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
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
TIED_HEAD = "lm_head.weight"

NamedTensors = Iterable[tuple[str, torch.Tensor]]
Bucket = dict[str, torch.Tensor]
"""Name -> contiguous tensor in the serving dtype."""


class Carrier(AbstractAsyncContextManager["Carrier"], Protocol):
    """A way for one update to reach the servers. Enter it before the first bucket, leave it after
    prepare; what it set up for the update is gone then, also after an error."""

    bucket_bytes: int
    """A bucket is closed when it holds this much; a larger tensor travels alone."""

    on_device: bool
    """Buckets hold tensors where the learner has them; False: in host memory."""

    async def carry(self, index: int, bucket: Bucket) -> str:
        """Bring bucket number `index` to where every server can read it.

        Returns:
            The name by which prepare knows it.

        Raises:
            WeightUpdateFailed: a server did not take it, or it could not be written.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class CarriedWeights:
    """An update that is ready for prepare."""

    files: tuple[str, ...]  # as prepare knows them
    digest: str  # of the merged result: carried plus unchanged tensors
    num_bytes: int  # carried
    num_unchanged: int  # tensors left out because the servers have the same bytes


async def carry_weights(
    carrier: Carrier,
    named_tensors: NamedTensors,
    expected: Mapping[str, TensorSpec],
    *,
    skip_unchanged: bool = False,
) -> CarriedWeights:
    """Carry what the servers lack, and digest everything.

    Args:
        carrier: entered.
        named_tensors: (name, tensor) on any device; taken one at a time and cast to the serving
            dtype, so a generator that gathers shards on demand works.
        expected: `tensors` of GET /v1/weights. A tied `lm_head.weight` that the server does not
            list is left out.
        skip_unchanged: leave out tensors whose bytes the server already has; then prepare needs
            base_version.

    Raises:
        WeightUpdateFailed: names or shapes do not fit, or the carrier failed.
    """
    digests: dict[str, str] = {}
    files: list[str] = []
    num_bytes = num_unchanged = 0
    tensors = _checked(named_tensors, expected, on_device=carrier.on_device)
    for bucket in _buckets(tensors, carrier.bucket_bytes):
        found = {name: digest_tensor(tensor.cpu()) for name, tensor in bucket.items()}
        digests |= found
        fresh = {
            name: tensor
            for name, tensor in bucket.items()
            if not (skip_unchanged and found[name] == expected[name].digest)
        }
        num_unchanged += len(bucket) - len(fresh)
        if fresh:
            files.append(await carrier.carry(len(files), fresh))
            num_bytes += sum(tensor.nbytes for tensor in fresh.values())
    _require_all(digests.keys(), expected)
    return CarriedWeights(
        files=tuple(files),
        digest=weights_digest(digests),
        num_bytes=num_bytes,
        num_unchanged=num_unchanged,
    )


def digest_tensor(tensor: torch.Tensor) -> str:
    """The digest both sides compute: over dtype, shape and bytes of a contiguous CPU tensor."""
    data = tensor.reshape(-1).view(torch.uint8).numpy().data
    return tensor_digest(DTYPE_CODES[tensor.dtype], tensor.shape, data)


def _checked(
    named_tensors: NamedTensors, expected: Mapping[str, TensorSpec], *, on_device: bool
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
        device = tensor.device if on_device else "cpu"
        yield name, tensor.detach().to(device, DTYPES[spec.dtype]).contiguous()


def _buckets(tensors: Iterator[tuple[str, torch.Tensor]], bucket_bytes: int) -> Iterator[Bucket]:
    bucket: Bucket = {}
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
