"""Updates in two phases, over the real model: what is served is what was verified."""

import asyncio
import os
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from services.rollout.service import RolloutService

PROMPT = [72, 101, 108, 108, 111]
DIGEST = "0" * 64


def served(service: RolloutService) -> dict[str, torch.Tensor]:
    model = service.engine._model  # type: ignore[attr-defined]
    names = service.weights.status().tensors
    return {n: t.detach().clone() for n, t in model.state_dict().items() if n in names}


def weights_dir(service: RolloutService) -> Path:
    return Path(service.contract().weights_dir)


def changed(service: RolloutService, factor: float = 1.5) -> dict[str, torch.Tensor]:
    return {name: tensor * factor for name, tensor in served(service).items()}


def digest_of(tensors: dict[str, torch.Tensor]) -> str:
    from services.rollout.wire.fingerprint import tensor_digest, weights_digest
    from services.rollout.wire.tensors import DTYPE_CODES, tensor_bytes

    return weights_digest(
        {
            n: tensor_digest(DTYPE_CODES[t.dtype], t.shape, tensor_bytes(t))
            for n, t in tensors.items()
        }
    )


async def prepare(
    http: httpx.AsyncClient,
    service: RolloutService,
    tensors: dict[str, torch.Tensor],
    **fields: Any,
) -> httpx.Response:
    save_file(tensors, weights_dir(service) / "u.safetensors")
    body = {"version": 1, "digest": digest_of(tensors), "files": ["u.safetensors"], **fields}
    return await http.post("/v1/weights/prepare", json=body)


async def sample(http: httpx.AsyncClient, request_id: str, **sampling: Any) -> dict[str, Any]:
    fields = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True, **sampling}
    body = {"request_id": request_id, "token_ids": PROMPT, "sampling": fields}
    reply = await http.post("/v1/generate", json=body)
    assert reply.status_code == 200, reply.text
    result: dict[str, Any] = reply.json()["samples"][0]
    return result


async def test_a_commit_changes_version_digest_and_output(
    http: httpx.AsyncClient, service: RolloutService
) -> None:
    before = await sample(http, "r-1")
    new = changed(service)
    digest = digest_of(new)
    staged = (await prepare(http, service, new)).json()
    assert (staged["version"], staged["staged_version"], staged["staged_digest"]) == (0, 1, digest)
    assert await sample(http, "r-2") == before, "the old version serves until commit"
    commit = {"version": 1, "digest": digest}
    reply = await http.post("/v1/weights/commit", json=commit)
    assert reply.status_code == 200, reply.text
    after = await sample(http, "r-3")
    assert after["logprobs"] != before["logprobs"]
    assert after["spans"] == [{"version": 1, "digest": digest, "start": 0, "end": 12}]
    for name, tensor in served(service).items():
        assert torch.equal(tensor, new[name]), name
    contract = (await http.get("/v1/contract")).json()
    assert (contract["version"], contract["digest"]) == (1, digest)


async def test_a_request_that_lives_through_a_commit_has_two_exact_spans(
    http: httpx.AsyncClient, service: RolloutService
) -> None:
    new = changed(service, 0.5)
    digest = digest_of(new)
    old_digest = service.contract().digest
    await prepare(http, service, new)
    long = asyncio.create_task(sample(http, "r-1", max_tokens=200))
    engine = service.engine
    while not any(r.token_ids for r in engine._running.values()):  # type: ignore[attr-defined]
        await asyncio.sleep(0)
    await http.post("/v1/weights/commit", json={"version": 1, "digest": digest})
    result = await long
    first, second = result["spans"]
    assert (first["version"], first["digest"], first["start"]) == (0, old_digest, 0)
    assert (second["version"], second["digest"], second["end"]) == (1, digest, 200)
    assert 0 < first["end"] == second["start"] < 200
    # The second part is what the new weights say, position by position, and not what the old say.
    ids = torch.tensor([PROMPT + result["token_ids"]])
    with torch.no_grad():
        logits = engine._model(ids).logits[0, len(PROMPT) - 1 : -1]  # type: ignore[attr-defined]
    by_new = torch.log_softmax(logits, -1).gather(-1, ids[0, len(PROMPT) :, None])[:, 0]
    got = torch.tensor(result["logprobs"])
    cut = second["start"]
    torch.testing.assert_close(got[cut:], by_new[cut:], atol=1e-4, rtol=0)
    assert (got[:cut] - by_new[:cut]).abs().max() > 1e-3


