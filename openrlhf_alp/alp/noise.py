"""Counter-based Gaussian noise: a pure function of five integers and a column number.

ALP needs the same epsilon twice, in the forward pass and again in the backward pass
(d loss / d sigma = grad * epsilon). Drawing it from a stateful generator would tie it to the order
of the rows, so padding, packing, micro-batching or gradient checkpointing would change it. Here
each row (one token of one sample at one layer) owns a 64-bit key, and its noise is the SplitMix64
stream that starts at this key:

    key     = step(step(step(step(step(seed) + update) + sample) + position) + layer)
    word_j  = mix(key + j * GAMMA),  j = 1 .. H          step(x) = mix(x + GAMMA)
    radius_j, angle_j = low and high 32 bits of word_j
    epsilon = radius * cos(angle) in the first H columns, radius * sin(angle) in the others

`mix` is SplitMix64's output function (Steele, Lea, Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014); the last line is Box-Muller. All but that line is integer arithmetic
modulo 2**64, hence the same on every device.

`epsilon` states all of this as one elementwise expression of key and column. `fused.py` compiles
it together with what uses it, so that noise never travels through memory.

Draw d > 0 of several (`--alp.draws`) puts `step(key - d)` between position and layer.

Letters: N rows (tokens), D columns (hidden size), H = ceil(D / 2) words of a row.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

# SplitMix64's constants, written as the signed 64-bit integers PyTorch computes with.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLIER_2 = 0x94D049BB133111EB - 2**64

# The radius uses 31 bits: u = (k + 1/2) / 2**31 with k in [0, 2**31), so |epsilon| reaches 6.66.
_RADIUS_BITS = 0x7FFFFFFF
_SCALE = 2.0**-31

# sin(pi t) / t as a polynomial in t**2 on |t| <= 1/2, fitted at Chebyshev nodes: it errs by 7e-9,
# below float32's rounding. The angle is an integer, so its range reduction is exact; a library's
# cosine, which must reduce any float, takes three times as long.
_SINE = (3.1415926401, -5.1677100835, 2.5500775232, -0.5982912856, 0.0776576603)


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


def draw_keys(token_keys: Tensor, draw: int) -> Tensor:
    """Token keys of another draw of the same noise. (N,) int64 -> (N,) int64; draw 0 is itself."""
    # Subtracted, since layers are added: no draw shares a key with a layer.
    return token_keys if draw == 0 else _step(token_keys - draw)


def layer_keys(token_keys: Tensor, layer: int | Tensor) -> Tensor:
    """Keys of one layer from `token_keys`. (N,) int64 -> (N,) int64; layers (L, 1) give (L, N)."""
    return _step(token_keys + layer)


class Columns(NamedTuple):
    """What the noise of a column depends on besides the row's key."""

    steps: Tensor
    """(D,) int64: j * GAMMA of the column's word."""
    offset: Tensor
    """(D,) float32, in half turns: 0 where the cosine is taken, 1/2 where the sine is."""


@functools.lru_cache(maxsize=8)
def columns(dim: int, device: torch.device) -> Columns:
    """The constants of D columns; kept, because every layer of every forward asks for them."""
    half = (dim + 1) // 2
    column = torch.arange(dim, device=device)
    is_sine = column >= half
    return Columns(
        steps=(torch.where(is_sine, column - half, column) + 1) * _GAMMA,
        offset=torch.where(is_sine, 0.5, 0.0),
    )


def epsilon(keys: Tensor, steps: Tensor, offset: Tensor) -> Tensor:
    """Independent N(0, 1) numbers, row n a pure function of `keys[n]` alone.

    Args:
        keys: (N,) int64 from `row_keys`.
        steps, offset: (D,) each, from `columns`.

    Returns:
        (N, D) float32 on the device of `keys`.
    """
    words = _mix(keys[:, None] + steps)
    uniform = ((words & _RADIUS_BITS).float() + 0.5) * _SCALE
    radius = (-2.0 * uniform.log()).sqrt()
    # cos(pi x) = sin(pi t) with t = |1 - |x|| - 1/2, for x in [-3/2, 3/2] half turns.
    half_turns = (words >> 32).float() * _SCALE - offset
    t = (1.0 - half_turns.abs()).abs() - 0.5
    return radius * (_polynomial(_SINE, t * t) * t)


def standard_normal(keys: Tensor, dim: int) -> Tensor:
    """`epsilon` for D columns, uncompiled. (N,) int64 -> (N, D) float32."""
    return epsilon(keys, *columns(dim, keys.device))


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """Horner's rule; the constant term stands first."""
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value


def _step(state: Tensor) -> Tensor:
    """One SplitMix64 step on a copy."""
    return _mix(state + _GAMMA)


def _mix(state: Tensor) -> Tensor:
    """SplitMix64's output function: a bijection of 64 bits with full avalanche."""
    state = _xor_shift(state, 30) * _MULTIPLIER_1
    state = _xor_shift(state, 27) * _MULTIPLIER_2
    return _xor_shift(state, 31)


def _xor_shift(state: Tensor, shift: int) -> Tensor:
    """state ^ (state >> shift). The mask makes PyTorch's arithmetic int64 shift a logical one."""
    return state ^ ((state >> shift) & ((1 << (64 - shift)) - 1))


def _wrap(value: int) -> int:
    """Any Python integer as the signed 64-bit integer with the same low bits."""
    return (value + 2**63) % 2**64 - 2**63
