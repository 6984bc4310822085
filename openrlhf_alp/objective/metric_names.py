"""The table of metric names: what every number that ALP logs means.

Imports no torch, so that a command line can print it before anything heavy is loaded.
"""

QUANTILES: dict[str, float] = {
    "p00_1": 0.001,
    "p01": 0.01,
    "p25": 0.25,
    "p50": 0.5,
    "p75": 0.75,
    "p99": 0.99,
    "p99_9": 0.999,
}
"""Suffix of a metric to the probability of its quantile."""

LEVELS: dict[str, tuple[str, str]] = {
    "token": ("", "log-ratio of a token, learner as it is trained (with its noise) over rollout"),
    "product": ("sequence_", "summed log-ratio of a sample's action tokens"),
    "geometric": ("geometric_", "mean log-ratio of a sample's action tokens"),
}
"""Level to the prefix of its metrics and to what is measured there."""

ENVELOPE_EDGES = (0.0, 0.001, 0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0)
"""Bins of the rollout probability, from rare tokens to certain ones: the tail that breaks a run is
that of rare tokens (arXiv 2603.19470, Figure 2)."""

ENVELOPE_PREFIX = "alp/envelope_"

ENVELOPE_QUANTILES = ("p01", "p50", "p99")

SIGNS = ("positive", "negative")

LAGS = ("0", "1", "2", "3_or_more")
"""Staleness of a sample's oldest token in weight pushes."""

CUTS = {
    "clip_low": "cut at 1 - clip_low",
    "clip_high": "cut at 1 + clip_high",
    "dual_clip": "cut by the dual clip",
    "mask": "left out by the method's mask or trust region",
    "guard": "whose log-ratio hit the overflow guard",
}
"""Name of what can cut a token's gradient to what it does."""

NUM_ENVELOPE_BINS = len(ENVELOPE_EDGES) - 1


def _ratio_meanings() -> dict[str, str]:
    table = {}
    for prefix, what in LEVELS.values():
        for suffix, probability in QUANTILES.items():
            table[f"alp/{prefix}log_ratio_{suffix}"] = f"{100 * probability:g} % quantile: {what}"
        table |= {
            f"alp/{prefix}log_ratio_mean": f"mean: {what}; its negative is the k1 KL",
            f"alp/{prefix}log_ratio_min": f"smallest: {what}",
            f"alp/{prefix}log_ratio_max": f"largest: {what}",
            f"alp/{prefix}k3_kl": f"k3 estimate of KL(rollout || trained learner) from the {what}",
            f"alp/{prefix}chi2": f"chi-square distance, mean of (ratio - 1)^2, from the {what}",
            f"alp/{prefix or 'token_'}ess": f"effective sample size over the number, in (0, 1], of "
            f"the weights exp of the {what}",
        }
    return table


def _envelope_meanings() -> dict[str, str]:
    table = {}
    for index in range(NUM_ENVELOPE_BINS):
        low, high = ENVELOPE_EDGES[index : index + 2]
        bracket = "]" if high == 1 else ")"
        where = f"of tokens with a rollout probability in [{low:g}, {high:g}{bracket}"
        table[f"alp/envelope_{index}_share"] = f"share {where}"
        for suffix in ENVELOPE_QUANTILES:
            table[f"alp/envelope_{index}_{suffix}"] = (
                f"{100 * QUANTILES[suffix]:g} % quantile of the log-ratio {where}"
            )
    return table


def _split_meanings() -> dict[str, str]:
    older = "learner without noise now over rollout: updates, older pushes and the engine together"
    parts = {
        "perturbation": "log-ratio of the learner with noise over the same without",
        "staleness": "log-ratio of the learner without noise now over before the step's updates",
        "mismatch": "log-ratio of learner over rollout engine with the same weights",
        "staleness_and_mismatch": f"log-ratio of the {older}",
    }
    table = {}
    for lag in LAGS:
        table[f"alp/lag_{lag}_share"] = f"action tokens of samples {lag} pushes old"
        first = lag == LAGS[0]
        for name in ("perturbation", *(list(parts)[1:3] if first else list(parts)[3:])):
            table[f"alp/lag_{lag}_{name}_mean"] = f"of samples {lag} pushes old, mean {parts[name]}"
            table[f"alp/lag_{lag}_{name}_rms"] = "its root mean square"
    return table


