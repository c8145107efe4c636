"""A process whose memory others read over NIXL: it says how on its standard output, and ends with its input."""

from __future__ import annotations

import random
import sys

import msgspec

from tandem.kvstore.dataplane.nixl import NixlAgent

from .fake_nixl import arena_of

SIZE = 32 << 20


def content() -> bytes:
    return random.Random(3).randbytes(SIZE)


def main() -> None:
    agent = NixlAgent("a process")
    arena = arena_of(SIZE, 0)
    arena[:] = content()
    agent.register(arena, lambda start, stop: lambda: None)
    print(msgspec.msgpack.encode(agent.info).hex(), flush=True)
    sys.stdin.read()
    agent.close()


if __name__ == "__main__":
    main()
