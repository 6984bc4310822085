"""The important promises once more with real vLLM on a tiny model, through real sockets."""

import asyncio
import contextlib
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from transformers import LlamaForCausalLM

from openrlhf_alp.clients.rollout import RolloutClient
from openrlhf_alp.clients.weights.carry import in_buckets
from openrlhf_alp.clients.weights.push import WeightPusher
from services.rollout.weights.quantization import round_weight
from services.rollout.wire.schemas import GenerateRequest, GenerateResponse, Sampling

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

API_KEY = "api-key-for-tests"
ADMIN_KEY = "admin-key-for-tests"
PROMPT = [72, 101, 108, 108, 111]
# bfloat16 engine against a float32 forward pass of the same weights.
BF16_MEAN_GAP = 0.15


def start(model: Path, url_file: Path, *flags: str, **environment: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "services.rollout", "--model", str(model), "--port", "0"]
    command += ["--kv-cache-gb", "0.1", "--num-threads", "1", "--url-file", str(url_file)]
    keys = {
        "OPENRLHF_ALP_ROLLOUT_API_KEY": API_KEY,
        "OPENRLHF_ALP_ROLLOUT_ADMIN_KEY": ADMIN_KEY,
    }
    with url_file.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            [*command, *flags],
            env={**os.environ, **keys, **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def wait_for_url(process: subprocess.Popen[bytes], url_file: Path) -> str:
    give_up_s = time.monotonic() + 180
    while time.monotonic() < give_up_s:
        if url_file.exists():
            return url_file.read_text().strip()
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise AssertionError(url_file.with_suffix(".log").read_text()[-3000:])


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


@pytest.fixture(scope="module")
def url(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A served tiny model; afterwards SIGTERM has to end it cleanly with all its processes."""
    url_file = tmp_path_factory.mktemp("vllm") / "url"
    temporary = Path(tempfile.mkdtemp())  # pytest's own are too long for sockets
    process = start(model_folder, url_file, TMPDIR=str(temporary))
    try:
        yield wait_for_url(process, url_file)
        children = family(process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0, url_file.with_suffix(".log").read_text()[-3000:]
        _, alive = psutil.wait_procs(children, timeout=10)
        assert alive == []
        left = [p for p in temporary.rglob("*") if p.is_socket() or p.name.startswith("alp-ipc-")]
        assert left == []
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        shutil.rmtree(temporary, ignore_errors=True)


def commands(process: subprocess.Popen[bytes]) -> Iterator[str]:
    """Command lines of all processes below; one that ends meanwhile is left out."""
    for child in family(process):
        with contextlib.suppress(psutil.NoSuchProcess):
            yield " ".join(child.cmdline())


def client(url: str) -> RolloutClient:
    return RolloutClient([url], api_key=API_KEY, admin_key=ADMIN_KEY)


def request(request_id: str, n: int = 2, **sampling: object) -> GenerateRequest:
    fields = {"max_tokens": 16, **sampling}
    return GenerateRequest(
        request_id=request_id, token_ids=PROMPT, n=n, sampling=Sampling.model_validate(fields)
    )


def gaps(model: LlamaForCausalLM, token_ids: list[int], logprobs: list[float]) -> torch.Tensor:
    """(N,) distance between the served log-probs and one forward pass of `model`."""
    ids = torch.tensor([PROMPT + token_ids])
    with torch.no_grad():
        logits = model(ids).logits[0, len(PROMPT) - 1 : -1].float()
    own = torch.log_softmax(logits, -1).gather(-1, ids[0, len(PROMPT) :, None])[:, 0]
    return (torch.tensor(logprobs) - own).abs()


async def test_samples_carry_the_log_probs_of_the_served_model(
    url: str, model_folder: Path
) -> None:
    model = LlamaForCausalLM.from_pretrained(model_folder)
    async with client(url) as rollout:
        await rollout.control.wait_ready(30.0)
        contract = await rollout.control.contract()
        assert (contract.engine, contract.dtype) == ("vllm", "bfloat16")
        reply = await rollout.generate(request("vllm-1", n=4))
    for sample in reply.samples:
        assert len(sample.token_ids) == len(sample.logprobs) <= 16
        assert gaps(model, sample.token_ids, sample.logprobs).mean() < BF16_MEAN_GAP


async def test_a_sampled_eos_is_in_the_reply_with_its_log_prob(url: str) -> None:
    async with client(url) as rollout:
        eos = (await rollout.control.contract()).eos_token_ids
        reply = await rollout.generate(request("vllm-eos", n=64, max_tokens=200))
    stopped = [s for s in reply.samples if s.finish_reason == "stop"]
    assert stopped, "with 256 equally odd tokens some of 64 samples end by themselves"
    for sample in stopped:
        assert sample.token_ids[-1] in eos
        assert len(sample.logprobs) == len(sample.token_ids)


async def test_an_update_swaps_weights_and_splits_the_spans_of_running_requests(
    url: str, model_folder: Path
) -> None:
    new = LlamaForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.mul_(0.7)
    pusher = WeightPusher([url], api_key=API_KEY, admin_key=ADMIN_KEY)
    async with client(url) as rollout:
        old = (await rollout.control.weights())[0]
        buckets = in_buckets(new.named_parameters())
        pushing = asyncio.create_task(asyncio.to_thread(pusher.push, buckets))

        async def ask_until_pushed(lane: int) -> list[GenerateResponse]:
            """One long request after the other: whenever the swap comes, some are running."""
            replies = []
            while not pushing.done():
                name = f"vllm-live-{lane}-{len(replies)}"
                asked = request(name, n=1, max_tokens=240, ignore_eos=True)
                replies.append(await rollout.generate(asked))
            return replies

        lanes = await asyncio.gather(*(ask_until_pushed(lane) for lane in range(4)))
        pushed = await pushing
        status = (await rollout.control.weights())[0]
    assert (status.version, status.digest) == (old.version + 1, pushed.digest)
    versions = {old.digest: old.version, pushed.digest: status.version}
    samples = [reply.samples[0] for replies in lanes for reply in replies]
    for sample in samples:
        assert all(versions[span.digest] == span.version for span in sample.spans)
        if sample.spans[-1].digest == pushed.digest:
            cut = sample.spans[-1].start
            assert gaps(new, sample.token_ids, sample.logprobs)[cut:].mean() < BF16_MEAN_GAP
    assert any(len(sample.spans) == 2 for sample in samples)


async def test_the_openai_routes_work_with_the_openai_client_and_need_the_key(url: str) -> None:
    from openai import AsyncOpenAI, AuthenticationError, UnprocessableEntityError

    async with AsyncOpenAI(base_url=f"{url}/v1", api_key=API_KEY, max_retries=0) as openai:
        model = (await openai.models.list()).data[0].id
        completion = await openai.completions.create(
            model=model, prompt=PROMPT, max_tokens=5, logprobs=0
        )
        chat = await openai.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "Hello"}],
            max_tokens=5,
            logprobs=True,
            extra_body={"top_logprobs": None},
        )
        with pytest.raises(UnprocessableEntityError, match="n is 4000; one prompt"):
            await openai.completions.create(model=model, prompt="a", n=4000)
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None
    assert 1 <= len(logprobs.token_logprobs) <= 5
    chat_logprobs = chat.choices[0].logprobs
    assert chat_logprobs is not None and chat_logprobs.content is not None
    assert 1 <= len(chat_logprobs.content) <= 5
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as openai:
        with pytest.raises(AuthenticationError):
            await openai.models.list()


async def test_streamed_tokens_add_up_to_the_reply(url: str) -> None:
    body = request("vllm-sse", n=2, ignore_eos=True).model_dump_json()
    headers = {"authorization": f"Bearer {API_KEY}", "accept": "text/event-stream"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60.0) as http:
        reply = await http.post(
            "/v1/generate", content=body, headers={"content-type": "application/json"}
        )
    blocks = [block.split("\n") for block in reply.text.strip().split("\n\n")]
    events = [(name, json.loads(data.removeprefix("data: "))) for name, data in blocks]
    tokens = [data for name, data in events if name == "event: tokens"]
    assert events[-1][0] == "event: done"
    for index, sample in enumerate(events[-1][1]["samples"]):
        mine = [data for data in tokens if data["index"] == index]
        assert len(mine) > 1
        assert [t for data in mine for t in data["token_ids"]] == sample["token_ids"]
        assert [p for data in mine for p in data["logprobs"]] == sample["logprobs"]


async def test_a_cancelled_request_frees_its_slots_at_once(url: str) -> None:
    async with client(url) as rollout, httpx.AsyncClient(base_url=url) as http:
        call = asyncio.create_task(
            rollout.generate(request("vllm-cancel", n=8, max_tokens=240, ignore_eos=True))
        )
        while await running_requests(http) < 8.0:
            await asyncio.sleep(0.02)
        call.cancel()
        await asyncio.wait([call])
        async with asyncio.timeout(5.0):
            while await running_requests(http) > 0.0:
                # vLLM exports the gauge with each step: give it a step to make.
                await rollout.generate(request(f"vllm-{time.monotonic_ns()}", n=1, max_tokens=2))


async def running_requests(http: httpx.AsyncClient) -> float:
    text = (await http.get("/metrics")).text
    lines = [line for line in text.splitlines() if line.startswith("vllm:num_requests_running")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


async def test_sleep_is_refused_on_a_cpu_and_costs_no_request(url: str) -> None:
    async with client(url) as rollout:
        running = asyncio.create_task(rollout.generate(request("awake", max_tokens=100)))
        async with httpx.AsyncClient(base_url=url) as http:
            headers = {"authorization": f"Bearer {ADMIN_KEY}"}
            refused = await http.post("/v1/sleep", json={"level": 1}, headers=headers)
        assert refused.status_code == 501
        assert "no sleep mode on CPUs" in refused.json()["error"]["message"]
        assert {sample.finish_reason for sample in (await running).samples} <= {"stop", "length"}


async def test_the_engine_process_and_its_metrics_are_seen_by_the_probes(url: str) -> None:
    async with httpx.AsyncClient(base_url=url) as http:
        assert (await http.get("/livez")).json()["status"] == "ok"
        metrics = (await http.get("/metrics")).text
    assert "vllm:generation_tokens_total" in metrics
    assert "openrlhf_alp_rollout_loop_lag_seconds_bucket" in metrics


def rounded_to_int4(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A copy of `model` as `--simulate-quantization int4` serves it in bfloat16."""
    served = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        for module in served.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(round_weight(module.weight, "int4"))
    return served.float()


async def assert_int4_is_served(url: str, model: LlamaForCausalLM, name: str) -> str:
    """The served log-probs are those of the rounded model, not the model's own; its digest."""
    async with client(url) as rollout:
        reply = await rollout.generate(request(name, n=4))
        contract = await rollout.control.contract()
    assert contract.simulated_quantization == "int4"
    for sample in reply.samples:
        arguments = (sample.token_ids, sample.logprobs)
        assert gaps(rounded_to_int4(model), *arguments).mean() < BF16_MEAN_GAP
        assert gaps(model, *arguments).mean() > 2 * BF16_MEAN_GAP
    return contract.digest


@pytest.fixture(scope="module")
def rounding_service(
    model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A service that simulates int4; the second of its two tests kills it."""
    url_file = tmp_path_factory.mktemp("int4") / "url"
    process = start(model_folder, url_file, "--simulate-quantization", "int4")
    try:
        yield process, wait_for_url(process, url_file)
    finally:
        process.kill()
        process.wait()


async def test_simulated_quantization_rounds_what_vllm_serves_at_the_start_and_after_a_push(
    rounding_service: tuple[subprocess.Popen[bytes], str], model_folder: Path
) -> None:
    _, url = rounding_service
    model = LlamaForCausalLM.from_pretrained(model_folder)
    await assert_int4_is_served(url, model, "int4-start")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    pusher = WeightPusher([url], api_key=API_KEY, admin_key=ADMIN_KEY)
    pushed = await asyncio.to_thread(pusher.push, in_buckets(model.named_parameters()))
    assert await assert_int4_is_served(url, model, "int4-pushed") == pushed.digest


def test_killing_the_service_leaves_no_engine_process(
    rounding_service: tuple[subprocess.Popen[bytes], str],
) -> None:
    process, _ = rounding_service
    children = family(process)
    assert any("EngineCore" in " ".join(child.cmdline()) for child in children)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=60)  # instant on an idle machine
    assert alive == []


def test_killing_the_service_while_vllm_starts_leaves_no_engine_process(
    model_folder: Path, tmp_path: Path
) -> None:
    process = start(model_folder, tmp_path / "url")
    while not any("spawn_main" in command for command in commands(process)):
        assert process.poll() is None, (tmp_path / "url.log").read_text()[-3000:]
        time.sleep(0.01)
    children = family(process)
    process.kill()
    process.wait()
    # It goes when its imports are done, long before vLLM's own five minutes of waiting.
    _, alive = psutil.wait_procs(children, timeout=120)
    assert alive == []
