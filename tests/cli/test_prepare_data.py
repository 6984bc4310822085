"""The command as a user calls it, with the real reward and a real tokenizer."""

import json

import datasets
import pytest
from openrlhf.datasets.prompts_dataset import PromptDataset
from openrlhf.datasets.utils import blending_datasets

from benchmarks.policies.tiny_policy import make_tokenizer
from openrlhf_alp.cli.main import main
from openrlhf_alp.data.templates import TEMPLATES
from openrlhf_alp.evaluate.folder import RESULTS_FILE, Identity, RunFolder, write_json
from openrlhf_alp.evaluate.records import Grade
from openrlhf_alp.evaluate.suites import find_suites, load_suite

ROWS = [
    {"problem": "What is $3 + 4$?", "answer": "7", "unique_id": "a"},
    {"problem": "What is 3 times 4?", "answer": "12", "unique_id": "b"},
    {"problem": "What is $3+4$?", "answer": "7", "unique_id": "c"},
    {"problem": "Say something.", "answer": "???", "unique_id": "d"},
    {"problem": "What is 2 + 2?", "answer": None, "unique_id": "e"},
]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def prepare(source, tmp_path, capsys, monkeypatch):
    """Runs the command into `out.jsonl`; returns exit status, what it showed, and the rows."""
    monkeypatch.setenv("COLUMNS", "300")  # so that no line of the output is broken
    out = tmp_path / "out.jsonl"

    def run(*flags):
        status = main(["prepare-data", "--from", str(source), "--to", str(out), *flags])
        lines = out.read_text().splitlines() if out.exists() else []
        return status, capsys.readouterr().out, [json.loads(line) for line in lines]

    return run


def read_by_openrlhf(path, tokenizer, *, apply_chat_template):
    """Prompts and labels as a training run with this flag gets them."""

    class Data:
        input_key, label_key, image_key = "input", "label", "images"

    class Args:
        data, use_ms = Data(), False

    class Strategy:
        args = Args()

        def print(self, *_):
            pass

        def is_rank_0(self):
            return False

    Data.apply_chat_template = apply_chat_template
    rows = blending_datasets(str(path), strategy=Strategy())
    dataset = PromptDataset(rows, tokenizer, Strategy())
    return dataset.prompts, dataset.labels, dataset.datasources


@pytest.mark.parametrize("name", TEMPLATES)
def test_openrlhfs_own_dataset_reads_every_template(prepare, tmp_path, monkeypatch, name):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    status, shown, _ = prepare("--template", name)
    assert status == 0

    class Tokenizer:
        def apply_chat_template(self, chat, *, tokenize, add_generation_prompt):
            return "".join(f"<{message['role']}>{message['content']}" for message in chat)

    prompts, labels, sources = read_by_openrlhf(
        tmp_path / "out.jsonl",
        Tokenizer(),
        apply_chat_template="--data.apply_chat_template" in shown,
    )
    assert labels == ["7", "12"]
    assert sources == ["sums", "sums"]
    assert all("What is" in prompt for prompt in prompts)
    assert all(prompt.startswith("<") == TEMPLATES[name].is_chat for prompt in prompts)


