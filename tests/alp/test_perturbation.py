"""Where the noise goes, what sigma is, and that off means off."""

import copy
import io
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from openrlhf_alp.alp import (
    LayerwisePerturbation,
    attach,
    detached,
    find_decoder_layers,
)
from openrlhf_alp.alp.noise import row_keys, standard_normal

TOKENS = torch.arange(12).reshape(2, 6)
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
SAMPLES = torch.tensor([3, 8])


def on(perturbation, update=1, mask=MASK, sample_ids=SAMPLES):
    return perturbation.enabled(update=update, sample_ids=sample_ids, attention_mask=mask)


def logits_and_gradients(model):
    """Logits of TOKENS and every gradient but delta's."""
    model.zero_grad()
    logits = model(TOKENS, attention_mask=MASK, use_cache=False).logits
    logits.square().mean().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if not n.startswith("alp.")}
    return logits.detach(), gradients


def assert_same_bits(left, right):
    assert torch.equal(left[0], right[0])
    assert left[1].keys() == right[1].keys()
    for name, gradient in left[1].items():
        assert torch.equal(gradient, right[1][name]), name


def record_layer_inputs(model):
    """Inputs of each decoder layer, as the layer sees them (hooks run in order of registration)."""
    seen = {}
    for index, layer in enumerate(find_decoder_layers(model)):
        layer.register_forward_pre_hook(
            lambda _m, args, kwargs, index=index: seen.__setitem__(
                index, (args[0] if args else kwargs["hidden_states"]).detach()
            ),
            with_kwargs=True,
        )
    return seen


def test_switched_off_the_model_is_the_clean_model_bit_for_bit(family, build_model, settings):
    clean = logits_and_gradients(build_model(family))
    model = build_model(family)
    perturbation = attach(model, settings())
    assert_same_bits(logits_and_gradients(model), clean)
    with on(perturbation):
        model(TOKENS, attention_mask=MASK)
    assert_same_bits(logits_and_gradients(model), clean)


def test_zero_sigma_is_the_clean_model_bit_for_bit(family, build_model, settings):
    clean = logits_and_gradients(build_model(family))
    model = build_model(family)
    with on(attach(model, settings(sigma0=0.0))):
        assert_same_bits(logits_and_gradients(model), clean)


def test_zero_sigma_is_the_clean_model_in_bfloat16(build_model, settings):
    clean = logits_and_gradients(build_model().bfloat16())
    model = build_model().bfloat16()
    with on(attach(model, settings(sigma0=0.0))):
        assert_same_bits(logits_and_gradients(model), clean)


def test_the_global_random_state_is_not_touched(build_model, settings):
    model = build_model()
    perturbation = attach(model, settings())
    before = torch.get_rng_state()
    with on(perturbation):
        logits_and_gradients(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_layer_receives_its_input_plus_sigma_times_its_keyed_noise(
    family, build_model, settings
):
    """Sample 8's real tokens are columns 2..5 and have positions 0..3; the padding stays clean."""
    model = build_model(family).double()
    before = record_layer_inputs(model)
    perturbation = attach(model, settings(sigma0=0.25))
    after = record_layer_inputs(model)
    with on(perturbation, update=5):
        model(TOKENS, attention_mask=MASK)
    for layer in range(3):
        keys = row_keys(
            seed=7,
            update=5,
            layer=layer,
            sample_ids=torch.tensor([3] * 6 + [8] * 4),
            positions=torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 2, 3]),
        )
        expected = torch.zeros(2, 6, 24, dtype=torch.float64)
        expected[MASK.bool()] = 0.25 * standard_normal(keys, 24).double()
        torch.testing.assert_close(after[layer] - before[layer], expected, rtol=0, atol=1e-12)
        assert torch.equal(after[layer][1, :2], before[layer][1, :2])


