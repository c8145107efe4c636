from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.common.errors import TandemError
from tandem.router.batch.lines import _INPUT as BATCH_LINE
from tandem.router.fields.json_depth import MAX_DEPTH, check_depth, too_deep
from tandem.router.grpc_api.requests import json_object
from tandem.router.tools.arguments import CutArguments, arguments_of

NEAR_THE_STACK = [*range(960, 1000)]
DEPTHS = [MAX_DEPTH - 10, MAX_DEPTH + 1, 400, *NEAR_THE_STACK[::3], 5000]

_CHAT = '"messages": [{"role": "user", "content": "a"}]'
_TOOL = '{"type": "function", "function": {"name": "f", "parameters": {"a": DEEP}}}'
_PLACES = {
    ("/v1/chat/completions", "chat_template_kwargs"): '{CHAT, "chat_template_kwargs": {"a": DEEP}}',
    ("/v1/chat/completions", "tools"): '{CHAT, "tools": [TOOL]}',
    ("/v1/chat/completions", "unheard_of"): '{CHAT, "unheard_of": DEEP}',
    ("/v1/completions", "guided_json"): '{"prompt": "a", "guided_json": {"a": DEEP}}',
    ("/v1/embeddings", "input"): '{"input": DEEP}',
    ("/tokenize", "chat_template_kwargs"): '{CHAT, "chat_template_kwargs": {"a": DEEP}}',
    ("/detokenize", "tokens"): '{"tokens": DEEP}',
    ("/v1/messages", "tools"): '{CHAT, "max_tokens": 1, "tools": [{"name": "f", "input_schema": {"a": DEEP}}]}',
    ("/v1/responses", "input"): '{"input": DEEP}',
    ("/v1/contexts", "messages"): '{"name": "x", "messages": DEEP}',
}


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + closing * depth


def body_of(path: str, field: str, deep: str) -> str:
    return _PLACES[path, field].replace("CHAT", _CHAT).replace("TOOL", _TOOL).replace("DEEP", deep)


def object_with(depth: int) -> str:
    return f'{{"a": {nested(depth)}}}'


@pytest.mark.parametrize(("path", "field"), _PLACES)
async def test_a_body_nested_too_deeply_is_a_400_that_names_the_field(
    bare_client: httpx.AsyncClient, path: str, field: str
) -> None:
    for depth in DEPTHS:
        for deep in (nested(depth), nested(depth, '{"a":[', "]}").replace("[]", "[1]")):
            response = await bare_client.post(path, content=body_of(path, field, deep))
            assert response.status_code in (200, 400, 404, 503), (depth, response.text)
            if depth > MAX_DEPTH:
                error = response.json()["error"]
                assert response.status_code == 400, (depth, response.text)
                assert f"{MAX_DEPTH} levels" in error["message"], (depth, error)
                assert error.get("param", field) in (field, None), error
                if depth < 900 and "param" in error:
                    assert error["param"] == field


async def test_unfinished_nesting_of_any_depth_is_a_400(bare_client: httpx.AsyncClient) -> None:
    for depth in (*NEAR_THE_STACK, 100_000):
        response = await bare_client.post("/v1/completions", content='{"prompt": ' + "[" * depth)
        assert response.status_code in (400, 413), (depth, response.text)


def test_lines_of_batches_and_json_of_grpc_have_the_same_bound() -> None:
    line = f'{{"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {{{_CHAT}, "tools": DEEP}}}}'
    for depth in DEPTHS[1:]:
        with pytest.raises(TandemError, match="nested more than") as caught:
            BATCH_LINE.read(line.replace("DEEP", nested(depth)).encode())
        assert caught.value.code == "invalid_request"
        with pytest.raises(TandemError) as caught:
            json_object(object_with(depth), "documents[0]")
        assert caught.value.param == "documents[0]"


def test_deep_arguments_of_calls_are_written_as_they_came() -> None:
    for depth in DEPTHS[1:]:
        arguments = arguments_of(object_with(depth))
        assert isinstance(arguments, CutArguments)
        assert str(arguments) == object_with(depth)
    flat_enough = object_with(MAX_DEPTH - 1)
    assert arguments_of(flat_enough) == json.loads(flat_enough)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('[]{}"\\a'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('[{"', max_size=2), inner, max_size=3),
    max_leaves=40,
)


def depth_of(value: Any) -> int:
    """The obvious way."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if parts is None else 1 + max(map(depth_of, parts), default=0)


@settings(deadline=None)
@given(_JSON, st.integers(1, 12))
def test_depth_is_that_of_the_obvious_way(value: Any, most: int) -> None:
    assert too_deep(value, most) == (depth_of(value) > most)


@settings(deadline=None)
@given(_JSON, st.integers(0, MAX_DEPTH + 3))
def test_the_short_way_never_lets_deep_bodies_pass(value: Any, wrapped: int) -> None:
    for _ in range(wrapped):
        value = [value]
    if depth_of(value) > MAX_DEPTH:
        with pytest.raises(TandemError):
            check_depth(value, json.dumps(value))
    else:
        check_depth(value, json.dumps(value))
