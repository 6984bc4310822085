import os
import time

import pytest

from openrlhf_alp.report.compare.runs import NoRunsError, conditions, notes_of, read_runs

RISE = [0.1, 0.2, 0.3]


def test_a_run_folder_gives_method_seed_steps_and_digest(make_run):
    [run] = read_runs([make_run("a", RISE, seed=7)])
    assert (run.method, run.seed, run.state) == ("seq-alp", 7, "finished")
    assert [step.values["rollout/reward_mean"] for step in run.steps] == RISE
    assert len(run.digest) == 12 and run.commit.startswith("0123")
    assert run.notes == []


def test_runs_are_found_below_a_folder_and_counted_once(make_run, tmp_path):
    folder = make_run("sweep/a", RISE)
    make_run("sweep/b", RISE, seed=2)
    runs = read_runs([tmp_path / "runs", folder, folder / "metrics.jsonl"])
    assert [run.folder.name for run in runs] == ["a", "b"]


@pytest.mark.parametrize(("name", "said"), [("nowhere", "is no folder"), ("empty", "has no")])
def test_a_path_without_a_run_is_named(tmp_path, name, said):
    (tmp_path / "empty").mkdir()
    with pytest.raises(NoRunsError, match=said):
        read_runs([tmp_path / name])


def test_a_run_that_goes_on_and_one_that_ended_early_are_told_apart(make_run):
    live = make_run("live", RISE, finished=False)
    dead = make_run("dead", RISE, finished=False)
    yesterday = time.time() - 86400
    for name in ("metrics.jsonl", "recipe.toml"):
        os.utime(dead / name, (yesterday, yesterday))
    first, second = read_runs([live, dead])
    assert first.state == "still going" and "3 steps so far" in first.notes[0]
    assert second.state == "not finished" and "failed or was stopped" in second.notes[0]


def test_what_is_broken_or_missing_is_said_and_the_rest_is_kept(make_run):
    folder = make_run("a", RISE, metrics=lambda step: {"actor/kl": 0.1})
    (folder / "environment.json").write_text("[")
    (folder / "recipe.toml").unlink()
    [run] = read_runs([folder])
    assert len(run.steps) == 3 and run.method == "unknown" and run.seed is None
    said = " ".join(run.notes)
    for part in ("no recipe.toml", "environment.json cannot be read", "no metric begins with alp/"):
        assert part in said


def test_a_bad_line_of_metrics_is_said_and_the_other_steps_are_kept(make_run):
    folder = make_run("a", RISE)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("{}\n")
    [run] = read_runs([folder])
    assert len(run.steps) == 3 and "1 of the 4 lines" in run.notes[0] and "line 4" in run.notes[0]


def test_metrics_that_cannot_be_read_leave_the_rest_of_the_run(make_run):
    folder = make_run("a", RISE)
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").symlink_to("/proc/self/mem")  # opens, and fails to read
    [run] = read_runs([folder])
    assert run.method == "seq-alp" and run.digest == ""
    assert "metrics.jsonl cannot be read" in run.notes[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_may_not_be_read_is_named_and_its_neighbour_is_shown(make_run, tmp_path):
    make_run("open", RISE)
    closed = make_run("closed", RISE)
    closed.chmod(0)
    try:
        runs = read_runs([tmp_path / "runs"])
    finally:
        closed.chmod(0o755)
    assert [(run.folder.name, run.state) for run in runs] == [
        ("closed", "not readable"),
        ("open", "finished"),
    ]
    assert "may not read the folder" in runs[0].notes[0]


@pytest.mark.parametrize(
    ("results", "said"),
    [
        ('{"suites": null}', "suites: Input should be a valid list"),
        ('{"suites": [{"suite": "sums"}]}', "suites.0.title: Field required"),
    ],
)
def test_an_evaluation_of_another_shape_is_said_and_left_out(make_run, results, said):
    folder = make_run("a", RISE)
    (folder / "evaluation" / "after").mkdir(parents=True)
    (folder / "evaluation" / "after" / "results.json").write_text(results)
    [run] = read_runs([folder])
    assert run.evaluations == {} and said in run.notes[0]
    assert "evaluation after is not shown" in run.notes[0]


def test_values_of_another_type_in_recipe_and_environment_do_not_end_the_report(make_run):
    folder = make_run("a", RISE, environment={"commit": 5, "versions": ["torch"]})
    (folder / "recipe.toml").write_text("[run]\nseed = inf\ncondition = [1, 2]\n")
    [run] = read_runs([folder])
    assert run.seed is None and run.commit == "5" and run.versions == ""
    assert conditions([run]) == ["[1, 2]"]
    assert "run.seed is inf and no whole number" in run.notes[0]


def test_a_run_without_recipe_and_summary_is_not_called_finished(make_run):
    folder = make_run("a", RISE, finished=False)
    (folder / "recipe.toml").unlink()
    [run] = read_runs([folder])
    assert run.state == "unknown"


def test_conditions_are_the_settings_that_differ(make_run):
    runs = read_runs(
        [
            make_run("a", RISE),
            make_run("b", RISE, recipe='[rollout]\nsimulate_quantization = "int4"', seed=2),
            make_run("c", RISE, method="seq-bypass"),
        ]
    )
    assert conditions(runs) == [
        "simulate_quantization not set",
        "simulate_quantization=int4",
        "simulate_quantization not set",
    ]


def test_where_services_listen_is_no_condition(make_run):
    """A recipe of a later version also has keys that an earlier one lacks."""
    first = make_run("a", [0.1], recipe='[rollout]\nurls = ["http://one:8000"]\n')
    second = make_run("b", [0.1], seed=2, recipe="[rollout]\nport = 0\nmax_restarts = 5\n")
    assert conditions(read_runs([first, second])) == ["", ""]


def test_a_named_condition_stands_for_its_settings_and_what_differs_within_it_is_added(make_run):
    runs = read_runs(
        [
            make_run(name, RISE, condition=condition, recipe=f"[rollout]\nmax_num_seqs = {num}")
            for name, condition, num in (("a", "int4", 1), ("b", "int4", 2), ("c", "none", 3))
        ]
    )
    assert conditions(runs) == ["int4, max_num_seqs=1", "int4, max_num_seqs=2", "none"]


def test_different_tasks_and_commits_are_said_before_anything_is_compared(make_run):
    runs = read_runs(
        [
            make_run("a", RISE, recipe='[data]\ntask = "addition"'),
            make_run(
                "b",
                RISE,
                recipe='[data]\ntask = "multiplication"',
                environment={"commit": "f" * 40, "versions": {}},
            ),
        ]
    )
    said = " ".join(notes_of(runs))
    assert "different tasks (addition, multiplication)" in said
    assert "different commits: 0123456789ab, ffffffffffff" in said


def test_a_note_that_many_runs_share_is_said_once(make_run):
    folders = [make_run(name, RISE) for name in "abcdef"]
    for folder in folders:
        (folder / "environment.json").unlink()
    assert notes_of(read_runs(folders)) == [
        "a, b, c, d, e, f: there is no environment.json: commit and versions are unknown."
    ]


def test_a_run_that_failed_before_its_first_step_has_one_note(make_run):
    folder = make_run("a", [], finished=False)
    (folder / "metrics.jsonl").unlink()
    yesterday = time.time() - 86400
    os.utime(folder / "recipe.toml", (yesterday, yesterday))
    [run] = read_runs([folder])
    assert len(run.notes) == 1 and "after 0 steps" in run.notes[0]
    assert run.digest == ""
