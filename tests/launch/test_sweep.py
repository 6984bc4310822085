import io
import json
import math
import re
import sys
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from openrlhf_alp.cli.main import main
from openrlhf_alp.launch import sweep as sweep_module
from openrlhf_alp.launch.commands import Commands
from openrlhf_alp.launch.recipe import RecipeError, Sweep, read_recipe, to_toml
from openrlhf_alp.launch.sweep import Cell, cells_of, sweep
from openrlhf_alp.launch.view import LaunchView

FAKE = Path(__file__).with_name("fake_service.py")
RECIPE = '[model]\npath = "m"\n[data]\npath = "p"\n[train]\n'
RUNNING = RECIPE + '[rollout]\nurls = ["http://127.0.0.1:9"]\n'
SWEEP = """
[sweep.conditions]
none = {}
int4 = { rollout.simulate_quantization = "int4" }
[sweep.values]
train.train.batch_size = [8]
run.seed = [1, 2]
"""
CELL = (
    "import json, pathlib, sys\n"
    "folder = pathlib.Path(sys.argv[1])\n"
    "folder.mkdir(parents=True)\n"
    "if folder.name == 'seed=2': sys.exit('no')\n"
    "(folder / 'summary.json').write_text(json.dumps(1))\n"
)


def test_every_combination_is_a_cell_of_its_own():
    cells = cells_of(Path("s"), ["a.b=1"], "1,2", ["train.alp.method=x,y"])
    assert [cell.name for cell in cells] == [
        *("method=x_seed=1", "method=y_seed=1", "method=x_seed=2", "method=y_seed=2"),
    ]
    assert cells[3].settings == ("a.b=1", "run.seed=2", "train.alp.method=y")
    assert cells[3].folder == Path("s/method=y_seed=2")


def test_no_folder_has_a_comma_because_openrlhf_splits_paths_there():
    [cell] = cells_of(Path("s"), [], recipe=Sweep(values={"train.alp.layers": ["0-4,8"]}))
    assert cell.name == "layers=0-4+8"
    assert cell.settings == ("sweep={}", "train.alp.layers=0-4,8")


