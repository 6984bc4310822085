"""The noise is a pure function of its row, follows SplitMix64, and is standard normal."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from openrlhf_alp.alp.noise import layer_keys, row_keys, standard_normal, token_keys

MASK64 = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15


def keys_of(*, seed=1, update=2, layer=3, samples=(4,), positions=(5,)):
    return row_keys(
        seed=seed,
        update=update,
        layer=layer,
        sample_ids=torch.tensor(samples),
        positions=torch.tensor(positions),
    )


def grid_keys(num_samples, num_positions, **fields):
    samples = torch.arange(num_samples).repeat_interleave(num_positions)
    positions = torch.arange(num_positions).repeat(num_samples)
    return row_keys(
        **{"seed": 0, "update": 0, "layer": 0, **fields}, sample_ids=samples, positions=positions
    )


def reference_mix(state):
    """SplitMix64's output function in Python integers."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & MASK64
    return state ^ (state >> 31)


def reference_row(key, dim):
    """Box-Muller in float64 from Python integers: a word's halves give one radius, one angle."""
    half = (dim + 1) // 2
    words = [reference_mix((key + j * GAMMA) & MASK64) for j in range(1, half + 1)]
    radius = [math.sqrt(-2 * math.log(((w & 0x7FFFFFFF) + 0.5) / 2**31)) for w in words]
    high = [word >> 32 for word in words]
    signed = [i - 2**32 if i >= 2**31 else i for i in high]
    angle = [i * math.pi / 2**31 for i in signed]
    cosines = [r * math.cos(a) for r, a in zip(radius, angle, strict=True)]
    sines = [r * math.sin(a) for r, a in zip(radius, angle, strict=True)]
    return (cosines + sines)[:dim]


