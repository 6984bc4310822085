"""Gaussian noise on the input of each decoder layer, added only inside `enabled()`.

The paper (arXiv 2603.19470, section 2.2) perturbs the input h_l of decoder layer l:

    h_l <- h_l + sigma_l * epsilon_l,    epsilon_l ~ N(0, I), independent over tokens and layers
    sigma_l = clamp(sigma0 * exp(delta_l), sigma_min, sigma_max)

delta_l is learned and starts at 0; it has D entries or one. sigma0 stays outside the learned part:
a bfloat16 log(sigma) near -7 can move only in steps of 3 % of sigma, a bfloat16 delta near 0 in
steps far below that. The noise goes on the residual stream itself, before the layer's first norm.

Only theta leaves the learner: `detached(model)` takes sigma out of the module tree for export.

Letters: B samples, T tokens, D hidden size, L selected layers, N = B * T rows, M valid rows.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from openrlhf_alp.alp.config import PerturbationConfig, check_sigma0, parse_layers
from openrlhf_alp.alp.fused import add_noise, sigma_gradient
from openrlhf_alp.alp.noise import layer_keys, token_keys

_ATTRIBUTE = "alp"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draw:
    """Where the tokens of one micro-batch are and which noise belongs to each."""

    batch_shape: tuple[int, int]  # (B, T)
    keys: dict[int, Tensor]  # of each layer (N,) int64, row-major; of padding meaningless
    valid: Tensor | None  # (N,) bool, real tokens; None when all are
    num_valid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SigmaSummary:
    """Sigma over all selected layers and dimensions, for the step's metrics."""

    mean: float
    minimum: float
    maximum: float
    share_at_bound: float
    """Fraction of sigmas that sit on sigma_min or sigma_max."""


