import httpx

GOOD = {"token_ids": [1], "logprobs": [-0.5], "inner": {"top_p": 1.0}}


async def test_an_api_error_carries_cause_fix_and_headers(client: httpx.AsyncClient) -> None:
    response = await client.get("/api-error", headers={"x-request-id": "r-1"})
    assert response.status_code == 429
    assert response.headers["retry-after"] == "2"
    assert response.json() == {
        "error": {
            "code": "overloaded",
            "message": "Full.",
            "fix": "Wait.",
            "field": None,
            "request_id": "r-1",
        }
    }


async def test_an_exception_of_the_core_is_answered_as_the_table_says_for_its_base(
    client: httpx.AsyncClient,
) -> None:
    response = await client.get("/full")
    assert response.status_code == 429
    assert response.headers["retry-after"] == "2"  # 1.2 s, rounded up
    error = response.json()["error"]
    assert (error["code"], error["field"]) == ("full", "1.2")
    assert (error["message"], error["fix"]) == ("Full: {braces} stay.", "Wait 1.2 s.")


async def test_a_validation_error_names_the_nested_field(client: httpx.AsyncClient) -> None:
    response = await client.post("/echo", json={**GOOD, "inner": {"top_p": 1.5}})
    assert response.status_code == 422
    error = response.json()["error"]
    assert error["field"] == "inner.top_p"
    assert error["code"] == "invalid_request"


async def test_of_several_wrong_fields_the_cause_and_the_fix_name_every_one(
    client: httpx.AsyncClient,
) -> None:
    wrong = {"token_ids": ["a"], "logprobs": [0.0], "inner": {"top_p": 1.5}, "temprature": 1}
    error = (await client.post("/echo", json=wrong)).json()["error"]
    assert error["fix"].startswith("Correct token_ids.0, inner.top_p, temprature; ")
    assert all(f"{name}: " in error["message"] for name in ("token_ids.0", "temprature"))
    assert error["field"] == "token_ids.0"


async def test_of_very_many_wrong_fields_the_rest_is_counted(client: httpx.AsyncClient) -> None:
    error = (await client.post("/echo", json={**GOOD, "token_ids": ["a"] * 100})).json()["error"]
    for text in (error["message"], error["fix"]):
        assert "token_ids.19" in text and "token_ids.20" not in text
        assert "and 80 more" in text


async def test_an_unknown_field_is_refused_by_name(client: httpx.AsyncClient) -> None:
    response = await client.post("/echo", json={**GOOD, "temprature": 1})
    assert response.status_code == 422
    assert response.json()["error"]["field"] == "temprature"


async def test_a_bug_leaves_no_detail_but_an_id(client: httpx.AsyncClient) -> None:
    response = await client.get("/bug", headers={"x-request-id": "r-2"})
    assert response.status_code == 500
    assert "secret" not in response.text
    assert "Traceback" not in response.text
    assert response.json()["error"]["request_id"] == "r-2"


async def test_an_unknown_path_and_method_have_the_same_shape(client: httpx.AsyncClient) -> None:
    missing = await client.get("/nowhere")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    wrong = await client.get("/echo")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")


async def test_a_body_that_does_not_parse_is_a_422_that_names_the_body(
    client: httpx.AsyncClient,
) -> None:
    for media_type in ("application/json", "application/msgpack"):
        response = await client.post(
            "/echo", content=b"\xc1{", headers={"content-type": media_type}
        )
        assert response.status_code == 422
        assert response.json()["error"]["field"] == "body"