def test_only_selected_layers_are_perturbed(build_model, settings):
    clean, model = build_model(), build_model()
    perturbation = attach(model, settings(layers="1"))
    inputs, clean_inputs = record_layer_inputs(model), record_layer_inputs(clean)
    clean(TOKENS, attention_mask=MASK)
    with on(perturbation):
        model(TOKENS, attention_mask=MASK)
    assert list(perturbation.sigmas()) == [1]
    assert torch.equal(inputs[0], clean_inputs[0])
    assert not torch.equal(inputs[1], clean_inputs[1])


def test_the_sum_is_taken_in_float32_and_rounded_once(build_model, settings):
    """In bfloat16 arithmetic 1 + 0.003 * noise would be rounded twice, in product and in sum."""
    model = build_model().bfloat16()
    perturbation = attach(model, settings(sigma0=0.003))
    inputs = record_layer_inputs(model)
    mask = torch.ones_like(TOKENS)
    with on(perturbation, mask=mask):
        model(TOKENS, attention_mask=mask)
    keys = row_keys(
        seed=7,
        update=1,
        layer=0,
        sample_ids=SAMPLES.repeat_interleave(6),
        positions=torch.arange(6).repeat(2),
    )
    noise = standard_normal(keys, 24).reshape(2, 6, 24)
    embedded = model.get_input_embeddings()(TOKENS).detach().float()
    assert torch.equal(inputs[0], torch.addcmul(embedded, noise, torch.tensor(0.003)).bfloat16())


def test_updates_samples_and_seeds_change_the_outcome(build_model, settings):
    def perturbed(seed=7, **fields):
        model = build_model()
        with on(attach(model, settings(seed=seed)), **fields):
            return model(TOKENS, attention_mask=MASK).logits[0]

    base = perturbed()
    assert torch.equal(base, perturbed())
    assert not torch.equal(base, perturbed(update=2))
    assert not torch.equal(base, perturbed(seed=8))
    assert not torch.equal(base, perturbed(sample_ids=torch.tensor([4, 8])))


@pytest.mark.parametrize(("kind", "width"), [("vector", 24), ("scalar", 1)])
def test_sigma_starts_at_sigma0_and_has_one_parameter_per_layer(build_model, settings, kind, width):
    model = build_model()
    perturbation = attach(model, settings(sigma0=0.125, kind=kind, layers="0,2"))
    parameters = {n: p.shape for n, p in model.named_parameters() if n.startswith("alp.")}
    assert parameters == {"alp.delta.0": (width,), "alp.delta.2": (width,)}
    for sigma in perturbation.sigmas().values():
        assert sigma.tolist() == [0.125] * width


def test_sigma_parameters_come_last(build_model, settings):
    names = [name for name, _ in build_model().named_parameters()]
    model = build_model()
    attach(model, settings())
    assert [name for name, _ in model.named_parameters()][: len(names)] == names


def make_sigma(settings, *, sigma0=0.5, low=0.25, high=1.0):
    config = settings(kind="scalar", sigma0=sigma0, sigma_min=low, sigma_max=high)
    return LayerwisePerturbation(config, layers=(0,), hidden_size=4)


@pytest.mark.parametrize(
    ("delta", "sigma"), [(0.0, 0.5), (math.log(1.5), 0.75), (9.0, 1.0), (-9.0, 0.25), (200.0, 1.0)]
)
def test_sigma_is_an_exponential_within_bounds(settings, delta, sigma):
    perturbation = make_sigma(settings)
    perturbation.delta["0"].data.fill_(delta)
    assert perturbation.sigmas()[0].item() == pytest.approx(sigma)


@pytest.mark.parametrize(
    ("delta", "pull", "expected"),
    [
        (0.0, 1.0, 0.5),  # inside: d sigma / d delta = sigma, either way
        (0.0, -1.0, -0.5),
        (9.0, 1.0, 1.0),  # above the upper bound: descent lowers sigma, back inside
        (9.0, -1.0, 0.0),  # ... and must not push it further out
        (-9.0, -1.0, -0.25),  # below the lower bound: descent raises sigma
        (-9.0, 1.0, 0.0),
        (200.0, 1.0, 1.0),  # exp overflows float32; the gradient stays finite
    ],
)
def test_the_gradient_at_a_bound_is_one_sided(settings, delta, pull, expected):
    perturbation = make_sigma(settings)
    perturbation.delta["0"].data.fill_(delta)
    (pull * perturbation.sigma(0)).sum().backward()
    assert perturbation.delta["0"].grad.item() == pytest.approx(expected)


