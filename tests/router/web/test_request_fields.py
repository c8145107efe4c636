"""Every field of a request is implemented, refused by name, or told to be without effect."""

from __future__ import annotations

import io
import json
import logging
import typing
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import openai.types.chat.completion_create_params as openai_chat
import openai.types.completion_create_params as openai_completions
import openai.types.embedding_create_params as openai_embeddings
import openai.types.responses.response_create_params as openai_responses
import pytest

from tandem.common.errors import TandemError
from tandem.router.batch.lines import read_lines
from tandem.router.http.field_docs import BODIES, markdown, nested
from tandem.router.web.field_table import OTHERS, Other, Refused
from tandem.router.web.request_fields import BodyReader, known_fields, typing_error
from tests.router.conftest import House, events
from tests.router.fake_worker import Script

DOCS = Path(__file__).parents[3] / "docs" / "api-fields.md"
MINIMAL: dict[str, dict[str, object]] = {
    "/v1/completions": {"prompt": "Hello", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2},
    "/v1/responses": {"input": "Hello", "max_output_tokens": 2},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2},
    "/v1/embeddings": {"input": "Hello"},
    "/tokenize": {"prompt": "Hello"},
    "/detokenize": {"tokens": [1]},
    "/v1/contexts": {"name": "a", "prompt": "Hello"},
    "/v1/batches": {"input_file_id": "f", "endpoint": "/v1/completions", "completion_window": "24h"},
}
ASKS_FOR_SOMETHING = "abc"
ROWS = [(path, name, other) for path, body in BODIES.items() for name, other in known_fields(body).others.items()]


def read(path: str, **fields: object) -> list[str]:
    """Names that have no effect."""
    return BodyReader(BODIES[path]).read(msgspec.json.encode({**MINIMAL[path], **fields}))[1]


@pytest.mark.parametrize(("path", "name", "other"), ROWS, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_not_implemented_does_as_the_table_says(path: str, name: str, other: Other) -> None:
    for nothing in (None, False, "", [], {}, *other.fine):
        assert read(path, **{name: nothing}) == []
    if isinstance(other, Refused):
        with pytest.raises(TandemError) as caught:
            read(path, **{name: ASKS_FOR_SOMETHING})
        assert (caught.value.param, caught.value.code) == (name, "invalid_request")
        assert caught.value.message == f"{name} is not supported: {other.why}"
    else:
        assert read(path, **{name: ASKS_FOR_SOMETHING}) == [name]


def test_no_row_is_without_a_struct_or_beside_a_field_of_one() -> None:
    met: set[str] = set()
    for body in BODIES.values():
        top = known_fields(body)
        for known in (top, *(inside for _, inside in nested(top, ""))):
            assert not set(known.fields) & set(known.others)
            met |= {id_ for id_, rows in OTHERS.items() if set(rows) <= set(known.others)}
    assert met == set(OTHERS)


def _parameters(module: typing.Any, name: str) -> set[str]:
    return set(getattr(module, name).__annotations__) | {"stream"}


@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        ("/v1/chat/completions", _parameters(openai_chat, "CompletionCreateParamsBase")),
        ("/v1/completions", _parameters(openai_completions, "CompletionCreateParamsBase")),
        ("/v1/responses", _parameters(openai_responses, "ResponseCreateParamsBase")),
        ("/v1/embeddings", _parameters(openai_embeddings, "EmbeddingCreateParams") - {"stream"}),
    ],
)
def test_every_parameter_of_the_openai_client_has_its_place(path: str, parameters: set[str]) -> None:
    known = known_fields(BODIES[path])
    assert parameters <= {*known.fields, *known.others}


@pytest.mark.parametrize("path", BODIES)
def test_every_field_with_a_typing_error_is_refused_with_the_right_name(path: str) -> None:
    known = known_fields(BODIES[path])
    for name in known.fields:
        for wrong in _misspelled(name):
            if wrong in known.fields or wrong in known.others:
                continue
            with pytest.raises(TandemError, match=r"did you mean \w+\?") as caught:
                read(path, **{wrong: 1})
            assert caught.value.param == wrong


