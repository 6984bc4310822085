"""Counter-based Gaussian noise: a pure function of five integers and a column number.

ALP needs the same epsilon twice, in the forward pass and again in the backward pass
(d loss / d sigma = grad * epsilon). Drawing it from a stateful generator would tie it to the order
of the rows, so padding, packing, micro-batching or gradient checkpointing would change it. Here
each row (one token of one sample at one layer) owns a 64-bit key, and its noise is the SplitMix64
stream that starts at this key:

    key     = step(step(step(step(step(seed) + update) + sample) + position) + layer)
    word_j  = mix(key + j * GAMMA),  j = 1 .. H          step(x) = mix(x + GAMMA)
    epsilon = Box-Muller(32-bit halves of the words)

`mix` is SplitMix64's output function (Steele, Lea, Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014). All of it is integer arithmetic modulo 2**64, hence the same on every
device; only the last step (log, sqrt, sin, cos in float32) is up to the device's math library.

Letters: N rows (tokens), D columns (hidden size), H = ceil(D / 2) words of a row.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# SplitMix64's constants, written as the signed 64-bit integers PyTorch computes with.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLIER_2 = 0x94D049BB133111EB - 2**64

# The radius uses 31 bits: u = (k + 1/2) / 2**31 with k in [0, 2**31), so |epsilon| reaches 6.66.
_RADIUS_BITS = 0x7FFFFFFF
_RADIUS_SCALE = 2.0**-31
_ANGLE_SCALE = math.pi * 2.0**-31

# A chunk's words, scratch and floats fit the second-level caches of a few CPU cores, so that the
# dozen passes over them cost arithmetic and not memory traffic. A GPU wants few, large kernels.
_CHUNK_NUMBERS_CPU = 1 << 18
_CHUNK_NUMBERS_GPU = 1 << 25


def row_keys(
    *, seed: int, update: int, layer: int, sample_ids: Tensor, positions: Tensor
) -> Tensor:
    """One key per row from everything that names the row.

    Args:
        seed: the run's noise seed.
        update: number of the policy update; the noise of an update is drawn once.
        layer: index of the decoder layer.
        sample_ids: (N,) integers that name the sample inside the update.
        positions: (N,) integers, the token's position among the sample's real tokens.

    Returns:
        (N,) int64, uniform over 64 bits; different inputs collide with probability 2**-64.
    """
    return layer_keys(
        token_keys(seed=seed, update=update, sample_ids=sample_ids, positions=positions), layer
    )


def token_keys(*, seed: int, update: int, sample_ids: Tensor, positions: Tensor) -> Tensor:
    """The part of `row_keys` that all layers share. (N,), (N,) -> (N,) int64."""
    if sample_ids.shape != positions.shape or sample_ids.dim() != 1:
        raise ValueError(
            f"sample_ids {tuple(sample_ids.shape)} and positions {tuple(positions.shape)} must be "
            "vectors of one length: one entry per row of the hidden states"
        )
    keys = torch.full_like(sample_ids, _wrap(seed), dtype=torch.int64)
    for field in (_wrap(update), sample_ids, positions):
        keys = _step(keys) + field
    return _step(keys)


def layer_keys(token_keys: Tensor, layer: int) -> Tensor:
    """Keys of one layer from `token_keys`. (N,) int64 -> (N,) int64."""
    return _step(token_keys + layer)


def standard_normal(keys: Tensor, dim: int) -> Tensor:
    """Independent N(0, 1) numbers, row n a pure function of `keys[n]` alone.

    Args:
        keys: (N,) int64 from `row_keys`.
        dim: D, number of columns. Column d does not depend on N, but does on D.

    Returns:
        (N, D) float32 on the device of `keys`.
    """
    noise = torch.empty(keys.numel(), dim, device=keys.device)
    for start, stop, chunk in normal_chunks(keys, dim):
        noise[start:stop] = chunk
    return noise


def normal_chunks(keys: Tensor, dim: int) -> Iterator[tuple[int, int, Tensor]]:
    """Yield `(start, stop, noise)` over row ranges small enough to stay in cache.

    `noise` (stop - start, D) float32 is a buffer that the next chunk overwrites; a consumer that
    adds it and forgets it never holds noise for all rows at once.
    """
    num_rows, half = keys.numel(), (dim + 1) // 2
    budget = _CHUNK_NUMBERS_CPU if keys.device.type == "cpu" else _CHUNK_NUMBERS_GPU
    chunk_rows = max(1, min(num_rows, budget // max(1, 2 * half)))
    steps = torch.arange(1, half + 1, device=keys.device).mul_(_GAMMA)
    words = torch.empty(chunk_rows, half, dtype=torch.int64, device=keys.device)
    scratch = torch.empty_like(words)
    noise = torch.empty(chunk_rows, 2 * half, device=keys.device)
    for start in range(0, num_rows, chunk_rows):
        stop = min(start + chunk_rows, num_rows)
        rows = stop - start
        torch.add(keys[start:stop, None], steps, out=words[:rows])
        _mix_(words[:rows], scratch[:rows])
        _box_muller(words[:rows], scratch[:rows], noise[:rows])
        yield start, stop, noise[:rows, :dim]


def _box_muller(words: Tensor, scratch: Tensor, out: Tensor) -> None:
    """Turn H random words per row into 2 H normals: sqrt(-2 log u) * (cos, sin)(angle).

    Args:
        words: (N, H) int64, uniform; overwritten.
        scratch: (N, H) int64, overwritten.
        out: (N, 2 H) float32, written.
    """
    num_rows, half = words.shape
    integers = words.view(torch.int32)  # (N, 2 H): 32 bits for each normal
    radius, angle = scratch.view(torch.float32).view(2, num_rows, half)
    radius.copy_(integers[:, :half].bitwise_and_(_RADIUS_BITS))
    angle.copy_(integers[:, half:]).mul_(_ANGLE_SCALE)
    radius.add_(0.5).mul_(_RADIUS_SCALE).log_().mul_(-2.0).sqrt_()
    cosine, sine = words.view(torch.float32).view(2, num_rows, half)
    torch.mul(torch.cos(angle, out=cosine), radius, out=out[:, :half])
    torch.mul(torch.sin(angle, out=sine), radius, out=out[:, half:])


def _step(state: Tensor) -> Tensor:
    """One SplitMix64 step on a copy: (N,) int64 -> (N,) int64."""
    state = state + _GAMMA
    return _mix_(state, torch.empty_like(state))


def _mix_(state: Tensor, scratch: Tensor) -> Tensor:
    """SplitMix64's output function, in place: a bijection of 64 bits with full avalanche."""
    _xor_shift_(state, 30, scratch).mul_(_MULTIPLIER_1)
    _xor_shift_(state, 27, scratch).mul_(_MULTIPLIER_2)
    return _xor_shift_(state, 31, scratch)


def _xor_shift_(state: Tensor, shift: int, scratch: Tensor) -> Tensor:
    """state ^= state >> shift. The mask makes PyTorch's arithmetic int64 shift a logical one."""
    torch.bitwise_right_shift(state, shift, out=scratch)
    return state.bitwise_xor_(scratch.bitwise_and_((1 << (64 - shift)) - 1))


def _wrap(value: int) -> int:
    """Any Python integer as the signed 64-bit integer with the same low bits."""
    return (value + 2**63) % 2**64 - 2**63
