import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import LlamaForCausalLM

from openrlhf_alp.clients.errors import ServiceUnavailable, WeightUpdateFailed
from openrlhf_alp.clients.fleet import ServerState
from openrlhf_alp.clients.rollout import RolloutClient
from openrlhf_alp.clients.server_watch import NoServerLeft
from openrlhf_alp.clients.weights.carry import (
    CarriedWeights,
    carry_weights,
    in_buckets,
)
from openrlhf_alp.clients.weights.file_carriers import FileCarrier
from openrlhf_alp.clients.weights.push import WeightPusher
from services.rollout.service import RolloutService
from services.rollout.wire.fingerprint import weights_digest
from services.rollout.wire.schemas import (
    CommitRequest,
    GenerateRequest,
    PrepareRequest,
    Sampling,
    TensorSpec,
    WeightTransport,
)
from services.rollout.wire.tensors import digest_tensor


def spec(tensor: torch.Tensor, digest: str = "old") -> TensorSpec:
    code = {torch.bfloat16: "BF16", torch.float32: "F32"}[tensor.dtype]
    return TensorSpec(shape=list(tensor.shape), dtype=code, digest=digest)


async def write(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    expected: dict[str, TensorSpec],
    **options: Any,
) -> CarriedWeights:
    """Write an update and remove it, as a push does."""
    async with FileCarrier(folder, "u") as carrier:
        return await carry_weights(carrier, in_buckets(tensors.items()), expected, **options)


async def test_both_sides_compute_the_same_digest(tmp_path: Path) -> None:
    from services.rollout.weights.checkpoint import scan

    tensors = {"b": torch.randn(3, 5), "a": torch.randn(7).bfloat16(), "c": torch.zeros(())}
    expected = {name: spec(tensor) for name, tensor in tensors.items()}
    async with FileCarrier(tmp_path, "u") as carrier:
        written = await carry_weights(carrier, in_buckets(tensors.items(), 16), expected)
        assert len(written.files) == 3, "60, 14 and 4 bytes do not fit one bucket of 16"
        found = scan([tmp_path / file for file in written.files])
    assert {name: file.digest for name, file in found.items()} == {
        name: digest_tensor(tensor) for name, tensor in tensors.items()
    }
    assert written.digest == weights_digest({name: file.digest for name, file in found.items()})


def test_buckets_keep_the_order_and_the_limit_and_a_large_parameter_stands_alone() -> None:
    sizes = {"a": 2, "b": 2, "c": 9, "d": 1, "e": 2}  # float32: 4 bytes each
    named = [(name, torch.nn.Parameter(torch.zeros(size))) for name, size in sizes.items()]
    buckets = [[name for name, _ in bucket] for bucket in in_buckets(named, 16)]
    assert buckets == [["a", "b"], ["c"], ["d", "e"]]


async def test_tensors_are_cast_to_the_serving_dtype(tmp_path: Path) -> None:
    master = torch.tensor([1.0 + 2**-10])
    expected = {"w": spec(torch.zeros(1, dtype=torch.bfloat16))}
    written = await write(tmp_path, {"w": master}, expected)
    assert written.digest == weights_digest({"w": digest_tensor(master.bfloat16())})
    assert written.num_bytes == 2


async def test_unchanged_tensors_are_left_out_and_still_verified(tmp_path: Path) -> None:
    same, new = torch.ones(4), torch.zeros(2)
    expected = {"same": spec(same, digest_tensor(same)), "new": spec(new)}
    tensors = {"same": same, "new": new}
    written = await write(tmp_path, tensors, expected, skip_unchanged=True)
    assert (written.num_bytes, written.num_unchanged) == (8, 1)
    assert written.digest == weights_digest({n: digest_tensor(t) for n, t in tensors.items()})


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"w": torch.zeros(2), "model.sigma": torch.zeros(1)}, r"model.sigma.*Fix"),
        ({"w": torch.zeros(3)}, r"shape \[3\].*Fix"),
        ({}, r"first w.*Fix"),
    ],
)
async def test_what_does_not_fit_is_refused_and_leaves_no_file(
    tmp_path: Path, tensors: dict[str, torch.Tensor], match: str
) -> None:
    with pytest.raises(WeightUpdateFailed, match=match):
        await write(tmp_path, tensors, {"w": spec(torch.zeros(2))})
    assert list(tmp_path.iterdir()) == []


async def test_a_folder_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(WeightUpdateFailed, match="--weights-dir"):
        await write(blocked, {"w": torch.zeros(1)}, {"w": spec(torch.zeros(1))})


def new_model(folder: Path, factor: float) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


async def push(pusher: WeightPusher, model: LlamaForCausalLM) -> Any:
    # state_dict lists the tied head too, as a learner's gather may.
    return await asyncio.to_thread(pusher.push, in_buckets(model.state_dict().items()))