def test_keys_follow_the_published_splitmix64_sequence():
    """First outputs of SplitMix64 for the state 1234567, as published with many ports."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    states = [(1234567 + i * GAMMA + 2**63) % 2**64 - 2**63 for i in range(3)]
    keys = layer_keys(torch.tensor(states), layer=0)
    assert [int(key) & MASK64 for key in keys] == published


def test_row_keys_chain_the_five_fields_as_documented():
    state = 11
    for field in (22, 33, 44, 55):
        state = (reference_mix((state + GAMMA) & MASK64) + field) & MASK64
    expected = reference_mix((state + GAMMA) & MASK64)
    key = keys_of(seed=11, update=22, samples=(33,), positions=(44,), layer=55)
    assert int(key) & MASK64 == expected


@pytest.mark.parametrize("dim", [1, 2, 7, 32])
def test_noise_equals_an_independent_box_muller_in_python(dim):
    keys = keys_of(samples=(0, 1, 2), positions=(9, 9, 9))
    expected = [reference_row(int(key) & MASK64, dim) for key in keys]
    torch.testing.assert_close(
        standard_normal(keys, dim), torch.tensor(expected), rtol=1e-5, atol=1e-5
    )


@settings(max_examples=60)
@given(data=st.data(), dim=st.integers(1, 130), rows=st.integers(1, 80))
def test_a_row_does_not_depend_on_its_neighbours(data, dim, rows):
    keys = grid_keys(rows, 1)
    whole = standard_normal(keys, dim)
    picked = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=rows)))
    assert torch.equal(standard_normal(keys[picked], dim), whole[picked])


def test_a_row_does_not_depend_on_chunk_borders():
    """1,200 rows of 576 columns span several chunks; every row alone gives the same bits."""
    keys = grid_keys(12, 100)
    whole = standard_normal(keys, 576)
    for start, stop in ((0, 1), (454, 457), (500, 1200)):
        assert torch.equal(standard_normal(keys[start:stop], 576), whole[start:stop])


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_does_not_depend_on_the_number_of_threads(threads):
    keys = grid_keys(4, 300)
    expected = standard_normal(keys, 576)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(standard_normal(keys, 576), expected)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("field", ["seed", "update", "layer", "samples", "positions"])
def test_each_field_changes_the_noise(field):
    base = {"seed": 1, "update": 1, "layer": 1, "samples": (1,), "positions": (1,)}
    other = {**base, field: (2,) if field in ("samples", "positions") else 2}
    noise = [standard_normal(keys_of(**fields), 4096)[0] for fields in (base, other)]
    correlation = (noise[0] * noise[1]).mean().item()
    assert abs(correlation) < 5 / math.sqrt(4096)


def test_fields_are_not_interchangeable():
    """(rank r, layer l) and (r + 1, l - 1) must not meet, nor any permutation of the fields."""
    fields = [(s, u, y, i, p) for s in (0, 1) for u in (0, 1) for y in (0, 1) for i in (0, 1)
              for p in (0, 1)]  # fmt: skip
    keys = {
        int(keys_of(seed=s, update=u, layer=y, samples=(i,), positions=(p,)))
        for s, u, y, i, p in fields
    }
    assert len(keys) == 32


def test_negative_and_huge_seeds_are_accepted():
    keys = {int(keys_of(seed=seed)) for seed in (-1, 0, 2**63, 2**64 + 5, 5)}
    assert len(keys) == 4  # 2**64 + 5 and 5 are the same 64 bits


def test_every_bit_of_a_key_reacts_to_every_field():
    """Avalanche: changing the position by one flips each of the 64 key bits half of the time."""
    keys = grid_keys(200, 100).reshape(200, 100).numpy().astype(np.uint64)
    flipped = np.unpackbits((keys[:, 1:] ^ keys[:, :-1]).reshape(-1, 1).view(np.uint8), axis=1)
    share = flipped.mean(axis=0)
    assert np.abs(share - 0.5).max() < 5 * 0.5 / math.sqrt(len(flipped))


def test_misshapen_fields_are_refused():
    with pytest.raises(ValueError, match="one entry per row"):
        token_keys(seed=0, update=0, sample_ids=torch.arange(3), positions=torch.arange(4))


@pytest.fixture(scope="module")
def big_sample():
    """8.4 million numbers: 16 samples x 910 positions x 576 columns."""
    return standard_normal(grid_keys(16, 910, seed=99), 576)


def test_mean_is_zero_and_variance_is_one(big_sample):
    count = big_sample.numel()
    assert abs(big_sample.double().mean()) < 4.5 / math.sqrt(count)
    assert abs(big_sample.double().var() - 1) < 4.5 * math.sqrt(2 / count)


def test_skewness_and_kurtosis_are_normal(big_sample):
    values = big_sample.flatten().double().numpy()
    assert abs(stats.skew(values)) < 4.5 * math.sqrt(6 / values.size)
    assert abs(stats.kurtosis(values)) < 4.5 * math.sqrt(24 / values.size)


def test_distribution_is_normal(big_sample):
    """Kolmogorov-Smirnov on a million values resolves a deviation of 0.2 % of the CDF."""
    values = big_sample.flatten()[::8].double().numpy()
    assert stats.kstest(values, "norm").pvalue > 1e-4


@pytest.mark.parametrize("half", ["cosine", "sine"])
def test_both_halves_of_box_muller_are_normal(big_sample, half):
    columns = slice(0, 288) if half == "cosine" else slice(288, None)
    values = big_sample[:, columns].flatten()[::8].double().numpy()
    assert stats.kstest(values, "norm").pvalue > 1e-4


@pytest.mark.parametrize("threshold", [3.0, 4.0, 4.5])
def test_tails_have_the_right_weight(big_sample, threshold):
    """P(|x| > 4) = 6.33e-5: 531 expected here, far beyond what a clip at 3 would leave."""
    expected = big_sample.numel() * 2 * stats.norm.sf(threshold)
    assert abs((big_sample.abs() > threshold).sum().item() - expected) < 5 * math.sqrt(expected)


def test_rows_are_uncorrelated(big_sample):
    """Inner products of neighbouring rows over sqrt(D) are N(0, 1) themselves."""
    rows = big_sample[:4000].double()
    scores = (rows[1:] * rows[:-1]).sum(dim=1) / math.sqrt(576)
    assert stats.kstest(scores.numpy(), "norm").pvalue > 1e-4


@pytest.mark.parametrize("lag", [1, 2, 287, 288])
def test_columns_are_uncorrelated(big_sample, lag):
    """Lag 288 pairs the sine with the cosine of one angle; squares show a shared radius."""
    left, right = big_sample[:, :-lag].double(), big_sample[:, lag:].double()
    bound = 4.5 / math.sqrt(left.numel())
    assert abs((left * right).mean()) < bound
    assert abs(((left**2 - 1) * (right**2 - 1)).mean() / 2) < bound


def test_layers_are_uncorrelated():
    shape = (8, 100)
    noise = [standard_normal(grid_keys(*shape, layer=layer), 576).double() for layer in range(4)]
    for layer in range(3):
        correlation = (noise[layer] * noise[layer + 1]).mean()
        assert abs(correlation) < 4.5 / math.sqrt(noise[0].numel())
