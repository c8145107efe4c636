"""Mooncake's transfer engine over TCP on this host, for `bench/kvstore.py --mooncake PYTHON`.

Run with the Python of an environment of its own: pip install mooncake-transfer-engine-non-cuda numpy

Two processes with one engine each. Every line `get COUNT SIZE` on stdin reads COUNT objects of SIZE bytes from the
other process's memory into registered memory of this one, `put` writes them there; the answer is `done SECONDS`.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from multiprocessing.connection import Connection

import numpy as np
from mooncake.engine import TransferEngine

BUFFER_BYTES = 256 << 20


def new_engine() -> tuple[TransferEngine, np.ndarray]:
    engine = TransferEngine()
    if engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""):
        raise RuntimeError("the transfer engine does not start")
    buffer = np.ones(BUFFER_BYTES, np.uint8)
    if engine.register_memory(buffer.ctypes.data, len(buffer)):
        raise RuntimeError("memory cannot be registered")
    return engine, buffer


def hold(pipe: Connection) -> None:
    engine, buffer = new_engine()
    pipe.send((f"127.0.0.1:{engine.get_rpc_port()}", buffer.ctypes.data))
    pipe.recv()


def main() -> None:
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    other = context.Process(target=hold, args=(theirs,), daemon=True)
    other.start()
    session, remote = pipe.recv()
    engine, buffer = new_engine()
    local = buffer.ctypes.data
    print("ready", flush=True)
    start = 0
    for line in sys.stdin:
        operation, *numbers = line.split()
        count, size = map(int, numbers)
        move = engine.batch_transfer_sync_read if operation == "get" else engine.batch_transfer_sync_write
        start = start if start + count * size <= BUFFER_BYTES else 0
        offsets = [start + index * size for index in range(count)]
        start += count * size
        began = time.perf_counter()
        failed = move(
            session, [local + offset for offset in offsets], [remote + offset for offset in offsets], [size] * count
        )
        if failed:
            raise RuntimeError(f"a {operation} failed with {failed}")
        print(f"done {time.perf_counter() - began}", flush=True)
    pipe.send(None)
    other.join()


if __name__ == "__main__":
    main()
