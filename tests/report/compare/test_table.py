import pytest

from openrlhf_alp.report.compare.measures import MEASURES
from openrlhf_alp.report.compare.runs import conditions, read_runs
from openrlhf_alp.report.compare.table import compared_with, group, make_tables

OF = {measure.key: measure.of for measure in MEASURES}


def tables_of(folders, baseline=None):
    runs = read_runs(folders)
    tables = make_tables(group(runs, conditions(runs)), baseline)
    return {table.measure.key: table for table in tables}


def test_each_method_is_compared_with_its_twin_by_seed(make_run):
    """Final rewards 0.5 and 0.7 against 0.4 and 0.6: 0.1 on both seeds."""
    folders = [
        make_run(f"{method}{seed}", [reward] * 3, method=method, seed=seed)
        for method, rewards in (("seq-alp", (0.5, 0.7)), ("seq-bypass", (0.4, 0.6)))
        for seed, reward in enumerate(rewards)
    ]
    bypass, alp = tables_of(folders)["reward"].rows
    assert (bypass.method, bypass.compared_with) == ("seq-bypass", None)
    [cell] = alp.cells
    assert alp.compared_with == "seq-bypass"
    assert cell.interval.mean == pytest.approx(0.6)
    assert cell.difference.mean == pytest.approx(0.1) and cell.difference.num == 2
    assert [value for _, value in cell.of_runs] == pytest.approx([0.5, 0.7])


def test_a_measure_that_no_run_has_is_left_out_and_a_hole_is_none(make_run):
    folders = [
        make_run("a", [0.1] * 3),
        make_run("b", [0.1] * 2, method="grpo"),
    ]
    tables = tables_of(folders)
    assert "evaluation" not in tables and "entropy" not in tables
    grpo, alp = tables["reward"].rows
    assert grpo.cells == [None] and alp.cells[0] is not None


@pytest.mark.parametrize(
    ("method", "baseline", "found"),
    [
        ("seq-alp", None, "seq-bypass"),
        ("grpo", None, None),
        ("seq-bypass", None, "grpo"),
        ("token-alp", None, "grpo"),
        ("seq-bypass", "grpo", "grpo"),
        ("seq-alp", "tis", None),
    ],
)
def test_what_a_row_is_compared_with(method, baseline, found):
    methods = ["grpo", "seq-bypass", "token-alp", "seq-alp"]
    assert compared_with(method, methods, baseline) == found


def test_collapse_is_a_final_reward_below_half_of_the_best(make_run):
    good, bad = read_runs(
        [
            make_run("good", [0.2, 0.8, 0.8, 0.8, 0.5, 0.5, 0.5]),
            make_run("bad", [0.2, 0.8, 0.8, 0.8, 0.1, 0.1, 0.1]),
        ]
    )
    assert OF["collapsed"](good) == 0.0
    assert OF["collapsed"](bad) == 1.0


def test_spikes_and_tails_are_counted_over_all_steps(make_run):
    """The median KL is 0.01, so that 0.06 is a spike and 0.04 is none."""
    kl = {1: 0.01, 2: 0.06, 3: 0.01, 4: 0.04, 5: 0.01}
    [run] = read_runs(
        [
            make_run(
                "a",
                [0.5] * 5,
                metrics=lambda step: {
                    "alp/k3_kl": kl[step],
                    "alp/log_ratio_p99_9": step / 10,
                    "alp/log_ratio_p00_1": -step / 5,
                },
            )
        ]
    )
    assert OF["spikes"](run) == 1.0
    assert OF["tail"](run) == 1.0
    assert OF["kl"](run) == 0.06


def test_runs_with_the_same_seed_are_named_and_paired_by_their_mean(make_run):
    """Seed 1 of seq-alp has 0.5 and 0.7, so 0.6 against 0.4."""
    folders = [
        make_run("a", [0.5] * 3),
        make_run("again", [0.7] * 3),
        make_run("b", [0.4] * 3, method="seq-bypass"),
    ]
    _, alp = tables_of(folders)["reward"].rows
    assert alp.cells[0].difference.mean == pytest.approx(0.2)
    runs = read_runs(folders)
    bypass, ours = group(runs, conditions(runs))
    assert list(bypass.repeated()) == []
    assert "Seed 1 of seq-alp has 2 runs (a, again)" in next(ours.repeated())
