"""Grammars of which no text ever ends are told from the others."""

from __future__ import annotations

import pytest

from tandem.router.structured.lark import endless


@pytest.mark.parametrize(
    "grammar",
    [
        'start: "a" start',
        'start: start "a"',
        "start: a\na: b\nb: a",
        'start: "x" b\nb: "y" b',
        'start: (start "a")+',
        "%ignore / /\nstart: start",
        "start[capture]: start",
        'start: a{2}\na: "x" a | b\nb: b // | "x"',
        'start: "x" (b | c)\nb: b\nc: %json {"a": "}"} c',
    ],
)
def test_endless(grammar: str) -> None:
    assert endless(grammar)


@pytest.mark.parametrize(
    "grammar",
    [
        'start: ""',
        'start: a | "x"\na: a "b"',
        'start: (a|)\na: "b" a',
        'start: a~3\na: "x"',
        'start: (start "a")*',
        "start: start{0,3}",
        "start: [start]",
        'start: x\nx: "a"\n  | x x',
        "?start: a+ // c: x\na: /b\\/c/ a?",
        "start: <[3]> start | <|x|>",
        'start: "x" %json {"a": "}"}',
        'start: "a" b*\nb: b',
        "start: nothing",
        'start::_ : "parametric"',
        "",
    ],
)
def test_not_endless_or_not_known(grammar: str) -> None:
    assert not endless(grammar)


def test_many_rules_take_no_long_time() -> None:
    rules = "".join(f'r{index}: "a" r{index + 1}\n' for index in range(20_000))
    assert not endless(f'start: r0\n{rules}r20000: "x"')
    assert endless(f"start: r0\n{rules}r20000: r0")
