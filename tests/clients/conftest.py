"""The client against the real app and a tiny real model, without sockets."""

import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from openrlhf_alp.clients.channel import Timeouts
from openrlhf_alp.clients.fleet import Backoff
from openrlhf_alp.clients.rollout import RolloutClient
from services.rollout.api.app import create_app
from services.rollout.engines.hf_engine import HfEngine
from services.rollout.model_folder import read_model_folder
from services.rollout.service import RolloutService, build_service
from services.rollout.settings import FaultPlan, RolloutSettings

torch.set_num_threads(1)

API_KEY = "api-key-for-tests"
ADMIN_KEY = "admin-key-for-tests"


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel

    folder = tmp_path_factory.mktemp("tokenizer")
    backend = Tokenizer(WordLevel(vocab={f"w{i}": i for i in range(32)}, unk_token="w0"))
    backend.add_special_tokens([AddedToken("<eos>"), AddedToken("<pad>")])
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    folder = shutil.copytree(tokenizer_folder, tmp_path_factory.mktemp("models") / "tied")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=34,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        eos_token_id=32,
        bos_token_id=None,
        pad_token_id=33,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


MakeService = Callable[..., RolloutService]


@pytest.fixture
async def make_service(model_folder: Path, tmp_path: Path) -> AsyncIterator[MakeService]:
    """Builds services over the same model and one shared weights folder."""
    settings = RolloutSettings(model=model_folder, engine="hf", dtype="float32")
    model = read_model_folder(settings)
    made: list[RolloutService] = []

    def make(
        *,
        own_folder: bool = False,
        faults: FaultPlan | None = None,
        engine_class: type[HfEngine] = HfEngine,
        **changes: object,
    ) -> RolloutService:
        faulty = settings.model_copy(update={"faults": faults or FaultPlan()})
        engine = engine_class.load(model, faulty)
        weights_dir = tmp_path / (f"weights-{len(made)}" if own_folder else "weights")
        weights_dir.mkdir(exist_ok=True)
        made.append(build_service(engine, model, settings.model_copy(update=changes), weights_dir))
        return made[-1]

    yield make
    for service in made:
        await service.close()


class Network(httpx.AsyncBaseTransport):
    """Routes each host name to an app, and fails or delays as a test says."""

    def __init__(self) -> None:
        self.apps: dict[str, httpx.ASGITransport] = {}
        self.calls: list[tuple[str, str]] = []
        self.before: Callable[[httpx.Request], httpx.Response | None] = lambda _: None
        self.after: Callable[[httpx.Request, httpx.Response], None] = lambda *_: None

    def add(self, host: str, service: RolloutService) -> str:
        settings = RolloutSettings(model=Path("unused"))
        app = create_app(service, settings, api_key=API_KEY, admin_key=ADMIN_KEY)
        self.apps[host] = httpx.ASGITransport(app=app)
        return f"http://{host}"

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.calls.append((request.url.host, request.url.path))
        early = self.before(request)
        if early is not None:
            return early
        response = await self.apps[request.url.host].handle_async_request(request)
        self.after(request, response)
        return response


@pytest.fixture
def network() -> Network:
    return Network()


MakeClient = Callable[..., RolloutClient]


@pytest.fixture
def make_client(network: Network) -> MakeClient:
    def make(
        *urls: str,
        total_s: float = 20.0,
        api_key: str = API_KEY,
        transport: httpx.AsyncBaseTransport = network,
    ) -> RolloutClient:
        return RolloutClient(
            urls,
            api_key=api_key,
            admin_key=ADMIN_KEY,
            timeouts=Timeouts(total_s=total_s, control_s=20.0),
            backoff=Backoff(first_s=0.001, largest_s=0.01),
            transport=transport,
        )

    return make
