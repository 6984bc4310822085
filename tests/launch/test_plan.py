import json
import re
import socket

import pytest
import torch
from safetensors.torch import save_file

from openrlhf_alp.launch import machine, plan
from openrlhf_alp.launch.commands import Commands
from openrlhf_alp.launch.processes.supervisor import Supervisor
from openrlhf_alp.launch.recipe import RecipeError, read_recipe

SHAPE = {
    "num_ranks": 4,
    "weight_bytes": 2,
    "zero_stage": 3,
    "adam_offload": True,
    "micro_batch_tokens": 1000,
    "batch_size": 8,
    "num_episodes": 1,
    "max_samples": 10**8,
    "num_checkpoints": 3,
}


@pytest.fixture
def recipe(tmp_path):
    """A recipe on the model folder `tmp_path / "m"`, and its source."""
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"vocab_size": 100}))
    save_file({"w": torch.zeros(1000, 1000), "b": torch.zeros(1000)}, folder / "a.safetensors")

    def make(*settings):
        path = tmp_path / "r.toml"
        path.write_text(
            f'[model]\npath = "{folder}"\n[data]\npath = "prompts.jsonl"\n[rollout]\n[train]\n'
        )
        return read_recipe(path, settings)

    return make


def planned(recipe, here, tmp_path):
    gpus = here.free_gpus
    return plan.make_plan(recipe, tmp_path / "run", recipe.model.path, gpus, Commands())


def value(command, flag):
    return command[command.index(flag) + 1]


