import pytest

from openrlhf_alp.launch.recipe import RecipeError, read_recipe, to_settings, to_toml

TEXT = """\
[run]
folder = "runs/x"

[model]
path = "/models/m"

[data]
task = "addition"
steps = 4

[rollout]
servers = 2
max_model_len = 64

[rollout.faults]
step_s = 0.5

[train]
alp.method = "seq-alp"
actor.adam.betas = [0.9, 0.95]
"""


@pytest.fixture
def read(tmp_path):
    """Reads TEXT with a replacement in it and settings over it."""

    def do(old="", new="", *settings):
        path = tmp_path / "r.toml"
        path.write_text(TEXT.replace(old, new, 1) if old else TEXT)
        return read_recipe(path, settings)

    return do


def test_other_keys_of_a_table_are_flags_under_their_dotted_names(read):
    recipe, _ = read()
    assert recipe.rollout.servers == 2
    assert recipe.rollout.flags == {"max_model_len": 64, "faults.step_s": 0.5}
    assert recipe.train.flags == {"alp.method": "seq-alp", "actor.adam.betas": [0.9, 0.95]}


def test_a_setting_wins_and_needs_no_quotes(read):
    recipe, _ = read(
        "", "", "train.alp.method=seq-bypass", "rollout.servers=3", "train.ds.packing_samples=true"
    )
    assert recipe.train.flags["alp.method"] == "seq-bypass"
    assert recipe.train.flags["ds.packing_samples"] is True
    assert recipe.rollout.servers == 3


def test_the_home_folder_is_found_wherever_a_recipe_names_a_file(read, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    recipe, _ = read(
        *('"/models/m"', '"~/models/m"', "run.folder=~/runs/x", "train.reward.remote_url=~/r.py"),
        'train.actor.names=["~/a", "b~/c"]',
    )
    assert (recipe.model.path, str(recipe.run.folder)) == ("/home/me/models/m", "/home/me/runs/x")
    assert recipe.train.flags["reward.remote_url"] == "/home/me/r.py"
    assert recipe.train.flags["actor.names"] == ["/home/me/a", "b~/c"]


def test_a_written_recipe_reads_the_same(read, tmp_path):
    recipe, _ = read(
        "",
        "",
        'run.folder="a b\\"c"',
        "run.condition=\U0001f600\u00e9\x7f\x01",
        "train.x=[1, -inf]",
    )
    path = tmp_path / "again.toml"
    path.write_text(to_toml(recipe))
    again, _ = read_recipe(path)
    assert again == recipe
    assert to_settings(again)["rollout.faults.step_s"] == 0.5


@pytest.mark.parametrize(
    ("old", "new", "settings", "shown"),
    [
        (
            "steps = 4",
            "stpes = 4",
            [],
            "line 9: there is no setting data.stpes. Did you mean steps?",
        ),
        ("[model]", "[modell]", [], "line 4: there is no setting modell. Did you mean model?"),
        ("steps = 4", "steps = 0", [], "line 9: data.steps = 0: "),
        ("steps = 4", "", [], "a made task needs a number of steps"),
        ('path = "/models/m"', "", [], "model.path is missing"),
        ("servers = 2", "servers = two", [], "is no TOML"),
        ("", "", ["run.sed=3"], "--set run.sed: there is no setting run.sed. Did you mean seed?"),
        ("", "", ["seed"], "--set seed: write it as --set train.alp.method=seq-bypass"),
        ("", "", ["data.path=x.jsonl"], "give one of task, path and sources, not ['task', 'path']"),
        ("", "", ["train.ray_address=http://h:1"], "train.ray_address needs rollout.urls"),
        ("steps = 4", f"steps = {'1' * 5000}", [], "is no TOML"),
        ("steps = 4", f"steps = {'[' * 5000}", [], "is no TOML"),
        ("", "", [f"data.steps={'1' * 5000}"], "--set data.steps: data.steps = '1111"),
        ("", "", ["run.seed=4294967296"], "run.seed = 4294967296: Input should be less than"),
        ("", "", ["rollout.servers=1000000000"], "Input should be less than or equal to 1000"),
        ("", "", ["sweep.conditions=5"], "sweep.conditions = 5: Input should be a valid dict"),
        ("", "", ["sweep.conditions.a=5"], "sweep.conditions.a = 5: Input should be a valid dict"),
        ("", "", ["sweep.values=[1]"], "sweep.values = [1]: Input should be a valid dict"),
        ("addition", "addition2", [], "line 8: data.task = 'addition2'"),
    ],
)
def test_a_mistake_is_shown_with_its_place_and_the_nearest_name(read, old, new, settings, shown):
    with pytest.raises(RecipeError) as caught:
        read(old, new, *settings)
    assert shown in str(caught.value)


def test_a_file_may_begin_with_a_byte_order_mark(read):
    assert read("[run]", "\ufeff[run]")[0].run.seed == 42


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"none\.toml cannot be read"):
        read_recipe(tmp_path / "none.toml")
