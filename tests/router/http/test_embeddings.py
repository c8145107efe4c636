"""/v1/embeddings, through the official client where it can say what is meant."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from tandem.proto import worker_pb2
from tandem.router.text.tokenizer import ModelText
from tests.router.conftest import House
from tests.router.fake_worker import FakeWorker, Script

URL = "/v1/embeddings"


def first_token_and_length(submit: worker_pb2.Submit) -> list[float]:
    """Tells inputs apart."""
    return [float(submit.prompt_token_ids[0]), float(len(submit.prompt_token_ids))]


@pytest.fixture
async def worker(house: House) -> FakeWorker:
    return await house.decode(script=Script(embedding=first_token_and_length))


@pytest.fixture
async def client(house: House, worker: FakeWorker) -> AsyncIterator[openai.AsyncOpenAI]:
    router = await house.router(worker)
    async with openai.AsyncOpenAI(base_url=f"{router.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def unit(*values: float) -> Any:
    vector = np.asarray(values, np.float32)
    return pytest.approx((vector / np.linalg.norm(vector)).tolist(), rel=1e-6)


async def test_all_forms_of_input_and_both_encodings(
    house: House, client: openai.AsyncOpenAI, worker: FakeWorker
) -> None:
    ids = await ModelText(house.model).encode("The river", add_special_tokens=True)
    expected = unit(ids[0], len(ids))
    inputs: list[Any] = ["The river", ["The river"], ids, [ids]]
    for given in inputs:
        for encoding in ("float", openai.NOT_GIVEN):  # the client asks for base64 by itself
            answer = await client.embeddings.create(model="tiny", input=given, encoding_format=encoding)  # type: ignore[arg-type]
            assert [item.embedding for item in answer.data] == [expected]
            assert answer.usage.prompt_tokens == answer.usage.total_tokens == len(ids)
    assert (answer.object, answer.model, answer.data[0].object) == ("list", "tiny", "embedding")
    assert all(list(submit.prompt_token_ids) == ids for submit in worker.submits)


async def test_many_inputs_keep_their_order(client: openai.AsyncOpenAI, worker: FakeWorker) -> None:
    inputs = [[7 + i % 300, *[5] * (i % 4)] for i in range(150)]
    answer = await client.embeddings.create(model="tiny", input=inputs, encoding_format="float")
    assert [item.index for item in answer.data] == list(range(150))
    assert [item.embedding for item in answer.data] == [unit(ids[0], len(ids)) for ids in inputs]
    assert answer.usage.prompt_tokens == sum(map(len, inputs))
    assert len({submit.key.request_id for submit in worker.submits}) == 150


async def test_pooling_reaches_the_worker(house: House) -> None:
    worker, client = await house.pair()
    for fields in ({}, {"pooling": "last"}, {"pooling": "mean"}):
        assert (await client.post(URL, json={"input": "a", **fields})).status_code == 200
    last, mean = worker_pb2.POOLING_LAST, worker_pb2.POOLING_MEAN
    assert [submit.pooling for submit in worker.submits] == [last, last, mean]


async def test_no_hand_over_for_embeddings(house: House) -> None:
    decode = await house.decode()
    prefill = await house.prefill(to=(decode,))
    client = await house.client(await house.router(decode, prefill))
    assert (await client.post(URL, json={"input": "a"})).status_code == 200
    assert len(decode.submits) == 1
    assert not decode.submits[0].HasField("expect_kv")
    assert not prefill.submits


async def test_base64_is_little_endian_float32(house: House) -> None:
    _, client = await house.pair(Script(embedding=lambda _: [3.0, 0.0, -4.0]))
    answer = (await client.post(URL, json={"input": "a", "encoding_format": "base64"})).json()
    values = np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), "<f4")
    assert values.tolist() == pytest.approx([0.6, 0.0, -0.8])


async def test_a_worker_that_answers_nonsense_is_an_error(house: House) -> None:
    _, client = await house.pair(Script(embedding=lambda _: [float("nan")]))
    response = await client.post(URL, json={"input": "a"})
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input[0]"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": [1, "a"]}, "input"),
        ({"input": [999]}, "input"),
        ({"input": [[1], [999]]}, "input[1]"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": [1] * 2000}, "input"),
        ({"input": "a", "pooling": "cls"}, "pooling"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "priority": 2**40}, "priority"),
    ],
)
async def test_bad_fields_are_named(bare_client: httpx.AsyncClient, body: dict[str, Any], param: str) -> None:
    response = await bare_client.post(URL, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


async def test_the_true_number_of_dimensions_may_be_asked_for(client: openai.AsyncOpenAI) -> None:
    answer = await client.embeddings.create(model="tiny", input="a", dimensions=2)
    assert len(answer.data[0].embedding) == 2
    with pytest.raises(openai.BadRequestError, match="must be left out or 2") as wrong:
        await client.embeddings.create(model="tiny", input="a", dimensions=1)
    assert wrong.value.param == "dimensions"


async def test_explain_tells_where_they_were_computed(house: House) -> None:
    _, client = await house.pair()
    headers = {"x-tandem-explain": "1"}
    answer = (await client.post(URL, json={"input": ["a", "b"]}, headers=headers)).json()
    assert (answer["explain"]["outcome"], answer["explain"]["choices"]) == ("ok", 2)
    assert {attempt["decode"] for attempt in answer["explain"]["attempts"]} == {"decode-0"}
    assert "explain" not in (await client.post(URL, json={"input": "a"})).json()
