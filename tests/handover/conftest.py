"""A server and a client in this process, with recorders plugged in at both ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tandem.handover import (
    Endpoint,
    HandoverSettings,
    Incoming,
    KvClient,
    KvServer,
    KvStream,
    PeerIdentity,
    Reason,
)
from tests.leftovers import eventually, nothing_left_over, open_descriptors

__all__ = ["eventually", "nothing_left_over", "open_descriptors"]

DIGEST = bytes(range(32))
DEADLINE_S = 60.0


class Recorder:
    """Waits for what other threads record."""

    def __init__(self) -> None:
        self.changed = threading.Condition()

    def wait_for(self, predicate: Callable[[], object], timeout_s: float = DEADLINE_S) -> None:
        with self.changed:
            assert self.changed.wait_for(predicate, timeout_s), f"not within {timeout_s} s: {vars(self)}"


class Sink(Recorder):
    def __init__(self) -> None:
        super().__init__()
        self.skip: int | None = 0
        """None: leave `opened` unanswered."""
        self.wanted = True
        self.complete = True
        self.gate = threading.Event()
        """Cleared: `rows` waits."""
        self.gate.set()
        self.opened_streams: dict[tuple[str, int], Incoming] = {}
        self.data: dict[tuple[str, int], dict[int, bytearray]] = {}
        self.arrivals: list[tuple[str, int, int, int]] = []
        self.finishes: dict[tuple[str, int], bytes] = {}
        self.losses: dict[tuple[str, int], list[Reason]] = {}

    def opened(self, stream: Incoming) -> None:
        with self.changed:
            size = stream.num_tokens * stream.row_bytes
            self.data[stream.key] = {layer: bytearray(size) for layer in range(stream.num_layers)}
            self.opened_streams[stream.key] = stream
            self.changed.notify_all()
        if self.skip is not None:
            stream.accept(self.skip)

    def rows(self, request_id: str, epoch: int, layer: int, start: int, stop: int, payload: memoryview) -> bool:
        assert self.gate.wait(DEADLINE_S)
        with self.changed:
            width = len(payload) // (stop - start)
            self.data[request_id, epoch][layer][start * width : stop * width] = payload
            self.arrivals.append((request_id, layer, start, stop))
            self.changed.notify_all()
        return self.wanted

    def finished(self, request_id: str, epoch: int, payload: bytes) -> bool:
        with self.changed:
            self.finishes[request_id, epoch] = payload
            self.changed.notify_all()
        return self.complete

    def lost(self, request_id: str, epoch: int, reason: Reason) -> None:
        with self.changed:
            self.losses.setdefault((request_id, epoch), []).append(reason)
            self.changed.notify_all()

    def lost_code(self, request_id: str, epoch: int = 1, timeout_s: float = DEADLINE_S) -> str:
        self.wait_for(lambda: (request_id, epoch) in self.losses, timeout_s)
        (reason,) = self.losses[request_id, epoch]
        return reason.code


class Listener(Recorder):
    def __init__(self) -> None:
        super().__init__()
        self.accepted: int | None = None
        self.endings: list[tuple[str, Reason | None]] = []

    def on_accept(self, skip_tokens: int) -> None:
        with self.changed:
            self.accepted = skip_tokens
            self.changed.notify_all()

    def on_done(self) -> None:
        self._end("done", None)

    def on_refuse(self, reason: Reason) -> None:
        self._end("refused", reason)

    def on_lost(self, reason: Reason) -> None:
        self._end("lost", reason)

    def _end(self, how: str, reason: Reason | None) -> None:
        with self.changed:
            self.endings.append((how, reason))
            self.changed.notify_all()

    def ending(self, timeout_s: float = DEADLINE_S) -> tuple[str, str]:
        """How the stream ended, and the code of the reason."""
        self.wait_for(lambda: self.endings, timeout_s)
        ((how, reason),) = self.endings
        return how, reason.code if reason else ""


class Rows:
    """Known bytes for every layer of one request."""

    def __init__(self, num_tokens: int = 40, row_bytes: int = 64, num_layers: int = 3, seed: int = 0) -> None:
        self.num_tokens = num_tokens
        self.row_bytes = row_bytes
        self.num_layers = num_layers
        rng = np.random.default_rng(seed)
        self.layers = [rng.bytes(num_tokens * row_bytes) for _ in range(num_layers)]

    def fill(self, layer: int) -> Callable[[int, int, memoryview], None]:
        def fill(start: int, stop: int, out: memoryview) -> None:
            out[:] = memoryview(self.layers[layer])[start * self.row_bytes : stop * self.row_bytes]

        return fill

    def send(self, stream: KvStream, finish: bytes | None = b"first token") -> None:
        for layer in range(self.num_layers):
            stream.send_layer(layer, 0, self.num_tokens, self.fill(layer))
        if finish is not None:
            stream.finish(finish)

    def equal(self, received: dict[int, bytearray], skip: int = 0) -> bool:
        first = skip * self.row_bytes
        return all(received[layer][first:] == rows[first:] for layer, rows in enumerate(self.layers))


class Rig:
    """One server and one client that reach each other over one transport."""

    def __init__(self, transport: str, folder: Path, settings: HandoverSettings, key: bytes) -> None:
        self.transport = transport
        self.key = key
        self.settings = settings
        self.sink = Sink()
        identity = PeerIdentity("d", 1, DIGEST, key)
        self.server = KvServer(folder / "kv.sock", ("127.0.0.1", 0), identity, self.sink, settings)
        self.server.start()
        self.both = self.server.endpoint
        self.endpoint = self.only(transport, self.both)
        self.client = self.new_client()

    @staticmethod
    def only(transport: str, endpoint: Endpoint) -> Endpoint:
        if transport == "unix":
            return Endpoint(endpoint.worker_id, endpoint.worker_epoch, endpoint.host_id, endpoint.unix_path)
        return Endpoint(endpoint.worker_id, endpoint.worker_epoch, host=endpoint.host, port=endpoint.port)

    def new_client(self, digest: bytes = DIGEST, key: bytes | None = None) -> KvClient:
        """`key` None: the server's."""
        return KvClient(PeerIdentity("p", 1, digest, self.key if key is None else key), self.settings)

    def listener(self) -> Listener:
        return Listener()

    def rows(self, *args: int, **kwargs: int) -> Rows:
        return Rows(*args, **kwargs)

    def open(
        self, request_id: str, rows: Rows, *, epoch: int = 1, client: KvClient | None = None
    ) -> tuple[KvStream, Listener]:
        listener = Listener()
        stream = (client or self.client).open(
            self.endpoint, request_id, epoch, rows.num_tokens, rows.row_bytes, rows.num_layers, listener
        )
        return stream, listener

    def close(self) -> None:
        self.sink.gate.set()
        self.client.close()
        self.server.stop()


@pytest.fixture(params=["unix", "tcp"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_rig(transport: str, tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make(key: bytes = b"", **settings: float) -> Rig:
        """`key`: of both ends."""
        folder = tmp_path / str(len(rigs))
        folder.mkdir()
        rigs.append(Rig(transport, folder, HandoverSettings(**settings), key))  # type: ignore[arg-type]
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


@pytest.fixture
def rig(make_rig: Callable[..., Rig]) -> Rig:
    return make_rig()
