import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from openrlhf_alp.launch import sweep as sweep_module
from openrlhf_alp.launch.recipe import RecipeError
from openrlhf_alp.launch.sweep import Cell, cells_of, sweep
from openrlhf_alp.launch.view import LaunchView

RECIPE = '[model]\npath = "m"\n[data]\npath = "p"\n[train]\n'
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
        *("method=x,seed=1", "method=x,seed=2", "method=y,seed=1", "method=y,seed=2"),
    ]
    assert cells[3].settings == ("a.b=1", "train.alp.method=y", "run.seed=2")
    assert cells[3].folder == Path("s/method=y,seed=2")


@pytest.mark.parametrize(("seeds", "sweeps"), [("1,,2", []), (None, ["train.alp.method"])])
def test_a_sweep_of_another_form_is_refused(seeds, sweeps):
    with pytest.raises(RecipeError, match="write it as --sweep KEY=A,B"):
        cells_of(Path("s"), [], seeds, sweeps)


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
    recipe.write_text(RECIPE)
    python = sweep_module.sys.executable
    monkeypatch.setattr(Cell, "command", lambda cell, _: [python, "-c", CELL, str(cell.folder)])
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
