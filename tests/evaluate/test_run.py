"""A run over real services: every answer once, whatever the servers, kills and faults."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from inspect_ai.log import read_eval_log

from openrlhf_alp.cli.main import main
from openrlhf_alp.clients.errors import ContractMismatch, ServiceUnavailable, Unauthorized
from openrlhf_alp.data.sources import DataError
from openrlhf_alp.evaluate.comparison import compare_runs, comparison_markdown
from openrlhf_alp.evaluate.folder import FolderError, RunFolder
from openrlhf_alp.evaluate.records import unpack
from openrlhf_alp.evaluate.run import (
    EvaluationFailed,
    differences_of_graders,
    regrade,
    run_evaluation,
)
from openrlhf_alp.evaluate.store import StoreError
from openrlhf_alp.report.pass_at_k import write_pass_at_k
from services.rollout.settings import FaultPlan

# Inspect leaves a stream of anyio to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:Unclosed <MemoryObject:ResourceWarning")


class Killed(BaseException):
    """Stands for a signal that ends the process."""


def stored(run) -> dict[tuple[str, int], str]:
    answers = RunFolder(run.output).store("own")
    return {answer.key: answer.response for answer in answers}


def test_a_run_writes_numbers_that_inspect_agrees_with(servers, make_run, heard):
    run = make_run([servers.start()], n=4)
    results = run_evaluation(run, heard)
    (suite,) = results["suites"]
    assert (suite["num_problems"], suite["n"], servers.num_jobs) == (5, 4, 20)
    assert heard.counts == [("Own", 0, 20)] and heard.num_answers == 20

    (path,) = (run.output / "logs").glob("*.eval")
    log = read_eval_log(str(path))
    assert log.status == "success" and len(log.samples) == 20
    of_inspect = {score.reducer: score.metrics["mean"].value for score in log.results.scores}
    assert of_inspect["mean"] == pytest.approx(suite["avg"]["value"])
    for k in ("1", "2", "4"):
        assert of_inspect[f"pass_at_{k}"] == pytest.approx(suite["pass_at"][k]["value"])
    of_mean = next(score for score in log.results.scores if score.reducer == "mean")
    assert of_mean.metrics["stderr"].value == pytest.approx(suite["avg"]["stderr"])

    # Every number names the weights and the sampling it belongs to.
    assert log.eval.metadata["weights_digest"] == results["weights_digest"]
    assert log.eval.metadata["contract_hash"] == results["contract_hash"]
    assert log.eval.metadata["plan"]["temperature"] == 1.0
    answer = log.samples[0].metadata["answer"]
    assert answer["versions"] == [[0, results["weights_digest"]]]
    ids, logprobs = unpack("i", answer["token_ids"]), unpack("f", answer["logprobs"])
    ((start, end),) = answer["action_ranges"]
    assert end == len(ids) == len(logprobs) and all(one < 0 for one in logprobs[start:end])
    assert run.tokenizer.decode(ids[start:end], skip_special_tokens=True) == answer["response"]
    assert {by["num_problems"] for by in suite["by_subject"].values()} == {3, 2}

    text = (run.output / "results.md").read_text()
    assert "avg@4" in text and "nan" not in text.lower()
    assert write_pass_at_k(results, run.output / "pass_at_k.png").stat().st_size > 10_000


def test_servers_kills_and_restarts_change_neither_coverage_nor_answers(
    servers, make_run, heard, tmp_path
):
    """The same 20 answers from one server, and from two and three over two kills."""
    urls = [servers.start() for _ in range(3)]
    alone = make_run(urls[:1], output=tmp_path / "alone")
    run_evaluation(alone, heard)
    expected = stored(alone)
    assert len(expected) == 20 and len(set(expected.values())) > 3

    killed = make_run(urls[:2], output=tmp_path / "killed")
    before = servers.num_jobs
    for num_answers in (3, 6):
        heard.num_answers = 0
        heard.after_answer = kill_after(num_answers)
        with pytest.raises((Killed, EvaluationFailed)):
            run_evaluation(killed, heard)
        killed = replace(killed, rollout_urls=urls)
    heard.after_answer = lambda num: None
    results = run_evaluation(killed, heard)
    assert stored(killed) == expected
    assert results["suites"][0]["avg"] == RunFolder(alone.output).results()["suites"][0]["avg"]
    # What was under way at a kill is asked again under its id; a finished answer never is.
    assert servers.num_jobs - before <= 20 + 2 * killed.concurrency
    assert len(list((killed.output / "logs").glob("*.eval"))) == 1


def kill_after(num_answers: int):
    def after(num: int) -> None:
        if num >= num_answers:
            raise Killed

    return after


def test_greedy_answers_do_not_depend_on_the_number_of_servers(servers, make_run, heard, tmp_path):
    urls = [servers.start() for _ in range(2)]
    runs = [
        make_run(urls[:num], n=1, temperature=0.0, output=tmp_path / str(num)) for num in (1, 2)
    ]
    for run in runs:
        run_evaluation(run, heard)
    assert stored(runs[0]) == stored(runs[1])
    compared = compare_runs(*(run.output for run in runs))
    assert compared["average"]["value"] == 0.0 and compared["average"]["p_value"] == 1.0
    text = comparison_markdown(compared)
    assert "| Own | 5 |" in text and "not of the weights alone" not in text
    assert "Own: the difference is the same on every problem" in text


def test_a_comparison_says_what_was_asked_differently(servers, make_run, heard, tmp_path):
    run = make_run([servers.start()], n=1, output=tmp_path / "first")
    run_evaluation(run, heard)
    cooler = replace(run, plan=replace(run.plan, temperature=0.5), output=tmp_path / "second")
    run_evaluation(cooler, heard)
    text = comparison_markdown(compare_runs(run.output, cooler.output))
    assert "The difference is not of the weights alone: temperature 1.0 and 0.5.\n" in text


def test_more_answers_are_added_to_those_that_are_there(servers, make_run, heard):
    run = make_run([servers.start()], n=2)
    run_evaluation(run, heard)
    first = stored(run)
    results = run_evaluation(replace(run, n=4), heard)
    assert servers.num_jobs == 20 and results["n"] == 4
    assert first.items() <= stored(run).items()
    assert heard.counts[-1] == ("Own", 10, 20)


def renamed(run, name, **changes):
    """The run's suite under another name, with other fields of its problems."""
    (own,) = run.suites
    problems = tuple(replace(problem, **changes) for problem in own.problems)
    return replace(own, suite=replace(own.suite, name=name, title=name), problems=problems)


