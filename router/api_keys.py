"""API keys: who may use the front door. Only digests are kept, on disk and in memory."""

from __future__ import annotations

import hashlib
import hmac
import re
from pathlib import Path

from tandem.common.errors import ConfigError, TandemError

_LINE = re.compile(r"([A-Za-z0-9._\-]{1,64}):([0-9a-fA-F]{64})")


class ApiKeys:
    def __init__(self, digests: dict[bytes, str]) -> None:
        """SHA-256 of a key -> the name of its holder."""
        self._digests = digests

    @classmethod
    def load(cls, path: Path) -> ApiKeys:
        """Lines `name:sha256-hex`, made with `printf %s KEY | sha256sum`; `#` begins a comment. Raises ConfigError."""
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--api_keys_file {path}: cannot be read ({error})") from error
        digests: dict[bytes, str] = {}
        for number, line in enumerate(lines, start=1):
            stripped = line.partition("#")[0].strip()
            if not stripped:
                continue
            match = _LINE.fullmatch(stripped)
            if match is None:
                raise ConfigError(f"--api_keys_file {path}, line {number}: expected `name:sha256-hex-of-key`")
            digests[bytes.fromhex(match.group(2))] = match.group(1)
        if not digests:
            raise ConfigError(f"--api_keys_file {path}: holds no key")
        return cls(digests)

    def check(self, authorization: str) -> str:
        """The holder's name. `authorization`: the header's value. Raises TandemError `invalid_api_key`."""
        scheme, _, key = authorization.partition(" ")
        digest = hashlib.sha256(key.strip().encode()).digest()
        holder: str | None = None
        for known, name in self._digests.items():  # every one is compared, whichever matches
            if hmac.compare_digest(known, digest):
                holder = name
        if scheme.lower() != "bearer" or holder is None:
            problem = "Incorrect API key provided." if key else "You did not provide an API key."
            raise TandemError("invalid_api_key", f"{problem} Send it as `Authorization: Bearer KEY`.")
        return holder
