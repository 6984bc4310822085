"""The recipes that come with the project, read by OpenRLHF's own parser and checks and by ours."""

import itertools
import re
import runpy
import tomllib
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import openrlhf_alp.learner  # noqa: F401  (installs the shims that OpenRLHF needs to import)
from openrlhf_alp.launch.commands import Inputs, train_flags
from openrlhf_alp.launch.recipe import flatten, read_recipe
from openrlhf_alp.launch.sweep import cells_of
from openrlhf_alp.learner import seams
from openrlhf_alp.learner.flags.settle import add_arguments, settle

pytestmark = pytest.mark.filterwarnings("ignore")

RECIPES = Path(__file__).parents[2] / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.toml"))
EXPERIMENTS = sorted(path.stem for path in (RECIPES / "experiments").glob("*.toml"))
PAPER = ("single_turn_qwen2.5_math_1.5b", "tir_qwen2.5_7b")
KEYS = (
    "OPENRLHF_ALP_ROLLOUT_API_KEY",
    "OPENRLHF_ALP_ROLLOUT_ADMIN_KEY",
    "OPENRLHF_ALP_TOOL_API_KEY",
)


@pytest.fixture
def train_args(monkeypatch):
    """What OpenRLHF and we make of a recipe; a wrong or contradictory flag fails here."""
    for name in KEYS:
        monkeypatch.setenv(name, "key-of-a-test")

    def parse(name, *settings):
        recipe, _ = read_recipe(RECIPES / f"{name}.toml", settings)
        inputs = Inputs(
            model="/models/m",
            prompts="/data/prompts.jsonl",
            folder=Path("/runs/x"),
            rollout_urls=["http://127.0.0.1:8000"],
            tool_urls=["http://127.0.0.1:8100"] if recipe.tool else [],
        )
        return seams.parsed_args(train_flags(recipe, inputs), add_arguments, settle)

    return parse


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_one_that_training_takes(train_args, name):
    args = train_args(name)
    assert args.alp.perturbed
    assert args.rollout_service.urls == ("http://127.0.0.1:8000",)


def first_seed_cells(name):
    """Cells of an experiment, of its first seed alone: the others differ in nothing else."""
    path = RECIPES / "experiments" / f"{name}.toml"
    recipe, _ = read_recipe(path)
    seed = recipe.sweep.values["run.seed"][0]
    return cells_of(Path("s"), [], str(seed), [], recipe.sweep)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_cell_of_an_experiment_is_one_that_training_takes(train_args, name):
    cells = first_seed_cells(name)
    assert len({cell.name for cell in cells}) == len(cells) > 1
    for cell in cells:
        args = train_args(f"experiments/{name}", *cell.settings)
        assert args.alp.enable
        samples = args.rollout.batch_size * args.rollout.n_samples_per_prompt
        assert samples == 32 and samples % args.train.batch_size == 0
        if "stale-4" in cell.name:
            assert samples // args.train.batch_size == 4


def test_methods_of_an_experiment_run_at_equal_windows(train_args):
    windows: dict[str, set[tuple[float, float]]] = {}
    for cell in first_seed_cells("stability"):
        ratio = train_args("experiments/stability", *cell.settings).alp.objective()
        windows.setdefault(ratio.level, set()).add((ratio.clip_low, ratio.clip_high))
    assert windows == {"token": {(0.2, 0.28)}, "sequence": {(0.5, 3.0)}}


