"""The form of message content that a template gets: the one that it loops over, or text."""

from __future__ import annotations

from typing import Any

import jinja2
import pytest

from tandem.router.text.chat_template import ChatTemplate
from tandem.router.text.content_form import content_form

LOOP = "{% for part in CONTENT %}[{{ part.text }}]{% endfor %}"
PARTS = {
    "attribute": LOOP.replace("CONTENT", "m.content"),
    "item": LOOP.replace("CONTENT", "m['content']"),
    "name": "{% set c = m['content'] %}" + LOOP.replace("CONTENT", "c"),
    "name of a name": "{% set c = m['content'] %}{% set d = c %}" + LOOP.replace("CONTENT", "d"),
    "filter": LOOP.replace("CONTENT", "m.content | list"),
    "selected": LOOP.replace("CONTENT", "m['content'] | selectattr('type', 'equalto', 'text')"),
    "macro": "{% macro show(content) %}" + LOOP.replace("CONTENT", "content") + "{% endmacro %}{{ show(m.content) }}",
}
TEXT = {
    "printed": "[{{ m.content }}]",
    "filtered": "[{{ m['content'] | trim }}]",
    "split": "[{% for line in m.content.split('\\n') %}{{ line }}{{ '' if loop.last else '\\n' }}{% endfor %}]",
    "tools": "[{{ m.content }}]{% for tool in tools or [] %}{{ tool }}{% endfor %}",
}
BOTH = (
    "{% if m.content is string %}[{{ m.content }}]{% else %}"
    + LOOP.replace("CONTENT", "m.content").replace("[{{ part.text }}]", "<{{ part.text }}>")
    + "{% endif %}"
)
MACRO_OF_BOTH = (
    "{% macro show(content) %}" + BOTH.replace("m.content", "content") + "{% endmacro %}{{ show(m.content) }}"
)


def parts(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text} for text in texts]


def rendered(body: str, content: Any) -> str:
    source = "{% for m in messages %}" + body + "{% endfor %}"
    return ChatTemplate(source, {}).render([{"role": "user", "content": content}])


@pytest.mark.parametrize("body", PARTS.values(), ids=PARTS)
def test_a_template_that_loops_over_parts_gets_parts(body: str) -> None:
    assert rendered(body, "one") == "[one]"
    assert rendered(body, parts("one", "two")) == "[one][two]"


@pytest.mark.parametrize("body", TEXT.values(), ids=TEXT)
def test_any_other_template_gets_text(body: str) -> None:
    assert rendered(body, "one") == "[one]"
    assert rendered(body, parts("one", "two")) == "[one\ntwo]"


@pytest.mark.parametrize("body", [BOTH, MACRO_OF_BOTH], ids=["inline", "macro"])
def test_a_template_that_takes_both_gets_what_the_client_sent(body: str) -> None:
    assert rendered(body, "one") == "[one]"
    assert rendered(body, parts("one", "two")) == "<one><two>"


def test_a_template_without_messages_has_a_form() -> None:
    assert content_form(jinja2.Environment().parse("nothing")) == "text"
