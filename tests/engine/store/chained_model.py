"""A model whose every KV row is a digest of the rows before it: one row that is not exact makes all later ones differ,
and what exact rows are is a function of the tokens alone (`exact_rows`)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tandem.engine.model.batch import ForwardBatch, KvPool

Rows = npt.NDArray[np.float32]
"""[layer, token, K|V, channel]"""

FIRST_TOKEN = 3


class _Chain:
    """One layer of one text: reads rows in order, makes the next one."""

    def __init__(self, layer: int, channels: int) -> None:
        self._digest = hashlib.blake2b(bytes([layer]))
        self._channels = channels

    def copy(self) -> _Chain:
        twin = _Chain(0, self._channels)
        twin._digest = self._digest.copy()
        return twin

    def read(self, rows: Rows) -> None:
        """[..., K|V, channel]"""
        self._digest.update(rows.tobytes())

    def make(self, token: int) -> Rows:
        """The row of `token`, which is read at once: [K|V, channel]."""
        seed = self._digest.copy()
        seed.update(token.to_bytes(4, "little"))
        raw = hashlib.shake_128(seed.digest()).digest(8 * self._channels)
        row = (np.frombuffer(raw, "<u4").astype(np.float32) / np.float32(2**31) - 1).reshape(2, self._channels)
        self.read(row)
        return row

    def choose(self, vocab_size: int) -> int:
        """The token that follows the rows read so far."""
        return FIRST_TOKEN + int.from_bytes(self._digest.digest()[:4], "little") % (vocab_size - FIRST_TOKEN)


class ChainedDecoder:
    """Stands in for `Decoder`."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def reach(self, positions: int) -> None:
        """Any position is fine."""

    def forward(
        self,
        batch: ForwardBatch,
        pool: KvPool,
        on_layer: Callable[[int], None],
        before_attention: Callable[[int], None] | None,
    ) -> Tensor:
        texts = list(_texts(batch, pool.block_size))
        chosen = [0] * len(batch.token_ids)
        channels = pool.num_kv_heads * pool.head_dim
        for layer in range(pool.num_layers):
            if before_attention is not None:
                before_attention(layer)
            for row, count, slots in texts:
                chain, place, made = _Chain(layer, channels), 0, []
                positions = batch.positions[row : row + count]
                for index, position in enumerate(positions.tolist(), row):
                    chain.read(read_rows(pool, layer, slots[place:position]))
                    made.append(chain.make(int(batch.token_ids[index])))
                    chosen[index] = chain.choose(self._vocab_size)
                    place = position + 1
                payload = np.ascontiguousarray(np.stack(made, axis=1))
                pool.write_rows(layer, slots[positions], memoryview(payload).cast("B"))
            on_layer(layer)
        logits = torch.zeros(len(batch.logit_rows), self._vocab_size)
        for place, row in enumerate(batch.logit_rows.tolist()):
            logits[place, chosen[row]] = 1.0
        return logits


def _texts(batch: ForwardBatch, block_size: int) -> Any:
    """(first row in the batch, rows, slots of all its tokens so far) of each request."""
    for row in range(batch.num_decode):
        yield row, 1, _slots(batch.block_tables[row], int(batch.context_lens[row]), block_size)
    for part in batch.prefills:
        yield part.row, part.num_tokens, _slots(part.block_ids, part.end, block_size)


def _slots(blocks: Tensor, count: int, block_size: int) -> Tensor:
    return (blocks[:, None] * block_size + torch.arange(block_size)).flatten()[:count]


def read_rows(pool: KvPool, layer: int, slots: Tensor) -> Rows:
    """[token, K|V, channel]"""
    raw = bytearray(slots.numel() * pool.row_bytes)
    if raw:
        pool.read_rows(layer, slots, memoryview(raw))
    return np.frombuffer(raw, np.float32).reshape(2, slots.numel(), pool.row_bytes // 8).transpose(1, 0, 2)


class Exact:
    """What a worker computes that uses nothing but exact KV. Remembers every text it was asked for."""

    def __init__(self, num_layers: int, channels: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._shape = (num_layers, channels)
        self._known: dict[tuple[int, ...], tuple[list[_Chain], Rows]] = {
            (): ([_Chain(layer, channels) for layer in range(num_layers)], np.empty((num_layers, 0, 2, channels)))
        }

    def rows(self, tokens: Sequence[int]) -> Rows:
        return self._text(tuple(tokens))[1]

    def next_token(self, tokens: Sequence[int]) -> int:
        return self._text(tuple(tokens))[0][-1].choose(self._vocab_size)

    def output(self, tokens: Sequence[int], count: int) -> list[int]:
        text = list(tokens)
        for _ in range(count):
            text.append(self.next_token(text))
        return text[len(tokens) :]

    def _text(self, tokens: tuple[int, ...]) -> tuple[list[_Chain], Rows]:
        known = self._known.get(tokens)
        if known is None:
            start = len(tokens) - 1
            while tokens[:start] not in self._known:
                start -= 1
            chains, rows = self._known[tokens[:start]]
            chains = [chain.copy() for chain in chains]
            new = [[chain.make(token) for token in tokens[start:]] for chain in chains]
            known = chains, np.concatenate([rows, np.array(new, np.float32)], axis=1)
            self._known[tokens] = known
        return known