async def test_a_partial_update_keeps_the_other_tensors(
    http: httpx.AsyncClient, service: RolloutService
) -> None:
    before = served(service)
    name = "model.layers.0.mlp.up_proj.weight"
    merged = {**before, name: before[name] + 1.0}
    staged = await prepare(
        http, service, {name: merged[name]}, digest=digest_of(merged), base_version=0
    )
    assert staged.status_code == 200, staged.text
    commit = {"version": 1, "digest": digest_of(merged)}
    assert (await http.post("/v1/weights/commit", json=commit)).status_code == 200
    for key, tensor in served(service).items():
        assert torch.equal(tensor, merged[key]), key


async def test_repeating_prepare_and_commit_changes_nothing(
    http: httpx.AsyncClient, service: RolloutService
) -> None:
    new = changed(service)
    commit = {"version": 1, "digest": digest_of(new)}
    assert (await prepare(http, service, new)).status_code == 200
    assert (await prepare(http, service, new)).status_code == 200
    first = await http.post("/v1/weights/commit", json=commit)
    again = await http.post("/v1/weights/commit", json=commit)
    assert first.status_code == again.status_code == 200
    assert again.json()["load_s"] == 0.0
    assert (await prepare(http, service, new)).status_code == 200


async def test_the_learner_may_remove_its_files_once_they_are_staged(
    http: httpx.AsyncClient, service: RolloutService
) -> None:
    new = changed(service)
    await prepare(http, service, new)
    (weights_dir(service) / "u.safetensors").unlink()
    commit = {"version": 1, "digest": digest_of(new)}
    assert (await http.post("/v1/weights/commit", json=commit)).status_code == 200


async def test_abort_forgets_the_staged_update_and_its_uploads(
    http: httpx.AsyncClient, service: RolloutService
) -> None:
    new = changed(service)
    await prepare(http, service, new)
    await http.put("/v1/weights/files/half.safetensors", content=b"half")
    status = (await http.post("/v1/weights/abort")).json()
    assert status["staged_version"] is None
    upload = (await http.get("/v1/weights/files/half.safetensors")).json()
    assert upload["num_bytes"] == 0, "failed updates do not fill the disk"
    refused = await http.post("/v1/weights/commit", json={"version": 1, "digest": digest_of(new)})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "not_prepared")


async def expect_refusal(
    http: httpx.AsyncClient, service: RolloutService, reply: httpx.Response, code: str
) -> None:
    assert reply.json()["error"]["code"] == code, reply.text
    assert reply.status_code in {409, 422}
    assert service.contract().version == 0
    assert not any(weights_dir(service).glob(".staging-*/[0-9]*")), "nothing half-staged is left"
    await sample(http, "still-serving")


async def test_wrong_names_shapes_dtypes_and_digests_are_told_apart(
    http: httpx.AsyncClient, service: RolloutService
) -> None:
    new = changed(service)
    name = next(iter(new))
    refusals = {
        "missing_tensors": {n: t for n, t in new.items() if n != name},
        "unknown_tensors": {**new, "model.sigma": torch.zeros(2)},
        "shape_mismatch": {**new, name: new[name][:-1].contiguous()},
        "dtype_mismatch": {**new, name: new[name].double()},
    }
    for code, tensors in refusals.items():
        await expect_refusal(http, service, await prepare(http, service, tensors), code)
    wrong = await prepare(http, service, new, digest=DIGEST)
    await expect_refusal(http, service, wrong, "digest_mismatch")


async def test_a_file_cut_short_is_refused(
    http: httpx.AsyncClient, service: RolloutService
) -> None:
    new = changed(service)
    path = weights_dir(service) / "u.safetensors"
    save_file(new, path)
    whole = path.read_bytes()
    for size in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        body = {"version": 1, "digest": digest_of(new), "files": ["u.safetensors"]}
        reply = await http.post("/v1/weights/prepare", json=body)
        await expect_refusal(http, service, reply, "bad_weight_file")


@pytest.mark.parametrize(
    "name", ["../u.safetensors", "/etc/passwd", "a/../../u", "link.safetensors", "nul\0"]
)
async def test_no_file_name_reaches_outside(
    http: httpx.AsyncClient, service: RolloutService, tmp_path: Path, name: str
) -> None:
    save_file(changed(service), tmp_path / "u.safetensors")
    (weights_dir(service) / "link.safetensors").symlink_to(tmp_path / "u.safetensors")
    body = {"version": 1, "digest": DIGEST, "files": [name]}
    reply = await http.post("/v1/weights/prepare", json=body)
    await expect_refusal(http, service, reply, "path_outside_weights_dir")