def pusher_of(
    make_client: Any, *urls: str, transport: WeightTransport = "file", patience_s: float = 0.0
) -> WeightPusher:
    return WeightPusher(
        urls,
        api_key="x",
        admin_key="x",
        transport=transport,
        patience_s=patience_s,
        make_client=lambda: make_client(*urls).control,
    )


def served_equal(service: RolloutService, model: LlamaForCausalLM) -> bool:
    own = service.engine._model.state_dict()  # type: ignore[attr-defined]
    return all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())


async def test_a_model_folder_takes_back_what_was_pushed(
    make_service: Any, network: Any, make_client: Any, model_folder: Path
) -> None:
    service = make_service()
    pusher = pusher_of(make_client, network.add("a", service))
    loaded = service.contract().digest
    changed = await push(pusher, new_model(model_folder, 0.5))
    assert changed.digest != loaded
    back = await asyncio.to_thread(pusher.push_folder, model_folder)
    assert back.digest == service.contract().digest == loaded
    assert served_equal(service, new_model(model_folder, 1.0))


async def test_a_push_reaches_every_server_and_leaves_no_file(
    make_service: Any, network: Any, make_client: Any, model_folder: Path
) -> None:
    service = make_service()
    url = network.add("a", service)
    pusher = pusher_of(make_client, url)
    model = new_model(model_folder, 0.5)
    first = await push(pusher, model)
    assert served_equal(service, model)
    assert service.contract().version == first.version == 1
    assert service.contract().digest == first.digest
    again = await push(pusher, model)
    assert (again.version, again.num_bytes, again.digest) == (2, 0, first.digest)
    with torch.no_grad():
        model.model.norm.weight.add_(1.0)
    third = await push(pusher, model)
    assert (third.version, third.num_bytes) == (3, 16 * 4)
    assert served_equal(service, model)
    weights_dir = Path(service.contract().weights_dir)
    assert [path.name.split("-")[0] for path in weights_dir.iterdir()] == [".staging"]


async def test_a_new_learner_takes_over_from_one_killed_in_mid_push(
    make_service: Any, network: Any, make_client: Any, model_folder: Path
) -> None:
    service = make_service()
    url = network.add("a", service)
    weights_dir = Path(service.contract().weights_dir)
    dead, new = new_model(model_folder, 0.25), new_model(model_folder, 0.5)
    async with make_client(url) as client:
        expected = (await client.control.weights())[0].tensors
        killed = await FileCarrier(weights_dir, "update-1-dead").__aenter__()
        written = await carry_weights(killed, in_buckets(dead.state_dict().items()), expected)
        await client.control.prepare_weights(
            PrepareRequest(version=1, digest=written.digest, files=list(written.files))
        )
        (weights_dir / "update-1-half").mkdir()
        reply = await client.generate(request("r"))
        assert {span.version for sample in reply.samples for span in sample.spans} == {0}
    pusher = pusher_of(make_client, url)
    await push(pusher, new)
    assert served_equal(service, new)
    assert [path.name.split("-")[0] for path in weights_dir.iterdir()] == [".staging"]


async def test_a_push_over_http_needs_no_shared_folder_and_resumes(
    make_service: Any, network: Any, make_client: Any, model_folder: Path
) -> None:
    services = [make_service(own_folder=True), make_service(own_folder=True)]
    urls = [network.add(host, service) for host, service in zip("ab", services, strict=True)]
    offsets: dict[str, list[int]] = {"a": [], "b": []}

    def lose_half_on_b(sent: httpx.Request) -> None:
        if sent.method != "PUT":
            return
        offsets[sent.url.host].append(int(sent.url.params["offset"]))
        if offsets["b"] == [0] and sent.url.host == "b":
            sent.stream = Half(sent.stream)

    network.before = lose_half_on_b
    pusher = pusher_of(make_client, *urls, transport="http")
    model = new_model(model_folder, 0.5)
    assert (await push(pusher, model)).version == 1
    for service in services:
        assert served_equal(service, model)
    assert offsets["a"] == [0]
    first, second = offsets["b"]
    assert first == 0 < second


class Half(httpx.AsyncByteStream):
    """A request body that breaks after its first thousand bytes."""

    def __init__(self, whole: Any) -> None:
        self._whole = whole

    async def __aiter__(self) -> Any:
        async for chunk in self._whole:
            yield chunk[:1000]
            raise httpx.WriteError("connection lost")


async def test_servers_without_a_common_folder_are_told_apart(
    make_service: Any, network: Any, make_client: Any, model_folder: Path
) -> None:
    services = [make_service(own_folder=True), make_service(own_folder=True)]
    urls = [network.add(host, service) for host, service in zip("ab", services, strict=True)]
    pusher = pusher_of(make_client, *urls)
    with pytest.raises(WeightUpdateFailed, match=r"weights-0.*weights-1.*--weights-dir"):
        await push(pusher, new_model(model_folder, 0.5))


