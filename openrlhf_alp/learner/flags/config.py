"""The `--alp.*`, `--rollout.*` and `--tool.*` flags, read once into frozen dataclasses.

OpenRLHF hands one nested namespace to every process. Ours ride on it as three objects, `args.alp`
(AlpConfig), `args.rollout_service` (ServiceConfig) and `args.tool_service` (ToolConfig); nothing
below the CLI parses a flag again.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Literal

from openrlhf_alp.alp import METHODS, PerturbationConfig, UnifiedRatioConfig
from openrlhf_alp.clients.channel import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE
from openrlhf_alp.learner.flags.tool import add_tool_arguments, check_tool, read_tool
from openrlhf_alp.learner.flags.transport import (
    TransportConfig,
    add_transport_arguments,
    check_transport,
    read_transport,
)

_OUR_FLAGS = (
    "--alp.", "--tool.", "--tir.", "--rollout.request_timeout_s", "--rollout.ready_timeout_s",
    "--rollout.weight_",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class AlpConfig:
    """Adaptive Layerwise Perturbation, section by section of arXiv 2603.19470."""

    enable: bool
    """Use the single ratio pi_theta,sigma / mu instead of OpenRLHF's own policy loss."""
    method: str
    """A key of `openrlhf_alp.alp.METHODS`: which ratio, perturbed or not, and its clip window."""
    sigma0: float | None
    """Standard deviation of the noise at the start, in units of the hidden state; None is `auto`.
    """
    sigma_kind: Literal["vector", "scalar"]
    """One sigma per hidden dimension (section 2.2) or one per layer (the authors' code)."""
    sigma_min: float
    sigma_max: float
    """Bounds of sigma; the gradient that pushes further outwards is dropped at a bound."""
    lr: float
    """Learning rate of log(sigma / sigma0); no weight decay."""
    layers: str
    """Which decoder layers are perturbed: `all`, `0-4`, `12,13` (section 4.3 compares)."""
    clip_low_high: tuple[float, float] | None
    """PPO clip (low, high); None takes the method's own."""
    dual_clip: float | None
    """Dual clip c for negative advantages; None takes the method's own."""
    sequence_ratio: Literal["product", "geometric"]
    """How a sequence-level method joins its tokens: eq. 3 (product) or the geometric mean."""
    seed: int
    """Key of the noise, beside update, sample, token and layer."""
    calibration_factor: float
    """`--alp.sigma0 auto` aims at this multiple of the measured learner-to-rollout mismatch (k3
    KL).
    """

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"--alp.method {self.method}: choose one of {', '.join(METHODS)}")
        if self.calibration_factor <= 0:
            raise ValueError(
                f"--alp.calibration_factor is {self.calibration_factor}; it must be above 0"
            )
        if self.lr < 0:
            raise ValueError(f"--alp.lr is {self.lr}; it must be 0 (fixed sigma) or above")
        self.ratio_config()
        if self.perturbed:
            self.perturbation_config()

    @property
    def perturbed(self) -> bool:
        """Whether the update forward is noisy (ALP) or clean (Bypass)."""
        return self.enable and METHODS[self.method].perturbed

    @property
    def calibrates(self) -> bool:
        """Whether sigma0 is measured before the first update."""
        return self.perturbed and self.sigma0 is None

    def perturbation_config(self) -> PerturbationConfig:
        # Until it is calibrated, sigma0 sits at the smallest allowed value.
        return PerturbationConfig(
            sigma0=self.sigma_min if self.sigma0 is None else self.sigma0,
            kind=self.sigma_kind,
            sigma_min=self.sigma_min,
            sigma_max=self.sigma_max,
            layers=self.layers,
            seed=self.seed,
        )

    def ratio_config(self) -> UnifiedRatioConfig:
        preset = METHODS[self.method].ratio
        geometric = preset.level == "sequence" and self.sequence_ratio == "geometric"
        low, high = self.clip_low_high or (preset.clip_low, preset.clip_high)
        return replace(
            preset,
            level="geometric" if geometric else preset.level,
            clip_low=low,
            clip_high=high,
            dual_clip=preset.dual_clip if self.dual_clip is None else self.dual_clip,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig:
    """Where rollouts come from. Keys come from the environment and never travel with the args."""

    urls: tuple[str, ...]
    """Base URLs of rollout services; empty means OpenRLHF's own in-process vLLM engines."""
    request_timeout_s: float
    """Longest time one episode may take, retries included."""
    ready_timeout_s: float
    """Longest wait for a service that is still starting."""
    max_staleness: int | None
    """Groups with a token older than this many pushes are dropped; None keeps all."""
    preflight_every: int
    """Measure the mismatch of learner and rollouts at every so many steps; 0 never."""
    preflight_stop: bool
    """End the run when that mismatch is broken."""
    metrics_jsonl: str | None
    """File that gets one JSON object per global step."""
    weights: TransportConfig = field(default_factory=TransportConfig)
    """How the policy's weights reach the services."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add our flags to OpenRLHF's parser; one `--help` then shows both."""
    _add_alp_arguments(parser.add_argument_group("Adaptive Layerwise Perturbation"))
    _add_service_arguments(parser.add_argument_group("rollout service and run folder"))
    add_tool_arguments(parser.add_argument_group("tool-integrated episodes"))
    for action in parser._actions:
        ours = any(option.startswith(_OUR_FLAGS) for option in action.option_strings)
        if ours and action.default not in (None, False, []) and action.help:
            action.help += " (default: %(default)s)"


def _sigma0(text: str) -> float | None:
    return None if text == "auto" else float(text)


_sigma0.__name__ = "number or 'auto'"


def _add_alp_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--alp.enable", action="store_true", help="train on the single ratio of --alp.method")
    add(
        "--alp.method",
        default="token-alp",
        choices=sorted(METHODS),
        help="token or sequence ratio; *-alp perturbs the update forward, *-bypass does not",
    )
    add(
        "--alp.sigma0",
        type=_sigma0,
        default="auto",
        metavar="SIGMA|auto",
        help="noise standard deviation at the start; auto measures the mismatch of learner and "
        "rollout service before step 1 and matches its KL (Theorem 1)",
    )
    add(
        "--alp.calibration_factor",
        type=float,
        default=1.0,
        help="auto: KL of noise / KL of mismatch",
    )
    add(
        "--alp.sigma", default="vector", choices=["vector", "scalar"], help="sigma per dim or layer"
    )
    add("--alp.sigma_min", type=float, default=1e-6, help="lower bound of sigma")
    add("--alp.sigma_max", type=float, default=0.1, help="upper bound of sigma")
    add("--alp.lr", type=float, default=1e-2, help="learning rate of log sigma, no weight decay")
    add("--alp.layers", default="all", help="decoder layers to perturb: all, 0-4, 12,13")
    add("--alp.clip_low_high", type=float, nargs=2, default=None, metavar=("LOW", "HIGH"),
        help="ratio window [1-LOW, 1+HIGH]; default is the method's own")  # fmt: skip
    add(
        "--alp.dual_clip", type=float, default=None, help="dual clip c; default is the method's own"
    )
    add(
        "--alp.sequence_ratio",
        default="product",
        choices=["product", "geometric"],
        help="sequence methods: product of token ratios (eq. 3) or their geometric mean",
    )
    add("--alp.seed", type=int, default=42, help="seed of the noise")


def _add_service_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--rollout.service_urls",
        nargs="+",
        default=[],
        metavar="URL",
        help=f"rollout services (python -m services.rollout); keys come from ${API_KEY_VARIABLE} "
        f"and ${ADMIN_KEY_VARIABLE}. Without it OpenRLHF starts its own vLLM engines",
    )
    add("--rollout.request_timeout_s", type=float, default=300.0, help="limit of one episode")
    add("--rollout.ready_timeout_s", type=float, default=120.0, help="wait for a starting service")
    add_transport_arguments(group)
    add(
        "--rollout.max_staleness",
        type=int,
        default=None,
        metavar="N",
        help="drop groups with a token sampled more than N weight pushes ago (default: keep all)",
    )
    add(
        "--rollout.preflight_every",
        type=int,
        default=0,
        metavar="N",
        help="measure the log-prob mismatch of learner and rollouts at every N-th step, before its "
        "update, as preflight/*; a bad one is a warning (see openrlhf-alp preflight; default: off)",
    )
    add(
        "--rollout.preflight_stop",
        action="store_true",
        help="end the run when that mismatch is broken",
    )
    add("--logger.metrics_jsonl", default=None, help="file that gets one JSON object per step")


