"""Replay of a trace of prompts against capacity, for each eviction policy.

    python bench/eviction.py --trace TRACE.jsonl.gz [--json FILE] [--svg FILE] [--capacities 500,1000,...]
    python bench/eviction.py --stream chat|agents|documents|azure|servegen [--trace TRACE.csv.gz]

The trace is in Mooncake's format (one JSON object a line: `input_length`, `hash_ids` of blocks of 512 tokens on a
prefix chain); a stream is one of `prompt_streams.py`. Prints a table on stderr and JSON on stdout.

Every request looks up its chain; only the leading run counts as hits. The blocks after it are computed and stored one
by one, evicting what has to leave; blocks beyond a gap that are still there count as used, but not as hits. The
capacity is in blocks of equal size. No policy looks ahead; ceilings are Belady's rule, which does, and a store that
forgets nothing.
"""

from __future__ import annotations

import argparse
import gzip
import heapq
import json
import math
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent)]

from bench.policies import POLICIES  # noqa: E402
from bench.prompt_streams import SESSIONS, azure, servegen  # noqa: E402
from bench.systems import machine  # noqa: E402
from tandem.kvstore.eviction import DEFAULT_POLICY  # noqa: E402
from tandem.kvstore.interfaces import ObjectInfo, ObjectKey  # noqa: E402

BLOCK_TOKENS = 512
BELADY = "belady"
BLOCK = ObjectInfo(size=BLOCK_TOKENS * 2560, num_tokens=BLOCK_TOKENS, recompute_s=0.05)
"""A block of a small model. Sizes and times are equal, so that only reuse decides."""
CAPACITIES = (350, 500, 700, 1000, 1500, 2000, 3000, 4000, 6000, 8000, 12000, 16000, 24000, 32000, 40000)

CAPACITIES_FOR = 43_924
"""Distinct blocks of the trace that these were chosen for."""


@dataclass(frozen=True, slots=True)
class Request:
    tokens: int
    blocks: tuple[ObjectKey, ...]


@dataclass(frozen=True, slots=True)
class Result:
    policy: str
    capacity_blocks: int | None
    """None: unlimited."""
    block_hits: float
    """Share of all blocks."""
    token_hits: float
    seconds: float = 0.0


@cache
def block_at(depth: int) -> ObjectInfo:
    """The block that has `depth` blocks of its prompt before it."""
    return replace(BLOCK, start_position=depth * BLOCK_TOKENS)


