"""Hand-over transport against plain sockets and memcpy: GB/s and latency of one layer, two processes on one machine.

    python bench/transport.py [--rounds 5] [--json FILE]

Prints a table on stderr and JSON on stdout.

Ours copies rows into the arena or socket buffer, checksums them twice, and copies them out to a destination buffer, as
a worker does with its KV pool. The plain peers (`sendall`, `recv_into` straight into the destination) check nothing and
copy once less; memcpy is one copy within one process: both are bounds rather than rivals. Rounds are interleaved.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import socket
import statistics
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from systems import machine

from tandem.handover import Endpoint, Incoming, KvClient, KvServer, PeerIdentity, Reason

ROW_BYTES = 4096
SIZES = [64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20]
PEERS = ["memcpy", "plain-unix", "plain-tcp", "tandem-memfd", "tandem-tcp"]
BYTES_PER_CELL = 256 << 20
SINGLES = 40
DIGEST = bytes(32)


class Receiver:
    """Counts what has arrived and says when: used as the sink of ours, and by the plain receivers."""

    def __init__(self) -> None:
        self.target = bytearray(max(SIZES))
        self.arrived = threading.Condition()
        self.total = 0

    def add(self, count: int) -> None:
        with self.arrived:
            self.total += count
            self.arrived.notify_all()

    def wait(self, total: int) -> int:
        """time.monotonic_ns() when `total` bytes have arrived; one clock for all processes of a machine."""
        with self.arrived:
            if not self.arrived.wait_for(lambda: self.total >= total, 60):
                raise TimeoutError(f"{self.total} of {total} bytes arrived")
        return time.monotonic_ns()

    def opened(self, stream: Incoming) -> None:
        stream.accept(0)

    def rows(self, request_id: str, epoch: int, layer: int, start: int, stop: int, payload: memoryview) -> bool:
        np.copyto(
            np.frombuffer(self.target, np.uint8)[start * ROW_BYTES : stop * ROW_BYTES], np.frombuffer(payload, np.uint8)
        )
        self.add(len(payload))
        return True

    def finished(self, request_id: str, epoch: int, payload: bytes) -> bool:
        return True

    def lost(self, request_id: str, epoch: int, reason: Reason) -> None:
        if reason.code != "peer_closed":
            print(f"lost: {reason}", file=sys.stderr)

    def serve_plain(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            with sock:
                size = int.from_bytes(sock.recv(8, socket.MSG_WAITALL), "little")
                view = memoryview(self.target)[:size]
                while sock.recv_into(view, size, socket.MSG_WAITALL) == size:
                    self.add(size)


class Listener:
    def __init__(self) -> None:
        self.accepted = threading.Event()
        self.ended = threading.Event()

    def on_accept(self, skip_tokens: int) -> None:
        self.accepted.set()

    def on_done(self) -> None:
        self.ended.set()

    def on_refuse(self, reason: Reason) -> None:
        print(f"refused: {reason}", file=sys.stderr)
        self.ended.set()

    on_lost = on_refuse


def sender_process(commands: Connection, endpoints: dict[str, Any]) -> None:
    """Runs one cell per command: many layers at once for the rate, then single layers for the latency."""
    source = np.random.default_rng(0).integers(0, 256, max(SIZES), np.uint8)
    client = KvClient(PeerIdentity("sender", 1, DIGEST))
    number = 0
    while command := commands.recv():
        peer, size, count = command
        number += 1
        if peer.startswith("tandem"):
            listener = Listener()
            stream = client.open(
                endpoints[peer], f"r{number}", 1, size // ROW_BYTES, ROW_BYTES, count + SINGLES, listener
            )
            listener.accepted.wait(10)

            def fill(start: int, stop: int, out: memoryview) -> None:
                np.copyto(np.frombuffer(out, np.uint8), source[start * ROW_BYTES : stop * ROW_BYTES])

            def send(layer: int, stream: Any = stream, size: int = size) -> None:
                stream.send_layer(layer, 0, size // ROW_BYTES, fill)

            run(commands, send, count)
            stream.finish(b"")
            listener.ended.wait(10)
        else:
            family = socket.AF_UNIX if peer == "plain-unix" else socket.AF_INET
            with socket.socket(family, socket.SOCK_STREAM) as sock:
                sock.connect(endpoints[peer])
                if family == socket.AF_INET:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.sendall(size.to_bytes(8, "little"))
                view = memoryview(source)[:size]
                run(commands, lambda _, sock=sock, view=view: sock.sendall(view), count)
    client.close()


def run(commands: Connection, send: Any, count: int) -> None:
    cpu_s = time.process_time()
    commands.send(time.monotonic_ns())
    for layer in range(count):
        send(layer)
    commands.recv()
    commands.send(time.process_time() - cpu_s)
    for layer in range(count, count + SINGLES):
        commands.send(time.monotonic_ns())
        send(layer)
        commands.recv()


def measure(peer: str, size: int, commands: Connection, receiver: Receiver) -> tuple[float, float, list[float]]:
    """GB/s, seconds of CPU per GB on both sides together, and the latency of single layers in microseconds."""
    count = BYTES_PER_CELL // size
    if peer == "memcpy":
        source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
        times = []
        for _ in range(count + SINGLES):
            started = time.perf_counter()
            np.copyto(target, source)
            times.append(time.perf_counter() - started)
        total_s = sum(times[:count])
        return size * count / total_s / 1e9, total_s / (size * count / 1e9), [1e6 * value for value in times[count:]]
    with receiver.arrived:
        receiver.total = 0
    cpu_s = time.process_time()
    commands.send((peer, size, count))
    started = commands.recv()
    rate = size * count / (receiver.wait(size * count) - started)
    commands.send(True)
    cpu_s = time.process_time() - cpu_s + commands.recv()
    latencies = []
    for i in range(1, SINGLES + 1):
        if i > 1:
            commands.send(True)
        started = commands.recv()
        latencies.append((receiver.wait(size * (count + i)) - started) / 1e3)
    commands.send(True)
    return rate, cpu_s / (size * count / 1e9), latencies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    receiver = Receiver()
    with tempfile.TemporaryDirectory() as folder:
        server = KvServer(Path(folder) / "kv.sock", ("127.0.0.1", 0), PeerIdentity("d", 1, DIGEST), receiver)
        server.start()
        plain_unix = socket.socket(socket.AF_UNIX)
        plain_unix.bind(f"{folder}/plain.sock")
        plain_unix.listen()
        plain_tcp = socket.create_server(("127.0.0.1", 0))
        for listener in (plain_unix, plain_tcp):
            threading.Thread(target=receiver.serve_plain, args=(listener,), daemon=True).start()
        here = server.endpoint
        endpoints = {
            "plain-unix": f"{folder}/plain.sock",
            "plain-tcp": plain_tcp.getsockname(),
            "tandem-memfd": Endpoint("d", 1, here.host_id, here.unix_path),
            "tandem-tcp": Endpoint("d", 1, host=here.host, port=here.port),
        }
        context = multiprocessing.get_context("spawn")
        commands, theirs = context.Pipe()
        child = context.Process(target=sender_process, args=(theirs, endpoints))
        child.start()
        rates: dict[tuple[str, int], list[float]] = {}
        cpu: dict[tuple[str, int], list[float]] = {}
        latencies: dict[tuple[str, int], list[float]] = {}
        for turn in range(options.rounds + 1):
            for size in SIZES:
                for peer in PEERS:
                    rate, cpu_s, times = measure(peer, size, commands, receiver)
                    if turn:  # the first round warms up
                        rates.setdefault((peer, size), []).append(rate)
                        cpu.setdefault((peer, size), []).append(cpu_s)
                        latencies.setdefault((peer, size), []).extend(times)
        commands.send(None)
        child.join()
        server.stop()
    report(rates, cpu, latencies, options.json)


def report(
    rates: dict[tuple[str, int], list[float]],
    cpu: dict[tuple[str, int], list[float]],
    latencies: dict[tuple[str, int], list[float]],
    path: Path | None,
) -> None:
    cells = []
    print("    rows transport       GB/s    (min..max)  CPU s/GB    p50 us    p99 us  GB/s to plain", file=sys.stderr)
    for size in SIZES:
        for peer in PEERS:
            key = peer, size
            median, low, high = statistics.median(rates[key]), min(rates[key]), max(rates[key])
            cpu_s = statistics.median(cpu[key])
            p50, p99 = (float(value) for value in np.percentile(latencies[key], [50, 99]))
            rival = {"tandem-memfd": "plain-unix", "tandem-tcp": "plain-tcp"}.get(peer)
            ratio = median / statistics.median(rates[rival, size]) if rival else None
            cells.append(
                {
                    "peer": peer,
                    "bytes": size,
                    "gb_per_s": median,
                    "gb_per_s_min": low,
                    "gb_per_s_max": high,
                    "cpu_s_per_gb": cpu_s,
                    "latency_p50_us": p50,
                    "latency_p99_us": p99,
                    "ratio_to_plain": ratio,
                }
            )
            spread = f"({low:.2f}..{high:.2f})"
            row = f"{size >> 10:>5}Ki {peer:<13} {median:>6.2f} {spread:>13} {cpu_s:>9.2f} {p50:>9.0f} {p99:>9.0f}"
            print(row + (f"  {ratio:.2f}" if ratio else ""), file=sys.stderr)
    result = json.dumps({"benchmark": "transport", "machine": machine("numpy"), "cells": cells})
    print(result)
    if path:
        path.write_text(result)


if __name__ == "__main__":
    main()
