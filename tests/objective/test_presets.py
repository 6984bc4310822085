"""Every preset against numbers worked out by hand, and against a NumPy statement of its formula."""

import math

import numpy as np
import numpy_methods
import pytest
import torch

from openrlhf_alp.objective.loss import policy_loss
from openrlhf_alp.objective.methods import METHODS

NAMES = sorted(METHODS)
TOKEN_NAMES = [name for name in NAMES if METHODS[name].objective.level == "token"]


def batch(seed, spread=0.3, shape=(6, 7)):
    """Random log-probs near -1 in float64, ragged masks, one advantage per sequence."""
    random = np.random.default_rng(seed)
    mu = -random.uniform(0.01, 3, shape)
    old = np.minimum(mu + spread * random.normal(size=shape), -1e-3)
    now = np.minimum(old + spread * random.normal(size=shape), -1e-3)
    mask = random.random(shape) < 0.7
    mask[:, 0] = True
    advantages = np.repeat(random.normal(size=(shape[0], 1)), shape[1], axis=1)
    return now, old, mu, advantages, mask


def run(method, now, old, mu, advantages, mask):
    """LossOutput and gradient in the learner's log-probs."""
    log_probs = torch.tensor(np.asarray(now, dtype=np.float64), requires_grad=True)
    output = policy_loss(
        log_probs=log_probs,
        rollout_log_probs=torch.tensor(np.asarray(mu, dtype=np.float64)),
        old_log_probs=torch.tensor(np.asarray(old, dtype=np.float64)),
        advantages=torch.tensor(np.asarray(advantages, dtype=np.float64)),
        action_mask=torch.tensor(np.asarray(mask)),
        config=METHODS[method].objective,
    )
    output.loss.backward()
    return output, log_probs.grad


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("spread", [1e-3, 0.1, 0.5, 1.5])
def test_the_loss_is_the_numpy_statement(method, spread):
    """Spreads from no clip at all to most tokens cut."""
    for seed in range(8):
        data = batch(seed, spread)
        expected = numpy_methods.loss(method, *data)
        assert run(method, *data)[0].loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_every_preset_has_a_statement():
    assert numpy_methods.STATEMENTS.keys() == METHODS.keys()


@pytest.mark.parametrize("method", TOKEN_NAMES)
@pytest.mark.parametrize("spread", [0.05, 0.4])
def test_the_gradient_is_that_of_the_statement(method, spread):
    """Central differences; factors are constants, so their statement is frozen where it is one.

    The ratio of cispo and the factors of a mask carry no gradient, in the papers as here: the
    statement is differentiated with the weight or the set of kept tokens held fixed.
    """
    now, old, mu, advantages, mask = batch(3, spread)
    _, gradient = run(method, now, old, mu, advantages, mask)
    step = 1e-6
    for b, a in zip(*np.nonzero(mask), strict=True):
        if method == "cispo":
            weight = min(math.exp(now[b, a] - old[b, a]), 1.28)
            expected = -weight * advantages[b, a] / mask.sum()
        else:
            losses = []
            for sign in (1, -1):
                moved = now.copy()
                moved[b, a] += sign * step
                losses.append(numpy_methods.loss(method, moved, old, mu, advantages, mask))
            expected = (losses[0] - losses[1]) / (2 * step)
        assert gradient[b, a].item() == pytest.approx(expected, rel=1e-4, abs=1e-8), (b, a)
    assert not gradient[torch.tensor(~mask)].any()


