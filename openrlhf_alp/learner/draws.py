"""Forward passes of OpenRLHF's actor that average several draws of the noise (`--alp.draws`)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

from openrlhf.models import Actor
from torch import Tensor

from openrlhf_alp.alp import log_mean_exp_over_draws, mean_over_draws, repeat_rows


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
