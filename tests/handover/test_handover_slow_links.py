"""A link that is slow, through a proxy that lets little pass: nobody who waits behind rows is taken for dead."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.handover.conftest import Rows

BYTES_PER_S = 1 << 20
STALL_S = 3.0


@contextlib.contextmanager
def slow_way_to(host: str, port: int) -> Iterator[int]:
    """The port of a proxy that passes on `BYTES_PER_S` to the server, and all that comes back."""
    listener = socket.create_server(("127.0.0.1", 0))
    ends: list[socket.socket] = []

    def forward() -> None:
        with contextlib.suppress(OSError):
            client, _ = listener.accept()
            ends.append(client)
            server = socket.create_connection((host, port))
            ends.append(server)
            back = threading.Thread(target=copy, args=(server, client, 0.0), daemon=True)
            back.start()
            copy(client, server, 1.0 / BYTES_PER_S)
            back.join()

    def copy(source: socket.socket, target: socket.socket, seconds_per_byte: float) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(16 << 10):
                time.sleep(len(piece) * seconds_per_byte)
                target.sendall(piece)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    thread = threading.Thread(target=forward, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        for end in (listener, *ends):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        thread.join()
        for end in (listener, *ends):
            end.close()


@pytest.mark.parametrize("transport", ["tcp"], indirect=True)
def test_a_slow_link_is_not_a_silent_peer(make_rig, transport: str) -> None:
    rig = make_rig(lease_s=STALL_S, stall_timeout_s=STALL_S, connect_timeout_s=60.0)
    rows = Rows(num_tokens=2048, row_bytes=1024, num_layers=2)
    with slow_way_to(rig.endpoint.host, rig.endpoint.port) as port:
        rig.endpoint = replace(rig.endpoint, port=port)
        streams = [rig.open(f"r{number}", rows) for number in range(2)]
        for stream, _ in streams:
            rows.send(stream)
        for number, (_, listener) in enumerate(streams):
            assert listener.ending() == ("done", ""), listener.endings
            assert rows.equal(rig.sink.data[f"r{number}", 1])
        rig.client.close()
