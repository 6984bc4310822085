"""Models whose memory layout differs from their checkpoint, pushed through the real service."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    HrmTextConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from openrlhf_alp.clients.errors import WeightUpdateFailed
from openrlhf_alp.clients.weights.carry import carry_weights, in_buckets, require_fit
from openrlhf_alp.clients.weights.file_carriers import FileCarrier
from openrlhf_alp.clients.weights.layout import CheckpointLayout, stored_tensors
from openrlhf_alp.clients.weights.push import WeightPusher
from openrlhf_alp.learner.weight_sync import gathered_buckets, pushed_tensors
from services.rollout.wire.schemas import TensorSpec
from services.rollout.wire.tensors import DTYPE_CODES

BUCKET_BYTES = 4000  # of models of 30 to 100 kB

TEXT: dict[str, Any] = {
    "vocab_size": 34,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "eos_token_id": 32,
    "bos_token_id": None,
    "pad_token_id": 33,
    "initializer_range": 0.3,
}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 8, "num_experts_per_tok": 2}


def qwen3_moe() -> PreTrainedModel:
    config = Qwen3MoeConfig(**TEXT, **EXPERTS, head_dim=8, num_experts=4)
    return AutoModelForCausalLM.from_config(config)


def qwen2_moe() -> PreTrainedModel:
    config = Qwen2MoeConfig(
        **TEXT, **EXPERTS, num_experts=4, shared_expert_intermediate_size=16, layer_types=None
    )
    return AutoModelForCausalLM.from_config(config)


def mixtral() -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(MixtralConfig(**TEXT, num_local_experts=4))


def deepseek_v3() -> PreTrainedModel:
    """With a persistent buffer, the bias of its router, beside fused experts."""
    config = DeepseekV3Config(
        **TEXT | {"num_key_value_heads": 2},
        **EXPERTS,
        first_k_dense_replace=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        n_group=2,
        topk_group=1,
        n_routed_experts=4,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    )
    return AutoModelForCausalLM.from_config(config)


def gemma3() -> PreTrainedModel:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(
        text_config={**TEXT, "head_dim": 8},
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=31,
        tie_word_embeddings=True,
        eos_token_id=32,
    )
    return Gemma3ForConditionalGeneration(config)


FAMILIES = [qwen3_moe, qwen2_moe, mixtral, deepseek_v3, gemma3]


@pytest.fixture(params=FAMILIES, ids=lambda build: build.__name__)
def model_folder(request: pytest.FixtureRequest, tokenizer_folder: Path, tmp_path: Path) -> Path:
    """Instead of the usual tiny Llama: a folder of each family, as save_pretrained writes it."""
    torch.manual_seed(0)
    folder = tmp_path / "model"
    request.param().save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return folder


def trained(folder: Path) -> PreTrainedModel:
    """A learner's model after a step: no tensor is as it was."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for tensor in stored_tensors(model).values():
            tensor.add_(torch.rand_like(tensor), alpha=0.1)
    return model


async def test_what_is_pushed_has_the_names_and_shapes_of_the_checkpoint_and_is_served(
    make_service: Any, network: Any, make_client: Any, model_folder: Path, tmp_path: Path
) -> None:
    service = make_service()
    url = network.add("a", service)
    pusher = WeightPusher(
        [url], api_key="x", admin_key="x", make_client=lambda: make_client(url).control
    )
    model = trained(model_folder)
    buckets = list(gathered_buckets(model, 0, keep=True, bucket_bytes=BUCKET_BYTES))
    assert len(buckets) > 3
    result = await asyncio.to_thread(pusher.push, buckets)

    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    pushed = {name: tensor for bucket in buckets for name, tensor in bucket}
    assert pushed.keys() == saved.keys()
    assert all(torch.equal(pushed[name], tensor) for name, tensor in saved.items())
    async with make_client(url) as client:
        (status,) = await client.control.weights()
    assert (status.version, status.digest) == (1, result.digest)
    served = service.engine._model
    assert all(torch.equal(served.state_dict()[n], t) for n, t in model.state_dict().items())
    ids = torch.arange(6)[None]
    assert torch.equal(served(ids).logits, model.float().eval()(ids).logits)


def test_the_start_of_a_run_knows_what_will_be_pushed(model_folder: Path) -> None:
    saved = load_file(model_folder / "model.safetensors")
    tensors = pushed_tensors(str(model_folder))
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        name: tensor.shape for name, tensor in saved.items()
    }
    assert {tensor.device.type for tensor in tensors.values()} == {"meta"}


def test_tensors_that_the_checkpoint_joins_are_gathered_together(tmp_path: Path) -> None:
    """HRM's files hold gate, query, key and value as one tensor, which memory holds as four."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(HrmTextConfig(**TEXT | {"num_key_value_heads": 2}))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    pushed = {}
    for bucket in gathered_buckets(model, 0, keep=True, bucket_bytes=1):
        pushed |= dict(bucket)
    assert pushed.keys() == saved.keys()
    assert all(torch.equal(pushed[name], tensor) for name, tensor in saved.items())
    layout = CheckpointLayout.of(model)
    layout.require_convertible(model)
    layer = "model.L_module.layers.0.mlp"
    assert (f"{layer}.gate_proj.weight", f"{layer}.up_proj.weight") in layout.groups


def served(tensors: dict[str, torch.Tensor], **dtypes: str) -> dict[str, TensorSpec]:
    return {
        name: TensorSpec(
            shape=list(tensor.shape),
            dtype=dtypes.get(name, DTYPE_CODES[tensor.dtype]),
            digest="0" * 64,
        )
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "I8", "U8", "I32"])
async def test_a_served_dtype_that_the_learner_cannot_send_is_refused_by_name(
    tmp_path: Path, dtype: str
) -> None:
    tensors = {"w": torch.zeros(4, 2), "x": torch.zeros(3)}
    expected = served(tensors, w=dtype)
    with pytest.raises(WeightUpdateFailed, match=f"1 tensors.*w is served as {dtype}.*Fix"):
        require_fit(tensors, expected)
    carrier = FileCarrier(tmp_path, "update-1")
    with pytest.raises(WeightUpdateFailed, match=f"w is served as {dtype}"):
        async with carrier:
            await carry_weights(carrier, in_buckets(tensors.items()), expected)


def test_names_and_shapes_that_do_not_fit_are_refused_before_the_first_push() -> None:
    tensors = {"w": torch.zeros(4, 2), "lm_head.weight": torch.zeros(4, 2)}
    require_fit(tensors, served({"w": torch.zeros(4, 2, dtype=torch.bfloat16)}))
    for other, message in (
        ({"w": torch.zeros(2, 4)}, r"w has shape \[4, 2\], the server expects \[2, 4\]"),
        ({"v": torch.zeros(4, 2)}, "2 tensors .* does not serve a tensor w"),
        ({"w": torch.zeros(4, 2), "w_scale": torch.zeros(1)}, "serves a tensor w_scale of dtype"),
    ):
        with pytest.raises(WeightUpdateFailed, match=message):
            require_fit(tensors, served(other))