def _misspelled(name: str) -> Iterator[str]:
    if len(name) > 4:
        yield name.replace("_", "-").upper() + "_"
        yield name[:2] + name[3] + name[2] + name[4:] + ("" if name[2] != name[3] else "x")
        yield name[0] + name[2:]
        yield name + "s"


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("temprature", "temperature"), ("maxTokens", "max_tokens"), ("top-p", "top_p"), ("freqency_penalty",
        "frequency_penalty"), ("presense_penalty", "presence_penalty"), ("stop_token_id", "stop_token_ids"),
        ("modle", "model"), ("steam", "stream"), ("respones_format", "response_format"), ("prompts", "prompt"),
        ("logit_baise", "logit_bias"), ("stream_option", "stream_options"), ("top_k_", "top_k"), ("sed", "seed"),
        ("user_id", None), ("top_a", None), ("min_k", None), ("litellm_call_id", None), ("options", None),
        ("keep_alive", None), ("tags", None), ("typical_p", None), ("trace", None), ("x", None), ("", None),
    ],
)  # fmt: skip
def test_typing_errors_are_told_from_fields_of_others(wrong: str, right: str | None) -> None:
    known = known_fields(BODIES["/v1/completions"])
    assert typing_error(wrong, [*known.fields, *known.others]) == right


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/chat/completions", {"stream_options": {"include_usag": True}}, "stream_options.include_usag"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "contents": "a"}]}, "messages[0].contents"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "txt": "b"}]}]},
            "messages[0].content[0].txt",
        ),
        ("/v1/completions", {"response_format": {"type": "text", "json-schema": {}}}, "response_format.json-schema"),
        (
            "/v1/chat/completions",
            {"response_format": {"type": "json_schema", "json_schema": {"nme": "a", "schema": {}}}},
            "response_format.json_schema.nme",
        ),
        (
            "/v1/chat/completions",
            {"tools": [{"type": "function", "function": {"name": "a", "parameter": {}}}]},
            "tools[0].function.parameter",
        ),
        ("/v1/completions", {"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp"),
        ("/v1/responses", {"text": {"fromat": {}}}, "text.fromat"),
        ("/v1/responses", {"input": [{"role": "user", "contnet": "a"}]}, "input[0].contnet"),
        ("/v1/messages", {"system": [{"type": "text", "txet": "a"}]}, "system[0].txet"),
        ("/v1/messages", {"tools": [{"name": "a", "input-schema": {}}]}, "tools[0].input-schema"),
    ],
)  # fmt: skip
def test_typing_errors_inside_objects_are_refused(path: str, fields: dict[str, object], param: str) -> None:
    with pytest.raises(TandemError, match="did you mean") as caught:
        read(path, **fields)
    assert caught.value.param == param


def test_maps_that_are_the_clients_own_are_not_looked_into() -> None:
    fields = {"chat_template_kwargs": {"temprature": 1}, "logit_bias": {"1": 2.0}, "metadata": {"modle": "a"}}
    assert read("/v1/chat/completions", **fields) == ["metadata"]
    schema = {"type": "object", "properties": {"temprature": {"type": "string"}}}
    answer = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    assert read("/v1/chat/completions", response_format=answer) == []


def test_names_inside_lists_are_told_once_and_without_place() -> None:
    talk = [{"role": "user", "content": "a", "mood": 1}, {"role": "user", "content": "b", "mood": 2}]
    assert read("/v1/chat/completions", messages=talk, store=True) == ["store", "messages[].mood"]


def test_unknown_names_without_end_are_refused() -> None:
    with pytest.raises(TandemError, match="more than 50 fields"):
        read("/v1/completions", **{f"{number}zz": 1 for number in range(100_000)})
    talk = [{"role": "user", "content": "a", "mood": 1}] * 20_000
    assert read("/v1/chat/completions", messages=talk) == ["messages[].mood"]


def test_names_cannot_break_the_header() -> None:
    given = {"évil\r\nset-cookie: a": 1, "a" * 100: 2, "fine": 3}
    assert read("/v1/completions", **given) == ["?", "fine"]


async def test_an_answer_tells_what_had_no_effect(house: House, caplog: pytest.LogCaptureFixture) -> None:
    _, client = await house.pair()
    with caplog.at_level(logging.WARNING):
        for path in ("/v1/completions", "/v1/chat/completions"):
            for stream in (False, True, False):
                body = {**MINIMAL[path], "user": "me", "a_new_field": 1, "stream": stream}
                response = await client.post(path, json=body)
                assert response.headers["x-tandem-ignored"] == "user, a_new_field"
                assert response.status_code == 200
                assert not stream or events(response.text)[-1] == "[DONE]"
    told = [record.getMessage() for record in caplog.records if "a_new_field" in record.getMessage()]
    assert len(told) == 2, "once for each endpoint"
    assert "x-tandem-ignored" not in (await client.post("/v1/completions", json=MINIMAL["/v1/completions"])).headers


