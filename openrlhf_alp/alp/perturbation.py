"""Gaussian noise on the inputs of decoder layers or the logits, added only inside `enabled()`.

The paper (arXiv 2603.19470, section 2.2) perturbs the input h_l of decoder layer l:

    h_l <- h_l + sigma_l * epsilon_l,    epsilon_l ~ N(0, I), independent over tokens and layers
    sigma_l = scale_l * clamp(sigma0 * exp(delta_l), sigma_min, sigma_max)

scale_l is 1, or with `sigma_scale="relative"` the median |h_l| of the clean model, measured once:
hidden states grow by a factor of 100 or more over the depth, and one absolute sigma would be noise
on the embeddings only. delta_l is learned and starts at 0; it has D entries or one. sigma0 stays
outside the learned part: a bfloat16 log(sigma) near -7 can move only in steps of 3 % of sigma, a
bfloat16 delta near 0 in steps far below that. The noise goes on the residual stream itself, before
the layer's first norm. The output logits are one more place, of the paper's ablation (section 5.1),
with the vocabulary in the place of the hidden size.

Only theta leaves the learner: `detached(model)` takes sigma out of the module tree for export.

Letters: B samples, T tokens, D hidden size, L selected layers, N = B * T rows, M valid rows.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from openrlhf_alp.alp.config import PerturbationConfig, check_sigma0, parse_layers
from openrlhf_alp.alp.draws import repeat_rows
from openrlhf_alp.alp.functions import AddNoise, BoundedSigma
from openrlhf_alp.alp.noise import draw_keys, layer_keys, token_keys
from openrlhf_alp.alp.observe import MAX_ROWS, LayerObserver, Rows, SigmaGradients
from openrlhf_alp.alp.places import find_decoder_layers, find_output_layer

_ATTRIBUTE = "alp"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draw:
    """Where the tokens of one micro-batch are and which noise belongs to each."""

    rows: Rows
    keys: dict[int, Tensor]  # of each layer (N,) int64, row-major; of padding meaningless


@dataclass(frozen=True, slots=True, kw_only=True)
class SigmaSummary:
    """Sigma over all selected layers and dimensions, in the unit of `sigma0`."""

    mean: float
    minimum: float
    maximum: float
    share_at_bound: float
    """Fraction of sigmas that sit on sigma_min or sigma_max."""


class LayerwisePerturbation(nn.Module):
    """The learned sigmas of the selected layers, and the switch that turns the noise on.

    Use `attach` to build one on a model. The parameters are `delta.<layer>`, (D,) or (1,); sigma0,
    the layers' scales and the seed travel in the state dict as extra state, so that casting the
    module to bfloat16 cannot round them and a checkpoint restores them exactly.

    Args:
        config: the settings.
        layers: indices of the perturbed places, from `parse_layers`.
        hidden_size: D.
        widths: D of the places where it is not the hidden size.
    """

    def __init__(
        self,
        config: PerturbationConfig,
        *,
        layers: tuple[int, ...],
        hidden_size: int,
        widths: Mapping[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.layers = layers
        self.seed = config.seed
        self.draws = config.draws
        self.sigma_min = config.sigma_min
        self.sigma_max = config.upper_bound
        self.sigma_scale = config.sigma_scale
        self._sigma0 = config.sigma_min if config.sigma0 is None else config.sigma0
        absolute = config.sigma_scale == "absolute"
        self._scales: dict[int, float] | None = dict.fromkeys(layers, 1.0) if absolute else None
        self._draw: _Draw | None = None
        self._rows: Rows | None = None
        self._observer: LayerObserver | None = None
        self.gradients = SigmaGradients()
        self.start: dict[str, float] | None = None
        """Metrics of the measurement before the first update; None while it is still to be made."""
        # Zeros: the first update starts at exactly sigma0, whatever dtype DeepSpeed casts delta to.
        sizes = {layer: (widths or {}).get(layer, hidden_size) for layer in layers}
        self.delta = nn.ParameterDict(
            {
                str(layer): torch.zeros(size if config.kind == "vector" else 1)
                for layer, size in sizes.items()
            }
        )

    @property
    def sigma0(self) -> float:
        """Sigma where delta is 0. Settable; ValueError outside [sigma_min, sigma_max]."""
        return self._sigma0

    @sigma0.setter
    def sigma0(self, value: float) -> None:
        check_sigma0(value, self.sigma_min, self.sigma_max)
        self._sigma0 = float(value)

    @property
    def scales(self) -> dict[int, float] | None:
        """Unit of each layer's sigma; None until it is measured, with `sigma_scale="relative"`."""
        return self._scales

    def set_scales(self, scales: Mapping[int, float]) -> None:
        """Set the unit of each layer's sigma, as `observed` measures it.

        Raises:
            ValueError: a layer is missing, or a scale is not a positive finite number.
        """
        wrong = {layer: scales.get(layer) for layer in self.layers}
        wrong = {k: v for k, v in wrong.items() if v is None or not 0 < v < math.inf}
        if wrong:
            raise ValueError(
                f"the scales of layers {wrong} must be positive and finite. Hidden states of 0, "
                "inf or nan have none: look for an overflow, or set --alp.sigma_scale absolute"
            )
        self._scales = {layer: float(scales[layer]) for layer in self.layers}

    def sigma(self, layer: int) -> Tensor:
        """Sigma of one layer in the unit of the hidden states, (D,) or (1,), at least float32,
        differentiable in delta; RuntimeError before the scales are measured."""
        if self._scales is None:
            raise RuntimeError(
                "--alp.sigma_scale relative needs the scale of each layer's hidden states. Measure "
                "it with `observed()` around a clean forward pass and `set_scales()`, or set "
                "--alp.sigma_scale absolute"
            )
        return self._relative_sigma(layer) * self._scales[layer]

    def _relative_sigma(self, layer: int) -> Tensor:
        delta = self.delta[str(layer)]
        # A view: a hook on the parameter itself would outlive this forward pass.
        wide = delta.to(torch.promote_types(delta.dtype, torch.float32)).view_as(delta)
        if wide.requires_grad:
            wide.register_hook(functools.partial(self.gradients.add, layer))
        return BoundedSigma.apply(wide, self._sigma0, self.sigma_min, self.sigma_max)

    @torch.no_grad()
    def sigmas(self) -> dict[int, Tensor]:
        """Sigma of every selected layer, (D,) or (1,) float32, without gradient."""
        return {layer: self.sigma(layer) for layer in self.layers}

    @torch.no_grad()
    def summary(self) -> SigmaSummary:
        """Mean, extremes and share at a bound over all layers and dimensions."""
        sigma = torch.cat([self._relative_sigma(layer) for layer in self.layers])
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

        With K = `draws` above 1 the forward passes must have K * B rows, see `draws.py`.

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

    @contextmanager
    def observed(
        self, attention_mask: Tensor, *, max_rows: int = MAX_ROWS
    ) -> Iterator[LayerObserver]:
        """Record the inputs of the selected layers in every forward pass inside the block.

        Clean, or within `enabled()` also what the noise changed.

        Args:
            attention_mask: (B, T), as for `enabled()`.
            max_rows: tokens of each layer that are looked at.
        """
        observer = LayerObserver(max_rows)
        self._observer, self._rows = observer, Rows.of(attention_mask)
        try:
            yield observer
        finally:
            self._observer, self._rows = None, None

    @contextmanager
    def probed(self, sigma0: float) -> Iterator[None]:
        """Use another sigma0 inside the block, without regard to the bounds."""
        before = self._sigma0, self.sigma_min, self.sigma_max
        self._sigma0, self.sigma_min, self.sigma_max = sigma0, 0.0, math.inf
        try:
            yield
        finally:
            self._sigma0, self.sigma_min, self.sigma_max = before

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
        keys = torch.cat([draw_keys(keys, draw) for draw in range(self.draws)])
        # All layers at once: a few small kernels per forward instead of a few per layer.
        layers = torch.tensor(self.layers, device=keys.device)
        return _Draw(
            rows=Rows.of(repeat_rows(attention_mask, self.draws)),
            keys=dict(zip(self.layers, layer_keys(keys, layers[:, None]), strict=True)),
        )

    def _before_layer(
        self, layer: int, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook of a decoder layer. None, i.e. nothing at all, while switched off."""
        if self._draw is None and self._observer is None:
            return None
        # Models differ in whether they pass the hidden states by position or by name.
        before = args[0] if args else kwargs["hidden_states"]
        after = self._changed(layer, before)
        return ((after, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": after})

    def _after_output_layer(
        self, place: int, _module: nn.Module, _args: tuple[Any, ...], logits: Tensor
    ) -> Tensor | None:
        """Forward hook of the output layer. None while switched off."""
        if self._draw is None and self._observer is None:
            return None
        return self._changed(place, logits)

    def _changed(self, layer: int, before: Tensor) -> Tensor:
        """`before` with this place's noise, or as it is without; shown to the observer."""
        after = before if self._draw is None else self._perturb(layer, before, self._draw)
        if self._observer is not None:
            assert self._rows is not None, "an observer without its rows"
            valid = self._rows.valid_of(layer, before)
            self._observer.see(layer, before, after, valid)
            if self._draw is not None and after.requires_grad:
                sigma = self.sigma(layer).detach()
                see = functools.partial(self._observer.see_gradient, layer, sigma, valid)
                after.register_hook(see)
        return after

    def _perturb(self, layer: int, hidden_states: Tensor, draw: _Draw) -> Tensor:
        keys, valid = draw.keys[layer], draw.rows.valid_of(layer, hidden_states)
        if draw.rows.is_packed(hidden_states):
            keys = keys if draw.rows.valid is None else keys[draw.rows.valid]
        # A model that is spread over GPUs has layers on other devices than the mask.
        device = hidden_states.device
        return AddNoise.apply(
            hidden_states,
            self.sigma(layer).to(device),
            keys.to(device),
            None if valid is None else valid.to(device),
        )

    def get_extra_state(self) -> dict[str, Any]:
        """sigma0, its unit in each layer, how they were found, and the seed, for the state dict."""
        return {
            "sigma0": self._sigma0,
            "seed": self.seed,
            "sigma_scale": self.sigma_scale,
            "scales": self._scales,
            "start": self.start,
            "layers": self.layers,
            "draws": self.draws,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_extra_state` gave.

        Raises:
            ValueError: seed, unit, layers or draws differ from the configured ones, or sigma0 is
                outside the bounds; the message names the flag to set.
        """
        # A state of before sigma had a unit is absolute, and its start was not stored; one of
        # before draws were counted had one, and its layers are those of its parameters.
        before = {"sigma_scale": "absolute", "start": {}, "draws": 1, "layers": self.layers}
        stored: dict[str, Any] = {**before, **state}
        for name in ("seed", "sigma_scale", "layers", "draws"):
            theirs, ours = _flag_text(stored[name]), _flag_text(getattr(self, name))
            if theirs != ours:
                raise ValueError(
                    f"--alp.{name} is {ours}, but the checkpoint was trained with {theirs}, "
                    f"and the run would continue with other noise. Set --alp.{name} "
                    f"{theirs}, or start from the exported model instead of the checkpoint"
                )
        self.sigma0 = stored["sigma0"]
        if stored.get("scales") is not None:
            self.set_scales(stored["scales"])
        self.start = stored["start"]

    def extra_repr(self) -> str:
        return f"layers={self.layers}, sigma0={self._sigma0} ({self.sigma_scale}), seed={self.seed}"


def _num_logits(model: nn.Module, vocab_size: int) -> int:
    """Width of the output layer, which may be padded beyond the vocabulary."""
    return getattr(model.get_output_embeddings(), "out_features", vocab_size)


def _flag_text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def attach(model: nn.Module, config: PerturbationConfig) -> LayerwisePerturbation:
    """Register a `LayerwisePerturbation` as `model.alp` and hook the selected places.

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
    logits, text_config = len(decoder_layers), model.config.get_text_config()
    perturbation = LayerwisePerturbation(
        config,
        layers=parse_layers(config.layers, len(decoder_layers)),
        hidden_size=text_config.hidden_size,
        widths={logits: _num_logits(model, text_config.vocab_size)},
    ).to(next(decoder_layers.parameters()).device)
    for layer in perturbation.layers:
        if layer == logits:
            hook = functools.partial(perturbation._after_output_layer, layer)
            find_output_layer(model).register_forward_hook(hook)
            continue
        hook = functools.partial(perturbation._before_layer, layer)
        decoder_layers[layer].register_forward_pre_hook(hook, with_kwargs=True)
    model.add_module(_ATTRIBUTE, perturbation)
    return perturbation


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
