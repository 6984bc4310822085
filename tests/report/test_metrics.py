import pytest

from openrlhf_alp.objective import metric_names
from openrlhf_alp.report.metrics import (
    LOG_RATIO_QUANTILES,
    REWARD,
    MetricsFileError,
    MetricsFollower,
    StepMetrics,
    read_steps,
    reward_at_edges,
    salvage_steps,
)


def test_every_line_is_a_step(metrics_file):
    steps = read_steps(metrics_file)
    assert [step.step for step in steps] == [1, 2, 3]
    assert [step.values[REWARD] for step in steps] == [0.25, 0.5, 0.75]
    assert "global_step" not in steps[0].values


def test_tokens_per_second_are_samples_times_length_over_generation_time(metrics_file):
    """64 answers of 10 tokens in 4 s."""
    assert read_steps(metrics_file)[0].tokens_per_s == 160.0


def test_a_last_line_that_is_half_written_is_left_for_later(metrics_file, append):
    follower = MetricsFollower(metrics_file)
    append('{"global_step": 4, "rollout/rew')
    assert [step.step for step in follower.new_steps()] == [1, 2, 3]
    assert follower.new_steps() == []
    append('ard_mean": 1.0}\n')
    (step,) = follower.new_steps()
    assert (step.step, step.values) == (4, {REWARD: 1.0})
    assert step.tokens_per_s is None


def test_a_file_that_does_not_exist_yet_has_no_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    follower = MetricsFollower(path)
    assert follower.new_steps() == []
    path.write_text('{"global_step": 1}\n')
    assert [step.step for step in follower.new_steps()] == [1]


@pytest.mark.parametrize("line", ["{broken", "[1]", '{"reward": 1.0}', '{"global_step": null}'])
def test_a_whole_line_that_is_not_a_step_is_an_error_with_its_number(metrics_file, append, line):
    append(line + "\n")
    with pytest.raises(MetricsFileError, match=r"metrics\.jsonl, line 4: not the metrics"):
        read_steps(metrics_file)


def test_the_quantiles_are_metrics_that_training_really_logs():
    assert set(LOG_RATIO_QUANTILES.values()) <= metric_names.METRICS.keys()


def steps_with(*rewards: float) -> list[StepMetrics]:
    return [
        StepMetrics(step=number, values={REWARD: reward})
        for number, reward in enumerate(rewards, start=1)
    ]


def test_first_and_last_rewards_are_means_of_three_steps():
    edges = reward_at_edges(steps_with(0.0, 0.1, 0.2, 0.9, 0.4, 0.5, 0.6))
    assert edges == (pytest.approx(0.1), pytest.approx(0.5))


def test_too_few_steps_have_no_first_and_last():
    assert reward_at_edges(steps_with(0.0, 0.1, 0.2, 0.3, 0.4)) is None


def test_a_damaged_file_gives_its_other_steps_and_says_what_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    deep = "[" * 100_000
    path.write_text(
        '{"global_step": 1, "kl": 0.1, "reward": 0.5}\n'
        '{"global_step": 2, "kl": 0.\n'
        f"{deep}\n"
        '{"global_step": Infinity, "kl": 0.1}\n'
        '{"global_step": 2, "kl": NaN, "reward": 1e99, "note": "text"}\n'
        f'{{"global_step": 3, "kl": null, "reward": 1{"0" * 400}}}\n'
        '{"global_step": 1, "kl": 0.2, "reward": 0.75}\n'
        '{"global_step": 4, "kl": 0'
    )
    steps, notes = salvage_steps(path)
    assert [(step.step, dict(step.values)) for step in steps] == [
        (1, {"kl": 0.2, "reward": 0.75}),
        (2, {}),
        (3, {}),
    ]
    said = " ".join(notes)
    assert "3 of the 7 lines" in said and "(line 2, 3, 4)" in said
    assert "1 lines of metrics.jsonl repeat a step" in said
    assert "kl is not a finite number at 2 of 3 steps (step 2, 3)" in said
    assert "reward is not a finite number at 2 of 3 steps" in said
