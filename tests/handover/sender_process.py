"""A prefill worker for tests: opens a stream and sends layers without end, or a known hand-over.

Usage: sender_process.py UNIX_PATH HOST PORT MODE, MODE one of "whole", "endless". Prints a line per event.
"""

from __future__ import annotations

import sys
import threading

from tandem.handover import Endpoint, KvClient, PeerIdentity, Reason, local_host_id

DIGEST = bytes(range(32))
NUM_TOKENS, ROW_BYTES, NUM_LAYERS = 512, 256, 4


class Printer:
    def __init__(self) -> None:
        self.ended = threading.Event()

    def on_accept(self, skip_tokens: int) -> None:
        print("accepted", flush=True)

    def on_done(self) -> None:
        print("done", flush=True)
        self.ended.set()

    def on_refuse(self, reason: Reason) -> None:
        print("refused", reason.code, flush=True)
        self.ended.set()

    def on_lost(self, reason: Reason) -> None:
        print("lost", reason.code, flush=True)
        self.ended.set()


def main() -> None:
    unix_path, host, port, mode = sys.argv[1:]
    endpoint = Endpoint("d", 1, local_host_id(), unix_path, host, int(port))
    client = KvClient(PeerIdentity("p", 1, DIGEST))
    printer = Printer()
    stream = client.open(endpoint, "r", 1, NUM_TOKENS, ROW_BYTES, NUM_LAYERS, printer)
    sent = threading.Semaphore(0)

    def fill(start: int, stop: int, out: memoryview) -> None:
        out[:] = b"".join(row.to_bytes(2, "little") * (ROW_BYTES // 2) for row in range(start, stop))
        sent.release()

    if mode == "whole":
        for layer in range(NUM_LAYERS):
            stream.send_layer(layer, 0, NUM_TOKENS, fill)
        stream.finish(b"finish")
    else:
        while not printer.ended.is_set():
            stream.send_layer(0, 0, 16, fill)
            sent.acquire(timeout=1)
    printer.ended.wait(60)
    client.close()


if __name__ == "__main__":
    main()
