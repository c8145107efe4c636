"""Runs the model once for every row count that a step may have, before a worker says that it is ready.

oneDNN makes a kernel for each row count it meets and Triton compiles on first use. Without this the first request of a
fresh worker takes twice its time, and memory grows for as long as row counts turn up that were not there before.
"""

from __future__ import annotations

import math
import time

import torch

from tandem.common.sampling import SamplingParams
from tandem.engine.model.batch import ForwardBatch, KvPool, PrefillSlice
from tandem.engine.model.linear import padded_rows
from tandem.engine.model.loader import LoadedModel
from tandem.engine.step.drawing import LARGEST, drop_unlikely, race

LONGEST_S = 5.0
"""A large model on a CPU needs minutes for all row counts; what is not reached in this time is made on first use."""
LONG_CONTEXT = 512
"""Tokens of a context that attention on a GPU cuts into splits, which another kernel merges."""


def warm_up(loaded: LoadedModel, pool: KvPool, max_num_seqs: int, max_num_batched_tokens: int) -> float:
    """Decodes and prefills rows of padding; K and V land in block 0, which belongs to nobody. Returns the seconds."""
    device, started = loaded.device, time.monotonic()
    longest_prompt = min(max_num_batched_tokens, loaded.config.max_position_embeddings)
    loaded.decoder.reach(longest_prompt)
    batches = [_decodes(rows, pool.block_size, device) for rows in row_counts(max_num_seqs)]
    if device.type == "cuda":  # kernels of their own, which no other batch here needs: before time is up
        context = min(LONG_CONTEXT, loaded.config.max_position_embeddings - 1)
        loaded.decoder.reach(context + 1)
        batches.insert(0, _decodes(1, pool.block_size, device, context))
        _draw(max_num_seqs, loaded.config.vocab_size, device)
    batches += [_prompt(rows, pool.block_size, device) for rows in row_counts(longest_prompt)]
    with torch.inference_mode():
        for batch in batches:
            loaded.decoder.forward(batch, pool)
            if time.monotonic() - started > LONGEST_S:
                break
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.monotonic() - started


def row_counts(most: int) -> list[int]:
    """Every row count that linear layers are run with for up to `most` rows, in ascending order."""
    return sorted({padded_rows(rows) for rows in range(1, most + 1)})


def _draw(rows: int, vocab_size: int, device: torch.device) -> None:
    """Draws tokens in every way that requests ask for: a GPU loads the code of each operation as it is first used."""
    with torch.inference_mode():
        probs = torch.full((rows, vocab_size), 1.0 / vocab_size, device=device)
        everything = SamplingParams(top_k=2 * LARGEST, top_p=0.5, min_p=0.01)
        for params in (SamplingParams(top_k=20, top_p=0.9), everything, SamplingParams(top_p=0.99)):
            race(drop_unlikely(probs, [params] * rows, LARGEST), list(range(rows)))
        torch.softmax(probs, dim=-1).argmax(dim=-1).tolist()


def _decodes(rows: int, block_size: int, device: torch.device, context: int | None = None) -> ForwardBatch:
    """One token each after a `context`, half a block unless it is given; all of its blocks are block 0."""
    position = context or block_size // 2
    return ForwardBatch(
        token_ids=torch.zeros(rows, dtype=torch.int64, device=device),
        positions=torch.full((rows,), position, dtype=torch.int64, device=device),
        slots=torch.full((rows,), position % block_size, dtype=torch.int64, device=device),
        num_decode=rows,
        block_tables=torch.zeros((rows, position // block_size + 1), dtype=torch.int64, device=device),
        context_lens=torch.full((rows,), position + 1, dtype=torch.int64, device=device),
        max_context_len=position + 1,
        prefills=[],
        logit_rows=torch.arange(rows, device=device),
    )


def _prompt(rows: int, block_size: int, device: torch.device) -> ForwardBatch:
    """One prompt of `rows` tokens, all of its blocks block 0."""
    positions = torch.arange(rows, device=device)
    blocks = torch.zeros(math.ceil(rows / block_size), dtype=torch.int64, device=device)
    return ForwardBatch(
        token_ids=torch.zeros(rows, dtype=torch.int64, device=device),
        positions=positions,
        slots=positions % block_size,
        num_decode=0,
        block_tables=torch.zeros((0, 1), dtype=torch.int64, device=device),
        context_lens=torch.zeros(0, dtype=torch.int64, device=device),
        max_context_len=0,
        prefills=[PrefillSlice(0, rows, rows, blocks)],
        logit_rows=torch.tensor([rows - 1], device=device),
    )
