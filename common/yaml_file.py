"""YAML files that people write, read into types: every error names the file, the line, the field and what was expected.

`yaml.compose` keeps line numbers, which plain loading throws away; msgspec checks the values against the types.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml
from msgspec import inspect

from tandem.common.errors import ConfigError

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MERGE = "tag:yaml.org,2002:merge"
_PLACE = re.compile(r" - at `\$\.?(.*)`$")
_STEP = re.compile(r"\[(\d+)\]|\[\.\.\.\]|([^.\[\]]+)")
_NAME = re.compile(r"`([^`]*)`$")
_TYPES = re.compile(r"`(\w+)(?: \| null)?`")
_WORDS = {
    "array": "a list",
    "bool": "true or false",
    "float": "a number",
    "int": "a whole number",
    "null": "nothing",
    "object": "a mapping",
    "str": "text",
}
"""Types as msgspec calls them, in words."""

T = TypeVar("T")


def read_document(path: Path, setting: str) -> YamlDocument:
    """The one document of a file. `setting` names the file in messages.

    Raises:
        ConfigError: it cannot be read, is empty, has several documents, or a key is there twice.
    """
    documents = read_documents(path, setting)
    if len(documents) > 1:
        raise documents[1].error("", "begins a second document; only one is read")
    return documents[0]


def read_documents(path: Path, setting: str) -> list[YamlDocument]:
    """All documents of a file, empty ones left out; there is at least one.

    Raises:
        ConfigError: it cannot be read, is empty, or a key is there twice.
    """
    source = f"{setting} {path}"
    try:
        nodes = list(yaml.compose_all(path.read_text(encoding="utf-8"), Loader=_Loader))
        documents = [YamlDocument(source, node) for node in nodes if not _is_empty(node)]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source}: cannot be read ({error})") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise _not_yaml(source, error) from error
    if not documents:
        raise ConfigError(f"{source}: is empty")
    return documents


class YamlDocument:
    """One document whose top is a mapping."""

    def __init__(self, source: str, node: yaml.Node) -> None:
        """`source` names the file in messages. Raises ConfigError where the top is no mapping, or a key is there
        twice."""
        self._source = source
        self._top = node
        self._check_keys(node, "", set())
        if not isinstance(node, yaml.MappingNode):
            raise self.error("", "must be a mapping of fields")

    @property
    def items(self) -> list[tuple[str, yaml.Node]]:
        """The fields of the top as they stand in the file."""
        return [(key.value, value) for key, value in self._top.value]

    def value_of(self, name: str) -> str | None:
        """A field of the top as it is written; None where it is not there, or no plain value."""
        value = dict(self.items).get(name)
        return value.value if isinstance(value, yaml.ScalarNode) else None

    def read(self, type_: type[T]) -> T:
        """The whole document as a `type_` of msgspec. Raises ConfigError."""
        constructor = yaml.SafeLoader("")
        try:
            value: Any = constructor.construct_document(self._top)
        except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a date that there is not
            raise _not_yaml(self._source, error) from error
        try:
            return msgspec.convert(value, type_)
        except msgspec.ValidationError as error:
            raise self._misfit(str(error), type_) from error

    def error(self, place: str, problem: str) -> ConfigError:
        """`place` is a path such as `tenants[2].keys[0]`; the nearest part of it that is there gives the line."""
        line = f"{self._source}, line {self._node(place).start_mark.line + 1}"
        return ConfigError(f"{line}: {place} {problem}" if place else f"{line}: {problem}")

    def _misfit(self, message: str, type_: Any) -> ConfigError:
        found = _PLACE.search(message)
        place = found.group(1) if found else ""
        problem = _PLACE.sub("", message)
        name = _NAME.search(problem)
        inner = f"{place}.{name.group(1)}" if place and name else name.group(1) if name else ""
        if problem.startswith("Object missing required field"):
            return self.error(inner, "is required")
        if problem.startswith("Object contains unknown field"):
            close = difflib.get_close_matches(inner.rpartition(".")[2], sorted(_field_names(type_)), 1)
            return self.error(inner, f"is not a field; did you mean {close[0]}?" if close else "is not a field")
        is_choice = problem.startswith("Invalid enum value") or "matching regex" in problem
        if is_choice and (expected := _expected(type_, place)):
            return self.error(place, f"must be {expected}")
        problem = _TYPES.sub(lambda match: _WORDS.get(match.group(1), match.group(0)), problem)
        quotes = "; put it in quotes" if problem.startswith("Expected text, got") else ""
        return self.error(place, problem.replace("Expected", "must be", 1) + quotes)

    def _node(self, place: str) -> yaml.Node:
        node = self._top
        for index, name in _STEP.findall(place):
            if name and isinstance(node, yaml.MappingNode):
                inner = next((value for key, value in node.value if key.value == name), None)
            elif index and isinstance(node, yaml.SequenceNode) and int(index) < len(node.value):
                inner = node.value[int(index)]
            else:
                inner = None
            if inner is None:
                break
            node = inner
        return node

    def _check_keys(self, node: yaml.Node, place: str, looked_at: set[int]) -> None:
        if id(node) in looked_at:  # what an alias stands for: aliases of aliases would take for ever
            return
        looked_at.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self._check_keys(item, f"{place}[{index}]", looked_at)
        if not isinstance(node, yaml.MappingNode):
            return
        seen: set[str] = set()
        for key, value in node.value:
            line = f"{self._source}, line {key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                raise ConfigError(f"{line}: {place or 'the file'} must have plain names as keys")
            inner = f"{place}.{key.value}" if place else key.value
            if key.value in seen:
                raise ConfigError(f"{line}: {inner} is there twice")
            seen.add(key.value)
            self._check_keys(value, inner, looked_at)


def _not_yaml(source: str, error: Exception) -> ConfigError:
    mark = getattr(error, "problem_mark", None)
    line = f", line {mark.line + 1}" if mark is not None else ""
    problem = getattr(error, "problem", None) or "it is nested too deeply, or holds a value that there is not"
    return ConfigError(f"{source}{line}: is not valid YAML ({problem})")


def _is_empty(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.value == ""


def _field_names(type_: Any) -> set[str]:
    """Names of all fields of a struct and of the structs in it."""
    names: set[str] = set()
    waiting = [type_]
    while waiting:
        each = waiting.pop()
        if isinstance(each, type) and issubclass(each, msgspec.Struct):
            for field in msgspec.structs.fields(each):
                names.add(field.encode_name)
                waiting.append(field.type)
        waiting += getattr(each, "__args__", ())
    return names


def _expected(type_: Any, place: str) -> str | None:
    """The values that a place takes, in words: what its type is described as, or all that there are."""
    info: Any = inspect.type_info(type_)
    for index, name in _STEP.findall(place):
        info, _ = _bare(info)
        if isinstance(info, inspect.StructType) and name:
            info = next((field.type for field in info.fields if field.encode_name == name), None)
        elif isinstance(info, inspect.ListType) and index:
            info = info.item_type
        else:
            return None
    info, description = _bare(info)
    values = getattr(info, "values", ()) or [member.value for member in getattr(info, "cls", ())]
    return description or ("one of " + ", ".join(map(str, values)) if values else None)


def _bare(info: Any) -> tuple[Any, str | None]:
    """A type without what is said about it, and its description."""
    description = None
    while True:
        if isinstance(info, inspect.Metadata):
            description = (info.extra_json_schema or {}).get("description", description)
            info = info.type
        elif isinstance(info, inspect.UnionType):
            info = next(kind for kind in info.types if not isinstance(kind, inspect.NoneType))
        else:
            return info, description