def read_alp(flags: SimpleNamespace) -> AlpConfig:
    """AlpConfig from the parsed `args.alp` namespace."""
    return AlpConfig(
        enable=flags.enable,
        method=flags.method,
        sigma0=flags.sigma0,
        sigma_kind=flags.sigma,
        sigma_min=flags.sigma_min,
        sigma_max=flags.sigma_max,
        lr=flags.lr,
        layers=flags.layers,
        clip_low_high=tuple(flags.clip_low_high) if flags.clip_low_high else None,
        dual_clip=flags.dual_clip,
        sequence_ratio=flags.sequence_ratio,
        seed=flags.seed,
        calibration_factor=flags.calibration_factor,
    )


def read_service(args: SimpleNamespace) -> ServiceConfig:
    """ServiceConfig from the parsed `args`."""
    return ServiceConfig(
        urls=tuple(url.rstrip("/") for url in args.rollout.service_urls),
        request_timeout_s=args.rollout.request_timeout_s,
        ready_timeout_s=args.rollout.ready_timeout_s,
        max_staleness=args.rollout.max_staleness,
        preflight_every=args.rollout.preflight_every,
        preflight_stop=args.rollout.preflight_stop,
        metrics_jsonl=args.logger.metrics_jsonl,
        weights=read_transport(args),
    )


