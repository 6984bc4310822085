"""The launch scripts, run by bash up to the moment when training would start.

`PYTHON` of a script is a recorder: it runs what prepares the data for real, and writes down the
command line of the training run, which OpenRLHF's own parser and checks then read.
"""

import functools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import openrlhf_alp.learner  # noqa: F401  (installs the shims that OpenRLHF needs to import)
from openrlhf_alp.data.templates import TEMPLATES
from openrlhf_alp.learner import seams
from openrlhf_alp.learner.flags.settle import add_arguments, settle

pytestmark = pytest.mark.e2e

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.sh"))
SINGLE_TURN = "train_single_turn_qwen2.5_math_1.5b.sh"
TOOL_INTEGRATED = "train_tir_qwen2.5_7b.sh"

KEYS = {
    "OPENRLHF_ALP_ROLLOUT_API_KEY": "api-key-of-a-test",
    "OPENRLHF_ALP_ROLLOUT_ADMIN_KEY": "admin-key-of-a-test",
    "OPENRLHF_ALP_TOOL_API_KEY": "tool-key-of-a-test",
}
ROWS = [{"problem": f"What is 3 + {n}?", "answer": str(3 + n)} for n in range(5)]

RECORDER = f"""\
#!/bin/sh
if [ "$2" = openrlhf_alp.cli.train_ppo_ray ]; then
    shift 2
    exec {shlex.quote(sys.executable)} -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "$@"
fi
exec {shlex.quote(sys.executable)} "$@" >&2
"""


@pytest.fixture(scope="module")
def run_script(tmp_path_factory, chat_tokenizer):
    """Runs a script on a small set. The runs of one script share their folder, as a user's do."""
    folder = tmp_path_factory.mktemp("scripts")
    recorder = folder / "python"
    recorder.write_text(RECORDER)
    recorder.chmod(0o755)
    problems = folder / "problems.json"
    problems.write_text(json.dumps(ROWS))
    variables = {
        "PYTHON": str(recorder),
        "MODEL": str(chat_tokenizer),
        "SOURCES": str(problems),
        "ROLLOUT_URLS": "http://127.0.0.1:8000 http://127.0.0.1:8001",
    }

    def run(name: str, *flags: str, **changed: str | None) -> subprocess.CompletedProcess:
        run_folder = str(folder / name.removesuffix(".sh"))
        environment = {**os.environ, **KEYS, **variables, "RUN": run_folder, **changed}
        return subprocess.run(
            ["bash", str(EXAMPLES / name), *flags],
            env={name: value for name, value in environment.items() if value is not None},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    return run


@pytest.fixture(scope="module")
def train_flags(run_script) -> Callable[..., list[str]]:
    """The training flags that a script ends with."""

    @functools.cache
    def flags(name: str, *more: str, **changed: str) -> list[str]:
        run = run_script(name, *more, **changed)
        assert run.returncode == 0, run.stderr
        return json.loads(run.stdout)

    return flags


@pytest.fixture
def train_args(train_flags, monkeypatch) -> Callable[..., SimpleNamespace]:
    """What OpenRLHF and we make of a script's flags; a wrong or contradictory one fails here."""
    for name, key in KEYS.items():
        monkeypatch.setenv(name, key)

    def parse(name: str, *more: str) -> SimpleNamespace:
        return seams.parsed_args(train_flags(name, *more), add_arguments, settle)

    return parse


def test_there_are_scripts():
    assert {SINGLE_TURN, TOOL_INTEGRATED} <= set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_valid_bash_and_stops_at_the_first_error(name):
    subprocess.run(["bash", "-n", str(EXAMPLES / name)], check=True)
    assert "\nset -euo pipefail\n" in (EXAMPLES / name).read_text()


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_value_says_where_it_comes_from(name):
    """A flag has a comment on its line, or takes a variable that is explained where it is set."""
    lines = (EXAMPLES / name).read_text().splitlines()
    flags = [line for line in lines if re.match(r" +--", line)]
    assert len(flags) > 40
    assert [line for line in flags if "#" not in line and "$" not in line] == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_without_keys_a_script_says_which_one_is_missing(run_script, name):
    run = run_script(name, OPENRLHF_ALP_ROLLOUT_ADMIN_KEY=None)
    assert run.returncode != 0
    assert "OPENRLHF_ALP_ROLLOUT_ADMIN_KEY: export the admin key" in run.stderr


@pytest.mark.parametrize(
    ("name", "template"), [(SINGLE_TURN, "chat-math"), (TOOL_INTEGRATED, "base-tir")]
)
def test_the_data_is_prepared_once_with_the_template_whose_flags_training_gets(
    train_flags, name, template
):
    flags = train_flags(name)
    path = Path(flags[flags.index("--data.prompt_dataset") + 1])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["label"] for row in rows] == [row["answer"] for row in ROWS]
    assert rows[0]["input"] == TEMPLATES[template].render(ROWS[0]["problem"])
    assert TEMPLATES[template].train_flags == " ".join(_data_flags(flags))
    assert train_flags(name, SOURCES="gone.json") == flags


def _data_flags(flags: list[str]) -> list[str]:
    """The flags that a template speaks of, in its order."""
    kept = []
    for name in ("--data.input_key", "--data.label_key", "--data.apply_chat_template"):
        if name in flags:
            place = flags.index(name)
            kept += flags[place : place + (1 if name.endswith("chat_template") else 2)]
    if "--tir.template" in flags:
        kept += flags[flags.index("--tir.template") :][:2]
    return kept


def test_single_turn_training_is_the_papers(train_args):
    """Appendix E: 512 prompts, 2048 + 2048 tokens, dual clip 10; the release: 16 updates."""
    args = train_args(SINGLE_TURN)
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
    assert args.rollout_service.urls == ("http://127.0.0.1:8000", "http://127.0.0.1:8001")


def test_flags_after_the_script_win(train_args):
    assert not train_args(SINGLE_TURN, "--alp.method", "token-bypass").alp.perturbed


def test_tool_integrated_training_is_the_papers(train_args):
    """Section 4.1, Table 3 and the release: 128 prompts of 16 episodes, 4 updates, 5 programs."""
    args = train_args(TOOL_INTEGRATED)
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
        ("http://127.0.0.1:8090",),
        "plain",
        "trajectory",
    )
    assert (tool.max_tool_turns, tool.max_tokens_per_turn) == (5, 8000)
