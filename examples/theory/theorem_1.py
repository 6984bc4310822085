"""A numerical check of the paper's Theorem 1 on small softmax policies with a hidden state in R^2.

The rollout policy is biased, mu_zeta(a) = pi(a | h + zeta) with zeta ~ N(0, s^2 I) (section 2.3).
The perturbed policy is q_sigma(a | x) = E pi(a | x + delta) with delta ~ N(0, sigma^2 I). The
theorem bounds the KL divergence between the two; sigma has to be large enough to cover the bias
and small enough to keep the policy.

The text that we have of the paper states the conditions in words and has lost the formulas of
equation (4) and of Theorem 3. What is checked here is rebuilt from appendix C, with every constant
computed instead of hidden in an O():

* Lemma 2: grad log q_sigma(a | x) = E[delta | x, a] / sigma^2.
* Condition 1: C1 is the largest |E[delta | x, a]|^2 / (d sigma^2).
* Condition 2: C2 is the largest q_sigma(a | x) / pi(a | x).
* Bound A, on KL(q_sigma(h) || mu_zeta) averaged over zeta: C1 d E|zeta|^2 / sigma^2 + log C2.
  Proof: the KL is at most log C2 + KL(q_sigma(h) || q_sigma(h + zeta)). By Lemma 2 and Condition 1
  log q_sigma changes by at most R = |zeta| sqrt(C1 d) / sigma between h and h + zeta; the sum of
  that KL and its reverse is then at most R^2.
* Bound B, on KL(mu_zeta || q_sigma(h)) averaged over zeta (what a learner measures on rollouts):
  I + d KL(N(0, s^2) || N(0, sigma^2)), where I is the mutual information of zeta and the action.
  Proof: the average is I + KL(q_s || q_sigma), and no channel increases the KL of its inputs.
  The average itself is least at sigma = s, where it is I.

    python examples/theory/theorem_1.py [--out DIR]
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

DIMENSIONS = 2
BIAS_STD = 0.1
"""s, the standard deviation of the rollout policy's bias in each dimension."""

SIGMAS = BIAS_STD * np.array([0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.5, 2.0, 3.0, 4.0])
NUM_NODES = 37
"""Nodes per dimension of the noise and of the bias."""

REACH = 6.0
"""The nodes cover this many standard deviations; 2e-9 of a Gaussian lies beyond."""

