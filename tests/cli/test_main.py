import importlib.metadata
import subprocess
import sys

import pytest

from openrlhf_alp.cli.main import COMMANDS, build_parser, load_command, main


def test_help_lists_every_command_and_points_to_training_and_services(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for name in COMMANDS:
        assert name in shown
        assert load_command(name).HELP.split()[0] in shown
    assert "openrlhf_alp.cli.train_ppo_ray --help" in shown
    assert "services.rollout --help" in shown


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"openrlhf-alp {importlib.metadata.version('openrlhf-alp')}\n"


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["launch", "--no-such-option"]])
def test_a_wrong_command_line_ends_with_status_2_and_usage(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: openrlhf-alp" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--data_dir=d", "--data-dir=d"])
@pytest.mark.parametrize(
    "command", [["evaluate", "--model", "m"], ["prepare-data", "--from", "s", "--to", "t"]]
)
def test_an_option_may_be_spelled_as_in_a_shell_or_as_the_trainers_flags(command, option):
    parsed = build_parser().parse_args([*command, option])
    assert str(parsed.data_dir) == "d"


def test_a_value_keeps_its_spelling():
    parsed = build_parser().parse_args(["launch", "r-1_a", "--set=x-1_a", "--pretend_gpus=a-b_c"])
    assert (parsed.pretend_gpus, parsed.settings) == ("a-b_c", ["x-1_a"])


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ([], "name a recipe, such as recipes/demo.toml"),
        (["recipes/demo.toml", "--steps", "0"], "--set data.steps: data.steps = 0"),
        (["recipes/demo.toml", "--pretend-gpus", "8x80"], "it goes with --dry-run"),
        (["--resume", "runs/x", "--seed", "3"], "--resume keeps the settings of the run"),
        (["recipes/demo.toml", "--seeds", "1,2", "--overwrite"], "give the same command again"),
    ],
)
def test_a_launch_that_cannot_be_meant_is_refused_before_anything_starts(capsys, arguments, shown):
    assert main(["launch", *arguments]) == 2
    assert shown in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("arguments", [["--help"], ["preflight", "--model", "tiny"]])
def test_a_command_whose_packages_are_missing_says_what_to_install(arguments):
    script = (
        "import sys\n"
        "sys.modules['rich'] = None\n"
        "from openrlhf_alp.cli.main import main\n"
        f"sys.exit(main({arguments}))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert run.returncode == (0 if arguments == ["--help"] else 2), run.stderr
    assert "pip install 'openrlhf-alp[learner]'" in run.stdout + run.stderr


def test_help_does_not_wait_for_torch():
    script = (
        "import sys\n"
        "from openrlhf_alp.cli import main\n"
        "main.build_parser()\n"
        "slow = {'torch', 'transformers', 'ray', 'vllm', 'openrlhf'} & sys.modules.keys()\n"
        "sys.exit(' '.join(slow))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert run.stderr.strip() == ""
