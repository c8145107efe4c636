"""Encryption at rest: wraps a tier so that what it stores can be neither read nor changed nor swapped without notice.

    sealed object = magic, 24 random bytes | frame 0 | frame 1 | ...      frame = up to 64 KiB encrypted, 16-byte tag

AES-256-GCM per frame, so that ranges can be read. Each owner has a key of its own (HKDF of the master key), and each
write one below it (HKDF of the owner's key and the random bytes), so that a nonce, the frame's index, never repeats
under a key however many objects there are. Authenticated with every frame: object key, owner, index, size of the whole.

Not hidden: keys, sizes and the rest of `ObjectInfo`, by which the node manages a tier. Not noticed: an older copy of
the same object put back, which has the same content, for equal keys mean equal content.
"""

from __future__ import annotations

import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tandem.common.errors import ConfigError
from tandem.kvstore.interfaces import ObjectInfo, ObjectKey, Tier, TierName

FRAME_BYTES = 64 << 10
_MAGIC = b"TNDMSEA1"
"""The last byte counts versions."""
_HEADER_BYTES = 32
_TAG_BYTES = 16
_READ_FRAMES = 64
"""Read and decrypted at a time: bounds the memory of a read to 4 MiB."""
_MAX_OPEN = 1024
"""Objects whose keys are kept, so that reading layer by layer asks the tier once per layer, not three times."""


@dataclass(frozen=True, slots=True)
class _Opened:
    """What is needed to read frames of one object."""

    cipher: AESGCM
    label: bytes
    """Authenticated with every frame, beside its index."""
    size: int


class SealedTier:
    """`tier`, encrypted. `master_key` is 32 random bytes, the same for all nodes that share the tier; ConfigError for
    another length. An object that was tampered with, or sealed under another key, is a miss."""

    def __init__(self, tier: Tier, master_key: bytes) -> None:
        if len(master_key) != 32:
            raise ConfigError(f"the encryption key has {len(master_key)} bytes; use 32 random bytes")
        self._tier = tier
        self._master_key = master_key
        self._lock = threading.Lock()
        self._opened: OrderedDict[ObjectKey, _Opened] = OrderedDict()

    @property
    def name(self) -> TierName:
        return self._tier.name

    @property
    def capacity_bytes(self) -> int:
        return self._tier.capacity_bytes

    @property
    def used_bytes(self) -> int:
        return self._tier.used_bytes

    def put(self, key: ObjectKey, info: ObjectInfo, content: memoryview) -> bool:
        """Encrypts, and puts that. False: no room or a fault."""
        content = content.cast("B")
        if not content.nbytes:
            return False
        header = _MAGIC + os.urandom(_HEADER_BYTES - len(_MAGIC))
        opened = self._open(key, info.owner, len(content), header)
        sealed = memoryview(bytearray(_sealed_size(len(content))))
        sealed[:_HEADER_BYTES] = header
        for index, start in enumerate(range(0, len(content), FRAME_BYTES)):
            plain = content[start : start + FRAME_BYTES]
            at = _HEADER_BYTES + index * (FRAME_BYTES + _TAG_BYTES)
            frame = sealed[at : at + len(plain) + _TAG_BYTES]
            opened.cipher.encrypt_into(_nonce(index), plain, _authenticated(opened, index), frame)
        self._forget(key)
        return self._tier.put(key, replace(info, size=len(sealed)), sealed)

    def info(self, key: ObjectKey) -> ObjectInfo | None:
        info = self._tier.info(key)
        return None if info is None else _plain_info(info)

    def read(self, key: ObjectKey, offset: int, out: memoryview) -> bool:
        """Fills `out` with plain bytes from `offset` on. False: not there, too short, changed, or a fault."""
        out = out.cast("B")
        with self._lock:
            opened = self._opened.get(key)
        if opened is not None and self._read_frames(key, opened, offset, out):
            return True
        # Not opened yet, or replaced since by another writer.
        opened = self._find(key)
        return opened is not None and self._read_frames(key, opened, offset, out)

    def delete(self, key: ObjectKey) -> bool:
        self._forget(key)
        return self._tier.delete(key)

    def objects(self) -> Iterator[tuple[ObjectKey, ObjectInfo]]:
        """Everything below that was sealed, with plain sizes."""
        for key, sealed_info in self._tier.objects():
            info = _plain_info(sealed_info)
            if info is not None:
                yield key, info

    def check_integrity(self) -> None:
        self._tier.check_integrity()

    def close(self) -> None:
        with self._lock:
            self._opened.clear()
        self._tier.close()

    def _find(self, key: ObjectKey) -> _Opened | None:
        """Reads an object's header and derives its key."""
        self._forget(key)
        info = self.info(key)
        header = bytearray(_HEADER_BYTES)
        if info is None or not self._tier.read(key, 0, memoryview(header)) or not header.startswith(_MAGIC):
            return None
        opened = self._open(key, info.owner, info.size, header)
        with self._lock:
            self._opened[key] = opened
            if len(self._opened) > _MAX_OPEN:
                self._opened.popitem(last=False)
        return opened

    def _forget(self, key: ObjectKey) -> None:
        with self._lock:
            self._opened.pop(key, None)

    def _open(self, key: ObjectKey, owner: str, size: int, header: bytes | bytearray) -> _Opened:
        owner_key = _derive(self._master_key, b"tandem kv owner v1" + owner.encode())
        cipher = AESGCM(_derive(owner_key, b"tandem kv object v1" + header))
        label = struct.pack("<IQ", len(key), size) + key + owner.encode()
        return _Opened(cipher, label, size)

    def _read_frames(self, key: ObjectKey, opened: _Opened, offset: int, out: memoryview) -> bool:
        """Decrypts the frames that hold the range: whole ones straight into `out`."""
        end = offset + len(out)
        if not 0 <= offset <= end <= opened.size:
            return False
        first, last = offset // FRAME_BYTES, -(-end // FRAME_BYTES)
        for start in range(first, last, _READ_FRAMES):
            stop = min(start + _READ_FRAMES, last)
            length = min(stop * FRAME_BYTES, opened.size) - start * FRAME_BYTES + (stop - start) * _TAG_BYTES
            sealed = memoryview(bytearray(length))
            if not self._tier.read(key, _HEADER_BYTES + start * (FRAME_BYTES + _TAG_BYTES), sealed):
                return False
            for index in range(start, stop):
                frame = sealed[(index - start) * (FRAME_BYTES + _TAG_BYTES) :][: FRAME_BYTES + _TAG_BYTES]
                if not _decrypt(opened, index, frame, offset, out):
                    return False
        return True


