"""Adaptive Layerwise Perturbation (arXiv 2603.19470, section 2.2) in plain PyTorch.

    (seed, update, sample, position, layer)          calibration.py: sigma0 before the first update
                  |  noise.py                                |
                  v                                          v
    tokens --> h_l + sigma_l * epsilon_l --> log pi_theta,sigma --> openrlhf_alp.objective
               perturbation.py, with enabled()

Nothing here knows OpenRLHF, Ray or vLLM. Outside `enabled()` the model is the clean model, bit for
bit; sigma never leaves the learner.
"""

from openrlhf_alp.alp.calibration import Calibration, calibrate_sigma0
from openrlhf_alp.alp.config import PerturbationConfig, parse_layers
from openrlhf_alp.alp.draws import log_mean_exp_over_draws, mean_over_draws, repeat_rows
from openrlhf_alp.alp.perturbation import (
    LayerwisePerturbation,
    SigmaSummary,
    attach,
    detached,
)
from openrlhf_alp.alp.places import find_decoder, find_decoder_layers, find_output_layer

__all__ = [
    "Calibration",
    "LayerwisePerturbation",
    "PerturbationConfig",
    "SigmaSummary",
    "attach",
    "calibrate_sigma0",
    "detached",
    "find_decoder",
    "find_decoder_layers",
    "find_output_layer",
    "log_mean_exp_over_draws",
    "mean_over_draws",
    "parse_layers",
    "repeat_rows",
]
