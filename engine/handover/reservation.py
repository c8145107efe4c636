"""KV blocks of a request that wait for KV from elsewhere: the engine's side of `KvReservation`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
from torch import Tensor

from tandem.engine.model.batch import KvPool, all_finite
from tandem.engine.request import RequestOutput


class Reservation:
    """Made on the engine thread; written, completed and failed from transport threads.

    It ends once: by `complete`, by `fail`, or by `close` when the engine ends the request. Every write happens under a
    lock that each of them takes, so blocks are never freed, nor computed into, while bytes arrive.
    """

    def __init__(
        self,
        pool: KvPool,
        slots: Tensor,
        skip_tokens: int,
        completed: Callable[[RequestOutput], None],
        failed: Callable[[str], None],
    ) -> None:
        """`slots` int64 [known tokens]; `completed` and `failed` post to the engine thread; one of them is called at
        most once."""
        self.made_at = time.monotonic()
        self._pool = pool
        self._slots = slots
        self._skip_tokens = skip_tokens
        self._completed = completed
        self._failed = failed
        self._lock = threading.Lock()
        self._open = True
        self._finite = True
        self._covered = np.zeros((pool.num_layers, slots.numel()), dtype=np.bool_)
        self._covered[:, :skip_tokens] = True

    @property
    def skip_tokens(self) -> int:
        return self._skip_tokens

    def write(self, layer: int, start: int, stop: int, payload: memoryview) -> bool:
        """Rows below `skip_tokens` are shared with other requests and left as they are.

        Raises ValueError if the rows do not exist or the payload has another size; nothing is written then.
        """
        count = stop - start
        if not (0 <= layer < self._pool.num_layers and 0 <= start < stop <= self._slots.numel()):
            raise ValueError(f"rows [{start}, {stop}) of layer {layer} are outside the reservation")
        if payload.nbytes != count * self._pool.row_bytes:
            raise ValueError(f"{count} rows take {count * self._pool.row_bytes} bytes, not {payload.nbytes}")
        first = max(start, self._skip_tokens)
        finite = all_finite(payload, self._pool.storage.dtype)
        with self._lock:
            if not self._open:
                return False
            if first < stop:
                rows = payload if first == start else self._without_head(payload, first - start)
                self._pool.write_rows(layer, self._slots[first:stop], rows)
                self._covered[layer, first:stop] = True
                self._finite = self._finite and finite
        return True

    def _without_head(self, payload: memoryview, count: int) -> memoryview:
        """`payload` without the first `count` rows of its K and of its V."""
        raw, row = payload.cast("B"), self._pool.row_bytes // 2
        half = raw.nbytes // 2
        return memoryview(bytearray(raw[count * row : half]) + bytearray(raw[half + count * row :]))

    def complete(self, first: RequestOutput) -> None:
        """Raises ValueError if rows are missing or not finite, or `first` holds neither a token nor an end. Without
        effect once it has ended."""
        with self._lock:
            if not self._open:
                return
            if not self._covered.all():
                layer, row = (int(axis[0]) for axis in np.nonzero(~self._covered))
                missing = int((~self._covered).sum())
                raise ValueError(f"{missing} rows are missing, the first is row {row} of layer {layer}")
            if not self._finite:
                raise ValueError("the rows hold numbers that are not finite")
            if not first.token_ids and first.finish_reason is None:
                raise ValueError("the first output holds neither a token nor a finish reason")
            self._open = False
        self._completed(first)

    def fail(self, reason: str) -> None:
        """Gives up the hand-over, for `reason`; the prompt is then computed here. Without effect once it has ended. For
        any thread."""
        with self._lock:
            if not self._open:
                return
            self._open = False
        self._failed(reason)

    def close(self) -> None:
        """The request ended; returns once no write is in progress."""
        with self._lock:
            self._open = False