def test_a_suite_that_is_added_leaves_the_earlier_ones_as_they_are(servers, make_run, heard):
    run = make_run([servers.start()], n=1)
    run_evaluation(run, heard)
    added = replace(run, suites=[renamed(run, "other")])
    for again in (added, run):
        results = run_evaluation(again, heard)
        assert {suite["suite"] for suite in results["suites"]} == {"own", "other"}
    assert servers.num_jobs == 10
    before = stored(run)
    with pytest.raises(FolderError, match="problems of own"):
        run_evaluation(replace(run, suites=[renamed(run, "own", label="7")]), heard)
    assert stored(run) == before


def test_suites_whose_logs_have_one_name_keep_a_log_each(servers, make_run, heard):
    run = make_run([servers.start()], n=1)
    run = replace(run, suites=[renamed(run, "a_b"), renamed(run, "a-b")])
    for _ in range(2):
        run_evaluation(run, heard)
        logs = [read_eval_log(str(path), header_only=True) for path in run.output.glob("logs/*")]
        assert len(logs) == 2


def test_damaged_grades_and_unreadable_labels_are_said(servers, make_run, heard):
    run = make_run([servers.start()], n=2)
    run_evaluation(run, heard)
    grades = run.output / "grades" / "own.jsonl"
    lines = grades.read_text().splitlines(keepends=True)
    grades.write_text("".join(lines[1:]))
    with pytest.raises(FolderError, match="not 2 grades of each of 5 problems"):
        compare_runs(run.output, run.output)
    problems = run.output / "problems" / "own.json"
    table = json.loads(problems.read_text())
    table["problems"][1]["label"] = "\\frac{"
    problems.write_text(json.dumps(table))
    with pytest.raises(DataError, match=table["problems"][1]["id"]):
        regrade(run.output, num_workers=1, progress=heard)


