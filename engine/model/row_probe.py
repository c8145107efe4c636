"""Measures, on this machine, whether a row's bits depend on what is computed with it.

Library kernels add in another order for another number of rows on one processor and not on another, and their authors
promise nothing. So a model without `batch_invariant` is tried out while it is loaded: one prompt as a whole, then parts
of it again, decoded and in chunks, in batches with every row count that linear layers are computed with, compared bit
by bit. One layer of each kind and the head stand for the model.

Row counts are few (`linear.MOST_ROWS`). Attention has a shape for each chunk and context, of which no probe tries
enough: torch's kernel passed here and failed one of a few hundred random batches. So nothing is promised unless all but
the linear layers is row-invariant by construction (`native.py`).

The answer is kept in the user's cache folder for the same weights, libraries, processor, settings and sources.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from blake3 import blake3
from torch import Tensor

from tandem.engine.model.batch import ForwardBatch, KvPool, PrefillSlice
from tandem.engine.model.linear import MOST_ROWS, padded_rows
from tandem.engine.model.model import Decoder
from tandem.engine.model.native_build import user_cache

logger = logging.getLogger(__name__)

PROMPT_TOKENS = 737
"""More than the 512 keys that torch's attention takes at a time, and a multiple of nothing."""
BUDGET_S = 5.0
"""Processor time of each thread. A model so large that it takes longer gets no promise without `batch_invariant`."""
_BLOCK_SIZE = 16
_TRIAL_ROWS = 64
_SEED = 20
_KEPT = 200
"""Answers in the cache folder."""
_SOURCES = ("*.c", "*.py", "kernels/*.py")
_ENVIRONMENT = ("ATEN_", "DNNL_", "MKL_", "ONEDNN_", "TORCH")
"""Beginnings of the names of variables that choose kernels."""


@dataclass(frozen=True, slots=True)
class RowPromise:
    """Whether a row's logits and KV depend on its own tokens only, bit for bit, however it is batched or chunked."""

    holds: bool
    reason: str
    """Reason for the log."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens [start, stop) of the prompt: a slice of a prefill or, if `decoded`, one decode row."""

    start: int
    stop: int
    decoded: bool = False


def row_promise(decoder: Decoder, identity: bytes) -> RowPromise:
    """What was measured before for `identity` (weights, dtype, ...) under these conditions, or is measured now."""
    if decoder.device.type != "cpu":
        return RowPromise(False, "not measured on a GPU")
    if decoder.depends_on_torch:
        return RowPromise(False, "torch's attention and norms have too many shapes to try them all")
    path = user_cache() / f"rows-{_conditions(decoder, identity)}.json"
    known = _read(path)
    if known is None:
        known = measure(decoder)
        _write(path, known)
    return known


def measure(decoder: Decoder, budget_s: float = BUDGET_S) -> RowPromise:
    """Stops at the first row that differs. `budget_s` is processor time for each thread of torch."""
    probe = _Probe(decoder)
    batches = list(plan(probe.tokens))
    budget_s *= torch.get_num_threads()
    if probe.trial_s() / _TRIAL_ROWS * (probe.tokens + sum(map(_rows, batches))) > 2 * budget_s:
        return RowPromise(False, f"the model is too large to be measured in {budget_s:g} s")
    started = time.process_time()
    whole = probe.run([Segment(0, probe.tokens)])
    kept = probe.kv()
    for number, batch in enumerate(batches, start=1):
        if time.process_time() - started > budget_s:
            return RowPromise(False, f"it could not be measured in {budget_s:g} s")
        logits = probe.run(batch)
        expected = torch.cat([whole[segment.start : segment.stop] for segment in batch])
        if not (_same_bits(logits, expected) and _same_bits(probe.kv(), kept)):
            return RowPromise(False, f"batch {number} of {len(batches)}, of {_rows(batch)} rows, had other bits")
    return RowPromise(True, f"{len(batches)} batches had the bits of one prompt")


