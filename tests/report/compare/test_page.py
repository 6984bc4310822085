import base64
import gzip
import json
import os
import re
import urllib.parse

import plotly.graph_objects as go
import pytest

from openrlhf_alp.cli.main import main
from openrlhf_alp.objective.metric_names import NUM_ENVELOPE_BINS
from openrlhf_alp.report.compare.cells import number
from openrlhf_alp.report.compare.page import write_report


def metrics(step):
    quantiles = (("p00_1", -3), ("p01", -2), ("p50", 0), ("p99", 2), ("p99_9", 3))
    envelope = {
        f"alp/envelope_{index}_{part}": value
        for index in range(NUM_ENVELOPE_BINS)
        for part, value in (("p01", -1.0), ("p50", 0.0), ("p99", 1.0))
    }
    return {
        **{f"alp/log_ratio_{name}": value * step / 100 for name, value in quantiles},
        "alp/clean_k3_kl": 0.01 * step,
        "alp/lag_0_perturbation_rms": 0.1,
        "alp/token_ess": 0.9,
        "alp/entropy": 1.0,
        "alp/layer_0_sigma": 0.02 * (1 + step / 100),
        "alp/layer_1_sigma": 0.02,
        "timing/generation": 3.0,
        "timing/step_total": 5.0,
        "tir/status_ok": 1.0,
        **envelope,
    }


@pytest.fixture
def folders(make_run):
    return [
        make_run(f"{method}{seed}", [0.1, 0.2, 0.4], method=method, seed=seed, metrics=metrics)
        for method in ("seq-bypass", "seq-alp")
        for seed in (1, 2)
    ]


def test_the_page_stands_alone_and_links_to_the_runs(folders, tmp_path):
    written = write_report(folders, tmp_path / "out")
    page = written.page.read_text()
    assert written.num_runs == 4
    assert not re.search(r"""(src|href)=["'](https?:)?//(?!arxiv\.org)""", page)
    for run in folders:
        link = re.search(rf'href="([^"]+{run.name})"', page)
        assert (written.page.parent / link[1]).resolve() == run
    bundle = re.search(r'id="plotly">([^<]+)<', page)[1]
    assert b"plotly.js" in gzip.decompress(base64.b64decode(bundle))[:200]
    assert len(page) < 5 * 2**20


def test_no_id_is_there_twice_and_every_cell_names_a_header(folders, tmp_path):
    page = write_report(folders, tmp_path / "out").page.read_text()
    ids = re.findall(r'<[^>]*\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'headers="([^"]+)"', page)) <= set(ids)
    assert {f"run-{number}" for number in range(4)} <= set(ids)


def test_every_chart_is_one_that_plotly_takes_and_has_its_pictures(folders, tmp_path):
    written = write_report(folders, tmp_path / "out")
    text = re.search(r'id="figures">(.+?)</script>', written.page.read_text())[1]
    figures = json.loads(text)
    keys = [figure["key"] for figure in figures]
    assert keys == [
        *("reward", "log-ratio", "kl", "split", "ess", "entropy", "envelope", "sigma", "time"),
        "tools",
    ]
    for figure in figures:
        go.Figure(data=figure["data"], layout=figure["layout"])
    assert {path.name for path in written.pictures} == {
        f"{key}.{suffix}" for key in keys for suffix in ("png", "svg")
    }


def test_sigma_is_shown_as_its_change_in_per_cent(folders, tmp_path):
    """Layer 0 grows from 0.0202 to 0.0206, by 1.98 %."""
    text = write_report(folders, tmp_path / "out").page.read_text()
    figures = json.loads(re.search(r'id="figures">(.+?)</script>', text)[1])
    [sigma] = [figure for figure in figures if figure["key"] == "sigma"]
    heat = sigma["data"][0]
    assert heat["z"][0] == pytest.approx([0.0, 100 * 0.0002 / 0.0202, 100 * 0.0004 / 0.0202])
    assert heat["z"][1] == pytest.approx([0.0, 0.0, 0.0])


def evaluated(folder, name, value):
    estimate = {"value": value, "low": value - 0.1, "high": value + 0.1}
    suite = {
        "suite": "sums",
        "title": "Sums",
        "avg": estimate,
        "pass_at": {"1": estimate, "4": estimate},
    }
    path = folder / "evaluation" / name / "results.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"suites": [suite]}))


