"""What a process says of its own nodes: queued and bounded, numbered, sent in the background, said again when needed.

One thread per directory. Whatever goes wrong on the way (a full queue, a lost message, a directory that restarts empty)
ends in the same place: the queue is dropped and the node's snapshot is sent. A message without an answer is not said
twice; the next announcement tells whether it has arrived.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from tandem.kvstore.directory.messages import BEAT_S, MAX_BATCH, Reply, Update, Uplink, Verdict
from tandem.kvstore.interfaces import DirectoryEvent, EventBatch, NodeInfo

log = logging.getLogger(__name__)

MAX_QUEUED = 65_536
"""Events of a node that wait to be sent."""
RETRY_S = 0.25
"""Pause between attempts to reach a directory."""
RESYNC_S = 0.02
"""Pause before everything is said again because a message was lost."""
LINGER_S = 0.002
"""Time from the first change to its message, which then tells of those that followed. Without it each put would wake
the publishing thread, at the expense of the thread that serves the next put."""

Snapshot = Callable[[], Sequence[DirectoryEvent]]


class _Outgoing:
    """One node. `queue` and `resync` belong to the publisher's lock, the rest to its thread."""

    def __init__(self, info: NodeInfo, snapshot: Snapshot, seq: int) -> None:
        self.info = info
        self.snapshot = snapshot
        self.queue: deque[DirectoryEvent] = deque()
        self.resync = True
        self.unsaid: Sequence[DirectoryEvent] | None = None
        """The snapshot that is being sent, and how much of it has been."""
        self.said = 0
        self.seq = seq
        self.due_at = 0.0
        """When it must be heard again."""
        self.held = False
        """Something went wrong: nothing is sent before `due_at`."""
        self.verdict = Verdict.OK
        """The last one that was logged."""


class Publisher:
    """Safe from any thread. `start` runs it; a test may call `pump` by itself instead."""

    def __init__(self, uplink: Uplink, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._uplink = uplink
        self._clock = clock
        self._changed = threading.Condition()
        self._nodes: dict[str, _Outgoing] = {}
        self._busy = False
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def register(self, info: NodeInfo, snapshot: Snapshot) -> None:
        """Announces the node, in the background and until `close`, as `Directory.register`."""
        with self._changed:
            before = self._nodes.get(info.node_id)
            seq = before.seq if before is not None and before.info.epoch == info.epoch else 0
            self._nodes[info.node_id] = _Outgoing(info, snapshot, seq)
            self._changed.notify_all()

    def publish(self, node_id: str, events: Sequence[DirectoryEvent]) -> None:
        """Queues changes of a node that was registered; never blocks. Too many at once become a resync."""
        with self._changed:
            node = self._nodes.get(node_id)
            if node is None or node.resync or self._closed:
                return  # the snapshot to come is taken later than this change, and shows it
            if len(node.queue) + len(events) > MAX_QUEUED:
                log.warning(
                    "%s: %d changes wait for the directory; it will be told everything again", node_id, MAX_QUEUED
                )
                node.queue.clear()
                node.resync = True
            else:
                node.queue.extend(events)
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Waits until the directory has taken everything that was published before. False: time is up."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._busy and not self._pending(), timeout_s)

    def close(self) -> None:
        """Unregisters all nodes. Idempotent."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()
        for node in self._nodes.values():
            if not node.held:
                self._uplink.withdraw(node.info.node_id, node.info.epoch)

    def pump(self) -> float:
        """Sends what is due, one update of each node: none falls silent while another has much to say. Returns the
        seconds until something is due again if nothing is published."""
        with self._changed:
            nodes = list(self._nodes.values())
        for node in nodes:
            self._serve(node)
        with self._changed:
            if self._sendable():
                return 0.0
        now = self._clock()
        return max(0.0, min((node.due_at - now for node in nodes), default=BEAT_S))

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = True
            wait_s = self.pump()
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                if not self._closed:
                    self._changed.wait_for(lambda: self._closed or self._sendable(), wait_s)
                if self._closed:
                    return
            time.sleep(LINGER_S)

    def _pending(self) -> bool:
        return any(node.held or _has_more(node) for node in self._nodes.values())

    def _sendable(self) -> bool:
        return any(not node.held and _has_more(node) for node in self._nodes.values())

    def _serve(self, node: _Outgoing) -> None:
        if self._clock() >= node.due_at:
            reply = self._uplink.announce(node.info, node.seq)
            if reply.verdict is Verdict.RESYNC:
                # An earlier publisher of the same epoch may have counted further.
                node.seq = max(node.seq, reply.seq)
                node.held = False
                with self._changed:
                    node.resync = True
            elif not self._taken(node, reply):
                return
        if node.held or (node.resync and not self._take_snapshot(node)):
            return
        if node.unsaid is not None:
            self._send_snapshot(node, node.unsaid)
            return
        with self._changed:
            events = tuple([node.queue.popleft() for _ in range(min(MAX_BATCH, len(node.queue)))])
        if events:
            self._send(node, events, reset=False)

    def _take_snapshot(self, node: _Outgoing) -> bool:
        with self._changed:
            node.queue.clear()
            node.resync = False
        try:
            node.unsaid, node.said = node.snapshot(), 0
        except Exception:
            log.exception("%s: its snapshot failed; the directory does not know what it holds", node.info.node_id)
            with self._changed:
                node.resync = True
            self._hold(node, RETRY_S)
            return False
        return True

    def _send_snapshot(self, node: _Outgoing, events: Sequence[DirectoryEvent]) -> None:
        end = node.said + MAX_BATCH
        if not self._send(node, tuple(events[node.said : end]), reset=node.said == 0):
            with self._changed:
                node.resync = True
        node.said = end
        if end >= len(events):
            node.unsaid = None

    def _send(self, node: _Outgoing, events: tuple[DirectoryEvent, ...], *, reset: bool) -> bool:
        node.seq += 1
        batch = EventBatch(node.info.node_id, node.info.epoch, node.seq, events)
        return self._taken(node, self._uplink.apply(Update(batch, reset)))

    def _taken(self, node: _Outgoing, reply: Reply) -> bool:
        """False: nothing more now. The next announcement shows whether the directory has taken the update after all."""
        if reply.verdict is not node.verdict:
            node.verdict = reply.verdict
            level = logging.WARNING if reply.verdict is Verdict.SUPERSEDED else logging.INFO
            log.log(level, "%s: the directory says: %s", node.info.node_id, reply.verdict.value)
        if reply.verdict is Verdict.OK:
            node.held = False
            node.due_at = self._clock() + BEAT_S
            return True
        self._hold(node, RESYNC_S if reply.verdict is Verdict.RESYNC else RETRY_S)
        return False

    def _hold(self, node: _Outgoing, wait_s: float) -> None:
        node.held = True
        node.due_at = self._clock() + wait_s


def _has_more(node: _Outgoing) -> bool:
    return node.resync or node.unsaid is not None or bool(node.queue)
