"""The `--alp.*` and `--rollout.*` flags: every field is a flag, its docstring is the flag's help.

OpenRLHF hands one nested namespace to every process. Ours are carried by it as `args.alp`
(AlpConfig), `args.rollout_service` (ServiceConfig) and `args.tool_service` (ToolConfig), so that
nothing below the command line parses a flag again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from openrlhf_alp.alp import PerturbationConfig
from openrlhf_alp.clients.weights.gpu_carrier import Meeting
from openrlhf_alp.objective.methods import MAX_GEOMETRIC_WINDOW, METHODS, UnifiedRatioConfig
from services.rollout.wire.schemas import WeightTransport

MATH_VERIFY = "math-verify"
"""Value of --reward.remote_url that names our own reward; the default with a rollout service."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AlpConfig:
    """Adaptive Layerwise Perturbation, arXiv 2603.19470."""

    enable: bool = False
    """Train on the single ratio pi_theta,sigma / mu instead of OpenRLHF's own policy loss."""
    method: str = field(default="token-alp", metadata={"choices": sorted(METHODS)})
    """Ratio with its clip window: of a token, of a sequence (seq: the product over its tokens,
    eq. 3; gspo: their geometric mean, averaged over sequences). *-alp perturbs the forward pass of
    the update, *-bypass does not."""
    noise: PerturbationConfig = field(default_factory=PerturbationConfig)
    calibration_factor: float = 1.0
    """--alp.sigma0 auto aims at this multiple of the measured mismatch (k3 KL), as far as the clip
    window has room for it."""
    lr: float = 5e-4
    """Learning rate of log(sigma / sigma0), without weight decay; 0 keeps sigma fixed. The gradient
    is mostly noise (see alp/sigma_grad_snr), and Adam turns noise into a random walk."""
    clip_low_high: tuple[float, float] | None = field(
        default=None, metadata={"metavar": ("LOW", "HIGH")}
    )
    """Clip the ratio to [1-LOW, 1+HIGH]; default: the method's own window."""
    dual_clip: float | None = None
    """Dual clip c for negative advantages; default: the method's own."""
    sequence_ratio: Literal["product", "geometric"] | None = None
    """How a sequence method joins its tokens; default: the method's own. geometric needs a clip
    window of its own, which gspo-* have."""

    def __post_init__(self) -> None:
        if not 0 < self.calibration_factor < math.inf:
            raise ValueError(
                f"--alp.calibration_factor is {self.calibration_factor}; it must be above 0 and "
                "finite. For no noise at all use --alp.method *-bypass"
            )
        if not 0 <= self.lr < math.inf:
            raise ValueError(f"--alp.lr is {self.lr}; it must be 0 (fixed sigma) or above")
        self.ratio_config()

    @property
    def perturbed(self) -> bool:
        """Whether the update forward is noisy (ALP) or clean (Bypass)."""
        return self.enable and METHODS[self.method].perturbed

    @property
    def calibrates(self) -> bool:
        """Whether sigma0 is measured before the first update."""
        return self.perturbed and self.noise.sigma0 is None

    def ratio_config(self) -> UnifiedRatioConfig:
        """The method's ratio with what the flags change of it.

        Raises:
            ValueError: a value is out of range; the message names its flag.
        """
        preset = METHODS[self.method].ratio
        level = preset.level
        if self.sequence_ratio and level == "token":
            raise ValueError(
                f"--alp.sequence_ratio {self.sequence_ratio} has no effect on --alp.method "
                f"{self.method}, whose ratios are of single tokens. Drop it, or use a method seq-* "
                "or gspo-*"
            )
        if self.sequence_ratio == "product" and level == "geometric":
            raise ValueError(
                f"--alp.sequence_ratio product contradicts --alp.method {self.method}, which takes "
                "the geometric mean. Drop it, or use --alp.method seq-alp or seq-bypass"
            )
        if self.sequence_ratio == "geometric":
            level = "geometric"
        low, high = self.clip_low_high or (preset.clip_low, preset.clip_high)
        if level == "geometric" and max(low, high) > MAX_GEOMETRIC_WINDOW:
            raise ValueError(
                f"the clip window {low} {high} of --alp.clip_low_high or --alp.method is that of a "
                "product of ratios, which a geometric mean never leaves: nothing would be clipped. "
                "Use --alp.method gspo-alp or gspo-bypass, or set --alp.clip_low_high 3e-4 4e-4"
            )
        return replace(
            preset,
            level=level,
            clip_low=low,
            clip_high=high,
            dual_clip=preset.dual_clip if self.dual_clip is None else self.dual_clip,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig:
    """Where rollouts come from. Keys come from the environment and never travel with the args."""

    urls: tuple[str, ...] = field(default=(), metadata={"name": "service_urls", "metavar": "URL"})
    """Rollout services (python -m services.rollout); their keys come from
    $OPENRLHF_ALP_ROLLOUT_API_KEY and $OPENRLHF_ALP_ROLLOUT_ADMIN_KEY. Without it OpenRLHF starts
    its own vLLM engines."""
    request_timeout_s: float = 300.0
    """Longest time in seconds that a service may work on one request, from its first token on; its
    prompt's group is then dropped. After this time without any service the run ends."""
    queue_timeout_s: float = 3600.0
    """Longest wait for one request in seconds, queueing and retries included."""
    max_lost_share: float = field(default=0.5, metadata={"metavar": "SHARE"})
    """End the run when more than this share of a batch's groups is lost to slow, failed or invalid
    requests; a single group never ends it."""
    ready_timeout_s: float = 120.0
    """Longest wait for a service that is still starting, in seconds."""
    weight_transport: WeightTransport = "file"
    """How a weight push reaches the services; each verifies it by digest before it serves it. file:
    through the services' --weights-dir, which the learner must see (on one host it is in /dev/shm
    and needs no setting). http: no shared folder. nccl: broadcast to services on other GPUs. ipc:
    one learner process and one service on the same GPU. nccl and ipc have never run on a GPU."""
    weight_sync_host: str | None = field(default=None, metadata={"metavar": "ADDRESS"})
    """nccl: the learner's address as the services reach it; default: found by the route to the
    services."""
    weight_sync_port: int | None = field(default=None, metadata={"metavar": "PORT"})
    """nccl: TCP port where the services meet the learner; default: a free one for each push."""
    max_staleness: int | None = field(default=None, metadata={"metavar": "N"})
    """Drop groups with a token that was sampled more than N weight pushes ago (default: keep all).
    """
    preflight_every: int = field(default=0, metadata={"metavar": "N"})
    """Measure the log-prob mismatch of learner and rollouts at every N-th step, before its update,
    as preflight/*; a bad one is a warning (see openrlhf-alp preflight; default: off)."""
    preflight_stop: bool = False
    """End the run when that mismatch is broken."""
    metrics_jsonl: str | None = field(default=None, metadata={"prefix": "logger"})
    """File that gets one JSON object per step."""

    def __post_init__(self) -> None:
        # Clients join the path of a route to it.
        object.__setattr__(self, "urls", tuple(url.rstrip("/") for url in self.urls))
        for name, seconds in (
            ("request_timeout_s", self.request_timeout_s),
            ("queue_timeout_s", self.queue_timeout_s),
        ):
            if not seconds > 0:
                raise ValueError(f"--rollout.{name} is {seconds}; it must be above 0")
        if self.queue_timeout_s < self.request_timeout_s:
            raise ValueError(
                f"--rollout.queue_timeout_s {self.queue_timeout_s:g} includes the work itself, for "
                f"which --rollout.request_timeout_s allows {self.request_timeout_s:g}. Raise it to "
                "at least that."
            )
        if not 0 <= self.max_lost_share <= 1:
            raise ValueError(
                f"--rollout.max_lost_share is {self.max_lost_share}; it must be in 0..1. 1 never "
                "ends the run."
            )

    @property
    def meeting(self) -> Meeting:
        """Where learner and services meet for nccl."""
        return Meeting(host=self.weight_sync_host, port=self.weight_sync_port)