def read_trace(path: Path) -> list[Request]:
    with gzip.open(path, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    return [
        Request(row["input_length"], tuple(ObjectKey(int(block).to_bytes(32, "big")) for block in row["hash_ids"]))
        for row in rows
    ]


def read_requests(stream: str | None, trace: Path | None) -> list[Request]:
    if stream in SESSIONS:
        prompts = SESSIONS[stream].prompts()
    elif trace is None:
        raise ValueError(f"{stream} needs a trace")
    elif stream is None:
        return read_trace(trace)
    else:
        prompts = {"azure": azure, "servegen": servegen}[stream](trace)
    return [
        Request(BLOCK_TOKENS * len(prompt), tuple(ObjectKey(block.to_bytes(32, "big")) for block in prompt))
        for prompt in prompts
    ]


def replay(requests: Iterable[Request], policy_name: str, capacity_blocks: int | None) -> Result:
    """`capacity_blocks` None: nothing ever leaves, whatever the policy."""
    policy = POLICIES[policy_name]((capacity_blocks or 0) * BLOCK.size)
    resident: set[ObjectKey] = set()
    blocks = hits = tokens = token_hits = 0
    started = time.process_time()
    for request in requests:
        run = next((i for i, key in enumerate(request.blocks) if key not in resident), len(request.blocks))
        hits += run
        blocks += len(request.blocks)
        token_hits += min(run * BLOCK_TOKENS, request.tokens)
        tokens += request.tokens
        for depth, key in enumerate(request.blocks):
            if key in resident:
                policy.hit(key)
                continue
            if capacity_blocks is not None and len(resident) >= capacity_blocks:
                victim = policy.evict(lambda _key: True)
                if victim is None:
                    raise RuntimeError(f"{policy_name} found nothing to evict in a full store")
                resident.discard(victim)
            policy.insert(key, block_at(depth))
            resident.add(key)
    seconds = time.process_time() - started
    return Result(policy_name, capacity_blocks, hits / blocks, token_hits / tokens, seconds)


def belady(requests: Sequence[Request], capacity_blocks: int) -> Result:
    """What leaves is what is used next after everything else, and of one prompt the deepest."""
    next_use: dict[ObjectKey, int] = {}
    uses: list[list[int]] = []
    for index in range(len(requests) - 1, -1, -1):
        uses.append([next_use.get(key, len(requests)) for key in requests[index].blocks])
        next_use.update(dict.fromkeys(requests[index].blocks, index))
    resident: dict[ObjectKey, tuple[int, int, ObjectKey]] = {}
    heap: list[tuple[int, int, ObjectKey]] = []
    blocks = hits = tokens = token_hits = 0
    for request, coming in zip(requests, reversed(uses), strict=True):
        run = next((i for i, key in enumerate(request.blocks) if key not in resident), len(request.blocks))
        hits += run
        blocks += len(request.blocks)
        token_hits += min(run * BLOCK_TOKENS, request.tokens)
        tokens += request.tokens
        for depth, (key, index) in enumerate(zip(request.blocks, coming, strict=True)):
            while key not in resident and len(resident) >= capacity_blocks:
                worst = heapq.heappop(heap)
                if resident.get(worst[-1]) is worst:
                    del resident[worst[-1]]
            resident[key] = (-index, -depth, key)
            heapq.heappush(heap, resident[key])
    return Result(BELADY, capacity_blocks, hits / blocks, token_hits / tokens)


def table(results: Sequence[Result], ceiling: Result) -> str:
    """Markdown: hit rates in percent, and their change against LRU."""
    capacities = sorted({item.capacity_blocks for item in results if item.capacity_blocks is not None})
    rates = {(item.policy, item.capacity_blocks): item.block_hits for item in results}
    names = [name for name in (*POLICIES, BELADY) if (name, capacities[0]) in rates]
    lines = [f"| blocks | {' | '.join(names)} |", "|---:|" + "---:|" * len(names)]
    for capacity in capacities:
        base = rates["lru", capacity]
        cells = [
            f"{100 * rates[name, capacity]:.1f}"
            + ("" if name == "lru" else f" ({100 * (rates[name, capacity] / base - 1):+.1f} %)")
            for name in names
        ]
        lines.append(f"| {capacity:,} | {' | '.join(cells)} |")
    lines.append(f"| no limit | {' | '.join([f'{100 * ceiling.block_hits:.1f}'] * len(names))} |")
    return "\n".join(lines)


COLOURS = {
    "lru": "#888888",
    "s3fifo": "#1f77b4",
    "arc": "#2ca02c",
    "cost": "#ff7f0e",
    "reuse": "#d62728",
    "marking": "#9467bd",
}
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 420, 60, 20, 110, 50


def curve(results: Sequence[Result], ceiling: Result) -> str:
    """An SVG: hit rate of blocks over capacity (logarithmic), one line per policy, the ceiling dashed."""
    capacities = sorted({item.capacity_blocks for item in results if item.capacity_blocks is not None})
    low, high = math.log2(capacities[0]), math.log2(max(capacities[-1], capacities[0] + 1))
    top = math.ceil(ceiling.block_hits * 10) / 10

    def x(capacity: int) -> float:
        return LEFT + (math.log2(capacity) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(rate: float) -> float:
        return HEIGHT - BOTTOM - rate / top * (HEIGHT - TOP - BOTTOM)

    def text(at_x: float, at_y: float, content: str, anchor: str, colour: str = "#333") -> str:
        return f'<text x="{at_x:.1f}" y="{at_y:.1f}" text-anchor="{anchor}" fill="{colour}">{content}</text>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    right = WIDTH - RIGHT
    for tenth in range(round(top * 10) + 1):
        level = y(tenth / 10)
        parts.append(f'<line x1="{LEFT}" y1="{level:.1f}" x2="{right}" y2="{level:.1f}" stroke="#e5e5e5"/>')
        parts.append(text(LEFT - 8, level + 4, f"{tenth * 10} %", "end"))
    for capacity in capacities:
        parts.append(text(x(capacity), HEIGHT - BOTTOM + 18, f"{capacity:,}", "middle"))
    parts.append(text((LEFT + right) / 2, HEIGHT - 10, "capacity in blocks of 512 tokens", "middle"))
    level = y(ceiling.block_hits)
    parts.append(
        f'<line x1="{LEFT}" y1="{level:.1f}" x2="{right}" y2="{level:.1f}" stroke="#333" stroke-dasharray="5 4"/>'
    )
    parts.append(text(right + 8, level + 4, "no limit", "start"))
    for index, name in enumerate(POLICIES):
        points = sorted((r.capacity_blocks, r.block_hits) for r in results if r.policy == name and r.capacity_blocks)
        path = " ".join(f"{x(capacity):.1f},{y(rate):.1f}" for capacity, rate in points)
        width = 2.5 if name == DEFAULT_POLICY else 1.5
        parts.append(f'<polyline points="{path}" fill="none" stroke="{COLOURS[name]}" stroke-width="{width}"/>')
        parts.append(text(right + 8, HEIGHT / 2 + 18 * index, name, "start", COLOURS[name]))
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--stream", choices=(*SESSIONS, "azure", "servegen"))
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--capacities", help="default: those of docs/eviction.md, in proportion to the distinct blocks")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--svg", type=Path)
    options = parser.parse_args()
    if options.trace is None and options.stream not in SESSIONS:
        parser.error("--trace is needed, unless --stream is one that is invented")
    requests = read_requests(options.stream, options.trace)
    ceiling = replay(requests, "lru", None)
    distinct = len({key for request in requests for key in request.blocks})
    capacities = (
        [int(item) for item in options.capacities.split(",")]
        if options.capacities
        else [round(capacity * distinct / CAPACITIES_FOR) for capacity in CAPACITIES]
    )
    names = options.policies.split(",")
    results = [replay(requests, name, capacity) for capacity in capacities for name in names]
    results += [belady(requests, capacity) for capacity in capacities]
    print(table(results, ceiling), file=sys.stderr)
    uses = sum(len(request.blocks) for request in requests)
    report = {
        "requests": len(requests),
        "blocks": uses,
        "distinct_blocks": distinct,
        "ceiling": {"block_hits": round(ceiling.block_hits, 4), "token_hits": round(ceiling.token_hits, 4)},
        "microseconds_per_block": {
            name: round(
                1e6 * sum(item.seconds for item in results if item.policy == name) / (uses * len(capacities)), 2
            )
            for name in names
        },
        "default": DEFAULT_POLICY,
        "machine": machine(),
        "results": [
            {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(item).items()}
            for item in results
        ],
    }
    content = json.dumps(report, indent=1)
    print(content)
    if options.json is not None:
        options.json.write_text(content + "\n")
    if options.svg is not None:
        options.svg.write_text(curve(results, ceiling))


if __name__ == "__main__":
    main()