def plan(tokens: int) -> Iterator[list[Segment]]:
    """Batches of parts of one prompt of `tokens` tokens, small ones first: each row count that linear layers are
    computed with, decode rows alone, beside a chunk, and chunks alone; chunks of odd sizes and around tiles, at the
    end, where they attend to the most keys."""
    draw = random.Random(_SEED)
    for position in (0, 1, tokens // 2, tokens - 1):
        yield [Segment(position, position + 1, decoded=True)]
    for size in (1, 2, 11, 15, 33, 97):
        if size < tokens:
            yield [Segment(tokens - size, tokens)]
    counts = sorted({padded_rows(rows) for rows in range(1, min(MOST_ROWS, tokens) + 1)})
    below = 0
    for index, count in enumerate(counts):
        rows = min(draw.randint(below + 1, count), tokens)
        kind = index % 3 if rows <= _TRIAL_ROWS else 1 + index % 2
        decodes = rows if kind == 0 else draw.randint(1, min(rows, 16)) if kind == 1 else 0
        yield _parts(draw, tokens, decodes, rows - decodes)
        below = count


def _parts(draw: random.Random, tokens: int, decodes: int, rows: int) -> list[Segment]:
    """One or two chunks of `rows` tokens in all, and decode rows of tokens outside of them."""
    start = draw.randint(0, tokens - rows - decodes)
    outside = [position for position in range(tokens) if not start <= position < start + rows]
    segments = [Segment(at, at + 1, decoded=True) for at in draw.sample(outside, decodes)]
    if rows:
        cut = draw.randint(start, start + rows - 1)
        segments += [Segment(cut, start + rows)] + ([Segment(start, cut)] if cut > start else [])
    return segments


def _rows(batch: list[Segment]) -> int:
    return sum(segment.stop - segment.start for segment in batch)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return bool(a.contiguous().view(torch.uint8).eq(b.contiguous().view(torch.uint8)).all())


class _Probe:
    """A decoder cut down to one layer of each kind, and the KV of one prompt. A part of the prompt that is computed
    again writes the rows that are there already."""

    def __init__(self, decoder: Decoder) -> None:
        config = decoder.config
        windows = config.sliding_windows
        self._layers = sorted({window: layer for layer, window in enumerate(windows)}.values())
        self._decoder = decoder.with_layers(self._layers)
        self.tokens = min(PROMPT_TOKENS, config.max_position_embeddings)
        self._text = torch.tensor(random.Random(_SEED).choices(range(config.vocab_size), k=self.tokens))
        blocks = -(-self.tokens // _BLOCK_SIZE)
        self._table = torch.tensor(random.Random(_SEED).sample(range(1, blocks + 1), blocks))
        self._pool = KvPool(
            config.num_layers,
            blocks + 1,
            _BLOCK_SIZE,
            config.num_kv_heads,
            config.head_dim,
            decoder.dtype,
            decoder.device,
        )

    def trial_s(self) -> float:
        """Processor time of a batch of _TRIAL_ROWS rows, the second time."""
        batch = [Segment(0, min(_TRIAL_ROWS, self.tokens))]
        self.run(batch)
        started = time.process_time()
        self.run(batch)
        return time.process_time() - started

    def run(self, segments: list[Segment]) -> Tensor:
        """Logits of the rows of `segments`, float32 [rows, vocab_size]; decoded ones come first."""
        positions = torch.cat([torch.arange(segment.start, segment.stop) for segment in segments])
        decodes = sum(segment.decoded for segment in segments)
        slices, row = [], decodes
        for segment in segments[decodes:]:
            used = self._table[: -(-segment.stop // _BLOCK_SIZE)]
            slices.append(PrefillSlice(row, segment.stop - segment.start, segment.stop, used))
            row += segment.stop - segment.start
        lengths = positions[:decodes] + 1
        longest = int(lengths.max()) if decodes else 0
        batch = ForwardBatch(
            token_ids=self._text[positions],
            positions=positions,
            slots=self._table[positions // _BLOCK_SIZE] * _BLOCK_SIZE + positions % _BLOCK_SIZE,
            num_decode=decodes,
            block_tables=self._table[: -(-longest // _BLOCK_SIZE)].repeat(decodes, 1),
            context_lens=lengths,
            max_context_len=longest,
            prefills=slices,
            logit_rows=torch.arange(len(positions)),
        )
        return self._decoder.forward(batch, self._pool)

    def kv(self) -> Tensor:
        return self._pool.storage[self._layers].clone()


def _conditions(decoder: Decoder, identity: bytes) -> str:
    """Digest of all that the answer depends on."""
    chosen = sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith(_ENVIRONMENT))
    parts = [identity, torch.__version__.encode(), torch.__config__.show().encode(), _processor().encode()]
    parts += [str(torch.get_num_threads()).encode(), decoder.kernels.encode(), "\n".join(chosen).encode()]
    folder = Path(__file__).parent
    parts += [path.read_bytes() for pattern in _SOURCES for path in sorted(folder.glob(pattern))]
    digest = blake3()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:32]


def _processor() -> str:
    """Model and instructions of the first processor, as Linux tells them."""
    wanted = ("vendor_id", "cpu family", "model", "stepping", "model name", "flags", "Features", "CPU part")
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except (OSError, UnicodeDecodeError):
        return platform.processor()
    return "\n".join(line for line in first.splitlines() if line.partition("\t")[0].strip() in wanted)


def _read(path: Path) -> RowPromise | None:
    """None where there is nothing that can be believed."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        holds, reason = values["holds"], values["reason"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return RowPromise(holds, reason) if isinstance(holds, bool) and isinstance(reason, str) else None


def _write(path: Path, promise: RowPromise) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump(asdict(promise), file)
        Path(file.name).replace(path)
        for old in sorted(path.parent.glob("rows-*.json"), key=lambda found: found.stat().st_mtime)[:-_KEPT]:
            old.unlink(missing_ok=True)
    except OSError as error:
        logger.info("what was measured about rows cannot be kept (%s), the next start measures again", error)
