"""Relative sigmas, what the layers' observer sees, and the signal-to-noise of sigma's gradient."""

import math

import pytest
import torch

from openrlhf_alp.alp import attach, find_decoder_layers
from openrlhf_alp.alp.observe import (
    LayerFigures,
    LayerObserver,
    SigmaGradients,
    layer_metrics,
    median_magnitude,
    signal_to_noise,
)

TOKENS = torch.arange(12).reshape(2, 6)
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
SAMPLES = torch.tensor([3, 8])


def on(perturbation):
    return perturbation.enabled(update=1, sample_ids=SAMPLES, attention_mask=MASK)


@torch.no_grad()
def run(model):
    model(TOKENS, attention_mask=MASK, use_cache=False)


def test_the_scale_is_the_median_over_real_tokens_of_each_layers_input(
    family, build_model, settings
):
    model = build_model(family)
    perturbation = attach(model, settings())
    inputs = {}
    for index, layer in enumerate(find_decoder_layers(model)):
        layer.register_forward_pre_hook(
            lambda _m, args, kwargs, index=index: inputs.__setitem__(
                index, args[0] if args else kwargs["hidden_states"]
            ),
            with_kwargs=True,
        )
    with perturbation.observed(MASK) as observer:
        run(model)
    for layer, figures in observer.figures().items():
        assert figures.scale == inputs[layer][MASK.bool()].abs().median().item()
        assert figures.changed_share == 0.0
    assert sorted(observer.figures()) == [0, 1, 2]


def test_relative_sigma_is_the_layers_scale_times_sigma0_and_so_are_its_bounds(
    build_model, settings
):
    perturbation = attach(
        build_model(), settings(sigma_scale="relative", sigma0=0.5, sigma_min=0.25, sigma_max=1.0)
    )
    perturbation.set_scales({0: 0.125, 1: 4.0, 2: 2.0})
    with torch.no_grad():
        perturbation.delta["1"].fill_(-10)
        perturbation.delta["2"].fill_(10)
    sigmas = {layer: sigma.unique().tolist() for layer, sigma in perturbation.sigmas().items()}
    assert sigmas == {0: [0.0625], 1: [1.0], 2: [2.0]}
    summary = perturbation.summary()
    assert (summary.minimum, summary.maximum) == (0.25, 1.0)
    assert summary.share_at_bound == pytest.approx(2 / 3)


def test_relative_noise_without_a_scale_is_refused(build_model, settings):
    model = build_model()
    perturbation = attach(model, settings(sigma_scale="relative"))
    with on(perturbation), pytest.raises(RuntimeError, match=r"--alp\.sigma_scale absolute"):
        run(model)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf, None])
def test_a_scale_that_is_no_positive_number_is_refused_by_layer(build_model, settings, scale):
    perturbation = attach(build_model(), settings(sigma_scale="relative"))
    scales = {0: 1.0, 1: 1.0} if scale is None else {0: 1.0, 1: 1.0, 2: scale}
    with pytest.raises(ValueError, match=r"scales of layers \{2: "):
        perturbation.set_scales(scales)


def test_the_changed_share_is_counted_after_rounding(build_model, settings):
    """bfloat16 has 8 bits, so noise of 1e-5 changes few entries and noise of 0.1 nearly all."""
    shares = {}
    for sigma0 in (0.0, 1e-5, 0.1):
        model = build_model().bfloat16()
        perturbation = attach(model, settings(sigma_scale="relative", sigma0=sigma0))
        perturbation.set_scales(dict.fromkeys(range(3), 0.3))
        with perturbation.observed(MASK) as observer, on(perturbation):
            run(model)
        shares[sigma0] = observer.figures()[0].changed_share
    assert shares[0.0] == 0.0
    assert 0 < shares[1e-5] < 0.05
    assert shares[0.1] > 0.9


def test_packed_hidden_states_have_the_same_figures_as_padded_ones():
    padded, packed = LayerObserver(), LayerObserver()
    hidden = torch.randn(2, 6, 24)
    noisy = hidden + (torch.rand(2, 6, 24) > 0.5)
    real = MASK.bool()
    padded.see(0, hidden, noisy, real.flatten())
    packed.see(0, hidden[real][None], noisy[real][None], None)
    assert padded.figures() == packed.figures()


