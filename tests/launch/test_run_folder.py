import json
import os

import pytest

from openrlhf_alp.launch.run_folder import RunFolderError, find_model, open_run_folder


@pytest.fixture
def said() -> list[str]:
    return []


def test_a_new_folder_holds_the_settings_of_the_run(tmp_path, said):
    folder = open_run_folder(
        tmp_path / "runs" / "demo", settings={"seed": 7}, overwrite=False, say=said.append
    )
    assert json.loads((folder / "demo.json").read_text()) == {"seed": 7}
    assert said == []


def test_an_earlier_run_is_moved_aside_under_the_time_it_was_made(tmp_path, said):
    path = tmp_path / "demo"
    open_run_folder(path, settings={"seed": 1}, overwrite=False, say=said.append)
    (path / "metrics.jsonl").write_text("kept")
    os.utime(path / "demo.json", (1_700_000_000, 1_700_000_000))
    open_run_folder(path, settings={"seed": 2}, overwrite=False, say=said.append)
    (aside,) = [folder for folder in tmp_path.iterdir() if folder != path]
    assert aside.name.startswith("demo-202311")
    assert (aside / "metrics.jsonl").read_text() == "kept"
    assert not (path / "metrics.jsonl").exists()
    assert said == [f"the earlier run is now {aside}"]


def test_an_earlier_run_whose_place_aside_is_taken_stays_where_it_is(tmp_path, said):
    path = tmp_path / "demo"
    for _ in range(2):
        open_run_folder(path, settings={}, overwrite=False, say=said.append)
        os.utime(path / "demo.json", (1_700_000_000, 1_700_000_000))
    with pytest.raises(RunFolderError, match="which exists too"):
        open_run_folder(path, settings={}, overwrite=False, say=said.append)
    assert (path / "demo.json").exists()


def test_overwrite_replaces_an_earlier_run(tmp_path, said):
    path = tmp_path / "demo"
    open_run_folder(path, settings={"seed": 1}, overwrite=False, say=said.append)
    (path / "metrics.jsonl").write_text("old")
    open_run_folder(path, settings={"seed": 2}, overwrite=True, say=said.append)
    assert [file.name for file in path.iterdir()] == ["demo.json"]
    assert [folder.name for folder in tmp_path.iterdir()] == ["demo"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_not_a_run_is_never_touched(tmp_path, said, overwrite):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunFolderError, match="is not a run of the demo"):
        open_run_folder(tmp_path, settings={}, overwrite=overwrite, say=said.append)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_model_folder_is_taken_as_it_is(tmp_path, said):
    (tmp_path / "config.json").write_text("{}")
    assert find_model(str(tmp_path), say=said.append) == tmp_path.resolve()


def test_a_folder_without_config_is_not_a_model(tmp_path, said):
    with pytest.raises(RunFolderError, match=r"has no config\.json"):
        find_model(str(tmp_path), say=said.append)


def test_a_model_that_cannot_be_fetched_is_named_with_a_way_out(monkeypatch, said):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RunFolderError, match="leave --model out to use SmolLM2"):
        find_model("nobody/no-such-model", say=said.append)
    assert said == ["Fetching nobody/no-such-model from the Hugging Face hub"]
