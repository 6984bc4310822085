"""What the perturbed layers see: hidden states and their noise, and the gradient of sigma.

Letters: B samples, T tokens, N = B * T rows, M valid rows, D hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_ROWS = 1024
"""Rows of one layer that are looked at, evenly spaced: a median of 1024 x D entries is exact enough
for a unit, and sorting all of a long micro-batch would cost more than its forward pass."""

_MAGNITUDE_BITS = 0x7FFF
"""Of a 16-bit float, without its sign."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Which rows of a micro-batch's hidden states are real tokens."""

    batch_shape: tuple[int, int]  # (B, T)
    valid: Tensor | None  # (N,) bool, real tokens; None when all are
    num_valid: int

    @classmethod
    def of(cls, attention_mask: Tensor) -> "Rows":
        """From a mask (B, T), true at real tokens."""
        valid = attention_mask.bool().flatten()
        num_valid = int(valid.sum())
        return cls(
            batch_shape=(attention_mask.shape[0], attention_mask.shape[1]),
            valid=None if num_valid == valid.numel() else valid,
            num_valid=num_valid,
        )

    def is_packed(self, hidden_states: Tensor) -> bool:
        """OpenRLHF removes the padding and joins the samples into one row, in order."""
        return tuple(hidden_states.shape[:-1]) != self.batch_shape

    def valid_of(self, layer: int, hidden_states: Tensor) -> Tensor | None:
        """(N,) bool of the rows that are real tokens; None when all are.

        Raises:
            ValueError: hidden states of another shape than the mask, padded or packed.
        """
        if not self.is_packed(hidden_states):
            return self.valid
        if tuple(hidden_states.shape[:-1]) != (1, self.num_valid):
            num_samples, num_tokens = self.batch_shape
            raise ValueError(
                f"layer {layer} received hidden states {tuple(hidden_states.shape)}; "
                f"the attention mask is {num_samples} x {num_tokens} with {self.num_valid} real "
                f"tokens, so they must be ({num_samples}, {num_tokens}, D) or, packed, "
                f"(1, {self.num_valid}, D)"
            )
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFigures:
    """Of the input of one layer, over its real tokens."""

    scale: float
    """Median |h| before the layer's own noise."""
    changed_share: float
    """Fraction of entries that the noise changed after rounding to the model's dtype; 0 without
    noise."""
    loss_variance: float | None = None
    """Variance that the layer's noise gives the loss, to first order and up to a factor that all
    layers have in common; None without a backward pass."""


class LayerObserver:
    """Scale of the hidden states of each layer, the share of entries that noise changed, and what
    the noise does to the loss."""

    def __init__(self, max_rows: int = MAX_ROWS) -> None:
        self._max_rows = max_rows
        self._figures: dict[int, Tensor] = {}
        self._variances: dict[int, Tensor] = {}

    @torch.no_grad()
    def see(self, layer: int, before: Tensor, after: Tensor, valid: Tensor | None) -> None:
        """Record one forward of a layer; gradient checkpointing's second one is ignored.

        Args:
            layer: its index.
            before, after: (.., D) without and with the layer's noise.
            valid: (N,) bool, rows that count; None for all.
        """
        if layer in self._figures:
            return
        chosen = _chosen_rows(before, valid, self._max_rows)
        if chosen.numel() == 0:
            return
        rows = before.shape[:-1].numel()
        clean, noisy = (h.reshape(rows, -1)[chosen] for h in (before, after))
        wide = torch.promote_types(clean.dtype, torch.float32)
        scale = median_magnitude(clean).to(wide)
        # Kept on the device: reading a number for each layer would stall the forward pass.
        self._figures[layer] = torch.stack([scale, (noisy != clean).to(wide).mean()])

    @torch.no_grad()
    def see_gradient(self, layer: int, sigma: Tensor, valid: Tensor | None, grad: Tensor) -> None:
        """Record the gradient of the loss at a layer's noisy input.

        The noise is independent over tokens and dimensions, so to first order it gives the loss a
        variance of sum over both of (sigma * grad)^2.

        Args:
            layer: its index.
            sigma: (D,) or (1,), in the unit of the hidden states.
            valid: (N,) bool, rows that count; None for all.
            grad: (.., D).
        """
        chosen = _chosen_rows(grad, valid, self._max_rows)
        if layer in self._variances or chosen.numel() == 0:
            return
        rows = grad.reshape(grad.shape[:-1].numel(), -1)[chosen]
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        self._variances[layer] = (wide * sigma.to(wide)).square().sum(dtype=torch.float64)

    def figures(self) -> dict[int, LayerFigures]:
        """What was seen, by layer; empty without a real token."""
        variances = {layer: value.item() for layer, value in self._variances.items()}
        return {
            layer: LayerFigures(
                scale=pair[0], changed_share=pair[1], loss_variance=variances.get(layer)
            )
            for layer, pair in ((k, v.tolist()) for k, v in self._figures.items())
        }


def median_magnitude(values: Tensor) -> Tensor:
    """Median |x| of all entries, the lower of two middle ones, () in the dtype of `values`; NaN if
    one of them is. Nothing is read back from the device.

    The bits of a 16-bit float without its sign are ordered as the magnitudes are: counting them
    gives the exact median in a fifteenth of the time of a selection.
    """
    if values.dtype not in (torch.bfloat16, torch.float16):
        return values.abs().flatten().median()
    bits = values.contiguous().view(torch.int16).flatten().long() & _MAGNITUDE_BITS
    counts = torch.zeros(_MAGNITUDE_BITS + 1, dtype=torch.long, device=values.device)
    counts.index_add_(0, bits, torch.ones_like(bits))
    cumulative = counts.cumsum(0)
    middle = (cumulative[-1:] - 1) // 2
    median = torch.searchsorted(cumulative, middle, right=True)
    # Those of NaN are above those of infinity.
    largest = torch.searchsorted(cumulative, cumulative[-1:])
    chosen = torch.where(_magnitude(largest, values).isnan(), largest, median)
    return _magnitude(chosen, values).squeeze(0)


