"""Text of models turned into calls, in every form, however the text is cut."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.common.errors import ConfigError
from tandem.router.settings import RouterConfig
from tandem.router.text.served_model import ServedModel
from tandem.router.tools.events import Call, Event, collect
from tandem.router.tools.formats import FORMATS, detect
from tests.router.tool_models import TEMPLATES, calls_text

NAMES = frozenset({"get_weather", "clock"})
FORMS = sorted(FORMATS)


def parse(form: str, *pieces: str) -> tuple[str, list[Call]]:
    parser = FORMATS[form].parser(NAMES)
    events: list[Event] = []
    for piece in pieces:
        events += parser.feed(piece)
    return collect(events + parser.finish())


def in_pieces(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("form", FORMS)
def test_templates_tell_their_form(form: str) -> None:
    assert detect(TEMPLATES[form]) is FORMATS[form]


def test_templates_without_a_known_form() -> None:
    assert detect("{{ messages }}") is None
    assert detect("{{ tools }}<tool_call><function=x>") is None


@pytest.mark.parametrize("form", FORMS)
def test_calls_are_read(form: str) -> None:
    calls = [("get_weather", '{"city": "a \\"b\\" {c} ü", "days": 3}'), ("clock", "{}")]
    assert parse(form, calls_text(form, *calls)) == ("", [Call(*call) for call in calls])


@pytest.mark.parametrize("form", FORMS)
def test_arguments_come_while_they_are_written(form: str) -> None:
    whole = calls_text(form, ("get_weather", '{"city": "Paris"}'))
    parser = FORMATS[form].parser(NAMES)
    events = parser.feed(whole[: whole.index("ris")])
    assert collect(events) == ("", [Call("get_weather", '{"city": "Pa')])


@pytest.mark.parametrize("form", ["hermes", "mistral", "mistral_named"])
def test_text_before_calls_is_kept_without_the_blanks_between(form: str) -> None:
    call = calls_text(form, ("clock", "{}"))
    assert parse(form, f"I will look.\n\n{call}\n") == ("I will look.", [Call("clock", "{}")])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "  plain text \n",
        "a < b and <tool",
        "[TOOL",
        "x [1, 2] {}",
        '{"answer": 42}',
        '{"name": "Bob", "age": 3}',
        "{",
    ],
)
def test_text_that_is_no_call_is_unchanged(form: str, text: str) -> None:
    assert parse(form, text) == (text, [])


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("hermes", "<tool_call>\nnot json</tool_call>"),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "clo'),
        ("llama3_json", '{"name": "unknown", "parameters": {}}'),
        ("llama3_json", '{"name": "clo'),
        ("mistral", '[TOOL_CALLS] [{"arguments": {}}]'),
        ("mistral_named", "[TOOL_CALLS]"),
        ("mistral_named", "[TOOL_CALLS]clock"),
    ],
)
def test_broken_calls_are_text(form: str, text: str) -> None:
    assert parse(form, text) == (text, [])


@pytest.mark.parametrize(
    ("form", "text", "arguments"),
    [
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "clock"}</tool_call>', '{"a": 1}'),
        ("hermes", '<tool_call>{"name": "clock"}</tool_call>', "{}"),
        ("hermes", '<tool_call>{"name": "clock", "arguments": null}</tool_call>', "{}"),
        ("hermes", '<tool_call>{"name": "clock", "arguments": "{\\"a\\": 1}"}</tool_call>', '{"a": 1}'),
        ("hermes", '<tool_call>{"id": [1, {"name": 2}], "name": "clock", "arguments": {}}', "{}"),
        ("llama3_json", '<|python_tag|>{"type": "function", "name": "clock", "parameters": {"a": 1}}', '{"a": 1}'),
        ("llama3_json", '\n{"name": "clock", "arguments": {}}', "{}"),
        ("mistral", '[TOOL_CALLS][{"name": "clock", "arguments": {}, "id": "x"}]', "{}"),
        ("mistral_named", '[TOOL_CALLS]clock[CALL_ID]abc[ARGS]{"a": [1, "}"]}', '{"a": [1, "}"]}'),
        ("mistral_named", '[TOOL_CALLS]clock{"a": 1}', '{"a": 1}'),
    ],
)
def test_variants(form: str, text: str, arguments: str) -> None:
    assert parse(form, text) == ("", [Call("clock", arguments)])


CLOCK = '{"name": "clock", "arguments": {}}'
WEATHER = '{"name": "get_weather", "arguments": {"city": "Rome"}}'


@pytest.mark.parametrize(
    ("form", "text", "shown"),
    [
        ("hermes", f"<tool_call>\n{CLOCK}\n{WEATHER}\n</tool_call>", ""),
        ("hermes", f"<tool_call>{CLOCK}{WEATHER}</tool_call>", ""),
        ("hermes", f"<tool_call>{CLOCK},\n{WEATHER}", ""),
        ("hermes", f"Well.\n<tool_call>\n[{CLOCK}, {WEATHER}]\n</tool_call>\nDone", "Well.\nDone"),
        ("hermes", f'<tool_call>{CLOCK}</tool_call><tool_call>{WEATHER}{{"a": 1}}</tool_call>', '{"a": 1}</tool_call>'),
        ("llama3_json", f"{CLOCK}\n{WEATHER}", ""),
        ("llama3_json", f"<|python_tag|>{CLOCK}; {WEATHER}", ""),
        ("llama3_json", f"{CLOCK}, {WEATHER}", ""),
        ("mistral", f"[TOOL_CALLS] [{CLOCK}, {WEATHER}]", ""),
        ("mistral_named", '[TOOL_CALLS]clock[ARGS]{}[TOOL_CALLS]get_weather[ARGS]{"city": "Rome"}', ""),
    ],
)
def test_two_calls_in_any_pieces(form: str, text: str, shown: str) -> None:
    expected = (shown, [Call("clock", "{}"), Call("get_weather", '{"city": "Rome"}')])
    assert parse(form, text) == expected
    for cut in range(len(text)):
        assert parse(form, text[:cut], text[cut:]) == expected
    assert parse(form, *text) == expected


def test_a_forgotten_closing_mark_does_not_hide_the_next_call() -> None:
    text = '<tool_call>{"name": "clock", "arguments": {}}\n<tool_call>{"name": "get_weather", "arguments": {}}'
    assert [call.name for call in parse("hermes", text)[1]] == ["clock", "get_weather"]


@pytest.mark.parametrize("form", FORMS)
def test_an_answer_that_is_cut_off_keeps_what_came(form: str) -> None:
    whole = calls_text(form, ("get_weather", '{"city": "Paris"}'))
    assert parse(form, whole[: whole.index('ris"')]) == ("", [Call("get_weather", '{"city": "Pa')])


arguments = st.dictionaries(
    st.text(max_size=4),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=6),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=4,
    ),
    max_size=3,
)


@given(
    st.sampled_from(FORMS),
    st.lists(st.tuples(st.sampled_from(sorted(NAMES)), arguments), min_size=1, max_size=3),
    st.lists(st.integers(0, 400), max_size=8),
    st.sampled_from([None, 1]),
)
@settings(max_examples=80, deadline=None)
def test_any_calls_in_any_pieces(
    form: str, calls: list[tuple[str, object]], cuts: list[int], indent: int | None
) -> None:
    written = [(name, json.dumps(value, indent=indent)) for name, value in calls]
    text = calls_text(form, *written)
    assert parse(form, *in_pieces(text, cuts)) == ("", [Call(*call) for call in written])


_FRAGMENTS = [
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", '{"name": "clock"', ', "arguments": ',
    ', "parameters": ', "{", "}", "[", "]", '"', ",", ":", ";", " ", "\n", "clock", "\\", "a", "1", "null", "é",
]  # fmt: skip


@given(
    st.sampled_from(FORMS),
    st.lists(st.sampled_from(_FRAGMENTS), max_size=14),
    st.lists(st.integers(0, 200), max_size=6),
)
@settings(max_examples=200, deadline=None)
def test_junk_gives_the_same_in_one_piece_and_in_many(form: str, fragments: list[str], cuts: list[int]) -> None:
    text = "".join(fragments)
    assert parse(form, *in_pieces(text, cuts)) == parse(form, text)


def test_a_setting_overrules_the_template(model_folder: Path) -> None:
    config = RouterConfig(model=str(model_folder), tool_format="mistral")
    template = ServedModel.load(config).template
    assert template is not None
    assert template.tool_format is FORMATS["mistral"]
    with pytest.raises(ConfigError, match="--tool-format 'xml': there are hermes"):
        ServedModel.load(replace(config, tool_format="xml"))
