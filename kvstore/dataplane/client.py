"""`interfaces.HomeNode` over the unix socket of the host's store node. Bulk bytes never pass the socket: they are
written and read in the node's arena, which this process maps.

A thread keeps the connection: it connects, and after a loss tries again with a growing pause. While the node is out of
reach every call fails at once, as a miss.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from tandem.kvstore.dataplane import protocol
from tandem.kvstore.dataplane.channel import Channel
from tandem.kvstore.dataplane.protocol import DATA_PLANE, PATIENCE, Kind
from tandem.kvstore.interfaces import Fetch, Located, ObjectInfo, ObjectKey, PutTicket, Refusal
from tandem.wire.handshake import HandshakeRefused, greet
from tandem.wire.header import ProtocolError
from tandem.wire.link import Link, connect_unix
from tandem.wire.peers import PeerIdentity

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0


class _NoFetch:
    """While the node is out of reach."""

    sources: Sequence[Located] = ()

    def wait(self, num_layers: int, timeout_s: float) -> bool:
        return False

    def intact(self) -> int:
        return 0

    def buffer(self, index: int) -> memoryview:
        raise IndexError(f"object {index} of a fetch without any")

    def close(self) -> None: ...


class RemoteHomeNode:
    """`interfaces.HomeNode`. Never raises, and never waits longer than `channel.CALL_S`."""

    def __init__(self, unix_path: str, name: str, *, secret: bytes = b"") -> None:
        """Connects in the background. `name` is the worker's, for the node's log."""
        self._path = unix_path
        self._identity = PeerIdentity(name, key=DATA_PLANE.key(secret))
        self._node_id = ""
        self._channel: Channel | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kv-home", daemon=True)
        self._thread.start()

    @property
    def node_id(self) -> str:
        """Id of the node that was there last; empty before any."""
        return self._node_id

    @property
    def connected(self) -> bool:
        channel = self._channel
        return channel is not None and channel.alive  # a broken one stays until the thread has seen it

    def begin_put(self, key: ObjectKey, info: ObjectInfo) -> PutTicket | Refusal:
        channel = self._channel
        return Refusal.CLOSED if channel is None else channel.puts.begin(key, info)

    def locate(self, keys: Sequence[ObjectKey]) -> list[Located]:
        channel = self._channel
        return [] if channel is None or not keys else channel.locate(keys)

    def fetch(self, located: Sequence[Located], overlap_s: float = 0.0) -> Fetch:
        channel = self._channel
        return _NoFetch() if channel is None or not located else channel.fetch(located, overlap_s)

    def quarantine(self, key: ObjectKey, reason: str) -> None:
        channel = self._channel
        if channel is not None:
            channel.post(Kind.QUARANTINE, 0, protocol.Quarantine(key, reason[:1024]))

    def close(self) -> None:
        """Gives back what is open, and ends the thread."""
        self._closing.set()
        channel = self._channel
        if channel is not None:
            channel.close()
        self._thread.join()

    def _run(self) -> None:
        pause_s = _FIRST_PAUSE_S
        complaint = ""
        while not self._closing.is_set():
            try:
                link = connect_unix(self._path, DATA_PLANE, PATIENCE)
            except OSError as error:
                reason = str(error)
            else:
                reason, was_up = self._serve(link)
                link.close()
                if was_up:
                    pause_s, complaint = _FIRST_PAUSE_S, ""
            if reason != complaint and not self._closing.is_set():
                logger.warning("no connection to the store node at %s: %s", self._path, reason)
                complaint = reason
            self._closing.wait(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _serve(self, link: Link) -> tuple[str, bool]:
        """Keeps the connection until it is gone: says why, and whether it had been of use."""
        channel: Channel | None = None
        try:
            channel = self._open(link)
            self._channel = channel
            if not self._closing.is_set():
                logger.info("connected to the store node at %s", self._path)
                channel.run()
            reason = channel.reason or "closed"
        except (OSError, ProtocolError, HandshakeRefused) as error:
            reason = str(error)
        except Exception as error:
            logger.exception("the connection to the store node failed")
            reason = repr(error)
        self._channel = None
        if channel is not None:
            channel.fail(reason)
        return reason, channel is not None

    def _open(self, link: Link) -> Channel:
        greeting = greet(link, self._identity)
        if greeting.memory is None:
            raise ProtocolError("the node has no shared memory, so it cannot be a home node")
        self._node_id = greeting.peer.name
        return Channel(link, greeting.memory.map())
