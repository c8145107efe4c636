"""Lists in pages, as OpenAI's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tandem.router.fields.sampling import invalid, shown


def page_size(query: Mapping[str, str], default: int, most: int) -> int:
    """Raises TandemError `invalid_request`."""
    given = query.get("limit", str(default))
    if not (given.isascii() and given.isdigit() and len(given) < 9 and 1 <= int(given) <= most):
        raise invalid("limit", f"must be a number between 1 and {most}, got {shown(given)}")
    return int(given)


def page(shapes: Sequence[dict[str, Any]], more: bool) -> dict[str, Any]:
    """JSON of a page of a list. `more`: there are further ones."""
    return {
        "object": "list",
        "data": shapes,
        "first_id": shapes[0]["id"] if shapes else None,
        "last_id": shapes[-1]["id"] if shapes else None,
        "has_more": more,
    }
