"""From settings to a store that works: tiers, directory, node, data plane and replication, put together and taken apart
in the right order. Workers call `open_home`, `tandem kvstore` calls `open_node`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tandem.common.errors import ConfigError
from tandem.common.scratch import scratch_folder
from tandem.common.secret import check_reachable, read_secret
from tandem.kvstore.codecs import Fidelity, get_codec
from tandem.kvstore.dataplane.client import RemoteHomeNode
from tandem.kvstore.dataplane.nixl import NixlAgent
from tandem.kvstore.dataplane.peer_reader import SocketPeerReader
from tandem.kvstore.dataplane.protocol import DATA_PLANE
from tandem.kvstore.dataplane.server import DataServer
from tandem.kvstore.dataplane.stats import DataPlaneStats
from tandem.kvstore.directory import open_directory
from tandem.kvstore.eviction import DEFAULT_POLICY, Shares, make_policy
from tandem.kvstore.interfaces import Directory, HomeNode, ObjectInfo, ObjectKey, Tier
from tandem.kvstore.node import KvNode, NodeSettings, NodeStats
from tandem.kvstore.node.link_codecs import AUTO
from tandem.kvstore.replication.replication import Replicator
from tandem.kvstore.settings import StoreSettings, split_address
from tandem.wire.peers import PeerIdentity, local_host_id

logger = logging.getLogger(__name__)

_INDEX_S = 1.0
"""A node of which all is known so soon begins with it; the others answer meanwhile."""
_KEY_BYTES = 32


@dataclass(slots=True)
class OpenNode:
    """A node in this process, and what was opened for it."""

    node: KvNode
    server: DataServer | None
    """None: no other process may use this node."""
    directory: Directory | None
    """None: it knows of no other node."""
    replicator: Replicator | None
    resources: contextlib.ExitStack

    def stats(self) -> tuple[NodeStats, DataPlaneStats | None]:
        return self.node.stats(), self.server.stats() if self.server else None

    def close(self) -> None:
        self.resources.close()


@dataclass(slots=True)
class OpenStore:
    """What a worker has of the store."""

    home: HomeNode
    embedded: OpenNode | None
    """None: the node is a process of its own."""

    @property
    def node_id(self) -> str:
        """The id of the home node, as in the directory; empty while it is out of reach and was never there."""
        if self.embedded is not None:
            return self.embedded.node.settings.node_id
        return self.home.node_id if isinstance(self.home, RemoteHomeNode) else ""

    def close(self) -> None:
        """Closes the node of this process, or the connection to another."""
        if self.embedded is not None:
            self.embedded.close()
        else:
            self.home.close()


def open_home(settings: StoreSettings, node_id: str, epoch: int) -> OpenStore | None:
    """The store that a worker's settings ask for; None if they ask for none. `node_id` is the worker's id. Raises
    ConfigError."""
    if settings.kv_store_socket:
        return OpenStore(
            RemoteHomeNode(settings.kv_store_socket, node_id, secret=read_secret(settings.secret_file)), None
        )
    if not settings.kv_host_bytes:
        return None
    embedded = open_node(settings, node_id, epoch)
    return OpenStore(embedded.node, embedded)


def open_node(
    settings: StoreSettings,
    node_id: str,
    epoch: int,
    *,
    unix_path: str = "",
    grpc_address: str = "",
    directory: Directory | None = None,
) -> OpenNode:
    """A started node. Takes over `directory`, else opens the one of the settings. Raises ConfigError."""
    with contextlib.ExitStack() as opened:  # closed in reverse, also when one of the next steps fails
        if directory is not None:
            opened.callback(directory.close)
        secret = read_secret(settings.secret_file)
        check_reachable(secret, "kv_peer_listen", settings.kv_peer_listen)
        if directory is None and settings.kv_directory:
            directory = open_directory(settings.kv_directory, secret)
            opened.callback(directory.close)
        _check_names(settings)
        agent = None
        if settings.kv_nixl and directory is not None:
            agent = NixlAgent(node_id)
            opened.callback(agent.close)  # after the node, which reads through it
        peers = None
        if directory is not None:
            peers = SocketPeerReader(directory.nodes, node_id, secret=secret, agent=agent)
            opened.callback(peers.close)
        with contextlib.ExitStack() as unowned:
            tiers = _open_tiers(settings, unowned)
            node = KvNode(_node_settings(settings, node_id, epoch), tiers=tiers, directory=directory, peers=peers)
            unowned.pop_all()  # the node closes them
        opened.callback(node.close)
        if agent is not None:
            agent.register(node.arena.view(0, node.arena.capacity_bytes), node.keep)
        server = None
        if directory is not None or unix_path:
            if not unix_path:
                unix_path = str(opened.enter_context(scratch_folder()) / "node.sock")
            unix_path = str(Path(unix_path).absolute())
            identity = PeerIdentity(node_id, epoch, key=DATA_PLANE.key(secret))
            server = _serve(settings, node, identity, unix_path, agent)
            opened.callback(server.stop)
        host = split_address(settings.kv_peer_listen, "kv_peer_listen")[0] if settings.kv_peer_listen else ""
        node.start(unix_path=unix_path, host=host, port=server.port if server else 0, grpc_address=grpc_address)
        if not node.wait_indexed(_INDEX_S):
            logger.info("the disk is still being indexed: what is not found yet is a miss, writes to it wait")
        replicator = None
        if directory is not None and peers is not None and settings.kv_copies > 1:
            replicator = Replicator(_Replicas(node), directory, peers, settings.kv_copies, node_id=node_id)
            replicator.start()
            opened.callback(replicator.close)
        return OpenNode(node, server, directory, replicator, opened.pop_all())


def _node_settings(settings: StoreSettings, node_id: str, epoch: int) -> NodeSettings:
    return NodeSettings(
        node_id=node_id,
        epoch=epoch,
        host_id=local_host_id(),
        host_bytes=settings.kv_host_bytes,
        eviction=settings.kv_eviction or DEFAULT_POLICY,
        quotas=Shares.read(settings.kv_quotas),
        disk_codec=settings.kv_disk_codec,
        remote_codec=settings.kv_remote_codec,
        link_codec=settings.kv_link_codec,
        near_allowed=settings.kv_near,
    )


def _check_names(settings: StoreSettings) -> None:
    make_policy(settings.kv_eviction or DEFAULT_POLICY, settings.kv_host_bytes)
    for setting in ("kv_disk_codec", "kv_remote_codec", "kv_link_codec"):
        name = getattr(settings, setting)
        if setting == "kv_link_codec" and name == AUTO:
            continue
        try:
            codec = get_codec(name)
        except ValueError as error:
            raise ConfigError(f"{setting}: {error}") from error
        if codec.fidelity is not Fidelity.EXACT and not settings.kv_near:
            raise ConfigError(f"{setting} {name}: is not exact; set kv_near, here and on the workers, to use it")


class _Replicas:
    """`replication.ReplicaSource` of a node."""

    def __init__(self, node: KvNode) -> None:
        self._node = node
        self.info = node.lookups.info
        self.view = node.view
        self.read_range = node.read_range

    def hot(self, threshold: int) -> list[tuple[ObjectKey, int]]:
        return list(self._node.lookups.hot(threshold).items())

    def objects(self) -> Iterator[tuple[ObjectKey, ObjectInfo]]:
        return ((stored.key, stored.info) for stored in self._node.lookups.objects())


def _serve(
    settings: StoreSettings,
    node: KvNode,
    identity: PeerIdentity,
    unix_path: str,
    agent: NixlAgent | None,
) -> DataServer:
    listen = split_address(settings.kv_peer_listen, "kv_peer_listen") if settings.kv_peer_listen else None
    server = DataServer(node, identity, unix_path=unix_path, listen=listen, agent=agent)
    try:
        server.start()
    except OSError as error:
        where = f"kv_store_socket {error.filename}" if error.filename else f"kv_peer_listen {settings.kv_peer_listen}"
        raise ConfigError(f"{where}: {error.strerror}; is another process there?") from error
    return server


def _open_tiers(settings: StoreSettings, unowned: contextlib.ExitStack) -> list[Tier]:
    """The tiers below host memory, sealed where a key is set. A node without any loads nothing of them."""
    key = read_encryption_key(settings.kv_encryption_key_file)
    wanted = []
    if settings.kv_disk:
        wanted.append(("kv_disk", f"disk:{settings.kv_disk}", settings.kv_disk_bytes))
    if settings.kv_remote:
        wanted.append(("kv_remote", settings.kv_remote, settings.kv_remote_bytes))
    if not wanted:
        return []
    from tandem.kvstore.tiers import open_tier
    from tandem.kvstore.tiers.sealed import SealedTier

    tiers: list[Tier] = []
    for setting, url, capacity_bytes in wanted:
        try:
            tier = open_tier(url, capacity_bytes)
        except ConfigError as error:
            problem = str(error).removeprefix(f"{setting}: ")
            raise ConfigError(f"{setting}: {problem}") from error
        unowned.callback(tier.close)
        tiers.append(SealedTier(tier, key) if key else tier)
    return tiers


def read_encryption_key(path: str) -> bytes:
    """Empty without a file. Raises ConfigError."""
    if not path:
        return b""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"kv_encryption_key_file {path}: cannot be read ({error.strerror})") from error
    if len(raw) == _KEY_BYTES:
        return raw
    with contextlib.suppress(ValueError):
        key = bytes.fromhex(raw.decode("ascii", "replace").strip())
        if len(key) == _KEY_BYTES:
            return key
    raise ConfigError(
        f"kv_encryption_key_file {path}: write {_KEY_BYTES} random bytes or their hex digits into it "
        "(`openssl rand -hex 32`)"
    )
