import array
import struct

import httpx
import msgpack
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from services.common.wire import JSON_TYPE, MSGPACK_TYPE, decode, encode, media_type_of


class Numbers(BaseModel):
    token_ids: list[int]
    logprobs: list[float]


float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
token_id = st.integers(min_value=0, max_value=2**31 - 1)


@pytest.mark.parametrize("media_type", [JSON_TYPE, MSGPACK_TYPE])
@given(logprobs=st.lists(float32), token_ids=st.lists(token_id))
def test_every_float32_and_id_survives_bit_for_bit(
    media_type: str, logprobs: list[float], token_ids: list[int]
) -> None:
    model = Numbers(token_ids=token_ids, logprobs=logprobs)
    back = Numbers.model_validate(decode(encode(model, media_type), media_type))
    assert back.token_ids == token_ids
    assert array.array("f", back.logprobs).tobytes() == array.array("f", logprobs).tobytes()


def test_the_msgpack_layout_is_little_endian_blocks() -> None:
    body = encode(Numbers(token_ids=[258], logprobs=[-0.5]), MSGPACK_TYPE)
    raw = msgpack.unpackb(body)
    assert raw["token_ids"] == msgpack.ExtType(2, b"\x02\x01\x00\x00")
    assert raw["logprobs"] == msgpack.ExtType(1, struct.pack("<f", -0.5))


def test_plain_msgpack_arrays_are_accepted_too() -> None:
    body = msgpack.packb({"token_ids": [1, 2], "logprobs": [-0.5, -1.0]})
    assert decode(body, MSGPACK_TYPE) == {"token_ids": [1, 2], "logprobs": [-0.5, -1.0]}


@pytest.mark.parametrize(
    "body",
    [b"", b"\xc1", b"\x81\xa1a", msgpack.packb(msgpack.ExtType(9, b"x")),
     msgpack.packb(msgpack.ExtType(1, b"abc")), b"\x91" * 5000],
)  # fmt: skip
def test_bad_msgpack_is_a_value_error(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"msgpack|extension"):
        decode(body, MSGPACK_TYPE)


def test_bad_json_is_a_value_error() -> None:
    with pytest.raises(orjson.JSONDecodeError):
        decode(b"{", JSON_TYPE)


def test_json_is_the_default_form() -> None:
    assert media_type_of(None) == JSON_TYPE
    assert media_type_of("*/*") == JSON_TYPE
    assert media_type_of("application/msgpack; q=1") == MSGPACK_TYPE


async def test_a_route_speaks_both_forms(client: httpx.AsyncClient) -> None:
    content = {"token_ids": [7, 8], "logprobs": [-0.25, -2.5], "inner": {"top_p": 1.0}}
    as_json = await client.post("/echo", json=content)
    assert as_json.json() == content
    as_msgpack = await client.post(
        "/echo",
        content=msgpack.packb(content),
        headers={"content-type": MSGPACK_TYPE, "accept": MSGPACK_TYPE},
    )
    assert as_msgpack.headers["content-type"] == MSGPACK_TYPE
    assert decode(as_msgpack.content, MSGPACK_TYPE) == content
