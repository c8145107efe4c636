"""Which pages in browsers may read answers (CORS, as the Fetch standard has it). Off unless origins are named.

Credentials in its sense (cookies) are never allowed: the API has none, and a key travels in a header that a page sets.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from urllib.parse import urlsplit

from tandem.common.errors import ConfigError

Headers = list[tuple[bytes, bytes]]

PREFLIGHT_S = 600
"""How long a browser may go without asking again."""

_ANY = "*"
_DEFAULT_PORTS = {"http": 80, "https": 443}
_READABLE_ANYWAY = frozenset(
    {b"cache-control", b"content-language", b"content-length", b"content-type", b"expires", b"last-modified", b"pragma"}
)
_HEADER_NAMES = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z\-]+( *, *[!#$%&'*+.^_`|~0-9A-Za-z\-]+)*")
_MAX_HEADER_NAMES_BYTES = 4096
_PREFLIGHT_VARIES = b"Origin, Access-Control-Request-Method, Access-Control-Request-Headers"


class Cors:
    """Headers for browsers, by the origins that were named."""

    def __init__(self, origins: Sequence[str]) -> None:
        """`origins`: `https://example.com[:port]`, `null`, or `*` for all. Raises ConfigError naming a wrong one."""
        named = frozenset(_origin(origin) for origin in origins)
        self._any = _ANY in named
        self._named = frozenset(origin.encode() for origin in named)

    def answer(self, origin: bytes | None, headers: Headers) -> Headers:
        """What is added to an answer that has `headers`. `origin`: of the request."""
        added = self._allowance(origin)
        if origin is not None and added[0][0] != b"vary":
            names = dict.fromkeys(name for name, _ in headers if name not in _READABLE_ANYWAY)
            if names:
                added.append((b"access-control-expose-headers", b", ".join(names)))
        return added

    def preflight(self, origin: bytes | None, methods: Iterable[str], wanted_headers: bytes) -> Headers:
        """The answer to a browser that asks whether it may send `methods` with `wanted_headers`."""
        allowance = [pair for pair in self._allowance(origin) if pair[0] != b"vary"]
        if not allowance:
            return [(b"vary", _PREFLIGHT_VARIES)]
        added = [*allowance, (b"vary", _PREFLIGHT_VARIES)]
        added.append((b"access-control-allow-methods", ", ".join(methods).encode()))
        if len(wanted_headers) <= _MAX_HEADER_NAMES_BYTES and _HEADER_NAMES.fullmatch(wanted_headers):
            added.append((b"access-control-allow-headers", wanted_headers))
        added.append((b"access-control-max-age", str(PREFLIGHT_S).encode()))
        return added

    def _allowance(self, origin: bytes | None) -> Headers:
        if self._any:
            return [(b"access-control-allow-origin", b"*")]
        if origin is not None and origin in self._named:
            return [(b"access-control-allow-origin", origin), (b"vary", b"Origin")]
        return [(b"vary", b"Origin")]


def _origin(text: str) -> str:
    """Origin as browsers write it: no path, no default port, lower case."""
    if text in (_ANY, "null"):
        return text
    try:
        parts = urlsplit(text.lower())
        port, host = parts.port, parts.hostname
    except ValueError:
        host = None
    beyond = parts.path.strip("/") or parts.query or parts.fragment or "@" in parts.netloc
    if not host or not parts.scheme or beyond or "*" in host:
        raise ConfigError(
            f"--allowed-origins {text[:100]!r}: an origin is SCHEME://HOST or SCHEME://HOST:PORT without a path, such "
            "as https://example.com; `*` allows all, `null` pages from files"
        )
    shown = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{shown}" + ("" if port in (None, _DEFAULT_PORTS.get(parts.scheme)) else f":{port}")
