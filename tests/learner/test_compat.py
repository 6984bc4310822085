"""The shims behave like what they stand for."""

import subprocess
import sys

import pytest
import torch
from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input

from openrlhf_alp.learner import compat


def test_unpadding_keeps_the_valid_rows_in_order_and_padding_puts_them_back() -> None:
    x = torch.arange(12.0).reshape(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    rows, indices, boundaries, longest, lengths = unpad_input(x, mask)
    assert rows.tolist() == [[0, 1], [2, 3], [8, 9], [10, 11]]
    assert indices.tolist() == [0, 1, 4, 5]
    assert boundaries.tolist() == [0, 2, 4] and boundaries.dtype == torch.int32
    assert longest == 2 and lengths.tolist() == [2, 2]
    assert torch.equal(pad_input(rows, indices, 2, 3), x * mask.unsqueeze(-1))
    assert torch.equal(index_first_axis(x.flatten(0, 1), indices), rows)


def test_gradient_flows_back_through_padding() -> None:
    rows = torch.ones(2, 1, requires_grad=True)
    pad_input(rows, torch.tensor([1, 3]), 2, 2).sum().backward()
    assert rows.grad is not None and rows.grad.tolist() == [[1.0], [1.0]]


def test_the_current_device_is_usable_as_a_device_and_as_an_index() -> None:
    if torch.cuda.is_available():
        assert torch.cuda.current_device() == 0
        return
    device = torch.cuda.current_device()
    assert torch.zeros(1, device=device).device.type == "cpu"
    assert f"cuda:{device}" == "cuda:0"
    torch.cuda.synchronize()


def test_installing_twice_changes_nothing() -> None:
    before = torch.cuda.current_device
    compat.install()
    assert index_first_axis is __import__("flash_attn.bert_padding").bert_padding.index_first_axis
    assert torch.cuda.is_available() or before() == torch.cuda.current_device()


def test_transformers_does_not_take_the_shim_for_flash_attention() -> None:
    from transformers.utils import is_flash_attn_2_available

    assert not is_flash_attn_2_available()


@pytest.mark.parametrize("package", ["openrlhf", "deepspeed"])
def test_the_shims_are_there_before_their_users_and_torch_is_not_loaded_for_flags(
    package: str,
) -> None:
    script = (
        "import sys\n"
        "import openrlhf_alp.learner.flags.spec, openrlhf_alp.learner.mismatch.judge\n"
        "assert 'torch' not in sys.modules\n"
        f"import {package}\n"
        "import torch\n"
        "assert torch.zeros(1, device=torch.cuda.current_device()).numel() == 1\n"
        "import flash_attn.bert_padding\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]


def test_what_every_ray_worker_runs_loads_no_torch_and_may_run_twice() -> None:
    script = (
        "import sys\n"
        "from openrlhf_alp.learner import compat\n"  # the package has run it once
        "compat.install_before_use()\n"
        "assert 'torch' not in sys.modules\n"
        "assert sum(isinstance(f, compat._InstallFirst) for f in sys.meta_path) == 1\n"
        "import deepspeed, torch\n"
        "assert torch.cuda.is_available() or str(torch.cuda.current_device()) == 'cpu'\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
