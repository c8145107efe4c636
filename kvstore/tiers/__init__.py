"""Tiers below host memory: disk, and what all nodes share (a folder, an object store, Redis).

`open_tier(url, capacity_bytes)` builds one; each implements `interfaces.Tier` and passes `tests/kvstore/tiers/`.
Modules are imported when their scheme is used.
"""

from __future__ import annotations

from tandem.common.errors import ConfigError
from tandem.kvstore.interfaces import Tier

SCHEMES = (
    "disk:/PATH",
    "folder:/PATH",
    "redis://HOST:PORT",
    "rediss://HOST:PORT",
    "unix:///PATH",
    "s3://BUCKET/PREFIX",
)


def open_tier(url: str, capacity_bytes: int) -> Tier:
    """Raises ConfigError if the URL, the capacity or the place cannot be used. A disk tier stores nothing before its
    `objects` were listed."""
    if capacity_bytes <= 0:
        raise ConfigError(f"the tier {url} needs a capacity in bytes that is greater than 0, not {capacity_bytes}")
    scheme, _, rest = url.partition(":")
    if scheme in ("disk", "folder"):
        path = rest.removeprefix("//")
        if not path:
            raise ConfigError(f"{url!r} names no folder; write {scheme}:/PATH")
        if scheme == "disk":
            from tandem.kvstore.tiers.disk import DiskTier

            return DiskTier(path, capacity_bytes, later=True)
        from tandem.kvstore.tiers.folder import FolderTier

        return FolderTier(path, capacity_bytes)
    if scheme in ("redis", "rediss", "unix"):
        from tandem.kvstore.tiers.redis_tier import RedisTier

        return RedisTier(url, capacity_bytes)
    if scheme == "s3":
        from tandem.kvstore.tiers.object_store import ObjectStoreTier, open_store

        return ObjectStoreTier(open_store(url), capacity_bytes)
    raise ConfigError(f"{url!r} is no tier; use one of {', '.join(SCHEMES)}")
