"""How much a body holds: against an obvious reference, and refused before anything is made of it."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tandem.common.errors import TandemError
from tandem.router.fields import json_size as module
from tandem.router.fields.json_size import JsonSize, check_size, json_size
from tandem.router.requests.bodies import ChatBody, CompletionBody, DetokenizeBody
from tandem.router.web.request_fields import BodyReader

_texts = st.text(st.sampled_from('ab"\\[]{},:09.-\n\u00e9\U0001f600'), max_size=12)
_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | _texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_texts, inner, max_size=4),
    max_leaves=25,
)


def obvious(value: Any, depth: int = 1) -> JsonSize:
    if isinstance(value, dict | list):
        parts = [obvious(part, depth + 1) for part in (value.values() if isinstance(value, dict) else value)]
        return JsonSize(
            values=1 + sum(part.values for part in parts),
            containers=1 + sum(part.containers for part in parts),
            names=(len(value) if isinstance(value, dict) else 0) + sum(part.names for part in parts),
            number_digits=max([part.number_digits for part in parts], default=0),
            depth=max([depth, *(part.depth for part in parts)]),
        )
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return JsonSize(1, 0, 0, len(json.dumps(value)) if number else 0, 0)


def at_least(raw: bytes, least: JsonSize) -> bool:
    """An empty list counts for one value more, and `true` holds the letter of an exponent."""
    size = json_size(raw)
    return (size.containers, size.names, size.depth) == (least.containers, least.names, least.depth) and (
        least.values <= size.values <= least.values + least.containers
        and least.number_digits <= size.number_digits <= max(least.number_digits, 1)
    )


@given(_values, st.booleans(), st.sampled_from([None, 2]))
@example("\\", True, None)
@example(['\\"', "[", '"'], True, None)
def test_it_counts_what_a_walk_through_the_values_would(value: Any, escaped: bool, indent: int | None) -> None:
    raw = json.dumps(value, ensure_ascii=escaped, indent=indent).encode()
    assert at_least(raw, obvious(value)), (raw, json_size(raw), obvious(value))
    quick = module._most(raw)
    assert quick.values >= json_size(raw).values
    assert quick.containers >= json_size(raw).containers
    assert quick.names >= json_size(raw).names


@given(st.binary(max_size=60))
def test_rubbish_is_counted_too(raw: bytes) -> None:
    json_size(raw)
    check_size(raw)


def test_brackets_and_commas_in_texts_are_no_values() -> None:
    text = json.dumps({"prompt": "[{,:" * 500_000 + "9" * 5_000}).encode()
    assert len(text) > module.MAX_CONTAINERS
    check_size(text)
    assert json_size(text).values == 2


LARGE = {
    "ids": b'{"prompt": [' + b"1," * 2_000_000 + b"1]}",
    "texts": b'{"prompt": [' + b'"a",' * 1_000_000 + b'"a"]}',
    "objects": b'{"messages": [' + b"{}," * 200_000 + b"{}]}",
    "arrays": b'{"input": [' + b"[]," * 200_000 + b"[]]}",
    "messages": b'{"messages": [' + b'{"role":"user","content":"a"},' * 100_000 + b'{"role":"user","content":"a"}]}',
    "names": b'{"logit_bias": {' + b",".join(b'"%d":1' % number for number in range(200_000)) + b"}}",
    "digits": b'{"prompt": [' + (b"9" * 4000 + b",") * 1000 + b"1]}",
    "digits after text": b'{"user": "' + b"1" * 100 + b'", "seed": ' + b"1" * 100_000 + b"}",
    "cut off": b'{"messages": [' + b'{"role":"user","content":"' * 200_000,
}


@pytest.mark.parametrize("name", [name for name in LARGE if name != "cut off"])
@pytest.mark.parametrize("body", [CompletionBody, ChatBody, DetokenizeBody])
def test_what_would_hold_the_interpreter_is_refused_before_it_is_decoded(
    name: str, body: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("decoded")

    reader = BodyReader(body)
    monkeypatch.setattr(reader, "_decoder", None)
    monkeypatch.setattr(msgspec.json, "decode", never)
    with pytest.raises(TandemError, match="more than") as caught:
        reader.read(LARGE[name])
    assert caught.value.code == "request_too_large"


@pytest.mark.parametrize(
    "honest",
    [
        {"prompt": [12_345] * 300_000},  # OpenAI's limit of an embeddings request
        {"prompt": "a, b: [c] {d}\n" * 400_000},
        {"messages": [{"role": "user", "content": "hi", "name": "me"}] * 10_000},
        {"tools": [{"parameters": {f"p{i}": {"type": "string"} for i in range(60)}}] * 128},
    ],
)
def test_large_honest_bodies_pass(honest: dict[str, Any]) -> None:
    check_size(json.dumps(honest).encode())


def test_of_what_is_far_too_much_the_beginning_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []

    def counting(raw: bytes) -> JsonSize:
        counted.append(len(raw))
        return json_size(raw)

    monkeypatch.setattr(module, "json_size", counting)
    with pytest.raises(TandemError, match="more than"):
        check_size(b'{"prompt": [' + b"1," * 4_000_000 + b"1]}")
    assert sum(counted) <= 2 << 20


def test_what_is_too_much_at_its_end_is_refused_as_well() -> None:
    with pytest.raises(TandemError, match="more than"):
        check_size(b'{"user": "' + b"a" * (4 << 20) + b'", "prompt": [' + b"1," * 1_000_000 + b"1]}")


def test_numbers_are_as_long_as_anybody_needs() -> None:
    check_size(b"[" + b"9" * 308 + b"]" + b" " * 1000)
    with pytest.raises(TandemError, match="digits"):
        check_size(b"[" + b"9" * 513 + b"]")
