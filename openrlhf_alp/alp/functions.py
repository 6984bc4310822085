"""The two steps of the noise as autograd functions: sigma inside its bounds, and the sum."""

from typing import Any

import torch
from torch import Tensor

from openrlhf_alp.alp.fused import add_noise, sigma_gradient


class BoundedSigma(torch.autograd.Function):
    """sigma = clamp(sigma0 * exp(delta), low, high), with a one-sided gradient at the bounds.

    A plain clamp has gradient zero beyond a bound: a delta that overshot would stay there forever.
    Here a descent step that leads back inside still passes; only one that leads further out is cut.
    """

    @staticmethod
    def forward(ctx: Any, delta: Tensor, sigma0: float, low: float, high: float) -> Tensor:
        free = sigma0 * torch.exp(delta)
        sigma = free.clamp(low, high)
        ctx.save_for_backward(sigma, free > high, free < low)
        return sigma

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        sigma, above, below = ctx.saved_tensors
        outwards = (above & (grad < 0)) | (below & (grad > 0))
        # d sigma / d delta = sigma inside; beyond a bound the bound's value keeps it finite.
        return (grad * sigma).masked_fill(outwards, 0), None, None, None


class AddNoise(torch.autograd.Function):
    """hidden + sigma * epsilon(keys), summed in float32 and rounded once.

    Epsilon is computed from the keys in both passes and never stored: the memory between forward
    and backward is one 64-bit key per token instead of D numbers.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, sigma: Tensor, keys: Tensor, valid: Tensor | None
    ) -> Tensor:
        """hidden (.., D), sigma (D,) or (1,), keys (N,), valid (N,) or None -> (.., D)."""
        ctx.save_for_backward(keys, valid)
        ctx.per_dimension = sigma.numel() > 1
        # Detached, because a compiled program is tied to which of its inputs want a gradient.
        before = hidden.detach().reshape(-1, hidden.shape[-1]).contiguous()
        return add_noise(before, sigma.detach(), keys, valid).view(hidden.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        """d/d hidden is the identity; d/d sigma = sum over rows of grad * epsilon, in float32."""
        if not ctx.needs_input_grad[1]:
            return grad, None, None, None
        keys, valid = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1]).contiguous()
        sigma_grad = sigma_gradient(rows, keys, valid, per_dimension=ctx.per_dimension)
        return grad, sigma_grad, None, None
