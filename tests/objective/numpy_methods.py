"""The methods' per-token losses as their papers state them, in float64 NumPy, one loop per token.

Independent of the package: nothing of it is imported, no function is shared between methods.
Every function takes one sequence of action tokens: now, old, mu (log-probs) and the advantage.
"""

import numpy as np


def ppo(ratio, advantage, low, high):
    bounded = min(max(ratio, 1 - low), 1 + high)
    value = -min(ratio * advantage, bounded * advantage)
    return min(value, -10 * advantage) if advantage < 0 else value


def grpo(now, old, mu, advantage):
    return [ppo(np.exp(n - o), advantage, 0.2, 0.28) for n, o in zip(now, old, strict=True)]


def gspo(now, old, mu, advantage):
    s = np.exp(np.sum(now - old) / len(now))
    return [ppo(s, advantage, 3e-4, 4e-4)] * len(now)


def cispo(now, old, mu, advantage):
    weights = np.minimum(np.exp(now - old), 1.28)
    return list(-weights * advantage * now)


def tis(now, old, mu, advantage):
    return [min(np.exp(o - m), 2.0) * x
            for o, m, x in zip(old, mu, grpo(now, old, mu, advantage), strict=True)]  # fmt: skip


def icepop(now, old, mu, advantage):
    losses = []
    for n, o, m in zip(now, old, mu, strict=True):
        k = np.exp(o) / np.exp(m)
        losses.append(k * ppo(np.exp(n - o), advantage, 0.2, 0.28) if 0.5 <= k <= 5 else 0.0)
    return losses


def token_mis(now, old, mu, advantage):
    w = np.prod(np.exp(old - mu))
    return [w * x if w <= 5 else 0.0 for x in grpo(now, old, mu, advantage)]


def seq_mis(now, old, mu, advantage):
    w = np.prod(np.exp(old - mu))
    r = np.prod(np.exp(now - old))
    return [w * ppo(r, advantage, 0.5, 3.0) if w <= 5 else 0.0] * len(now)


def geo_mis(now, old, mu, advantage):
    w = np.exp(old - mu)
    mean = np.prod(w) ** (1 / len(w))
    keep = 0.999 <= mean <= 1.001
    return [keep * v * x for v, x in zip(w, grpo(now, old, mu, advantage), strict=True)]


def token_bypass(now, old, mu, advantage):
    return [ppo(np.exp(n - m), advantage, 0.2, 0.28) for n, m in zip(now, mu, strict=True)]


def seq_bypass(now, old, mu, advantage):
    return [ppo(np.prod(np.exp(now - mu)), advantage, 0.5, 3.0)] * len(now)


def gspo_bypass(now, old, mu, advantage):
    r = np.prod(np.exp(now - mu)) ** (1 / len(now))
    return [ppo(r, advantage, 3e-4, 4e-4)] * len(now)


def dppo(now, mu, advantage, divergence, threshold):
    losses = []
    for n, m in zip(now, mu, strict=True):
        p, q = np.exp(n), np.exp(m)
        beyond = divergence(p, q) > threshold
        blocked = beyond and ((advantage > 0 and p > q) or (advantage < 0 and p < q))
        losses.append(0.0 if blocked else -p / q * advantage)
    return losses


def dppo_tv(now, old, mu, advantage):
    return dppo(now, mu, advantage, lambda p, q: abs(p - q), 0.15)


def dppo_kl(now, old, mu, advantage):
    def kl(p, q):
        return q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))

    return dppo(now, mu, advantage, kl, 0.05)


def trm(now, old, mu, advantage):
    r = np.exp(now - mu)
    keep = max(r - 1 - np.log(r)) <= 0.2
    return [keep * x for x in token_bypass(now, old, mu, advantage)]


def token_alp_mis(now, old, mu, advantage):
    keep = np.prod(np.exp(now - mu)) <= 5
    return [keep * x for x in token_bypass(now, old, mu, advantage)]


def seq_alp_mis(now, old, mu, advantage):
    keep = np.prod(np.exp(now - mu)) <= 5
    return [keep * x for x in seq_bypass(now, old, mu, advantage)]


STATEMENTS = {
    "grpo": grpo,
    "gspo": gspo,
    "cispo": cispo,
    "tis": tis,
    "icepop": icepop,
    "token-mis": token_mis,
    "seq-mis": seq_mis,
    "geo-mis": geo_mis,
    "token-bypass": token_bypass,
    "seq-bypass": seq_bypass,
    "gspo-bypass": gspo_bypass,
    "dppo-tv": dppo_tv,
    "dppo-kl": dppo_kl,
    "trm": trm,
    # The numerator is an input of the loss, so ALP's formula is that of Bypass.
    "token-alp": token_bypass,
    "seq-alp": seq_bypass,
    "gspo-alp": gspo_bypass,
    "token-alp-mis": token_alp_mis,
    "seq-alp-mis": seq_alp_mis,
}


def loss(method, now, old, mu, advantages, mask):
    """Loss of a batch (B, A) of NumPy arrays: over tokens, for gspo* over sequences."""
    rows = [
        STATEMENTS[method](now[b][mask[b]], old[b][mask[b]], mu[b][mask[b]], advantages[b][0])
        for b in range(len(now))
        if mask[b].any()
    ]
    if method.startswith("gspo"):
        return np.mean([np.mean(row) for row in rows])
    return np.mean(np.concatenate([np.array(row) for row in rows]))
