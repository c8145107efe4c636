"""The same request over HTTP and over gRPC: the worker is told the same, and the answers say the same."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tandem.proto import inference_pb2 as pb
from tandem.proto import worker_pb2
from tests.router.both_doors import BothDoors, Refusal, joined_stream, refusal, streamed
from tests.router.conftest import House
from tests.router.fake_worker import Script
from tests.router.tool_models import CLOCK, WEATHER, calls_text, saying, write_tool_model

HELLO = [{"role": "user", "content": "Hello"}]
CHAT = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="Hello")])
SCHEMA = {"type": "object", "properties": {"id": {"type": "integer", "maximum": 2**60 + 1}}}
PARIS = '{"city":"Paris"}'
TOOLS = [
    pb.Tool(
        name="get_weather",
        description="Weather of a city.",
        parameters=json.dumps(WEATHER["function"]["parameters"]),  # type: ignore[index]
    ),
    pb.Tool(name="clock"),
]


@pytest.fixture
async def doors(house: House) -> AsyncIterator[BothDoors]:
    both = await BothDoors.open(house, Script(cached_tokens=1))
    yield both
    await both.close()


@pytest.fixture
async def tool_doors(house: House, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[BothDoors]:
    house.model = write_tool_model(tmp_path_factory.mktemp("model") / "tiny", "hermes")
    text = "Let me see.\n" + calls_text("hermes", ("get_weather", PARIS), ("clock", "{}"))
    both = await BothDoors.open(house, Script(tokens=saying(house.model, text), stop_token_id=2, delay_s=0.002))
    yield both
    await both.close()


SAMPLING: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"max_tokens": 4, "n": 3, "seed": 5}, {"max_tokens": 4, "n": 3, "seed": 5}),
    (
        {"temperature": 0.5, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "seed": 1, "min_tokens": 2, "ignore_eos": True},
        {"temperature": 0.5, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "seed": 1, "min_tokens": 2, "ignore_eos": True},
    ),
    (
        {"repetition_penalty": 1.5, "presence_penalty": -1.0, "frequency_penalty": 1.0, "seed": 2**64 - 1},
        {"repetition_penalty": 1.5, "presence_penalty": -1.0, "frequency_penalty": 1.0, "seed": 2**64 - 1},
    ),
    (
        {"logit_bias": {"7": 5.5, "8": -100}, "allowed_token_ids": [7, 8, 9], "stop_token_ids": [9]},
        {"logit_bias": {7: 5.5, 8: -100}, "allowed_token_ids": [7, 8, 9], "stop_token_ids": [9]},
    ),
    ({"priority": -3, "cache_salt": "mine"}, {"priority": -3, "cache_salt": "mine"}),
    (
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": pb.StructuredOutputs(json=json.dumps(SCHEMA))},
    ),
    ({"structured_outputs": {"regex": "a+"}}, {"structured_outputs": pb.StructuredOutputs(regex="a+")}),
    (
        {"structured_outputs": {"json": SCHEMA, "whitespace_pattern": " ?", "disable_additional_properties": False}},
        {
            "structured_outputs": pb.StructuredOutputs(
                json=json.dumps(SCHEMA), whitespace_pattern=" ?", disable_additional_properties=False
            )
        },
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA, "strict": True}}},
        {"structured_outputs": pb.StructuredOutputs(json=json.dumps(SCHEMA), strict=True)},
    ),
    (
        {"structured_outputs": {"choice": ["yes", "no"]}},
        {"structured_outputs": pb.StructuredOutputs(choice=pb.Texts(texts=["yes", "no"]))},
    ),
    (
        {"structured_outputs": {"grammar": 'start: "a"'}},
        {"structured_outputs": pb.StructuredOutputs(grammar='start: "a"')},
    ),
    ({"response_format": {"type": "json_object"}}, {"structured_outputs": pb.StructuredOutputs(json_object=True)}),
]


@pytest.mark.parametrize("kind", ["prompt", "ids", "chat"])
@pytest.mark.parametrize(("http", "grpc"), SAMPLING)
async def test_sampling(doors: BothDoors, kind: str, http: dict[str, Any], grpc: dict[str, Any]) -> None:
    fields = {"seed": 3, **http, "return_token_ids": True, "logprobs": True if kind == "chat" else 2}
    request = pb.GenerateRequest(**{"seed": 3, **grpc, "return_token_ids": True, "logprobs": 2})
    match kind:
        case "prompt":
            path, fields["prompt"], request.prompt = "/v1/completions", "The river", "The river"
        case "ids":
            path, fields["prompt"] = "/v1/completions", [7, 8, 9]
            request.prompt_token_ids.ids.extend([7, 8, 9])
        case _:
            path, fields["messages"], fields["top_logprobs"] = "/v1/chat/completions", HELLO, 2
            request.chat.CopyFrom(CHAT)
    answer = await doors.post(path, fields)
    by_http = doors.submitted()
    whole = await doors.stub.Complete(request)
    assert doors.submitted() == by_http
    check_same(answer, whole)
    check_same(answer, joined_stream(await streamed(doors.stub, request)))
    assert doors.submitted() == by_http


def check_same(answer: dict[str, Any], whole: pb.CompleteResponse) -> None:
    usage = answer["usage"]
    assert whole.usage == pb.Usage(
        prompt_tokens=usage["prompt_tokens"],
        completion_tokens=usage["completion_tokens"],
        cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
        cached_by_tier=usage["prompt_tokens_details"].get("cached_tokens_by_tier", {}),
    )
    assert len(whole.choices) == len(answer["choices"])
    for mine, choice in zip(whole.choices, answer["choices"], strict=True):
        message = choice.get("message", {})
        assert (mine.text or None) == (choice["text"] if "text" in choice else message["content"])
        assert mine.finish_reason == choice["finish_reason"]
        reason = mine.WhichOneof("stop_reason")
        assert (getattr(mine, reason) if reason else None) == choice["stop_reason"]
        calls = [{"name": call.name, "arguments": call.arguments} for call in mine.tool_calls]
        assert calls == [call["function"] for call in message.get("tool_calls", [])]
        if "token_ids" in choice:
            assert list(mine.token_ids) == choice["token_ids"]
            assert list(mine.prompt_token_ids) == choice.get("prompt_token_ids", answer.get("prompt_token_ids"))
        if choice["logprobs"]:
            assert logprobs_of(mine) == http_logprobs(choice["logprobs"])
            assert [each.offset for each in mine.logprobs] == choice["logprobs"].get(
                "text_offset", [each.offset for each in mine.logprobs]
            )


def logprobs_of(choice: pb.GenerateResponse) -> list[Any]:
    return [(each.token, each.logprob, {top.token: top.logprob for top in each.top}) for each in choice.logprobs]


def http_logprobs(logprobs: dict[str, Any]) -> list[Any]:
    if "content" in logprobs:
        return [
            (each["token"], each["logprob"], {top["token"]: top["logprob"] for top in each["top_logprobs"]})
            for each in logprobs["content"]
        ]
    return list(zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True))


async def test_stop_strings_and_what_ended_it(doors: BothDoors) -> None:
    body = {"prompt": "The river ran", "max_tokens": 9, "stop": ["ver r"], "include_stop_str_in_output": True}
    answer = await doors.post("/v1/completions", body)
    request = pb.GenerateRequest(prompt="The river ran", max_tokens=9, stop=["ver r"], include_stop_str_in_output=True)
    assert answer["choices"][0]["stop_reason"] == "ver r"
    check_same(answer, await doors.stub.Complete(request))


async def test_echo_and_logprobs_of_the_prompt(doors: BothDoors) -> None:
    body = {"prompt": "The river", "max_tokens": 2, "echo": True, "logprobs": 1, "return_token_ids": True}
    answer = await doors.post("/v1/completions", body)
    for max_tokens in (2, 0):
        body["max_tokens"] = max_tokens
        answer = await doors.post("/v1/completions", body)
        whole = await doors.stub.Complete(
            pb.GenerateRequest(prompt="The river", max_tokens=max_tokens, echo=True, logprobs=1)
        )
        (choice,) = whole.choices
        logprobs = answer["choices"][0]["logprobs"]
        told = [*choice.prompt_logprobs, *choice.logprobs]
        assert choice.text == answer["choices"][0]["text"]
        assert [each.token for each in told] == logprobs["tokens"]
        assert [each.logprob if each.HasField("logprob") else None for each in told] == logprobs["token_logprobs"]


async def test_logprobs_of_a_prompt_in_vllms_shape(doors: BothDoors) -> None:
    for path, body, request in (
        ("/v1/completions", {"prompt": "The river"}, pb.GenerateRequest(prompt="The river")),
        ("/v1/chat/completions", {"messages": HELLO, "return_prompt_text": True}, pb.GenerateRequest(chat=CHAT)),
    ):
        answer = await doors.post(path, {**body, "max_tokens": 1, "prompt_logprobs": 2, "echo": True})
        request.MergeFrom(pb.GenerateRequest(max_tokens=1, prompt_logprobs=2, echo=True, return_prompt_text=True))
        if "messages" in body:
            assert isinstance(answer["prompt_text"], str)
        else:
            request.ClearField("return_prompt_text")
        for choice in (
            (await doors.stub.Complete(request)).choices[0],
            joined_stream(await streamed(doors.stub, request)).choices[0],
        ):
            told: list[Any] = [
                {str(each.token_id): (each.logprob, each.rank)}
                | {str(top.token_id): (top.logprob, top.rank) for top in each.top}
                for each in choice.prompt_logprobs
            ]
            given = answer.get("prompt_logprobs") or answer["choices"][0]["prompt_logprobs"]
            assert told[1:] == [
                {token_id: (each["logprob"], each["rank"]) for token_id, each in listed.items()} for listed in given[1:]
            ]
            assert choice.prompt_text == answer.get("prompt_text", "")
            assert choice.text == answer["choices"][0].get(
                "text", answer["choices"][0].get("message", {}).get("content")
            )


async def test_fields_that_say_what_the_model_reads(doors: BothDoors) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "The river"}]
    chat = pb.ChatMessages(messages=[*CHAT.messages, pb.ChatMessage(role="assistant", content="The river")])
    for path, body, request in (
        (
            "/v1/completions",
            {"prompt": "The river ran past", "truncate_prompt_tokens": 2, "truncation_side": "right"},
            pb.GenerateRequest(prompt="The river ran past", truncate_prompt_tokens=2, truncation_side="right"),
        ),
        (
            "/v1/completions",
            {"prompt": "a", "add_special_tokens": False, "bad_words": ["the mill"]},
            pb.GenerateRequest(prompt="a", add_special_tokens=False, bad_words=["the mill"]),
        ),
        (
            "/v1/chat/completions",
            {"messages": messages, "continue_final_message": True, "echo": True},
            pb.GenerateRequest(chat=chat, continue_final_message=True, echo=True),
        ),
    ):
        answer = await doors.post(path, {**body, "max_tokens": 3, "temperature": 0})
        by_http = doors.submitted()
        request.MergeFrom(pb.GenerateRequest(max_tokens=3, temperature=0))
        check_same(answer, await doors.stub.Complete(request))
        assert doors.submitted() == by_http
    call = doors.stub.Complete(pb.GenerateRequest(chat=CHAT, max_tokens=1, reasoning_effort="high"))
    assert dict(await call.initial_metadata())["x-tandem-ignored"] == "reasoning_effort"
    for request, param in (
        (pb.GenerateRequest(prompt="a", truncation_side="up", truncate_prompt_tokens=1), "truncation_side"),
        (pb.GenerateRequest(prompt="a", prompt_logprobs=21), "prompt_logprobs"),
        (pb.GenerateRequest(prompt="a", documents=["{}"]), "documents"),
        (pb.GenerateRequest(chat=CHAT, documents=['{"a": 1}', "["]), "documents[1]"),
        (pb.GenerateRequest(chat=CHAT, documents=['{"a": 1}']), "documents"),
    ):
        assert await refusal(doors.stub.Complete(request)) == Refusal("invalid_request", param)


@pytest.mark.parametrize(
    ("http", "grpc"),
    [
        ({}, {}),
        ({"tool_choice": "required"}, {"tool_mode": pb.TOOL_MODE_REQUIRED}),
        ({"tool_choice": "none"}, {"tool_mode": pb.TOOL_MODE_NONE}),
        (
            {"parallel_tool_calls": False, "tool_choice": "required"},
            {"parallel_tool_calls": False, "tool_mode": pb.TOOL_MODE_REQUIRED},
        ),
        ({"tool_choice": {"type": "function", "function": {"name": "clock"}}}, {"tool_function": "clock"}),
    ],
)
async def test_tools(tool_doors: BothDoors, http: dict[str, Any], grpc: dict[str, Any]) -> None:
    body = {"messages": HELLO, "tools": [WEATHER, CLOCK], "temperature": 0, "return_token_ids": True, **http}
    answer = await tool_doors.post("/v1/chat/completions", body)
    by_http = tool_doors.submitted()
    request = pb.GenerateRequest(chat=CHAT, tools=TOOLS, temperature=0, return_token_ids=True, **grpc)
    check_same(answer, await tool_doors.stub.Complete(request))
    assert tool_doors.submitted() == by_http
    streaming = await streamed(tool_doors.stub, request)
    check_same(answer, joined_stream(streaming))
    if "tool_mode" not in grpc or grpc["tool_mode"] != pb.TOOL_MODE_NONE:
        assert answer["choices"][0]["finish_reason"] == "tool_calls"
        assert len([part for each in streaming for part in each.tool_calls]) > 2, "arguments come in pieces"


async def test_a_conversation_with_calls_and_parts(tool_doors: BothDoors) -> None:
    call = {"id": "call12345", "type": "function", "function": {"name": "get_weather", "arguments": PARIS}}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": "Hello", "name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "sun", "tool_call_id": "call12345"},
    ]
    await tool_doors.post("/v1/chat/completions", {"messages": messages, "temperature": 0, "max_tokens": 1})
    chat = pb.ChatMessages(
        messages=[
            pb.ChatMessage(role="developer", parts=[pb.ContentPart(text="Be"), pb.ContentPart(text="brief.")]),
            pb.ChatMessage(role="user", content="Hello", name="ann"),
            pb.ChatMessage(
                role="assistant", tool_calls=[pb.ToolCall(id="call12345", name="get_weather", arguments=PARIS)]
            ),
            pb.ChatMessage(role="tool", content="sun", tool_call_id="call12345"),
        ]
    )
    by_http = tool_doors.submitted()
    await tool_doors.stub.Complete(pb.GenerateRequest(chat=chat, temperature=0, max_tokens=1))
    assert tool_doors.submitted() == by_http


ERRORS: list[tuple[dict[str, Any], pb.GenerateRequest, str]] = [
    ({"prompt": "a", "model": "other"}, pb.GenerateRequest(prompt="a", model="other"), "model"),
    ({"prompt": "a", "temperature": 5}, pb.GenerateRequest(prompt="a", temperature=5), "temperature"),
    ({"prompt": "a", "top_p": 0}, pb.GenerateRequest(prompt="a", top_p=0), "top_p"),
    ({"prompt": "a", "n": 99}, pb.GenerateRequest(prompt="a", n=99), "n"),
    ({"prompt": "a", "max_tokens": 0}, pb.GenerateRequest(prompt="a", max_tokens=0), "max_tokens"),
    ({"prompt": "a", "max_tokens": 5000}, pb.GenerateRequest(prompt="a", max_tokens=5000), "max_tokens"),
    ({"prompt": "a", "logprobs": 21}, pb.GenerateRequest(prompt="a", logprobs=21), "logprobs"),
    ({"prompt": "a", "stop": [""]}, pb.GenerateRequest(prompt="a", stop=[""]), "stop"),
    ({"prompt": "a", "logit_bias": {"512": 1}}, pb.GenerateRequest(prompt="a", logit_bias={512: 1}), "logit_bias"),
    ({"prompt": "a", "logit_bias": {"1": 101}}, pb.GenerateRequest(prompt="a", logit_bias={1: 101}), "logit_bias"),
    ({"prompt": "a", "context": "x"}, pb.GenerateRequest(prompt="a", context="x"), "context"),
    ({"prompt": [600]}, pb.GenerateRequest(prompt_token_ids=pb.TokenIds(ids=[600])), "prompt_token_ids"),
    ({"prompt": []}, pb.GenerateRequest(prompt_token_ids=pb.TokenIds()), "prompt_token_ids"),
    ({"messages": []}, pb.GenerateRequest(chat=pb.ChatMessages()), "chat.messages"),
    (
        {"messages": [{"role": "x", "content": "a"}]},
        pb.GenerateRequest(chat=pb.ChatMessages(messages=[pb.ChatMessage(role="x", content="a")])),
        "chat.messages[0].role",
    ),
    (
        {
            "messages": [
                {"role": "user", "content": "a", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
            ]
        },
        pb.GenerateRequest(
            chat=pb.ChatMessages(
                messages=[pb.ChatMessage(role="user", content="a", tool_calls=[pb.ToolCall(name="f", arguments="{}")])]
            )
        ),
        "chat.messages[0].tool_calls",
    ),
    (
        {"messages": HELLO, "logprobs": True, "top_logprobs": 21},
        pb.GenerateRequest(chat=CHAT, logprobs=21),
        "logprobs",
    ),
    (
        {"messages": HELLO, "tools": [{"function": {"name": "a b"}}]},
        pb.GenerateRequest(chat=CHAT, tools=[pb.Tool(name="a b")]),
        "tools[0].name",
    ),
    (
        {"messages": HELLO, "tools": [WEATHER], "tool_choice": {"function": {"name": "x"}}},
        pb.GenerateRequest(chat=CHAT, tools=TOOLS[:1], tool_function="x"),
        "tool_function",
    ),
    (
        {"messages": HELLO, "tool_choice": "required"},
        pb.GenerateRequest(chat=CHAT, tool_mode=pb.TOOL_MODE_REQUIRED),
        "tool_mode",
    ),
    (
        {"messages": HELLO, "chat_template_kwargs": {"messages": []}},
        pb.GenerateRequest(chat=CHAT, chat_template_kwargs='{"messages": []}'),
        "chat_template_kwargs",
    ),
    (
        {"prompt": "a", "structured_outputs": {"regex": "("}},
        pb.GenerateRequest(prompt="a", structured_outputs=pb.StructuredOutputs(regex="(")),
        "structured_outputs.regex",
    ),
    (
        {"prompt": "a", "structured_outputs": {"json": "[]"}},
        pb.GenerateRequest(prompt="a", structured_outputs=pb.StructuredOutputs(json="[]")),
        "structured_outputs.json",
    ),
]


@pytest.mark.parametrize(
    ("body", "request_", "param"), ERRORS, ids=lambda value: value if isinstance(value, str) else ""
)
async def test_errors(tool_doors: BothDoors, body: dict[str, Any], request_: pb.GenerateRequest, param: str) -> None:
    response = await tool_doors.http.post("/v1/completions" if "prompt" in body else "/v1/chat/completions", json=body)
    error = response.json()["error"]
    for call in (tool_doors.stub.Complete(request_), tool_doors.stub.Generate(request_).read()):
        found = await refusal(call)
        assert found == Refusal(error["code"], param)
        assert found.message.removeprefix(param) == error["message"].removeprefix(error["param"])
    assert tool_doors.submitted() == []


async def test_what_a_schema_says_in_vain_is_told_or_refused(tool_doors: BothDoors) -> None:
    schema = json.dumps({"type": "array", "items": {"type": "integer"}, "uniqueItems": True})
    arguments = json.dumps({"type": "object", "properties": {"a": json.loads(schema)}})
    lenient = pb.GenerateRequest(prompt="a", max_tokens=1, structured_outputs=pb.StructuredOutputs(json=schema))
    tools = pb.GenerateRequest(
        chat=CHAT, max_tokens=1, tools=[pb.Tool(name="f", parameters=arguments)], tool_mode=pb.TOOL_MODE_REQUIRED
    )
    for request, ignored in (
        (lenient, "structured_outputs.json.uniqueItems"),
        (tools, "tools[0].parameters.properties.a.uniqueItems"),
    ):
        call = tool_doors.stub.Complete(request)
        assert dict(await call.initial_metadata())["x-tandem-ignored"] == ignored
        await call
    lenient.structured_outputs.strict = True
    assert await refusal(tool_doors.stub.Complete(lenient)) == Refusal("invalid_request", "structured_outputs.json")


@pytest.mark.parametrize("pooling", ["mean", "last"])
async def test_embeddings(doors: BothDoors, pooling: str) -> None:
    doors.worker.script = Script(embedding=lambda submit: [float(len(submit.prompt_token_ids)), 4.0 * submit.pooling])
    body = {"input": ["The river", "a"], "pooling": pooling, "priority": 2, "cache_salt": "s"}
    answer = await doors.post("/v1/embeddings", body)
    by_http = doors.submitted()
    mode = {"mean": pb.POOLING_MEAN, "last": pb.POOLING_LAST}[pooling]
    inputs = [pb.EmbedInput(text="The river"), pb.EmbedInput(text="a")]
    mine = await doors.stub.Embed(pb.EmbedRequest(input=inputs, pooling=mode, priority=2, cache_salt="s"))
    assert sorted(doors.submitted(), key=str) == sorted(by_http, key=str)
    assert [list(each.values) for each in mine.embeddings] == [each["embedding"] for each in answer["data"]]
    assert mine.usage.prompt_tokens == answer["usage"]["prompt_tokens"]

    ids = await doors.post("/v1/embeddings", {"input": [[7, 8]]})
    mine = await doors.stub.Embed(pb.EmbedRequest(input=[pb.EmbedInput(token_ids=pb.TokenIds(ids=[7, 8]))]))
    assert list(mine.embeddings[0].values) == ids["data"][0]["embedding"]
    assert {submit.pooling for submit in doors.submitted()} == {worker_pb2.POOLING_LAST}
    for request, param in (
        (pb.EmbedRequest(), "input"),
        (pb.EmbedRequest(input=[pb.EmbedInput()]), "input[0]"),
        (pb.EmbedRequest(input=[pb.EmbedInput(text="a")], dimensions=3), "dimensions"),
    ):
        assert await refusal(doors.stub.Embed(request)) == Refusal("invalid_request", param)


async def test_tokenize_and_back(doors: BothDoors) -> None:
    for body, request in (
        ({"prompt": "The river"}, pb.TokenizeRequest(text="The river", return_token_strs=True)),
        (
            {"messages": HELLO, "add_generation_prompt": False},
            pb.TokenizeRequest(chat=CHAT, add_generation_prompt=False, return_token_strs=True),
        ),
    ):
        answer = await doors.post("/tokenize", {**body, "return_token_strs": True})
        mine = await doors.stub.Tokenize(request)
        assert list(mine.token_ids) == answer["tokens"]
        assert list(mine.token_strs) == answer["token_strs"]
        assert mine.max_model_len == answer["max_model_len"]
        text = await doors.post("/detokenize", {"tokens": answer["tokens"]})
        assert (await doors.stub.Detokenize(pb.DetokenizeRequest(tokens=mine.token_ids))).text == text["prompt"]
    assert await refusal(doors.stub.Detokenize(pb.DetokenizeRequest(tokens=[999]))) == Refusal(
        "invalid_request", "tokens"
    )