async def test_a_push_that_one_server_refuses_changes_no_server(
    make_service: Any, network: Any, make_client: Any, model_folder: Path
) -> None:
    services = [make_service(), make_service()]
    urls = [network.add(host, service) for host, service in zip("ab", services, strict=True)]

    def refuse_on_b(sent: httpx.Request) -> httpx.Response | None:
        if (sent.url.host, sent.url.path) == ("b", "/v1/weights/prepare"):
            return httpx.Response(422, request=sent)
        return None

    network.before = refuse_on_b
    pusher = pusher_of(make_client, *urls)
    with pytest.raises(WeightUpdateFailed, match=r"1 of 2 servers.*http://b"):
        await push(pusher, new_model(model_folder, 0.5))
    for service in services:
        status = service.weights.status()
        assert (status.version, status.staged_version) == (0, None)


async def test_a_server_that_dies_between_prepare_and_commit_gets_no_traffic_until_refitted(
    make_service: Any, network: Any, make_client: Any, model_folder: Path
) -> None:
    services = {host: make_service() for host in "ab"}
    urls = [network.add(host, service) for host, service in services.items()]
    dead = True

    def lose_b_at_commit(sent: httpx.Request) -> None:
        if dead and (sent.url.host, sent.url.path) == ("b", "/v1/weights/commit"):
            raise httpx.ConnectError("refused")

    network.before = lose_b_at_commit
    pusher = pusher_of(make_client, *urls)
    model = new_model(model_folder, 0.5)
    assert (await push(pusher, model)).version == 1
    assert (services["a"].contract().version, services["b"].contract().version) == (1, 0)
    async with make_client(*urls) as client:
        client.require_version(1)
        calls = [client.generate(request(f"r{index}")) for index in range(4)]
        for reply in await asyncio.gather(*calls):
            assert {span.version for sample in reply.samples for span in sample.spans} == {1}
        assert states(client) == {"http://a": ServerState.HEALTHY, "http://b": ServerState.STALE}
        dead = False
        again = await push(pusher, model)
        assert again.num_bytes > 0, "the servers differ, so everything is sent"
        assert served_equal(services["b"], model)
        client.require_version(again.version)
        for server in client.control.fleet.servers:
            server.avoid_until_s = 0.0
        await client.generate(request("after"))
        assert states(client)["http://b"] is ServerState.HEALTHY


async def test_the_only_server_serves_again_after_it_was_started_anew(
    make_service: Any, network: Any, make_client: Any, model_folder: Path
) -> None:
    url = network.add("a", make_service())
    pusher = pusher_of(make_client, url)
    model = new_model(model_folder, 0.5)
    await push(pusher, model)
    last = await push(pusher, model)
    async with make_client(url, total_s=1.0) as client:
        client.require_version(last.version)
        restarted = make_service()
        network.add("a", restarted)
        with pytest.raises(ServiceUnavailable, match="push the weights again"):
            await client.generate(request("before"))
        again = await push(pusher, model)
        # Not version 1: that stood for other weights in this run.
        assert again.version == last.version + 1
        assert served_equal(restarted, model)
        for server in client.control.fleet.servers:
            server.avoid_until_s = 0.0
        await client.generate(request("after"))


async def test_a_push_waits_for_the_only_server_to_come_back(
    make_service: Any, network: Any, make_client: Any, model_folder: Path
) -> None:
    service = make_service()
    url = network.add("a", service)
    refused = 0

    def gone_twice(sent: httpx.Request) -> None:
        nonlocal refused
        if sent.url.path == "/v1/weights" and refused < 2:
            refused += 1
            raise httpx.ConnectError("refused")

    network.before = gone_twice
    pusher = pusher_of(make_client, url, patience_s=60.0)
    model = new_model(model_folder, 0.5)
    assert (await push(pusher, model)).version == 1
    assert refused == 2
    assert served_equal(service, model)


async def test_a_push_ends_when_no_server_comes_back_and_at_once_when_it_is_refused(
    make_service: Any, network: Any, make_client: Any, model_folder: Path
) -> None:
    url = network.add("a", make_service())
    model = new_model(model_folder, 0.5)

    def gone(_: httpx.Request) -> None:
        raise httpx.ConnectError("refused")

    network.before = gone
    with pytest.raises(NoServerLeft, match=r"within 0\.5 s.*http://a does not answer"):
        await push(pusher_of(make_client, url, patience_s=0.5), model)

    detail = {"code": "unauthorized", "message": "no", "fix": "key", "field": None}
    network.before = lambda _: httpx.Response(401, json={"error": detail})
    with pytest.raises(WeightUpdateFailed, match="no Fix: key"):
        await push(pusher_of(make_client, url, patience_s=3600.0), model)


