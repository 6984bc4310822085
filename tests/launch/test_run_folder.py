import json
import os
import re

import pytest

from openrlhf_alp.launch import run_folder
from openrlhf_alp.launch.recipe import RecipeError, read_recipe
from openrlhf_alp.launch.run_folder import find_model, open_run_folder


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def recipe(tmp_path):
    def make(*settings):
        path = tmp_path / "given.toml"
        path.write_text(
            '[model]\npath = "m"\n[data]\npath = "p"\n[train]\nalp.method = "seq-alp"\n'
        )
        return read_recipe(path, settings)[0]

    return make


def test_a_new_folder_holds_the_settings_and_the_machine(tmp_path, recipe, said):
    path = tmp_path / "runs" / "x"
    folder = open_run_folder(path, recipe=recipe("run.seed=7"), overwrite=False, say=said.append)
    assert read_recipe(folder / "recipe.toml")[0].run.seed == 7
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["versions"]["openrlhf"] == "0.11.2"
    assert environment["cpus"] == os.cpu_count()
    assert said == []


@pytest.mark.parametrize("char", [",", "[", "]", "*", "?"])
def test_a_folder_that_openrlhf_would_not_read_as_one_path_is_refused(tmp_path, recipe, char):
    path = tmp_path / f"a{char}b"
    with pytest.raises(RecipeError, match=re.escape(f"its path has {char!r}")):
        run_folder.check_run_folder(path, recipe=recipe(), overwrite=False)
    assert not path.exists()


def test_an_earlier_run_is_refused_with_three_ways_out(tmp_path, recipe, said):
    path = tmp_path / "x"
    open_run_folder(path, recipe=recipe(), overwrite=False, say=said.append)
    with pytest.raises(RecipeError, match=r"--resume .*--overwrite, or name another folder"):
        open_run_folder(path, recipe=recipe(), overwrite=False, say=said.append)


def test_an_earlier_run_is_moved_aside_under_the_time_it_was_made(tmp_path, recipe, said):
    path, aside_recipe = tmp_path / "x", recipe("run.existing=aside")
    for _ in range(2):
        open_run_folder(path, recipe=aside_recipe, overwrite=False, say=said.append)
        (path / "metrics.jsonl").write_text("kept")
        os.utime(path / "recipe.toml", (1_700_000_000, 1_700_000_000))
    (aside,) = [folder for folder in tmp_path.iterdir() if folder.is_dir() and folder != path]
    assert aside.name.startswith("x-202311")
    assert (aside / "metrics.jsonl").read_text() == "kept"
    assert said == [f"the earlier run is now {aside}"]
    with pytest.raises(RecipeError, match="which exists too"):
        open_run_folder(path, recipe=aside_recipe, overwrite=False, say=said.append)
    assert (path / "metrics.jsonl").exists()