def test_the_chains_of_the_warm_up_are_what_the_prompts_ask_for(character_model):
    made = runpy.run_path(str(RECIPES / "experiments" / "minimind2.py"))
    assert made["question"]([3, 2, 5, 2]) == "3 + 2 + 5 + 2:"
    assert made["solution"]([3, 2, 5, 2]) == " 3 + 2 = 5, 5 + 5 = 10, 10 + 2 = 12"
    one, other = (list(itertools.islice(made["random_chains"](seed), 20)) for seed in (0, 1))
    assert one != other and all(len(chain) == 4 and min(chain) > 0 for chain in one + other)
    tokenizer = AutoTokenizer.from_pretrained(character_model)
    batch = made["_batch"](tokenizer, [[3, 2, 5, 2], [9, 9, 9, 9]])
    taught = [row[row != -100] for row in batch["labels"]]
    assert [tokenizer.decode(row) for row in taught] == [
        " 3 + 2 = 5, 5 + 5 = 10, 10 + 2 = 12" + tokenizer.eos_token,
        " 9 + 9 = 18, 18 + 9 = 27, 27 + 9 = 36" + tokenizer.eos_token,
    ]
    assert batch["attention_mask"].sum(1).tolist() == [
        len("3 + 2 + 5 + 2:") + len(row) for row in taught
    ]


@pytest.mark.parametrize("name", PAPER)
def test_every_value_of_the_papers_recipes_says_where_it_comes_from(name):
    text = (RECIPES / f"{name}.toml").read_text()
    values = re.findall(r"^[\w.]+ = (?!\[$)(?!\[\n).*$", text, flags=re.MULTILINE)
    assert len(values) > 40
    assert [line for line in values if "#" not in line and "LLM360" not in line] == []
    assert len(flatten(tomllib.loads(text))) > 40


def test_single_turn_training_is_the_papers(train_args):
    """Appendix E: 512 prompts, 2048 + 2048 tokens, dual clip 10; the release: 16 updates."""
    args = train_args(PAPER[0])
    assert args.rollout.batch_size == 512
    assert args.rollout.batch_size * args.rollout.n_samples_per_prompt / args.train.batch_size == 16
    samples_at_once = args.train.micro_batch_size * args.actor.num_gpus_per_node
    assert args.train.batch_size % samples_at_once == 0
    assert (args.data.max_len, args.rollout.max_new_tokens) == (4096, 2048)
    assert args.data.apply_chat_template
    ratio = args.alp.objective()
    assert args.alp.perturbed and ratio.level == "token"
    assert (ratio.clip_low, ratio.clip_high, ratio.dual_clip) == (0.2, 0.28, 10.0)
    assert (args.alp.noise.kind, args.alp.noise.layers) == ("vector", "all")
    assert args.algo.kl.use_loss and args.algo.kl.init_coef == 0.001
    assert args.actor.adam.lr == 1e-6 and args.actor.lr_scheduler == "constant"
    assert args.actor.num_gpus_per_node == args.ref.num_gpus_per_node == 4


def test_a_setting_wins_over_the_recipe(train_args):
    assert not train_args(PAPER[0], "train.alp.method=token-bypass").alp.perturbed


def test_a_run_records_its_steps_in_its_own_folder(train_args):
    assert train_args("demo").alp.record is None
    assert train_args("demo", "run.record=true").alp.record == "/runs/x/batches"


def test_tool_integrated_training_is_the_papers(train_args):
    """Section 4.1, Table 3 and the release: 128 prompts of 16 episodes, 4 updates, 5 programs."""
    args = train_args(PAPER[1])
    assert (args.rollout.batch_size, args.rollout.n_samples_per_prompt) == (128, 16)
    assert args.rollout.batch_size * args.rollout.n_samples_per_prompt / args.train.batch_size == 4
    assert args.rollout.max_new_tokens + 4096 == args.data.max_len == 24000
    assert args.train.max_tokens_per_gpu >= args.data.max_len
    assert not args.data.apply_chat_template
    ratio = args.alp.objective()
    assert args.alp.perturbed and ratio.level == "sequence"
    assert (ratio.clip_low, ratio.clip_high, ratio.dual_clip) == (0.5, 3.0, 3.0)
    assert args.algo.kl.init_coef == 0 and not args.algo.kl.use_loss
    tool = args.tool_service
    assert (tool.urls, tool.template, tool.void) == (
        ("http://127.0.0.1:8100",),
        "plain",
        "trajectory",
    )
    assert (tool.max_tool_turns, tool.max_tokens_per_turn) == (5, 8000)