def test_no_real_token_has_no_figures():
    observer = LayerObserver()
    observer.see(0, torch.ones(1, 2, 4), torch.ones(1, 2, 4), torch.zeros(2, dtype=torch.bool))
    assert observer.figures() == {}
    assert layer_metrics(observer.figures(), {}) == {}


def test_layer_metrics_are_of_every_layer_and_of_three_and_the_extremes():
    observer = LayerObserver()
    for layer, scale in ((0, 1.0), (3, 2.0), (7, 4.0)):
        hidden = torch.full((1, 2, 4), scale)
        changed = hidden.clone()
        changed[0, 0, : layer // 2 + 1] += 1  # 1, 2 and 4 of 8 entries
        observer.see(layer, hidden, changed, None)
    metrics = layer_metrics(observer.figures(), {k: torch.tensor([0.5]) for k in (0, 3, 7)})
    assert metrics == {
        "alp/layer_sigma_over_scale_min": 0.125,
        "alp/layer_sigma_over_scale_max": 0.5,
        "alp/layer_changed_share_min": 0.125,
        "alp/layer_changed_share_max": 0.5,
        "alp/layer_first_scale": 1.0,
        "alp/layer_first_sigma_over_scale": 0.5,
        "alp/layer_first_changed_share": 0.125,
        "alp/layer_middle_scale": 2.0,
        "alp/layer_middle_sigma_over_scale": 0.25,
        "alp/layer_middle_changed_share": 0.25,
        "alp/layer_last_scale": 4.0,
        "alp/layer_last_sigma_over_scale": 0.125,
        "alp/layer_last_changed_share": 0.5,
        **{f"alp/layer_{layer}_sigma": 0.5 for layer in (0, 3, 7)},
        "alp/layer_0_sigma_over_scale": 0.5,
        "alp/layer_3_sigma_over_scale": 0.25,
        "alp/layer_7_sigma_over_scale": 0.125,
        "alp/layer_0_changed_share": 0.125,
        "alp/layer_3_changed_share": 0.25,
        "alp/layer_7_changed_share": 0.5,
    }


def test_pure_noise_has_a_signal_to_noise_of_one_and_a_signal_more():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(16, 2000, generator=generator)
    for signal, expected in ((0.0, 1.0), (1.0, 17.0)):  # 1 + M * signal**2
        gradients = SigmaGradients()
        for row in noise + signal:
            gradients.add(0, row[:1000])
            gradients.add(1, row[1000:])
        assert signal_to_noise(gradients.take()) == pytest.approx(expected, rel=0.05)
        assert gradients.take().numel() == 0


def test_one_gradient_has_no_signal_to_noise():
    gradients = SigmaGradients()
    gradients.add(0, torch.ones(3))
    assert signal_to_noise(gradients.take()) == 0.0


def test_every_backward_is_one_gradient_of_log_sigma(family, build_model, settings):
    """What is recorded is the parameter's own gradient, once for each backward pass."""
    model = build_model(family)
    perturbation = attach(model, settings())
    for _ in range(2):
        model.zero_grad()
        with on(perturbation):
            model(TOKENS, attention_mask=MASK, use_cache=False).logits.square().mean().backward()
    taken = perturbation.gradients.take()
    sums = taken[1:].view(2, -1)[0]
    expected = torch.cat([perturbation.delta[str(layer)].grad for layer in range(3)])
    assert taken[0] == 2
    torch.testing.assert_close(sums.float(), 2 * expected)


def test_a_frozen_sigma_has_no_gradient_and_the_noise_stays(build_model, settings):
    model = build_model()
    perturbation = attach(model, settings()).requires_grad_(False)
    with perturbation.observed(MASK) as observer, on(perturbation):
        model(TOKENS, attention_mask=MASK, use_cache=False).logits.square().mean().backward()
    assert all(delta.grad is None for delta in perturbation.parameters())
    assert perturbation.gradients.take().numel() == 0
    assert observer.figures()[2].changed_share > 0.9


def test_scales_and_start_travel_in_the_state_dict_and_another_unit_or_seed_is_refused(
    build_model, settings
):
    relative = {"sigma_scale": "relative", "sigma0": 0.5}
    saved = attach(build_model(), settings(**relative))
    saved.set_scales({0: 0.125, 1: 4.0, 2: 2.0})
    saved.start = {"alp/mismatch_k3_kl": 1e-3}
    state = saved.state_dict()
    loaded = attach(build_model(), settings(**relative))
    loaded.load_state_dict(state)
    assert (loaded.scales, loaded.start) == (saved.scales, saved.start)
    for changed, flag in (
        ({"sigma_scale": "absolute"}, "--alp.sigma_scale relative"),
        ({"seed": 8}, "--alp.seed 7"),
    ):
        other = attach(build_model(), settings(**{**relative, **changed}))
        with pytest.raises(ValueError, match=f"Set {flag}"):
            other.load_state_dict(state)


def test_the_loss_variance_of_a_layer_is_what_its_noise_does_to_the_loss(
    build_model, settings, log_probs_of
):
    """Against the variance of the loss over 300 draws of noise on one layer at a time."""
    model, mask = build_model(), torch.ones_like(TOKENS)

    def loss_of(update):
        with perturbation.enabled(update=update, sample_ids=SAMPLES, attention_mask=mask):
            return log_probs_of(model, TOKENS, mask)[:, 2:].sum()

    perturbation = attach(model, settings(sigma0=1e-3, kind="scalar"))
    with perturbation.observed(mask) as observer:
        # The hooks fire in the backward pass, which belongs inside as well.
        loss_of(0).backward()
    figures = observer.figures()
    with torch.no_grad():
        for alone in perturbation.layers:
            for layer in perturbation.layers:
                perturbation.delta[str(layer)].fill_(0.0 if layer == alone else -30.0)
            losses = torch.stack([loss_of(update) for update in range(300)])
            # The variance of 300 draws is exact within 8 %.
            assert figures[alone].loss_variance == pytest.approx(losses.var().item(), rel=0.35)


def test_shares_of_the_loss_variance_add_up_and_name_the_largest(build_model):
    sigmas = {layer: torch.full((4,), 0.1 * (layer + 1)) for layer in range(3)}
    figures = {
        layer: LayerFigures(scale=1.0, changed_share=0.5, loss_variance=variance)
        for layer, variance in enumerate((1.0, 6.0, 1.0))
    }
    metrics = layer_metrics(figures, sigmas)
    assert metrics["alp/layer_variance_share_max"] == 0.75
    assert metrics["alp/layer_variance_share_argmax"] == 1.0
    assert metrics["alp/layer_2_sigma"] == pytest.approx(0.3)
    assert metrics["alp/layer_0_variance_share"] == 0.125
    without = {0: LayerFigures(scale=1.0, changed_share=0.5)}
    assert "alp/layer_variance_share_max" not in layer_metrics(without, sigmas)


def test_the_last_optimizer_steps_gradient_is_the_sum_of_its_micro_batches():
    gradients = SigmaGradients()
    for value in (7.0, 1.0, 2.0):
        gradients.add(1, torch.tensor([value, 0.0]))
        gradients.add(0, torch.tensor([0.0, -value]))
        if value == 7.0:
            gradients.end_update()
    gradients.end_update()
    assert gradients.take_last_update().tolist() == [0.0, -3.0, 3.0, 0.0]
    assert gradients.take_last_update().numel() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_the_median_magnitude_is_that_of_a_selection(dtype, count):
    generator = torch.Generator().manual_seed(count)
    values = (10 * torch.randn(count, generator=generator)).to(dtype)
    found = median_magnitude(values[:, None].expand(count, 3))
    assert found.dtype == dtype
    assert found == values.abs().repeat_interleave(3).float().median().to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_nan_makes_the_median_magnitude_nan_and_infinity_is_a_number(dtype):
    values = torch.tensor([1.0, -2.0, torch.inf, -torch.inf, 0.0], dtype=dtype)
    assert median_magnitude(values) == 2.0
    values[0] = torch.nan
    assert median_magnitude(values).isnan()
