"""Drives a decoder through a paged pool by hand: what the engine's scheduler and runner do, without them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tandem.engine.model.batch import ForwardBatch, KvPool, PrefillSlice
from tandem.engine.model.loader import LoadedModel

BLOCK_SIZE = 16


class PagedModel:
    """Some requests of one model, each with blocks scattered over the pool. Unused KV is noise, not zeros."""

    def __init__(self, loaded: LoadedModel, requests: int, max_tokens: int, *, seed: int = 0) -> None:
        config = loaded.config
        self.decoder = loaded.decoder
        width = -(-max_tokens // BLOCK_SIZE)
        generator = torch.Generator().manual_seed(seed)
        self.pool = KvPool(
            config.num_layers,
            requests * width + 8,
            BLOCK_SIZE,
            config.num_kv_heads,
            config.head_dim,
            loaded.dtype,
            loaded.device,
        )
        self.pool.storage[:, :, 1:].normal_(generator=generator)
        order = torch.randperm(requests * width + 7, generator=generator)[: requests * width] + 1
        self.tables = order.view(requests, width)
        self.lengths = [0] * requests

    def step(
        self,
        decodes: Sequence[tuple[int, int]] = (),
        prefills: Sequence[tuple[int, Sequence[int]]] = (),
        on_layer: Callable[[int], None] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """One forward pass: `decodes` are (request, token), `prefills` (request, tokens). Returns the logits of the
        decode rows [B, vocab] and of each prefill [tokens, vocab]."""
        tokens, positions, slots, slices = [], [], [], []
        for request, new in [(r, [token]) for r, token in decodes] + [(r, list(new)) for r, new in prefills]:
            start = self.lengths[request]
            place = torch.arange(start, start + len(new))
            if len(positions) >= len(decodes):
                used = self.tables[request, : -(-(start + len(new)) // BLOCK_SIZE)]
                slices.append(PrefillSlice(len(tokens), len(new), start + len(new), used))
            slots.append(self.tables[request, place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE)
            tokens += new
            positions.append(place)
            self.lengths[request] += len(new)
        rows = [request for request, _ in decodes]
        lengths = torch.tensor([self.lengths[row] for row in rows], dtype=torch.int64)
        longest = max(lengths.tolist(), default=0)
        tables = self.tables[rows, : -(-longest // BLOCK_SIZE)].clone()
        for table, length in zip(tables, lengths.tolist(), strict=True):
            table[-(-length // BLOCK_SIZE) :] = 0
        batch = ForwardBatch(
            token_ids=torch.tensor(tokens),
            positions=torch.cat(positions),
            slots=torch.cat(slots),
            num_decode=len(rows),
            block_tables=tables,
            context_lens=lengths,
            max_context_len=longest,
            prefills=slices,
            logit_rows=torch.arange(len(tokens)),
        )
        logits = self.decoder.forward(batch, self.pool, on_layer)
        return logits[: len(rows)], [logits[s.row : s.row + s.num_tokens] for s in slices]

    def prefill(self, request: int, tokens: Sequence[int], chunk: int | None = None) -> Tensor:
        """Logits [tokens, vocab] of a prompt computed in chunks."""
        size = chunk or len(tokens)
        pieces = [tokens[start : start + size] for start in range(0, len(tokens), size)]
        return torch.cat([self.step(prefills=[(request, piece)])[1][0] for piece in pieces])
