"""How deep JSON of clients may be nested. What is deeper would overflow the stack of somebody who walks through it."""

from __future__ import annotations

from typing import Any

from tandem.common.errors import TandemError
from tandem.router.fields.sampling import invalid

MAX_DEPTH = 100
"""Levels of objects and arrays in one body. A schema of 30 objects inside each other needs as many."""
PROBLEM = f"is nested more than {MAX_DEPTH} levels deep; make it flatter"


def check_depth(content: Any, raw: bytes | str | None = None) -> None:
    """`content`: a decoded body, `raw`: the text that it was. Raises TandemError `invalid_request` naming its field."""
    if raw is not None and not may_be_deep(raw):
        return
    if too_deep(content):
        if isinstance(content, dict):
            for name, part in content.items():
                if too_deep(part, MAX_DEPTH - 1):
                    raise invalid(name[:64], PROBLEM)
        raise deep_body()


def deep_body() -> TandemError:
    return TandemError("invalid_request", f"the body {PROBLEM}")


def too_deep(value: Any, most: int = MAX_DEPTH) -> bool:
    """Whether more than `most` arrays and objects are inside each other. Level by level, so that no stack is needed."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(most):
        if not level:
            return False
        level = [
            part
            for whole in level
            for part in (whole.values() if type(whole) is dict else whole)
            if type(part) is dict or type(part) is list
        ]
    return bool(level)


def may_be_deep(raw: bytes | str) -> bool:
    """False where there are too few brackets for it, which costs next to nothing to see."""
    if isinstance(raw, str):
        return raw.count("[") + raw.count("{") > MAX_DEPTH
    return raw.count(b"[") + raw.count(b"{") > MAX_DEPTH