def _decrypt(opened: _Opened, index: int, frame: memoryview, offset: int, out: memoryview) -> bool:
    """Puts what of the frame lies in the range at its place in `out`, whose first byte is `offset` of the object."""
    start, length = index * FRAME_BYTES, len(frame) - _TAG_BYTES
    skip = max(offset - start, 0)
    take = min(offset + len(out) - start, length) - skip
    target = out[start + skip - offset :][:take]
    whole = take == length
    plain = target if whole else memoryview(bytearray(length))
    try:
        opened.cipher.decrypt_into(_nonce(index), frame, _authenticated(opened, index), plain)
    except InvalidTag:
        return False
    if not whole:
        target[:] = plain[skip : skip + take]
    return True


def _derive(key: bytes, purpose: bytes) -> bytes:
    return HKDF(SHA256(), 32, salt=None, info=purpose).derive(key)


def _nonce(index: int) -> bytes:
    return index.to_bytes(12, "little")


def _authenticated(opened: _Opened, index: int) -> bytes:
    return index.to_bytes(8, "little") + opened.label


def _sealed_size(size: int) -> int:
    return _HEADER_BYTES + size + -(-size // FRAME_BYTES) * _TAG_BYTES


def _plain_info(info: ObjectInfo) -> ObjectInfo | None:
    """The info with the size before sealing. None: nothing sealed has this size."""
    body = info.size - _HEADER_BYTES
    size = body - -(-body // (FRAME_BYTES + _TAG_BYTES)) * _TAG_BYTES
    return replace(info, size=size) if size > 0 and _sealed_size(size) == info.size else None
