"""JSON schema's keywords: where subschemas are, and which keywords a grammar cannot hold an output to."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Schema = dict[str, Any] | bool
Problem = Callable[[str], str]
"""Says of a pattern why the grammar's library cannot use it; empty if it can."""

MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
LISTS = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})
SINGLE = frozenset({"items", "additionalProperties", "additionalItems", "unevaluatedProperties"})
IN_PLACE = ("allOf", "anyOf", "oneOf")
"""Hold subschemas of the same value, not of what is in it."""

ANNOTATIONS = frozenset(
    [
        "$anchor",
        "$comment",
        "$schema",
        "$id",
        "id",
        "title",
        "description",
        "default",
        "example",
        "examples",
        "deprecated",
        "readOnly",
        "writeOnly",
        "contentMediaType",
        "contentEncoding",
        "contentSchema",
        "discriminator",
        "externalDocs",
        "xml",
        "$vocabulary",
    ]
)
"""Say nothing of which values are right."""
_KEPT_ANNOTATIONS = frozenset({"$anchor", "$schema", "$id", "id"})
"""References may need them."""
_ENFORCED = frozenset(
    [
        "$ref",
        "const",
        "enum",
        "type",
        "items",
        "additionalItems",
        "prefixItems",
        "minItems",
        "maxItems",
        "properties",
        "additionalProperties",
        "patternProperties",
        "required",
        "minProperties",
        "maxProperties",
        "minLength",
        "maxLength",
        "pattern",
        "format",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "multipleOf",
        "anyOf",
        "oneOf",
        "allOf",
        "$defs",
        "definitions",
        "unevaluatedProperties",
    ]
)
_FORMATS = frozenset(
    ["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown"]
)
_NEVER = frozenset({"$dynamicRef", "$recursiveRef", "$dynamicAnchor", "$recursiveAnchor"})
_NOT_REGULAR = re.compile(r"look-?around|look-ahead|backreference", re.IGNORECASE)


class SchemaError(ValueError):
    """The schema cannot be used; the message says where and why."""


def subschemas(schema: Mapping[str, Any], names: frozenset[str] = MAPS | LISTS | SINGLE) -> Iterator[Any]:
    """Those directly below, of the keywords `names`."""
    for key, value in schema.items():
        if key not in names:
            continue
        if key in MAPS and isinstance(value, dict):
            yield from value.values()
        elif isinstance(value, list):  # `items` may be one, in old drafts
            yield from value
        elif key in SINGLE:
            yield value


def mapped(schema: Mapping[str, Any], names: frozenset[str], change: Callable[[Any, str], Any]) -> dict[str, Any]:
    """A copy in which each subschema of the keywords `names` is `change(subschema, its place)`."""
    result: dict[str, Any] = {}
    for key, value in schema.items():
        if key not in names:
            result[key] = value
        elif key in MAPS and isinstance(value, dict):
            result[key] = {name: change(sub, f"{key}.{name}") for name, sub in value.items()}
        elif isinstance(value, list) and (key in LISTS or key in SINGLE):
            result[key] = [change(sub, f"{key}[{index}]") for index, sub in enumerate(value)]
        elif key in SINGLE:
            result[key] = change(value, key)
        else:
            raise SchemaError(f"{key} has the wrong type")
    return result


class Enforceable:
    """Takes out of a schema what no grammar can hold an output to.

    `ignored` lists it, by its place. Where nothing may be ignored (`lenient` false) that is a SchemaError instead.
    """

    def __init__(self, lenient: bool, problem: Problem) -> None:
        self.ignored: list[str] = []
        self._lenient = lenient
        self._problem = problem

    def rid(self, schema: Any, place: str = "") -> Any:
        """The schema without it. Raises SchemaError."""
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise SchemaError(f"{place or 'it'} must be a schema: an object, true or false")
        kept = {key: value for key, value in schema.items() if self._keeps(key, value, schema, place)}
        if isinstance(kept.get("patternProperties"), dict):
            kept["patternProperties"] = {
                pattern: value
                for pattern, value in kept["patternProperties"].items()
                if self._usable(pattern, _below(place, f"patternProperties.{pattern}"))
            }
        return mapped(kept, MAPS | LISTS | SINGLE, lambda sub, at: self.rid(sub, _below(place, at)))

    def _keeps(self, key: str, value: Any, schema: dict[str, Any], place: str) -> bool:
        at = _below(place, key)
        if key == "pattern" and isinstance(value, str):
            return self._usable(value, at)
        if key == "format" and isinstance(value, str):
            if value in _FORMATS and "string" in types_of(schema):
                return True
            return self._drop(f"{at}={value}", f"{value!r} is not known") if "string" in types_of(schema) else False
        if key in _ENFORCED:
            return True
        if key in ANNOTATIONS or key.startswith("x-") or (key == "uniqueItems" and value is False):
            if key == "x-guidance":
                raise SchemaError(f"{at} is only read at the top of a schema")
            return key in _KEPT_ANNOTATIONS and not (key == "$schema" and "json-schema.org/" not in str(value))
        if key in _NEVER:
            raise SchemaError(f"{at} is not supported")
        return self._drop(at, "is not supported")

    def _usable(self, pattern: str, at: str) -> bool:
        problem = self._problem(pattern)
        if not problem:
            return True
        if _NOT_REGULAR.search(problem):
            return self._drop(at, "uses look-around, word boundaries or back-references, which are not supported")
        raise SchemaError(f"{at}: {problem}")

    def _drop(self, at: str, why: str) -> bool:
        """Always False: it is not kept."""
        if not self._lenient:
            raise SchemaError(f"{at} {why} with strict: true")
        self.ignored.append(at)
        return False


def items_of(schema: Mapping[str, Any]) -> tuple[list[Any], Any]:
    """The subschemas of an array's first items, and that of the others."""
    items = schema.get("items", True)
    if isinstance(items, list):  # old drafts
        return items, schema.get("additionalItems", True)
    first = schema.get("prefixItems")
    return (first if isinstance(first, list) else []), items


def types_of(schema: Mapping[str, Any]) -> tuple[str, ...]:
    """Which the keyword `type` allows. Raises SchemaError."""
    given = schema.get("type", ["null", "boolean", "number", "string", "array", "object"])
    if isinstance(given, str):
        return (given,)
    if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
        raise SchemaError("type must be a name or a list of names")
    return tuple(given)


def _below(place: str, step: str) -> str:
    return f"{place}.{step}" if place else step
