"""The same tokens meet the same noise however they are laid out and recomputed."""

import pytest
import torch

from openrlhf_alp.alp import attach, find_decoder_layers

LENGTHS = (7, 4, 5)
SAMPLE_IDS = (12, 3, 44)
SEQUENCES = [(torch.arange(n) * 5 + 3 * i + 1) % 61 for i, n in enumerate(LENGTHS)]
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def padded(order, side, extra=0):
    """Sequences of `order` as (tokens, mask, sample ids), padded on one side by 9s."""
    width = max(LENGTHS[i] for i in order) + extra
    tokens = torch.full((len(order), width), 9)
    mask = torch.zeros(len(order), width, dtype=torch.long)
    for row, i in enumerate(order):
        place = slice(0, LENGTHS[i]) if side == "right" else slice(width - LENGTHS[i], width)
        tokens[row, place] = SEQUENCES[i]
        mask[row, place] = 1
    return tokens, mask, torch.tensor([SAMPLE_IDS[i] for i in order])


def run_padded(model, log_probs_of, order, side, extra=0):
    """{sequence: (first layer's perturbed input (n, D), log-probs (n - 1,))}."""
    tokens, mask, sample_ids = padded(order, side, extra)
    inputs = []
    handle = watch_first_layer(model, inputs)
    with model.alp.enabled(update=6, sample_ids=sample_ids, attention_mask=mask):
        log_probs = log_probs_of(model, tokens, mask)
    handle.remove()
    result = {}
    for row, i in enumerate(order):
        valid = mask[row].bool()
        result[i] = (inputs[0][row][valid], log_probs[row][valid[:-1] & valid[1:]].detach())
    return result


def run_packed(model, order):
    """All sequences in one row, told apart by position_ids as packing does; same result shape."""
    _, mask, sample_ids = padded(order, "right")
    flat = torch.cat([SEQUENCES[i] for i in order])[None]
    position_ids = torch.cat([torch.arange(LENGTHS[i]) for i in order])[None]
    inputs = []
    handle = watch_first_layer(model, inputs)
    with model.alp.enabled(update=6, sample_ids=sample_ids, attention_mask=mask):
        logits = model(flat, position_ids=position_ids, use_cache=False).logits[0]
    handle.remove()
    result, start = {}, 0
    for i in order:
        piece = slice(start, start + LENGTHS[i])
        scores = logits[piece][:-1].log_softmax(-1)
        chosen = scores.gather(-1, SEQUENCES[i][1:, None]).squeeze(-1)
        result[i] = (inputs[0][0][piece], chosen.detach())
        start += LENGTHS[i]
    return result


def watch_first_layer(model, inputs):
    """Append what decoder layer 0 receives after the perturbation, at every call."""
    return find_decoder_layers(model)[0].register_forward_pre_hook(
        lambda _m, args, kwargs: inputs.append((args or [kwargs["hidden_states"]])[0].detach()),
        with_kwargs=True,
    )


@pytest.fixture
def model(family, build_model, settings):
    model = build_model(family)
    attach(model, settings(sigma0=0.3))
    return model


@pytest.fixture
def alone(model, log_probs_of):
    """Every sequence on its own, without padding: what all layouts must reproduce."""
    return {i: run_padded(model, log_probs_of, (i,), "right")[i] for i in range(3)}


def assert_same(result, alone):
    for i, (inputs, log_probs) in result.items():
        assert torch.equal(inputs, alone[i][0])  # the noise, bit for bit
        torch.testing.assert_close(log_probs, alone[i][1], **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("order", "extra"), [((0, 1, 2), 0), ((2, 0), 3), ((1, 2, 0), 1)])
def test_padding_and_batching_change_nothing(model, log_probs_of, alone, order, extra, side):
    assert_same(run_padded(model, log_probs_of, order, side, extra), alone)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1), (1,)])
def test_packing_changes_nothing(model, alone, order):
    assert_same(run_packed(model, order), alone)


def test_the_noise_matters_in_this_test(model, log_probs_of, alone):
    """Guards the tests above: the perturbed log-probs are far from the clean ones."""
    tokens, mask, _ = padded((0,), "right")
    clean = log_probs_of(model, tokens, mask)[0]
    assert (clean - alone[0][1]).abs().max() > 0.05


def test_a_padded_batch_works_in_bfloat16(model, log_probs_of):
    model.bfloat16()
    batch = run_padded(model, log_probs_of, (0, 1, 2), "left")
    for i in range(3):
        single = run_padded(model, log_probs_of, (i,), "right")[i]
        assert torch.equal(batch[i][0], single[0])


def forward_backward(model, log_probs_of, reentrant):
    """Layer-0 inputs of every call, log-probs, all gradients; reentrant None: no checkpointing."""
    model.train()
    if reentrant is None:
        model.gradient_checkpointing_disable()
    else:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.zero_grad()
    inputs = []
    handle = watch_first_layer(model, inputs)
    tokens, mask, sample_ids = padded((0, 1, 2), "left")
    with model.alp.enabled(update=6, sample_ids=sample_ids, attention_mask=mask):
        log_probs = log_probs_of(model, tokens, mask)
        (log_probs * mask[:, 1:]).sum().backward()
    handle.remove()
    return inputs, log_probs.detach(), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(model, log_probs_of, reentrant):
    inputs, log_probs, gradients = forward_backward(model, log_probs_of, None)
    again, same_log_probs, same_gradients = forward_backward(model, log_probs_of, reentrant)
    assert (len(inputs), len(again)) == (1, 2)  # the layer really ran a second time
    assert all(torch.equal(one, inputs[0]) for one in again)
    assert torch.equal(same_log_probs, log_probs)
    assert any(name.startswith("alp.") for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(same_gradients[name], gradient, rtol=1e-5, atol=1e-6)


def test_micro_batches_add_up_to_the_batch(model, log_probs_of):
    """Gradients of delta over three one-sequence micro-batches sum to those of one batch."""

    def gradient(orders):
        model.zero_grad()
        for order in orders:
            tokens, mask, sample_ids = padded(order, "left")
            with model.alp.enabled(update=6, sample_ids=sample_ids, attention_mask=mask):
                log_probs = log_probs_of(model, tokens, mask)
                (log_probs * (mask[:, :-1] * mask[:, 1:])).sum().backward()
        return torch.cat([delta.grad for delta in model.alp.delta.values()])

    torch.testing.assert_close(
        gradient([(0,), (1,), (2,)]), gradient([(0, 1, 2)]), rtol=1e-3, atol=1e-4
    )
