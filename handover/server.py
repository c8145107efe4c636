"""What a decode worker uses: listens, and runs one receiver per connection."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from tandem.common.counters import Counters
from tandem.common.seldom import Seldom
from tandem.handover.frames import HAND_OVER, Kind
from tandem.handover.incoming import Incoming, State
from tandem.handover.interfaces import HandoverSettings, KvSink
from tandem.handover.receiver import Receiver
from tandem.handover.registry import StreamRegistry
from tandem.handover.stats import HandoverStats
from tandem.wire.link import Link
from tandem.wire.peers import Endpoint, PeerIdentity, local_host_id
from tandem.wire.protocol import Reason
from tandem.wire.serving import Server

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
        settings: HandoverSettings | None = None,
    ) -> None:
        self._identity = identity
        self._sink = sink
        self._settings = settings or HandoverSettings()
        self._counters = Counters(HandoverStats())
        self._complaints = Seldom(logger, logging.INFO)
        self._registry = StreamRegistry(self._settings.max_streams, self._counters)
        self._server = Server(
            listen_unix,
            listen_tcp,
            HAND_OVER,
            self._settings.patience,
            key=identity.key,
            max_connections=self._settings.max_connections,
            serve=self._serve,
        )

    def start(self) -> None:
        """Listens. Raises OSError when an address cannot be used."""
        self._server.start()

    def stop(self) -> None:
        """Loses every open stream and ends all threads. Not from a callback."""
        self._server.stop()

    @property
    def endpoint(self) -> Endpoint:
        """Where it listens, for clients, after `start`. `host` is the address listened on: replace a wildcard with one
        they can reach."""
        listener = self._server.listener
        unix_path = str(listener.unix_path.absolute()) if listener.unix_path else ""
        host_id = local_host_id() if unix_path else ""
        return Endpoint(self._identity.name, self._identity.epoch, host_id, unix_path, listener.host, listener.port)

    def close_stream(self, request_id: str, epoch: int, reason: Reason) -> bool:
        """The request ended here: the sender stops and frees its blocks. The sink hears no more of the stream, not
        even `lost`. False when there is no such open stream. From any thread; never waits."""
        stream = self._registry.find(request_id, epoch)
        before = self._registry.end(stream, reason.code) if stream else None
        if stream is None or before is None:
            return False
        kind = Kind.REFUSE if before is State.OPENED else Kind.ABORT
        stream.receiver.post(kind, stream.number, reason)
        return True

    def stats(self) -> HandoverStats:
        """What has been received so far."""
        return replace(
            self._counters.snapshot(),
            open_streams=len(self._registry),
            open_connections=self._server.num_connections,
        )

    def _serve(self, link: Link) -> None:
        Receiver(
            link,
            self._identity,
            self._settings,
            self._sink,
            self._registry,
            self._counters,
            self._complaints,
            lambda: self._server.is_stopping,
        ).run()
