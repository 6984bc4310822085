"""Files of a run that a kill, a disk or an editor has broken."""

import json

import pytest

from openrlhf_alp.evaluate.folder import FolderError, RunFolder, write_json
from openrlhf_alp.evaluate.records import Grade

RUN = {"run_id": "r", "n": 1, "plan": {}, "suites": {"own": ""}, "weights_digest": ""}


@pytest.mark.parametrize("content", ["", '{"n": 1', "[]", "{}", "\x00\x00", "null"])
@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("run.json", "restore it"),
        ("results.json", "evaluate --regrade"),
        ("problems/own.json", "run the command of this run again"),
    ],
)
def test_a_broken_file_is_named_with_its_fix(tmp_path, name, content, fix):
    (tmp_path / "problems").mkdir()
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    (tmp_path / name).write_text(content)
    folder = RunFolder(tmp_path)
    read = {"results.json": folder.results, "problems/own.json": folder.suites}
    with pytest.raises(FolderError, match=rf"{name} cannot be read: .*\. Fix: .*{fix}"):
        read.get(name, folder.described)()


@pytest.mark.parametrize("content", ["x", "[1]", '{"right": true}', "\x00", "[" * 100_000])
def test_broken_grades_are_named_with_their_fix(tmp_path, content):
    (tmp_path / "grades").mkdir()
    (tmp_path / "grades" / "own.jsonl").write_text(content)
    with pytest.raises(FolderError, match=r"own\.jsonl cannot be read .*Fix: .*--regrade"):
        RunFolder(tmp_path).shares("own", num_problems=1, n=1)


@pytest.mark.parametrize("said", ["1\u2028 2", "\u2029", "\x85", "\x0c", "a\r\nb", "\ud83d"])
def test_whatever_a_policy_writes_is_read_again(tmp_path, said):
    folder = RunFolder(tmp_path)
    grades = {("p", 0): Grade(right=True, answer=said), ("p", 1): Grade(right=False, answer=said)}
    folder.write_grades("own", grades)
    assert folder.shares("own", num_problems=1, n=2) == {"p": 0.5}
    write_json(tmp_path / "run.json", {**RUN, "model": said})
    assert folder.described()["model"] == said


def rated(tmp_path, rights, *, ids=("p", "q")):
    """A run that asked p and q twice; `rights` are the verdicts on the first of `ids`."""
    folder = RunFolder(tmp_path)
    write_json(tmp_path / "run.json", RUN)
    empty = dict.fromkeys(("tolerance", "subject", "level", "solution"))
    problems = [{"id": name, "text": f"text of {name}", "label": "1", **empty} for name in "pq"]
    described = {"title": "Own", "origin": "own.jsonl", "is_whole": True, "problems": problems}
    write_json(tmp_path / "problems" / "own.json", described)
    suite = {"suite": "own", "title": "Own", "num_problems": 2, "problems_digest": ""}
    results = {"model": "m", "n": 2, "plan": {}, "suites": [{**suite, "avg": {"value": 0.5}}]}
    write_json(tmp_path / "results.json", results)
    verdicts = {ids[0]: rights, ids[1]: (True, False)}
    grades = {
        (name, sample): Grade(right=right, answer=None)
        for name, found in verdicts.items()
        for sample, right in enumerate(found)
    }
    folder.write_grades("own", grades)
    return folder


def test_an_answer_that_could_not_be_graded_is_not_counted_as_wrong(tmp_path):
    rates = dict(rated(tmp_path, (True, None)).pass_rates())
    assert rates == {"text of p": 1.0, "text of q": 0.5}
    assert dict(rated(tmp_path, (None, None)).pass_rates()) == {"text of q": 0.5}


def test_grades_of_other_problems_or_of_one_answer_twice_are_named(tmp_path):
    with pytest.raises(FolderError, match=r"no grade of the problem p\. Fix: .*--regrade"):
        dict(rated(tmp_path, (True, True), ids=("other", "q")).pass_rates())
    rated(tmp_path, (True, True))
    path = tmp_path / "grades" / "own.jsonl"
    path.write_text(path.read_text().replace('"sample": 1', '"sample": 0'))
    with pytest.raises(FolderError, match="has not 2 grades of each of 2 problems"):
        dict(RunFolder(tmp_path).pass_rates())
