"""What a prefill worker uses: one connection per decode worker, shared by all its streams."""

from __future__ import annotations

import threading
from dataclasses import replace

from tandem.common.counters import Counters
from tandem.handover.connection import ClientConnection
from tandem.handover.interfaces import HandoverSettings, StreamListener
from tandem.handover.stats import HandoverStats
from tandem.handover.stream import KvStream
from tandem.wire.peers import Endpoint, PeerIdentity

__all__ = ["KvClient", "KvStream"]


class KvClient:
    """Thread-safe. Connections are made on first use, kept while idle, and dropped when they break."""

    def __init__(self, identity: PeerIdentity, settings: HandoverSettings | None = None) -> None:
        self._identity = identity
        self._settings = settings or HandoverSettings()
        self._counters = Counters(HandoverStats())
        self._lock = threading.Lock()
        self._connections: dict[Endpoint, ClientConnection] = {}
        self._failed: list[ClientConnection] = []
        """Whose threads may still be ending."""
        self._closed = False

    def open(
        self,
        endpoint: Endpoint,
        request_id: str,
        epoch: int,
        num_tokens: int,
        row_bytes: int,
        num_layers: int,
        listener: StreamListener,
    ) -> KvStream:
        """Starts a hand-over; never waits. Whatever goes wrong later, an endpoint out of reach included, is told to
        `listener`. Raises ValueError for sizes that cannot be sent, RuntimeError after `close`."""
        if not request_id or min(num_tokens, row_bytes, num_layers) < 1 or epoch < 0:
            raise ValueError("request_id, num_tokens, row_bytes and num_layers must not be empty, epoch not negative")
        if row_bytes > self._settings.frame_bytes:
            raise ValueError(f"a row of {row_bytes} bytes does not fit in a frame of {self._settings.frame_bytes}")
        with self._lock:
            if self._closed:
                raise RuntimeError("the client is closed")
            connection = self._connections.get(endpoint)
            if connection is not None:
                stream = connection.open(request_id, epoch, num_tokens, row_bytes, num_layers, listener)
                if stream is not None:
                    return stream
            self._failed = [failed for failed in self._failed if failed.alive]
            connection = ClientConnection(
                endpoint, self._identity, self._settings, self._counters, self._connection_failed
            )
            stream = connection.open(request_id, epoch, num_tokens, row_bytes, num_layers, listener)
            assert stream is not None, "a connection cannot fail before it is started"
            self._connections[endpoint] = connection
            connection.start()
            return stream

    def stats(self) -> HandoverStats:
        """What has been sent so far."""
        with self._lock:
            connections = list(self._connections.values())
        return replace(
            self._counters.snapshot(),
            open_streams=sum(connection.num_streams for connection in connections),
            open_connections=len(connections),
        )

    def close(self) -> None:
        """Ends every stream with `on_lost` and all threads. Not from a callback."""
        with self._lock:
            self._closed = True
            connections = [*self._connections.values(), *self._failed]
        for connection in connections:
            connection.close()
        with self._lock:
            self._connections.clear()
            self._failed.clear()

    def _connection_failed(self, connection: ClientConnection) -> None:
        with self._lock:
            if self._connections.get(connection.endpoint) is connection:
                del self._connections[connection.endpoint]
            self._failed.append(connection)
