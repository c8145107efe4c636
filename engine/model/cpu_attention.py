"""The attention backend of the CPU without native kernels: paged KV gathered into scratch, then torch's flash kernel.

Decode rows are computed in groups of similar context length, prefill slices in pieces of rows. The group of query
heads that share a KV head is folded into the rows, so that its keys are packed once. Masks, block lists and the split
into groups are made once per step and sliding window, not per layer.

**Row invariance.** Three measures make a row's bits depend less on its batch: padded keys are masked and their number
is rounded up to a granularity at which the kernel adds them as exact zeros; with a sliding window the first key is
aligned to the kernel's own key tile; and no tile of query rows has so few that the kernel's matrix product takes
another path. That was enough with AMX and is not on other processors, so nothing is promised: native kernels
(`native_attention.py`) do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tandem.engine.model.attention import visible_keys
from tandem.engine.model.batch import ForwardBatch, KvPool, PrefillSlice

_flash: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

_KEY_TILE = 512
"""Keys that the flash kernel handles at a time."""
_GRANULARITY = {torch.float32: 256, torch.bfloat16: 32}
"""Keys that a row's context is padded to a multiple of."""
_GROUP_BYTES = 2 << 20
"""KV a group of decode rows gathers at most, unless one row is longer: it should stay in the second-level cache."""
_GROUP_WASTE = 256
"""Padded keys that cost about as much as one more group."""
_ROW_TILE = 32
"""Query rows that the kernel handles at a time, at least."""
_PREFILL_ROWS = 384
"""Rows (tokens x heads of a group) of a prefill slice computed at a time: bounds the mask to this times the context."""
_LONG_CONTEXT, _LONG_CONTEXT_ROWS = 16_384, 64


