"""One update, bucket by bucket: what is new is carried to the servers, all of it is digested.

    in_buckets -> check and cast -> digest -> leave out what the servers have -> Carrier

How a bucket travels is the Carrier's business. The digest is always that of the bytes in host
memory, so that prepare verifies what arrived, whichever way it came.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from openrlhf_alp.clients.errors import WeightUpdateFailed
from services.rollout.wire.fingerprint import weights_digest
from services.rollout.wire.schemas import TensorSpec
from services.rollout.wire.tensors import DTYPES, digest_tensor

SERVED_DTYPES = {code: dtype for code, dtype in DTYPES.items() if not code.startswith("F8")}
"""What a learner can be served in: FP8 would need scales that it does not have."""
TIED_HEAD = "lm_head.weight"

BUCKET_BYTES = 256 * 2**20
"""What is on its way at a time: the full parameters that ZeRO-3 gathers at once, one file, or one
buffer on each GPU. Larger buckets need more memory; smaller ones more collectives and requests."""

Named = TypeVar("Named", bound=torch.Tensor)
NamedBuckets = Iterable[Sequence[tuple[str, torch.Tensor]]]
"""What the learner hands over: per bucket (name, tensor on any device)."""
Bucket = dict[str, torch.Tensor]
"""What a carrier takes: name -> contiguous tensor in the serving dtype."""


class Carrier(AbstractAsyncContextManager["Carrier"], Protocol):
    """A way for one update to reach the servers. Enter it before the first bucket and leave it
    after prepare; what it set up for the update is gone then, also after an error."""

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


def in_buckets(
    named: Iterable[tuple[str, Named]], bucket_bytes: int = BUCKET_BYTES
) -> Iterator[list[tuple[str, Named]]]:
    """Tensors in their order, as many at a time as fit `bucket_bytes`; a larger one alone."""
    for groups in packed_groups(([pair] for pair in named), bucket_bytes):
        yield [pair for group in groups for pair in group]


def packed_groups(
    groups: Iterable[Sequence[tuple[str, Named]]], bucket_bytes: int = BUCKET_BYTES
) -> Iterator[list[Sequence[tuple[str, Named]]]]:
    """Groups of named tensors in their order, as many at a time as fit `bucket_bytes`; a larger
    group alone. No group is cut.

    Deterministic in the names and full sizes. These are the same on every rank of a learner, so all
    ranks gather the same buckets.
    """
    bucket: list[Sequence[tuple[str, Named]]] = []
    held_bytes = 0
    for group in groups:
        # `ds_numel` is the full size of a parameter of which this rank holds only a shard.
        num_bytes = sum(getattr(t, "ds_numel", t.numel()) * t.element_size() for _, t in group)
        if bucket and held_bytes + num_bytes > bucket_bytes:
            yield bucket
            bucket, held_bytes = [], 0
        bucket.append(group)
        held_bytes += num_bytes
    if bucket:
        yield bucket


async def carry_weights(
    carrier: Carrier,
    buckets: NamedBuckets,
    expected: Mapping[str, TensorSpec],
    *,
    skip_unchanged: bool = False,
) -> CarriedWeights:
    """Carry what the servers lack, and digest everything.

    Args:
        carrier: entered.
        buckets: of `in_buckets`; taken one at a time and cast to the serving dtype, so a generator
            that gathers shards on demand works.
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
    for bucket in buckets:
        tensors = dict(_serving(bucket, expected, on_device=carrier.on_device))
        # Also of unchanged tensors: prepare verifies the merged result, not only what travels.
        found = {name: digest_tensor(tensor.cpu()) for name, tensor in tensors.items()}
        digests |= found
        fresh = {
            name: tensor
            for name, tensor in tensors.items()
            if not (skip_unchanged and found[name] == expected[name].digest)
        }
        num_unchanged += len(tensors) - len(fresh)
        if fresh:
            files.append(await carrier.carry(len(files), fresh))
            num_bytes += sum(tensor.nbytes for tensor in fresh.values())
        # The loop gathers the next bucket before it rebinds these names. Without this line a rank
        # would hold two buckets of full parameters at once.
        del bucket, tensors, fresh
    missing = sorted(expected.keys() - digests.keys())
    if missing:
        raise WeightUpdateFailed(
            f"{len(missing)} tensors that the server expects were not pushed, first {missing[0]}. "
            "Fix: push every parameter of the model."
        )
    return CarriedWeights(
        files=tuple(files),
        digest=weights_digest(digests),
        num_bytes=num_bytes,
        num_unchanged=num_unchanged,
    )


def _serving(
    bucket: Iterable[tuple[str, torch.Tensor]],
    expected: Mapping[str, TensorSpec],
    *,
    on_device: bool,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor checked against what the server has, and cast to the serving dtype."""
    for name, tensor in bucket:
        # The server lists a tied head under the name of the embedding only.
        if name == TIED_HEAD and name not in expected:
            continue
        misfit = _misfit(name, tensor, expected.get(name))
        if misfit is not None:
            raise WeightUpdateFailed(misfit)
        device = tensor.device if on_device else "cpu"
        yield name, tensor.detach().to(device, SERVED_DTYPES[expected[name].dtype]).contiguous()


def require_fit(tensors: Mapping[str, torch.Tensor], expected: Mapping[str, TensorSpec]) -> None:
    """Refuse a learner whose tensors are not those that the server serves, before the first push.

    Args:
        tensors: everything the learner would push; only shapes and dtypes are looked at.
        expected: as for `carry_weights`.

    Raises:
        WeightUpdateFailed: the number of tensors that do not fit, and the first of them by name
            with the cause and the fix.
    """
    misfits = [
        misfit
        for name, tensor in tensors.items()
        if not (name == TIED_HEAD and name not in expected)
        and (misfit := _misfit(name, tensor, expected.get(name))) is not None
    ]
    misfits += [
        f"The server serves a tensor {name} of dtype {expected[name].dtype}, which the learner's "
        "model does not have. Fix: serve and train the same model, unquantised."
        for name in sorted(expected.keys() - tensors.keys())
    ]
    if misfits:
        raise WeightUpdateFailed(
            f"{len(misfits)} tensors of learner and server do not fit. The first: {misfits[0]}"
        )


def _misfit(name: str, tensor: torch.Tensor, spec: TensorSpec | None) -> str | None:
    """Why the server cannot take `tensor` under `name`, and what to do; None: it can."""
    if spec is None:
        return (
            f"The server does not serve a tensor {name}. Fix: push Hugging Face names of the "
            "served model only; ALP's own parameters and LoRA adapters stay in the learner."
        )
    if list(tensor.shape) != spec.shape:
        return (
            f"{name} has shape {list(tensor.shape)}, the server expects {spec.shape}. Fix: "
            "serve and train the same model; under ZeRO-3 gather the parameter first."
        )
    dtype = SERVED_DTYPES.get(spec.dtype)
    # A cast from fractions to integers would not be a rounding but another model.
    if dtype is None or (tensor.is_floating_point() and not dtype.is_floating_point):
        return (
            f"{name} is served as {spec.dtype}, which cannot be made of the learner's "
            f"{tensor.dtype}. Fix: serve an unquantised folder (bfloat16, float16 or float32)."
        )
    return None
