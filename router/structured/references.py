"""Local references of a schema: `#`, and `#/$defs/...` or any other pointer into it."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

from tandem.router.structured.keywords import SchemaError


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
        """A definition of ours; returns the reference to it. It may be filled in later, under `name_in`."""
        name = f"tandem.{kind}.{len(self.added)}"
        self.added[name] = schema
        return f"#/$defs/{name}"

    def complete(self, schema: dict[str, Any]) -> dict[str, Any]:
        """`schema`, a version of the root, with what was added."""
        if not self.added:
            return schema
        defs = schema.get("$defs", {})
        if not isinstance(defs, dict):
            raise SchemaError("$defs must be an object")
        return {**schema, "$defs": {**defs, **self.added}}
