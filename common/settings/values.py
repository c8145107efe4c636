"""Turns the words of a command line, a variable or a YAML file into values of a setting's type, and describes types."""

from __future__ import annotations

import difflib
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from tandem.common.settings.fields import Setting

Raw = str | list[str] | dict[str, str] | None
"""What was written; None: YAML's null."""

_TRUE, _FALSE = frozenset({"true", "yes", "on", "1"}), frozenset({"false", "no", "off", "0"})
BOOLEANS = _TRUE | _FALSE
_NONE = frozenset({"none", "null", "~"})
_NUMBER = re.compile(r"([+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([A-Za-z]*)")
_SIZES = {"": 1, "b": 1} | {
    prefix + unit: base**power
    for power, prefix in enumerate("kmgt", start=1)
    for unit, base in (("b", 1000), ("ib", 1024), ("i", 1024))
}
_LETTERS = {
    letter: base**power for base, all_ in ((1000, "kmgt"), (1024, "KMGT")) for power, letter in enumerate(all_, 1)
}
"""One letter alone, as vLLM reads it: small ones are powers of 1000, capitals of 1024."""
_SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_SHOWN_CHARACTERS = 60


def parse_value(setting: Setting, raw: Raw) -> Any:
    """Raises ValueError that says what is expected, and what was given unless it is secret."""
    kind, optional = _bare(setting.type)
    if raw is None or (optional and isinstance(raw, str) and raw.lower() in _NONE):
        if optional:
            return None
        raise ValueError(f"must be {describe(setting)}, not nothing")
    origin = typing.get_origin(kind)
    try:
        if origin in (list, tuple):
            return origin(raw if isinstance(raw, list) else _split(setting, _text(raw)))
        if origin is dict:
            entries = raw if isinstance(raw, dict) else _entries(_text(raw))
            return {name: _number(value, "") for name, value in entries.items()}
        return _scalar(setting.name, kind, _text(raw))
    except ValueError:
        given = "" if setting.secret else f", not {_shown(raw)}"
        raise ValueError(f"must be {describe(setting)}{given}{_did_you_mean(kind, raw)}") from None


def describe(setting: Setting) -> str:
    """The type in words, such as `a number of bytes, such as 4GiB`."""
    kind, _ = _bare(setting.type)
    origin = typing.get_origin(kind)
    if origin is Literal:
        choices = [str(choice) for choice in typing.get_args(kind)]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if origin in (list, tuple):
        return "a text; repeat the flag for more" if setting.secret else "a list, such as a,b"
    if origin is dict:
        return "shares by name, such as acme=0.25,other=0.1"
    if kind is int:
        return {"size": "a number of bytes, such as 4GiB", "tokens": "a number, such as 32768 or 32k"}.get(
            _unit(setting.name), "a whole number"
        )
    if kind is float:
        return "seconds, such as 30 or 5m" if _unit(setting.name) == "seconds" else "a number"
    return {bool: "true or false", Path: "a path"}.get(kind, "a text")


def placeholder(setting: Setting) -> str:
    """What help shows behind the flag; empty for a switch."""
    kind, _ = _bare(setting.type)
    origin = typing.get_origin(kind)
    if kind is bool:
        return ""
    if origin is Literal:
        return "|".join(str(choice) for choice in typing.get_args(kind))
    if setting.secret:
        return "KEY"
    if origin in (list, tuple):
        return "A,B"
    if origin is dict:
        return "NAME=SHARE,..."
    if kind in (int, float):
        return {"size": "SIZE", "seconds": "SECONDS", "tokens": "TOKENS"}.get(_unit(setting.name), "N")
    return "PATH" if kind is Path else "TEXT"


def choices(setting: Setting) -> tuple[str, ...]:
    """All values, where they are few; else none."""
    kind, _ = _bare(setting.type)
    return tuple(map(str, typing.get_args(kind))) if typing.get_origin(kind) is Literal else ()