def test_evaluations_are_shown_at_their_steps(make_run, tmp_path):
    """Three steps were made: before is 0, after is 3."""
    folder = make_run("a", [0.1] * 3)
    for name, value in (("after", 0.6), ("step-2", 0.4), ("before", 0.2)):
        evaluated(folder, name, value)
    text = write_report([folder], tmp_path / "out").page.read_text()
    figures = json.loads(re.search(r'id="figures">(.+?)</script>', text)[1])
    data = {figure["key"]: figure["data"] for figure in figures}
    assert data["evaluation"][0]["x"] == [0.2, 0.6]
    [line] = data["evaluation-steps"]
    assert (line["x"], line["y"]) == ([0, 2, 3], [0.2, 0.4, 0.6])
    assert [trace["line"].get("dash") for trace in data["pass-at-k"][1::2]] == ["dash", "solid"]


def test_names_of_runs_stay_text(make_run, tmp_path):
    folder = make_run("<script>alert(1)", [0.1] * 3, metrics=metrics)
    page = write_report([folder], tmp_path / "out").page.read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_hostile_names_stay_text_in_page_pictures_and_links(make_run, tmp_path):
    method, condition = "<b>$x_{$ %{y}", "a\\n\\u202e"
    names = (b"bad\xff", b"javascript:alert(1)", b"#a?b%41", b"$x_{")
    made = [
        make_run(os.fsdecode(name), [0.1] * 3, method=method, condition=condition, seed=seed)
        for seed, name in enumerate(names)
    ]
    written = write_report([tmp_path / "runs"], tmp_path / "runs")
    page = written.page.read_text()
    links = [found for found in re.findall(r'href="([^"#]+)"', page) if "fig" not in found]
    linked = {os.fsdecode(urllib.parse.unquote_to_bytes(link)) for link in links}
    assert linked >= {folder.name for folder in made}
    assert not any(link.startswith("javascript:") for link in links)
    figures = json.loads(re.search(r'id="figures">(.+?)</script>', page)[1])
    line = figures[0]["data"][-1]
    assert line["name"] == "&lt;b&gt;$x_{$ %&#123;y}" and line["meta"] == "<b>$x_{$ %{y}"
    assert "a<U+000A><U+202E>" in written.tables.read_text()


def test_what_diverged_is_named_and_its_numbers_carry_a_star(make_run, tmp_path):
    nan = {"alp/k3_kl": float("nan"), "alp/layer_0_sigma": float("inf"), "timing/generation": 1e99}
    folder = make_run("a", [0.25] * 4, metrics=lambda step: nan if step > 2 else metrics(step))
    written = write_report([folder], tmp_path / "out")
    assert "alp/k3_kl is not a finite number at 2 of 4 steps" in " ".join(written.notes)
    tables = written.tables.read_text()
    assert "| seq-alp | 0.250* |" in tables
    assert "alp/k3_kl is not a finite number" in tables
    assert ">0.250*</a>" in written.page.read_text()


def test_small_numbers_keep_their_digits():
    assert number(0.25, 3) == "0.250"
    assert number(0.00002, 3) == "2.0e-05"
    assert number(0.0, 3) == "0.000"


def test_the_command_writes_and_names_what_is_missing(make_run, tmp_path, capsys):
    folder = make_run("a", [0.1] * 3, finished=False)
    assert main(["report", str(folder), "--out", str(tmp_path / "out")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "a: it is still going" in shown
    assert "runs: 1," in shown


def test_a_folder_without_runs_ends_with_status_2(tmp_path, capsys):
    assert main(["report", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert "there is no run in it" in " ".join(capsys.readouterr().out.split())


def test_a_picture_names_the_papers_figure(folders, tmp_path):
    write_report(folders, tmp_path / "out")
    picture = (tmp_path / "out" / "figures" / "kl.svg").read_text()
    assert "arXiv 2603.19470: Figures 3 and 4" in picture


def test_the_tables_are_written_in_markdown_too(folders, tmp_path):
    written = write_report(folders, tmp_path / "out")
    rows = [line for line in written.tables.read_text().splitlines() if line.startswith("| ")]
    reward = rows[: len(rows) // sum(line.startswith("| method") for line in rows)]
    assert reward == [
        "| method | all runs |",
        "| --- | --- |",
        "| seq-bypass | 0.233 ± 0.000 |",
        "| seq-alp | 0.233 ± 0.000; +0.000 [+0.000, +0.000] (seq-bypass) |",
    ]