REGION = np.linspace(-1.6, 1.6, 17)
"""Where C1 and C2 are taken, per axis: it contains every prompt with REACH s of bias around it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """softmax(read_out f(x)): f is tanh(inner x), or x itself when `inner` is None."""

    read_out: np.ndarray  # (A, H), or (A, d) without a hidden layer
    inner: np.ndarray | None  # (H, d)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """(..., d) hidden states -> (..., A) probabilities."""
        hidden = x if self.inner is None else np.tanh(x @ self.inner.T)
        logits = hidden @ self.read_out.T
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True)


def policies(num_actions: int = 5, num_hidden: int = 8) -> dict[str, Policy]:
    """One policy with a hidden layer and one with logits linear in x, the same at each call."""
    rng = np.random.default_rng(0)
    inner = rng.normal(size=(num_hidden, DIMENSIONS))
    read_out = 2.0 * rng.normal(size=(num_actions, num_hidden))
    linear = 4.0 * rng.normal(size=(num_actions, DIMENSIONS))
    return {
        "hidden layer": Policy(read_out=read_out, inner=inner),
        "linear": Policy(read_out=linear, inner=None),
    }


def prompts(num_prompts: int = 8) -> np.ndarray:
    """(P, d) hidden states before the noise, inside the unit square around 0."""
    return np.random.default_rng(1).uniform(-1.0, 1.0, size=(num_prompts, DIMENSIONS))


def gaussian_rule(std: float) -> tuple[np.ndarray, np.ndarray]:
    """Nodes (N, d) and weights (N,) that average over N(0, std^2 I).

    An even grid: for functions as smooth as these it converges faster than Gauss-Hermite nodes.
    """
    nodes = np.linspace(-REACH, REACH, NUM_NODES)
    grid = np.stack(np.meshgrid(*[nodes] * DIMENSIONS), -1).reshape(-1, DIMENSIONS)
    density = np.exp(-(grid**2).sum(-1) / 2)
    return std * grid, density / density.sum()


def perturbed(policy: Policy, x: np.ndarray, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """q_sigma(a | x) as (P, A), and the posterior mean E[delta | x, a] as (P, A, d)."""
    delta, weight = gaussian_rule(sigma)
    joint = policy(x[:, None] + delta) * weight[:, None]  # (P, N, A)
    marginal = joint.sum(1)
    mean = np.einsum("pna,nd->pad", joint, delta) / marginal[..., None]
    return marginal, mean


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) in nats over the last axis."""
    return (p * (np.log(p) - np.log(q))).sum(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Both divergences and bounds at one sigma, in nats, averaged over prompts and biases."""

    sigma: float
    reverse: float  # KL(q_sigma || mu)
    bound_a: float
    forward: float  # KL(mu || q_sigma)
    bound_b: float
    c1: float
    c2: float


def measure(policy: Policy, sigma: float) -> Row:
    """Divergences by quadrature over noise and bias; constants over all of REGION."""
    h = prompts()
    zeta, weight = gaussian_rule(BIAS_STD)
    biased = policy(h[:, None] + zeta)  # (P, Z, A)
    q = perturbed(policy, h, sigma)[0][:, None]  # (P, 1, A)
    marginal = (biased * weight[:, None]).sum(1, keepdims=True)
    information = (kl(biased, marginal) @ weight).mean()

    region = np.stack(np.meshgrid(REGION, REGION), -1).reshape(-1, DIMENSIONS)
    q_region, posterior_mean = perturbed(policy, region, sigma)
    c1 = (posterior_mean**2).sum(-1).max() / (DIMENSIONS * sigma**2)
    c2 = (q_region / policy(region)).max()
    ratio = (BIAS_STD / sigma) ** 2
    return Row(
        sigma=sigma,
        reverse=float((kl(q, biased) @ weight).mean()),
        bound_a=float(c1 * DIMENSIONS * (DIMENSIONS * ratio) + np.log(c2)),
        forward=float((kl(biased, q) @ weight).mean()),
        bound_b=float(information + DIMENSIONS * (ratio - 1 - np.log(ratio)) / 2),
        c1=float(c1),
        c2=float(c2),
    )


def draw(results: dict[str, list[Row]]) -> Figure:
    """One panel for each policy: both divergences and their bounds against sigma / s."""
    figure = Figure(figsize=(10.0, 4.2), layout="constrained")
    for axes, (name, rows) in zip(figure.subplots(1, 2, sharey=True), results.items(), strict=True):
        x = [row.sigma / BIAS_STD for row in rows]
        axes.plot(x, [row.forward for row in rows], "o-", color="C0", label="KL(mu || q)")
        axes.plot(x, [row.bound_b for row in rows], "--", color="C0", label="bound B")
        axes.plot(x, [row.reverse for row in rows], "s-", color="C1", label="KL(q || mu)")
        axes.plot(x, [row.bound_a for row in rows], "--", color="C1", label="bound A")
        axes.axvline(1.0, color="0.7", linewidth=0.8, zorder=0)
        axes.set(xscale="log", yscale="log", xlabel="sigma / s", title=name)
    figure.axes[0].set_ylabel("nats")
    figure.axes[0].legend(frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for theorem_1.png")
    out = parser.parse_args().out
    results = {
        name: [measure(policy, float(sigma)) for sigma in SIGMAS]
        for name, policy in policies().items()
    }
    for name, rows in results.items():
        print(f"policy: {name}; q = perturbed, mu = biased rollout policy; nats")
        print("sigma/s  KL(mu||q)  bound B  KL(q||mu)  bound A      C1      C2")
        for row in rows:
            print(
                f"{row.sigma / BIAS_STD:7.2f} {row.forward:10.5f} {row.bound_b:8.3f} "
                f"{row.reverse:10.5f} {row.bound_a:8.3f} {row.c1:7.4f} {row.c2:7.3g}"
            )
    out.mkdir(parents=True, exist_ok=True)
    draw(results).savefig(out / "theorem_1.png", dpi=150)


if __name__ == "__main__":
    main()
