"""Named contexts on disk: one file each, replaced by a rename, so that there is always a whole one.

    file = magic | 32-byte digest of the rest | 12 random bytes, AES-256-GCM        with a key
    file = magic | 32-byte digest of the rest | msgpack                             without

Token ids are text: where KV on disk is encrypted, so are they. A file's name is a digest of owner and name and is
authenticated with the content, so a file that was changed or renamed is not taken for another context.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from blake3 import blake3

from tandem.common.errors import ConfigError
from tandem.common.private import private_folder, private_opener

log = logging.getLogger(__name__)

SUFFIX = ".context"
MAX_FILE_BYTES = 8 << 20
_UNFINISHED = ".new"
_MAGIC = b"TNDMCTX1"
"""The last byte counts versions."""
_DIGEST_BYTES = 32
_NONCE_BYTES = 12
_NAME_KEY = blake3(b"tandem context file name v1").digest()
_SEAL_PURPOSE = "tandem named contexts v1"


@dataclass(frozen=True, slots=True)
class Context:
    """A prompt prefix that a tenant has given a name."""

    owner: str
    """The tenant. Names of different owners are different contexts."""
    name: str
    version: int
    tokens: bytes
    """The recipe: token ids, uint32, little-endian. Whatever KV is lost is computed from them again."""
    root: bytes
    """The parent of the prefix chain: `request_namespace`."""
    chunk_tokens: int
    created_at: float
    """Seconds since 1970, as is `expires_at`: both outlive the process."""
    expires_at: float

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) // 4

    @property
    def token_ids(self) -> list[int]:
        ids: list[int] = np.frombuffer(self.tokens, dtype="<u4").tolist()
        return ids


class ContextFiles:
    """Not thread-safe."""

    def __init__(self, folder: Path, key: bytes = b"") -> None:
        """`key`: 32 bytes, encrypts the files; empty: they are readable. Makes nothing before the first `save`."""
        self._folder = folder
        self._key = blake3(key, derive_key_context=_SEAL_PURPOSE).digest() if key else b""

    def load(self) -> Iterator[Context]:
        """Whole ones, in no order; a file that is damaged, or sealed with another key, is logged and left alone. Raises
        ConfigError if the folder cannot be read."""
        try:
            paths = list(self._folder.iterdir())
        except FileNotFoundError:
            return
        except OSError as error:
            raise ConfigError(f"kv_disk: cannot read {self._folder}: {error.strerror}") from error
        for path in paths:
            if path.suffix == _UNFINISHED:
                path.unlink(missing_ok=True)
            elif path.suffix == SUFFIX:
                context = self._read(path)
                if context is None:
                    log.warning("%s is damaged or sealed with another key; that context is not known", path)
                else:
                    yield context

    def save(self, context: Context) -> None:
        """Raises OSError; then an older version is as it was."""
        path = self._path(context.owner, context.name)
        body = self._seal(msgspec.msgpack.encode(context), path.stem)
        private_folder(self._folder)
        unfinished = path.with_suffix(_UNFINISHED)
        try:
            with open(unfinished, "wb", opener=private_opener) as file:
                file.write(_MAGIC + blake3(body).digest() + body)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise

    def remove(self, owner: str, name: str) -> None:
        """A file that cannot be removed comes back at the next start, until it expires."""
        path = self._path(owner, name)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s cannot be removed: %s", path, error.strerror)

    def _path(self, owner: str, name: str) -> Path:
        digest = blake3(msgspec.msgpack.encode((owner, name)), key=_NAME_KEY).hexdigest()
        return self._folder / f"{digest}{SUFFIX}"

    def _read(self, path: Path) -> Context | None:
        try:
            with path.open("rb") as file:
                raw = file.read(MAX_FILE_BYTES + 1)
            start = len(_MAGIC) + _DIGEST_BYTES
            body = raw[start:]
            if raw[:start] != _MAGIC + blake3(body).digest():
                return None
            context = msgspec.msgpack.decode(self._open(body, path.stem), type=Context)
        except (OSError, ValueError, msgspec.MsgspecError):
            return None
        return context if self._path(context.owner, context.name) == path else None

    def _seal(self, content: bytes, label: str) -> bytes:
        if not self._key:
            return content
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        nonce = os.urandom(_NONCE_BYTES)
        return nonce + AESGCM(self._key).encrypt(nonce, content, label.encode())

    def _open(self, body: bytes, label: str) -> bytes:
        """Raises ValueError."""
        if not self._key:
            return body
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        try:
            return AESGCM(self._key).decrypt(body[:_NONCE_BYTES], body[_NONCE_BYTES:], label.encode())
        except InvalidTag as error:
            raise ValueError("not sealed with this key") from error
