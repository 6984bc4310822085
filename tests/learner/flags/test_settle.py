"""Flags that contradict each other are refused before anything starts."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from openrlhf_alp.alp import LayerwisePerturbation
from openrlhf_alp.learner.flags.config import AlpConfig
from openrlhf_alp.objective.methods import METHODS

Parse = Callable[..., SimpleNamespace]


def test_alp_is_off_by_default_and_then_nothing_of_upstream_changes(parse: Parse) -> None:
    args = parse()
    assert not args.alp.enable and not args.alp.perturbed
    assert args.algo.advantage.is_correction_level == "off"


def test_sigma0_is_measured_by_default(parse: Parse) -> None:
    alp = parse("--alp.enable").alp
    assert alp.noise.sigma0 is None and alp.calibrates
    unmeasured = LayerwisePerturbation(alp.noise, layers=(0,), hidden_size=4)
    assert unmeasured.sigma0 == alp.noise.sigma_min


def test_a_bypass_method_does_not_perturb(parse: Parse) -> None:
    alp = parse("--alp.enable", "--alp.method", "seq-bypass").alp
    assert not alp.perturbed and not alp.calibrates
    assert alp.objective().level == "sequence"


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_method_alone_switches_it_on_and_tells_whether_it_needs_the_old_policy(
    method: str,
) -> None:
    alp = AlpConfig(method=method)
    assert alp.enable and alp.objective() == METHODS[method].objective
    assert alp.perturbed == ("alp" in method)
    divides_by_old = ("grpo", "gspo", "cispo", "tis", "icepop", "token-mis", "seq-mis", "geo-mis")
    assert alp.needs_old_policy == (method in divides_by_old)


def test_alp_and_bypass_share_their_clip_window(parse: Parse) -> None:
    for level in ("token", "seq", "gspo"):
        windows = {
            (c.clip_low, c.clip_high, c.dual_clip)
            for kind in ("alp", "bypass")
            for c in [parse("--alp.enable", "--alp.method", f"{level}-{kind}").alp.objective()]
        }
        assert len(windows) == 1


def test_a_clip_window_given_by_hand_wins(parse: Parse) -> None:
    ratio = parse("--alp.enable", "--alp.clip_low_high", "0.1", "0.3").alp.objective()
    assert (ratio.clip_low, ratio.clip_high) == (0.1, 0.3)


@pytest.mark.parametrize("method", ["gspo-alp", "gspo-bypass"])
def test_the_geometric_mean_has_gspos_window_and_weighs_sequences_the_same(
    parse: Parse, method: str
) -> None:
    args = parse("--alp.enable", "--alp.method", method)
    ratio = args.alp.objective()
    assert (ratio.level, ratio.clip_low, ratio.clip_high) == ("geometric", 3e-4, 4e-4)
    assert args.actor.loss_agg_mode == "seq-mean-token-mean"
    assert args.alp.perturbed == (method == "gspo-alp")


def test_a_geometric_mean_with_a_window_given_by_hand_is_a_choice_of_seq_methods(
    parse: Parse,
) -> None:
    window = ("--alp.clip_low_high", "1e-3", "2e-3")
    args = parse(
        *("--alp.enable", "--alp.method", "seq-alp", "--alp.sequence_ratio", "geometric"), *window
    )
    ratio = args.alp.objective()
    assert (ratio.level, ratio.clip_low, ratio.clip_high) == ("geometric", 1e-3, 2e-3)
    assert args.actor.loss_agg_mode == "seq-mean-token-mean"


SEQ_GEOMETRIC = ["--alp.enable", "--alp.method", "seq-bypass", "--alp.sequence_ratio", "geometric"]


def test_without_a_service_upstreams_engines_are_asked_for_log_probs(parse: Parse) -> None:
    assert parse("--alp.enable").algo.advantage.is_correction_level == "token"


def test_with_a_service_there_is_one_engine_per_url(parse: Parse, service_keys: None) -> None:
    args = parse("--rollout.service_urls", "http://127.0.0.1:1/", "http://127.0.0.1:2")
    assert args.vllm.num_engines == 2
    assert args.rollout_service.urls == ("http://127.0.0.1:1", "http://127.0.0.1:2")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--alp.enable", "--rollout.top_p", "0.9"], "--rollout.top_p is 0.9"),
        (["--alp.enable", "--actor.policy_loss_type", "gspo"], "--actor.policy_loss_type gspo"),
        (
            ["--alp.enable", "--algo.advantage.is_correction_level", "seq"],
            "--algo.advantage.is_correction_level",
        ),
        (["--alp.enable", "--actor.eps_clip", "0.1"], "--alp.clip_low_high is its counterpart"),
        (
            ["--alp.method", "grpo", "--actor.eps_clip_low_high", "0.2", "0.28"],
            "--actor.eps_clip_low_high",
        ),
        (["--alp.enable", "--actor.dual_clip", "3"], "--alp.dual_clip is its counterpart"),
        (
            ["--alp.method", "tis", "--algo.advantage.is_correction_threshold", "2"],
            "--alp.correction_low_high is its counterpart",
        ),
        (["--alp.method", "grpo", "--alp.trust_region", "0.1"], "it has no trust region"),
        (["--alp.enable", "--actor.optim", "muon"], "--actor.optim muon"),
        (["--alp.enable", "--ds.ring_attn_size", "2"], "ring attention"),
        (["--alp.enable", "--alp.sigma0", "2"], "--alp.sigma0 is 2"),
        (
            ["--alp.enable", "--alp.sigma0", "0.5", "--alp.sigma_scale", "absolute"],
            r"--alp.sigma0 is 0.5; it must lie in \[1e-06, 0.1\]",
        ),
        (
            ["--alp.enable", "--alp.sigma_min", "0", "--alp.sigma_scale", "absolute"],
            "Set --alp.sigma_min 1e-6",
        ),
        (SEQ_GEOMETRIC, "Use --alp.method gspo-alp"),
        ([*SEQ_GEOMETRIC, "--alp.clip_low_high", "0.2", "0.28"], "Use --alp.method gspo-alp"),
        (
            ["--alp.enable", "--alp.method", "gspo-alp", "--alp.clip_low_high", "0.5", "3"],
            "set --alp.clip_low_high 3e-4 4e-4",
        ),
        (
            ["--alp.enable", "--alp.method", "gspo-alp", "--alp.sequence_ratio", "product"],
            "use --alp.method seq-alp",
        ),
        (["--alp.enable", "--alp.sequence_ratio", "geometric"], "no effect on --alp.method token"),
        (
            ["--alp.enable", "--actor.num_gpus_per_node", "4", "--train.batch_size", "8"],
            "--rollout.batch_size 2",
        ),
        (["--alp.enable", "--alp.lr", "inf"], "--alp.lr is inf"),
        (["--alp.enable", "--alp.lr", "nan"], "--alp.lr is nan"),
        (["--alp.enable", "--alp.dual_clip", "1"], "Set 10, or inf"),
        (["--alp.enable", "--alp.dual_clip", "nan"], "--alp.dual_clip is nan"),
        (["--alp.enable", "--ds.deepcompile"], r"Drop --ds\.deepcompile"),
        (["--alp.enable", "--alp.sigma_min", "1"], "--alp.sigma_min is 1"),
        (["--alp.enable", "--alp.lr", "-1"], "--alp.lr is -1"),
        (["--alp.enable", "--alp.dual_clip", "0.5"], "--alp.dual_clip is 0.5"),
        (["--alp.enable", "--alp.calibration_factor", "0"], "--alp.calibration_factor is 0"),
        (["--rollout.max_staleness", "1"], "needs --rollout.service_urls"),
        (["--rollout.preflight_every", "2"], "needs the log-probs of the rollouts"),
        (["--rollout.preflight_every", "2", "--alp.enable", "--train.async_enable"], "are older"),
        (["--rollout.preflight_every", "-2"], "--rollout.preflight_every is -2"),
        (["--rollout.preflight_stop"], "--rollout.preflight_every is 0"),
    ],
)
def test_contradictions_are_named(parse: Parse, flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(*flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train.agent_func_path", "agent.py"], "--train.agent_func_path"),
        (["--ds.lora.rank", "8"], "--ds.lora.rank 0"),
        (["--vllm.enable_sleep"], r"Drop --vllm\.enable_sleep"),
        (["--vllm.enable_sleep", "--train.colocate_all"], r"Drop --vllm\.enable_sleep"),
        (["--rollout.request_timeout_s", "0"], "--rollout.request_timeout_s is 0"),
        (["--rollout.queue_timeout_s", "9"], "--rollout.queue_timeout_s 9 includes the work"),
        (["--rollout.queue_timeout_s", "-1"], "--rollout.queue_timeout_s is -1"),
        (["--eval.hold_steps", "2"], "--eval.hold_steps is 2 and --eval.hold_file None"),
        (["--eval.hold_file", "f"], "--eval.hold_steps is 0 and --eval.hold_file f"),
        (["--rollout.max_lost_share", "1.5"], "--rollout.max_lost_share is 1.5"),
        (["--data.max_images_per_prompt", "1"], "serves text only"),
        (["--algo.dynamic_filtering_enable"], "divides by zero"),
        (["--reward.num_workers", "0"], "--reward.num_workers is 0"),
        (
            ["--reward.num_workers", "2", "--reward.remote_url", "http://127.0.0.1:1"],
            "--reward.num_workers 2 starts processes of the math reward",
        ),
        (["--rollout.max_staleness", "-1"], "--rollout.max_staleness is -1"),
    ],
)
def test_what_the_service_cannot_do_is_refused(
    parse: Parse, service_keys: None, flags: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        parse("--rollout.service_urls", "http://127.0.0.1:1", *flags)


def test_a_bypass_run_may_be_compiled(parse: Parse) -> None:
    flags = ("--alp.enable", "--alp.method", "token-bypass", "--ds.deepcompile")
    assert parse(*flags).ds.deepcompile


def test_missing_keys_are_named(parse: Parse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENRLHF_ALP_ROLLOUT_API_KEY", raising=False)
    monkeypatch.delenv("OPENRLHF_ALP_ROLLOUT_ADMIN_KEY", raising=False)
    with pytest.raises(ValueError, match="OPENRLHF_ALP_ROLLOUT_API_KEY and"):
        parse("--rollout.service_urls", "http://127.0.0.1:1")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--train.batch_size", "6", "--actor.num_gpus_per_node", "2"],
            r"--train\.batch_size 6 does not divide among 2 rank\(s\) .* multiple of 4",
        ),
        (["--train.batch_size", "1"], r"--train\.batch_size 1 does not divide .* multiple of 2"),
        (
            ["--actor.num_gpus_per_node", "4", "--train.batch_size", "8"],
            r"= 4 samples give 4 rank\(s\) no whole .*--rollout\.batch_size to a multiple of 4",
        ),
        (
            ["--rollout.n_samples_per_prompt", "3", "--rollout.batch_size", "1"],
            r"= 3 samples give 1 rank\(s\) .*--rollout\.batch_size to a multiple of 2",
        ),
        (
            ["--actor.num_gpus_per_node", "2", "--rollout.micro_batch_size", "4"],
            r"--rollout\.micro_batch_size to at most 2",
        ),
    ],
)
def test_a_batch_that_leaves_a_rank_idle_is_refused_with_the_fix(
    parse: Parse, flags: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        parse(*flags)
