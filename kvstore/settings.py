"""Settings of the KV store: the same for a worker that uses it and for `tandem kvstore`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from tandem.common.errors import ConfigError
from tandem.common.settings import Group
from tandem.kvstore.eviction import Shares

_BOUNDED_BY = {"kv_disk": "kv_disk_bytes", "kv_remote": "kv_remote_bytes"}


@dataclass(frozen=True, kw_only=True)  # no slots: a slotted class cannot inherit from two others with fields
class StoreSettings:
    """Read by workers, by `tandem kvstore` and by `tandem serve`."""

    store: ClassVar[Group]
    """Store: where KV is kept beyond the engine's KV pool, and what may be shared with whom."""
    kv_store_socket: str = ""
    """Unix path where the store node of this host (`tandem kvstore --kv-store-socket PATH`) listens for workers, which
    use its memory. Empty: a node inside this process if `kv_host_bytes` is not 0, else no store."""
    kv_host_bytes: int = 0
    """Host memory for KV. Taken as it fills, then kept."""
    kv_disk: str = ""
    """Folder for KV on disk, which survives restarts; one process each. Empty: none."""
    kv_disk_bytes: int = 10 << 30
    """What that folder may take."""
    kv_remote: str = ""
    """Store shared by all nodes: redis://HOST:PORT/DB, unix:///path/of/redis.sock, s3://BUCKET/PREFIX or folder:/path.
    Empty: none."""
    kv_remote_bytes: int = 100 << 30
    """What the remote store may take, all nodes together."""
    kv_directory: str = ""
    """Who tells the nodes what the others hold: redis://HOST:PORT/DB, or the gRPC address of one store node (HOST:PORT
    or unix:/path; that node itself is given the same). Empty: a worker knows only its own, a store node has a directory
    for others."""
    kv_peer_listen: str = ""
    """HOST:PORT where store nodes of other hosts read from this one; they are told this very address. Empty: this host
    only."""
    secret_file: str = ""
    """File with the deployment's secret (16 bytes or more), the same for routers, workers and store nodes. Empty: the
    variable TANDEM_SECRET holds it; without either nobody on another machine is listened to."""
    kv_chunk_tokens: int = 256
    """Tokens of one stored object; a multiple of the engine's block size, and the same on all workers that share."""
    kv_eviction: str = ""
    """What leaves a full tier: a name of docs/eviction.md. Empty: the default there."""
    kv_encryption_key_file: str = ""
    """File with 32 random bytes, or 64 hex digits, with which KV on disk and in the remote store is encrypted; the same
    for all nodes of a remote store. Empty: not encrypted."""
    kv_disk_codec: str = "raw"
    """How KV is encoded on disk: raw or lossless; kivi-int8, kivi-int4 and kivi-int2 take less and change answers,
    the smaller the more."""
    kv_remote_codec: str = "raw"
    """The same for the remote store."""
    kv_link_codec: str = "auto"
    """How KV comes from other nodes: a codec, or auto: whatever is fastest at the link's measured
    speed, among the exact ones unless `kv_near`."""
    kv_near: bool = False
    """Whether KV that went through a codec which is not exact may be used. It may change answers. Nodes and workers
    need the same."""
    kv_quotas: dict[str, float] = field(default_factory=dict)
    """Share of each tier that a tenant may fill, such as `{acme: 0.25}`; `*` stands for those not named."""
    kv_nixl: bool = False
    """Read from nodes of other hosts, and let them read, over NIXL (RDMA where there is a network card for it) where
    both sides have this set. All of `kv_host_bytes` is pinned at the start."""
    kv_copies: int = 1
    """Copies, on different nodes, of what is read often. Needs `kv_directory` if more than 1."""

    def __post_init__(self) -> None:
        for setting in ("kv_host_bytes", "kv_disk_bytes", "kv_remote_bytes"):
            if getattr(self, setting) < 0:
                raise ConfigError(f"{setting} {getattr(self, setting)}: must not be negative")
        for setting, bound in _BOUNDED_BY.items():
            if getattr(self, setting) and getattr(self, bound) == 0:
                raise ConfigError(f"{bound} 0: {setting} is set, so say how many bytes it may take")
        if not self.kv_host_bytes and not self.kv_store_socket:
            for setting in ("kv_disk", "kv_remote", "kv_directory", "kv_peer_listen", "kv_nixl"):
                if getattr(self, setting):
                    raise ConfigError(f"{setting} is set and kv_host_bytes is 0: everything passes through host memory")
        if self.kv_chunk_tokens <= 0:
            raise ConfigError(f"kv_chunk_tokens {self.kv_chunk_tokens}: must be positive, a multiple of the block size")
        Shares.read(self.kv_quotas)
        if self.kv_copies < 1:
            raise ConfigError(f"kv_copies {self.kv_copies}: must be at least 1")
        if self.kv_copies > 1 and not self.kv_directory:
            raise ConfigError(f"kv_copies {self.kv_copies}: needs kv_directory, which knows the other nodes")
        if self.kv_peer_listen:
            host, _ = split_address(self.kv_peer_listen, "kv_peer_listen")
            if host in ("0.0.0.0", "::"):
                raise ConfigError(
                    f"kv_peer_listen {self.kv_peer_listen}: other nodes are told this address, so it must be one they "
                    "can reach, not a wildcard"
                )


def split_address(address: str, setting: str) -> tuple[str, int]:
    """HOST:PORT as a pair; [::1]:80 for IPv6. Raises ConfigError naming `setting`."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{setting} {address!r}: must be HOST:PORT")
    return host.strip("[]"), int(port)