class LayerwisePerturbation(nn.Module):
    """The learned sigmas of the selected layers, and the switch that turns the noise on.

    Use `attach` to build one on a model. The parameters are `delta.<layer>`, (D,) or (1,); sigma0
    and the seed travel in the state dict as extra state, so that casting the module to bfloat16
    cannot round them and a checkpoint restores them exactly.

    Args:
        config: the settings.
        layers: indices of the perturbed decoder layers.
        hidden_size: D.
    """

    def __init__(
        self, config: PerturbationConfig, *, layers: tuple[int, ...], hidden_size: int
    ) -> None:
        super().__init__()
        self.layers = layers
        self.seed = config.seed
        self.sigma_min = config.sigma_min
        self.sigma_max = config.sigma_max
        self._sigma0 = config.sigma_min if config.sigma0 is None else config.sigma0
        self._draw: _Draw | None = None
        # Zeros: the first update starts at exactly sigma0, whatever dtype DeepSpeed casts delta to.
        width = hidden_size if config.kind == "vector" else 1
        self.delta = nn.ParameterDict({str(layer): torch.zeros(width) for layer in layers})

    @property
    def sigma0(self) -> float:
        """Sigma where delta is 0. Settable; ValueError outside [sigma_min, sigma_max]."""
        return self._sigma0

    @sigma0.setter
    def sigma0(self, value: float) -> None:
        check_sigma0(value, self.sigma_min, self.sigma_max)
        self._sigma0 = float(value)

    def sigma(self, layer: int) -> Tensor:
        """Sigma of one layer, (D,) or (1,), at least float32, differentiable in delta."""
        delta = self.delta[str(layer)]
        wide = delta.to(torch.promote_types(delta.dtype, torch.float32))
        return _BoundedSigma.apply(wide, self._sigma0, self.sigma_min, self.sigma_max)

    @torch.no_grad()
    def sigmas(self) -> dict[int, Tensor]:
        """Sigma of every selected layer, (D,) or (1,) float32, without gradient."""
        return {layer: self.sigma(layer) for layer in self.layers}

    def summary(self) -> SigmaSummary:
        """Mean, extremes and share at a bound over all layers and dimensions."""
        sigma = torch.cat(list(self.sigmas().values()))
        at_bound = (sigma <= self.sigma_min) | (sigma >= self.sigma_max)
        return SigmaSummary(
            mean=sigma.double().mean().item(),
            minimum=sigma.min().item(),
            maximum=sigma.max().item(),
            share_at_bound=at_bound.double().mean().item(),
        )

    @contextmanager
    def enabled(self, *, update: int, sample_ids: Tensor, attention_mask: Tensor) -> Iterator[None]:
        """Perturb every forward pass inside the block. The backward pass belongs inside as well:
        gradient checkpointing runs the layers again there, and must meet the same noise.

        Args:
            update: number of the policy update; another update draws other noise.
            sample_ids: (B,) integers naming the samples; a sample keeps its noise wherever it is
                placed as long as its id stays.
            attention_mask: (B, T) bool or 0/1, true at real tokens. A token's position counts real
                tokens only, so padding on either side changes nothing.

        Raises:
            RuntimeError: the perturbation is already on.
            ValueError: the shapes do not fit.
        """
        if self._draw is not None:
            raise RuntimeError(
                "the perturbation is already on; leave the enclosing `enabled()` block first"
            )
        self._draw = self._prepare_draw(update, sample_ids, attention_mask)
        try:
            yield
        finally:
            self._draw = None

    def _prepare_draw(self, update: int, sample_ids: Tensor, attention_mask: Tensor) -> _Draw:
        if attention_mask.dim() != 2 or sample_ids.shape != attention_mask.shape[:1]:
            raise ValueError(
                f"attention_mask is {tuple(attention_mask.shape)} and sample_ids "
                f"{tuple(sample_ids.shape)}; they must be (B, T) and (B,)"
            )
        valid_BT = attention_mask.bool()
        # Counted over real tokens, so that left or right padding gives a token the same key.
        positions_BT = valid_BT.long().cumsum(dim=1) - 1
        samples_BT = sample_ids.to(valid_BT.device)[:, None].expand_as(positions_BT)
        keys = token_keys(
            seed=self.seed,
            update=update,
            sample_ids=samples_BT.flatten(),
            positions=positions_BT.flatten(),
        )
        # All layers at once: a few small kernels per forward instead of a few per layer.
        layers = torch.tensor(self.layers, device=keys.device)
        num_valid = int(valid_BT.sum())
        return _Draw(
            batch_shape=(attention_mask.shape[0], attention_mask.shape[1]),
            keys=dict(zip(self.layers, layer_keys(keys, layers[:, None]), strict=True)),
            valid=None if num_valid == keys.numel() else valid_BT.flatten(),
            num_valid=num_valid,
        )

    def _before_layer(
        self, layer: int, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook of a decoder layer. None, i.e. nothing at all, while switched off."""
        if self._draw is None:
            return None
        # Models differ in whether they pass the hidden states by position or by name.
        if args:
            return (self._perturb(layer, args[0], self._draw), *args[1:]), kwargs
        hidden_states = self._perturb(layer, kwargs["hidden_states"], self._draw)
        return args, {**kwargs, "hidden_states": hidden_states}

    def _perturb(self, layer: int, hidden_states: Tensor, draw: _Draw) -> Tensor:
        num_samples, num_tokens = draw.batch_shape
        leading = tuple(hidden_states.shape[:-1])
        keys, valid = draw.keys[layer], draw.valid
        if leading != draw.batch_shape:
            if leading != (1, draw.num_valid):
                raise ValueError(
                    f"layer {layer} received hidden states {tuple(hidden_states.shape)}; "
                    f"`enabled()` was given an attention mask of {num_samples} x {num_tokens} with "
                    f"{draw.num_valid} real tokens, so they must be ({num_samples}, {num_tokens}, "
                    f"D) or, packed, (1, {draw.num_valid}, D)"
                )
            # Packed: OpenRLHF removes the padding and joins the samples into one row, in order.
            keys, valid = (keys if valid is None else keys[valid]), None
        # A model that is spread over GPUs has layers on other devices than the mask.
        device = hidden_states.device
        return _AddNoise.apply(
            hidden_states,
            self.sigma(layer).to(device),
            keys.to(device),
            None if valid is None else valid.to(device),
        )

    def get_extra_state(self) -> dict[str, Any]:
        """sigma0 and the seed, for the state dict."""
        return {"sigma0": self._sigma0, "seed": self.seed}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_extra_state` gave; ValueError when sigma0 is outside the bounds."""
        self.sigma0 = state["sigma0"]
        self.seed = int(state["seed"])

    def extra_repr(self) -> str:
        return f"layers={self.layers}, sigma0={self._sigma0}, seed={self.seed}"


def attach(model: nn.Module, config: PerturbationConfig) -> LayerwisePerturbation:
    """Register a `LayerwisePerturbation` as `model.alp` and hook the selected decoder layers.

    Call it after LoRA adapters are in place and before the optimizer collects parameters. It is the
    model's last submodule, so the order of the other parameters does not change.

    Args:
        model: a Hugging Face causal LM, plain or wrapped by PEFT.
        config: the settings.

    Raises:
        ValueError: no decoder layers found, a layer of `--alp.layers` that does not exist, or the
            model has a perturbation already.
    """
    if hasattr(model, _ATTRIBUTE):
        raise ValueError(f"{type(model).__name__} already has a submodule `{_ATTRIBUTE}`")
    decoder_layers = find_decoder_layers(model)
    perturbation = LayerwisePerturbation(
        config,
        layers=parse_layers(config.layers, len(decoder_layers)),
        hidden_size=model.config.get_text_config().hidden_size,
    ).to(next(decoder_layers.parameters()).device)
    for layer in perturbation.layers:
        hook = functools.partial(perturbation._before_layer, layer)
        decoder_layers[layer].register_forward_pre_hook(hook, with_kwargs=True)
    model.add_module(_ATTRIBUTE, perturbation)
    return perturbation


def find_decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a Hugging Face model, in order.

    Follows `get_decoder()` through PEFT wrappers and, for models with a vision tower, into the
    language model.

    Raises:
        ValueError: nothing there has a non-empty `layers`; the message names the class.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    for candidate in (decoder, *(getattr(decoder, n, None) for n in ("model", "language_model"))):
        layers = getattr(candidate, "layers", None)
        if isinstance(layers, nn.ModuleList) and len(layers) > 0:
            return layers
    raise ValueError(
        f"{type(model).__name__}: found no decoder layers to perturb. `get_decoder().layers` must "
        f"be a non-empty ModuleList, but the decoder is {type(decoder).__name__}. Use a causal LM "
        "of the Llama, Qwen, Mistral, GPT-NeoX family or one laid out like them"
    )


@contextmanager
def detached(model: nn.Module) -> Iterator[None]:
    """Take `alp` out of the module tree while weights are exported or pushed, then put it back.

    Inside the block neither `state_dict`, `named_parameters` nor `save_pretrained` sees sigma. The
    hooks stay and stay off. ValueError when the model has no perturbation.
    """
    if _ATTRIBUTE not in model._modules:
        raise ValueError(f"{type(model).__name__} has no submodule `{_ATTRIBUTE}` to detach")
    # Popped from the module tree only: the optimizer and the hooks keep their references.
    perturbation = model._modules.pop(_ATTRIBUTE)
    try:
        yield
    finally:
        model._modules[_ATTRIBUTE] = perturbation


class _BoundedSigma(torch.autograd.Function):
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


class _AddNoise(torch.autograd.Function):
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
