"""Objects have the keys that a schema declares, and no others, unless it says otherwise.

JSON schema allows any further key where `additionalProperties` is absent, and a model left alone invents keys without
end. A closed object must still have room for what is declared beside it: by the members of `allOf`, by the target of a
`$ref` that has siblings, and, for a branch of `anyOf`, by the schema around it. So the keyword goes where all names are
known, and such members stay open in themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tandem.router.structured.keywords import ANNOTATIONS, IN_PLACE, LISTS, MAPS, SINGLE, mapped, types_of
from tandem.router.structured.references import References

MAX_KEYS = 64
MAX_DEPTH = 10
"""Most levels of an object of which nothing is declared, as in JSON mode."""

_INSIDE = (MAPS | LISTS | SINGLE) - frozenset(IN_PLACE)
_OF_OBJECTS_AT_LARGE = {"type", "required", "minProperties", "maxProperties"}
_SCALARS = {"type": ["null", "boolean", "number", "string"]}


@dataclass(slots=True)
class _Names:
    """Keys that are declared for one value, and patterns of keys."""

    keys: dict[str, None] = field(default_factory=dict)
    patterns: dict[str, None] = field(default_factory=dict)
    needed: dict[str, None] = field(default_factory=dict)
    """Keys that must be there, but are not declared."""
    declared: bool = False
    """There is a list of keys, which may be empty."""
    open: bool = False
    """It is said what further keys there may be."""

    def add(self, other: _Names) -> _Names:
        """Takes in what `other` declares, and returns itself."""
        self.keys |= other.keys
        self.patterns |= other.patterns
        self.needed |= other.needed
        self.declared |= other.declared
        self.open |= other.open
        return self

    def __bool__(self) -> bool:
        return self.declared


def closed(root: dict[str, Any], *, unless_said: bool = True) -> dict[str, Any]:
    """The schema with its objects closed. `unless_said` false: only those of which `unevaluatedProperties` says it."""
    closer = _Closer(References(root), unless_said)
    return closer.references.complete(closer.closed(root, _Names()))


class _Closer:
    def __init__(self, references: References, unless_said: bool) -> None:
        self.references = references
        self._unless_said = unless_said
        self._opened: dict[str, str] = {}
        """Reference by reference: the one to a version of its target that is open in itself."""
        self._anything = ""

    def closed(self, schema: Any, beside: _Names) -> Any:
        """`beside`: what is declared for the same value elsewhere."""
        if isinstance(schema, bool):
            if not schema or not beside:
                return schema
            schema = {}
        node = mapped(schema, _INSIDE, lambda sub, _: self.closed(sub, _Names()))
        if not self._unless_said and "unevaluatedProperties" not in node:
            return mapped(node, frozenset(IN_PLACE), lambda sub, _: self.closed(sub, _Names()))
        said = node.keys() - ANNOTATIONS - {"$defs", "definitions"}
        if not beside and said == {"$ref"}:
            return node
        if not beside and said == {"allOf"} and isinstance(node["allOf"], list) and len(node["allOf"]) == 1:
            return {**node, "allOf": [self.closed(node["allOf"][0], _Names())]}
        rest = _rest(node)
        members = self._of_members(node)
        if "additionalProperties" in node or rest is True or members.open:
            return self._in_the_open(node, rest)
        together = _Names().add(beside).add(_own(node)).add(members)
        branches = [key for key in ("anyOf", "oneOf") if isinstance(node.get(key), list)]
        if not branches or isinstance(rest, dict):
            for key in branches:
                for branch in node[key]:
                    together.add(self._names(branch, frozenset()))
            return self._with(self._in_the_open(node, rest), together, rest)
        result = self._in_the_open({key: value for key, value in node.items() if key not in branches}, rest)
        for key in branches:
            others = _Names().add(together)
            for other in branches:
                if other != key:
                    for branch in node[other]:
                        others.add(self._names(branch, frozenset()))
            result[key] = [self.closed(branch, others) for branch in node[key]]
        return result

    def _with(self, node: dict[str, Any], names: _Names, rest: Any) -> dict[str, Any]:
        """The schema with no other keys than those; what is not declared here is declared beside it."""
        if not names and rest is None:
            return self._bounded(node)
        properties = node.get("properties", {})
        result = dict(node)
        missing = {name: True for name in names.keys | names.needed if name not in properties}
        if missing:
            result["properties"] = {**properties, **missing}
        patterns = node.get("patternProperties", {})
        more = {pattern: True for pattern in names.patterns if pattern not in patterns}
        if more:
            result["patternProperties"] = {**patterns, **more}
        result["additionalProperties"] = False if rest is None else rest
        return result

    def _bounded(self, node: dict[str, Any]) -> dict[str, Any]:
        """An object of which nothing is declared may have any keys, but not without end."""
        said = node.keys() - ANNOTATIONS - {"$defs", "definitions"}
        if "type" not in said or "object" not in types_of(node) or said - _OF_OBJECTS_AT_LARGE:
            return node
        self._anything = self._anything or self._any(MAX_DEPTH)
        least = node.get("minProperties", 0)
        bound = {"maxProperties": max(MAX_KEYS, least if isinstance(least, int) else 0)}
        return {**bound, **node, "additionalProperties": {"$ref": self._anything}}

    def _any(self, depth: int) -> str:
        """A reference to any JSON value of that depth."""
        if depth == 0:
            return self.references.add("any", _SCALARS)
        below = {"$ref": self._any(depth - 1)}
        values = {"type": "object", "additionalProperties": below, "maxProperties": MAX_KEYS}
        return self.references.add("any", {"anyOf": [_SCALARS, {"type": "array", "items": below}, values]})

    def _in_the_open(self, node: dict[str, Any], rest: Any) -> dict[str, Any]:
        """What is declared in place stays open."""
        result = {key: value for key, value in node.items() if key != "unevaluatedProperties"}
        for key in IN_PLACE:
            if isinstance(result.get(key), list):
                result[key] = [self._open(member) for member in result[key]]
        if isinstance(result.get("$ref"), str):
            result["$ref"] = self._open_reference(result["$ref"])
        return result

    def _open(self, schema: Any) -> Any:
        if not isinstance(schema, dict):
            return schema
        node = mapped(schema, _INSIDE, lambda sub, _: self.closed(sub, _Names()))
        return self._in_the_open(node, None)

    def _open_reference(self, reference: str) -> str:
        target = self.references.target(reference)
        if target is None:
            return reference
        if reference not in self._opened:
            self._opened[reference] = self.references.add("open", True)
            self.references.define(self._opened[reference], self._open(target))
        return self._opened[reference]

    def _of_members(self, node: dict[str, Any]) -> _Names:
        """What the members of `allOf` and the target of `$ref` declare."""
        found = _Names()
        for member in node.get("allOf") or []:
            found.add(self._names(member, frozenset()))
        if isinstance(node.get("$ref"), str):
            found.add(self._names({"$ref": node["$ref"]}, frozenset()))
        return found

    def _names(self, schema: Any, seen: frozenset[str]) -> _Names:
        """All that is declared for the value of `schema`, in it or in what it is made of."""
        if not isinstance(schema, dict):
            return _Names()
        found = _own(schema)
        found.open = "additionalProperties" in schema or _rest(schema) is True
        for key in IN_PLACE:
            for member in schema.get(key) or []:
                inner = self._names(member, seen)
                if key != "allOf":
                    inner.open = False
                found.add(inner)
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference not in seen:
            found.add(self._names(self.references.target(reference), seen | {reference}))
        return found


def _rest(schema: dict[str, Any]) -> Any:
    """What `unevaluatedProperties` says of further keys; None: nothing, or that there are none."""
    said = schema.get("unevaluatedProperties")
    return None if said is False else said


def _own(schema: dict[str, Any]) -> _Names:
    names = _Names()
    for key in ("properties", "patternProperties"):
        if isinstance(declared := schema.get(key), dict):
            target = names.keys if key == "properties" else names.patterns
            target.update(dict.fromkeys(declared))
            names.declared = True
    if isinstance(required := schema.get("required"), list):
        names.needed.update(dict.fromkeys(name for name in required if isinstance(name, str)))
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    for value in values if isinstance(values, list) else []:
        if isinstance(value, dict):
            names.needed.update(dict.fromkeys(value))
    return names