def is_switch(setting: Setting) -> bool:
    return _bare(setting.type)[0] is bool


def is_repeatable(setting: Setting) -> bool:
    return typing.get_origin(_bare(setting.type)[0]) in (list, tuple)


def plain(value: Any) -> Any:
    """The value as YAML can have it."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return dict(value) if isinstance(value, Mapping) else value


def close_to(wrong: str, known: typing.Iterable[str]) -> str:
    """`; did you mean X?`, or nothing."""
    found = difflib.get_close_matches(wrong, list(known), 1)
    return f"; did you mean {found[0]}?" if found else ""


def _bare(kind: Any) -> tuple[Any, bool]:
    """The type without its None, and whether it had one."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        rest = [each for each in typing.get_args(kind) if each is not type(None)]
        return rest[0], True
    return kind, False


def _unit(name: str) -> str:
    """Units are part of names here."""
    if name.endswith("_bytes"):
        return "size"
    if name.endswith(("_tokens", "_len")):
        return "tokens"
    return "seconds" if name.endswith("_s") else ""


def _scalar(name: str, kind: Any, text: str) -> Any:
    if typing.get_origin(kind) is Literal:
        for choice in typing.get_args(kind):
            if str(choice) == text:
                return choice
        raise ValueError
    if kind is bool:
        if text.lower() not in BOOLEANS:
            raise ValueError
        return text.lower() in _TRUE
    if kind is int:
        number = _number(text, _unit(name))
        if number != int(number):
            raise ValueError
        return int(number)
    if kind is float:
        return float(_number(text, _unit(name)))
    if kind is Path:
        if not text:
            raise ValueError
        return Path(text).expanduser()
    return text


def _number(text: str, unit: str) -> int | float:
    """Raises ValueError, also for what is not finite."""
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        raise ValueError
    digits, suffix = match.groups()
    if not suffix:
        factor: int | float = 1
    elif unit == "seconds":
        factor = _known(_SECONDS, suffix)
    elif unit == "size":
        factor = _LETTERS[suffix] if suffix in _LETTERS else _known(_SIZES, suffix.lower())
    elif unit == "tokens":
        factor = _known(_LETTERS, suffix)
    else:
        raise ValueError
    try:
        return int(digits) * factor
    except ValueError:
        number = float(digits) * factor
        if not math.isfinite(number):
            raise
        return number


def _known(units: Mapping[str, Any], suffix: str) -> Any:
    if suffix not in units:
        raise ValueError
    return units[suffix]


def _text(raw: Raw) -> str:
    if not isinstance(raw, str):
        raise ValueError
    return raw


def _split(setting: Setting, text: str) -> list[str]:
    """`a,b` or `[a, b]`. A secret stays whole."""
    if setting.secret:
        return [text]
    if text.startswith("["):
        return [str(item) for item in _flow(text, list)]
    return [item.strip() for item in text.split(",") if item.strip()]


def _entries(text: str) -> dict[str, str]:
    """`a=1,b=2` or `{a: 1, b: 2}`."""
    if text.startswith("{"):
        return {str(name): str(value) for name, value in _flow(text, dict).items()}
    entries = [entry.partition("=") for entry in text.split(",") if entry.strip()]
    if any(not equals for _, equals, _ in entries):
        raise ValueError
    return {name.strip(): value for name, _, value in entries}


def _flow(text: str, kind: type) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError from None
    if not isinstance(value, kind):
        raise ValueError
    return value


def _shown(raw: Raw) -> str:
    if isinstance(raw, list):
        return "a list"
    if isinstance(raw, dict):
        return "a mapping"
    text = json.dumps(raw, ensure_ascii=False)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def _did_you_mean(kind: Any, raw: Raw) -> str:
    if typing.get_origin(kind) is not Literal or not isinstance(raw, str):
        return ""
    return close_to(raw.lower(), map(str, typing.get_args(kind)))
