"""Local references of a schema: `#`, and `#/$defs/...` or any other pointer into it."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

from tandem.router.structured.keywords import LISTS, MAPS, SINGLE, SchemaError, mapped


def with_definitions(root: dict[str, Any]) -> dict[str, Any]:
    """The schema with copies, in `$defs`, of what its references find under keywords that are no keywords of JSON
    schema, such as OpenAPI's `components`."""
    references = References(root)
    moved: dict[str, str] = {}

    def visit(schema: Any, _: str) -> Any:
        """The schema, its references to places that no keyword leads to turned into references to new definitions."""
        if not isinstance(schema, dict):
            return schema
        result = mapped(schema, MAPS | LISTS | SINGLE, visit)
        reference = schema.get("$ref")
        if isinstance(reference, str) and _is_elsewhere(reference):
            if reference not in moved and (target := references.target(reference)) is not None:
                moved[reference] = references.add("moved", True)
                references.define(moved[reference], visit(target, ""))
            result["$ref"] = moved.get(reference, reference)
        return result

    whole = references.complete(visit(root, ""))
    emptied = {reference.split("/")[1] for reference in moved}
    return {key: value for key, value in whole.items() if key not in emptied}


def _is_elsewhere(reference: str) -> bool:
    first, _, rest = reference.removeprefix("#/").partition("/")
    return reference.startswith("#/") and bool(rest) and first not in MAPS | LISTS | SINGLE


class References:
    """Finds what references of one schema mean, and keeps definitions that are added to it."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self.added: dict[str, Any] = {}
        """Go to the root's `$defs`."""

    def target(self, reference: str) -> Any:
        """The subschema; None where the reference is not a local pointer to one."""
        pointer = unquote(reference.removeprefix("#"))
        if not reference.startswith("#") or (pointer and not pointer.startswith("/")):
            return None
        found: Any = self._root
        for step in pointer.split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list):
                found = found[int(step)] if step.isdigit() and int(step) < len(found) else None
            else:
                found = found.get(step) if isinstance(found, dict) else None
        return found if isinstance(found, dict | bool) else None

    def add(self, kind: str, schema: Any) -> str:
        """A definition of ours; returns the reference to it."""
        name = f"tandem.{kind}.{len(self.added)}"
        self.added[name] = schema
        return f"#/$defs/{name}"

    def define(self, reference: str, schema: Any) -> None:
        """What a reference that `add` gave shall mean."""
        self.added[reference.removeprefix("#/$defs/")] = schema

    def complete(self, schema: dict[str, Any]) -> dict[str, Any]:
        """`schema`, a version of the root, with what was added."""
        if not self.added:
            return schema
        defs = schema.get("$defs", {})
        if not isinstance(defs, dict):
            raise SchemaError("$defs must be an object")
        return {**schema, "$defs": {**defs, **self.added}}
