"""The gRPC control service of a store node. Calls run on a few threads of the server; the node is thread-safe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import grpc
from prometheus_client import CollectorRegistry, generate_latest

import tandem
from tandem.kvstore.contexts.context_files import Context
from tandem.kvstore.contexts.contexts import ContextRefusedError, ContextShelf, Problem
from tandem.kvstore.interfaces import Directory, Location, ObjectKey, StoreIntegrityError, TierName
from tandem.kvstore.node.stats import TierStats
from tandem.kvstore.process.metrics import node_values
from tandem.kvstore.process.open import OpenNode
from tandem.proto import kvnode_pb2, kvnode_pb2_grpc

KEY_BYTES = 32
MAX_KEYS = 4096
"""Most keys of one Lookup."""
MAX_CHECKED = 1_000_000

_TIERS = {
    TierName.HOST: kvnode_pb2.TIER_HOST,
    TierName.DISK: kvnode_pb2.TIER_DISK,
    TierName.REMOTE: kvnode_pb2.TIER_REMOTE,
}
_REFUSED: dict[Problem, grpc.StatusCode] = {
    "invalid": grpc.StatusCode.INVALID_ARGUMENT,
    "old_version": grpc.StatusCode.FAILED_PRECONDITION,
    "full": grpc.StatusCode.RESOURCE_EXHAUSTED,
}
_TIER_NAMES = {number: name for name, number in _TIERS.items()}


class KvNodeService(kvnode_pb2_grpc.KvNodeServicer):
    """The gRPC servicer of one open node. Methods run on the server's threads."""

    def __init__(
        self, store: OpenNode, directory: Directory, contexts: ContextShelf, registry: CollectorRegistry
    ) -> None:
        """`registry`: the process's metrics."""
        self._registry = registry
        self._store = store
        self._node = store.node
        self._node_id = store.node.settings.node_id
        self._directory = directory
        self._contexts = contexts

    def Stats(self, request: kvnode_pb2.StatsRequest, context: grpc.ServicerContext) -> kvnode_pb2.StatsResponse:
        """RPC: counters and the state of the moment."""
        stats, data_plane = self._store.stats()
        values = node_values(stats)
        peer = kvnode_pb2.TierStats(tier=kvnode_pb2.TIER_PEER, hits=stats.peer_hits, hit_bytes=stats.peer_hit_bytes)
        if data_plane is not None:
            names = [field.name for field in fields(data_plane)]
            values |= {f"data_plane_{name}": float(getattr(data_plane, name)) for name in names}
        if self._store.replicator is not None:
            values["replicas_copied"] = float(self._store.replicator.copied)
            values["replicas_copied_bytes"] = float(self._store.replicator.copied_bytes)
        return kvnode_pb2.StatsResponse(
            node_id=self._node_id,
            epoch=self._node.settings.epoch,
            version=tandem.__version__,
            tiers=[*map(_tier_stats, stats.tiers), peer],
            values=values,
            refused_puts={str(reason): count for reason, count in stats.refused.items()},
            known_nodes=sorted(self._directory.nodes()),
        )

    def GetMetrics(
        self, request: kvnode_pb2.GetMetricsRequest, context: grpc.ServicerContext
    ) -> kvnode_pb2.MetricsText:
        return kvnode_pb2.MetricsText(text=generate_latest(self._registry).decode())

    def Lookup(self, request: kvnode_pb2.LookupRequest, context: grpc.ServicerContext) -> kvnode_pb2.LookupResponse:
        """RPC: where objects are, on this node and elsewhere."""
        if len(request.keys) > MAX_KEYS:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"{len(request.keys)} keys; the limit is {MAX_KEYS}")
        keys = [_key(raw, context) for raw in request.keys]
        elsewhere = self._directory.lookup(keys)
        return kvnode_pb2.LookupResponse(
            objects=[
                self._found(key, [place for place in places if place.node_id != self._node_id])
                for key, places in zip(keys, elsewhere, strict=True)
            ]
        )

    def _found(self, key: ObjectKey, places: Sequence[Location]) -> kvnode_pb2.FoundObject:
        info = self._node.lookups.info(key)
        found = kvnode_pb2.FoundObject(
            key=key,
            tiers=[_TIERS[tier] for tier in self._node.lookups.contains(key)],
            elsewhere=[
                kvnode_pb2.Location(node_id=place.node_id, tier=place.tier, size=place.size) for place in places
            ],
        )
        if info is not None:
            found.size, found.num_tokens, found.owner, found.model = info.size, info.num_tokens, info.owner, info.model
        return found

    def Pin(self, request: kvnode_pb2.PinRequest, context: grpc.ServicerContext) -> kvnode_pb2.PinResponse:
        """RPC: keeps an object for a time."""
        if not request.owner:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "owner: a pin needs one")
        if not 0 < request.ttl_s < float("inf"):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"ttl_s {request.ttl_s}: must be a positive time")
        key = _key(request.key, context)
        return kvnode_pb2.PinResponse(pinned=self._node.commands.pin(key, request.owner, request.ttl_s, request.hard))

    def Unpin(self, request: kvnode_pb2.UnpinRequest, context: grpc.ServicerContext) -> kvnode_pb2.UnpinResponse:
        return kvnode_pb2.UnpinResponse(unpinned=self._node.commands.unpin(_key(request.key, context), request.owner))

    def Clear(self, request: kvnode_pb2.ClearRequest, context: grpc.ServicerContext) -> kvnode_pb2.ClearResponse:
        owner = request.owner if request.HasField("owner") else None
        model = request.model if request.HasField("model") else None
        return kvnode_pb2.ClearResponse(objects=self._node.commands.clear(owner, model))

    def Move(self, request: kvnode_pb2.MoveRequest, context: grpc.ServicerContext) -> kvnode_pb2.MoveResponse:
        """RPC: puts an object into a tier."""
        tier = _TIER_NAMES.get(request.tier)
        if tier is None:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"tier {request.tier}: use host, disk or remote")
        return kvnode_pb2.MoveResponse(moved=self._node.commands.move(_key(request.key, context), tier))

    def Check(self, request: kvnode_pb2.CheckRequest, context: grpc.ServicerContext) -> kvnode_pb2.CheckResponse:
        """RPC: balances the books, and scrubs some objects."""
        error = ""
        try:
            self._node.check_integrity()
        except StoreIntegrityError as failure:
            error = str(failure)
        report = self._node.scrub.run(min(request.max_objects, MAX_CHECKED))
        return kvnode_pb2.CheckResponse(
            integrity_error=error,
            checked=report.checked,
            checked_bytes=report.checked_bytes,
            bad_keys=report.bad,
            unread=report.unread,
        )

    def Drain(self, request: kvnode_pb2.DrainRequest, context: grpc.ServicerContext) -> kvnode_pb2.DrainResponse:
        return kvnode_pb2.DrainResponse(flushed=self._node.flush(request.grace_s))

    def PutContext(
        self, request: kvnode_pb2.PutContextRequest, context: grpc.ServicerContext
    ) -> kvnode_pb2.PutContextResponse:
        """RPC: registers a named context, or a new version of it."""
        try:
            put = self._contexts.put(
                request.owner,
                request.name,
                request.token_ids,
                root=request.root,
                ttl_s=request.ttl_s,
                version=request.version,
            )
        except ContextRefusedError as refusal:
            context.abort(_REFUSED[refusal.problem], str(refusal))
        return kvnode_pb2.PutContextResponse(context=self._context(put))

    def GetContext(
        self, request: kvnode_pb2.GetContextRequest, context: grpc.ServicerContext
    ) -> kvnode_pb2.GetContextResponse:
        """RPC: one named context. NOT_FOUND if the owner has none of that name."""
        found = self._contexts.get(request.owner, request.name)
        if found is None:
            context.abort(grpc.StatusCode.NOT_FOUND, f"{request.owner[:64]} has no context {request.name[:64]!r}")
        answer = self._context(found)
        if request.with_tokens:
            answer.token_ids.extend(found.token_ids)
        return kvnode_pb2.GetContextResponse(context=answer)

    def ListContexts(
        self, request: kvnode_pb2.ListContextsRequest, context: grpc.ServicerContext
    ) -> kvnode_pb2.ListContextsResponse:
        found = self._contexts.list(request.owner if request.HasField("owner") else None)
        return kvnode_pb2.ListContextsResponse(contexts=map(self._context, found))

    def DropContext(
        self, request: kvnode_pb2.DropContextRequest, context: grpc.ServicerContext
    ) -> kvnode_pb2.DropContextResponse:
        return kvnode_pb2.DropContextResponse(dropped=self._contexts.drop(request.owner, request.name))

    def _context(self, context: Context) -> kvnode_pb2.Context:
        """The message, without token ids."""
        residency = self._contexts.residency(context)
        return kvnode_pb2.Context(
            owner=context.owner,
            name=context.name,
            version=context.version,
            num_tokens=context.num_tokens,
            root=context.root,
            chunk_tokens=context.chunk_tokens,
            created_at=context.created_at,
            expires_at=context.expires_at,
            resident_tokens=residency.resident_tokens,
            tiers=[kvnode_pb2.ContextTier(tier=_TIERS[tier], chunks=count) for tier, count in residency.chunks.items()],
        )


def _key(raw: bytes, context: grpc.ServicerContext) -> ObjectKey:
    if len(raw) != KEY_BYTES:
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"a key has {KEY_BYTES} bytes, not {len(raw)}")
    return ObjectKey(raw)


def _tier_stats(tier: TierStats) -> kvnode_pb2.TierStats:
    names = [field.name for field in kvnode_pb2.TierStats.DESCRIPTOR.fields if field.name != "tier"]
    return kvnode_pb2.TierStats(tier=_TIERS[tier.tier], **{name: getattr(tier, name) for name in names})