def test_overwrite_replaces_an_earlier_run(tmp_path, recipe, said):
    path = tmp_path / "x"
    open_run_folder(path, recipe=recipe(), overwrite=False, say=said.append)
    (path / "metrics.jsonl").write_text("old")
    open_run_folder(path, recipe=recipe(), overwrite=True, say=said.append)
    assert not (path / "metrics.jsonl").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_not_a_run_is_never_touched(tmp_path, recipe, said, overwrite):
    path = tmp_path / "x"
    path.mkdir()
    (path / "thesis.tex").write_text("years of work")
    with pytest.raises(RecipeError, match="is not a run"):
        open_run_folder(path, recipe=recipe(), overwrite=overwrite, say=said.append)
    assert [file.name for file in path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("settings", [(), ("run.existing=aside",)])
def test_a_folder_of_ones_own_is_no_run_because_it_has_a_recipe(tmp_path, recipe, said, settings):
    for name in ("recipe.toml", "prompts.jsonl"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(RecipeError, match="is not a run"):
        open_run_folder(tmp_path, recipe=recipe(*settings), overwrite=True, say=said.append)
    assert (tmp_path / "prompts.jsonl").read_text() == "mine"


@pytest.mark.parametrize(("existing", "overwrite"), [("aside", False), ("refuse", True)])
@pytest.mark.parametrize("key", ["model.path", "train.reward.remote_url", "data.path"])
def test_a_run_that_the_new_one_needs_is_not_replaced(
    tmp_path, recipe, said, monkeypatch, key, existing, overwrite
):
    monkeypatch.chdir(tmp_path)
    open_run_folder(tmp_path / "x", recipe=recipe(), overwrite=False, say=said.append)
    (tmp_path / "x" / "model").mkdir()
    again = recipe(f"{key}=x/model", f"run.existing={existing}", f"run.condition={'c' * 5000}")
    with pytest.raises(RecipeError, match=f"that this one needs: {key} = x/model"):
        open_run_folder(tmp_path / "x", recipe=again, overwrite=overwrite, say=said.append)
    assert (tmp_path / "x" / "model").is_dir()


@pytest.mark.parametrize("name", ["file/sub", "file/sub/sub", "n" * 300, "/proc/none/x"])
def test_a_folder_that_cannot_be_made_is_said_with_a_way_out(tmp_path, recipe, name):
    (tmp_path / "file").write_text("")
    path = tmp_path / name
    with pytest.raises(RecipeError, match=r"cannot be used .*--set run\.folder="):
        run_folder.check_run_folder(path, recipe=recipe(), overwrite=False)
        with run_folder.locked(path):
            pass


def test_a_run_continues_with_its_own_settings_and_names_changed_ones(tmp_path, recipe, said):
    path = tmp_path / "x"
    open_run_folder(path, recipe=recipe("run.seed=7"), overwrite=False, say=said.append)
    same = recipe("run.seed=7", "run.folder=elsewhere")
    assert run_folder.read_run(path, same).run.seed == 7
    changed = recipe("run.seed=8", "train.alp.lr=0.1")
    with pytest.raises(RecipeError) as caught:
        run_folder.read_run(path, changed)
    assert "run.seed (was 7, now 8), train.alp.lr (was None, now 0.1)" in str(caught.value)


def test_there_must_be_something_to_continue_from(tmp_path, recipe, said):
    path = tmp_path / "x"
    with pytest.raises(RecipeError, match=r"there is no recipe\.toml"):
        run_folder.read_run(path, recipe())
    open_run_folder(path, recipe=recipe(), overwrite=False, say=said.append)
    with pytest.raises(RecipeError, match="has no checkpoint yet"):
        run_folder.newest_checkpoint(path)
    (path / "checkpoints" / "_actor" / "global_step12").mkdir(parents=True)
    (path / "checkpoints" / "_actor" / "latest").write_text("global_step12\n")
    assert run_folder.newest_checkpoint(path) == 12
    (path / "summary.json").write_text("{}")
    with pytest.raises(RecipeError, match="this run is finished"):
        run_folder.newest_checkpoint(path)


@pytest.mark.parametrize("latest", ["", "global_step3", "global_stepx"])
def test_a_checkpoint_that_is_not_there_is_named_with_those_that_are(tmp_path, latest):
    (tmp_path / "checkpoints" / "_actor" / "global_step2").mkdir(parents=True)
    (tmp_path / "checkpoints" / "_actor" / "latest").write_text(latest)
    with pytest.raises(RecipeError, match=rf"'{latest}', which is not there.*: global_step2\."):
        run_folder.newest_checkpoint(tmp_path)


def test_a_run_with_relative_paths_continues_only_where_they_lead_to_the_same_files(
    tmp_path, recipe, said, monkeypatch
):
    for folder in ("here", "there/m"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "here" / "m").write_text("")
    monkeypatch.chdir(tmp_path / "here")
    made = recipe()
    path = open_run_folder(tmp_path / "x", recipe=made, overwrite=False, say=said.append)
    monkeypatch.chdir(tmp_path / "there")
    run_folder.read_run(path, made)  # a model of the same name is here too
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=f"model.path = m .* cd {tmp_path / 'here'}$"):
        run_folder.read_run(path, made)


def test_steps_after_the_checkpoint_are_set_aside_also_a_line_that_was_cut(tmp_path):
    rows = [f'{{"global_step": {step}}}\n' for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("broken\n" + "".join(rows) + '{"global_st')
    assert run_folder.drop_undone_steps(tmp_path, 2) == 3
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(rows[:2])
    assert (tmp_path / "metrics.undone.jsonl").read_text() == "broken\n" + rows[2] + '{"global_st'


def test_evaluations_of_weights_that_will_be_made_again_are_kept_beside_the_new_ones(tmp_path):
    names = ("before", "step-2", "step-4", "after")
    for name in names:
        (tmp_path / "evaluation" / name).mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text('{"global_step": 2}\n{"global_step": 3}\n')
    run_folder.drop_undone_steps(tmp_path, 2)
    folders = sorted(path.name for path in (tmp_path / "evaluation").iterdir())
    after, before, done, undone = folders
    assert (before, done) == ("before", "step-2")
    assert after.startswith("after-2") and undone.startswith("step-4-2")
    # A second attempt that ends before it evaluates leaves them as they are.
    run_folder.drop_undone_steps(tmp_path, 2)
    assert sorted(path.name for path in (tmp_path / "evaluation").iterdir()) == folders


def test_a_model_folder_is_taken_as_it_is(tmp_path, said):
    (tmp_path / "config.json").write_text("{}")
    assert find_model(str(tmp_path), say=said.append) == tmp_path.resolve()


def test_a_folder_without_config_is_not_a_model(tmp_path, said):
    with pytest.raises(RecipeError, match=r"has no config\.json"):
        find_model(str(tmp_path), say=said.append)


def test_a_model_that_cannot_be_fetched_is_named_with_a_way_out(monkeypatch, said):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RecipeError, match="or use smollm2, which needs no network"):
        find_model("nobody/no-such-model", say=said.append)
    assert said == ["fetching nobody/no-such-model from the Hugging Face hub"]