MEASURED: dict[str, str] = {
    "alp/clean_start_k3_kl": "k3 KL(rollout || learner without noise) before the step's updates",
    "alp/clean_k3_kl": "k3 KL(rollout || learner without noise) after the step's updates, the same "
    "quantity for ALP and Bypass (arXiv 2603.19470, Figure 3)",
    "alp/noisy_k3_kl": "the same with the noise of training; without a perturbation the same",
    "alp/entropy": "mean entropy of the learner without noise at the action tokens, in nats",
    **_split_meanings(),
}
"""Metrics of a few sequences at every `--alp.telemetry_every`-th step."""

METRICS: dict[str, str] = {
    **_ratio_meanings(),
    "alp/num_tokens": "action tokens of the step; 0 makes all ratios above read 0.0",
    **_envelope_meanings(),
    **{
        f"alp/{cut}_share_{sign}": f"of the action tokens with a {sign} advantage: share {what}"
        for sign in SIGNS
        for cut, what in CUTS.items()
    },
    **{f"alp/advantage_{sign}_tokens": f"tokens with a {sign} advantage" for sign in SIGNS},
    "alp/clip_fraction": "action tokens whose gradient the clip window cut",
    "alp/clip_low_fraction": "of these, cut at 1 - clip_low",
    "alp/clip_high_fraction": "of these, cut at 1 + clip_high",
    "alp/dual_clip_fraction": "action tokens cut by the dual clip",
    "alp/mask_fraction": "action tokens left out by the method's mask or trust region",
    "alp/guard_fraction": "action tokens whose log-ratio hit the overflow guard",
    "alp/approx_kl": "mean of rollout minus new log-prob (k1)",
    **MEASURED,
    "alp/sigma_grad_norm": "norm of the gradient of log sigma at the step's last optimizer step",
    "alp/weight_grad_norm": "norm of the gradient of the weights there; with the former it makes "
    "actor_grad_norm",
    "alp/sigma_mean": "mean sigma over perturbed layers and dimensions, in the unit of sigma0",
    "alp/sigma_min": "smallest sigma",
    "alp/sigma_max": "largest sigma",
    "alp/sigma_bound_share": "fraction of sigmas on --alp.sigma_min or --alp.sigma_max",
    "alp/sigma_grad_snr": "signal-to-noise of the gradient of log sigma over the step's "
    "micro-batches: 1 is pure noise, 0 says that fewer than 2 were there",
    "alp/layer_sigma_over_scale_min": "smallest over layers of sigma / median |h| now",
    "alp/layer_sigma_over_scale_max": "largest of it",
    "alp/layer_changed_share_min": "smallest over layers of the share of entries of h that the "
    "noise changed after rounding to the model's dtype",
    "alp/layer_changed_share_max": "largest of it",
    **{
        f"alp/layer_{place}_{figure}": f"{place} perturbed layer: {meaning}"
        for place in ("first", "middle", "last")
        for figure, meaning in (
            ("scale", "median |h| of its input in the step's first micro-batch"),
            ("sigma_over_scale", "its median sigma over that"),
            ("changed_share", "share of entries that the noise changed after rounding"),
        )
    },
    "alp/layer_variance_share_max": "largest share of one layer in what all layers' noise adds to "
    "the variance of the loss, to first order",
    "alp/layer_variance_share_argmax": "the layer with that share",
    **{
        f"alp/layer_<number>_{figure}": f"of each perturbed layer: {meaning}"
        for figure, meaning in (
            ("sigma", "median sigma, in the unit of the hidden states"),
            ("sigma_over_scale", "that over the median |h| of its input"),
            ("changed_share", "share of entries that the noise changed after rounding"),
            ("variance_share", "its share in what noise adds to the variance of the loss"),
        )
    },
    "alp/sigma0": "sigma where delta is 0: --alp.sigma0 or its calibration",
    "alp/mismatch_k3_kl": "at the start: k3 KL of the clean learner against the rollout engine",
    "alp/noise_k3_kl": "at the start: k3 KL against the clean learner that sigma0 adds to rounding",
    "alp/rounding_k3_kl": "at the start: k3 KL of noise that only changes roundings; 0 if not auto",
    "alp/clean_outside_share": "at the start: action tokens outside the clip window without noise",
    "alp/noisy_outside_share": "at the start: the same with the noise of sigma0",
}
"""Every metric of ALP, in the order of their sources: `RatioTelemetry.summary`, the loss, the
perturbation and its layers, and the start of a run, which every step repeats."""
