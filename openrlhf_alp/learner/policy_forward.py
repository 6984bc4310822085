"""How an update runs OpenRLHF's actor: logits of actions only, and several draws of the noise.

Letters: K draws, B samples, T tokens, M real tokens, P predictions that are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import openrlhf.models.actor
import torch
from openrlhf.models import Actor
from openrlhf.trainer.ppo_utils.experience import Experience
from torch import Tensor, nn

from openrlhf_alp.alp import (
    find_decoder_layers,
    find_output_layer,
    log_mean_exp_over_draws,
    mean_over_draws,
    repeat_rows,
)
from openrlhf_alp.learner.strategy import perturbation_of, unwrap


def logits_of_actions(actor: Actor, batch: Experience) -> AbstractContextManager[None]:
    """Inside, `actor(sequences, action_mask, ..)` computes no logits that nothing is trained on.

    Upstream turns every token into V float32 logits, and multiplies by 0 what belongs to a prompt,
    to a tool's output or to padding. Those are the largest tensors of an update, and the output
    layer is a fifth of a small model's work. Log-probs off the mask are 0 as before, and so are
    their gradients; entropies there become 0. Nothing is changed where the output layer is
    perturbed, because its noise is keyed by the token.

    Args:
        actor: the policy; its next forward passes are of this batch.
        batch: with `action_mask` (B, A) of the last A predictions and `attention_mask` (B, T).
    """
    model, perturbation = unwrap(actor), perturbation_of(actor)
    if perturbation is not None and len(find_decoder_layers(model)) in perturbation.layers:
        return nullcontext()
    return _taking(find_output_layer(model), _WantedRows(actor, batch))


@contextmanager
def _taking(output_layer: nn.Module, rows: _WantedRows) -> Iterator[None]:
    upstream = openrlhf.models.actor
    of_logits, entropy_of_logits = upstream.log_probs_from_logits, upstream.compute_entropy

    def log_probs(logits: Tensor, labels: Tensor) -> Tensor:
        return rows.place(of_logits(logits, rows.of(labels)))

    def entropy(logits: Tensor) -> Tensor:
        return rows.place(entropy_of_logits(logits))

    take = output_layer.register_forward_pre_hook(rows.take)
    with (
        mock.patch.object(upstream, "log_probs_from_logits", log_probs),
        mock.patch.object(upstream, "compute_entropy", entropy),
    ):
        try:
            yield
        finally:
            take.remove()


class _WantedRows:
    """The predictions of a micro-batch that an action follows, among all that a forward makes."""

    def __init__(self, actor: Actor, batch: Experience) -> None:
        real, actions = batch.attention_mask.bool(), batch.action_mask.bool()
        wanted = torch.zeros_like(real)
        # The last token predicts nothing that was sampled.
        wanted[:, -1 - actions.shape[1] : -1] = actions
        # As upstream: with packing padding is removed, and the samples are joined in one row.
        self._wanted = wanted[real] if actor.packing_samples else wanted.flatten()
        self._shape = torch.Size()
        self._index = torch.empty(0)

    def take(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Forward pre-hook of the output layer: hidden states (.., .., D) -> (1, P, D)."""
        self._shape = args[0].shape[:2]  # (K * B, T), or (1, K * M)
        draws = self._shape.numel() // self._wanted.numel()
        index = self._wanted.repeat(draws).nonzero().flatten()
        # A pass without an action computes one prediction, so that no tensor is empty.
        self._index = index if index.numel() else index.new_zeros(1)
        return self.of(args[0]), *args[1:]

    def of(self, values: Tensor) -> Tensor:
        """(K * B, T, ..) or (1, K * M, ..) -> (1, P, ..)."""
        return values.flatten(0, 1).index_select(0, self._index)[None]

    def place(self, values: Tensor) -> Tensor:
        """(1, P) -> where they belong among zeros, (K * B, T) or (1, K * M)."""
        zeros = values.new_zeros(self._shape.numel())
        return zeros.index_copy(0, self._index, values.flatten()).view(self._shape)


def averaging(actor: Actor, draws: int) -> AbstractContextManager[Any]:
    """Inside, `actor(sequences, action_mask, ..)` gives the log of the mean probability.

    The samples go through the model `draws` times in one batch, within
    `LayerwisePerturbation.enabled()`, which gives each copy noise of its own. With 1 nothing is
    changed.
    """
    if draws == 1:
        return nullcontext()
    forward = actor.forward

    def averaged(
        sequences: Tensor,
        action_mask: Tensor,
        attention_mask: Tensor,
        return_output: bool = False,
        **options: Any,
    ) -> Any:
        log_probs, output = forward(
            repeat_rows(sequences, draws),
            repeat_rows(action_mask, draws),
            attention_mask=repeat_rows(attention_mask, draws),
            return_output=True,
            **options,
        )
        # Off the mask every copy holds 0.0, which the logarithm keeps but for rounding.
        log_probs = log_mean_exp_over_draws(log_probs, draws) * action_mask
        if options.get("return_entropy"):
            output.entropy = mean_over_draws(output.entropy, draws)
        return (log_probs, output) if return_output else log_probs

    return mock.patch.object(actor, "forward", averaged)
