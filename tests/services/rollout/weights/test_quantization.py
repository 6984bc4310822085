"""Simulated quantization: what is rounded to which grid, when, and what the contract says."""

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from services.common.errors import ConfigError
from services.rollout.model_folder import read_model_folder
from services.rollout.service import RolloutService, build_service, start_engine
from services.rollout.settings import RolloutSettings
from services.rollout.weights.quantization import round_weight
from services.rollout.wire.fingerprint import weights_digest
from services.rollout.wire.tensors import digest_tensor

LEVELS = {"int8": 127, "int4": 7}
SCHEMES = [*LEVELS, "fp8-e4m3"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(params=[("int4", "float32"), ("int8", "bfloat16"), ("fp8-e4m3", "float32")])
def settings(model_folder: Path, request: pytest.FixtureRequest) -> RolloutSettings:
    scheme, dtype = request.param
    return RolloutSettings(
        model=model_folder, engine="hf", dtype=dtype, simulate_quantization=scheme
    )


def is_linear(name: str) -> bool:
    return "proj" in name or name == "lm_head.weight"


def rounded(pushed: dict[str, torch.Tensor], settings: RolloutSettings) -> dict[str, torch.Tensor]:
    """What has to be served of `pushed`: in the served dtype, linear weights rounded once."""
    scheme: Any = settings.simulate_quantization
    cast = {name: tensor.to(DTYPES[settings.dtype]) for name, tensor in pushed.items()}
    return {n: (round_weight(t, scheme) if is_linear(n) else t).float() for n, t in cast.items()}


def assert_served(service: RolloutService, expected: dict[str, torch.Tensor]) -> None:
    served = service.engine._model.state_dict()  # type: ignore[attr-defined]
    assert expected.keys() == served.keys()
    for name, tensor in expected.items():
        assert torch.equal(served[name], tensor), name


async def push(
    http: httpx.AsyncClient, service: RolloutService, tensors: dict[str, torch.Tensor], version: int
) -> str:
    contract = service.contract()
    sent = {name: tensor.to(DTYPES[contract.dtype]) for name, tensor in tensors.items()}
    digest = weights_digest({name: digest_tensor(tensor) for name, tensor in sent.items()})
    save_file(sent, Path(contract.weights_dir) / f"{version}.safetensors")
    body = {"version": version, "digest": digest}
    files = {"files": [f"{version}.safetensors"]}
    for route, fields in (("prepare", body | files), ("commit", body)):
        reply = await http.post(f"/v1/weights/{route}", json=fields)
        assert reply.status_code == 200, reply.text
    return digest


@pytest.mark.parametrize("scheme", LEVELS)
def test_integers_are_multiples_of_each_channels_scale(scheme: Any) -> None:
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    served = round_weight(weight, scheme)
    for exact, row in zip(weight, served, strict=True):
        scale = exact.abs().max() / LEVELS[scheme]
        level = row / scale
        assert torch.allclose(level, level.round(), atol=1e-4)
        assert level.abs().max().round() == LEVELS[scheme]
        assert (row - exact).abs().max() <= scale / 2 * (1 + 1e-5)


def test_rounding_by_hand() -> None:
    # int4: scale 14 / 7 = 2, so 14 -> 7, 4.9 -> 2.45 -> 2, -7.1 -> -3.55 -> -4.
    weight = torch.tensor([[14.0, 4.9, -7.1], [0.0, 0.0, 0.0]])
    assert round_weight(weight, "int4").tolist() == [[14.0, 4.0, -8.0], [0.0, 0.0, 0.0]]
    # fp8: scale 1; steps of 1/8 in [1, 2) and of 32 in [256, 512).
    weight = torch.tensor([[448.0, 1.07, -300.0]])
    assert round_weight(weight, "fp8-e4m3").tolist() == [[448.0, 1.125, -288.0]]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_numbers_too_small_for_a_scale_become_zero_and_the_dtype_stays(scheme: Any) -> None:
    served = round_weight(torch.full((1, 3), 1e-45), scheme)
    assert served.tolist() == [[0.0, 0.0, 0.0]]
    assert round_weight(torch.ones(2, 3, dtype=torch.bfloat16), scheme).dtype == torch.bfloat16


async def test_linear_weights_are_rounded_at_the_start_and_the_digest_is_the_models(
    settings: RolloutSettings, service: RolloutService, model_folder: Path
) -> None:
    folder = load_file(model_folder / "model.safetensors")
    expected = rounded(folder, settings)
    assert_served(service, expected)
    assert sum(not torch.equal(expected[n], folder[n].float()) for n in folder) >= 15
    assert service.contract().simulated_quantization == settings.simulate_quantization
    digests = {name: digest_tensor(tensor) for name, tensor in folder.items()}
    assert service.contract().digest == weights_digest(digests)


async def test_each_push_is_rounded_once_under_the_digest_of_what_was_pushed(
    settings: RolloutSettings, service: RolloutService, http: httpx.AsyncClient, model_folder: Path
) -> None:
    folder = load_file(model_folder / "model.safetensors")
    for version, factor in ((1, 1.5), (2, 1.5), (3, -0.3)):
        new = {name: tensor * factor for name, tensor in folder.items()}
        digest = await push(http, service, new, version)
        assert_served(service, rounded(new, settings))
        contract = service.contract()
        assert (contract.version, contract.digest) == (version, digest)
    assert (await http.post("/v1/sleep", json={"level": 2})).status_code == 200
    assert (await http.post("/v1/wake_up")).status_code == 200
    assert_served(service, rounded(new, settings))


async def test_the_contract_hash_tells_a_rounding_server_from_a_plain_one(
    settings: RolloutSettings, service: RolloutService, tmp_path: Path
) -> None:
    settings = settings.model_copy(update={"simulate_quantization": None})
    model = read_model_folder(settings)
    plain = build_service(await start_engine(settings, model), model, settings, tmp_path)
    assert plain.contract().simulated_quantization is None
    assert plain.contract().contract_hash != service.contract().contract_hash
    assert plain.contract().digest == service.contract().digest
    await plain.close()


def test_a_tied_head_and_the_embedding_are_left_as_they_are(
    model_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "tied"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    rounding = read_model_folder(
        RolloutSettings(model=folder, engine="hf", simulate_quantization="int8")
    ).rounding
    assert rounding is not None
    assert len(rounding.names) == 14 and all("proj" in name for name in rounding.names)


def test_a_model_with_matrices_of_unknown_layers_is_refused_by_name(
    model_folder: Path, tmp_path: Path
) -> None:
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=258, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path)
    settings = RolloutSettings(model=tmp_path, engine="hf", simulate_quantization="int8")
    with pytest.raises(ConfigError, match=r"attn\.c_attn\.weight.*4 in all.*Fix: leave out"):
        read_model_folder(settings)
    assert read_model_folder(settings.model_copy(update={"simulate_quantization": None}))
