"""Attention kernels on one GPU against torch's scaled_dot_product_attention (SDPA), one layer, interleaved rounds.

    python bench/kernels.py [--dtype bfloat16] [--heads 32] [--kv-heads 8] [--head-dim 128] [--rounds 5]

Prints a table on stderr and JSON on stdout. Two figures for the peer: `gather+sdpa` first copies the blocks of each
request into one tensor, as a paged cache needs; `sdpa` finds it copied already, the best that can be had.
Times are medians over rounds of medians over launches, with a cold L2 cache; the spread is the range over rounds.
Exits with 2 where there is no CUDA device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

BLOCK_SIZE = 16
DECODE = ((1, 1024), (1, 32768), (16, 2048), (64, 2048), (64, 8192), (256, 1024))
"""(requests, context)"""
PREFILL = ((1, 512, 0), (1, 2048, 0), (1, 8192, 0), (1, 512, 16384), (1, 32, 8192), (16, 512, 0))
"""(slices, tokens of each, context of each)"""


@dataclass(frozen=True, slots=True)
class Shape:
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Case:
    """Three ways to compute [requests, heads, tokens, head_dim] and what they cost at least."""

    name: str
    ways: dict[str, Callable[[], Tensor]]
    tokens: int
    kv_bytes: int
    flops: int


def paged_kv(shape: Shape, requests: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """k, v [blocks, BLOCK_SIZE, kv_heads, head_dim] and shuffled tables [requests, blocks of each]."""
    width = -(-keys // BLOCK_SIZE)
    size = (requests * width + 1, BLOCK_SIZE, shape.kv_heads, shape.head_dim)
    k, v = (torch.randn(size, dtype=shape.dtype, device=device) for _ in range(2))
    tables = (torch.randperm(requests * width, device=device) + 1).view(requests, width)
    return k, v, tables


def gather(x: Tensor, tables: Tensor, keys: int) -> Tensor:
    """[requests, kv_heads, keys, head_dim] of a paged tensor."""
    rows = x.index_select(0, tables.flatten()).view(tables.shape[0], -1, *x.shape[2:])
    return rows[:, :keys].transpose(1, 2)


def decode_case(shape: Shape, requests: int, context: int, device: torch.device) -> Case:
    from tandem.engine.model.kernels.paged_decode import paged_decode

    k, v, tables = paged_kv(shape, requests, context, device)
    q = torch.randn(requests, shape.heads, shape.head_dim, dtype=shape.dtype, device=device)
    lens = torch.full((requests,), context, device=device)
    scale = shape.head_dim**-0.5
    copied = gather(k, tables, context).contiguous(), gather(v, tables, context).contiguous()

    def ours() -> Tensor:
        return paged_decode(q, k, v, tables, lens, max_context_len=context, scale=scale)[0].unsqueeze(2)

    def sdpa(keys: Tensor, values: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q.unsqueeze(2), keys, values, enable_gqa=True)

    return Case(
        f"decode {requests} x {context}",
        {
            "tandem": ours,
            "gather+sdpa": lambda: sdpa(gather(k, tables, context), gather(v, tables, context)),
            "sdpa": lambda: sdpa(*copied),
        },
        tokens=requests,
        kv_bytes=2 * requests * context * shape.kv_heads * shape.head_dim * shape.dtype.itemsize,
        flops=4 * requests * context * shape.heads * shape.head_dim,
    )


def prefill_case(shape: Shape, slices: int, tokens: int, context: int, device: torch.device) -> Case:
    from tandem.engine.model.kernels.paged_prefill import paged_prefill

    total = context + tokens
    k, v, tables = paged_kv(shape, slices, total, device)
    q = torch.randn(slices * tokens, shape.heads, shape.head_dim, dtype=shape.dtype, device=device)
    per_request = q.view(slices, tokens, shape.heads, shape.head_dim).transpose(1, 2)
    rows = [(i * tokens, tokens, i * tables.shape[1]) for i in range(slices)]
    pieces = torch.tensor(rows, dtype=torch.int32, device=device)
    positions = torch.arange(context, total, device=device).repeat(slices)
    scale = shape.head_dim**-0.5
    copied = gather(k, tables, total).contiguous(), gather(v, tables, total).contiguous()

    def ours() -> Tensor:
        out, _ = paged_prefill(q, k, v, tables.flatten(), pieces, positions, max_tokens=tokens, scale=scale)
        return out.view(slices, tokens, shape.heads, shape.head_dim).transpose(1, 2)

    def sdpa(keys: Tensor, values: Tensor) -> Tensor:
        if context == 0:
            return F.scaled_dot_product_attention(per_request, keys, values, is_causal=True, enable_gqa=True)
        mask = causal_lower_right(tokens, total)
        return F.scaled_dot_product_attention(per_request, keys, values, attn_mask=mask, enable_gqa=True)

    pairs = slices * (tokens * context + tokens * (tokens + 1) // 2)
    return Case(
        f"prefill {slices} x {tokens} after {context}",
        {
            "tandem": ours,
            "gather+sdpa": lambda: sdpa(gather(k, tables, total), gather(v, tables, total)),
            "sdpa": lambda: sdpa(*copied),
        },
        tokens=slices * tokens,
        kv_bytes=2 * slices * total * shape.kv_heads * shape.head_dim * shape.dtype.itemsize,
        flops=4 * pairs * shape.heads * shape.head_dim,
    )


def run(case: Case, rounds: int) -> list[dict[str, object]]:
    """One record per way. Raises AssertionError where the ways disagree."""
    from triton.testing import do_bench

    expected = case.ways["sdpa"]().float()
    seconds: dict[str, list[float]] = {way: [] for way in case.ways}
    for way, compute in case.ways.items():
        error = (compute().float() - expected).abs().max().item()
        assert error < 2e-2, f"{case.name}: {way} is off by {error}"
    for _ in range(rounds):
        for way, compute in case.ways.items():
            seconds[way].append(do_bench(compute, return_mode="median") / 1e3)
    return [
        {
            "case": case.name,
            "way": way,
            "microseconds": statistics.median(times) * 1e6,
            "spread_microseconds": [min(times) * 1e6, max(times) * 1e6],
            "tokens_per_s": case.tokens / statistics.median(times),
            "gb_per_s": case.kv_bytes / statistics.median(times) / 1e9,
            "tflop_per_s": case.flops / statistics.median(times) / 1e12,
        }
        for way, times in seconds.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench/kernels.py needs a CUDA device, and torch sees none: nothing was measured.", file=sys.stderr)
        return 2
    import triton

    device = torch.device("cuda", torch.cuda.current_device())
    shape = Shape(args.heads, args.kv_heads, args.head_dim, getattr(torch, args.dtype))
    torch.manual_seed(0)
    records: list[dict[str, object]] = []
    head = f"{'case':32} {'way':12} {'us':>10} {'tokens/s':>12} {'GB/s':>8} {'TFLOP/s':>8}"
    print(head, file=sys.stderr)
    makers = [partial(decode_case, shape, *sizes, device) for sizes in DECODE]
    makers += [partial(prefill_case, shape, *sizes, device) for sizes in PREFILL]
    for make in makers:
        for record in run(make(), args.rounds):
            records.append(record)
            print(
                f"{record['case']:32} {record['way']:12} {record['microseconds']:10.1f} {record['tokens_per_s']:12.0f}"
                f" {record['gb_per_s']:8.1f} {record['tflop_per_s']:8.1f}",
                file=sys.stderr,
            )
    machine = {
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
    }
    print(json.dumps({"machine": machine, "arguments": vars(args), "block_size": BLOCK_SIZE, "results": records}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
