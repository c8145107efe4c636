"""API keys: who may use the front door, and whose KV cache a request may meet. Only digests of keys are kept."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from dataclasses import dataclass
from pathlib import Path

from tandem.common.errors import ConfigError, TandemError

_LINE = re.compile(r"([A-Za-z0-9._\-]{1,64}):([0-9a-fA-F]{64})(?::([A-Za-z0-9._\-]{1,64}))?")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends a request."""

    tenant: str
    sharing_group: str = ""
    """Tenants that name the same group reuse each other's cached KV. Empty: nobody else's."""

    def cache_salt(self, wish: str) -> bytes:
        """Separates KV caches: between tenants or groups, and inside one by the request's own `cache_salt`."""
        kind, name = ("group", self.sharing_group) if self.sharing_group else ("tenant", self.tenant)
        return json.dumps([kind, name, wish]).encode()


ANYBODY = Caller("default", "default")
"""Where no API keys are configured, there is one tenant."""


class ApiKeys:
    def __init__(self, digests: dict[bytes, Caller]) -> None:
        """SHA-256 of a key -> its holder."""
        self._digests = digests

    @classmethod
    def load(cls, path: Path) -> ApiKeys:
        """Lines `name:sha256-hex[:sharing-group]`, the digest made with `printf %s KEY | sha256sum`; `#` begins a
        comment. Raises ConfigError."""
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--api_keys_file {path}: cannot be read ({error})") from error
        digests: dict[bytes, Caller] = {}
        for number, line in enumerate(lines, start=1):
            stripped = line.partition("#")[0].strip()
            if not stripped:
                continue
            match = _LINE.fullmatch(stripped)
            if match is None:
                raise ConfigError(
                    f"--api_keys_file {path}, line {number}: expected `name:sha256-hex-of-key[:sharing-group]`"
                )
            digests[bytes.fromhex(match.group(2))] = Caller(match.group(1), match.group(3) or "")
        if not digests:
            raise ConfigError(f"--api_keys_file {path}: holds no key")
        return cls(digests)

    def check(self, authorization: str) -> Caller:
        """The key's holder. `authorization`: the header's value. Raises TandemError `invalid_api_key`."""
        scheme, _, key = authorization.partition(" ")
        digest = hashlib.sha256(key.strip().encode()).digest()
        holder: Caller | None = None
        for known, caller in self._digests.items():  # every one is compared, whichever matches
            if hmac.compare_digest(known, digest):
                holder = caller
        if scheme.lower() != "bearer" or holder is None:
            problem = "Incorrect API key provided." if key else "You did not provide an API key."
            raise TandemError("invalid_api_key", f"{problem} Send it as `Authorization: Bearer KEY`.")
        return holder