@pytest.mark.parametrize("transport", ["file", "http"])
async def test_a_server_that_comes_back_in_mid_push_waits_for_the_next_one(
    make_service: Any, network: Any, make_client: Any, model_folder: Path, transport: Any
) -> None:
    services = {host: make_service() for host in "ab"}
    urls = [network.add(host, service) for host, service in services.items()]

    def lose_b_at_first(sent: httpx.Request) -> None:
        if (sent.url.host, sent.url.path) == ("b", "/v1/weights"):
            raise httpx.ConnectError("refused")

    network.before = lose_b_at_first
    pusher = pusher_of(make_client, *urls, transport=transport)
    model = new_model(model_folder, 0.5)
    assert (await push(pusher, model)).version == 1
    assert (services["a"].contract().version, services["b"].contract().version) == (1, 0)
    assert services["b"].weights.status().staged_version is None
    network.before = lambda _: None
    assert (await push(pusher, model)).version == 2
    assert served_equal(services["b"], model)


async def update(
    client: RolloutClient, weights_dir: str, version: int, model: LlamaForCausalLM
) -> None:
    """What a push does, with a client that lives on."""
    statuses = await client.control.reachable_weights()
    buckets = in_buckets(model.state_dict().items())
    async with FileCarrier(Path(weights_dir), f"u{version}") as carrier:
        carried = await carry_weights(carrier, buckets, statuses[0].tensors)
        await client.control.prepare_weights(
            PrepareRequest(version=version, digest=carried.digest, files=list(carried.files))
        )
    await client.control.commit_weights(CommitRequest(version=version, digest=carried.digest))


@pytest.mark.parametrize("phase", ["", "/prepare", "/commit"])
async def test_every_update_of_a_client_asks_a_server_that_missed_the_one_before(
    make_service: Any, network: Any, make_client: Any, model_folder: Path, phase: str
) -> None:
    services = {host: make_service() for host in "ab"}
    urls = [network.add(host, service) for host, service in services.items()]
    weights_dir = services["a"].contract().weights_dir
    lost_call = ("b", f"/v1/weights{phase}")

    def lose_b_once(sent: httpx.Request) -> None:
        if (sent.url.host, sent.url.path) == lost_call and network.calls.count(lost_call) == 1:
            raise httpx.ConnectError("refused")

    network.before = lose_b_once
    async with make_client(*urls) as client:
        await update(client, weights_dir, 1, new_model(model_folder, 0.5))
        assert [call for call in network.calls if call[0] == "b"][-1] == lost_call
        assert states(client) == {"http://a": ServerState.HEALTHY, "http://b": ServerState.STALE}
        model = new_model(model_folder, 0.25)
        await update(client, weights_dir, 2, model)
        assert all(served_equal(service, model) for service in services.values())
        assert set(states(client).values()) == {ServerState.HEALTHY}


async def test_a_server_back_in_traffic_stays_out_of_an_update_until_that_one_is_given_up(
    make_service: Any, network: Any, make_client: Any
) -> None:
    urls = [network.add(host, make_service()) for host in "ab"]

    def lose_b_once(sent: httpx.Request) -> None:
        if sent.url.host == "b" and network.calls.count(("b", "/v1/weights")) == 1:
            raise httpx.ConnectError("refused")

    network.before = lose_b_once
    async with make_client(*urls) as client:
        assert len(await client.control.reachable_weights()) == 1
        for server in client.control.fleet.servers:
            server.avoid_until_s = 0.0
        await client.generate(request("probes"))
        assert states(client)["http://b"] is ServerState.HEALTHY
        assert [server.channel.url for server in client.control.reachable()] == ["http://a"]
        await client.control.abort_weights()
        assert [server.channel.url for server in client.control.reachable()] == urls


async def test_a_reply_kept_from_before_an_update_keeps_its_label(
    make_service: Any, network: Any, make_client: Any, model_folder: Path
) -> None:
    service = make_service()
    url = network.add("a", service)
    pusher = pusher_of(make_client, url)
    async with make_client(url) as client:
        first = await client.generate(request("same"))
        pushed = await push(pusher, new_model(model_folder, 0.5))
        client.require_version(pushed.version)
        again = await client.generate(request("same"))
        assert again == first
        assert {span.version for sample in again.samples for span in sample.spans} == {0}
        assert states(client)[url] is ServerState.HEALTHY


def states(client: RolloutClient) -> dict[str, ServerState]:
    return {server.channel.url: server.state for server in client.control.fleet.servers}


def request(request_id: str) -> GenerateRequest:
    return GenerateRequest(
        request_id=request_id, token_ids=[1, 2, 3], sampling=Sampling(max_tokens=4)
    )
