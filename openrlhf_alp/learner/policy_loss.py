"""The unified ratio in the shape of OpenRLHF's `PolicyLoss`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from openrlhf_alp.alp import LossOutput, UnifiedRatioConfig, unified_ratio_loss

Aggregate = Callable[..., Tensor]


class UnifiedPolicyLoss(nn.Module):
    """Takes the call and returns the 5-tuple of OpenRLHF 0.11.2's `PolicyLoss`.

    `old_log_probs` is not read: the rollout log-probs are the only denominator.

    Args:
        config: level, clip window and dual clip of the ratio.
        aggregate: OpenRLHF's `aggregate_loss`; it knows the global token and sample counts.
        token_level_loss: mean over all tokens of the optimizer step, or over samples.
    """

    def __init__(
        self, config: UnifiedRatioConfig, *, aggregate: Aggregate, token_level_loss: bool
    ) -> None:
        super().__init__()
        self.config = config
        self.aggregate = partial(aggregate, token_level_loss=token_level_loss)
        self.last_output: LossOutput | None = None

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor,
        rollout_log_probs: Tensor | None = None,
        **global_counts: float,
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """All tensors (B, T-1); returns (loss, clip fraction, approx KL, None, None).

        Raises:
            ValueError: no rollout log-probs.
            FloatingPointError: a log-prob on an action token is not finite.
        """
        if rollout_log_probs is None:
            raise ValueError(
                "the batch has no rollout log-probs, the denominator of the single ratio. Generate "
                "through --rollout.service_urls, or with OpenRLHF's engines and --alp.enable."
            )
        output = unified_ratio_loss(
            log_probs=log_probs,
            rollout_log_probs=rollout_log_probs,
            advantages=advantages,
            action_mask=action_mask,
            config=self.config,
            aggregate=partial(self.aggregate, **global_counts),
        )
        self.last_output = output
        # Upstream detaches what it logs, so numbers go back as tensors.
        clip_fraction, approx_kl = torch.tensor([output.clip_fraction, output.approx_kl])
        return output.loss, clip_fraction, approx_kl, None, None
