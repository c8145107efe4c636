"""Which subschemas a finite value can match: a `$ref` that leads to itself, always, has none."""

from __future__ import annotations

from typing import Any

from tandem.router.structured.keywords import LISTS, MAPS, SINGLE, SchemaError, items_of, mapped, subschemas, types_of
from tandem.router.structured.references import References


def without_endless(root: dict[str, Any]) -> Any:
    """The schema with `false` in place of references that no finite value can match.

    Raises SchemaError where nothing is left.
    """
    finder = _Finite(References(root))
    finder.solve(root)
    if not finder.matches(root):
        endless = next((name for name, found in finder.known.items() if not found), "it")
        raise SchemaError(
            f"no value that ends can match it: {endless} needs itself, or one of its values is not possible"
        )
    if all(finder.known.values()):
        return root
    return _replaced(root, {name for name, found in finder.known.items() if not found})


class _Finite:
    def __init__(self, references: References) -> None:
        self.known: dict[str, bool] = {}
        self._references = references

    def solve(self, root: dict[str, Any]) -> None:
        """The least fixed point: nothing is finite before it is shown to be."""
        todo: list[Any] = [root]
        while todo:
            schema = todo.pop()
            if isinstance(schema, dict):
                todo += subschemas(schema)
                reference = schema.get("$ref")
                if isinstance(reference, str) and reference not in self.known:
                    self.known[reference] = False
                    todo.append(self._references.target(reference))
        changed = True
        while changed:
            changed = False
            for reference, found in self.known.items():
                if not found and self.matches(self._references.target(reference)):
                    self.known[reference] = changed = True

    def matches(self, schema: Any) -> bool:
        """Whether some finite value does, by what is known so far. Limits that contradict each other are the
        grammar's library's to find."""
        if not isinstance(schema, dict):
            return schema is not False
        if isinstance(schema.get("$ref"), str) and not self.known.get(schema["$ref"], True):
            return False
        if not all(map(self.matches, _listed(schema, "allOf"))):
            return False
        for key in ("anyOf", "oneOf"):
            if isinstance(schema.get(key), list) and not any(map(self.matches, schema[key])):
                return False
        if "const" in schema or "enum" in schema:
            return True
        return any(self._matches_type(kind, schema) for kind in types_of(schema))

    def _matches_type(self, kind: str, schema: dict[str, Any]) -> bool:
        if kind == "object":
            properties = schema.get("properties", {})
            rest = schema.get("additionalProperties", True)
            patterns = bool(schema.get("patternProperties"))
            return all(
                patterns if name not in properties and rest is False else self.matches(properties.get(name, rest))
                for name in _listed(schema, "required")
                if isinstance(name, str)
            )
        if kind == "array":
            least, (first, rest) = schema.get("minItems", 0), items_of(schema)
            if not isinstance(least, int):
                return True
            return all(map(self.matches, first[:least])) and (least <= len(first) or self.matches(rest))
        return True


def _replaced(schema: Any, endless: set[str]) -> Any:
    if not isinstance(schema, dict):
        return schema
    if schema.get("$ref") in endless:
        return False
    return mapped(schema, MAPS | LISTS | SINGLE, lambda sub, _: _replaced(sub, endless))


def _listed(schema: dict[str, Any], key: str) -> list[Any]:
    value = schema.get(key)
    return value if isinstance(value, list) else []
