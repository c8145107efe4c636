"""Templates that loop, grow or fail: they harm nobody, and those of good are rendered as ever."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.common.errors import ConfigError, TandemError
from tandem.router.app import Router
from tandem.router.settings import RouterConfig
from tandem.router.text.chat_template import ChatTemplate
from tandem.router.text.literal_text import NOTHING_SPECIAL, SpecialNames
from tandem.router.text.templates.costs import Elsewhere
from tandem.router.text.templates.process import Task, compiled
from tandem.router.text.templates.processes import TemplateProcesses
from tandem.router.text.templates.rendering import ChatRendering, TemplateSource
from tandem.router.tools.arguments import CutArguments
from tests.router.conftest import write_model

USER = [{"role": "user", "content": "Hello"}]
SIXTY = "{% for a in range(60) %}"
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
BOMBS = {
    "loops": LOOP,
    "a loop of text": "{% for a in range(99999) %}{% for b in range(99999) %}"
    + "x" * 1000
    + "{% endfor %}{% endfor %}",
    "a loop with a condition": "{% for a in range(99999) %}"
    "{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}",
    "its length": "{% for a in range(99999) %}"
    "{% for b in range(99999)|select %}{{ loop.length }}{% endfor %}{% endfor %}",
    "a macro that calls itself": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "a macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "a recursive loop": "{% for a in [[]] recursive %}{{ loop([[]]) }}{% endfor %}",
    "a block in itself": "{% block x %}{{ self.x() }}{% endblock %}",
    "repetition": "{{ 'a' * 10**10 }}",
    "a list repeated": "{{ ([0] * 10**10)|length }}",
    "a power": "{{ 9**(9**9) % 7 }}",
    "a product": "{% set ns = namespace(x=3) %}" + SIXTY + "{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "a width": "{{ '%1000000000d' % 1 }}",
    "a width of format": "{{ '{:>1000000000}'.format('x') }}",
    "a filter with a width": "{{ 'x'|center(1000000000) }}",
    "a method with a width": "{{ 'x'.ljust(10000000000) }}",
    "an indent": "{{ 'a\n'|indent(1000000000) }}",
    "an indent of JSON": "{{ [1]|tojson(indent=1000000000) }}",
    "a precision": "{{ 5|round(-1000000000) }}",
    "doubling": "{% set ns = namespace(x='aaaa') %}" + SIXTY + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubling by +": "{% set ns = namespace(x='aaaa') %}" + SIXTY + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling by a block": "{% set ns = namespace(x='aaaa') %}{% for a in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}"
    "{% endset %}{% set ns.x = y %}{% endfor %}",
    "doubling by replacing": "{% set ns = namespace(x='aaaa') %}{% for a in range(60) %}"
    "{% set ns.x = ns.x.replace('a', 'aa') %}{% endfor %}",
    "joining": "{% set ns = namespace(x='aaaa') %}" + SIXTY + "{% set ns.x = [ns.x, ns.x]|join %}{% endfor %}",
    "doubling a list": "{% set ns = namespace(x=[0]) %}" + SIXTY + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "slices without end": "{{ [1]|slice(1000000000)|list }}",
    "padding": "{{ [1]|batch(1000000000, 0)|list }}",
    "lorem ipsum": "{{ lipsum(n=100000, max=100000) }}",
    "searching backwards": "{% set s = 'a' * 200000 %}{{ s.rfind('a' * 90000 + 'b' + 'a' * 90000) }}" * 9,
    **{
        f"a list in itself, {name}": "{% set ns = namespace(x=[0]) %}" + SIXTY + "{% set ns.x = [ns.x, ns.x] %}"
        "{% endfor %}" + use
        for name, use in {
            "written": "{{ ns.x }}",
            "as JSON": "{{ ns.x|tojson }}",
            "as a text": "{{ ns.x|string }}",
            "concatenated": "{{ 'a' ~ ns.x }}",
            "joined": "{{ [ns.x, 1]|join }}",
            "trimmed": "{{ ns.x|trim }}",
            "compared": "{% set y = namespace(x=[0]) %}{% for a in range(60) %}{% set y.x = [y.x, y.x] %}{% endfor %}"
            "{{ ns.x == y.x }}",
            "in another": "{% set y = namespace(x=[0]) %}{% for a in range(60) %}{% set y.x = [y.x, y.x] %}{% endfor %}"
            "{{ ns.x in [y.x] }}",
            "in many": "{% set y = namespace(x=[ns.x]) %}{% for a in range(12) %}{% set y.x = y.x + y.x %}{% endfor %}"
            "{{ ns.x in y.x }}",
            "in a test": "{{ ns.x is in [[0]] }}",
            "written with its owner": "{{ ns }}",
        }.items()
    },
}


def here(template: ChatTemplate, **variables: Any) -> str:
    return template.render_here(Task(list(USER), variables, NOTHING_SPECIAL)).text


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_not_rendered_on_the_event_loop(bomb: str) -> None:
    template = ChatTemplate(BOMBS[bomb], {})
    started = time.thread_time()
    with pytest.raises(Elsewhere):
        here(template)
    assert time.thread_time() - started < 1.0  # it would be minutes, or forever; normally it is 0.01


@pytest.mark.parametrize(
    "bomb", ["loops", "a macro that calls itself", "repetition", "a power", "a list in itself, as JSON"]
)
def test_a_bomb_is_an_error_of_the_request(bomb: str) -> None:
    processes = TemplateProcesses(TemplateSource(BOMBS[bomb], {}), cpu_s=0.3)
    try:
        for _ in range(2):  # the second meets a process that was started again
            with pytest.raises(TandemError) as caught:
                processes.render(Task(list(USER), {}, NOTHING_SPECIAL))
            assert (caught.value.code, caught.value.param) == ("invalid_request", "messages")
            assert "the model's chat template cannot render these messages" in caught.value.message
    finally:
        processes.close()


def test_what_the_clients_variables_make_long_is_an_error_too() -> None:
    template = ChatTemplate("{% for a in range(n) %}{% for b in range(n) %}{% endfor %}{% endfor %}done", {})
    assert here(template, n=3) == "done"
    with pytest.raises(Elsewhere):
        here(template, n=99_999)
    with pytest.raises(TandemError, match="more than 2 s"):
        template.render(USER, n=99_999)
    assert template.render(USER, n=3) == "done"
    template.close()


def test_long_work_of_good_is_done_elsewhere() -> None:
    template = ChatTemplate("{% for m in messages %}{{ '%-9s' % m.role }}{{ m.content }}{% endfor %}{{ '=' * 5 }}", {})
    assert template.render(USER * 20_000) == "user     Hello" * 20_000 + "====="
    template.close()


def test_both_ways_of_rendering_hide_the_same_text_of_clients() -> None:
    template = ChatTemplate("<|im_start|>{% for m in messages %}{{ m.content }}{{ tools|tojson }}{% endfor %}", {})
    messages = [{"role": "user", "content": "not a token: <|im_start|>, <|im_st"}] * 3
    tools = [{"name": "<|im_end|>", "cut": CutArguments('{"a": "<|im_end|>')}]
    special = SpecialNames({"<|im_start|>", "<|im_end|>"})
    task = Task(messages, {"tools": tools}, special)
    found = template.render_here(task)
    assert found == template.render_elsewhere(task)
    assert found.renamed is not None
    assert found.renamed.count(special.new_name("<|im_start|>")) == 1
    template.close()


@pytest.mark.parametrize(
    "source",
    [
        "{{ 9**9**9 }}{{ 9**(9**9) }}",
        "{{ 'a' * 9**9 }}",
        "{{ 'x'|center(9999999999) }}",
        "{{ 'x'|indent(9999999999, true) }}",
        "{% if 'x'|center(9999999999) %}{% endif %}",
        "{% set x = ('%9999999999d'|format(1)) %}",
        "{% autoescape 'x'|center(9999999999) %}{% endautoescape %}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ " + "[" * 500 + "]" * 500 + " }}",
        "{{ " + "-" * 50_000 + "1 }}",
        "{{ 1" + " + 1" * 20_000 + " }}",
        "{{ 1" + "0" * 100_000 + " }}",
        "{% if a %}" * 3000 + "{% endif %}" * 3000,
        "{% for a in b %}" * 60 + "{% endfor %}" * 60,
        "{{ a" + ".b" * 20_000 + " }}",
        "{{ a" + "|trim" * 20_000 + " }}",
        "\ud800",
        "{{ '\ud800' }}",
        "{% include 'x' %}",
        "{% extends 'x' %}",
        "{{ a" * 2,
        "x" * 10**7,
        "".join(f"{{% set a{i} = a{i + 1} %}}" for i in range(9000)) + "{% set a9000 = message.content %}",
    ],
    ids=range(23),
)
def test_nothing_is_computed_while_a_template_is_compiled(source: str) -> None:
    started = time.thread_time()
    problem = ""
    try:
        ChatTemplate(source, {}).close()
    except ConfigError as error:
        problem = str(error)
    assert not problem or "chat template" in problem
    assert len(problem) < 400
    assert "\n" not in problem
    assert time.thread_time() - started < 20.0


def test_a_template_that_is_no_text_is_refused_by_name(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"{{ '\xff' }}")
    with pytest.raises(ConfigError, match=r"chat_template\.jinja: is not UTF-8"):
        ChatTemplate.load(tmp_path)


_PIECES = [
    "{{ messages[0].content }}", "{{ messages[-1]['role'] }}", "{{ n }}", "{{ tools }}", "{{ tools|tojson }}",
    "{{ tools|tojson(indent=2) }}", "{{ 'a' + messages[0].role + 'b' }}", "{{ n + 1 + n }}", "{{ 'a' ~ n ~ tools }}",
    "{{ n % 2 == 0 }}", "{{ nothing }}", "{{ nothing + 'a' }}", "{{ 'a' + n }}", "{{ n + 'a' }}", "{{ tools + tools }}",
    "{% for m in messages %}{{ loop.index }}{{ loop.last }}{{ loop.length }}{{ m.content|trim }}{% endfor %}",
    "{% for k, v in tools[0].items() %}{{ k }}={{ v }}{{ loop.revindex }}{% else %}-{% endfor %}",
    "{% for m in messages|selectattr('role', 'equalto', 'user') %}{{ m.content|upper }}{{ loop.length }}{% endfor %}",
    "{% for m in messages[::-1] if m.role != 'x' %}{{ loop.nextitem is defined }}"
    "{% if loop.first %}{% continue %}{% endif %}{{ m.content.split('l')[0] }}{% endfor %}",
    "{% macro f(x, y='d') %}<{{ x }}{{ y }}>{% endmacro %}{{ f(n) }}{{ f(tools, y=n) }}",
    "{% set ns = namespace(a=false, b=0) %}{% for m in messages %}{% set ns.b = ns.b + 1 %}{% endfor %}"
    "{{ ns.b }}{{ ns.a }}",
    "{% set x %}{{ n }}{{ messages[0].content }}{% endset %}{{ x|length }}{{ x }}",
    "{% filter upper %}a{{ n }}{% endfilter %}", "{{ messages|map(attribute='role')|join(', ') }}",
    "{{ messages|map(attribute='content')|list }}",
    "{{ tools is defined and tools is iterable and tools is not string }}",
    "{{ 'Hello' in messages[0].content }}", "{{ messages[0] == messages[0] }}", "{{ messages[0] in messages }}",
    "{{ tools == none }}", "{{ n in [1, 2, 3] }}", "{{ messages[n] }}", "{{ messages[0].get('content', 'x') }}",
    "{{ messages[0].nothing.more }}", "{{ raise_exception('no') }}", "{{ (n, 1) }}", "{{ {'a': n, n: tools} }}",
    "{{ messages[0].content.replace('l', 'LL') }}", "{{ messages[0].content|replace('l', 'LL') }}",
    "{{ ', '.join(['a', 'b']) }}", "{{ 'x' if n else 'y' }}", "{{ -n }}", "{{ n // 0 }}", "{{ 2 * n - 1 }}",
    "{{ n|string + 'a' }}", "{{ 'a\nb'|indent(2) }}", "{{ n|default('d') }}", "{{ nothing|default('d') }}",
    "{{ nothing|tojson }}", "{{ messages|length > 1 }}", "{{ messages[0]|items|list }}", "{{ range(3)|list }}",
    "{% if n is odd %}odd{% endif %}", "{{ n is divisibleby(2) }}", "{{ '5'|int + 1 }}", "{{ tools|first }}",
    "{{ n|abs }}{{ n|float }}", "{{ messages[0].content[1:3] }}", "{{ 'a'.startswith(('a', 'b')) }}", "{{ [n]|sort }}",
    "{% generation %}{{ n }}{% endgeneration %}", "{{ '%s' % n }}", "{{ 'a' * n }}", "{{ n|pprint }}",
]  # fmt: skip
_VALUES = st.sampled_from([0, 1, -3, 2.5, True, None, "text", 10**30])
_TOOLS = st.sampled_from([None, [], [{"name": "f", "parameters": {"type": "object", "a": [1, None, "é"]}}]])


@settings(deadline=None)
@given(st.lists(st.sampled_from(_PIECES), min_size=1, max_size=4), _VALUES, _TOOLS)
def test_what_is_rendered_on_the_event_loop_is_what_jinja_makes(pieces: list[str], n: Any, tools: Any) -> None:
    source = TemplateSource("".join(pieces), {})
    template = ChatTemplate(source.text, {})
    messages = [*USER, {"role": "assistant", "content": "Well, hello "}]
    plain = ChatRendering(source, compiled)
    expected = outcome(lambda: plain.text(messages, n=n, tools=tools))
    try:
        found = outcome(lambda: template.render_here(Task(messages, {"n": n, "tools": tools}, NOTHING_SPECIAL)).text)
    except Elsewhere:
        return
    assert found == expected


def outcome(render: Any) -> tuple[bool, str]:
    try:
        return True, render()
    except TandemError as error:
        return False, error.message


@pytest.fixture
def looping(tmp_path: Path) -> Iterator[Router]:
    folder = write_model(tmp_path / "looping")
    source = "{% if messages[0].content == 'loop' %}" + LOOP + "{% endif %}{{ messages[0].content }}"
    (folder / "chat_template.jinja").write_text(source)
    router = Router(RouterConfig(model=str(folder), decode_workers=["unix:/nowhere.sock"]))
    yield router
    router.model.close()


async def test_a_looping_template_holds_up_nobody(looping: Router) -> None:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(looping.app), base_url="http://router") as client:

        async def tokens(content: str) -> httpx.Response:
            return await client.post("/tokenize", json={"messages": [{"role": "user", "content": content}]})

        attack = asyncio.create_task(tokens("loop"))
        answered = 0
        while not attack.done():
            assert (await tokens("hello")).status_code == 200
            answered += 1
            await asyncio.sleep(0)
        response = await attack
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"] == "messages"
        assert answered > 20


def test_a_folder_that_says_nothing_sensible_about_templates(tmp_path: Path) -> None:
    deep: Any = "x"
    for _ in range(500):
        deep = [deep]
    for given_ in (deep, [{"name": deep, "template": "x"}], [{"name": "default", "template": deep}]):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": given_}))
        with pytest.raises(ConfigError, match="chat_template must be"):
            ChatTemplate.load(tmp_path)


async def test_long_and_short_chats_have_the_same_tokens(bare_client: httpx.AsyncClient) -> None:
    async def tokens(messages: int) -> list[int]:
        body = {
            "messages": [{"role": "user", "content": "Say <|im_end|> again."}] * messages,
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
            "add_generation_prompt": False,
        }
        response = await bare_client.post("/tokenize", json=body)
        assert response.status_code == 200, response.text
        found: list[int] = response.json()["tokens"]
        return found

    assert await tokens(1000) == await tokens(10) * 100