def _fewest_rows(dtype: torch.dtype, head_dim: int) -> int:
    """Rows that a tile must have to be computed like a full one."""
    return max(2, head_dim // 24 + 1) if dtype == torch.float32 else 2


@dataclass(slots=True)
class _Gather:
    """Some blocks of one or more requests, and where in the scratch memory they are read to. All gathers share it:
    `k` and `v` are valid until the next read."""

    index: Tensor
    """int64 [2 * requests * blocks]: rows of a layer's storage seen as [K|V blocks, ...]."""
    target: Tensor
    """[2 * requests * blocks, ...]"""
    k: Tensor
    """[requests, num_kv_heads, keys, head_dim]"""
    v: Tensor
    rows: Tensor
    """[2 * requests * keys, ...]: the same memory, key by key."""
    stale: Tensor
    """int64: those of `rows` behind the end of a request, where its last block holds what others left there. They are
    masked, but a number that is not finite would come through a mask."""

    def read(self, storage: Tensor) -> None:
        """`storage`: a layer of the pool as [K|V blocks, ...]."""
        torch.index_select(storage, 0, self.index, out=self.target)
        self.rows.index_fill_(0, self.stale, 0)


@dataclass(slots=True)
class _DecodeGroup:
    rows: Tensor | None
    """int64: batch rows, None: all decode rows in order."""
    gather: _Gather
    mask: Tensor
    """[requests, 1, 1, keys], 0 or -inf."""


@dataclass(slots=True)
class _PrefillPiece:
    """Some tokens of a prefill slice."""

    row: int
    num_tokens: int
    first_key: int
    """First of the keys gathered for the slice that it reads."""
    mask: Tensor
    """[tokens * group, or a few rows more, keys], 0 or -inf."""


@dataclass(slots=True)
class _StepPlan:
    decode: list[_DecodeGroup]
    prefill: list[tuple[_Gather, list[_PrefillPiece]]]


class CpuAttention:
    """`AttentionBackend` of one model, for one thread. Scratch memory grows to what the largest gather needed."""

    row_invariant_by_construction = False

    def __init__(self, sliding_windows: tuple[int | None, ...]) -> None:
        self._windows = sliding_windows
        self._batch: ForwardBatch | None = None
        self._plans: dict[int | None, _StepPlan] = {}
        self._bands: dict[tuple[int | None, int], _Band] = {}
        self._scratch = torch.empty(0)
        self._pool: KvPool | None = None
        self._layers: list[Tensor] = []
        """Each layer of the pool as [K|V blocks, ...]."""

    def attend(self, layer: int, q: Tensor, batch: ForwardBatch, pool: KvPool) -> Tensor:
        """See `AttentionBackend`."""
        if batch is not self._batch:
            self._batch = batch
            self._plans.clear()
        if pool is not self._pool:
            self._pool = pool
            self._layers = [pool.storage[index].view(2 * pool.num_blocks, -1) for index in range(pool.num_layers)]
        window = self._windows[layer]
        plan = self._plans.get(window)
        if plan is None:
            plan = self._plans[window] = self._plan(window, q, batch, pool)
        heads = q.view(q.shape[0], pool.num_kv_heads, -1, q.shape[2])
        storage = self._layers[layer]
        if not plan.prefill and len(plan.decode) == 1:
            return self._decode(heads, plan.decode[0], storage).reshape(q.shape[0], -1)
        out = torch.empty(q.shape[0], q.shape[1] * q.shape[2], dtype=q.dtype)
        for group in plan.decode:
            rows = group.rows
            if rows is None:
                out[: batch.num_decode] = self._decode(heads[: batch.num_decode], group, storage).flatten(1)
            else:
                out.index_copy_(0, rows, self._decode(heads.index_select(0, rows), group, storage).flatten(1))
        for gather, pieces in plan.prefill:
            gather.read(storage)
            for piece in pieces:
                self._prefill(heads, gather, piece, out)
        return out

    def _decode(self, q: Tensor, group: _DecodeGroup, storage: Tensor) -> Tensor:
        """q and result [requests, num_kv_heads, group, head_dim]."""
        gather = group.gather
        gather.read(storage)
        heads = q.shape[2]
        if q.dtype == torch.float32:
            q = F.pad(q, (0, 0, 0, max(0, _fewest_rows(q.dtype, q.shape[3]) - heads)))
        out: Tensor = _flash(q, gather.k, gather.v, 0.0, False, attn_mask=group.mask)[0]
        return out[:, :, :heads]

    def _prefill(self, heads: Tensor, gather: _Gather, piece: _PrefillPiece, out: Tensor) -> None:
        """heads [N, num_kv_heads, group, head_dim]; `gather` is read; writes rows of `out`."""
        first, count = piece.row, piece.num_tokens
        q = heads[first : first + count].transpose(0, 1).flatten(1, 2).unsqueeze(0)
        spare = piece.mask.shape[0] - q.shape[2]
        if spare:
            q = F.pad(q, (0, 0, 0, spare))
        keys = slice(piece.first_key, piece.first_key + piece.mask.shape[1])
        k, v = gather.k[:, :, keys], gather.v[:, :, keys]
        o: Tensor = _flash(q, k, v, 0.0, False, attn_mask=piece.mask[None, None])[0]
        o = o[0, :, : count * heads.shape[2]].view(heads.shape[1], count, heads.shape[2], -1).transpose(0, 1)
        out[first : first + count].view(o.shape).copy_(o)

    def _gather(self, blocks: Tensor, ends: Tensor, pool: KvPool) -> _Gather:
        """blocks int64 [requests, blocks]; ends int64 [requests]: keys of each that are its own."""
        index = blocks.flatten()
        index = torch.cat((index, index + pool.num_blocks))
        width = pool.block_size * pool.num_kv_heads * pool.head_dim
        size = index.numel() * width
        if self._scratch.numel() < size or self._scratch.dtype != pool.storage.dtype:
            self._scratch = torch.empty(size, dtype=pool.storage.dtype)
        flat = self._scratch[:size]
        k, v = flat.view(2, blocks.shape[0], -1, pool.num_kv_heads, pool.head_dim).transpose(2, 3).unbind(0)
        keys = torch.arange(blocks.shape[1] * pool.block_size)
        ends = ends.unsqueeze(1)
        full = -(-ends // pool.block_size) * pool.block_size
        stale = ((keys >= ends) & (keys < full)).flatten().nonzero().squeeze(1)
        stale = torch.cat((stale, stale + blocks.shape[0] * len(keys)))
        return _Gather(index, flat.view(-1, width), k, v, flat.view(-1, width // pool.block_size), stale)

    def _plan(self, window: int | None, q: Tensor, batch: ForwardBatch, pool: KvPool) -> _StepPlan:
        step = math.lcm(pool.block_size, _GRANULARITY.get(q.dtype, pool.block_size)) // pool.block_size
        decode = self._plan_decode(window, step, q, batch, pool)
        prefill = []
        for piece in batch.prefills:
            positions = batch.positions[piece.row : piece.row + piece.num_tokens]
            prefill.append(self._plan_slice(piece, positions, window, step, q, pool))
        return _StepPlan(decode, prefill)

    def _plan_decode(
        self, window: int | None, step: int, q: Tensor, batch: ForwardBatch, pool: KvPool
    ) -> list[_DecodeGroup]:
        row_bytes = pool.row_bytes * pool.block_size
        lengths = batch.context_lens.tolist()
        starts = [_first_block(length - 1, window, pool.block_size) for length in lengths]
        spans = [
            _round_up(-(-length // pool.block_size) - start, step)
            for length, start in zip(lengths, starts, strict=True)
        ]
        decode = []
        for rows in _group_rows(spans, max(1, _GROUP_BYTES // row_bytes), _GROUP_WASTE // pool.block_size):
            every = len(rows) == len(lengths)
            index = None if every else torch.tensor(rows)
            tables = batch.block_tables if index is None else batch.block_tables.index_select(0, index)
            ends = batch.context_lens if index is None else batch.context_lens.index_select(0, index)
            first, span = [starts[row] for row in rows], max(spans[row] for row in rows)
            decode.append(self._decode_group(index, tables, ends, first, span, window, q, pool))
        return decode

    def _decode_group(
        self,
        rows: Tensor | None,
        tables: Tensor,
        ends: Tensor,
        starts: Sequence[int],
        span: int,
        window: int | None,
        q: Tensor,
        pool: KvPool,
    ) -> _DecodeGroup:
        """`tables`, `ends` and `starts` (first blocks) are those of `rows`; each row reads `span` blocks."""
        first = torch.tensor(starts).unsqueeze(1)
        columns = first + torch.arange(span)
        blocks = tables.gather(1, columns.clamp_max(tables.shape[1] - 1))
        blocks.masked_fill_(columns >= tables.shape[1], 0)
        positions = first * pool.block_size + torch.arange(span * pool.block_size)
        last = (ends - 1).unsqueeze(1)
        visible = positions <= last
        if window is not None:
            visible &= positions > last - window
        mask = torch.zeros(visible.shape, dtype=q.dtype).masked_fill_(~visible, -torch.inf)
        return _DecodeGroup(
            rows, self._gather(blocks, ends - first.squeeze(1) * pool.block_size, pool), mask[:, None, None]
        )

    def _plan_slice(
        self, piece: PrefillSlice, positions: Tensor, window: int | None, step: int, q: Tensor, pool: KvPool
    ) -> tuple[_Gather, list[_PrefillPiece]]:
        """`positions` int64 [piece.num_tokens]."""
        block_size, total = pool.block_size, piece.end
        start = _first_block(int(positions[0]), window, block_size)
        count = _round_up(-(-total // block_size) - start, step)
        blocks = piece.block_ids[start : -(-total // block_size)]
        ends = torch.tensor([total - start * block_size])
        gather = self._gather(F.pad(blocks, (0, count - blocks.numel())).unsqueeze(0), ends, pool)
        rows = _PREFILL_ROWS if total <= _LONG_CONTEXT else _LONG_CONTEXT_ROWS
        group = q.shape[1] // pool.num_kv_heads
        tokens = max(1, rows // group)
        band = self._bands.get((window, rows))
        if band is None:
            band = self._bands[window, rows] = _Band(window, tokens, group, _fewest_rows(q.dtype, q.shape[2]), q.dtype)
        pieces = []
        for offset in range(0, piece.num_tokens, tokens):
            size = min(tokens, piece.num_tokens - offset)
            own = positions[offset : offset + size]
            lowest, highest = int(own[0]), int(own[-1])
            first = _first_block(lowest, window, block_size) * block_size
            keys = _round_up(highest + 1 - first, step * block_size)
            if highest - lowest + 1 == size:
                mask = band.mask(lowest - first, size, keys)
            else:
                mask = band.mask_at(own - first, keys)
            pieces.append(_PrefillPiece(piece.row + offset, size, first - start * block_size, mask))
        return gather, pieces


class _Band:
    """Causal masks of all offsets as views of one matrix: rows that follow one another see the same diagonal band
    wherever their keys begin. Others have a mask made for them."""

    def __init__(self, window: int | None, tokens: int, group: int, fewest_rows: int, dtype: torch.dtype) -> None:
        self._window = window
        self._tokens = tokens
        self._group = group
        self._fewest_rows = fewest_rows
        self._dtype = dtype
        self._offset = -1
        self._matrix = torch.empty(0)

    def mask(self, offset: int, tokens: int, keys: int) -> Tensor:
        """[tokens * group, or more so that no tile has too few rows, keys] of 0 and -inf, for `tokens` tokens of which
        the first is key number `offset`."""
        if offset > self._offset or keys - offset > self._matrix.shape[1] - self._offset:
            self._grow(offset, keys - offset)
        shift = self._offset - offset
        return self._matrix[: self._rows(tokens), shift : shift + keys]

    def mask_at(self, positions: Tensor, keys: int) -> Tensor:
        """The same for tokens at `positions` int64 [tokens], counted from the first key."""
        rows = positions.repeat_interleave(self._group)
        spare = rows[-1:].expand(self._rows(len(positions)) - len(rows))
        return self._of(torch.cat((rows, spare)), keys)

    def _rows(self, tokens: int) -> int:
        """Rows of a mask for so many tokens."""
        rows = tokens * self._group
        last = rows % _ROW_TILE
        return rows + max(0, self._fewest_rows - last) if last else rows

    def _of(self, positions: Tensor, keys: int) -> Tensor:
        visible = visible_keys(positions, torch.arange(keys), self._window)
        return torch.zeros(visible.shape, dtype=self._dtype).masked_fill_(~visible, -torch.inf)

    def _grow(self, offset: int, after: int) -> None:
        offset = self._offset if offset <= self._offset else max(offset, 2 * self._offset)
        after = max(after, self._tokens + _KEY_TILE)
        positions = torch.arange(self._tokens + self._fewest_rows).repeat_interleave(self._group) + offset
        self._matrix = self._of(positions, offset + after)
        self._offset = offset


def _first_block(position: int, window: int | None, block_size: int) -> int:
    """The first block that the query at `position` reads."""
    if window is None or position < window:
        return 0
    tile = math.lcm(_KEY_TILE, block_size)
    return (position - window + 1) // tile * tile // block_size


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _group_rows(spans: Sequence[int], most: int, waste: int) -> list[list[int]]:
    """Splits rows by the number of blocks they read. A group reads at most `most` blocks (or is one row) and pads by
    at most `waste` in all. One group of all rows is in ascending order."""
    if not spans:
        return []
    if len(spans) * max(spans) <= most and len(spans) * max(spans) - sum(spans) <= waste:
        return [list(range(len(spans)))]
    groups: list[list[int]] = []
    longest = padding = 0
    for row in sorted(range(len(spans)), key=spans.__getitem__, reverse=True):
        padding += longest - spans[row]
        if not groups or (len(groups[-1]) + 1) * longest > most or padding > waste:
            groups.append([])
            longest, padding = spans[row], 0
        groups[-1].append(row)
    return groups
