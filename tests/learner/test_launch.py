"""What is wrong with model or service is found before Ray starts."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from openrlhf_alp.clients.errors import ContractMismatch, ServiceError, Unauthorized
from openrlhf_alp.learner import launch as launch_module
from openrlhf_alp.learner.flags.settle import settle
from openrlhf_alp.learner.launch import (
    LOGICAL_DEVICES,
    check_data,
    check_model,
    check_services,
    ray_options,
)

pytestmark = pytest.mark.filterwarnings("ignore")
Parse = Callable[..., SimpleNamespace]


def test_a_missing_model_is_an_error_that_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: no config\.json there"):
        check_model(str(tmp_path / "nowhere"))


def test_no_model_at_all_names_the_flag() -> None:
    with pytest.raises(ValueError, match=r"--actor\.model_name_or_path is missing"):
        check_model(None)


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    shutil.copy(tiny_model / "config.json", tmp_path)
    with pytest.raises(ValueError, match="cannot load its tokenizer"):
        check_model(str(tmp_path))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], r"--data\.prompt_dataset is missing"),
        (["--data.prompt_dataset", "nowhere.jsonl"], r"nowhere\.jsonl: there is no such file"),
        (["--data.prompt_dataset", "org/set"], r"--data\.label_key"),
    ],
)
def test_prompts_and_labels_are_asked_for(flags: list[str], message: str) -> None:
    names = dict(zip(flags[::2], flags[1::2], strict=True))
    args = SimpleNamespace(
        data=SimpleNamespace(prompt_dataset=names.get("--data.prompt_dataset"), label_key=None),
        reward=SimpleNamespace(remote_url="math-verify"),
    )
    with pytest.raises(ValueError, match=message):
        check_data(args)


@pytest.mark.e2e
def test_the_same_model_on_both_sides_passes(
    parse: Parse, service_keys: None, hf_service: Any
) -> None:
    args = parse("--rollout.service_urls", hf_service.url, "--data.max_len", "128")
    check_services(args, check_model(args.actor.model_name_or_path))


@pytest.mark.e2e
def test_another_chat_template_is_named(
    parse: Parse, service_keys: None, hf_service: Any, tiny_model: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(tiny_model, tmp_path / "other")
    for file in (other / "chat_template.jinja", other / "tokenizer_config.json"):
        if file.suffix == ".jinja":
            file.write_text("{{ messages }}")
        else:
            file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": 9}))
    args = parse(
        *("--rollout.service_urls", hf_service.url, "--data.max_len", "128"),
        *("--actor.model_name_or_path", str(other)),
    )
    with pytest.raises(ContractMismatch, match=r"chat_template_hash: learner .*Fix:"):
        check_services(args, check_model(str(other)))


@pytest.mark.e2e
def test_a_context_that_is_too_short_is_named(
    parse: Parse, service_keys: None, hf_service: Any
) -> None:
    args = parse("--rollout.service_urls", hf_service.url, "--data.max_len", "4096")
    with pytest.raises(ContractMismatch, match="max_model_len: learner needs 4096"):
        check_services(args, check_model(args.actor.model_name_or_path))


@pytest.mark.e2e
def test_a_wrong_key_is_named(
    parse: Parse, service_keys: None, hf_service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENRLHF_ALP_ROLLOUT_API_KEY", "not-the-right-key")
    args = parse("--rollout.service_urls", hf_service.url, "--data.max_len", "128")
    with pytest.raises(Unauthorized):
        check_services(args, check_model(args.actor.model_name_or_path))


def test_an_unreachable_service_is_named(parse: Parse, service_keys: None) -> None:
    args = parse("--rollout.service_urls", "http://127.0.0.1:9", "--rollout.ready_timeout_s", "0.5")
    with pytest.raises(ServiceError, match=r"http://127\.0\.0\.1:9"):
        check_services(args, check_model(args.actor.model_name_or_path))


@pytest.mark.parametrize(
    ("row", "flags", "message"),
    [
        ({"problem": "q", "label": "1"}, (), "--data.input_key input: the first row"),
        ({"input": "q", "answer": "1"}, (), "--data.label_key label: the first row"),
        ({"input": [{"role": "user", "content": "q"}], "label": "1"}, (), "are conversations"),
        ({"input": "q", "label": "1"}, (), None),
        (
            {"input": [{"role": "user", "content": "q"}], "label": "1"},
            ("--data.apply_chat_template",),
            None,
        ),
    ],
)
def test_the_first_row_is_read_before_anything_starts(
    parse: Parse, tmp_path: Path, row: dict, flags: tuple[str, ...], message: str | None
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(row) + "\n")
    keys = ("--data.input_key", "input", "--data.label_key", "label")
    args = parse("--data.prompt_dataset", str(data), *keys, *flags)
    if message is None:
        check_data(args)
        return
    with pytest.raises(ValueError, match=message):
        check_data(args)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"input":', "line 3 is no JSON"),
        ("[1]", r"line 3 is no JSON object: \[1\]"),
        ('{"input": 3, "label": "1"}', "line 3: its prompt input is 3"),
        ('{"input": null, "label": "1"}', "line 3: its prompt input is None"),
        ('{"input": [], "label": "1"}', "or every one a list"),
    ],
)
def test_a_row_that_cannot_be_loaded_is_named_by_its_line(
    parse: Parse, tmp_path: Path, line: str, message: str
) -> None:
    data = tmp_path / "data.jsonl"
    good = '{"input": "q", "label": "1"}\n'
    keys = ("--data.input_key", "input", "--data.label_key", "label")
    args = parse("--data.prompt_dataset", str(data), *keys)
    data.write_text(f"{good}\n{good}")
    check_data(args)  # an empty line is none
    data.write_text(f"{good}\n{line}\n{good}")
    with pytest.raises(ValueError, match=message):
        check_data(args)


def test_a_path_that_leads_nowhere_does_not_go_to_the_hub(parse: Parse, tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ValueError, match="there is no such data"):
            check_data(parse("--data.prompt_dataset", str(path)))


@pytest.mark.parametrize("char", ["[", "]", "*", "?"])
def test_a_path_that_stands_for_several_files_is_refused(
    parse: Parse, tmp_path: Path, char: str
) -> None:
    """Upstream's loader would read its neighbours too, or none."""
    folder = tmp_path / f"a{char}b"
    folder.mkdir()
    with pytest.raises(ValueError, match="for a pattern of several files"):
        check_data(parse(*data_flags(folder, [{"input": "q", "label": "1"}])))