def test_the_counts_are_shown_and_written_and_the_rejected_rows_are_there(prepare, tmp_path):
    status, shown, rows = prepare()
    assert status == 0
    assert [row["id"] for row in rows] == ["a", "b"]
    for name in ("duplicate", "label not parsable", "no label"):
        assert f"left out: {name}" in shown
    summary = json.loads((tmp_path / "out.summary.json").read_text())
    assert (summary["rows_read"], summary["rows_kept"]) == (5, 2)
    assert summary["formats"] == {str(tmp_path / "sums.jsonl"): "deepscaler"}
    rejected = (tmp_path / "out.rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in rejected] == ROWS[2:]


def test_prompt_lengths_are_counted_in_the_policys_tokens(prepare, tmp_path):
    """A token of this tokenizer is a character: 16 of the first problem, 18 of the second."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "policy")
    flags = ("--template", "chat-bare", "--tokenizer", str(tmp_path / "policy"))
    status, shown, rows = prepare(*flags, "--max-prompt-tokens", "17")
    assert status == 0
    assert [row["id"] for row in rows] == ["a"]
    assert "left out: prompt too long" in shown
    assert "prompt tokens, longest" in shown and " 16 " in shown


def test_two_sets_of_different_formats_become_one(source, tmp_path, capsys):
    words = tmp_path / "words.json"
    words.write_text(
        json.dumps(
            [
                {"question": "How many legs has a cat?", "answer": "Four. #### 4"},
                {"question": "What is 3 times 4?", "answer": "It is 12. #### 12"},
            ]
        )
    )
    out = tmp_path / "out.jsonl"
    assert main(["prepare-data", "--from", str(source), str(words), "--to", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["datasource"], row["label"]) for row in rows] == [
        ("sums", "7"),
        ("sums", "12"),
        ("words", "4"),
    ]


def test_an_earlier_result_is_not_replaced_by_accident(prepare):
    assert prepare()[0] == 0
    status, shown, rows = prepare("--limit", "1")
    assert status == 2 and "there already" in shown
    assert len(rows) == 2
    status, _, rows = prepare("--limit", "1", "--overwrite")
    assert status == 0 and len(rows) == 1


def test_when_no_row_can_be_kept_the_status_says_so_and_the_reasons_are_there(
    prepare, source, tmp_path
):
    source.write_text(json.dumps(ROWS[3]) + "\n")
    status, shown, rows = prepare()
    assert (status, rows) == (1, [])
    assert "no row could be kept" in shown
    assert "label_not_parsable" in (tmp_path / "out.rejected.jsonl").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format", "rstar2"], "asked for was rstar2"),
        (["--problem-field", "problem"], "--problem-field and --label-field go together"),
        (
            ["--problem-field", "a", "--label-field", "b", "--format", "rstar2"],
            "--format rstar2 names the fields itself",
        ),
        (["--max-prompt-tokens", "9"], "needs --tokenizer"),
        (["--tokenizer", "nowhere/to/find"], "cannot be loaded"),
        (["--workers", "0"], "--workers 0: must be 1 or more"),
        (["--limit", "0"], "--limit 0: must be 1 or more"),
    ],
)
def test_wrong_options_end_with_status_2_and_the_fix(prepare, tmp_path, flags, message):
    status, shown, _ = prepare(*flags)
    assert status == 2
    assert "Nothing was written." in shown and message in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sums.jsonl"]


def test_fields_with_other_names_are_shown_and_can_be_named(prepare, source):
    source.write_text('{"query": "What is 3 + 4?", "solution": "7"}\n')
    status, shown, _ = prepare()
    assert status == 2 and "query, solution" in shown
    status, _, rows = prepare("--problem-field", "query", "--label-field", "solution")
    assert status == 0 and rows[0]["label"] == "7"


def test_a_source_that_is_missing_or_empty_or_named_twice_is_refused(prepare, source, capsys):
    out = str(source.with_name("out.jsonl"))
    assert main(["prepare-data", "--from", str(source), str(source), "--to", out]) == 2
    assert "twice" in capsys.readouterr().out
    assert main(["prepare-data", "--from", "nowhere.jsonl", "--to", out]) == 2
    assert "there is no such file" in capsys.readouterr().out
    source.write_text("")
    assert "has no rows" in prepare()[1]


def test_problems_that_a_benchmark_has_too_are_listed_with_their_rows(prepare, tmp_path):
    aime = [{"problem": f"Problem {i}", "answer": str(i)} for i in range(29)]
    aime.append({"problem": "What is 3 times $4$?", "answer": "12"})
    (tmp_path / "aime24.jsonl").write_text("".join(json.dumps(row) + "\n" for row in aime))
    status, shown, rows = prepare("--check-against", "aime24", "--data-dir", str(tmp_path))
    assert status == 0 and len(rows) == 2
    assert "1 listed in" in shown and "no row was left out" in shown
    (overlap,) = map(json.loads, (tmp_path / "out.overlaps.jsonl").read_text().splitlines())
    assert (overlap["benchmark_id"], overlap["row_number"]) == ("aime24:30", 2)
    assert overlap["same_text"] is True


def test_an_unknown_benchmark_is_refused_before_the_work(prepare):
    status, shown, rows = prepare("--check-against", "aime23")
    assert status == 2 and rows == [] and "--suite aime23: unknown" in shown


def evaluated(path, suite, shares):
    """The folder of an evaluation with two answers of each problem."""
    fields = {"problem": "problem", "label": "answer"}
    loaded = load_suite(find_suites([str(suite)], fields=fields)[0], data_dir=None)
    folder = RunFolder(path)
    folder.open()
    identity = Identity(
        model="m",
        weights_digest="w",
        weights_version=0,
        contract_hash="c",
        tokenizer_hash="t",
        plan={},
        suites={loaded.name: loaded.digest},
    )
    folder.begin(identity, [loaded], n=2)
    grades = {
        (problem.id, sample): Grade(right=sample < 2 * share, answer=None)
        for problem, share in zip(loaded.problems, shares, strict=True)
        for sample in range(2)
    }
    folder.write_grades(loaded.name, grades)
    results = {
        "suite": loaded.name,
        "title": "",
        "num_problems": len(loaded.problems),
        "problems_digest": loaded.digest,
        "avg": {"value": 0.5},
    }
    described = {"model": "m", "n": 2, "plan": {}, "suites": [results]}
    write_json(path / RESULTS_FILE, described)
    folder.release()


def test_only_problems_of_the_wanted_pass_rate_are_kept(prepare, tmp_path):
    suite = tmp_path / "asked.jsonl"
    asked = [
        {"problem": "What is 3+4? Please reason step by step, and put your final answer within "
         "\\boxed{}.", "answer": "7"},
        {"problem": "What is 3 times 4?", "answer": "12"},
    ]  # fmt: skip
    suite.write_text("".join(json.dumps(row) + "\n" for row in asked))
    evaluated(tmp_path / "rates", suite, shares=(0.5, 1.0))
    status, shown, rows = prepare("--pass-rates", str(tmp_path / "rates"))
    assert status == 0 and [row["id"] for row in rows] == ["a"]
    assert "left out: pass rate" in shown
    flags = ("--pass-rates", str(tmp_path / "rates"), "--pass-rate", "0.9", "1", "--overwrite")
    assert [row["id"] for row in prepare(*flags)[2]] == ["b"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--pass-rate", "0.1", "0.9"), "needs --pass-rates RUN"),
        (("--pass-rates", "rates", "--pass-rate", "0.9", "0.1"), "0 <= LOW <= HIGH <= 1"),
        (("--pass-rates", "nowhere"), "is not a finished run of evaluate"),
    ],
)
def test_wrong_pass_rates_end_before_the_work(prepare, flags, message):
    status, shown, rows = prepare(*flags)
    assert status == 2 and rows == [] and message in shown
