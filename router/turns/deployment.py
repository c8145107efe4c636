"""What tells deployments that use one Redis apart."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from tandem.common.checkpoint import resolve_model
from tandem.router.settings import RouterConfig

_IDENTITY = ("config.json", "tokenizer.json")
"""Files that say which model it is, wherever its folder lies."""


def deployment_of(config: RouterConfig, served_name: str, secret: bytes) -> str:
    """`--deployment`, or else made of the model (its name in the API, configuration and tokenizer) and the secret."""
    if config.deployment:
        return config.deployment
    digest = hashlib.blake2b(served_name.encode(), key=hashlib.sha256(secret).digest(), digest_size=6)
    folder = resolve_model(config.model, weights=False)
    for name in _IDENTITY:
        digest.update(hashlib.blake2b(_content(folder / name)).digest())
    return f"{re.sub(r'[^A-Za-z0-9._-]', '-', served_name)[:40]}-{digest.hexdigest()}"


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""
