import argparse
import importlib.util
from pathlib import Path

import pytest

from openrlhf_alp.launch.recipe import (
    METHODS,
    DemoConfig,
    service_command,
    tool_command,
    train_command,
    warm_up_command,
)
from openrlhf_alp.learner.flags.settle import add_arguments
from openrlhf_alp.objective.methods import METHODS as ALL_METHODS
from services.rollout.settings import RolloutSettings


def training(tool_url: str | None) -> list[str]:
    config = DemoConfig(
        steps=2,
        method="token-alp",
        model=None,
        seed=7,
        output=Path("demo"),
        overwrite=False,
        tir=tool_url is not None,
    )
    return train_command(
        config,
        model=Path("/models/m"),
        train_data=Path("/runs/demo/task/train.jsonl"),
        run_folder=Path("/runs/demo"),
        rollout_url="http://127.0.0.1:1",
        tool_url=tool_url,
    )


@pytest.fixture(params=[None, "http://127.0.0.1:2"])
def command(request: pytest.FixtureRequest) -> list[str]:
    return training(request.param)


def value(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


def test_every_flag_is_one_that_training_takes(command):
    spec = importlib.util.find_spec("openrlhf")
    assert spec is not None and spec.submodule_search_locations
    upstream = Path(spec.submodule_search_locations[0]) / "cli" / "train_ppo_ray.py"
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    ours = [f'"{option}"' for action in parser._actions for option in action.option_strings]
    known = upstream.read_text().replace("{prefix}", "actor") + " ".join(ours)
    flags = [argument for argument in command if argument.startswith("--")]
    assert len(flags) > 25
    assert [flag for flag in flags if f'"{flag}"' not in known] == []


def test_no_flag_is_given_twice(command):
    flags = [argument for argument in command if argument.startswith("--")]
    assert len(flags) == len(set(flags))


def test_a_step_is_one_update_on_all_its_samples(command):
    prompts = int(value(command, "--rollout.batch_size"))
    samples = int(value(command, "--rollout.n_samples_per_prompt"))
    assert int(value(command, "--train.batch_size")) == prompts * samples == 64


def test_what_the_user_chose_reaches_training(command):
    assert value(command, "--alp.method") == "token-alp"
    assert value(command, "--train.seed") == value(command, "--alp.seed") == "7"
    assert value(command, "--rollout.service_urls") == "http://127.0.0.1:1"
    assert value(command, "--logger.metrics_jsonl") == "/runs/demo/metrics.jsonl"
    assert command[command.index("--alp.enable") + 1].startswith("--")
    at = command.index("--actor.adam.betas")
    assert command[at + 1 : at + 3] == ["0.9", "0.95"]


def test_every_method_of_the_demo_exists():
    assert set(METHODS) <= ALL_METHODS.keys()


def test_every_flag_of_the_service_is_one_of_its_settings():
    command = service_command(model=Path("/m"), url_file=Path("/u"), seed=1)
    flags = {flag.removeprefix("--").replace("-", "_") for flag in command if flag[:2] == "--"}
    assert flags <= RolloutSettings.model_fields.keys()
    assert value(command, "--host") == "127.0.0.1"


def test_a_tool_integrated_run_knows_its_service_and_a_plain_one_has_none():
    plain, tool = (training(url) for url in (None, "http://127.0.0.1:2"))
    assert "--tool.service_urls" not in plain
    assert value(tool, "--tool.service_urls") == "http://127.0.0.1:2"
    assert int(value(tool, "--tir.max_tool_turns")) >= 1


def test_the_tool_service_is_for_this_machine_only():
    command = tool_command(url_file=Path("/u"))
    assert (value(command, "--host"), value(command, "--port")) == ("127.0.0.1", "0")


def test_the_warm_up_reads_one_model_and_writes_another():
    command = warm_up_command(model=Path("/m"), output=Path("/w"), seed=3)
    assert (value(command, "--model"), value(command, "--output")) == ("/m", "/w")
    assert value(command, "--seed") == "3"
