"""Models, tokenize, detokenize, health, version, metrics."""

from __future__ import annotations

import httpx

import tandem
from tests.router.conftest import House, router_metrics


async def test_models(house: House) -> None:
    _, client = await house.pair()
    listed = (await client.get("/v1/models")).json()
    assert listed["object"] == "list"
    (model,) = listed["data"]
    assert (model["id"], model["object"], model["owned_by"], model["max_model_len"]) == ("tiny", "model", "tandem", 512)
    assert (await client.get("/v1/models/tiny")).json() == model


async def test_tokenize_and_back(bare_client: httpx.AsyncClient) -> None:
    text = "The river é 世"
    answer = (await bare_client.post("/tokenize", json={"prompt": text, "return_token_strs": True})).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 1024
    assert (await bare_client.post("/detokenize", json={"tokens": answer["tokens"]})).json() == {"prompt": text}


async def test_tokenize_of_chat_applies_the_template(bare_client: httpx.AsyncClient) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    answer = (await bare_client.post("/tokenize", json={"messages": messages})).json()
    back = (await bare_client.post("/detokenize", json={"tokens": answer["tokens"]})).json()["prompt"]
    assert back == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


async def test_tokenize_needs_exactly_one_input(bare_client: httpx.AsyncClient) -> None:
    for body in ({}, {"prompt": "a", "messages": [{"role": "user", "content": "b"}]}):
        assert (await bare_client.post("/tokenize", json=body)).status_code == 400
    response = await bare_client.post("/detokenize", json={"tokens": [-1]})
    assert response.json()["error"]["param"] == "tokens"


async def test_long_text_is_tokenized_alike(bare_client: httpx.AsyncClient) -> None:
    short = (await bare_client.post("/tokenize", json={"prompt": "The river " * 10})).json()["tokens"]
    long = (await bare_client.post("/tokenize", json={"prompt": "The river " * 1000})).json()["tokens"]
    assert long[: len(short) - 1] == short[:-1]


async def test_version(bare_client: httpx.AsyncClient) -> None:
    assert (await bare_client.get("/version")).json() == {"version": tandem.__version__}


async def test_metrics_tell_what_happened(house: House) -> None:
    decode = await house.decode()
    prefill = await house.prefill(to=(decode,))
    client = await house.client(await house.router(decode, prefill))
    await client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 3})
    await client.post("/v1/completions", json={"prompt": "Hello", "n": 99})
    await client.get("/x" * 100)
    text = await router_metrics(client)
    for line in (
        'tandem_router_requests_total{endpoint="/v1/completions",status="200"} 1.0',
        'tandem_router_requests_total{endpoint="/v1/completions",status="400"} 1.0',
        'tandem_router_requests_total{endpoint="other",status="404"} 1.0',
        "tandem_router_ttft_seconds_count 1.0",
        "tandem_router_inter_token_seconds_count 2.0",
        "tandem_router_completion_tokens_total 3.0",
        'tandem_router_placements_total{reason="handover"} 1.0',
        "tandem_router_sequences_in_flight 0.0",
    ):
        assert line in text, line
    assert f'tandem_worker_up{{role="prefill",target="{prefill.target}",worker="prefill-0"}} 1.0' in text
