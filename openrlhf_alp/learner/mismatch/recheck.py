"""The preflight's figures again in mid-training, before a step's update.

At that moment the weights of the learner and of the service are the same, as they are in
`openrlhf-alp preflight`. A synchronous step's own samples were drawn from these weights; those of
an asynchronous one are older, so the service is asked for a few answers to the step's prompts.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch
from openrlhf.trainer.ppo_utils.experience import Experience, make_experience_batch

from openrlhf_alp.learner.mismatch.judge import Level, judge
from openrlhf_alp.learner.mismatch.measure import Mismatch, log_ratio, metrics_of, scorable

if TYPE_CHECKING:
    from openrlhf_alp.learner.actor import AlpActorPPOTrainer

logger = logging.getLogger(__name__)

NUM_FORWARDS = 4
"""Clean forwards of one micro-batch each, on every rank the same number: a forward is collective
under ZeRO-3. A few hundred tokens place the quantiles; the cost is that of a fraction of a step."""


def recheck(trainer: AlpActorPPOTrainer) -> dict[str, float]:
    """`preflight/*` of this step, the same numbers on every rank; none when there was no sample.

    Raises:
        RuntimeError: the mismatch is broken and `--rollout.preflight_stop` is set.
        ServiceError: asynchronous, and no service answers.
    """
    ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, _log_ratios(trainer))
    values = np.concatenate(ranks)
    if not values.size:
        logger.warning("preflight: nothing was measured, every group asked for was dropped")
        return {}
    mismatch = Mismatch.of(values)
    verdict = judge(mismatch.figures())
    summary = (
        f"preflight: {verdict.level}, k3 KL {mismatch.k3_kl:.2e} over {mismatch.num_tokens} tokens"
    )
    if verdict.level is Level.OK:
        logger.info(summary)
    else:
        summary = "; ".join((summary, *verdict.findings, "usual causes", *verdict.causes))
        logger.warning(summary)
    if verdict.level is Level.BROKEN and trainer.args.rollout_service.preflight_stop:
        raise RuntimeError(f"{summary} (--rollout.preflight_stop)")
    return metrics_of(mismatch, verdict)


def _log_ratios(trainer: AlpActorPPOTrainer) -> np.ndarray:
    """(N,) of the samples that this rank has to measure."""
    own = trainer.replay_buffer.items
    size = trainer.micro_train_batch_size
    samples = _fresh_samples(trainer) if trainer.args.train.async_enable else own
    parts: list[np.ndarray] = [np.zeros(0, dtype=np.float32)]
    for start in range(0, NUM_FORWARDS * size, size):
        rows = samples[start : start + size]
        # A rank without samples left takes part all the same, and counts none twice.
        batch = make_experience_batch(rows or own[:size], trainer.args.ds.packing_samples)
        ratios = log_ratio(trainer.actor, batch.to_device(torch.cuda.current_device()))
        parts += [ratios] if rows else []
    return np.concatenate(parts)


def _fresh_samples(trainer: AlpActorPPOTrainer) -> list[Experience]:
    """On rank 0 answers of the serving weights to prompts of this step; none on the others."""
    if torch.distributed.get_rank() != 0:
        return []
    args = trainer.args
    own = trainer.replay_buffer.items
    wanted = dict.fromkeys((item.prompts[0], item.labels[0]) for item in own)
    group = args.rollout.n_samples_per_prompt
    num_groups = max(1, NUM_FORWARDS * trainer.micro_train_batch_size // group)
    sampling = SimpleNamespace(
        temperature=args.rollout.temperature,
        top_p=args.rollout.top_p,
        top_k=-1,
        max_tokens=args.rollout.max_new_tokens,
    )
    engine = trainer.vllm_engines[0]
    groups = [
        engine.generate_responses.remote(
            prompt=prompt,
            label=label,
            sampling_params=sampling,
            max_length=args.data.max_len,
            hf_tokenizer=trainer.tokenizer,
            num_samples=group,
        )
        for prompt, label in list(wanted)[:num_groups]
    ]
    return scorable([response for answered in ray.get(groups) for response in answered])
