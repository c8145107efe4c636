"""What the directories outside this process have in common: they can be away, and nobody may wait for them then."""

from __future__ import annotations

import abc
import logging
import threading
from collections.abc import Callable, Sequence

from tandem.kvstore.directory.messages import Dump, NodeState, Page, Reply, Update
from tandem.kvstore.directory.publisher import Publisher
from tandem.kvstore.interfaces import DirectoryEvent, Location, NodeInfo, ObjectKey

log = logging.getLogger(__name__)

LOOKUP_TIMEOUT_S = 0.5
"""A look-up is on the way of a request: longer than this, computing is the better bet."""
CALL_TIMEOUT_S = 1.0
"""Everything else, in the background."""
REFRESH_S = 0.25
"""How often the list of nodes is fetched, and whether a lost directory is back is tried."""


class DirectoryFault(Exception):
    """The directory cannot be reached or answers nonsense. Never leaves this package."""


class RemoteDirectory(abc.ABC):
    """`interfaces.Directory` over a connection; also the `Uplink` and `Feed` behind it.

    After a fault look-ups find nothing at once, until the background thread has reached the directory again.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._up = True
        self._nodes: dict[str, NodeInfo] = {}
        self._closing = threading.Event()
        self._publisher = Publisher(self, "kv-directory-publish")
        self._keeper = threading.Thread(target=self._keep, name="kv-directory-keep", daemon=True)

    def _start(self) -> None:
        """The subclass can be called now."""
        self._publisher.start()
        self._keeper.start()

    # interfaces.Directory

    def register(self, node: NodeInfo, snapshot: Callable[[], Sequence[DirectoryEvent]]) -> None:
        self._publisher.register(node, snapshot)

    def publish(self, node_id: str, events: Sequence[DirectoryEvent]) -> None:
        self._publisher.publish(node_id, events)

    def lookup(self, keys: Sequence[ObjectKey]) -> list[tuple[Location, ...]]:
        """Locations on live nodes, as `Directory.lookup`."""
        if self._up and keys:
            try:
                return self._find(keys)
            except DirectoryFault as fault:
                self._set_up(False, str(fault))
        return [()] * len(keys)

    def nodes(self) -> dict[str, NodeInfo]:
        return dict(self._nodes)

    def flush(self, timeout_s: float) -> bool:
        """Waits until what this process has published can be found. False: time is up."""
        return self._publisher.flush(timeout_s)

    def close(self) -> None:
        """Ends the publisher, which unregisters the nodes, then the rest. Idempotent."""
        self._publisher.close()
        self._closing.set()
        self._keeper.join()
        self._up = False
        self._disconnect()

    # Uplink and Feed

    @abc.abstractmethod
    def announce(self, node: NodeInfo, seq: int) -> Reply: ...

    @abc.abstractmethod
    def apply(self, update: Update) -> Reply: ...

    @abc.abstractmethod
    def withdraw(self, node_id: str, epoch: int) -> None: ...

    @abc.abstractmethod
    def states(self) -> dict[str, NodeState] | None: ...

    @abc.abstractmethod
    def read(self, cursor: str) -> Page | None: ...

    @abc.abstractmethod
    def dump(self, node_id: str) -> Dump | None: ...

    # What a subclass adds

    @abc.abstractmethod
    def _find(self, keys: Sequence[ObjectKey]) -> list[tuple[Location, ...]]:
        """Raises DirectoryFault."""

    @abc.abstractmethod
    def _disconnect(self) -> None: ...

    def _tend(self) -> None:  # noqa: B027 - most have nothing to do
        """Called now and then while the directory can be reached. Raises DirectoryFault."""

    # Inside

    def _keep(self) -> None:
        while not self._closing.is_set():
            states = self.states()
            if states is not None:
                self._nodes = {name: state.info for name, state in states.items()}
                self._set_up(True, "")
                try:
                    self._tend()
                except DirectoryFault as fault:
                    self._set_up(False, str(fault))
            elif self._up:
                self._set_up(False, "no answer")
            self._closing.wait(REFRESH_S)

    def _set_up(self, up: bool, why: str) -> None:
        if up is not self._up:
            self._up = up
            if up:
                log.info("the directory at %s is back", self._address)
            else:
                log.warning("the directory at %s is away (%s): only what is stored here is found", self._address, why)
