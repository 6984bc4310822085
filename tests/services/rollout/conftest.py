"""A tiny real Llama with a byte-level tokenizer, and the service around it."""

import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from services.common.wire import MSGPACK_TYPE, decode
from services.rollout.api.app import create_app
from services.rollout.model_folder import read_model_folder
from services.rollout.service import RolloutService, build_service, start_engine
from services.rollout.settings import RolloutSettings

torch.set_num_threads(1)

API_KEY = "api-key-for-tests"
ADMIN_KEY = "admin-key-for-tests"
EOS = 256
VOCAB_SIZE = 258


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte (ids 0..255), then <eos> and <pad>."""
    alphabet = sorted(ByteLevel.alphabet())
    backend = Tokenizer(BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    backend.add_special_tokens([AddedToken("<eos>"), AddedToken("<pad>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
    )


def tiny_llama(seed: int, *, tied: bool = False) -> LlamaForCausalLM:
    """Two layers of width 64 with 32-wide heads: the smallest that vLLM's CPU kernels take."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        eos_token_id=EOS,
        bos_token_id=None,
        pad_token_id=EOS + 1,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def save_tiny_model(folder: Path, *, seed: int = 0, tied: bool = False) -> Path:
    tiny_llama(seed, tied=tied).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def settings(model_folder: Path) -> RolloutSettings:
    return RolloutSettings(model=model_folder, engine="hf", dtype="float32")


@pytest.fixture
async def service(settings: RolloutSettings, tmp_path: Path) -> AsyncIterator[RolloutService]:
    weights_dir = tmp_path / "weights"
    weights_dir.mkdir()
    model = read_model_folder(settings)
    service = build_service(await start_engine(settings, model), model, settings, weights_dir)
    yield service
    await service.close()


@pytest.fixture
async def http(
    settings: RolloutSettings, service: RolloutService
) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client with the admin key, straight into the app."""
    app = create_app(service, settings, api_key=API_KEY, admin_key=ADMIN_KEY)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app=app),
        base_url="http://rollout",
        headers={"authorization": f"Bearer {ADMIN_KEY}"},
    ) as client:
        yield client


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def msgpack_body(response: httpx.Response) -> object:
    assert response.headers["content-type"] == MSGPACK_TYPE
    return decode(response.content, MSGPACK_TYPE)
