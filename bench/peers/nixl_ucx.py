"""NIXL's agents over UCX on this host, for `bench/kvstore.py --nixl PYTHON`.

Run with the Python of an environment of its own: pip install --no-deps nixl-cu12 numpy

    python bench/peers/nixl_ucx.py shared|tcp

Two processes with one agent each. Every line `get COUNT SIZE` on stdin reads COUNT objects of SIZE bytes from the other
process's memory into registered memory of this one, `put` writes them there; the answer is `done SECONDS`. UCX reads
and writes the other process's memory through the kernel (`shared`: CMA, since neither made its memory through UCX) or
over loopback (`tcp`).
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from multiprocessing.connection import Connection

import numpy as np

BUFFER_BYTES = 256 << 20
TRANSPORTS = {"shared": "self,sm", "tcp": "self,tcp"}


def new_agent(name: str) -> tuple[object, np.ndarray]:
    from nixl_cu12._api import nixl_agent, nixl_agent_config

    agent = nixl_agent(name, nixl_agent_config(backends=[]))
    agent.create_backend("UCX", {"ucx_error_handling_mode": "none"})  # UCX's shared memory has no other
    buffer = np.ones(BUFFER_BYTES, np.uint8)
    agent.register_memory([(buffer.ctypes.data, len(buffer), 0, "")], "DRAM")
    return agent, buffer


def hold(pipe: Connection) -> None:
    agent, buffer = new_agent("holder")
    pipe.send((agent.get_agent_metadata(), buffer.ctypes.data))
    pipe.recv()


def main() -> None:
    os.environ["UCX_TLS"] = TRANSPORTS[sys.argv[1]]
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    other = context.Process(target=hold, args=(theirs,), daemon=True)
    other.start()
    metadata, remote = pipe.recv()
    agent, buffer = new_agent("mover")
    holder = agent.add_remote_agent(metadata)
    local = buffer.ctypes.data

    def move(operation: str, offsets: list[int], size: int) -> None:
        mine = agent.get_xfer_descs([(local + offset, size, 0) for offset in offsets], "DRAM")
        theirs = agent.get_xfer_descs([(remote + offset, size, 0) for offset in offsets], "DRAM")
        handle = agent.initialize_xfer(operation, mine, theirs, holder)
        state = agent.transfer(handle)
        while state == "PROC":
            state = agent.check_xfer_state(handle)
        agent.release_xfer_handle(handle)
        if state != "DONE":
            raise RuntimeError(f"a transfer ended as {state}")

    move("READ", [0], 4096)
    print("ready", flush=True)
    start = 0
    for line in sys.stdin:
        operation, count, size = line.split()
        total = int(count) * int(size)
        start = start if start + total <= BUFFER_BYTES else 0
        offsets = list(range(start, start + total, int(size)))
        start += total
        began = time.perf_counter()
        move("READ" if operation == "get" else "WRITE", offsets, int(size))
        print(f"done {time.perf_counter() - began}", flush=True)
    pipe.send(None)
    other.join()


if __name__ == "__main__":
    main()