@pytest.mark.parametrize("method", [name for name in NAMES if name not in TOKEN_NAMES])
@pytest.mark.parametrize("spread", [1e-4, 0.05, 0.4])
def test_a_sequences_ratio_gives_each_token_the_gradient_of_its_own_log_prob(method, spread):
    """d L_t / d l_t is d L / d log r of the sequence, times the factor, over the count.

    GSPO's way (arXiv 2507.18071, section 4.3): the other tokens' share of the ratio is a constant.
    """
    now, old, mu, advantages, mask = batch(4, spread)
    _, gradient = run(method, now, old, mu, advantages, mask)
    geometric = METHODS[method].objective.level == "geometric"
    low, high = (3e-4, 4e-4) if geometric else (0.5, 3.0)
    reference = old if METHODS[method].objective.denominator == "old" else mu
    step = 1e-7
    for b, kept in enumerate(mask):
        s = (now - reference)[b][kept].sum() / (kept.sum() if geometric else 1)
        losses = [
            numpy_methods.ppo(math.exp(s + sign * step), advantages[b, 0], low, high)
            for sign in (1, -1)
        ]
        expected = (losses[0] - losses[1]) / (2 * step)
        if method == "seq-mis":
            weight = math.exp((old - mu)[b][kept].sum())
            expected *= weight if weight <= 5 else 0
        if method == "seq-alp-mis":
            expected *= math.exp(s) <= 5
        expected /= kept.sum() * len(mask) if geometric else mask.sum()
        np.testing.assert_allclose(gradient[b].numpy(), expected * kept, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("method", NAMES)
def test_at_equal_policies_every_method_is_reinforce(method):
    """r = 1, nothing is cut: the gradient is -A over the count, of tokens or within a sequence."""
    _, _, mu, advantages, mask = batch(1)
    output, gradient = run(method, mu, mu, mu, advantages, mask)
    counts = mask.sum(-1, keepdims=True) * len(mask) if method.startswith("gspo") else mask.sum()
    np.testing.assert_allclose(gradient.numpy(), -advantages * mask / counts, rtol=1e-6)
    assert output.clip_fraction == output.mask_fraction == output.guard_fraction == 0.0


def test_grpo_divides_by_the_old_policy_and_bypass_by_the_engine():
    """now / old = 1.1, now / mu = 1.2: with A = 1 the losses of one token are -1.1 and -1.2."""
    data = (np.log([[0.66]]), np.log([[0.60]]), np.log([[0.55]]), [[1.0]], [[True]])
    assert run("grpo", *data)[0].loss.item() == pytest.approx(-1.1)
    assert run("token-bypass", *data)[0].loss.item() == pytest.approx(-1.2)


def test_cispo_keeps_the_gradient_where_grpo_loses_it():
    """r = 2 with A = 1: grpo is cut, cispo has weight 1.28 on the gradient of log pi, -1.28."""
    data = (np.log([[0.8]]), np.log([[0.4]]), np.log([[0.4]]), [[1.0]], [[True]])
    assert run("grpo", *data)[1].item() == 0.0
    output, gradient = run("cispo", *data)
    assert gradient.item() == pytest.approx(-1.28)
    assert output.loss.item() == pytest.approx(-1.28 * math.log(0.8))
    assert output.clip_high_fraction == 1.0


def test_tis_truncates_what_icepop_drops_and_what_both_keep():
    """old / mu = 6, 1.5, 0.4 with now = old, A = 1. TIS: 2, 1.5, 0.4. IcePop: 0, 1.5, 0."""
    old = np.log([[0.6, 0.3, 0.2]])
    mu = np.log([[0.1, 0.2, 0.5]])
    data = (old, old, mu, np.ones((1, 3)), np.ones((1, 3), bool))
    output, gradient = run("tis", *data)
    np.testing.assert_allclose(gradient.numpy(), [[-2 / 3, -0.5, -0.4 / 3]])
    assert output.mask_fraction == 0.0
    output, gradient = run("icepop", *data)
    np.testing.assert_allclose(gradient.numpy(), [[0.0, -0.5, 0.0]])
    assert output.mask_fraction == pytest.approx(2 / 3)


@pytest.mark.parametrize("method", ["token-mis", "seq-mis"])
def test_mis_weighs_a_sequence_and_drops_it_above_five(method):
    """Weights 2 * 1.5 = 3 and 2 * 3 = 6; now = old, A = -1; 4 tokens in all."""
    mu = np.log([[0.2, 0.2], [0.2, 0.2]])
    old = np.log([[0.4, 0.3], [0.4, 0.6]])
    data = (old, old, mu, -np.ones((2, 2)), np.ones((2, 2), bool))
    output, gradient = run(method, *data)
    np.testing.assert_allclose(gradient.numpy(), [[0.75, 0.75], [0.0, 0.0]])
    assert output.mask_fraction == 0.5
    assert output.cuts["mask_fraction"].tolist() == [[False, False], [True, True]]


def test_geo_mis_looks_at_the_mean_and_weighs_by_the_token():
    """2 * 0.5 has mean 1: kept with weights 2 and 0.5. 1.01 * 1.01 has mean 1.01: dropped."""
    old = np.log([[0.2, 0.2], [0.202, 0.202]])
    mu = np.log([[0.1, 0.4], [0.2, 0.2]])
    output, gradient = run("geo-mis", old, old, mu, np.ones((2, 2)), np.ones((2, 2), bool))
    np.testing.assert_allclose(gradient.numpy(), [[-0.5, -0.125], [0.0, 0.0]])
    assert output.mask_fraction == 0.5


@pytest.mark.parametrize("method", ["dppo-tv", "dppo-kl"])
def test_dppo_blocks_a_large_move_outwards_only(method):
    """0.5 -> 0.8: |p - q| 0.3, KL 0.22. 0.01 -> 0.04: a ratio of 4, and |p - q| only 0.03.

    Columns: far up with A = 1 (blocked), far up with A = -1 (pulled back, kept), far down with
    A = -1 (blocked), rare token with A = 1 (kept, although PPO clips it).
    """
    q, p = np.array([[0.5, 0.5, 0.8, 0.01]]), np.array([[0.8, 0.8, 0.3, 0.04]])
    advantages = np.array([[1.0, -1.0, -1.0, 1.0]])
    data = (np.log(p), np.log(q), np.log(q), advantages, np.ones((1, 4), bool))
    output, gradient = run(method, *data)
    np.testing.assert_allclose(gradient.numpy(), [[0.0, 1.6 / 4, 0.0, -1.0]], rtol=1e-6)
    assert output.mask_fraction == 0.5 and output.clip_fraction == 0.0
    assert run("token-bypass", *data)[1][0, 3] == 0.0


def test_the_bernoulli_kl_by_hand():
    """q = 0.5, p = 0.8: 0.5 ln(0.625) + 0.5 ln(2.5) = 0.2231 > 0.05; p = 0.6: 0.0204 < 0.05."""
    q = np.log([[0.5, 0.5]])
    data = (np.log([[0.8, 0.6]]), q, q, np.ones((1, 2)), np.ones((1, 2), bool))
    assert run("dppo-kl", *data)[0].cuts["mask_fraction"].tolist() == [[True, False]]


@pytest.mark.parametrize("method", ["dppo-tv", "dppo-kl"])
def test_a_certain_token_has_a_finite_divergence(method):
    """log-prob 0 on both sides is no move; from 0 to log 0.5 downwards is a large one."""
    now, mu = [[0.0, math.log(0.5)]], [[0.0, 0.0]]
    output, gradient = run(method, now, mu, mu, -np.ones((1, 2)), np.ones((1, 2), bool))
    assert gradient.tolist() == [[0.5, 0.0]]
    assert math.isfinite(output.loss.item())


def test_trm_drops_a_sequence_for_its_worst_token():
    """k3 of a ratio of 2 is 1 - ln 2 = 0.307 > 0.2; of 1.2 it is 0.0177. A = 1, mean over 4."""
    mu = np.log([[0.2, 0.2], [0.2, 0.2]])
    now = np.log([[0.24, 0.4], [0.24, 0.24]])
    output, gradient = run("trm", now, mu, mu, np.ones((2, 2)), np.ones((2, 2), bool))
    np.testing.assert_allclose(gradient.numpy(), [[0.0, 0.0], [-0.3, -0.3]])
    assert output.mask_fraction == 0.5


@pytest.mark.parametrize("method", ["token-alp-mis", "seq-alp-mis"])
def test_alp_with_a_mask_drops_a_sequence_and_weighs_none(method):
    """Products 2 * 3 = 6 (dropped) and 1.1 * 1.1 = 1.21 (kept); A = -1, mean over 4 tokens."""
    mu = np.log([[0.2, 0.2], [0.2, 0.2]])
    now = np.log([[0.4, 0.6], [0.22, 0.22]])
    _, gradient = run(method, now, mu, mu, -np.ones((2, 2)), np.ones((2, 2), bool))
    kept = 1.1 if method == "token-alp-mis" else 1.21
    np.testing.assert_allclose(gradient.numpy(), [[0.0, 0.0], [kept / 4, kept / 4]])


@pytest.mark.parametrize("method", NAMES)
def test_garbage_off_the_mask_changes_nothing(method):
    now, old, mu, advantages, mask = batch(5)
    clean = run(method, now, old, mu, advantages, mask)
    dirty = [np.where(mask, values, math.nan) for values in (now, old, mu, advantages)]
    output, gradient = run(method, *dirty, mask)
    assert output.loss.item() == clean[0].loss.item()
    assert torch.equal(gradient, clean[1])


@pytest.mark.parametrize("method", NAMES)
def test_extreme_ratios_give_finite_gradients_and_the_guard_counts_them(method):
    now, old, mu = [[-1e-6, -90.0]], [[-60.0, -1.0]], [[-30.0, -2.0]]
    output, gradient = run(method, now, old, mu, [[1.0, -1.0]], [[True, True]])
    assert gradient.isfinite().all() and math.isfinite(output.loss.item())
    if METHODS[method].objective.level == "token":
        assert output.guard_fraction == 1.0


def test_an_old_policy_is_required_only_by_the_methods_that_read_it():
    readers = {name for name in NAMES if METHODS[name].objective.needs_old_policy}
    assert readers == {
        *("grpo", "gspo", "cispo", "tis", "icepop", "token-mis", "seq-mis", "geo-mis")
    }
    for name in NAMES:
        inputs = {
            "log_probs": torch.full((1, 1), -1.0),
            "rollout_log_probs": torch.tensor([[-1.0]]),
        }
        arguments = {
            **inputs,
            "advantages": torch.ones(1, 1),
            "action_mask": torch.ones(1, 1),
            "config": METHODS[name].objective,
        }
        if name in readers:
            with pytest.raises(ValueError, match="old_log_probs is None"):
                policy_loss(**arguments)
        else:
            assert policy_loss(**arguments).loss.isfinite()
