"""URLs of Redis, which may hold a password."""

from __future__ import annotations


def without_password(url: str) -> str:
    """The URL for logs and errors: without user and password."""
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"
