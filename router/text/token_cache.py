"""Token ids of texts that were tokenized before: the turns of a conversation come again with every request."""

from __future__ import annotations

import sys
from collections import OrderedDict

MAX_BYTES = 32 * 2**20
"""Texts, ids and their book-keeping: about three million tokens of English."""
ENTRY_BYTES = 300
"""Bytes that an entry takes beside its text and ids."""
MAX_SHARE = 0.25
"""Share of the cache that one text may take; a longer one is not kept."""


class TokenCache:
    """Forgets what was not asked for the longest. For use by one thread.

    An entry belongs to a salt, that of the tenant's KV cache: who may not meet another's KV cannot tell from the time
    of an answer what text the other has sent either.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[tuple[bytes, str], bytes] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, salt: bytes, text: str) -> bytes | None:
        """Ids as they were put."""
        key = (salt, text)
        ids = self._kept.get(key)
        if ids is not None:
            self._kept.move_to_end(key)
        return ids

    def put(self, salt: bytes, text: str, ids: bytes) -> None:
        """Keeps the ids of a text under a tenant's salt. The oldest entries leave where the cache is full."""
        key, size = (salt, text), _size(text, ids)
        if size > self._max_bytes * MAX_SHARE or key in self._kept:
            return
        self._kept[key] = ids
        self.bytes += size
        while self.bytes > self._max_bytes:
            (_, oldest), its_ids = self._kept.popitem(last=False)
            self.bytes -= _size(oldest, its_ids)


def _size(text: str, ids: bytes) -> int:
    return sys.getsizeof(text) + sys.getsizeof(ids) + ENTRY_BYTES
