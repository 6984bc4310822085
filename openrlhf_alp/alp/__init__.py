"""Adaptive Layerwise Perturbation (arXiv 2603.19470) in plain PyTorch.

One policy update:

    (seed, update, sample, position, layer)
                  |  noise.py
                  v
    tokens --> h_l + sigma_l * epsilon_l --> log pi_theta,sigma ----+
               perturbation.py, with enabled()                      |  ratio.py
                  ^                                                 v
                  |                              log r = log pi_theta,sigma - log mu
                  |                                                 |         ^
                  |                                                 |         +-- rollout engine
                  |  delta, theta                                   v  loss.py
                  +------------- optimizer <-- gradient -- clip(r) * advantage
                                                                    |
    calibration.py: sigma0 before step 1                            +--> telemetry.py: tails, KL

Nothing here knows OpenRLHF, Ray or vLLM. Outside `enabled()` the model is the clean model, bit for
bit; sigma never leaves the learner.
"""

from openrlhf_alp.alp.calibration import Calibration, calibrate_sigma0, k3_kl
from openrlhf_alp.alp.config import PerturbationConfig, parse_layers
from openrlhf_alp.alp.perturbation import (
    LayerwisePerturbation,
    SigmaSummary,
    attach,
    detached,
    find_decoder_layers,
)
from openrlhf_alp.objective.loss import (
    MAX_LOG_RATIO,
    METHODS,
    LossOutput,
    MethodPreset,
    NonFiniteLogProbError,
    UnifiedRatioConfig,
    masked_mean,
    unified_ratio_loss,
)
from openrlhf_alp.objective.ratio import per_token_log_ratio, token_log_ratio
from openrlhf_alp.objective.telemetry import METRICS, RatioTelemetry

__all__ = [
    "MAX_LOG_RATIO",
    "METHODS",
    "METRICS",
    "Calibration",
    "LayerwisePerturbation",
    "LossOutput",
    "MethodPreset",
    "NonFiniteLogProbError",
    "PerturbationConfig",
    "RatioTelemetry",
    "SigmaSummary",
    "UnifiedRatioConfig",
    "attach",
    "calibrate_sigma0",
    "detached",
    "find_decoder_layers",
    "k3_kl",
    "masked_mean",
    "parse_layers",
    "per_token_log_ratio",
    "token_log_ratio",
    "unified_ratio_loss",
]
