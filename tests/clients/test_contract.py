from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

from openrlhf_alp.clients.contract import LearnerExpectation, check_contract, simulated_mismatch
from openrlhf_alp.clients.errors import ContractMismatch
from services.rollout.wire.fingerprint import tokenizer_hash


def expectation(folder: Path, **fields: Any) -> LearnerExpectation:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    expected = LearnerExpectation.of(tokenizer, model, min_model_len=64)
    return replace(expected, dtype="float32", **fields)


async def test_the_same_folder_agrees(make_service: Any, model_folder: Path) -> None:
    check_contract(make_service().contract(), expectation(model_folder))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokenizer_hash", "x"),
        ("chat_template_hash", "x"),
        ("vocab_size", 35),
        ("architecture", "Qwen2ForCausalLM"),
        ("dtype", "bfloat16"),
        ("logprobs_mode", "raw_logprobs"),
    ],
)
async def test_each_difference_is_named_with_both_values_and_a_fix(
    make_service: Any, model_folder: Path, field: str, value: Any
) -> None:
    contract = make_service().contract()
    expected = replace(expectation(model_folder), **{field: value})
    with pytest.raises(ContractMismatch) as raised:
        check_contract(contract, expected)
    message = str(raised.value)
    assert f"{field}: learner {value}, server {getattr(contract, field)}. Fix:" in message


async def test_a_model_too_short_and_all_else_are_reported_together(
    make_service: Any, model_folder: Path
) -> None:
    expected = replace(expectation(model_folder), min_model_len=65, vocab_size=1)
    with pytest.raises(ContractMismatch, match=r"(?s)vocab_size.*max_model_len.*65.*64"):
        check_contract(make_service().contract(), expected)


def test_padding_calls_do_not_change_the_tokenizer_hash_but_a_token_does(
    model_folder: Path,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    before = tokenizer_hash(tokenizer)
    tokenizer(["w1", "w2 w3"], padding="max_length", truncation=True, max_length=7)
    tokenizer.padding_side = "left"
    assert tokenizer_hash(tokenizer) == before
    tokenizer.add_tokens(["extra"])
    assert tokenizer_hash(tokenizer) != before


async def test_a_server_that_rounds_its_weights_is_accepted_and_named(
    make_service: Any, model_folder: Path
) -> None:
    contract = make_service().contract()
    assert simulated_mismatch(contract) is None
    rounding = contract.model_copy(update={"simulated_quantization": "int4"})
    check_contract(rounding, expectation(model_folder))
    assert "simulates int4 quantization" in str(simulated_mismatch(rounding))
