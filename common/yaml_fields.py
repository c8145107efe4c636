"""Reads YAML strictly: every error names the file, the line, the field and what was expected.

`yaml.compose` keeps line numbers, which plain loading throws away. Nothing but scalars, lists and mappings exists here;
tags and merge keys are refused by the types that are asked for.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

import yaml

from tandem.common.errors import ConfigError

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_INTEGER, _FLOAT, _BOOLEAN, _NULL = (f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "bool", "null"))
_TRUE = frozenset({"true", "yes", "on"})
_SHOWN_CHARACTERS = 40


class Fields:
    """One mapping. Ask for its fields by name, then `end`: a field that nobody asked for is an error."""

    def __init__(self, node: yaml.Node, source: str, path: str = "") -> None:
        self._source = source
        self._path = path
        self._node = node
        self._asked: list[str] = []
        self._values: dict[str, yaml.Node] = {}
        if not isinstance(node, yaml.MappingNode):
            raise self._wrong(node, "", "must be a mapping of fields")
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self._wrong(key, "", "must have plain names as keys")
            if key.value in self._values:
                raise self._wrong(key, key.value, "is there twice")
            self._values[key.value] = value

    @classmethod
    def load(cls, path: Path, setting: str) -> Fields:
        """The top of a file; `setting` names it in messages. Raises ConfigError."""
        source = f"{setting} {path}"
        try:
            node = yaml.compose(path.read_text(encoding="utf-8"), Loader=_Loader)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{source}: cannot be read ({error})") from error
        except (yaml.YAMLError, RecursionError) as error:
            mark = getattr(error, "problem_mark", None)
            line = f", line {mark.line + 1}" if mark is not None else ""
            problem = getattr(error, "problem", None) or "it is nested too deeply"
            raise ConfigError(f"{source}{line}: is not valid YAML ({problem})") from error
        if node is None:
            raise ConfigError(f"{source}: is empty")
        return cls(node, source)

    def text(self, name: str, default: str | None = None) -> str:
        """Without a default the field is required."""
        node = self._find(name)
        if node is None:
            if default is None:
                raise self._wrong(self._node, name, "is required")
            return default
        return self._scalar(node, name)

    def integer(self, name: str, *, low: int, high: int) -> int | None:
        node = self._find(name)
        if node is None or node.tag == _NULL:
            return None
        try:
            value = int(node.value.replace("_", "")) if node.tag == _INTEGER else None
        except ValueError:  # YAML has octal, hexadecimal and base 60, too
            value = None
        if value is None or not low <= value <= high:
            raise self._wrong(node, name, f"must be an integer from {low} to {high}, got {_shown(node)}")
        return value

    def number(self, name: str, default: float, *, low: float, high: float) -> float:
        node = self._find(name)
        if node is None:
            return default
        try:
            value = float(node.value) if node.tag in (_INTEGER, _FLOAT) else None
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise self._wrong(node, name, f"must be a number from {low:g} to {high:g}, got {_shown(node)}")
        return value

    def boolean(self, name: str, default: bool) -> bool:
        node = self._find(name)
        if node is None:
            return default
        if node.tag != _BOOLEAN:
            raise self._wrong(node, name, f"must be true or false, got {_shown(node)}")
        return str(node.value).lower() in _TRUE

    def texts(self, name: str) -> list[str] | None:
        """A list of strings; None where the field is absent."""
        node = self._find(name)
        if node is None:
            return None
        if not isinstance(node, yaml.SequenceNode):
            raise self._wrong(node, name, f"must be a list, got {_shown(node)}")
        return [self._scalar(item, f"{name}[{index}]") for index, item in enumerate(node.value)]

    def mappings(self, name: str) -> Iterator[Fields]:
        """The entries of a list of mappings; none where the field is absent."""
        node = self._find(name)
        if node is None:
            return
        if not isinstance(node, yaml.SequenceNode):
            raise self._wrong(node, name, f"must be a list, got {_shown(node)}")
        for index, item in enumerate(node.value):
            yield Fields(item, self._source, f"{self._path}{name}[{index}].")

    def items(self) -> list[tuple[str, yaml.Node]]:
        """Every field as it stands in the file, for those who know what to do with any name."""
        return list(self._values.items())

    def has(self, name: str) -> bool:
        return self._find(name) is not None

    def end(self) -> None:
        for name, node in self._values.items():
            if name not in self._asked:
                close = difflib.get_close_matches(name, self._asked, 1)
                hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(self._asked)}"
                raise self._wrong(node, name, f"is not a field; {hint}")

    def error(self, name: str, problem: str) -> ConfigError:
        """`name` may be `field` or `field[index]`."""
        field, _, index = name.partition("[")
        node = self._values.get(field, self._node)
        if index and isinstance(node, yaml.SequenceNode):
            node = node.value[int(index.rstrip("]"))]
        return self._wrong(node, name, problem)

    def _find(self, name: str) -> yaml.Node | None:
        if name not in self._asked:
            self._asked.append(name)
        return self._values.get(name)

    def _scalar(self, node: yaml.Node, name: str) -> str:
        if not isinstance(node, yaml.ScalarNode) or node.tag == _NULL or not node.value:
            raise self._wrong(node, name, f"must be a string, got {_shown(node)}")
        return str(node.value)

    def _wrong(self, node: yaml.Node, name: str, problem: str) -> ConfigError:
        field = (self._path + name).rstrip(".")
        line = f"{self._source}, line {node.start_mark.line + 1}"
        return ConfigError(f"{line}: {field} {problem}" if field else f"{line}: {problem}")


def _shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    text = repr(str(node.value)) if node.value else "nothing"
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."