def test_graders_are_not_compared_while_the_run_goes_on(servers, make_run, heard):
    run = make_run([servers.start()], n=1)
    run_evaluation(run, heard)
    owner = RunFolder(run.output)
    owner.open()
    with pytest.raises(FolderError, match="in use"):
        differences_of_graders(run.output, num_workers=1)
    owner.release()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("run.json", {"n": "4"}),
        ("run.json", {"plan": []}),
        ("results.json", {"suites": [1]}),
        ("results.json", {"suites": [{"suite": "own"}]}),
        ("problems/own.json", {"problems": [{"id": "1"}]}),
    ],
)
def test_a_file_of_another_shape_is_named_with_its_fix(servers, make_run, heard, name, change):
    run = make_run([servers.start()], n=1)
    run_evaluation(run, heard)
    path = run.output / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FolderError, match=f"{name} cannot be read: {next(iter(change))}"):
        if name == "results.json":
            compare_runs(run.output, run.output)
        else:
            regrade(run.output, num_workers=1, progress=heard)


def test_stored_answers_are_graded_again_without_a_server(servers, make_run, heard):
    run = make_run([servers.start()], n=2)
    before = run_evaluation(run, heard)
    problems = run.output / "problems" / "own.json"
    # The label of the second problem is corrected to what the policy says.
    content = json.loads(problems.read_text())
    content["problems"][1]["label"] = "5"
    problems.write_text(json.dumps(content))
    jobs = servers.num_jobs
    after = regrade(run.output, num_workers=1, progress=heard)
    said = [text for (problem, _), text in stored(run).items() if problem == "own:2"]
    gained = sum(text == "\\boxed{5}" for text in said) / 10
    assert gained > 0 and servers.num_jobs == jobs
    assert after["suites"][0]["avg"]["value"] == pytest.approx(
        before["suites"][0]["avg"]["value"] + gained
    )


def test_graders_are_compared_on_stored_answers(servers, make_run, heard):
    run = make_run([servers.start()], n=1, temperature=0.0)
    run_evaluation(run, heard)
    path = run.output / "answers" / "own.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    # math-verify works the sum out; ours wants the number.
    (first,) = (line for line in lines if line["problem_id"] == "own:1")
    first["response"] = "\\boxed{1 + 2}"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = differences_of_graders(run.output, num_workers=1)["own"]
    (difference,) = found["differences"]
    assert found["num_answers"] == 5
    assert (difference["ours"], difference["math_verify"]) == ("wrong", "right")
    assert difference["answer"] == "1 + 2"


def test_a_folder_takes_no_answers_of_other_sampling(servers, make_run, heard):
    run = make_run([servers.start()], n=1)
    run_evaluation(run, heard)
    with pytest.raises(
        FolderError, match=r"another run:\n  plan, temperature: 1\.0 then, 0\.5 now\n"
    ):
        run_evaluation(replace(run, plan=replace(run.plan, temperature=0.5)), heard)
    assert servers.num_jobs == 5


def test_a_folder_with_other_files_is_not_touched(servers, make_run, heard):
    run = make_run([servers.start()], n=1)
    run.output.mkdir()
    (run.output / "thesis.tex").write_text("mine")
    with pytest.raises(FolderError, match=r"holds thesis\.tex and no run\.json"):
        run_evaluation(run, heard)
    assert (run.output / "thesis.tex").read_text() == "mine"


def test_two_processes_do_not_share_a_folder(servers, make_run, heard):
    run = make_run([servers.start()], n=1)
    other = RunFolder(run.output)
    run.output.mkdir()
    other.lock()
    with pytest.raises(FolderError, match="in use by another evaluation"):
        run_evaluation(run, heard)
    other.release()


@pytest.mark.parametrize("wrong", ["folder", "template", "reference"])
def test_what_is_wrong_is_said_before_services_start(make_run, heard, wrong):
    run = make_run([], n=1)
    if wrong == "folder":
        run.output.mkdir()
        (run.output / "thesis.tex").write_text("mine")
    elif wrong == "template":
        run.tokenizer.chat_template = None
    else:
        (suite,) = run.suites
        problems = (replace(suite.problems[0], label="because " * 50), *suite.problems[1:])
        run = replace(run, suites=[replace(suite, problems=problems)])
    started = []
    with pytest.raises(DataError):
        run_evaluation(run, heard, start=lambda run: started.append(run) or run)
    assert not started