async def test_a_version_that_is_not_newer_is_refused(
    http: httpx.AsyncClient, service: RolloutService
) -> None:
    new = changed(service)
    await prepare(http, service, new, version=3)
    await http.post("/v1/weights/commit", json={"version": 3, "digest": digest_of(new)})
    newer = changed(service)
    stale = await prepare(http, service, newer, version=3)
    assert (stale.status_code, stale.json()["error"]["code"]) == (409, "stale_version")
    based = await prepare(http, service, newer, version=4, base_version=2)
    assert (based.status_code, based.json()["error"]["code"]) == (409, "base_version_mismatch")


async def test_a_failed_load_leaves_the_old_version_serving(
    http: httpx.AsyncClient, service: RolloutService, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await sample(http, "r-1")
    new = changed(service)
    await prepare(http, service, new)
    load = service.engine.load_weights
    calls = []

    async def load_half_then_fail(plan: Any) -> None:
        calls.append(plan)
        await load(plan)
        if len(calls) == 1:
            raise RuntimeError("injected after the new weights were in")

    monkeypatch.setattr(service.engine, "load_weights", load_half_then_fail)
    reply = await http.post("/v1/weights/commit", json={"version": 1, "digest": digest_of(new)})
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "weight_update_failed")
    assert len(calls) == 2
    assert await sample(http, "r-2") == before


async def test_a_failed_roll_back_serves_nothing_until_a_full_update(
    http: httpx.AsyncClient, service: RolloutService, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = changed(service)
    await prepare(http, service, new)

    async def fail(plan: Any) -> None:
        raise RuntimeError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(service.engine, "load_weights", fail)
        commit = {"version": 1, "digest": digest_of(new)}
        assert (await http.post("/v1/weights/commit", json=commit)).status_code == 503
    assert (await http.get("/readyz")).status_code == 503
    body = {"request_id": "r", "token_ids": PROMPT, "sampling": {"max_tokens": 1}}
    refused = await http.post("/v1/generate", json=body)
    assert refused.json()["error"]["code"] == "weights_failed"
    assert (await prepare(http, service, new, version=2)).status_code == 200
    recovered = await http.post("/v1/weights/commit", json={**commit, "version": 2})
    assert recovered.status_code == 200, recovered.text
    assert (await http.get("/readyz")).status_code == 200
    assert (await sample(http, "r-3"))["spans"][0]["version"] == 2


async def test_the_control_routes_need_the_admin_key(http: httpx.AsyncClient) -> None:
    for key, status in (("api-key-for-tests", 401), ("wrong", 401)):
        headers = {"authorization": f"Bearer {key}"}
        for path in ("/v1/weights/prepare", "/v1/weights/commit", "/v1/weights/abort", "/v1/pause"):
            reply = await http.post(path, json={}, headers=headers)
            assert reply.status_code == status, path
    data = await http.get("/v1/weights", headers={"authorization": "Bearer api-key-for-tests"})
    assert data.status_code == 200


def test_a_private_folder_is_removed_once_its_service_was_killed(tmp_path: Path) -> None:
    from services.common.owned_folders import OwnedFolder
    from services.rollout.weights.staging import (
        WEIGHTS_PREFIX,
        ServedModel,
        Staging,
        weights_folder,
    )

    model = ServedModel(tensors={}, dtype_code="F32", head_is_tied=False)
    starting = tmp_path / f"{WEIGHTS_PREFIX}starting"
    starting.mkdir()
    live, killed = (OwnedFolder.create(tmp_path, WEIGHTS_PREFIX) for _ in range(2))
    for folder in (live, killed):
        Staging(model, folder.path)
    os.close(killed._lock or 0)
    killed._lock = None
    with weights_folder(None, shared_memory=tmp_path) as own:
        assert set(tmp_path.iterdir()) == {starting, live.path, own}
    assert set(tmp_path.iterdir()) == {starting, live.path}
    live.remove()


def test_a_folder_that_the_operator_named_is_made_and_stays(tmp_path: Path) -> None:
    from services.rollout.weights.staging import weights_folder

    named = tmp_path / "not" / "yet"
    with weights_folder(named, shared_memory=tmp_path) as folder:
        assert folder == named and named.is_dir()
    assert named.is_dir()


async def test_version_zero_is_the_digest_of_the_model_folder(
    http: httpx.AsyncClient, model_folder: Path
) -> None:
    contract = (await http.get("/v1/contract")).json()
    assert contract["version"] == 0
    assert contract["digest"] == digest_of(load_file(model_folder / "model.safetensors"))