def test_a_delta_that_overshot_comes_back(settings):
    perturbation = make_sigma(settings)
    perturbation.delta["0"].data.fill_(3.0)
    optimizer = torch.optim.SGD(perturbation.parameters(), lr=0.5)
    for _ in range(30):
        optimizer.zero_grad()
        (perturbation.sigma(0) - 0.4).square().sum().backward()
        optimizer.step()
    assert perturbation.sigmas()[0].item() == pytest.approx(0.4, abs=0.01)


def test_summary_counts_what_sits_on_a_bound(settings):
    perturbation = LayerwisePerturbation(
        settings(sigma0=0.5, sigma_min=0.25), layers=(0, 1), hidden_size=2
    )
    perturbation.delta["0"].data.copy_(torch.tensor([9.0, -9.0]))
    summary = perturbation.summary()
    assert (summary.minimum, summary.maximum) == (0.25, 1.0)
    assert summary.mean == pytest.approx((1.0 + 0.25 + 0.5 + 0.5) / 4)
    assert summary.share_at_bound == 0.5


def test_a_bound_that_float32_rounds_still_counts(settings):
    perturbation = make_sigma(settings, sigma0=0.1, low=0.0, high=0.1)
    assert perturbation.summary().share_at_bound == 1.0


def test_a_batch_of_padding_only_stays_clean(build_model, settings):
    model = build_model()
    perturbation = attach(model, settings())
    nothing = torch.zeros_like(MASK)
    clean = model(TOKENS, attention_mask=nothing).logits
    with on(perturbation, mask=nothing):
        assert torch.equal(model(TOKENS, attention_mask=nothing).logits, clean)


def test_sigma0_survives_bfloat16_and_a_state_dict(build_model, settings):
    """0.0123 is not a bfloat16 number; the nearest is 0.01233."""
    model = build_model()
    attach(model, settings(sigma0=0.0123, seed=2**40 + 1))
    model.bfloat16()
    assert model.alp.sigma0 == 0.0123
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = build_model().bfloat16()
    perturbation = attach(other, settings(sigma0=0.5, seed=2**40 + 1))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert perturbation.sigma0 == 0.0123
    assert perturbation.seed == 2**40 + 1
    with on(perturbation), on(model.alp):
        assert torch.equal(
            other(TOKENS, attention_mask=MASK).logits, model(TOKENS, attention_mask=MASK).logits
        )


@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan])
def test_sigma0_outside_the_bounds_is_refused(settings, value):
    perturbation = make_sigma(settings)
    with pytest.raises(ValueError, match=r"--alp\.sigma0"):
        perturbation.sigma0 = value
    assert perturbation.sigma0 == 0.5


def test_detached_hides_sigma_and_brings_it_back(build_model, settings):
    clean_names = list(build_model().state_dict())
    model = build_model()
    perturbation = attach(model, settings())
    with pytest.raises(KeyError, match="from the caller"), detached(model):
        assert list(model.state_dict()) == clean_names
        assert list(dict(model.named_parameters())) == [
            n for n in clean_names if n in dict(build_model().named_parameters())
        ]
        raise KeyError("from the caller")
    assert model.alp is perturbation
    assert any(name.startswith("alp.") for name in model.state_dict())


def test_an_exported_model_is_a_clean_hugging_face_model(build_model, settings, tmp_path):
    model = build_model()
    attach(model, settings())
    with detached(model):
        model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert_same_bits(logits_and_gradients(loaded), logits_and_gradients(model))


def test_detaching_a_model_without_sigma_is_an_error(build_model):
    with (
        pytest.raises(ValueError, match="LlamaForCausalLM has no submodule"),
        detached(build_model()),
    ):
        pass


def test_attaching_twice_is_an_error(build_model, settings):
    model = build_model()
    attach(model, settings())
    with pytest.raises(ValueError, match="already has a submodule"):
        attach(model, settings())


