"""Whether a grammar in Lark has any text that ends: a rule that needs itself, always, has none.

Reads as much of the language as that takes. Where a grammar uses more of it, the answer is that it may be.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_TOKEN = re.compile(
    r"""(?P<blank>[ \t\r\f]+|//[^\n]*|\#[^\n]*)
    |(?P<newline>\n)
    |(?P<text>"(?:[^"\\\n]|\\.)*"i?|/(?:[^/\\\n]|\\.)+/[imslux]*|<[^<>\s]+>)
    |(?P<inline>%(?:json|regex|lark)\b)
    |(?P<directive>%\w+)
    |(?P<define>[?!]?[a-zA-Z_][\w\-]*(?:\.-?\d+)?[ \t]*(?:\[[^\]\n]*\])?[ \t]*:(?!:))
    |(?P<name>@?[a-zA-Z_][\w\-]*)
    |(?P<repeat>~\d+(?:\.\.\d+)?|\{\d*(?:,\d*)?\})
    |(?P<sign>[|()\[\]?*+~&{}\-]|\.\.)""",
    re.VERBOSE,
)


class _Unknown(Exception):
    """More of the language than is read here."""


@dataclass(slots=True)
class _Options:
    """Alternatives, each of which needs all its parts: rules, by their names, and groups."""

    options: list[list[_Options | str]] = field(default_factory=lambda: [[]])

    def names(self) -> Iterator[str]:
        """Names of all rules that the alternatives mention, also in groups; some more than once."""
        for option in self.options:
            for part in option:
                if isinstance(part, str):
                    yield part
                else:
                    yield from part.names()

    def ends(self, known: set[str], rules: dict[str, _Options]) -> bool:
        """Whether an alternative ends, if the rules in `known` do. Names that are no rules end."""
        return any(
            all(
                part in known or part not in rules if isinstance(part, str) else part.ends(known, rules)
                for part in option
            )
            for option in self.options
        )


def endless(grammar: str) -> bool:
    """Whether it is certain that no text of it ever ends. Rules that are missing are for its compiler to find."""
    try:
        rules = _rules(grammar)
    except (_Unknown, RecursionError):
        return False
    users: dict[str, set[str]] = {}
    for name, options in rules.items():
        for used in options.names():
            users.setdefault(used, set()).add(name)
    known: set[str] = set()
    todo = list(rules)
    while todo:
        name = todo.pop()
        if name not in known and rules[name].ends(known, rules):
            known.add(name)
            todo += users.get(name, ())
    return "start" in rules and "start" not in known


def _rules(grammar: str) -> dict[str, _Options]:
    rules: dict[str, _Options] = {}
    stack: list[_Options] = []
    directive = False
    for kind, text in _tokens(grammar):
        match kind:
            case "define":
                if len(stack) > 1:
                    raise _Unknown
                name = re.split(r"[.\[\s:]", text.lstrip("?!"))[0]
                stack = [rules.setdefault(name, _Options([]))]
                stack[0].options.append([])
                directive = False
            case "directive":
                directive = True
            case "newline" | "blank":
                continue
            case _ if directive:
                continue
            case _ if not stack:
                raise _Unknown
            case "name":
                stack[-1].options[-1].append(text)
            case "text" | "inline":
                stack[-1].options[-1].append(_Options())
            case "repeat":
                _repeat(stack[-1], at_least=re.sub(r"^[~{]", "", text).split(",")[0].split("..")[0].rstrip("}"))
            case "sign":
                _sign(text, stack)
    return rules


def _sign(sign: str, stack: list[_Options]) -> None:
    if sign == "|":
        stack[-1].options.append([])
    elif sign in ("(", "["):
        inner = _Options()
        stack[-1].options[-1].append(inner)
        stack.append(inner)
    elif sign in (")", "]"):
        if len(stack) < 2:
            raise _Unknown
        inner = stack.pop()
        if sign == "]":
            inner.options.append([])
    elif sign in ("?", "*"):
        _repeat(stack[-1], at_least="0")
    elif sign != "+":
        raise _Unknown


def _repeat(options: _Options, *, at_least: str) -> None:
    if not options.options[-1]:
        raise _Unknown
    if not at_least.isdigit() or int(at_least) == 0:
        options.options[-1].pop()


def _tokens(grammar: str) -> Iterator[tuple[str, str]]:
    place = 0
    while place < len(grammar):
        found = _TOKEN.match(grammar, place)
        if found is None:
            raise _Unknown
        place = found.end()
        yield str(found.lastgroup), found.group()
        if found.lastgroup in ("inline", "directive"):
            place = _after_braces(grammar, place)


def _after_braces(grammar: str, place: int) -> int:
    """The place after the braces that may follow `place`, with strings in them."""
    brace = re.compile(r"\s*\{").match(grammar, place)
    if brace is None:
        return place
    depth = 0
    for found in re.compile(r'"(?:[^"\\]|\\.)*"|[{}]').finditer(grammar, brace.end() - 1):
        depth += {"{": 1, "}": -1}.get(found.group(), 0)
        if depth == 0:
            return found.end()
    raise _Unknown