def test_a_recipe_names_conditions_and_values_and_each_cell_is_one_run(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text(RECIPE + SWEEP)
    read, _ = read_recipe(recipe)
    cells = cells_of(tmp_path / "s", [], recipe=read.sweep)
    assert [cell.name for cell in cells] == [
        *("none_batch_size=8_seed=1", "int4_batch_size=8_seed=1"),
        *("none_batch_size=8_seed=2", "int4_batch_size=8_seed=2"),
    ]
    one, source = read_recipe(recipe, cells[1].settings)
    assert one.sweep == Sweep() and one.run.condition == "int4" and one.run.seed == 1
    assert one.rollout.flags == {"simulate_quantization": "int4"}
    assert one.train.flags == {"train.batch_size": 8}
    assert "sweep" not in to_toml(one) and source.path == recipe


def test_the_command_line_wins_over_the_recipes_sweep(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text(RECIPE + SWEEP)
    read, _ = read_recipe(recipe)
    cells = cells_of(tmp_path / "s", [], "7", ["run.condition=int4"], read.sweep)
    assert [cell.name for cell in cells] == ["int4_batch_size=8_seed=7"]
    with pytest.raises(RecipeError, match="the recipe has none, int4"):
        cells_of(tmp_path / "s", [], None, ["run.condition=int5"], read.sweep)


@pytest.mark.parametrize(
    ("sweep", "settings"),
    [
        ("k=[0.9, 0.95],[0.8, 0.9]", ["k=[0.9, 0.95]", "k=[0.8, 0.9]"]),
        ('k="0-4,8","all"', ["k=0-4,8", "k=all"]),
        ("k='1','a '", ['k="1"', 'k="a "']),
        ("run.condition=7", ['run.condition="7"']),
        ("k=1e-5,2e-5", ["k=1e-5", "k=2e-5"]),
    ],
)
def test_a_list_or_a_quoted_text_may_have_commas(sweep, settings):
    assert [cell.settings[-1] for cell in cells_of(Path("s"), [], None, [sweep])] == settings


def test_a_folder_of_a_list_is_no_pattern_of_several_files():
    """`datasets` takes brackets, * and ? in a path for one."""
    [cell] = cells_of(Path("s"), [], None, ["a.betas=[0.9, 0.95]", "a.names=['a*b?']"])
    assert cell.name == "betas=0.9+0.95_names=ab"


def test_half_of_a_quoted_text_is_no_value():
    with pytest.raises(RecipeError, match="each is written as in TOML, a text in quotes"):
        cells_of(Path("s"), [], None, ['k="0-4,8",all'])


@pytest.mark.parametrize(("seeds", "sweeps"), [("1,,2", []), (None, ["train.alp.method"])])
def test_a_sweep_of_another_form_is_refused(seeds, sweeps):
    with pytest.raises(RecipeError, match="write it as --sweep KEY=A,B"):
        cells_of(Path("s"), [], seeds, sweeps)


@pytest.mark.parametrize(
    ("seeds", "sweeps", "shown"),
    [
        ("1,2,1", [], "two cells would have the folder seed=1"),
        (None, ["model.path=a/b,a_b"], "two cells would have the folder path=a_b"),
        (None, ["run.condition=.."], "'..' cannot name the folder"),
        (None, ["run.condition=logs"], "'logs' cannot name the folder"),
        (None, ["model.path=" + "\u00e9" * 130], "cannot name the folder of a cell"),
        ("1", ["run.seed=2"], "run.seed is given twice"),
        (None, ["run.folder=a,b"], "--output names where"),
        ("", [], "write it as --sweep KEY=A,B"),
    ],
)
def test_a_cell_never_gets_the_folder_of_something_else(seeds, sweeps, shown):
    with pytest.raises(RecipeError, match=re.escape(shown)):
        cells_of(Path("s"), [], seeds, sweeps)


def test_a_sweep_over_no_value_is_said():
    with pytest.raises(RecipeError, match="empty list of values"):
        cells_of(Path("s"), [], recipe=Sweep(values={"train.alp.method": []}))


def test_values_and_conditions_reach_their_cells_as_they_were_written(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        RECIPE + "[sweep]\nvalues.train.a = [2024-01-01]\n"
        'conditions.x = {run.trackio = "\U0001f600", train.b = nan, train.c = [true, 1]}\n'
    )
    read, _ = read_recipe(recipe)
    [cell] = cells_of(tmp_path / "s", [], recipe=read.sweep)
    made, _ = read_recipe(recipe, cell.settings)
    assert made.run.trackio == "\U0001f600"
    assert made.train.flags == {
        "a": "2024-01-01",
        "b": pytest.approx(math.nan, nan_ok=True),
        "c": [True, 1],
    }


def test_a_run_of_another_recipe_is_not_taken_for_a_cell(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text(RUNNING)
    cells = cells_of(tmp_path / "s", [], "1", [])
    cells[0].folder.mkdir(parents=True)
    (cells[0].folder / "summary.json").write_text("{}")
    as_asked = read_recipe(recipe, cells[0].settings)[0]
    (cells[0].folder / "recipe.toml").write_text(to_toml(as_asked))
    view = LaunchView(Console(file=io.StringIO()))
    assert sweep(recipe, cells, view) == 0
    recipe.write_text(RUNNING.replace('"p"', '"q"'))
    with pytest.raises(RecipeError, match=r"data\.path \(was 'p', now 'q'\)"):
        sweep(recipe, cells, view)


def test_a_dry_run_checks_every_cell_and_starts_none(tmp_path, capfd):
    """Neither the services' keys are there, nor what the second cell asks of the trainer."""
    recipe = tmp_path / "r.toml"
    recipe.write_text(RUNNING + f'[run]\nfolder = "{tmp_path / "x"}"\n')
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    command = ["launch", str(recipe), "--dry-run", "--model", f"{tmp_path / 'm'}"]
    assert main([*command, "--sweep", "train.train.seed=1", "--seeds", "1,2"]) == 2
    shown = capfd.readouterr().out
    assert shown.count("train.train.seed follows from [run] seed") == 2
    assert "cell seed=1_seed=1" in shown and "cell seed=1_seed=2" in shown
    assert not (tmp_path / "x-sweep").exists()


def test_a_cell_starts_replaces_or_continues_what_is_there(tmp_path):
    cell = Cell(name="c", settings=("run.seed=1",), folder=tmp_path / "c")
    new = cell.command(Path("r.toml"))
    assert new[-4:] == ["--set", "run.seed=1", "--set", f"run.folder={cell.folder}"]
    cell.folder.mkdir()
    (cell.folder / "recipe.toml").write_text("")
    assert cell.command(Path("r.toml"))[-1] == "--overwrite"
    (cell.folder / "checkpoints" / "_actor").mkdir(parents=True)
    (cell.folder / "checkpoints" / "_actor" / "latest").write_text("global_step1")
    assert cell.command(Path("r.toml"))[-2:] == ["--resume", str(cell.folder)]


def test_finished_cells_are_skipped_and_a_broken_one_is_named(tmp_path, monkeypatch):
    recipe = tmp_path / "r.toml"
    recipe.write_text(RUNNING)
    python = sweep_module.sys.executable
    monkeypatch.setattr(Cell, "command", lambda cell, *_: [python, "-c", CELL, str(cell.folder)])
    cells = cells_of(tmp_path / "s", [], "1,2,3", [])
    cells[0].folder.mkdir(parents=True)
    (cells[0].folder / "summary.json").write_text(json.dumps("earlier"))
    output = io.StringIO()
    assert sweep(recipe, cells, LaunchView(Console(file=output, width=200))) == 1
    shown = output.getvalue()
    assert "3 cells, 1 of them finished already" in shown
    assert "seed=2 ended with exit status 1" in shown
    assert json.loads((cells[0].folder / "summary.json").read_text()) == "earlier"
    assert [cell.is_finished for cell in cells] == [True, False, True]
    assert {path.name for path in (tmp_path / "s").iterdir()} == {
        "logs",
        *(cell.name for cell in cells),
    }


def test_launching_a_recipe_with_a_sweep_runs_its_cells(tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "r.toml"
    recipe.write_text(RUNNING + f'[run]\nfolder = "{tmp_path / "x"}"\n' + SWEEP)
    python = sweep_module.sys.executable
    script = CELL.replace("folder.name == 'seed=2'", "False")
    monkeypatch.setattr(Cell, "command", lambda cell, *_: [python, "-c", script, str(cell.folder)])
    assert main(["launch", str(recipe), "--seeds", "1"]) == 0
    assert sorted(path.name for path in (tmp_path / "x-sweep").iterdir()) == [
        "int4_batch_size=8_seed=1",
        "logs",
        "none_batch_size=8_seed=1",
    ]
    assert main(["launch", str(recipe), "--overwrite"]) == 2
    assert "--set 'sweep={}' leaves the recipe's out" in " ".join(capsys.readouterr().out.split())


def test_services_stay_up_between_cells_that_need_the_same_ones(tmp_path, monkeypatch):
    recipe, pids = tmp_path / "r.toml", tmp_path / "pids"
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    recipe.write_text(RECIPE.replace('"m"', f'"{tmp_path / "m"}"') + SWEEP)
    read, _ = read_recipe(recipe)
    cells = cells_of(tmp_path / "s", ["data.limit=1"], recipe=read.sweep)
    ask = "import httpx, sys; open(sys.argv[1], 'a').write(sys.argv[2] + '\\n')"
    ask += "; assert httpx.get(sys.argv[2] + '/openapi.json').status_code == 200"
    asked = tmp_path / "asked"

    def command(cell, recipe, lent):
        return [sys.executable, "-c", ask, str(asked), (lent / "rollout-0.url").read_text().strip()]

    def rollout(recipe, *, url_file, port, **_):
        # The stress decides which service a cell needs; the fake has no other flag for it.
        mode = ["--mode", "ok" if recipe.rollout.flags else "stubborn"]
        flags = ["--url-file", str(url_file), "--port", str(port), "--pids", str(pids)]
        return [sys.executable, str(FAKE), *flags, *mode]

    monkeypatch.setattr(Cell, "command", command)
    view = LaunchView(Console(file=io.StringIO()))
    assert sweep(recipe, [*cells, cells[3]], view, Commands(rollout=rollout)) == 0
    first, second, third, fourth, fifth = asked.read_text().split()
    assert (fourth == fifth) and len({first, second, third, fourth}) == 4
    started = [int(pid) for pid in pids.read_text().split()]
    assert len(started) == 2 * 4  # each fake has a helper
    assert not any(psutil.pid_exists(pid) for pid in started)


def test_a_cell_whose_services_or_model_cannot_be_had_fails_alone(tmp_path, monkeypatch):
    recipe, pids = tmp_path / "r.toml", tmp_path / "pids"
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    recipe.write_text(RECIPE.replace('"m"', f'"{tmp_path / "m"}"') + SWEEP)
    read, _ = read_recipe(recipe)
    cells = cells_of(tmp_path / "s", ["data.limit=1"], "1", recipe=read.sweep)
    cells += cells_of(tmp_path / "t", ["sweep={}", f"model.path={tmp_path / 'none'}"], "1")

    def rollout(recipe, *, url_file, port, **_):
        mode = ["--mode", "dies" if recipe.run.condition == "none" else "ok"]
        flags = ["--url-file", str(url_file), "--port", str(port), "--pids", str(pids)]
        return [sys.executable, str(FAKE), *flags, *mode]

    monkeypatch.setattr(Cell, "command", lambda *_: [sys.executable, "-c", "pass"])
    output = io.StringIO()
    # The second time of the same failure, its services are started anew and not taken as running.
    order = [cells[0], cells[0], cells[1], cells[2]]
    view = LaunchView(Console(file=output, width=400))
    assert sweep(recipe, order, view, Commands(rollout=rollout)) == 1
    shown = output.getvalue()
    assert shown.count("rollout-0 ended with exit status 1") == 2
    assert f"{cells[1].name}: finished" in shown and f"{cells[1].name}: started" in shown
    assert "there is no such folder" in shown and f"{cells[2].name}: failed" in shown
    assert not any(psutil.pid_exists(int(pid)) for pid in pids.read_text().split())
