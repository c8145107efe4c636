"""Whatever a client sends, the answer is never a 500, and an error has OpenAI's shape."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.router.conftest import House
from tests.router.fake_worker import Script


@pytest.fixture(scope="module")
def client(model_folder: Path) -> Iterator[httpx.Client]:
    """A router that lives in a thread for all examples."""
    loop = asyncio.new_event_loop()
    stack = AsyncExitStack()
    folder = Path(tempfile.mkdtemp(prefix="tandem-"))

    async def start() -> str:
        house = House(folder, model_folder, stack)
        worker = await house.decode(script=Script(per_output=50))
        return (await house.router(worker)).url

    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    url = asyncio.run_coroutine_threadsafe(start(), loop).result(20)
    with httpx.Client(base_url=url, trust_env=False, timeout=20) as client:
        yield client
    asyncio.run_coroutine_threadsafe(stack.aclose(), loop).result(20)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    shutil.rmtree(folder)


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
small = st.integers(-2, 25)
fields = {
    "max_tokens": small | junk,
    "min_tokens": small | junk,
    "temperature": st.floats(-1, 3) | junk,
    "top_p": st.floats(-1, 2) | junk,
    "top_k": small | junk,
    "n": st.integers(-1, 4) | junk,
    "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=5) | junk,
    "seed": small | junk,
    "logit_bias": st.dictionaries(
        st.sampled_from(["1", "511", "512", "-1", "x", "²"]), st.floats(-101, 101), max_size=2
    )
    | junk,
    "logprobs": small | st.booleans() | junk,
    "top_logprobs": small | junk,
    "echo": st.booleans() | junk,
    "stream": st.booleans() | junk,
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}) | junk,
    "return_token_ids": st.booleans() | junk,
    "stop_token_ids": st.lists(small, max_size=3) | junk,
    "allowed_token_ids": st.lists(small, max_size=3) | junk,
    "skip_special_tokens": st.booleans() | junk,
    "include_stop_str_in_output": st.booleans() | junk,
    "chat_template_kwargs": junk,
    "response_format": junk,
    "tools": junk,
    "cache_salt": st.text(max_size=5) | junk,
    "priority": small | junk,
}
options = st.dictionaries(st.sampled_from(sorted(fields)), st.none(), max_size=5).flatmap(
    lambda chosen: st.fixed_dictionaries({name: fields[name] for name in chosen})
)
prompts = (
    st.text(max_size=10)
    | st.lists(st.integers(-1, 513), max_size=4)
    | st.lists(st.text(max_size=5), max_size=3)
    | st.lists(st.lists(st.integers(0, 511), max_size=3), max_size=3)
    | junk
)
messages = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "system", "tool", "robot"]),
            "content": st.text(max_size=9) | junk,
        }
    ),
    max_size=3,
)
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check(response: httpx.Response) -> None:
    assert response.status_code in (200, 400), response.text
    if response.status_code == 400:
        error = response.json()["error"]
        assert error["code"] in ("invalid_request", "context_length_exceeded")
        assert len(error["message"]) <= 500
    elif response.headers["content-type"].startswith("text/event-stream"):
        assert response.text.endswith("data: [DONE]\n\n")
    else:
        assert all(choice["finish_reason"] for choice in response.json()["choices"])


@given(prompts, options)
@quick
def test_completions(client: httpx.Client, prompt: object, more: dict[str, object]) -> None:
    check(client.post("/v1/completions", content=msgspec.json.encode({"prompt": prompt, **more})))


@given(messages | junk, options)
@quick
def test_chat(client: httpx.Client, messages: object, more: dict[str, object]) -> None:
    check(client.post("/v1/chat/completions", content=msgspec.json.encode({"messages": messages, **more})))


@given(st.sampled_from(["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]), st.binary(max_size=60))
@quick
def test_bytes(client: httpx.Client, path: str, body: bytes) -> None:
    assert client.post(path, content=body).status_code in (200, 400)


names = st.sampled_from(["prompt", "messages", "tokens", "model", "add_special_tokens", "chat_template_kwargs"])


@given(st.sampled_from(["/tokenize", "/detokenize"]), names, junk, prompts)
@quick
def test_tokenize(client: httpx.Client, path: str, name: str, value: object, prompt: object) -> None:
    response = client.post(path, content=msgspec.json.encode({"prompt": prompt, "tokens": prompt, name: value}))
    assert response.status_code in (200, 400, 404)
