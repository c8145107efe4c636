"""What a decode worker uses: listens, and runs one receiver per connection."""

from __future__ import annotations

import logging
import socket
import threading
from pathlib import Path

from tandem.common.seldom import Seldom
from tandem.handover.frames import Kind, encode_reason
from tandem.handover.handshake import tune_tcp
from tandem.handover.incoming import Incoming, State
from tandem.handover.interfaces import KvSink, Reason, TransportSettings
from tandem.handover.receiver import Receiver
from tandem.handover.registry import StreamRegistry
from tandem.handover.stats import Counters, TransportStats
from tandem.wire.listening import Listener
from tandem.wire.peers import Endpoint, PeerIdentity, local_host_id

__all__ = ["Incoming", "KvServer"]

logger = logging.getLogger(__name__)


class KvServer:
    """Thread-safe. Needs `listen_unix` (a path in a private directory), `listen_tcp` (host, port; port 0 picks one)
    or both. With a key in `identity` only those who have it get in; nothing is encrypted, so TCP belongs inside a
    trusted network."""

    def __init__(
        self,
        listen_unix: Path | None,
        listen_tcp: tuple[str, int] | None,
        identity: PeerIdentity,
        sink: KvSink,
        settings: TransportSettings | None = None,
    ) -> None:
        if listen_unix is None and listen_tcp is None:
            raise ValueError("a KvServer needs listen_unix or listen_tcp")
        self._identity = identity
        self._sink = sink
        self._settings = settings or TransportSettings()
        self._counters = Counters()
        self._complaints = Seldom(logger, logging.INFO)
        self._registry = StreamRegistry(self._settings.max_streams, self._counters)
        self._lock = threading.Lock()
        self._receivers: set[Receiver] = set()
        self._ending: list[Receiver] = []
        """Whose threads may still be ending."""
        self._stopping = False
        self._listener = Listener(listen_unix, listen_tcp, "hand-over connection", self._accepted)

    def start(self) -> None:
        """Listens. Raises OSError when an address cannot be used."""
        self._listener.start()

    @property
    def endpoint(self) -> Endpoint:
        """For clients, after `start`. `host` is the address listened on: replace a wildcard with one they can reach."""
        listener = self._listener
        unix_path = str(listener.unix_path.absolute()) if listener.unix_path else ""
        host_id = local_host_id() if unix_path else ""
        return Endpoint(
            self._identity.worker_id, self._identity.epoch, host_id, unix_path, listener.host, listener.port
        )

    def close_stream(self, request_id: str, epoch: int, reason: Reason) -> bool:
        """The request ended here: the sender stops and frees its blocks. The sink hears no more of the stream, not
        even `lost`. False when there is no such open stream. From any thread; never waits."""
        stream = self._registry.find(request_id, epoch)
        before = self._registry.end(stream, reason.code) if stream else None
        if stream is None or before is None:
            return False
        kind = Kind.REFUSE if before is State.OPENED else Kind.ABORT
        stream.receiver.post(kind, encode_reason(reason), stream=stream.number)
        return True

    def stats(self) -> TransportStats:
        with self._lock:
            num_connections = len(self._receivers)
        return self._counters.snapshot(len(self._registry), num_connections)

    def stop(self) -> None:
        """Loses every open stream and ends all threads. Not from a callback."""
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
        self._listener.stop()
        with self._lock:
            receivers = [*self._receivers, *self._ending]
        for receiver in receivers:
            receiver.stop()

    def _accepted(self, sock: socket.socket) -> None:
        if sock.family != socket.AF_UNIX:
            tune_tcp(sock, self._settings)
        receiver = Receiver(
            sock,
            self._identity,
            self._settings,
            self._sink,
            self._registry,
            self._counters,
            self._complaints,
            self._receiver_ended,
        )
        with self._lock:
            self._ending = [ending for ending in self._ending if ending.alive]
            full = len(self._receivers) >= self._settings.max_connections
            if not full:
                self._receivers.add(receiver)
        if full:
            receiver.turn_away(Reason("overloaded", f"{self._settings.max_connections} connections are open"))
        else:
            receiver.start()

    def _receiver_ended(self, receiver: Receiver) -> None:
        with self._lock:
            self._receivers.discard(receiver)
            self._ending.append(receiver)
