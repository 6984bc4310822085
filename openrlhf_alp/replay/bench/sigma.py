"""Sigma of a replay: the unit of each layer, and sigma0 with the KL of the batch's own mismatch.

The same measurement as before the first step of a run (`--alp.sigma0 auto`), on recorded tokens.
"""

from collections.abc import Sequence

import torch

from openrlhf_alp.alp import calibrate_sigma0
from openrlhf_alp.objective.ratio import k3_kl
from openrlhf_alp.replay.files.records import RecordedSample
from openrlhf_alp.replay.learner import Learner
from openrlhf_alp.replay.tensors import BatchTensors, MicroBatch, batch_tensors, micro_batches

NUM_SAMPLES = 16
"""Samples that are measured on; as many as a run takes."""


@torch.no_grad()
def start_sigma(
    learner: Learner, samples: Sequence[RecordedSample], max_tokens: int, sigma0: float | None
) -> float:
    """Set the layers' scales and sigma0 of the learner's perturbation; returns sigma0.

    Args:
        max_tokens: of a micro-batch, all draws together.
        sigma0: None to match the KL of noise and mismatch.

    Raises:
        ValueError: the batch has no action token, or no sigma gives that KL.
    """
    perturbation = learner.perturbation
    assert perturbation is not None, "the learner was built without noise"
    chosen = evenly(samples)
    if not chosen:
        raise ValueError("no sample of the batch has an action token; there is nothing to replay")
    batch = batch_tensors(chosen)
    clean = _observed(learner, micro_batches(chosen, max_tokens), batch)
    if sigma0 is not None:
        perturbation.sigma0 = sigma0
        return sigma0
    batches = micro_batches(chosen, max_tokens // learner.draws)
    mismatch = k3_kl(clean, batch.rollout_log_probs, batch.action_mask)
    perturbation.sigma0 = calibrate_sigma0(
        lambda sigma: _noise_kl(learner, batches, batch, clean, sigma),
        mismatch,
        sigma_min=perturbation.sigma_min,
        sigma_max=perturbation.sigma_max,
    ).sigma0
    return perturbation.sigma0


def evenly(samples: Sequence[RecordedSample]) -> list[RecordedSample]:
    """At most NUM_SAMPLES with an action: neighbours are answers to one prompt."""
    usable = [sample for sample in samples if sample.action_ranges]
    count = min(NUM_SAMPLES, len(usable))
    return [usable[i * len(usable) // count] for i in range(count)]


def _observed(learner: Learner, batches: Sequence[MicroBatch], batch: BatchTensors) -> torch.Tensor:
    """Clean log-probs, (B, A); sets the scales on the way."""
    perturbation = learner.perturbation
    assert perturbation is not None
    found = torch.zeros_like(batch.rollout_log_probs)
    sums = dict.fromkeys(perturbation.layers, 0.0)
    total = 0.0
    for micro in batches:
        with perturbation.observed(micro.attention_mask.to(learner.device)) as observer:
            found += learner.score([micro], found.shape)
        weight = float(micro.attention_mask.sum())
        total += weight
        for layer, figures in observer.figures().items():
            sums[layer] += weight * figures.scale
    perturbation.set_scales({layer: value / total for layer, value in sums.items()})
    return found


def _noise_kl(
    learner: Learner,
    batches: Sequence[MicroBatch],
    batch: BatchTensors,
    clean: torch.Tensor,
    sigma: float,
) -> float:
    assert learner.perturbation is not None
    with learner.perturbation.probed(sigma):
        noisy = learner.score(batches, clean.shape, noisy=True)
    return k3_kl(noisy, clean, batch.action_mask)
