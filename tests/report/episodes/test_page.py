import base64
import gzip
import json
import os
import re

import numpy as np
import pytest
from inspect_ai.log import read_eval_log
from made_batches import batch, sample

from openrlhf_alp.cli.main import main
from openrlhf_alp.replay.files.write import write_batch
from openrlhf_alp.report.episodes.inspect_log import write_inspect_log
from openrlhf_alp.report.episodes.page import write_page


def unpacked(page, name):
    return gzip.decompress(base64.b64decode(re.search(rf'id="{name}">([^<]*)<', page)[1]))


def test_a_page_holds_everything_and_loads_nothing(tmp_path, words):
    out = write_page(batch(sample(0), sample(1)), tmp_path / "x.html", tokenizer=words, ratios=None)
    page = out.read_text()
    data = json.loads(unpacked(page, "data"))
    assert data["vocabulary"] == ["w5", "w6", "w7", "w8", "w9", "w10"]
    assert [mode["name"] for mode in data["modes"]] == ["surprise"]
    assert np.frombuffer(unpacked(page, "tokens"), "<u4").tolist() == [0, 1, 2, 3, 4, 5] * 2
    assert len(unpacked(page, "numbers")) == 2 * 12
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    assert "default-src 'none'" in page


def test_what_an_episode_says_never_stands_in_the_page_as_markup(tmp_path):
    hostile = sample(prompt="</script><script>alert(1)</script>", label="\ud800<b>")
    page = write_page(batch(hostile), tmp_path / "x.html", tokenizer=None, ratios=None).read_text()
    assert "alert(1)" not in page
    data = json.loads(unpacked(page, "data"))
    assert data["groups"][0]["prompt"] == hostile.prompt
    assert data["groups"][0]["label"] == "\ud800<b>"


def test_a_step_is_a_log_of_inspect_with_a_sample_per_group(tmp_path):
    path = write_inspect_log(batch(sample(0), sample(1), sample(2)), tmp_path / "x.eval")
    log = read_eval_log(str(path))
    found = sorted((one.id, one.epoch) for one in log.samples)
    assert found == [("group 0", 1), ("group 0", 2), ("group 1", 1)]
    first = log.samples[0]
    assert [m.role for m in first.messages] == ["user", "assistant", "tool", "assistant"]
    assert first.scores["reward"].value == 1.0 and first.target == "4"
    assert first.messages[2].metadata["code"] == "print(2 + 2)"


@pytest.fixture
def run_folder(tmp_path, recorded, model_folder):
    """A run with two recorded steps, and a half-written file beside them."""
    folder = tmp_path / "run"
    for step in (1, 2):
        info = recorded.info.model_copy(update={"step": step, "model": str(model_folder)})
        made = batch(*recorded.samples, **info.model_dump())
        write_batch(made, folder / "batches" / f"step-{step:06d}.parquet")
    (folder / "batches" / "step-000003.parquet.partial").write_text("cut")
    (folder / "recipe.toml").write_text("[run]\nrecord = true\n")
    return folder


def test_batches_that_were_recorded_elsewhere_are_found_by_the_recipe(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.toml").write_text(f'[train]\nalp.record = "{tmp_path / "b"}"\n')
    write_batch(batch(), tmp_path / "b" / "step-000001.parquet")
    assert main(["episodes", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    data = json.loads(unpacked((tmp_path / "out" / "step-000001.html").read_text(), "data"))
    assert data["vocabulary"][0] == "<5>" and "tokens are shown as ids" in data["notes"][0]


def test_the_command_finds_the_batches_of_a_run(run_folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["episodes", str(run_folder), "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["step-000001.html", "step-000002.html"]
    shown = " ".join(capsys.readouterr().out.split())
    assert "half written" in shown


def test_with_a_model_one_step_is_coloured_by_its_ratios(run_folder, model_folder, tmp_path):
    out = tmp_path / "out"
    options = ["--model", str(model_folder), "--step", "2", "--inspect", "--out", str(out)]
    assert main(["episodes", str(run_folder), *options]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["step-000002.eval", "step-000002.html"]
    data = json.loads(unpacked((out / "step-000002.html").read_text(), "data"))
    assert [mode["name"] for mode in data["modes"]] == ["total", "clean", "noise", "surprise"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--step", "9"], "no readable batch of step 9"),
        (["--model", "/no/such"], "cannot be loaded"),
    ],
)
def test_what_cannot_be_shown_ends_with_status_2(run_folder, tmp_path, capsys, options, said):
    assert main(["episodes", str(run_folder), *options, "--out", str(tmp_path / "o")]) == 2
    assert said in " ".join(capsys.readouterr().out.split())


def test_a_run_that_recorded_nothing_says_how_to_record(tmp_path, capsys):
    (tmp_path / "recipe.toml").write_text('[train]\nalp.method = "seq-alp"\n')
    assert main(["episodes", str(tmp_path)]) == 2
    assert "Set run.record to true" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (b'train = "x"', "Set run.record to true"),
        (b"[train]\nalp.record = 5", "Set run.record to true"),
        (b"\xff[", "it is unknown where the run recorded"),
    ],
)
def test_a_recipe_of_another_shape_ends_with_status_2(tmp_path, capsys, recipe, said):
    (tmp_path / "recipe.toml").write_bytes(recipe)
    assert main(["episodes", str(tmp_path)]) == 2
    assert said in " ".join(capsys.readouterr().out.split())


def test_a_path_that_is_no_utf8_is_named_with_the_fix(tmp_path, capfdbinary):
    folder = tmp_path / os.fsdecode(b"bad\xff")
    write_batch(batch(), tmp_path / "step-000001.parquet")
    folder.mkdir()
    (tmp_path / "step-000001.parquet").rename(folder / "step-000001.parquet")
    assert main(["episodes", str(folder)]) == 2
    shown = b" ".join(capfdbinary.readouterr().out.split())
    assert b"bad\\xff" in shown and b"Rename it" in shown


def test_a_title_cannot_reorder_the_page_and_a_mean_says_which_episodes_it_leaves_out(tmp_path):
    made = batch(sample(0, reward=0.5), sample(1, reward=float("nan")), method="a\u202eb")
    page = write_page(made, tmp_path / "x.html", tokenizer=None, ratios=None).read_text()
    assert "\u202e" not in page and "a&lt;U+202E&gt;b" in page
    assert "mean reward 0.500 (1 episodes have none)" in page