def test_servers_and_learner_get_gpus_of_their_own(recipe, tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    made, _ = recipe("rollout.servers=2", "rollout.gpus=2", "train.gpus=3", "tool.servers=1")
    processes = planned(made, machine.pretended_machine("8x80"), tmp_path).processes
    gpus = {process.name: process.gpus for process in processes}
    assert gpus == {
        "tool-0": (),
        "rollout-0": ("0", "1"),
        "rollout-1": ("2", "3"),
        "train": ("4", "5", "6"),
    }
    servers = [process.command for process in processes if process.name.startswith("rollout")]
    assert [value(command, "--tensor-parallel-size") for command in servers] == ["2", "2"]
    # One folder for both: an update is written once.
    assert value(servers[0], "--weights-dir") == value(servers[1], "--weights-dir")
    train = processes[-1].command
    assert value(train, "--actor.num_gpus_per_node") == "3"
    urls = train[train.index("--rollout.service_urls") + 1 :][:2]
    assert urls == ["http://127.0.0.1:rollout-0", "http://127.0.0.1:rollout-1"]


def test_one_gpu_may_serve_and_learn(recipe, tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    made, _ = recipe("rollout.gpus=1", "train.gpus=1", "train.shares_gpus=true")
    assert plan.gpus_needed(made) == 1
    processes = planned(made, machine.pretended_machine("1x80"), tmp_path).processes
    assert [process.gpus for process in processes] == [("0",), ("0",)]


def test_only_visible_and_free_gpus_are_taken(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6,3")
    assert [gpu.name for gpu in machine.pretended_machine("8x80").free_gpus] == ["5", "6", "3"]
    busy = machine.Gpu(name="0", memory_gb=80.0, used_gb=20.0)
    here = machine.Machine(gpus=(busy, machine.Gpu(name="1", memory_gb=80.0)), memory_gb=1.0)
    assert [gpu.name for gpu in here.free_gpus] == ["1"]


def test_two_launches_get_different_gpus_and_a_third_is_told_what_to_do():
    gpus = [machine.Gpu(name=f"test-{name}", memory_gb=80.0) for name in range(3)]
    with machine.claimed(gpus, 2) as one, machine.claimed(gpus, 1) as two:
        assert [gpu.name for gpu in (*one, *two)] == ["test-0", "test-1", "test-2"]
        with (
            pytest.raises(RecipeError, match=r"needs 1 GPU\(s\) and 0 are free"),
            machine.claimed(gpus, 1),
        ):
            pass
    with machine.claimed(gpus, 3) as freed:
        assert len(freed) == 3


def test_what_a_run_needs_at_least_is_arithmetic(recipe, tmp_path, monkeypatch):
    """1.001e6 weights: 2 bytes each to serve; ZeRO-3 on 4 ranks 1 byte each, Adam on the host;
    logits of 1000 tokens and 100 words at 10 bytes are 0.001 GB."""
    made, _ = recipe("rollout.gpus=1", "train.gpus=4")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    drawn = planned(made, machine.pretended_machine("8x80"), tmp_path)
    needs = {
        need.where: need.gb
        for need in plan._needs(plan.replace(drawn, shape=SHAPE))  # what check_plan adds
    }
    assert needs == {
        "each GPU of a server": pytest.approx(1 + 0.002002),
        "each GPU of the learner": pytest.approx(1 + 0.001 + 0.001001),
        "disk of the run folder": pytest.approx(0.001001 * (2 + 3 * 14)),
    }


GPU = ("rollout.gpus=1", "train.gpus=4")


@pytest.mark.parametrize(
    ("gpu_gb", "host_gb", "kept", "settings", "shown"),
    [
        (0.5, 64, 3, GPU, "each GPU of a server needs at least 1.0 GB"),
        (80, 4, 3, ["rollout.servers=2"], "host, each server needs at least 2.0 GB"),
        (80, 4, 3, [], "host, the learner needs at least 4.0 GB"),
        (80, 64, 10**9, GPU, "disk of the run folder needs at least 14014000.0 GB"),
    ],
)
def test_a_run_that_has_no_room_is_refused_with_the_arithmetic(
    recipe, tmp_path, gpu_gb, host_gb, kept, settings, shown
):
    """1.001e6 weights: 1 GB of each process, 1 GB of cache of each server, 4 ranks, 14 bytes of
    each weight in a checkpoint."""
    made, _ = recipe(*settings)
    gpus = tuple(machine.Gpu(name=str(n), memory_gb=gpu_gb) for n in range(8))
    here = machine.Machine(gpus=gpus, memory_gb=host_gb)
    shape = SHAPE | {"num_checkpoints": kept}
    drawn = plan.replace(planned(made, here, tmp_path), shape=shape)
    drawn = plan.replace(drawn, needs=tuple(plan._needs(drawn)))
    with pytest.raises(RecipeError, match=re.escape(shown)):
        plan._check_room(drawn, here)


def test_a_model_that_was_not_fetched_whole_is_refused_by_its_file(recipe, tmp_path):
    recipe()
    weights = tmp_path / "m" / "a.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(RecipeError, match=r"a\.safetensors is broken .* Fetch the model again"):
        plan.num_parameters(tmp_path / "m")
    weights.unlink()
    with pytest.raises(RecipeError, match=r"has no weights \(\*\.safetensors or \*\.bin\)"):
        plan.num_parameters(tmp_path / "m")
    weights.with_suffix(".bin").write_bytes(b"")
    assert plan.num_parameters(tmp_path / "m") is None


@pytest.mark.parametrize("text", ["8", "8x", "8x-80", "8xnan", "8xinf", "1000000000x80", "8x80GB"])
def test_gpus_are_pretended_in_one_form_only(text):
    with pytest.raises(RecipeError, match="write it as 8x80"):
        machine.pretended_machine(text)


def test_a_gpu_that_shares_the_hosts_memory_counts_with_it(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text(
        "#!/bin/sh\necho '0, GPU-a, [N/A], [N/A]'; echo '1, GPU-b, 2048, 1024'\n"
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    here = machine.this_machine()
    assert [(gpu.memory_gb, gpu.is_free) for gpu in here.gpus] == [
        (here.memory_gb, True),
        (2.0, False),
    ]


MIG = """\
GPU 0: NVIDIA H100 (UUID: GPU-5f3a11)
  MIG 1g.10gb     Device  0: (UUID: MIG-aaa)
  MIG 3g.40gb+me  Device  1: (UUID: MIG-bbb)
GPU 1: NVIDIA H100 (UUID: GPU-77)
"""


@pytest.mark.parametrize(
    ("named", "found"),
    [
        ("1,0,1", [("1", 79), ("0", 79)]),
        ("0,-1,1", [("0", 79)]),
        ("GPU-", []),
        ("GPU-77", [("1", 79)]),
        ("GPU-5f", [("0", 79)]),
        ("MIG-bbb", [("MIG-bbb", 40)]),
        ("G", []),
        ("", []),
    ],
)
def test_gpus_are_named_by_number_uuid_or_slice(tmp_path, monkeypatch, named, found):
    """As CUDA takes them: a cluster's scheduler gives UUIDs, and slices have nothing else."""
    (tmp_path / "list").write_text(MIG)
    (tmp_path / "nvidia-smi").write_text(
        f"#!/bin/sh\n[ $1 = -L ] && exec cat {tmp_path}/list\necho 'a warning'\n"
        "echo '0, GPU-5f3a11, 80896, 0'; echo '1, GPU-77, 80896, 0'\n"
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert [(gpu.name, gpu.memory_gb) for gpu in machine.this_machine().gpus] == found


def test_gpus_that_the_environment_hides_are_named_by_it(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5f3a")
    assert machine.pretended_machine("8x80").free_gpus == ()
    assert "0 are free among those that CUDA_VISIBLE_DEVICES='GPU-5f3a' names" in (
        machine.too_few_gpus(1, 0)
    )


@pytest.mark.parametrize("port", ["abc", "70000", "-1", "[8000]", "2024-01-01"])
def test_a_port_that_is_none_is_refused(recipe, port):
    with pytest.raises(RecipeError, match=r"rollout\.port = "):
        recipe(f"rollout.port={port}")


def test_the_last_server_needs_a_port_too(recipe, tmp_path):
    made, source = recipe("rollout.port=65535", "rollout.servers=2")
    drawn = planned(made, machine.this_machine(), tmp_path)
    with pytest.raises(RecipeError, match="rollout-1: port 65536 is not free"):
        plan.check_plan(drawn, source, machine.this_machine(), Supervisor())


def test_a_port_in_use_is_found_before_anything_starts(recipe, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        made, source = recipe(f"rollout.port={port}")
        drawn = planned(made, machine.this_machine(), tmp_path)
        with pytest.raises(RecipeError, match=f"rollout-0: port {port} is not free"):
            plan.check_plan(drawn, source, machine.this_machine(), Supervisor())


def test_the_flags_that_are_checked_are_those_of_a_run_that_continues(recipe, tmp_path):
    """Without the flag the trainer would refuse the batches that the run has recorded itself."""
    made, _ = recipe("run.record=true")
    for resume in (False, True):
        drawn = plan.make_plan(
            made, tmp_path / "run", made.model.path, (), Commands(), resume=resume
        )
        assert ("--ckpt.load_enable" in drawn.process("train").command) is resume
        assert drawn.inputs.resume is resume


def test_a_reward_of_ones_own_that_is_not_there_is_named_with_its_line(recipe, tmp_path):
    made, source = recipe(f"train.reward.remote_url={tmp_path}/none.py")
    drawn = planned(made, machine.this_machine(), tmp_path)
    with pytest.raises(RecipeError, match=r"--set train\.reward\.remote_url: .*no such file"):
        plan.check_plan(drawn, source, machine.this_machine(), Supervisor())


def test_urls_need_keys(recipe, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENRLHF_ALP_ROLLOUT_ADMIN_KEY", raising=False)
    made, source = recipe('rollout.urls=["http://a:1"]')
    drawn = planned(made, machine.this_machine(), tmp_path)
    assert [process.name for process in drawn.processes] == ["train"]
    with pytest.raises(RecipeError, match=r"OPENRLHF_ALP_ROLLOUT_ADMIN_KEY (is|are) not set"):
        plan.check_plan(drawn, source, machine.this_machine(), Supervisor())


def test_a_cluster_gets_the_learner_as_a_job_with_all_its_flags(recipe, tmp_path):
    made, _ = recipe('rollout.urls=["http://a:1"]', "train.ray_address=http://head:8265")
    command = planned(made, machine.this_machine(), tmp_path).processes[-1].command
    assert value(command, "--address") == "http://head:8265"
    entry = value(command, "--entry")
    assert entry.startswith("python -m openrlhf_alp.cli.train_ppo_ray --actor.model_name_or_path")
    assert "--rollout.service_urls http://a:1" in entry


def test_evaluations_stand_around_the_learner_and_ask_its_services(recipe, tmp_path):
    made, _ = recipe('evaluate.suite=["gsm8k"]', "evaluate.n=4", "run.seed=5")
    processes = planned(made, machine.this_machine(), tmp_path).processes
    names = [process.name for process in processes]
    assert names == ["rollout-0", "evaluate-before", "train", "evaluate-after"]
    before = processes[1].command
    assert value(before, "--rollout_urls") == "http://127.0.0.1:rollout-0"
    assert (value(before, "--n"), value(before, "--seed")) == ("4", "5")
    assert value(before, "--suite") == "gsm8k"
    assert value(before, "--output") == str(tmp_path / "run" / "evaluation" / "before")


def test_a_flag_that_follows_from_another_place_is_refused_with_that_place(recipe, tmp_path):
    made, _ = recipe("train.train.seed=3")
    with pytest.raises(RecipeError, match=r"train\.train\.seed follows from \[run\] seed"):
        planned(made, machine.this_machine(), tmp_path)


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        (["rollout.max_model_length=64"], "rollout has no flag max_model_length. Did you mean"),
        (["rollout.max_model_len=long"], "--max-model-len: Input should be a valid integer"),
        (
            ["train.alp.methd=seq-alp"],
            "the trainer has no flag alp.methd. Did you mean alp.method?",
        ),
        (
            ['evaluate.suite=["gsm8k"]', "evaluate.numbers=3"],
            "evaluate has no flag numbers",
        ),
        ([], "cannot load its tokenizer"),
    ],
)
def test_the_programs_themselves_judge_their_flags(recipe, tmp_path, settings, shown):
    made, source = recipe("train.alp.enable=true", *settings)
    drawn = planned(made, machine.this_machine(), tmp_path)
    with Supervisor() as supervisor, pytest.raises(RecipeError, match=re.escape(shown)):
        plan.check_plan(drawn, source, machine.this_machine(), supervisor)


@pytest.mark.e2e
def test_a_data_file_without_labels_is_refused_with_the_line_that_names_its_field(
    recipe, tmp_path, character_model
):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"input": "What is 1 + 1?", "answer": "2"}\n')
    made, source = recipe(
        f"model.path={character_model}",
        f"data.path={prompts}",
        "train.alp.enable=true",
        "train.reward.remote_url=math-verify",
    )
    drawn = planned(made, machine.this_machine(), tmp_path)
    with (
        Supervisor() as supervisor,
        pytest.raises(RecipeError, match=r"label_key label: .* but input, answer"),
    ):
        plan.check_plan(drawn, source, machine.this_machine(), supervisor)
