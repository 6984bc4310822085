"""The `--alp.*` and `--rollout.*` flags: every field is a flag, its docstring is the flag's help.

OpenRLHF hands one nested namespace to every process. Ours are carried by it as `args.alp`
(AlpConfig), `args.rollout_service` (ServiceConfig) and `args.tool_service` (ToolConfig), so that
nothing below the command line parses a flag again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from openrlhf_alp.alp import PerturbationConfig
from openrlhf_alp.clients.weights.gpu_carrier import Meeting
from openrlhf_alp.objective.adapt import adapted
from openrlhf_alp.objective.config import ObjectiveConfig
from openrlhf_alp.objective.methods import DEFAULT_METHOD, METHODS, MethodPreset
from services.rollout.wire.schemas import WeightTransport

MATH_VERIFY = "math-verify"
"""Value of --reward.remote_url that names our own reward; the default with a rollout service."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AlpConfig:
    """Adaptive Layerwise Perturbation, arXiv 2603.19470."""

    enable: bool = False
    """Train with --alp.method instead of OpenRLHF's own policy loss; --alp.method alone does so as
    well."""
    method: str | None = field(default=None, metadata={"choices": sorted(METHODS)})
    """Loss of the policy: what its ratio divides by and spans, how it is clipped and corrected; see
    docs/methods.md (default with --alp.enable: token-alp). *-alp* perturbs the forward pass of the
    update, the others do not."""
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
    window of its own, which gspo* have."""
    correction_low_high: tuple[float, float] | None = field(
        default=None, metadata={"metavar": ("LOW", "HIGH")}
    )
    """Bounds beyond which tis, icepop, *-mis and trm truncate or mask; default: the method's
    own."""
    trust_region: float | None = field(default=None, metadata={"metavar": "DELTA"})
    """Largest divergence of dppo-*; default: the method's own."""
    record: str | None = field(default=None, metadata={"metavar": "DIR"})
    """Write every step's batch to DIR as one Parquet file: tokens, rollout log-probs, advantages,
    versions, tool calls. `openrlhf-alp replay` puts it through other methods. Works without
    --alp.enable too."""
    change_method: bool = False
    """Continue a checkpoint that another --alp.method has trained; without it that is refused."""
    dry_run: bool = field(default=False, metadata={"prefix": ""})
    """Check the flags, print what the update would do and end; needs no model, data, service or
    GPU."""

    telemetry_every: int = field(default=10, metadata={"metavar": "N"})
    """Every N-th step, starting with the first, measure a few of its sequences with the clean
    learner before and after the update, and log the envelope and every layer; 0 never does."""

    def __post_init__(self) -> None:
        # A method without --alp.enable would silently train with OpenRLHF's own loss.
        object.__setattr__(self, "enable", self.enable or self.method is not None)
        object.__setattr__(self, "method", self.method or DEFAULT_METHOD)
        if not 0 < self.calibration_factor < math.inf:
            raise ValueError(
                f"--alp.calibration_factor is {self.calibration_factor}; it must be above 0 and "
                "finite. For no noise at all use --alp.method *-bypass"
            )
        if self.telemetry_every < 0:
            raise ValueError(
                f"--alp.telemetry_every is {self.telemetry_every}; it must be 0 (never) or above"
            )
        if not 0 <= self.lr < math.inf:
            raise ValueError(f"--alp.lr is {self.lr}; it must be 0 (fixed sigma) or above")
        self.objective()

    @property
    def preset(self) -> MethodPreset:
        """The row of `--alp.method`."""
        return METHODS[self.method or DEFAULT_METHOD]

    @property
    def perturbed(self) -> bool:
        """Whether the update forward is noisy (ALP) or clean (the others)."""
        return self.enable and self.preset.perturbed

    @property
    def calibrates(self) -> bool:
        """Whether sigma0 is measured before the first update."""
        return self.perturbed and self.noise.sigma0 is None

    @property
    def needs_old_policy(self) -> bool:
        """Whether a step needs the clean learner's log-probs from before its first update."""
        return not self.enable or self.preset.objective.needs_old_policy

    def objective(self) -> ObjectiveConfig:
        """The method's objective with what the flags change of it.

        Raises:
            ValueError: a value is out of range, or a flag has no effect on the method; the message
                names the flag.
        """
        return adapted(
            self.preset.objective,
            method=self.method or DEFAULT_METHOD,
            clip_low_high=self.clip_low_high,
            dual_clip=self.dual_clip,
            sequence_ratio=self.sequence_ratio,
            correction_low_high=self.correction_low_high,
            trust_region=self.trust_region,
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
    reward_workers: int = field(
        default=1, metadata={"prefix": "reward", "name": "num_workers", "metavar": "N"}
    )
    """Processes per rollout engine that compare answers with --reward.remote_url math-verify. One
    grades some 40,000 short answers a minute."""
    metrics_jsonl: str | None = field(default=None, metadata={"prefix": "logger"})
    """File that gets one JSON object per step."""
    hold_steps: int = field(default=0, metadata={"prefix": "eval", "metavar": "N"})
    """After every N-th step, once the services serve its weights, make --eval.hold_file, which then
    holds the step's number, and wait until it is removed; `openrlhf-alp launch` evaluates meanwhile
    (default: off)."""
    hold_file: str | None = field(default=None, metadata={"prefix": "eval", "metavar": "FILE"})
    """The file of --eval.hold_steps."""

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
        if self.reward_workers < 1:
            raise ValueError(f"--reward.num_workers is {self.reward_workers}; it must be 1 or more")
        if self.hold_steps < 0 or bool(self.hold_steps) != bool(self.hold_file):
            raise ValueError(
                f"--eval.hold_steps is {self.hold_steps} and --eval.hold_file {self.hold_file}: "
                "give a number of steps with a file, or neither."
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
