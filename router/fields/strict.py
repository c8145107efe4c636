"""What every object in a request's body derives from."""

from __future__ import annotations

import msgspec


class Fields(msgspec.Struct, forbid_unknown_fields=True):
    """The decoder stops at a field that has no place in it. So a body without such fields, which is nearly every one,
    is read once; `request_fields.py` says what becomes of the others."""
