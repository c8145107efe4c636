"""Whatever a client sends, the answer is never a 500, and an error has OpenAI's shape."""

from __future__ import annotations

import asyncio
import os
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
from tests.router.tool_models import CLOCK, WEATHER, write_tool_model


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A router that lives in a thread for all examples. Its model knows tools, and repeats what it is told of them."""
    model_folder = write_tool_model(tmp_path_factory.mktemp("model") / "tiny", "hermes")
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
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
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


def some(**strategies: st.SearchStrategy[object]) -> st.SearchStrategy[dict[str, object]]:
    """Objects with any of these fields."""
    return st.fixed_dictionaries({}, optional=strategies)


schemas = junk | some(
    type=st.sampled_from(["object", "string", "integer", "array", "x"]),
    properties=st.dictionaries(st.text(max_size=3), junk | some(type=st.sampled_from(["string", "null"])), max_size=2),
    enum=st.lists(junk, max_size=2),
    required=st.lists(st.text(max_size=3), max_size=2),
)
schemas |= st.dictionaries(
    st.sampled_from(["$ref", "anyOf", "not", "pattern", "x-guidance", "minimum"]), junk, max_size=2
)
functions = some(name=st.sampled_from(["clock", "get_weather", "", "a b"]), parameters=schemas, strict=st.booleans())
tools = st.lists(
    st.sampled_from([WEATHER, CLOCK]) | some(type=st.just("function"), function=functions | junk), max_size=3
)
choices = st.sampled_from(["none", "auto", "required", "x", {"type": "function", "function": {"name": "clock"}}]) | junk
guided = some(
    json=schemas,
    regex=st.text(max_size=6),
    choice=st.lists(st.text(max_size=3), max_size=3),
    grammar=st.text(max_size=8),
    json_object=st.booleans(),
)
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
    "stream_options": some(include_usage=st.booleans(), continuous_usage_stats=st.booleans(), usage=junk) | junk,
    "return_token_ids": st.booleans() | junk,
    "stop_token_ids": st.lists(small, max_size=3) | junk,
    "allowed_token_ids": st.lists(small, max_size=3) | junk,
    "skip_special_tokens": st.booleans() | junk,
    "include_stop_str_in_output": st.booleans() | junk,
    "chat_template_kwargs": junk,
    "bad_words": st.lists(st.text(max_size=4), max_size=3) | junk,
    "truncate_prompt_tokens": small | junk,
    "truncation_side": st.sampled_from(["left", "right"]) | junk,
    "prompt_logprobs": small | junk,
    "return_tokens_as_token_ids": st.booleans() | junk,
    "add_special_tokens": st.booleans() | junk,
    "add_generation_prompt": st.booleans() | junk,
    "continue_final_message": st.booleans() | junk,
    "documents": st.lists(st.dictionaries(st.text(max_size=3), junk, max_size=2), max_size=2) | junk,
    "reasoning_effort": st.text(max_size=5) | junk,
    "return_prompt_text": st.booleans() | junk,
    "request_id": st.text(max_size=5) | junk,
    "length_penalty": st.floats(0, 2) | junk,
    "user": junk,
    "temprature": junk,
    "füß\r\n": junk,
    "response_format": some(
        type=st.sampled_from(["text", "json_object", "json_schema"]),
        json_schema=some(name=st.text(max_size=3), schema=schemas, strict=st.booleans()) | junk,
    )
    | junk,
    "structured_outputs": guided | junk,
    "guided_json": schemas,
    "guided_regex": st.text(max_size=9) | junk,
    "guided_choice": st.lists(st.text(max_size=3), max_size=3) | junk,
    "guided_grammar": st.text(max_size=9) | junk,
    "tools": tools | junk,
    "tool_choice": choices,
    "parallel_tool_calls": st.booleans() | junk,
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
        },
        optional={
            "tool_calls": st.lists(
                some(
                    id=st.text(max_size=4),
                    function=some(name=st.text(max_size=4), arguments=st.sampled_from(["{}", "[]", "", '{"a":']))
                    | junk,
                ),
                max_size=2,
            )
            | junk,
            "tool_call_id": st.text(max_size=4) | junk,
        },
    ),
    max_size=3,
)
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))
"""Of each test; more of them find more."""
quick = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def check(response: httpx.Response) -> None:
    assert response.status_code in (200, 400), response.text
    if response.status_code == 400:
        error = response.json()["error"]
        assert error["code"] in ("invalid_request", "context_length_exceeded")
        assert len(error["message"]) <= 500
    elif response.headers["content-type"].startswith("text/event-stream"):
        assert response.text.endswith("data: [DONE]\n\n")
        assert '"error":' not in response.text
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


@given(
    st.lists(st.sampled_from([WEATHER, CLOCK]), min_size=1, max_size=2), choices, st.booleans(), st.text(max_size=20)
)
@quick
def test_tools(client: httpx.Client, tools: list[object], choice: object, stream: bool, text: str) -> None:
    talk = [{"role": "user", "content": text}]
    body = {"messages": talk, "tools": tools, "tool_choice": choice, "stream": stream, "max_tokens": 60}
    check(client.post("/v1/chat/completions", content=msgspec.json.encode(body)))


@given(prompts, some(pooling=st.text(max_size=4), encoding_format=junk, dimensions=small, model=junk, cache_salt=junk))
@quick
def test_embeddings(client: httpx.Client, given_input: object, more: dict[str, object]) -> None:
    response = client.post("/v1/embeddings", content=msgspec.json.encode({"input": given_input, **more}))
    assert response.status_code in (200, 400, 404), response.text


parts = st.lists(
    some(type=st.sampled_from(["input_text", "output_text", "x"]), text=st.text(max_size=5)) | junk, max_size=2
)
items = st.lists(
    some(
        type=st.sampled_from(["message", "function_call", "function_call_output", "reasoning", "x"]),
        role=st.sampled_from(["user", "assistant", "system", "tool"]),
        content=st.text(max_size=5) | parts | junk,
        call_id=st.text(max_size=3),
        name=st.text(max_size=4),
        arguments=st.sampled_from(["{}", "[]", ""]),
        output=st.text(max_size=4) | parts,
    ),
    max_size=3,
)
response_fields = some(
    instructions=st.text(max_size=5) | junk,
    max_output_tokens=small,
    stream=st.booleans(),
    text=some(format=some(type=st.sampled_from(["text", "json_object", "json_schema"]), schema=schemas)) | junk,
    tools=st.lists(functions.map(lambda tool: {"type": "function", **tool}) | junk, max_size=2) | junk,
    tool_choice=choices,
    include=st.just(["message.output_text.logprobs"]) | junk,
    top_logprobs=small,
    metadata=junk,
    previous_response_id=junk,
)


@given(st.text(max_size=8) | items | junk, response_fields)
@quick
def test_responses(client: httpx.Client, given_input: object, more: dict[str, object]) -> None:
    body = {"input": given_input, "max_output_tokens": 30, **more}
    response = client.post("/v1/responses", content=msgspec.json.encode(body))
    assert response.status_code in (200, 400), response.text
    if "event-stream" in response.headers["content-type"]:
        assert response.text.rpartition("event: ")[2].startswith(("response.completed", "response.incomplete"))
    elif response.status_code == 200:
        assert response.json()["status"] in ("completed", "incomplete")


blocks = st.lists(
    some(
        type=st.sampled_from(["text", "tool_use", "tool_result", "thinking", "image"]),
        text=st.text(max_size=5),
        id=st.text(max_size=4),
        name=st.text(max_size=4),
        input=st.dictionaries(st.text(max_size=3), junk, max_size=2),
        tool_use_id=st.text(max_size=4),
        content=st.text(max_size=4) | junk,
    ),
    max_size=3,
)
turns = st.lists(
    some(role=st.sampled_from(["user", "assistant", "x"]), content=st.text(max_size=5) | blocks | junk), max_size=3
)
message_fields = some(
    system=st.text(max_size=4) | blocks,
    max_tokens=small | junk,
    stream=st.booleans(),
    stop_sequences=st.lists(st.text(max_size=3), max_size=2) | junk,
    temperature=st.floats(-1, 2),
    top_k=small,
    tools=st.lists(some(name=st.sampled_from(["clock", ""]), input_schema=schemas) | junk, max_size=2) | junk,
    output_config=some(format=some(type=st.sampled_from(["json_schema", "x"]), schema=schemas) | junk) | junk,
    tool_choice=some(type=st.sampled_from(["auto", "any", "tool", "none"]), name=st.text(max_size=5)) | junk,
)


@given(turns | junk, message_fields)
@quick
def test_messages(client: httpx.Client, given_turns: object, more: dict[str, object]) -> None:
    body = {"messages": given_turns, "max_tokens": 30, **more}
    response = client.post("/v1/messages", content=msgspec.json.encode(body))
    assert response.status_code in (200, 400), response.text
    if response.status_code == 400:
        assert response.json()["type"] == "error"
    elif "event-stream" in response.headers["content-type"]:
        assert "event: message_stop" in response.text
    else:
        assert response.json()["stop_reason"]
    counted = client.post("/v1/messages/count_tokens", content=msgspec.json.encode(body))
    assert counted.status_code in (200, 400), counted.text


PATHS = [
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
    "/v1/responses/input_tokens",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
]


@given(st.sampled_from(PATHS), st.binary(max_size=60))
@quick
def test_bytes(client: httpx.Client, path: str, body: bytes) -> None:
    assert client.post(path, content=body).status_code in (200, 400)


names = st.sampled_from(["prompt", "messages", "tokens", "model", "add_special_tokens", "chat_template_kwargs"])


variables = st.dictionaries(
    st.sampled_from(["messages", "self", "tools", "add_generation_prompt", "x"]), junk, max_size=2
)


@given(st.sampled_from(["/tokenize", "/detokenize"]), names, junk | variables | st.just([WEATHER]), prompts)
@quick
def test_tokenize(client: httpx.Client, path: str, name: str, value: object, prompt: object) -> None:
    response = client.post(path, content=msgspec.json.encode({"prompt": prompt, "tokens": prompt, name: value}))
    assert response.status_code in (200, 400, 404)
