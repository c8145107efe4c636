"""What an operation of a chat template would cost, found out before it runs. Whatever is not certain to be short raises
Elsewhere."""

from __future__ import annotations

from typing import Any

import jinja2

from tandem.router.tools.arguments import CutArguments

MAX_TEXT = 1 << 18
"""Characters of a text that an operation makes."""
MAX_ITEMS = 10_000
"""Length of a list that an operation makes."""
MAX_BITS = 256
"""Bound of an integer that is computed with."""
MAX_PRODUCT = 1 << 22
"""Product of the lengths of two texts where one is searched in the other the slow way."""
SCALARS = frozenset({str, int, float, bool, type(None), jinja2.Undefined})

_TEXT_METHODS = frozenset((
    "capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isascii", "isdecimal",
    "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "lower", "partition", "removeprefix",
    "removesuffix", "split", "splitlines", "startswith", "swapcase", "title", "upper",
))  # fmt: skip
"""Those of texts that take no longer than reading them, and whose result is no larger."""
_SEARCHING_METHODS = frozenset(("lstrip", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "strip"))
"""These can take the product of two lengths."""
_OBJECT_METHODS = frozenset(("get", "items", "keys", "values"))


class Elsewhere(Exception):
    """This cannot be rendered here."""


def check_method(method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A method of a text, a list or an object."""
    name, owner = method.__name__, method.__self__
    if type(owner) is str:
        if name in _TEXT_METHODS:
            return
        if name in _SEARCHING_METHODS:
            if sum(len(each) for each in args if type(each) is str) * len(owner) <= MAX_PRODUCT and not kwargs:
                return
        elif name == "replace" and len(args) == 2 and not kwargs:
            return check_replaced(owner, *args)
        elif name == "join" and len(args) == 1:
            return check_joined(owner, args[0])
    elif type(owner) is dict and name in _OBJECT_METHODS and SCALARS.issuperset(map(type, args[:1])):
        return
    raise Elsewhere


def is_small(value: Any) -> bool:
    kind = type(value)
    return kind is float or kind is bool or (kind is int and value.bit_length() <= MAX_BITS)


def check_replaced(text: str, old: Any, new: Any) -> None:
    """Raises Elsewhere where the text after `replace` could be longer than `MAX_TEXT`, or an argument is no text."""
    if type(old) is not str or type(new) is not str:
        raise Elsewhere
    if len(new) > len(old) and len(text) + text.count(old) * (len(new) - len(old)) > MAX_TEXT:
        raise Elsewhere


def check_joined(separator: str, texts: Any) -> None:
    """Raises Elsewhere where the joined text would be longer than `MAX_TEXT`, or `texts` is no list of texts."""
    if type(texts) is not list or not all(type(text) is str for text in texts):
        raise Elsewhere
    if sum(map(len, texts)) + len(separator) * len(texts) > MAX_TEXT:
        raise Elsewhere


def check_tree(value: Any, most: int = MAX_TEXT) -> None:
    """Raises Elsewhere where the value is something else than JSON, or would be long when it is written out."""
    todo, left = [value], most
    while todo:
        part = todo.pop()
        kind = type(part)
        if kind is str:
            left -= len(part)
        elif kind is dict:
            left -= 8 * len(part)
            if left >= 0:
                todo.extend(part.keys())
                todo.extend(part.values())
        elif kind is list or kind is tuple:
            left -= 8 * len(part)
            if left >= 0:
                todo.extend(part)
        elif kind is CutArguments:
            left -= len(part.text)
        elif kind is int:
            left -= part.bit_length() // 3
        elif kind not in SCALARS:
            raise Elsewhere
        left -= 1
        if left < 0:
            raise Elsewhere