def test_a_deep_copy_has_its_own_switch(build_model, settings):
    model = build_model()
    attach(model, settings())
    twin = copy.deepcopy(model)
    clean = model(TOKENS, attention_mask=MASK).logits
    with on(twin.alp):
        assert torch.equal(model(TOKENS, attention_mask=MASK).logits, clean)
        assert not torch.equal(twin(TOKENS, attention_mask=MASK).logits, clean)


def test_a_lora_model_is_perturbed_inside_its_wrapper(build_model, settings):
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(build_model(), lora)
    perturbation = attach(model, settings())
    assert perturbation.layers == (0, 1, 2)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n}
    assert trainable == {"alp.delta.0", "alp.delta.1", "alp.delta.2"}
    clean = model(TOKENS, attention_mask=MASK).logits
    with on(perturbation):
        logits = model(TOKENS, attention_mask=MASK).logits
        logits.square().mean().backward()
    assert not torch.equal(logits, clean)
    assert all(delta.grad.abs().sum() > 0 for delta in perturbation.delta.values())


def test_layers_of_a_nested_language_model_are_found(build_model):
    """The layout of vision-language models: get_decoder() gives a wrapper of the text decoder."""
    text = build_model()

    class TinyVisionLanguageModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision = nn.Linear(2, 2)
            self.wrapper = nn.Module()
            self.wrapper.language_model = text.model

        def get_decoder(self) -> nn.Module:
            return self.wrapper

    assert find_decoder_layers(TinyVisionLanguageModel()) is text.model.layers


@pytest.mark.parametrize("layers", [None, nn.ModuleList()])
def test_no_decoder_layers_is_an_error_that_names_the_class(settings, layers):
    class Layerless(nn.Module):
        def get_decoder(self) -> nn.Module:
            return self

    model = Layerless()
    if layers is not None:
        model.layers = layers
    with pytest.raises(ValueError, match="Layerless: found no decoder layers"):
        attach(model, settings())


def test_switching_on_twice_is_an_error_and_leaves_it_on(build_model, settings):
    model = build_model()
    perturbation = attach(model, settings())
    clean = model(TOKENS, attention_mask=MASK).logits
    with on(perturbation):
        with pytest.raises(RuntimeError, match="already on"), on(perturbation):
            pass
        assert not torch.equal(model(TOKENS, attention_mask=MASK).logits, clean)
    assert torch.equal(model(TOKENS, attention_mask=MASK).logits, clean)


def test_an_exception_switches_it_off(build_model, settings):
    model = build_model()
    perturbation = attach(model, settings())
    clean = model(TOKENS, attention_mask=MASK).logits
    with pytest.raises(KeyError), on(perturbation):
        raise KeyError
    assert torch.equal(model(TOKENS, attention_mask=MASK).logits, clean)


def test_hidden_states_of_another_shape_are_refused(build_model, settings):
    model = build_model()
    perturbation = attach(model, settings())
    with on(perturbation), pytest.raises(ValueError, match=r"\(2, 5, 24\).*2 x 6 with 10 real"):
        model(TOKENS[:, :5])


@pytest.mark.parametrize(
    ("samples", "mask"),
    [
        (torch.arange(3), torch.ones(2, 6)),
        (torch.arange(2), torch.ones(2)),
        (torch.ones(2, 1), MASK),
    ],
)
def test_misshapen_batches_are_refused(settings, samples, mask):
    perturbation = make_sigma(settings)
    switch = on(perturbation, sample_ids=samples, mask=mask)
    with pytest.raises(ValueError, match=r"must be \(B, T\) and \(B,\)"), switch:
        pass


def test_a_frozen_delta_costs_no_gradient(build_model, settings):
    model = build_model()
    perturbation = attach(model, settings())
    perturbation.requires_grad_(False)
    with on(perturbation):
        model(TOKENS, attention_mask=MASK).logits.sum().backward()
    assert all(delta.grad is None for delta in perturbation.delta.values())