def test_a_lost_answer_is_named_and_asked_again(servers, make_run, heard):
    """A log-prob that is NaN costs its answer: no number is made of the others."""
    url = servers.start(FaultPlan(nan_at_token=6))
    run = make_run([url], n=2)
    with pytest.raises(
        EvaluationFailed, match=r"1 answers were lost, for example answer \d of own"
    ):
        run_evaluation(run, heard)
    assert len(stored(run)) == 9 and not (run.output / "results.json").exists()
    results = run_evaluation(run, heard)
    assert results["suites"][0]["num_problems"] == 5 and len(stored(run)) == 10


def test_the_command_says_with_its_status_that_a_run_is_not_finished(
    servers, policy, own_file, tmp_path, capsys
):
    url = servers.start(FaultPlan(nan_at_token=6))
    asked = ["evaluate", "--rollout_urls", url, "--tokenizer", str(policy), "--n", "1"]
    asked += ["--suite", str(own_file), "--problem_field", "q", "--label_field", "a"]
    asked += ["--template", "chat-bare", "--max_new_tokens", "16", "--workers", "1"]
    asked += ["--output", str(tmp_path / "run")]
    assert main(asked) == 1
    assert "1 answers were lost" in capsys.readouterr().out
    assert main(asked) == 0
    shown = capsys.readouterr().out
    assert "4 of 5 answers are there already" in shown and "| avg@1, % | own |" in shown


def test_a_server_with_another_tokenizer_is_refused_before_it_is_asked(
    servers, make_run, heard, tokenizer_of_others
):
    run = make_run([servers.start()], tokenizer=tokenizer_of_others)
    with pytest.raises(ContractMismatch, match="tokenizer_hash"):
        run_evaluation(run, heard)
    assert servers.num_jobs == 0 and not (run.output / "run.json").exists()


def test_a_missing_key_is_named_by_the_service(servers, make_run, heard, monkeypatch):
    run = make_run([servers.start()])
    monkeypatch.delenv("OPENRLHF_ALP_ROLLOUT_API_KEY")
    with pytest.raises(Unauthorized, match="The bearer key is missing or wrong"):
        run_evaluation(run, heard)


@pytest.fixture
def tokenizer_of_others(policy):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.add_tokens(["<think>"])
    return tokenizer


def test_a_full_disk_stops_the_run_and_keeps_what_is_stored(servers, make_run, heard):
    run = make_run([servers.start()], n=2, concurrency=1)
    answers = run.output / "answers" / "own.jsonl"

    def fill_the_disk(num: int) -> None:
        if num == 3:
            answers.rename(answers.with_name("kept"))
            answers.symlink_to("/dev/full")

    heard.after_answer = fill_the_disk
    with pytest.raises(
        StoreError, match=r"No space left on device\. The 3 answers before are safe"
    ):
        run_evaluation(run, heard)
    answers.unlink()
    answers.with_name("kept").rename(answers)
    heard.after_answer = lambda num: None
    run_evaluation(run, heard)
    assert len(stored(run)) == 10


def test_the_viewer_bundles_the_logs(servers, make_run, heard, tmp_path):
    """`inspect view bundle` makes a site of files that any web server can publish."""
    run = make_run([servers.start()], n=1)
    run_evaluation(run, heard)
    site = tmp_path / "site"
    inspect = Path(sys.executable).with_name("inspect")
    command = [str(inspect), "view", "bundle", "--log-dir", str(run.output / "logs")]
    subprocess.run([*command, "--output-dir", str(site)], check=True, capture_output=True)
    assert (site / "index.html").is_file()
    assert len(list((site / "logs").glob("*.eval"))) == 1


def test_a_service_that_does_not_answer_is_named_while_it_is_waited_for(
    servers, make_run, heard, monkeypatch
):
    limits = {"_NOTICE_S": 0.2, "_READY_S": 0.4}
    for name, seconds in limits.items():
        monkeypatch.setattr(f"openrlhf_alp.evaluate.run.{name}", seconds)
    dead = "http://127.0.0.1:9"
    with pytest.raises(ServiceUnavailable, match=r"127\.0\.0\.1:9"):
        run_evaluation(make_run([servers.start(), dead]), heard)
    (line,) = [line for line in heard.lines if line.startswith("waiting")]
    assert dead in line