async def test_an_error_that_comes_later_tells_it_too(bare_client: httpx.AsyncClient) -> None:
    response = await bare_client.post("/v1/completions", json={"prompt": "a", "temperature": 9, "user": "me"})
    assert (response.status_code, response.headers["x-tandem-ignored"]) == (400, "user")


async def test_a_typing_error_is_a_400_with_its_name(house: House) -> None:
    _, client = await house.pair(Script())
    response = await client.post("/v1/completions", json={"prompt": "a", "temprature": 1})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["message"]) == ("temprature", "temprature is not known; did you mean temperature?")


async def test_what_has_no_effect_inside_lists_is_told(house: House) -> None:
    _, client = await house.pair(Script())
    items = [{"type": "reasoning", "summary": []}, {"role": "user", "content": "Hello"}]
    body = {"input": items, "include": ["reasoning.encrypted_content"], "top_logprobs": 2, "max_output_tokens": 2}
    told = (await client.post("/v1/responses", json=body)).headers["x-tandem-ignored"]
    assert told == "include: reasoning.encrypted_content, top_logprobs, input[] of type reasoning"
    turns = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}]},
        {"role": "user", "content": [{"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}]},
    ]
    told = (await client.post("/v1/messages", json={"messages": turns, "max_tokens": 2})).headers["x-tandem-ignored"]
    assert set(told.split(", ")) == {
        "messages[].content[] of type thinking",
        "messages[].content[].thinking",
        "messages[].content[].cache_control",
    }


async def test_responses_draw_as_chats_do(house: House) -> None:
    worker, client = await house.pair()
    fields = {
        "temperature": 0.5, "top_p": 0.5, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.5, "seed": 9,
        "presence_penalty": 1, "frequency_penalty": 0.5, "min_tokens": 1, "ignore_eos": True,
        "stop_token_ids": [5], "allowed_token_ids": [1, 2],
    }  # fmt: skip
    body = {
        "input": "Hello",
        "max_output_tokens": 2,
        "priority": -3,
        "request_id": "mine",
        "bad_words": ["x"],
        **fields,
    }
    response = await client.post("/v1/responses", json=body)
    assert (response.json()["id"], response.headers.get("x-tandem-ignored")) == ("resp_mine", None)
    submit = worker.submits[0]
    for name, value in fields.items():
        got = getattr(submit.sampling, name)
        assert (list(got) if isinstance(value, list) else got) == value, name
    assert (submit.priority, len(submit.sampling.bad_words)) == (-3, 2)


async def test_templates_cannot_be_told_twice_whether_a_message_goes_on(bare_client: httpx.AsyncClient) -> None:
    for path in ("/v1/chat/completions", "/tokenize"):
        kwargs = {"chat_template_kwargs": {"continue_final_message": True}}
        response = await bare_client.post(
            path, json={"messages": MINIMAL["/v1/chat/completions"]["messages"], **kwargs}
        )
        assert (response.status_code, response.json()["error"]["param"]) == (400, "chat_template_kwargs")


async def test_tokenize_reads_as_chats_are_read(bare_client: httpx.AsyncClient) -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]
    read = {"messages": talk, "continue_final_message": True}
    tokens = (await bare_client.post("/tokenize", json=read)).json()["tokens"]
    text = (await bare_client.post("/detokenize", json={"tokens": tokens})).json()["prompt"]
    assert text == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb c"
    both = await bare_client.post("/tokenize", json={**read, "add_generation_prompt": True})
    assert both.json()["error"]["param"] == "continue_final_message"


def test_lines_of_batches_have_their_typing_errors_named() -> None:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a", "any": 1}, "note": 1}
    good = json.dumps(line).encode()
    assert read_lines(io.BytesIO(good), "/v1/completions", 1000)[1] == []
    wrong = json.dumps({**line, "costum_id": "b"}).encode()
    (error,) = read_lines(io.BytesIO(wrong), "/v1/completions", 1000)[1]
    assert (error.param, error.message) == ("costum_id", "costum_id is not known; did you mean custom_id?")


def test_the_docs_list_what_the_code_does() -> None:
    problem = "run: python -m tandem.router.http.field_docs > docs/api-fields.md"
    assert DOCS.read_text(encoding="utf-8") == markdown(), problem
