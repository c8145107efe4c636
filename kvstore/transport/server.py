"""What a decode worker uses: listens, and runs one receiver per connection."""

from __future__ import annotations

import logging
import select
import socket
import threading
import time
from pathlib import Path

from tandem.kvstore.transport.frames import Kind, encode_reason
from tandem.kvstore.transport.handshake import tune_tcp
from tandem.kvstore.transport.incoming import Incoming, State
from tandem.kvstore.transport.interfaces import KvSink, Reason, TransportSettings
from tandem.kvstore.transport.peers import Endpoint, PeerIdentity, local_host_id
from tandem.kvstore.transport.receiver import Receiver
from tandem.kvstore.transport.registry import StreamRegistry
from tandem.kvstore.transport.stats import Counters, TransportStats

__all__ = ["Incoming", "KvServer"]

logger = logging.getLogger(__name__)

_BACKLOG = 128
_ACCEPT_RETRY_S = 0.1


class KvServer:
    """Thread-safe. Needs `listen_unix` (a path in a private directory), `listen_tcp` (host, port; port 0 picks one)
    or both. TCP is neither encrypted nor authenticated: listen on a network of the cluster only."""

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
        self._listen_unix = listen_unix
        self._listen_tcp = listen_tcp
        self._identity = identity
        self._sink = sink
        self._settings = settings or TransportSettings()
        self._counters = Counters()
        self._registry = StreamRegistry(self._settings.max_streams, self._counters)
        self._lock = threading.Lock()
        self._receivers: set[Receiver] = set()
        self._ending: list[Receiver] = []
        """Whose threads may still be ending."""
        self._stopping = False
        self._listeners: list[socket.socket] = []
        self._wake_read, self._wake_write = socket.socketpair()
        self._thread = threading.Thread(target=self._accept_until_stopped, name="kv-accept", daemon=True)

    def start(self) -> None:
        """Listens. Raises OSError when an address cannot be used."""
        try:
            if self._listen_unix:
                self._listeners.append(_listen_unix(self._listen_unix))
            if self._listen_tcp:
                family = socket.AF_INET6 if ":" in self._listen_tcp[0] else socket.AF_INET
                self._listeners.append(socket.create_server(self._listen_tcp, family=family, backlog=_BACKLOG))
        except OSError:
            self._stopping = True
            self._close_sockets()
            raise
        for listener in self._listeners:
            listener.setblocking(False)
        self._thread.start()

    @property
    def endpoint(self) -> Endpoint:
        """For clients, after `start`. `host` is the address listened on: replace a wildcard with one they can reach."""
        host, port = "", 0
        for listener in self._listeners:
            if listener.family != socket.AF_UNIX:
                host, port = listener.getsockname()[:2]
        unix_path = str(self._listen_unix.absolute()) if self._listen_unix else ""
        host_id = local_host_id() if unix_path else ""
        return Endpoint(self._identity.worker_id, self._identity.epoch, host_id, unix_path, host, port)

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
        self._wake_write.send(b"x")
        if self._thread.ident is not None:  # started
            self._thread.join()
        self._close_sockets()
        with self._lock:
            receivers = [*self._receivers, *self._ending]
        for receiver in receivers:
            receiver.stop()

    def _close_sockets(self) -> None:
        for listener in self._listeners:
            if listener.family == socket.AF_UNIX and self._listen_unix:
                self._listen_unix.unlink(missing_ok=True)
            listener.close()
        self._wake_read.close()
        self._wake_write.close()

    def _accept_until_stopped(self) -> None:
        poll = select.poll()
        by_descriptor = {listener.fileno(): listener for listener in self._listeners}
        for descriptor in (*by_descriptor, self._wake_read.fileno()):
            poll.register(descriptor, select.POLLIN)
        while not self._stopping:
            for descriptor, _ in poll.poll():
                listener = by_descriptor.get(descriptor)
                if listener is not None:
                    self._accept(listener)

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # the client went away meanwhile
        except OSError:
            logger.exception("accepting a hand-over connection failed")
            time.sleep(_ACCEPT_RETRY_S)  # out of descriptors, most likely: the socket stays readable
            return
        try:
            if sock.family != socket.AF_UNIX:
                tune_tcp(sock, self._settings)
            self._admit(sock)
        except OSError:
            logger.exception("a hand-over connection could not be set up")
            sock.close()

    def _admit(self, sock: socket.socket) -> None:
        receiver = Receiver(
            sock, self._identity, self._settings, self._sink, self._registry, self._counters, self._receiver_ended
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


def _listen_unix(path: Path) -> socket.socket:
    """Replaces a socket file that nobody listens on any more."""
    if path.is_socket():
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"cannot listen on {path}: {error.strerror}") from error
    return listener
