"""Where the noise goes: the paper's bands, the embedding, the output logits."""

import pytest
import torch

from openrlhf_alp.alp import attach, parse_layers
from openrlhf_alp.alp.noise import row_keys, standard_normal

TOKENS = torch.arange(14).reshape(2, 7) * 4
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1]])
IDS = torch.tensor([5, 9])
VOCAB = 61


def enabled(model, update=3):
    return model.alp.enabled(update=update, sample_ids=IDS, attention_mask=MASK)


@pytest.mark.parametrize(
    ("spec", "num_layers", "expected"),
    [
        # Section 5.1 of the paper, with its 28 layers.
        ("early", 28, range(5)),
        ("middle", 28, range(12, 17)),
        ("late", 28, range(19, 24)),
        # The same shares of 30: 5/28 * 30 = 5.4, 12.9 to 18.2, 20.4 to 25.7.
        ("early", 30, range(5)),
        ("middle", 30, range(13, 18)),
        ("late", 30, range(20, 26)),
        ("embedding", 28, [0]),
        ("logits", 28, [28]),
        ("early,late", 2, [0, 1]),
        ("late", 1, [0]),
        ("embedding, logits", 3, [0, 3]),
        ("all,logits", 2, [0, 1, 2]),
    ],
)
def test_names_are_read(spec, num_layers, expected):
    assert parse_layers(spec, num_layers) == tuple(expected)


@pytest.mark.parametrize("num_layers", range(1, 100))
def test_a_band_is_never_empty_and_never_outside(num_layers):
    for band in ("early", "middle", "late"):
        layers = parse_layers(band, num_layers)
        assert layers and layers[0] >= 0 and layers[-1] < num_layers


def test_noise_on_the_logits_is_sigma_times_epsilon_of_the_place_after_the_last_layer(
    family, build_model, settings
):
    model = build_model(family)
    clean = model(TOKENS, attention_mask=MASK, use_cache=False).logits
    attach(model, settings(layers="logits"))
    assert torch.equal(model(TOKENS, attention_mask=MASK, use_cache=False).logits, clean)
    with enabled(model):
        noisy = model(TOKENS, attention_mask=MASK, use_cache=False).logits
    positions = (MASK.cumsum(1) - 1).flatten()
    keys = row_keys(
        seed=7, update=3, layer=3, sample_ids=IDS.repeat_interleave(7), positions=positions
    )
    expected = clean.flatten(0, 1) + 0.05 * standard_normal(keys, VOCAB)
    valid = MASK.flatten().bool()
    torch.testing.assert_close(noisy.flatten(0, 1)[valid], expected[valid])
    assert torch.equal(noisy.flatten(0, 1)[~valid], clean.flatten(0, 1)[~valid])


@pytest.mark.parametrize("kind", ["vector", "scalar"])
def test_sigma_of_the_logits_learns_and_has_the_vocabularys_size(build_model, settings, kind):
    model = build_model()
    perturbation = attach(model, settings(layers="0,logits", kind=kind))
    assert [delta.numel() for delta in perturbation.delta.values()] == (
        [24, VOCAB] if kind == "vector" else [1, 1]
    )
    with enabled(model):
        logits = model(TOKENS, attention_mask=MASK, use_cache=False).logits
        logits.log_softmax(-1)[..., 0].sum().backward()
    assert all(delta.grad.abs().sum() > 0 for delta in perturbation.delta.values())
    assert perturbation.summary().mean == pytest.approx(0.05)


def test_the_embedding_is_the_input_of_layer_0(build_model, settings):
    found = []
    for layers in ("embedding", "0"):
        model = build_model()
        attach(model, settings(layers=layers))
        with enabled(model):
            found.append(model(TOKENS, attention_mask=MASK, use_cache=False).logits)
    assert torch.equal(*found)


def test_the_scale_of_the_logits_is_measured_like_a_layers(build_model, settings):
    model = build_model()
    perturbation = attach(model, settings(layers="1,logits", sigma_scale="relative"))
    with perturbation.observed(MASK) as observer:
        logits = model(TOKENS, attention_mask=MASK, use_cache=False).logits
    scales = {layer: figure.scale for layer, figure in observer.figures().items()}
    assert scales[3] == pytest.approx(logits[MASK.bool()].abs().median().item())
    perturbation.set_scales(scales)
    with enabled(model):
        assert not torch.equal(model(TOKENS, attention_mask=MASK, use_cache=False).logits, logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": "1"}, r"--alp\.layers is 1, .* trained with 0,1,2"),
        ({"draws": 4}, r"--alp\.draws is 4, .* trained with 1"),
    ],
)
def test_a_state_of_other_places_or_draws_is_refused_by_name(
    build_model, settings, changes, message
):
    stored = attach(build_model(), settings()).state_dict()
    with pytest.raises(ValueError, match=message):
        attach(build_model(), settings(**changes)).load_state_dict(stored)


def test_a_state_from_before_places_and_draws_were_stored_is_taken(build_model, settings):
    stored = attach(build_model(), settings()).state_dict()
    for name in ("layers", "draws"):
        del stored["_extra_state"][name]
    attach(build_model(), settings()).load_state_dict(stored)
