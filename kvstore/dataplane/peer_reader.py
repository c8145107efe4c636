"""Reads objects of other nodes: through their arena on the same host (one copy), over NIXL where both ends have it,
over TCP otherwise (both straight into the caller's buffers). A few connections per node; a node that failed is left
alone for a moment."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from tandem.kvstore.dataplane import protocol
from tandem.kvstore.dataplane.nixl import NixlAgent
from tandem.kvstore.dataplane.protocol import DATA_PLANE, MAX_OBJECT_BYTES, MAX_RANGES, PATIENCE, Kind
from tandem.kvstore.dataplane.windows import MappedArena, Outcome, Window
from tandem.kvstore.interfaces import EncodedObject, NodeInfo, ObjectInfo, ObjectKey, Refusal
from tandem.wire.handshake import HandshakeRefused, connect, greet
from tandem.wire.header import ProtocolError
from tandem.wire.link import Link
from tandem.wire.peers import PeerIdentity
from tandem.wire.protocol import Body, expect

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 4
"""Per node: as many reads at a time; further ones wait for a turn."""
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 5.0
_Answer = TypeVar("_Answer", bound=Body)
_T = TypeVar("_T")
Ranges = Sequence[tuple[ObjectKey, int, memoryview]]
_FAULTS = (OSError, ProtocolError, HandshakeRefused)


class PeerConnection:
    """One conversation at a time. Raises OSError, ProtocolError, after which it must be closed."""

    def __init__(self, link: Link, arena: MappedArena | None) -> None:
        self._link = link
        self._arena = arena
        self._window: Window | None = arena
        self._last_id = 0

    @classmethod
    def open(cls, node: NodeInfo, me: PeerIdentity, agent: NixlAgent | None) -> PeerConnection:
        """Connects over the unix socket where node and reader share a host, else over TCP, with `agent` for reads.
        Raises OSError, HandshakeRefused."""

        def open_on(link: Link) -> PeerConnection:
            """Greets the node on a connected link and maps its arena where both are on one host. The connection gets a
            NIXL window where both ends have NIXL and the link is TCP."""
            greeting = greet(link, me, expected=node.node_id)
            connection = cls(link, MappedArena(greeting.memory.map()) if greeting.memory is not None else None)
            if agent is not None and agent.info is not None and not link.is_unix:
                connection._open_window(agent)
            return connection

        return connect(node, DATA_PLANE, PATIENCE, open_on)

    def _open_window(self, agent: NixlAgent) -> None:
        self._link.send(Kind.AGENT, self._next_id())
        self._window = agent.open(self._answer(protocol.AgentInfo))

    def read_many(self, ranges: Ranges) -> list[bool]:
        """Reads every range into its buffer: whether each is there."""
        done: list[bool] = []
        for start in range(0, len(ranges), MAX_RANGES):
            batch = ranges[start : start + MAX_RANGES]
            done += self._read(batch) if self._window is None else self._copy(self._window, batch)
        return done

    def _copy(self, window: Window, ranges: Ranges) -> list[bool]:
        number = self._next_id()
        self._link.send(Kind.LEASE, number, protocol.Lease(_wire(ranges)))
        offsets = self._answer(protocol.Leased).offsets
        if len(offsets) != len(ranges):
            raise ProtocolError(f"{len(offsets)} places for {len(ranges)} ranges")
        if any(offset + len(out) > window.capacity_bytes for offset, (_, _, out) in zip(offsets, ranges, strict=True)):
            raise ProtocolError("a place outside the arena")
        here = [index for index, offset in enumerate(offsets) if offset >= 0]
        outcomes = window.read([(offsets[index], ranges[index][2]) for index in here])
        done = [False] * len(ranges)
        for index, outcome in zip(here, outcomes, strict=True):
            done[index] = outcome is Outcome.DONE
        if Outcome.LOST in outcomes:
            with contextlib.suppress(OSError):  # which would have the caller try again, into buffers that are lost
                self._link.send(Kind.RELEASE, number)
            return done
        self._link.send(Kind.RELEASE, number)
        missing = [index for index, there in enumerate(done) if not there]
        if missing:  # not in host memory, perhaps on disk; or the window does not reach it
            for index, there in zip(missing, self._read([ranges[index] for index in missing]), strict=True):
                done[index] = there
        return done

    def _read(self, ranges: Ranges) -> list[bool]:
        number = self._next_id()
        self._link.send(Kind.READ, number, protocol.Read(_wire(ranges)))
        done: list[bool] = []
        for _, _, out in ranges:
            header, _ = self._link.receive(PATIENCE.stall_s)
            if header.kind is not Kind.DATA or header.id != number or header.payload_length not in (0, len(out)):
                raise ProtocolError(f"{header.kind.name} of {header.payload_length} bytes for {len(out)}")
            if header.payload_length:
                self._link.read_into(out)
            done.append(bool(header.payload_length))
        return done

    def read_encoded(self, key: ObjectKey, codec: str) -> EncodedObject | None:
        """Reads a whole object under another codec; None: it is not there."""
        number = self._next_id()
        self._link.send(Kind.READ_ENCODED, number, protocol.ReadEncoded(key, codec))
        header, body = self._link.receive(PATIENCE.stall_s)
        answer = expect(body, protocol.Encoded)
        if header.id != number or header.payload_length > MAX_OBJECT_BYTES:
            raise ProtocolError(f"{header.payload_length} bytes for {header.id} where {number} was asked")
        if not header.payload_length:
            return None
        content = bytearray(header.payload_length)
        self._link.read_into(memoryview(content))
        return EncodedObject(content, answer.encode_s)

    def push(self, key: ObjectKey, info: ObjectInfo, content: memoryview) -> bool:
        """Stores an object there. True also if it was there already."""
        number = self._next_id()
        if self._arena is None:
            self._link.send(Kind.PUSH, number, protocol.Push(key, info), content)
            return self._answer(protocol.Done).done
        self._link.send(Kind.BEGIN_PUT, number, protocol.BeginPut(key, info))
        ticket = self._answer(protocol.Ticket)
        if ticket.refusal is not None:
            return ticket.refusal is Refusal.EXISTS
        if not 0 <= ticket.offset <= self._arena.capacity_bytes - len(content):
            raise ProtocolError("a place outside the arena")
        self._arena.write(ticket.offset, content)
        self._link.send(Kind.COMMIT, self._next_id(), protocol.Commit(number, answer=True))
        return self._answer(protocol.Done).done

    def close(self) -> None:
        if self._window is not None:
            self._window.close()
        self._link.close()

    def _next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def _answer(self, wanted: type[_Answer]) -> _Answer:
        header, body = self._link.receive(PATIENCE.stall_s)
        if header.id != self._last_id:
            raise ProtocolError(f"an answer to {header.id} where {self._last_id} was asked")
        return expect(body, wanted)


def _wire(ranges: Ranges) -> list[protocol.Range]:
    return [protocol.Range(key, offset, len(out)) for key, offset, out in ranges]


class _Peer:
    """The connections to one start of one node."""

    def __init__(self, node: NodeInfo) -> None:
        self.node = node
        self.turns = threading.Semaphore(MAX_CONNECTIONS)
        self.idle: list[PeerConnection] = []
        self.pause_s = 0.0
        self.blocked_until = 0.0

    def failed(self) -> None:
        self.pause_s = min(max(2 * self.pause_s, FIRST_PAUSE_S), LONGEST_PAUSE_S)
        self.blocked_until = time.monotonic() + self.pause_s


class SocketPeerReader:
    """`interfaces.PeerReader`. Never raises."""

    def __init__(
        self,
        nodes: Callable[[], dict[str, NodeInfo]],
        name: str,
        *,
        secret: bytes = b"",
        agent: NixlAgent | None = None,
    ) -> None:
        """`nodes` lists the live ones, as `Directory.nodes` does; `name` is for the other node's log; `agent` reads
        from other hosts, into its own arena."""
        self._nodes = nodes
        self._identity = PeerIdentity(name, key=DATA_PLANE.key(secret))
        self._agent = agent
        self._lock = threading.Lock()
        self._peers: dict[str, _Peer] = {}
        self._closed = False

    def read_many(self, node_id: str, ranges: Ranges) -> list[bool]:
        answer = self._ask(node_id, lambda connection: connection.read_many(ranges))
        return [False] * len(ranges) if answer is None else answer

    def read_encoded(self, node_id: str, key: ObjectKey, codec: str) -> EncodedObject | None:
        return self._ask(node_id, lambda connection: connection.read_encoded(key, codec))

    def push(self, node_id: str, key: ObjectKey, info: ObjectInfo, content: memoryview) -> bool:
        return bool(self._ask(node_id, lambda connection: connection.push(key, info, content)))

    def close(self) -> None:
        """Reads that are under way finish."""
        with self._lock:
            self._closed = True
            peers, self._peers = list(self._peers.values()), {}
        for peer in peers:
            self._close_idle(peer)

    def _ask(self, node_id: str, ask: Callable[[PeerConnection], _T]) -> _T | None:
        peer = self._peer(node_id)
        if peer is None or not peer.turns.acquire(timeout=PATIENCE.stall_s):
            return None
        try:
            return self._ask_in_turn(peer, ask)
        except _FAULTS as error:
            logger.warning("cannot reach node %s: %s", node_id, error)
            with self._lock:
                peer.failed()
            self._close_idle(peer)
            return None
        finally:
            peer.turns.release()

    def _ask_in_turn(self, peer: _Peer, ask: Callable[[PeerConnection], _T]) -> _T | None:
        with self._lock:
            connection = peer.idle.pop() if peer.idle else None
        if connection is not None:
            try:
                answer = ask(connection)
            except TimeoutError:
                connection.close()
                raise
            except (OSError, ProtocolError):
                connection.close()  # it may be older than a restart of the node: a new one tells
            else:
                self._give_back(peer, connection)
                return answer
        if time.monotonic() < peer.blocked_until:
            return None
        connection = PeerConnection.open(peer.node, self._identity, self._agent)
        try:
            answer = ask(connection)
        except BaseException:
            connection.close()
            raise
        self._give_back(peer, connection)
        return answer

    def _give_back(self, peer: _Peer, connection: PeerConnection) -> None:
        with self._lock:
            peer.pause_s = 0.0
            keep = self._peers.get(peer.node.node_id) is peer
            if keep:
                peer.idle.append(connection)
        if not keep:
            connection.close()

    def _peer(self, node_id: str) -> _Peer | None:
        """None: nobody knows where it is."""
        nodes = self._nodes()
        node = nodes.get(node_id)
        with self._lock:
            gone = [peer for name, peer in self._peers.items() if nodes.get(name) != peer.node]
            for peer in gone:
                del self._peers[peer.node.node_id]
            known = self._peers.get(node_id)
            if known is None and node is not None and not self._closed:
                known = self._peers[node_id] = _Peer(node)
        for peer in gone:
            self._close_idle(peer)
        return known

    def _close_idle(self, peer: _Peer) -> None:
        with self._lock:
            idle, peer.idle = peer.idle, []
        for connection in idle:
            connection.close()
