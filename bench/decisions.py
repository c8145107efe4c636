"""Placement decisions per second on one core, beside Dynamo's router core, with the same prompts in the same run.

    python bench/decisions.py --dynamo PATH/TO/PYTHON

A decision is a whole life cycle: hash the prompt, match it, choose, account, first token, end. Both sides have 8
workers, an index of a million blocks of 16 tokens and learn what is cached from their own decisions. `PYTHON` has
`ai-dynamo-runtime`; each side runs in a child process, which is this same file, and their rounds alternate.

Rounds last so much processor time, and that is given beside wall time, because a shared machine takes the core away now
and then. Look-ups have as many rounds. It is that of the whole process: Dynamo works on threads of its own. Three
quarters of a prompt are the same in all of its group: `begun` are the prompts whose group has been seen in the round,
`new` the others, no token of which is known. Ours decides with the garbage collector set as in the router's process.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from systems import machine

WORKERS = 8
BLOCK = 16
GROUPS = 64
SHARED = 0.75
"""Of each prompt, the same in all of its group."""
LENGTHS = (512, 2048, 16_384)
IN_FLIGHT = 64
LOOKUPS = 2000
"""In a round."""
LookUp = Callable[[int], object]
"""Looks up one of many chains of 128 blocks."""


class Side(Protocol):
    def decide(self, number: int, tokens: list[int]) -> None: ...

    def finish(self, number: int) -> None: ...


def prompts(length: int, seed: int) -> Iterator[list[int]]:
    rng = random.Random(seed)
    shared = round(length * SHARED)
    groups = [[group * 7 + length, *rng.choices(range(50_000), k=shared - 1)] for group in range(GROUPS)]
    while True:
        yield rng.choice(groups) + rng.choices(range(50_000), k=length - shared)


class Ours:
    def __init__(self, blocks: int) -> None:
        from tandem.kvstore.identity import Namespace
        from tandem.planner.perf_model import ModelShape, PerfModel
        from tandem.router.fleet.load import WorkerLoad
        from tandem.router.main import spare_collector
        from tandem.router.placing.prefix_index import PrefixIndex

        self.index = PrefixIndex(blocks)
        self.root = Namespace(bytes(32))
        model = PerfModel("nvidia-h100", ModelShape(8 * 10**9, 16 * 10**9, 131_072))
        capacity = blocks // WORKERS
        self.loads = [
            WorkerLoad(model, self.index.add(capacity), capacity * BLOCK, 256, name=f"w{i}") for i in range(WORKERS)
        ]
        self.open: dict[int, tuple[object, int, list[bytes], int]] = {}
        spare_collector()

    def decide(self, number: int, tokens: list[int]) -> None:
        from tandem.kvstore.identity import prefix_chain
        from tandem.router.fleet.load import Work
        from tandem.router.placing.placement import Request, place

        chain = prefix_chain(self.root, tokens, BLOCK)
        hits = {slot: (here * BLOCK, soon * BLOCK) for slot, here, soon in self.index.match(chain)}
        now = time.monotonic()
        placement = place(self.loads, [], Request(len(tokens)), hits, now, turn=number)
        load = self.loads[placement.decode]
        cached = sum(hits.get(load.slot, (0, 0)))
        work = Work(load, len(tokens), 256, placement.prefill_s, cached)
        work.start(now)
        self.index.promise(load.slot, chain, cached // BLOCK)
        self.open[number] = work, load.slot, chain, cached // BLOCK

    def finish(self, number: int) -> None:
        work, slot, chain, start = self.open.pop(number)
        now = time.monotonic()
        self.index.computed(slot, chain)
        work.computed(now)
        work.produced(1)
        work.end(now)
        self.index.ended(slot, chain, start)


class Dynamo:
    """In the child process only."""

    def __init__(self, blocks: int) -> None:
        os.environ.update(DYN_ROUTER_USE_KV_EVENTS="false", DYN_LOG="error", DYN_ROUTER_TTL_SECS="1000000")
        from dynamo.llm import SelectionService  # type: ignore[import-not-found]

        self.loop = asyncio.new_event_loop()
        self.service = self.loop.run_until_complete(self._make(SelectionService, blocks))

    async def _make(self, kind, blocks):  # type: ignore[no-untyped-def]
        service = kind(indexer_threads=1)
        for index in range(WORKERS):
            worker = {"worker_id": index, "model_name": "m", "endpoint": f"http://w-{index}", "data_parallel_size": 1}
            sizes = {"block_size": BLOCK, "total_kv_blocks": blocks // WORKERS, "max_num_batched_tokens": 8192}
            await service.upsert_worker({**worker, **sizes})
        return service

    def decide(self, number: int, tokens: list[int]) -> None:
        request = {"model_name": "m", "selection_id": str(number), "token_ids": tokens}
        self.loop.run_until_complete(self._reserve(request))

    def finish(self, number: int) -> None:
        self.loop.run_until_complete(self._finish(str(number)))

    async def _reserve(self, request: dict[str, object]) -> None:
        await self.service.select_and_reserve(request)

    async def _finish(self, number: str) -> None:
        await self.service.prefill_complete(number)
        await self.service.free_reservation(number)


def fill(side: Side, blocks: int, numbers: Iterator[int]) -> None:
    """The index takes in as many blocks as it holds, through the decisions themselves."""
    rng = random.Random(1)
    for _ in range(blocks // 1024):
        number = next(numbers)
        side.decide(number, rng.choices(range(50_000), k=1024 * BLOCK))
        side.finish(number)


def round_of(side: Side, length: int, seconds: float, seed: int, numbers: Iterator[int]) -> dict[str, float]:
    """Life cycles for so long (processor time), with `IN_FLIGHT` requests open at any time."""
    source = prompts(length, seed)
    ready = [next(source) for _ in range(200)]
    open_numbers: list[int] = []
    wall: list[float] = []
    cpu: list[float] = []
    new: list[bool] = []
    seen: set[int] = set()
    until = time.process_time() + seconds
    for tokens in itertools.cycle(ready):
        if time.process_time() > until:
            break
        new.append(tokens[0] not in seen)  # the first token tells the group
        seen.add(tokens[0])
        number = next(numbers)
        tokens = [*tokens[:-BLOCK], *(number * 31 % 50_000 + i for i in range(BLOCK))]  # no two prompts are equal
        at_cpu, at = time.process_time(), time.perf_counter()
        side.decide(number, tokens)
        open_numbers.append(number)
        if len(open_numbers) > IN_FLIGHT:
            side.finish(open_numbers.pop(0))
        wall.append(time.perf_counter() - at)
        cpu.append(time.process_time() - at_cpu)
    for number in open_numbers:
        side.finish(number)
    wall_cuts, cpu_cuts = statistics.quantiles(wall, n=100), statistics.quantiles(cpu, n=100)
    begun_cuts = statistics.quantiles((at for at, first in zip(cpu, new, strict=True) if not first), n=100)
    return {
        "per_s": len(wall) / sum(wall),
        "per_cpu_s": len(cpu) / max(sum(cpu), 1e-9),
        "p50_ms": wall_cuts[49] * 1e3,
        "p99_ms": wall_cuts[98] * 1e3,
        "cpu_p50_ms": cpu_cuts[49] * 1e3,
        "cpu_p99_ms": cpu_cuts[98] * 1e3,
        "begun_cpu_p99_ms": begun_cuts[98] * 1e3,
        "new_cpu_p50_ms": statistics.median(at for at, first in zip(cpu, new, strict=True) if first) * 1e3,
    }


def radix(blocks: int) -> LookUp:
    """Look-ups of 128 blocks in Dynamo's RadixTree."""
    from dynamo._core import RadixTree

    tree, length = RadixTree(), 1024
    for chain in range(blocks // length):
        ids = [{"block_hash": chain * length + i, "tokens_hash": chain * length + i} for i in range(length)]
        event = {"event_id": chain, "data": {"stored": {"parent_hash": None, "blocks": ids}}}
        tree.apply_event(chain % WORKERS, json.dumps(event).encode())
    chains = [list(range(c * length, c * length + 128)) for c in range(blocks // length)]
    return lambda number: tree.find_matches(chains[number % len(chains)])


def our_lookups(blocks: int) -> LookUp:
    from tandem.kvstore.identity import BlockHash
    from tandem.router.placing.prefix_index import PrefixIndex

    index, length = PrefixIndex(blocks), 1024
    slots = [index.add(None) for _ in range(WORKERS)]
    chains = []
    for chain in range(blocks // length):
        hashes = [BlockHash(os.urandom(32)) for _ in range(length)]
        index.stored(slots[chain % WORKERS], hashes)
        chains.append(hashes[:128])
    return lambda number: index.match(chains[number % len(chains)])


def look_ups_per_cpu_s(look_up: LookUp, seed: int) -> float:
    at = time.process_time()
    for number in range(seed * LOOKUPS, (seed + 1) * LOOKUPS):
        look_up(number)
    return LOOKUPS / (time.process_time() - at)


def serve(make: Callable[[int], Side], index: Callable[[int], LookUp]) -> None:
    """Child: a JSON line in, a JSON line out."""
    numbers = itertools.count(1)
    setup = json.loads(sys.stdin.readline())
    side = make(setup["blocks"])
    before = resident_mb()
    fill(side, setup["blocks"], numbers)
    print(json.dumps({"megabytes": resident_mb() - before}), flush=True)
    look_up = index(setup["blocks"])
    for line in sys.stdin:
        ask = json.loads(line)
        if "length" not in ask:
            print(json.dumps({"per_cpu_s": look_ups_per_cpu_s(look_up, ask["seed"])}), flush=True)
            continue
        print(json.dumps(round_of(side, ask["length"], ask["seconds"], ask["seed"], numbers)), flush=True)


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


class Child:
    def __init__(self, python: str, name: str, blocks: int) -> None:
        command = [python, __file__, "--side", name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ready = self.ask({"blocks": blocks})

    def ask(self, message: dict[str, object]) -> dict[str, float]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a child ended with {self.process.wait()}")
        answer: dict[str, float] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dynamo", metavar="PYTHON", help="interpreter with ai-dynamo-runtime; without it only ours")
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5, help="processor time of each round")
    parser.add_argument("--json", type=Path, help="also write the JSON here")
    parser.add_argument("--side", choices=("ours", "dynamo"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        serve(*((Ours, our_lookups) if args.side == "ours" else (Dynamo, radix)))
        return
    children = {"ours": Child(sys.executable, "ours", args.blocks)}
    if args.dynamo:
        children["dynamo"] = Child(args.dynamo, "dynamo", args.blocks)
    lookups: dict[str, dict[str, int]] = {}
    measured = [
        {name: child.ask({"seed": seed})["per_cpu_s"] for name, child in children.items()}
        for seed in range(args.rounds)
    ]
    for name in children:
        per_s = sorted(each[name] for each in measured)
        lookups[name] = {
            "median": round(statistics.median(per_s)),
            "least": round(per_s[0]),
            "most": round(per_s[-1]),
        }
    rows: list[dict[str, object]] = []
    for length in LENGTHS:
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in children}
        for seed in range(args.rounds):
            for name, child in children.items():
                rounds[name].append(child.ask({"length": length, "seconds": args.seconds, "seed": seed}))
        for name, results in rounds.items():
            medians = {key: round(statistics.median(r[key] for r in results), 3) for key in results[0]}
            best = round(max(r["per_s"] for r in results))
            rows.append({"tokens": length, "side": name, **medians, "best_per_s": best})
    for child in children.values():
        child.close()
    columns = (
        "per_s",
        "per_cpu_s",
        "p50_ms",
        "p99_ms",
        "cpu_p50_ms",
        "cpu_p99_ms",
        "begun_cpu_p99_ms",
        "new_cpu_p50_ms",
    )
    print(f"{'tokens':>7} {'side':<8}" + "".join(f"{name:>18}" for name in columns), file=sys.stderr)
    for row in rows:
        print(f"{row['tokens']:>7} {row['side']:<8}" + "".join(f"{row[c]:>18}" for c in columns), file=sys.stderr)
    result = {
        "machine": machine("xxhash", "msgspec"),
        "blocks": args.blocks,
        "lookups_of_128_blocks_per_cpu_s": lookups,
        "megabytes": {name: round(child.ready["megabytes"]) for name, child in children.items()},
        "rows": rows,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
