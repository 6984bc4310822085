"""`openrlhf-alp launch`: its options. `launch/run.py` does the work."""

import argparse
from pathlib import Path

from rich.console import Console

from openrlhf_alp.launch.recipe import Recipe, RecipeError, read_recipe
from openrlhf_alp.launch.view import LaunchView
from openrlhf_alp.report.metrics import RECIPE

HELP = "start services and learner from a recipe, watch the run, end everything"

DESCRIPTION = """\
Starts what a recipe names, on whatever there is: tool and rollout services, then the learner. GPUs
are taken from those that are free, or from CUDA_VISIBLE_DEVICES. Services and learner get generated
keys. Everything that was started ends with the run, on Ctrl-C, SIGTERM, a lost terminal or when a
part fails; a service that dies during training is started again.

  openrlhf-alp launch recipes/demo.toml
  openrlhf-alp launch recipes/demo.toml --set data.steps=4 --set train.alp.method=seq-bypass
  openrlhf-alp launch recipes/tir_qwen2.5_7b.toml --dry-run --pretend-gpus 8x80
  openrlhf-alp launch recipes/demo.toml --seeds 1,2,3 --sweep train.alp.method=seq-alp,seq-bypass
  openrlhf-alp launch --resume runs/single_turn_qwen2.5_math_1.5b

The run folder has recipe.toml, environment.json, metrics.jsonl, tensorboard/, logs/, checkpoints/,
model/ and, when the run is finished, plots/ and summary.json.

exit status: 0 done, 1 something failed, 2 recipe, folder or machine not right, 128 + stop signal.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `openrlhf-alp launch`."""
    add = parser.add_argument
    add(
        "recipe", type=Path, nargs="?", metavar="RECIPE", help="a .toml file, see recipes/README.md"
    )
    add(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="put a value over the recipe's, for example train.data.max_len=512; repeatable",
    )
    add("--steps", metavar="N", help="the same as --set data.steps=N (made tasks)")
    add("--method", metavar="NAME", help="the same as --set train.alp.method=NAME")
    add("--model", metavar="PATH", help="the same as --set model.path=PATH")
    add("--seed", metavar="N", help="the same as --set run.seed=N")
    add("--output", metavar="FOLDER", help="the same as --set run.folder=FOLDER")
    add("--overwrite", action="store_true", help="replace an earlier run in the folder")
    add("--resume", type=Path, metavar="RUN", help="continue a run from its newest checkpoint")
    add("--seeds", metavar="1,2,3", help="one run for each, in folders below the recipe's")
    add(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=A,B",
        help="one run for each value; with several of them and --seeds, each combination",
    )
    add(
        "--dry-run",
        action="store_true",
        help="check everything; print commands, GPUs and estimated memory; start nothing",
    )
    add(
        "--pretend-gpus",
        metavar="8x80",
        help="with --dry-run: plan for 8 free GPUs of 80 GB instead of this machine's",
    )
    add("--quiet", action="store_true", help="print errors only")
    # What a sweep gives to its cells.
    add("--lent", type=Path, help=argparse.SUPPRESS)


_SHORT = {
    "steps": "data.steps",
    "method": "train.alp.method",
    "model": "model.path",
    "seed": "run.seed",
    "output": "run.folder",
}


def run(arguments: argparse.Namespace) -> int:
    """Launches; the exit status is that of DESCRIPTION."""
    view = LaunchView(Console(), quiet=arguments.quiet and not arguments.dry_run)
    settings = list(arguments.settings)
    for option, key in _SHORT.items():
        if (value := getattr(arguments, option)) is not None:
            settings.append(f"{key}={value}")
    try:
        return _launch(arguments, settings, view)
    except RecipeError as error:
        view.refusal(str(error))
        return 2


def _launch(arguments: argparse.Namespace, settings: list[str], view: LaunchView) -> int:
    if arguments.recipe is None and arguments.resume is None:
        raise RecipeError("name a recipe, such as recipes/demo.toml, or a run with --resume")
    if arguments.recipe is None and settings:
        raise RecipeError(f"--resume keeps the settings of the run, so {settings[0]} has no place")
    if arguments.pretend_gpus and not arguments.dry_run:
        raise RecipeError("--pretend-gpus plans only: it goes with --dry-run")
    path = arguments.recipe or arguments.resume / RECIPE
    asked, source = read_recipe(path, settings)
    if (
        arguments.seeds is not None
        or arguments.sweep
        or asked.sweep.conditions
        or asked.sweep.values
    ):
        return _sweep(arguments, path, settings, view, asked)
    # Here and not above: they import torch and transformers, which takes seconds.
    from openrlhf_alp.launch.run import Options, launch
    from openrlhf_alp.launch.run_folder import read_run

    recipe = read_run(arguments.resume, asked) if arguments.resume else asked
    view.title(f"{path}: seed {recipe.run.seed}")
    options = Options(
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        dry_run=arguments.dry_run,
        pretend_gpus=arguments.pretend_gpus,
        lent=arguments.lent,
    )
    return launch(recipe, source, view, options)


def _sweep(
    arguments: argparse.Namespace,
    path: Path,
    settings: list[str],
    view: LaunchView,
    asked: Recipe,
) -> int:
    from openrlhf_alp.launch.sweep import cells_of, check_cells, sweep

    if arguments.resume or arguments.overwrite:
        raise RecipeError(
            "a sweep continues by itself: give the same command again. --seeds, --sweep and the "
            "recipe's [sweep] go with neither --resume nor --overwrite; --set 'sweep={}' leaves "
            "the recipe's out"
        )
    folder = (asked.run.folder or Path("runs", path.stem)).resolve()
    cells = cells_of(
        folder.parent / f"{folder.name}-sweep",
        settings,
        arguments.seeds,
        arguments.sweep,
        asked.sweep,
    )
    if arguments.dry_run:
        return check_cells(path, cells, view, arguments.pretend_gpus)
    return sweep(path, cells, view)