def test_what_openrlhf_asserts_of_its_flags_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own validation, on flags that ours has nothing against."""
    flags = ["--algo.advantage.estimator", "group_norm", "--rollout.n_samples_per_prompt", "1"]
    monkeypatch.setattr(launch_module, "_settle_and_check", settle)
    monkeypatch.setattr(sys, "argv", ["train", *flags, "--rollout.batch_size", "128"])
    assert launch_module.launch() == 2
    shown = capsys.readouterr().err.splitlines()
    assert shown[-1].startswith("error: OpenRLHF does not take these flags: group_norm requires")


def test_ray_starts_with_openrlhfs_variables_and_our_shims(parse: Parse) -> None:
    upstream = {"NCCL_DEBUG": "INFO"}
    options = ray_options(parse(), upstream)
    environment = options["runtime_env"]["env_vars"]
    assert environment["NCCL_DEBUG"] == "INFO" and upstream == {"NCCL_DEBUG": "INFO"}
    assert options["runtime_env"]["worker_process_setup_hook"].endswith("compat.install_before_use")
    if not torch.cuda.is_available():
        # One CPU rank gets every core, and Ray logical GPUs to schedule it on.
        assert environment["OMP_NUM_THREADS"] == os.environ.get(
            "OMP_NUM_THREADS", str(os.cpu_count())
        )
        assert "RAY_ADDRESS" in os.environ or options["num_gpus"] == LOGICAL_DEVICES


def data_flags(folder: Path, rows: list[dict]) -> list[str]:
    """Flags of a run on `rows`; the file begins as Windows writes it."""
    data = folder / "data.jsonl"
    text = "".join(json.dumps(row) + "\n" for row in rows)
    data.write_text(text, encoding="utf-8-sig")
    keys = ["--data.input_key", "input", "--data.label_key", "label"]
    return ["--data.prompt_dataset", str(data), *keys]


@pytest.mark.parametrize("labels", [[5, 7.0], ["1/2", "x+1"], [["5"], ["6"]], [5, None]])
def test_labels_that_can_be_earned_or_named_let_a_run_start(
    parse: Parse, tmp_path: Path, labels: list, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"input": "q", "label": label} for label in labels]
    check_data(parse(*data_flags(tmp_path, rows)))
    assert ("cannot be earned" in caplog.text) == (None in labels)


def test_rows_that_cannot_be_earned_are_named_with_their_numbers(
    parse: Parse, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    labels = ["4", None, "", "17", *([""] * 20)]
    check_data(parse(*data_flags(tmp_path, [{"input": "q", "label": v} for v in labels])))
    assert "the reward of row 2 (None), 3 ('')" in caplog.text and "and 12 more" in caplog.text
    assert "22 of 24 rows cannot be earned" in caplog.text


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([None, ""], r"any of its 2 labels .*--data\.label_key"),
        ([True, False], "truth value"),
        ([{"value": "7"}], "object with the fields value"),
        (["4", "5", 6], r"label of row 1 is a text and that of row 3 a number.*prepare-data"),
        ([4, ["5"]], "row 2 a list"),
    ],
)
def test_labels_that_no_run_can_use_are_refused(
    parse: Parse, tmp_path: Path, labels: list, message: str
) -> None:
    args = parse(*data_flags(tmp_path, [{"input": "q", "label": v} for v in labels]))
    with pytest.raises(ValueError, match=message):
        check_data(args)


def test_a_reward_of_ones_own_reads_its_own_labels(parse: Parse, tmp_path: Path) -> None:
    flags = data_flags(tmp_path, [{"input": "q", "label": None}])
    check_data(parse(*flags, "--reward.remote_url", "reward.py"))
