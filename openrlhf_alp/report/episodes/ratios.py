"""Log-ratios of recorded tokens under a model: how far learner and engine are apart, and why.

total = log pi_sigma / mu  =  clean (log pi / mu)  +  noise (log pi_sigma / pi)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from openrlhf_alp.alp import PerturbationConfig
from openrlhf_alp.replay.bench.sigma import start_sigma
from openrlhf_alp.replay.files.read import require_model
from openrlhf_alp.replay.files.records import RecordedBatch
from openrlhf_alp.replay.learner import DTYPES, Learner, hash_of, load_model, load_tokenizer
from openrlhf_alp.replay.pick import digest_of
from openrlhf_alp.replay.tensors import micro_batches


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratios:
    """Of every sample of a batch, on its token axis."""

    clean: Sequence[np.ndarray]
    """(T,) float32 each: log pi / mu without noise; NaN where the token is no action."""

    noise: Sequence[np.ndarray]
    """(T,) float32 each: log pi_sigma / pi; NaN where the token is no action."""

    notes: Sequence[str]
    """How they were made, as sentences."""


@torch.no_grad()
def measure_ratios(
    batch: RecordedBatch,
    path: Path,
    model: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    sigma0: float | None = None,
    max_tokens: int = 1024,
) -> Ratios:
    """Runs the batch through a model twice, clean and with one draw of ALP's noise.

    Args:
        path: the batch's file, which errors name.
        model: folder or id of the weights that the step updated.
        sigma0: strength of the noise in units of each layer's |h|; None gives it the KL of the
            batch's own mismatch, as `--alp.sigma0 auto` does.
        max_tokens: of a micro-batch.

    Raises:
        ValueError: the model cannot be loaded, cannot have sampled the batch, or no token of the
            batch is an action.
    """
    layers = batch.info.training.get("alp", {}).get("noise", {}).get("layers", "all")
    seed = batch.info.seeds.get("noise", 0)
    learner = Learner(
        load_model(model, dtype=DTYPES[dtype], device=device),
        temperature=batch.info.temperature,
        noise=PerturbationConfig(sigma0=None, layers=layers, seed=seed),
    )
    tokenizer_hash = hash_of(load_tokenizer(model))
    require_model(batch, path, vocab_size=learner.vocab_size, tokenizer_hash=tokenizer_hash)
    notes = [_weights(batch, learner, model)]
    sigma0 = start_sigma(learner, batch.samples, max_tokens, sigma0)
    notes.append(
        f"The noise is one draw with sigma {sigma0:.3g} of each layer's |h| in layers {layers}, in "
        f"{dtype}; the run itself drew other noise."
    )
    longest = max(sample.num_tokens for sample in batch.samples) - 1
    shape = torch.Size((len(batch.samples), longest))
    batches = micro_batches(batch.samples, max_tokens)
    clean = learner.score(batches, shape).numpy()
    noisy = learner.score(batches, shape, noisy=True).numpy()
    found: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for row, sample in enumerate(batch.samples):
        mask, length = sample.action_mask, sample.num_tokens - 1
        ours: np.ndarray = np.zeros(sample.num_tokens, dtype=np.float32)
        moved = ours.copy()
        # Position t - 1 predicts token t.
        ours[1:], moved[1:] = clean[row, :length], noisy[row, :length] - clean[row, :length]
        found[0].append(np.where(mask, ours - sample.rollout_log_probs, np.float32(np.nan)))
        found[1].append(np.where(mask, moved, np.float32(np.nan)))
    return Ratios(clean=found[0], noise=found[1], notes=notes)


def _weights(batch: RecordedBatch, learner: Learner, model: str) -> str:
    recorded, own = batch.info.model_digest, digest_of(learner, batch)
    if not recorded:
        return f"The file does not say which weights sampled it; {model} is taken as given."
    if recorded == own:
        return f"The learner is {model}, the weights that this step updated ({own[:12]})."
    return (
        f"The learner is {model} with digest {own[:12]}, and the batch was recorded at "
        f"{recorded[:12]}: the clean log-ratios include the difference of these weights."
    )
