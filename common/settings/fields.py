"""Reads a settings class: the fields of a dataclass with their types, docstrings and groups."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

BASICS = "basics"
"""The group that `--help` shows at once."""
REQUIRED = dataclasses.MISSING


class Group:
    """Marks the fields below it in a class as one group of `--help`: `name: ClassVar[Group]` and a docstring, whose
    first word is the group's title."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting: a field of a settings class, with the flag and the environment variable that set it."""

    name: str
    type: Any
    default: Any
    """REQUIRED where there is none."""
    text: str
    """Its docstring as one line."""
    group: str
    secret: bool
    """Whether its value is never shown: fields with `repr=False`."""

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return f"TANDEM_{self.name.upper()}"


def settings_of(config_class: type) -> dict[str, Setting]:
    """Settings by name, in the order in which help shows them."""
    texts, groups = _read_source(config_class)
    types = typing.get_type_hints(config_class)
    settings = {
        field.name: Setting(
            field.name,
            types[field.name],
            field.default_factory() if callable(field.default_factory) else field.default,
            texts.get(field.name, ""),
            groups.get(field.name, BASICS),
            secret=not field.repr,
        )
        for field in dataclasses.fields(config_class)
    }
    order = {group: number for number, group in enumerate([BASICS, *dict.fromkeys(groups.values())])}
    return dict(sorted(settings.items(), key=lambda item: order[item[1].group]))


def group_texts(config_class: type) -> dict[str, str]:
    """What each group is about."""
    texts, _ = _read_source(config_class)
    return {setting.group: texts.get(setting.group, "") for setting in settings_of(config_class).values()}


def with_dashes(message: str, settings: Mapping[str, Setting]) -> str:
    """Names of settings as flags."""
    names = "|".join(sorted((name for name in settings if "_" in name), key=len, reverse=True))
    return (
        re.sub(rf"(?<![\w-])(?:--)?({names})(?![\w.])", lambda found: settings[found[1]].flag, message)
        if names
        else message
    )


@cache
def _read_source(config_class: type) -> tuple[dict[str, str], dict[str, str]]:
    """Docstrings and groups by field; a class that declares a field again moves it and may explain it again."""
    texts: dict[str, str] = {}
    groups: dict[str, str] = {}
    for each in reversed(config_class.__mro__):
        if not dataclasses.is_dataclass(each):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        assert isinstance(definition, ast.ClassDef)
        group = ""
        for statement, following in zip(definition.body, [*definition.body[1:], None], strict=True):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            name = statement.target.id
            if ast.unparse(statement.annotation) == "ClassVar[Group]":
                group = name
            elif name in each.__annotations__:
                groups[name] = group or groups.get(name, BASICS)
            match following:
                case ast.Expr(ast.Constant(str(text))):
                    texts[name] = " ".join(text.split())
    return texts, groups