def settle(args: SimpleNamespace) -> SimpleNamespace:
    """Check our flags against OpenRLHF's and set what follows from them.

    Runs between OpenRLHF's parsing and its own validation.

    Raises:
        ValueError: flags that contradict each other; the message names them and the fix.
    """
    args.alp = read_alp(args.alp)
    args.rollout_service = read_service(args)
    args.tool_service = read_tool(args)
    if args.alp.enable:
        _settle_alp(args)
    if args.rollout_service.urls:
        _settle_service(args)
    check_transport(args)
    _check_staleness(args.rollout_service)
    _check_preflight(args)
    check_tool(args)
    return args


def _check_preflight(args: SimpleNamespace) -> None:
    service = args.rollout_service
    if service.preflight_every < 0 or (service.preflight_stop and not service.preflight_every):
        raise ValueError(
            f"--rollout.preflight_every is {service.preflight_every}; give the number of steps "
            "from one measurement to the next. 0 means never, which leaves "
            "--rollout.preflight_stop nothing to stop on."
        )
    if service.preflight_every and args.train.async_enable and not service.urls:
        raise ValueError(
            "--rollout.preflight_every with --train.async_enable needs --rollout.service_urls: the "
            "samples of a step are older than its weights, so fresh ones are asked of the service."
        )
    has_log_probs = service.urls or args.algo.advantage.is_correction_level != "off"
    if service.preflight_every and not has_log_probs:
        raise ValueError(
            "--rollout.preflight_every needs the log-probs of the rollouts: set "
            "--rollout.service_urls or --alp.enable."
        )


def _check_staleness(service: ServiceConfig) -> None:
    if service.max_staleness is None:
        return
    if service.max_staleness < 0:
        raise ValueError(
            f"--rollout.max_staleness is {service.max_staleness}; it must be 0 (only tokens of the "
            "version that is updated) or above. Leave it out to keep every group."
        )
    if not service.urls:
        raise ValueError(
            "--rollout.max_staleness needs --rollout.service_urls: OpenRLHF's own engines do not "
            "say which version sampled a token."
        )


def _settle_alp(args: SimpleNamespace) -> None:
    if args.rollout.top_p != 1.0:
        raise ValueError(
            f"--rollout.top_p is {args.rollout.top_p}, but the single ratio needs 1.0: the service "
            "reports log-probs of the truncated distribution, the learner those of the full one. "
            "Set --rollout.top_p 1.0."
        )
    if args.actor.policy_loss_type != "ppo":
        raise ValueError(
            f"--actor.policy_loss_type {args.actor.policy_loss_type} and --alp.enable exclude each "
            "other; drop the former, --alp.method chooses the loss."
        )
    if args.algo.advantage.is_correction_level != "off":
        raise ValueError(
            "--algo.advantage.is_correction_level corrects with a second ratio, --alp.enable has "
            "only one. Drop one of the two."
        )
    if args.ds.ring_attn_size > 1 or args.ds.tensor_parallel_size > 1:
        raise ValueError(
            "--alp.enable does not support ring attention or DeepSpeed tensor parallelism yet: the "
            "noise is keyed by token and hidden dimension, which they split. Set "
            "--ds.ring_attn_size 1 and --ds.tensor_parallel_size 1."
        )
    if args.actor.optim == "muon" and args.alp.perturbed:
        raise ValueError(
            "--actor.optim muon has no parameter group of its own for sigma in DeepSpeed; "
            "use --actor.optim adam with --alp.method *-alp."
        )
    if not args.rollout_service.urls:
        # OpenRLHF's engines return log-probs only when some correction is on; this one is inert,
        # because the loss that would read it is replaced.
        args.algo.advantage.is_correction_level = "token"


def _settle_service(args: SimpleNamespace) -> None:
    if args.train.agent_func_path:
        raise ValueError(
            "--train.agent_func_path runs inside OpenRLHF's own vLLM engines and cannot be "
            "combined with --rollout.service_urls; drop one of the two."
        )
    if args.data.max_images_per_prompt > 0:
        raise ValueError(
            "--rollout.service_urls serves text only; drop --data.max_images_per_prompt."
        )
    if args.ds.lora.rank > 0:
        raise ValueError(
            "--rollout.service_urls pushes full weights; LoRA adapters are not merged yet. "
            "Set --ds.lora.rank 0."
        )
    if args.algo.dynamic_filtering_enable:
        raise ValueError(
            "--algo.dynamic_filtering_enable divides by zero in OpenRLHF 0.11.2 when a group is "
            "dropped, which --rollout.service_urls does with a reward that cannot be computed; "
            "drop one of the two."
        )
    missing = [name for name in (API_KEY_VARIABLE, ADMIN_KEY_VARIABLE) if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"{' and '.join(missing)} not set: the rollout service prints its keys when it starts; "
            "export them, or start it with keys of your own."
        )
    args.vllm.num_engines = len(args.rollout_service.urls)
    args.vllm.sync_backend = "service"
    args.reward.remote_url = args.reward.remote_url or "math-verify"
