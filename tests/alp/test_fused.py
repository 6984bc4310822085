"""The compiled noise: the same numbers as the expression it is made of, one kernel, one program."""

import os
import subprocess
import sys

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import metrics

from openrlhf_alp.alp import fused
from openrlhf_alp.alp.fused import add_noise, sigma_gradient
from openrlhf_alp.alp.noise import row_keys, standard_normal

WIDTH = fused.MIN_WIDTH


def make_rows(num_rows, width, dtype=torch.bfloat16, seed=0):
    """(hidden, sigma, keys) of `num_rows` tokens of one sample."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_rows, width, generator=generator).to(dtype)
    sigma = torch.rand(width, generator=generator)
    zeros = torch.zeros(num_rows, dtype=torch.int64)
    keys = row_keys(seed=3, update=1, layer=2, sample_ids=zeros, positions=torch.arange(num_rows))
    return hidden, sigma, keys


@pytest.fixture
def uncompiled(monkeypatch):
    """Call a function with the programs switched off."""

    def call(function, *arguments, **keywords):
        with monkeypatch.context() as patch:
            patch.setattr(fused, "MIN_WIDTH", 1 << 30)
            return function(*arguments, **keywords)

    return call


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [WIDTH, WIDTH + 1, 576])
@pytest.mark.parametrize("padded", [False, True])
def test_compiled_and_uncompiled_noise_agree(uncompiled, dtype, width, padded):
    """Integers are the same; log, sqrt and the order of operations may differ in the last bit."""
    hidden, sigma, keys = make_rows(70, width, dtype)
    valid = torch.arange(70) % 3 > 0 if padded else None
    expected = uncompiled(add_noise, hidden, sigma, keys, valid)
    noisy = add_noise(hidden, sigma, keys, valid)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(noisy, expected, rtol=rounding, atol=8 * rounding)
    exact = (noisy == expected).double().mean()
    assert exact > (0.999 if dtype == torch.bfloat16 else 0.5)
    if valid is not None:
        assert torch.equal(noisy[~valid], hidden[~valid])


def test_compiled_integers_are_bit_equal():
    """The radius of every number, squared back to its 31 bits, names the word it came from."""
    hidden, _, keys = make_rows(50, 576, torch.float64)
    unit = torch.ones(576, dtype=torch.float64)
    noise = add_noise(torch.zeros_like(hidden), unit, keys, None)
    reference = standard_normal(keys, 576).double()
    # One step of a word's low or high half moves the noise by at most 4e-9 where it is not tiny;
    # another word moves it by its standard deviation.
    assert (noise - reference).abs().max() < 2e-5
    assert ((noise - reference).abs() < 2e-6).double().mean() > 0.999


@pytest.mark.parametrize("per_dimension", [True, False])
@pytest.mark.parametrize("padded", [False, True])
def test_compiled_gradient_agrees(uncompiled, per_dimension, padded):
    grad, _, keys = make_rows(300, 576, torch.float32)
    valid = torch.arange(300) % 4 > 0 if padded else None
    result = sigma_gradient(grad, keys, valid, per_dimension=per_dimension)
    rows = slice(None) if valid is None else valid
    expected = (grad[rows].double() * standard_normal(keys, 576)[rows].double()).sum(dim=0)
    expected = expected if per_dimension else expected.sum().reshape(1)
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-3)
    eager = uncompiled(sigma_gradient, grad, keys, valid, per_dimension=per_dimension)
    torch.testing.assert_close(result, eager, rtol=1e-4, atol=1e-3)


def test_a_compiled_row_does_not_depend_on_its_neighbours():
    hidden, sigma, keys = make_rows(200, 576)
    whole = add_noise(hidden, sigma, keys, None)
    for rows in (slice(0, 2), slice(3, 100), slice(150, 200)):
        assert torch.equal(add_noise(hidden[rows], sigma, keys[rows], None), whole[rows])


def test_other_sizes_compile_nothing_new():
    add_noise(*make_rows(64, 576), None)
    compiled = counters["stats"]["unique_graphs"]
    for num_rows, width in ((65, 576), (2, 576), (1000, 768), (33, 513), (1, 576)):
        add_noise(*make_rows(num_rows, width), None)
    assert counters["stats"]["unique_graphs"] == compiled


def test_one_kernel_forward_and_at_most_two_backward():
    """Counted in the code that inductor makes; on a GPU a column sum takes a second kernel."""
    torch._dynamo.reset()
    fused._program.cache_clear()
    with torch._inductor.config.patch(fx_graph_cache=False):
        hidden, sigma, keys = make_rows(128, 576)
        valid = torch.arange(128) > 3
        metrics.reset()
        add_noise(hidden, sigma, keys, valid)
        assert metrics.generated_kernel_count == 1
        metrics.reset()
        sigma_gradient(hidden, keys, valid, per_dimension=True)
        assert 1 <= metrics.generated_kernel_count <= 2


def test_without_a_compiler_the_noise_is_drawn_uncompiled(monkeypatch, caplog):
    hidden, sigma, keys = make_rows(40, 576)
    expected = add_noise(hidden, sigma, keys, None)
    torch._dynamo.reset()
    monkeypatch.setattr(fused, "_program", fused.functools.cache(fused._Program))
    with torch._inductor.config.patch({"fx_graph_cache": False, "cpp.cxx": ("/nowhere/c++",)}):
        for _ in range(2):
            noisy = add_noise(hidden, sigma, keys, None)
    torch.testing.assert_close(noisy, expected, rtol=0.01, atol=0.01)
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    assert "install a C++ compiler" in caplog.text


@pytest.mark.e2e
def test_a_second_process_finds_the_program_on_disk(tmp_path):
    """Ranks and runs share inductor's cache: the first compiles, the second only loads."""
    script = (
        "import torch\n"
        "from torch._dynamo.utils import counters\n"
        "from openrlhf_alp.alp.fused import add_noise\n"
        "keys = torch.arange(64)\n"
        "add_noise(torch.zeros(64, 576), torch.ones(576), keys, None)\n"
        "print(counters['inductor']['fxgraph_cache_hit'],"
        " counters['inductor']['fxgraph_cache_miss'])\n"
    )
    outputs = []
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=240,
            check=True,
        )
        outputs.append(run.stdout.split())
    assert outputs == [["0", "1"], ["1", "0"]]