def _magnitude(bits: Tensor, like: Tensor) -> Tensor:
    return bits.to(torch.int16).view(like.dtype)


def _chosen_rows(states: Tensor, valid: Tensor | None, max_rows: int) -> Tensor:
    """Indices of at most `max_rows` rows of (.., D) that count, evenly spaced."""
    chosen = torch.arange(states.shape[:-1].numel(), device=states.device)
    if valid is not None:
        chosen = chosen[valid.to(states.device)]
    return chosen[:: max(1, -(-chosen.numel() // max_rows))]


def layer_metrics(
    figures: Mapping[int, LayerFigures], sigmas: Mapping[int, Tensor]
) -> dict[str, float]:
    """`alp/layer_*` of every perturbed layer by its number, of the first, middle and last one, and
    the extremes of all.

    Args:
        figures: from `LayerObserver.figures`; without any the result is empty.
        sigmas: of each of these layers, (D,) or (1,), in the unit of the hidden states.
    """
    if not figures:
        return {}
    order = sorted(figures)
    medians = {layer: sigmas[layer].median().item() for layer in order}
    # Guarded, since hidden states of 0 would make the ratio infinite.
    ratios = {layer: medians[layer] / max(figures[layer].scale, 1e-30) for layer in order}
    changed = [figure.changed_share for figure in figures.values()]
    metrics = {
        "alp/layer_sigma_over_scale_min": min(ratios.values()),
        "alp/layer_sigma_over_scale_max": max(ratios.values()),
        "alp/layer_changed_share_min": min(changed),
        "alp/layer_changed_share_max": max(changed),
    }
    for name, layer in zip(
        ("first", "middle", "last"), (order[0], order[len(order) // 2], order[-1]), strict=True
    ):
        metrics[f"alp/layer_{name}_scale"] = figures[layer].scale
        metrics[f"alp/layer_{name}_sigma_over_scale"] = ratios[layer]
        metrics[f"alp/layer_{name}_changed_share"] = figures[layer].changed_share
    shares = variance_shares(figures)
    if shares:
        largest = max(shares, key=shares.__getitem__)
        metrics["alp/layer_variance_share_max"] = shares[largest]
        metrics["alp/layer_variance_share_argmax"] = float(largest)
    for layer in order:
        metrics[f"alp/layer_{layer}_sigma"] = medians[layer]
        metrics[f"alp/layer_{layer}_sigma_over_scale"] = ratios[layer]
        metrics[f"alp/layer_{layer}_changed_share"] = figures[layer].changed_share
    metrics |= {f"alp/layer_{layer}_variance_share": shares[layer] for layer in shares}
    return metrics


def variance_shares(figures: Mapping[int, LayerFigures]) -> dict[int, float]:
    """Share of each layer in the variance that noise gives the loss; empty if there is none."""
    variances = {layer: figure.loss_variance or 0.0 for layer, figure in figures.items()}
    total = sum(variances.values())
    return {layer: value / total for layer, value in variances.items()} if total > 0 else {}


class SigmaGradients:
    """Signal-to-noise of the gradient of log sigma over the micro-batches of a step.

    With M micro-batches whose gradients g_m of one entry have mean m and variance v, the mean of
    pure noise has E[m**2] = v / M. The ratio of these two, each summed over all entries, is 1 for
    noise and grows with M when there is a signal.
    """

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._counts: dict[int, int] = {}
        self._update: dict[int, Tensor] = {}
        self._last_update: dict[int, Tensor] = {}

    def add(self, layer: int, gradient: Tensor) -> None:
        """Add one micro-batch's d loss / d delta of a layer, (D,) or (1,)."""
        wide = gradient.detach().double()
        both = torch.stack([wide, wide.square()])
        self._sums[layer] = self._sums[layer] + both if layer in self._sums else both
        self._counts[layer] = self._counts.get(layer, 0) + 1
        self._update[layer] = self._update[layer] + wide if layer in self._update else wide

    def end_update(self) -> None:
        """An optimizer step was made of the micro-batches since the last one."""
        self._last_update, self._update = self._update, {}

    def take_last_update(self) -> Tensor:
        """(E,) float64, summed gradient of the last optimizer step; starts anew. Empty if none."""
        last, self._last_update = self._last_update, {}
        if not last:
            return torch.zeros(0, dtype=torch.float64)
        return torch.cat([last[layer] for layer in sorted(last)]).cpu()

    def take(self) -> Tensor:
        """(1 + 2 E,) float64: M, then sums and sums of squares of all E entries; starts anew.

        Those of several ranks may be added. Empty when no gradient was computed.
        """
        sums, count = self._sums, max(self._counts.values(), default=0)
        self._sums, self._counts = {}, {}
        if not count:
            return torch.zeros(0, dtype=torch.float64)
        entries = torch.cat([sums[layer] for layer in sorted(sums)], dim=1).flatten().cpu()
        return torch.cat([torch.tensor([float(count)], dtype=torch.float64), entries])


def signal_to_noise(taken: Tensor) -> float:
    """Of what `SigmaGradients.take` gave, or of its sum over ranks; 0 with fewer than 2."""
    if taken.numel() == 0 or taken[0] < 2:
        return 0.0
    count = taken[0]
    total, squares = taken[1:].view(2, -1)
    mean = total / count
    variance = (squares / count - mean.square()).clamp(min=0) * count / (count - 1)
    noise = variance.sum() / count
    return (mean.square().sum() / noise).item() if noise > 0 else 0.0
