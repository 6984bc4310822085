"""The command's options: what is wrong is said before anything starts."""

import json
import subprocess
import sys

import pytest

from openrlhf_alp.cli.main import main


@pytest.fixture
def evaluate(capsys, monkeypatch, tmp_path):
    """Runs the command; returns exit status and what it showed."""
    monkeypatch.setenv("COLUMNS", "300")

    def run(*flags: str):
        status = main(["evaluate", "--output", str(tmp_path / "run"), *flags])
        return status, capsys.readouterr().out

    return run


@pytest.fixture
def own(tmp_path):
    """Flags of a suite of one's own."""
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"q": "What is 1 + 2?", "a": "3"}) + "\n")
    return ["--suite", str(path), "--problem_field", "q", "--label_field", "a"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--n", "0"], "--n is 0; it must be 1 or above"),
        (["--limit", "0"], "--limit is 0"),
        (["--temperature", "-1"], "--temperature is -1.0; it must be in 0..2"),
        (["--top_p", "0"], "--top_p is 0.0; it must be above 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--tool_urls", "http://x"], "--tool_urls without --tir"),
        (["--template", "chat-tir"], "--template chat-tir asks for Python and --tir is not given"),
        (["--tir", "--template", "chat-math"], "does not ask for Python"),
        (["--tir", "--max_tool_turns", "-1"], "max_tool_turns=-1 is not possible"),
        (["--tool_session"], "--tool_session has no effect without --tir"),
        (["--label_field", "answer"], "nothing in answer. Its fields are a, q."),
    ],
)
def test_a_wrong_option_is_named(evaluate, own, tmp_path, flags, message):
    status, shown = evaluate("--model", "m", *own, *flags)
    assert status == 2 and message in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags", [["--n", "0"], ["--template", "chat-tir"], ["--label_field", "answer"]]
)
def test_a_wrong_option_does_not_wait_for_the_large_libraries(own, flags):
    asked = ["evaluate", "--model", "m", *own, *flags]
    program = (
        f"import sys; from openrlhf_alp.cli.main import main; print(main({asked!r}), "
        "*({'torch', 'transformers', 'inspect_ai'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "2", done


def test_a_policy_and_a_suite_are_needed(evaluate, own):
    assert "give --model DIR" in evaluate(*own)[1]
    assert "--suite is missing" in evaluate("--model", "m")[1]
    status, shown = evaluate("--model", "m", "--suite", "math50")
    assert status == 2 and "--suite math50: unknown. Give one of paper, math500" in shown


def test_services_of_ones_own_need_their_keys(evaluate, own, monkeypatch):
    for name in ("OPENRLHF_ALP_ROLLOUT_API_KEY", "OPENRLHF_ALP_TOOL_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    asked = ["--rollout_urls", "http://127.0.0.1:1", *own]
    assert "--rollout_urls needs --tokenizer DIR" in evaluate(*asked)[1]
    status, shown = evaluate(*asked, "--tokenizer", "m")
    assert status == 2 and "OPENRLHF_ALP_ROLLOUT_API_KEY is not set. The rollout" in shown
    status, shown = evaluate("--model", "m", *own, "--tir", "--tool_urls", "http://127.0.0.1:1")
    assert status == 2 and "OPENRLHF_ALP_TOOL_API_KEY is not set. The tool" in shown


def test_options_of_services_that_are_started_here_are_not_ignored(evaluate, own, monkeypatch):
    monkeypatch.setenv("OPENRLHF_ALP_ROLLOUT_API_KEY", "key")
    asked = ["--rollout_urls", "http://127.0.0.1:1", "--tokenizer", "m", *own]
    for flags in (["--num_servers", "2"], ["--engine", "hf"], ["--dtype", "float32"]):
        status, shown = evaluate(*asked, *flags)
        assert status == 2 and f"{flags[0]} has no effect with --rollout_urls" in shown


def test_a_mistyped_model_is_refused_before_a_service_starts(evaluate, own, tmp_path):
    status, shown = evaluate("--model", str(tmp_path / "nowhere"), *own)
    assert status == 2 and f"--model {tmp_path / 'nowhere'}: there is no such folder" in shown
    status, shown = evaluate("--model", str(tmp_path / "own.jsonl"), *own)
    assert status == 2 and "has no config.json" in shown and "model.path" not in shown
    assert not (tmp_path / "run").exists()


def test_the_known_sets_are_listed_unless_an_option_is_wrong(evaluate):
    status, shown = evaluate("--list", "--n", "0")
    assert status == 2 and "--n is 0" in shown
    status, shown = evaluate("--list")
    assert status == 0 and "| math500 | 500 | math500.jsonl |" in shown
    assert "paper: math500, minerva, olympiadbench, aime24, aime25" in shown


@pytest.mark.parametrize("flag", ["--regrade", "--compare_graders"])
def test_a_folder_that_is_no_run_is_named(evaluate, tmp_path, flag):
    status, shown = evaluate(flag, str(tmp_path / "none"))
    assert status == 2 and "is not a finished run of evaluate" in shown


def test_runs_without_results_are_not_compared(evaluate, tmp_path):
    status, shown = evaluate("--compare", str(tmp_path / "a"), str(tmp_path / "b"))
    assert status == 2 and "results.json does not exist" in shown
