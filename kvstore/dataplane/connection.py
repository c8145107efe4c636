"""The serving end of a connection: a worker's home node, a peer that reads, or both.

One thread reads and answers. Look-ups that ask the directory may take milliseconds, so they have a thread of their own
from the first one on; a fetch that is not complete at once gets one that tells the client about its layers. When the
connection ends, so does everything that was opened through it.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import queue
import threading
import time
from collections.abc import Callable

from tandem.common.counters import Counters
from tandem.common.seldom import Seldom
from tandem.kvstore.bundle import transcode
from tandem.kvstore.codecs import CODECS
from tandem.kvstore.dataplane import protocol
from tandem.kvstore.dataplane.interfaces import ServedFetch, ServedNode, ServedTicket
from tandem.kvstore.dataplane.nixl import NixlAgent
from tandem.kvstore.dataplane.peer_process import PeerProcess
from tandem.kvstore.dataplane.protocol import ALL_LAYERS, MAX_OBJECT_BYTES, Kind
from tandem.kvstore.dataplane.stats import DataPlaneStats
from tandem.kvstore.dataplane.windows import address_of
from tandem.kvstore.interfaces import Located, ObjectInfo, ObjectKey, Refusal, TierName
from tandem.wire.handshake import HandshakeRefused, admit, answer
from tandem.wire.header import Header, ProtocolError
from tandem.wire.link import Link
from tandem.wire.peers import PeerIdentity
from tandem.wire.protocol import Body, expect
from tandem.wire.shared_memory import SharedMemory

logger = logging.getLogger(__name__)

MAX_TICKETS = 1024
MAX_FETCHES = 256
MAX_LEASES = 64
MAX_LOOKUPS = 64
"""Most puts, fetches, leases and look-ups of one connection at a time. Beyond: the put is refused, the fetch fails, the
lease and the look-up find nothing."""
MIN_HELD_OBJECTS = 32
"""Memory is held for the next put only of objects of which the node has room for so many."""
SCRATCH_BYTES = 64 << 20
"""Longest range read from disk for a peer: its loader asks layer by layer."""
FETCH_S = 60.0
"""A fetch that brings nothing for this long has failed."""
_WATCH_S = 1.0


class Connection:
    """`run` it once, on a thread of its own."""

    def __init__(
        self,
        link: Link,
        node: ServedNode,
        identity: PeerIdentity,
        counters: Counters[DataPlaneStats],
        complaints: Seldom,
        scratch: threading.Semaphore,
        agent: NixlAgent | None,
    ) -> None:
        self._link = link
        self._node = node
        self._identity = identity
        self._counters = counters
        self._complaints = complaints
        self._scratch = scratch
        self._agent = agent
        self._process = PeerProcess(link.sock)
        self._name = ""
        self._tickets: dict[int, ServedTicket] = {}
        self._fetches: dict[int, ServedFetch] = {}
        self._leases: dict[int, contextlib.ExitStack] = {}
        self._lookups: queue.SimpleQueue[tuple[int, list[ObjectKey]] | None] = queue.SimpleQueue()
        self._num_lookups = threading.Semaphore(MAX_LOOKUPS)
        self._looking: threading.Thread | None = None
        self._watchers: set[threading.Thread] = set()
        self._handlers: dict[enum.IntEnum, Callable[[Header, Body], None]] = {
            Kind.LEASE: self._lease,
            Kind.RELEASE: self._release,
            Kind.READ: self._read,
            Kind.PUSH: self._push,
            Kind.READ_ENCODED: self._read_encoded,
            Kind.AGENT: self._tell_agent,
        }
        if self._link.is_unix:  # what lies in the arena is of use to those who can map it
            self._handlers |= {
                Kind.BEGIN_PUT: self._begin_put,
                Kind.COMMIT: self._commit,
                Kind.ABORT: self._abort,
                Kind.LOCATE: self._locate,
                Kind.FETCH: self._fetch,
                Kind.CLOSE_FETCH: self._close_fetch,
                Kind.INTACT: self._intact,
                Kind.QUARANTINE: self._quarantine,
            }

    def run(self) -> None:
        """Serves until the client goes, or the link is shut down."""
        try:
            self._name = admit(self._link, self._identity).peer.name
            arena = self._node.arena
            memory = SharedMemory(arena.fd, arena.capacity_bytes) if arena.fd >= 0 else None
            answer(self._link, self._identity, memory=memory)
            while True:
                header, body = self._link.receive()
                handle = self._handlers.get(header.kind)
                if handle is None:
                    raise ProtocolError(f"{header.kind.name} is not for this side of this connection")
                handle(header, body)
        except HandshakeRefused as error:
            self._counters.add(refused_connections=1)
            self._complaints.log("a client of the data plane was turned away: %s", error)
        except ProtocolError as error:
            self._counters.add(malformed_frames=1)
            self._complaints.log("the connection of %r broke the protocol: %s", self._name, error)
        except OSError as error:
            logger.debug("the connection of %r ended: %s", self._name, error)
        except Exception:
            logger.exception("the connection of %r failed", self._name)
        finally:
            self._end()

    def _end(self) -> None:
        self._link.shutdown()
        for fetch in self._fetches.values():
            fetch.close()
        for watcher in list(self._watchers):
            watcher.join()
        if self._looking is not None:
            self._lookups.put(None)
            self._looking.join()
        for lease in self._leases.values():
            lease.close()
        if self._tickets and self._process.has_ended():
            for ticket in self._tickets.values():
                ticket.abort()
        # A client that lives may still be copying into its buffers: those tickets lapse, and their memory rests for
        # the grace time that the node keeps for late writers.
        self._process.close()

    # Puts

    def _begin_put(self, header: Header, body: Body) -> None:
        put = expect(body, protocol.BeginPut)
        if not 0 < put.info.size <= MAX_OBJECT_BYTES:
            raise ProtocolError(f"an object of {put.info.size} bytes")
        ticket = self._open(header.id, put.key, put.info)
        answer = protocol.Ticket(-1, ticket) if isinstance(ticket, Refusal) else protocol.Ticket(ticket.offset)
        self._link.send(Kind.TICKET, header.id, answer)

    def _open(self, number: int, key: ObjectKey, info: ObjectInfo) -> ServedTicket | Refusal:
        if number in self._tickets:
            raise ProtocolError("two puts have one id")
        if len(self._tickets) >= MAX_TICKETS:
            return Refusal.NO_SPACE
        ticket = self._node.begin_put(key, info)
        if not isinstance(ticket, Refusal):
            self._tickets[number] = ticket
        return ticket

    def _hold(self, number: int, info: ObjectInfo) -> int:
        """Offset of memory for a put of which only that much is known; -1: none."""
        if not 0 < info.size <= self._node.arena.capacity_bytes // MIN_HELD_OBJECTS:
            return -1
        ticket = self._open(number, ObjectKey(os.urandom(32)), info)
        return -1 if isinstance(ticket, Refusal) else ticket.offset

    def _commit(self, header: Header, body: Body) -> None:
        order = expect(body, protocol.Commit)
        ticket = self._tickets.pop(order.ticket, None)
        try:
            if ticket is None:
                done = False
            elif order.key is None or order.info is None:
                done = ticket.commit()
            else:
                done = ticket.commit_as(order.key, order.info)
        except ValueError as error:
            raise ProtocolError(str(error)) from error
        if order.hold and order.info is not None:
            held = [self._hold(number, order.info) for number in order.hold]
            self._link.send(Kind.HELD, header.id, protocol.Held(held))
        elif order.answer:
            self._link.send(Kind.DONE, header.id, protocol.Done(done))

    def _abort(self, header: Header, body: Body) -> None:
        ticket = self._tickets.pop(header.id, None)
        if ticket is not None:
            ticket.abort()

    # Look-ups

    def _locate(self, header: Header, body: Body) -> None:
        order = expect(body, protocol.Locate)
        keys = order.keys
        here = self._node.locate_here(keys)
        if here is not None:
            self._link.send(Kind.LOCATED, header.id, protocol.LocatedRun(here, self._fetch_resident(order.fetch, here)))
            return
        if not self._num_lookups.acquire(blocking=False):
            self._link.send(Kind.LOCATED, header.id, protocol.LocatedRun([]))
            return
        self._lookups.put((header.id, keys))
        if self._looking is None:
            self._looking = threading.Thread(target=self._look_up, name="kv-lookup", daemon=True)
            self._looking.start()

    def _look_up(self) -> None:
        try:
            while (order := self._lookups.get()) is not None:
                frame_id, keys = order
                located = self._node.locate(keys)
                self._num_lookups.release()
                self._link.send(Kind.LOCATED, frame_id, protocol.LocatedRun(located))
        except OSError:
            pass  # the client went away; the reading thread finds out
        except Exception:
            logger.exception("a look-up of %r failed", self._name)
            self._link.shutdown()

    # Fetches

    def _fetch_resident(self, number: int, located: list[Located]) -> list[int]:
        """Begins a fetch of what lies in host memory; nothing if anything else would have to be done."""
        if len(self._fetches) >= MAX_FETCHES or any(place.tier is not TierName.HOST for place in located):
            return []
        if number in self._fetches:
            raise ProtocolError("two fetches have one id")
        fetch = self._node.fetch(located, 0.0, lease_s=None)
        if not len(located) == len(fetch.sources) == fetch.intact():
            fetch.close()
            return []
        self._fetches[number] = fetch
        return [fetch.offset(i) for i in range(len(located))]

    def _fetch(self, header: Header, body: Body) -> None:
        if header.id in self._fetches:
            raise ProtocolError("two fetches have one id")
        order = expect(body, protocol.Fetch)
        located = order.located if len(self._fetches) < MAX_FETCHES else []
        fetch = self._node.fetch(located, order.overlap_s, lease_s=None)
        self._fetches[header.id] = fetch
        sources = list(fetch.sources)
        complete = fetch.intact() == len(sources)
        offsets = [fetch.offset(i) for i in range(len(sources))]
        layers = ALL_LAYERS if complete else 0
        self._link.send(Kind.FETCHING, header.id, protocol.Fetching(sources, offsets, layers))
        if not complete:
            watcher = threading.Thread(target=self._watch, args=(header.id, fetch), name="kv-watch", daemon=True)
            self._watchers.add(watcher)
            watcher.start()

    def _watch(self, frame_id: int, fetch: ServedFetch) -> None:
        try:
            self._watch_until_done(frame_id, fetch)
        except OSError:
            pass  # the client went away; the reading thread finds out
        except Exception:
            logger.exception("watching a fetch of %r failed", self._name)
            self._link.shutdown()
        finally:
            self._watchers.discard(threading.current_thread())

    def _watch_until_done(self, frame_id: int, fetch: ServedFetch) -> None:
        layers = 0
        heard = time.monotonic()
        while layers < ALL_LAYERS:
            started = time.monotonic()
            if fetch.wait(layers + 1, _WATCH_S):
                layers += 1
                while fetch.intact() < len(fetch.sources) and fetch.wait(layers + 1, 0):
                    layers += 1  # tell of several at once when they come fast
                if fetch.intact() == len(fetch.sources):
                    layers = ALL_LAYERS
                self._link.send(Kind.PROGRESS, frame_id, protocol.Progress(layers, False))
                heard = time.monotonic()
            elif time.monotonic() - started < _WATCH_S / 2 or time.monotonic() - heard > FETCH_S:
                # It did not wait the time out, so the fetch has failed or is closed.
                self._link.send(Kind.PROGRESS, frame_id, protocol.Progress(layers, True))
                return

    def _close_fetch(self, header: Header, body: Body) -> None:
        fetch = self._fetches.pop(header.id, None)
        if fetch is not None:
            fetch.close()

    def _intact(self, header: Header, body: Body) -> None:
        fetch = self._fetches.get(expect(body, protocol.Intact).fetch)
        self._link.send(Kind.COUNT, header.id, protocol.Count(0 if fetch is None else fetch.intact()))

    def _quarantine(self, header: Header, body: Body) -> None:
        order = expect(body, protocol.Quarantine)
        self._node.quarantine(order.key, order.reason)

    # Peers

    def _lease(self, header: Header, body: Body) -> None:
        ranges = expect(body, protocol.Lease).ranges
        if header.id in self._leases:
            raise ProtocolError("two leases have one id")
        offsets = [-1] * len(ranges)
        if len(self._leases) < MAX_LEASES and (self._link.is_unix or self._agent is not None):
            held = self._leases[header.id] = contextlib.ExitStack()
            start = address_of(self._node.arena.view(0, 1))
            for i, wanted in enumerate(ranges):
                view = held.enter_context(self._node.view(wanted.key))
                if view is not None and 0 < wanted.length <= len(view) - wanted.offset:
                    offsets[i] = address_of(view) - start + wanted.offset
        self._counters.add(leased_ranges=len(ranges) - offsets.count(-1))
        self._link.send(Kind.LEASED, header.id, protocol.Leased(offsets))

    def _tell_agent(self, header: Header, body: Body) -> None:
        info = self._agent.info if self._agent is not None else None
        self._link.send(Kind.AGENT_INFO, header.id, info or protocol.AgentInfo("", b"", 0, 0))

    def _release(self, header: Header, body: Body) -> None:
        held = self._leases.pop(header.id, None)
        if held is not None:
            held.close()

    def _read(self, header: Header, body: Body) -> None:
        for wanted in expect(body, protocol.Read).ranges:
            with self._node.view(wanted.key) as view:
                if view is not None:
                    fits = wanted.length <= len(view) - wanted.offset
                    self._send_data(header.id, view[wanted.offset : wanted.offset + wanted.length] if fits else None)
                    continue
            self._read_below(header.id, wanted)

    def _read_below(self, frame_id: int, wanted: protocol.Range) -> None:
        """A range of an object that is not in host memory."""
        if wanted.length > SCRATCH_BYTES:
            self._send_data(frame_id, None)
            return
        with self._scratch:
            content = memoryview(bytearray(wanted.length))
            self._send_data(frame_id, content if self._node.read_range(wanted.key, wanted.offset, content) else None)

    def _read_encoded(self, header: Header, body: Body) -> None:
        wanted = expect(body, protocol.ReadEncoded)
        started = time.perf_counter()
        content = None
        if wanted.codec in CODECS:
            with self._scratch, self._node.view(wanted.key) as view:
                if view is not None and len(view) <= SCRATCH_BYTES:
                    content = transcode(view, wanted.codec)
        answer = protocol.Encoded(time.perf_counter() - started)
        self._counters.add(sent_encoded=bool(content), missed_encoded=not content, sent_bytes=len(content or b""))
        self._link.send(Kind.ENCODED, header.id, answer, memoryview(content or b""))

    def _send_data(self, frame_id: int, content: memoryview | None) -> None:
        self._counters.add(sent_ranges=bool(content), missed_ranges=not content, sent_bytes=len(content or b""))
        self._link.send(Kind.DATA, frame_id, payload=content or b"")

    def _push(self, header: Header, body: Body) -> None:
        push = expect(body, protocol.Push)
        if not 0 < header.payload_length == push.info.size:
            raise ProtocolError(f"{header.payload_length} bytes of an object of {push.info.size}")
        ticket = self._node.begin_put(push.key, push.info)
        if isinstance(ticket, Refusal):
            self._link.skip(header.payload_length)
            self._link.send(Kind.DONE, header.id, protocol.Done(ticket is Refusal.EXISTS))
            return
        try:
            self._link.read_into(ticket.buffer)
        except BaseException:
            ticket.abort()
            raise
        self._counters.add(received_bytes=header.payload_length)
        self._link.send(Kind.DONE, header.id, protocol.Done(ticket.commit()))
