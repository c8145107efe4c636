"""The embedded directory over gRPC: `proto/kvdirectory.proto`, both ends."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence

import grpc

from tandem.common.credentials import open_channel, remedy
from tandem.kvstore.directory.embedded import EmbeddedDirectory
from tandem.kvstore.directory.messages import UNREACHABLE, Dump, NodeState, Page, Reply, Update, Verdict
from tandem.kvstore.directory.remote import CALL_TIMEOUT_S, LOOKUP_TIMEOUT_S, DirectoryFault, RemoteDirectory
from tandem.kvstore.interfaces import DirectoryEvent, EventBatch, Location, NodeInfo, ObjectKey, TierName
from tandem.proto import kvdirectory_pb2 as pb
from tandem.proto import kvdirectory_pb2_grpc as pb_grpc

log = logging.getLogger(__name__)

MAX_LOOKUP_KEYS = 16_384
"""Most keys of one look-up: four million tokens."""
MAX_KEY_BYTES = 64
MAX_NODE_ID = 256
REFUSALS = 3
"""Refusals in a row before the log says that the secret may be another."""
_DUMP_EVENTS = 4_096
_DUMP_TIMEOUT_S = 30.0

_TIER_TO_PROTO = {
    TierName.DEVICE: pb.TIER_DEVICE,
    TierName.HOST: pb.TIER_HOST,
    TierName.DISK: pb.TIER_DISK,
    TierName.PEER: pb.TIER_PEER,
    TierName.REMOTE: pb.TIER_REMOTE,
}
_TIER_FROM_PROTO = {number: name for name, number in _TIER_TO_PROTO.items()}
_VERDICT_TO_PROTO = {
    Verdict.OK: pb.VERDICT_OK,
    Verdict.RESYNC: pb.VERDICT_RESYNC,
    Verdict.SUPERSEDED: pb.VERDICT_SUPERSEDED,
}
_VERDICT_FROM_PROTO = {number: name for name, number in _VERDICT_TO_PROTO.items()}
_CHANNEL_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2000),  # despite its name: how long connecting may take
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
]


class DirectoryService(pb_grpc.KvDirectoryServicer):
    """Refuses what does not make sense with INVALID_ARGUMENT and the name of the field."""

    def __init__(self, embedded: EmbeddedDirectory) -> None:
        self._embedded = embedded

    def Announce(self, request: pb.AnnounceRequest, context: grpc.ServicerContext) -> pb.Reply:
        _check_node_id(request.node.node_id, context)
        return _reply_to_proto(self._embedded.announce(_node_from_proto(request.node), request.seq))

    def Apply(self, request: pb.Update, context: grpc.ServicerContext) -> pb.Reply:
        """RPC: a batch of changes of one node."""
        _check_node_id(request.node_id, context)
        update = _update_from_proto(request)
        if update is None:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"events: keys of 1 to {MAX_KEY_BYTES} bytes, known tiers")
        return _reply_to_proto(self._embedded.apply(update))

    def Withdraw(self, request: pb.WithdrawRequest, context: grpc.ServicerContext) -> pb.WithdrawResponse:
        self._embedded.withdraw(request.node_id, request.epoch)
        return pb.WithdrawResponse()

    def Lookup(self, request: pb.LookupRequest, context: grpc.ServicerContext) -> pb.LookupResponse:
        """RPC: locations of many keys. Refuses more than one call may ask for."""
        if len(request.keys) > MAX_LOOKUP_KEYS:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"keys: at most {MAX_LOOKUP_KEYS}, not {len(request.keys)}")
        found = self._embedded.lookup([ObjectKey(key) for key in request.keys])
        return pb.LookupResponse(
            found=[
                pb.Found(
                    locations=[
                        pb.Location(node_id=it.node_id, epoch=it.epoch, tier=_TIER_TO_PROTO[it.tier], size=it.size)
                        for it in locations
                    ]
                )
                for locations in found
            ]
        )

    def States(self, request: pb.StatesRequest, context: grpc.ServicerContext) -> pb.StatesResponse:
        """RPC: live nodes."""
        states = self._embedded.states().values()
        return pb.StatesResponse(
            states=[pb.NodeState(node=_node_to_proto(state.info), seq=state.seq) for state in states]
        )

    def Read(self, request: pb.ReadRequest, context: grpc.ServicerContext) -> pb.ReadResponse:
        page = self._embedded.read(request.cursor)
        return pb.ReadResponse(updates=[_update_to_proto(update) for update in page.updates], cursor=page.cursor)

    def Dump(self, request: pb.DumpRequest, context: grpc.ServicerContext) -> Iterator[pb.DumpPart]:
        """RPC: all that one node holds."""
        dump = self._embedded.dump(request.node_id)
        if dump is None:
            return
        for start in range(0, max(1, len(dump.events)), _DUMP_EVENTS):
            part = dump.events[start : start + _DUMP_EVENTS]
            yield pb.DumpPart(epoch=dump.epoch, seq=dump.seq, events=_events_to_proto(part))


def add_to_server(server: grpc.Server, embedded: EmbeddedDirectory) -> None:
    pb_grpc.add_KvDirectoryServicer_to_server(DirectoryService(embedded), server)


class DirectoryClient(RemoteDirectory):
    """The directory that the process at gRPC address `address` (HOST:PORT or unix:PATH) embeds."""

    def __init__(self, address: str, secret: bytes = b"") -> None:
        super().__init__(address)
        self._secret = secret
        self._channel = open_channel(address, secret, _CHANNEL_OPTIONS)
        self._stub = pb_grpc.KvDirectoryStub(self._channel)
        self._refusals = 0
        """Refusals in a row."""
        self._start()

    def announce(self, node: NodeInfo, seq: int) -> Reply:
        """Tells the directory that a node lives."""
        try:
            request = pb.AnnounceRequest(node=_node_to_proto(node), seq=seq)
            return _reply_from_proto(self._stub.Announce(request, timeout=CALL_TIMEOUT_S))
        except grpc.RpcError as error:
            _complain(error)
            return UNREACHABLE

    def apply(self, update: Update) -> Reply:
        """Sends one batch of changes."""
        try:
            return _reply_from_proto(self._stub.Apply(_update_to_proto(update), timeout=CALL_TIMEOUT_S))
        except grpc.RpcError as error:
            _complain(error)
            return UNREACHABLE

    def withdraw(self, node_id: str, epoch: int) -> None:
        """Takes a node out."""
        try:
            self._stub.Withdraw(pb.WithdrawRequest(node_id=node_id, epoch=epoch), timeout=CALL_TIMEOUT_S)
        except grpc.RpcError as error:
            log.info("%s could not be unregistered (%s); its entries lapse in a few seconds", node_id, _code(error))

    def states(self) -> dict[str, NodeState] | None:
        """Asks for the live nodes."""
        try:
            answer = self._stub.States(pb.StatesRequest(), timeout=CALL_TIMEOUT_S)
        except grpc.RpcError as error:
            self._look_for_a_secret(error)
            return None
        self._refusals = 0
        return {it.node.node_id: NodeState(_node_from_proto(it.node), it.seq) for it in answer.states}

    def _look_for_a_secret(self, error: grpc.RpcError) -> None:
        """Says so where it is the reason; a directory that just ends looks like that, too, but once."""
        reason = remedy((error.details() if isinstance(error, grpc.Call) else "") or "", self._secret)
        self._refusals = self._refusals + 1 if reason else 0
        if self._refusals == REFUSALS:
            log.error("no connection to the directory at %s%s", self._address, reason)

    def read(self, cursor: str) -> Page | None:
        """Asks for the updates after `cursor`."""
        try:
            answer = self._stub.Read(pb.ReadRequest(cursor=cursor), timeout=CALL_TIMEOUT_S)
        except grpc.RpcError:
            return None
        updates = [_update_from_proto(update) for update in answer.updates]
        return Page(tuple([update for update in updates if update is not None]), answer.cursor)

    def dump(self, node_id: str) -> Dump | None:
        """Asks for all that one node holds."""
        events: list[DirectoryEvent] = []
        part: pb.DumpPart | None = None
        try:
            for part in self._stub.Dump(pb.DumpRequest(node_id=node_id), timeout=_DUMP_TIMEOUT_S):
                events += _events_from_proto(part.events)
        except (grpc.RpcError, KeyError):
            return None
        return None if part is None else Dump(part.epoch, part.seq, events)

    def _find(self, keys: Sequence[ObjectKey]) -> list[tuple[Location, ...]]:
        try:
            answer = self._stub.Lookup(pb.LookupRequest(keys=keys), timeout=LOOKUP_TIMEOUT_S)
        except grpc.RpcError as error:
            raise DirectoryFault(_code(error)) from error
        if len(answer.found) != len(keys):
            raise DirectoryFault(f"{len(answer.found)} answers to {len(keys)} keys")
        return [
            tuple(
                [
                    Location(it.node_id, it.epoch, _TIER_FROM_PROTO[it.tier], it.size)
                    for it in found.locations
                    if it.tier in _TIER_FROM_PROTO
                ]
            )
            for found in answer.found
        ]

    def _disconnect(self) -> None:
        self._channel.close()


def _check_node_id(node_id: str, context: grpc.ServicerContext) -> None:
    if not 0 < len(node_id) <= MAX_NODE_ID:
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"node_id: 1 to {MAX_NODE_ID} characters")


def _code(error: grpc.RpcError) -> str:
    return error.code().name.lower() if isinstance(error, grpc.Call) else type(error).__name__


def _complain(error: grpc.RpcError) -> None:
    """An absent directory is ordinary; one that refuses what we say is not."""
    if isinstance(error, grpc.Call) and error.code() is grpc.StatusCode.INVALID_ARGUMENT:
        log.error("the directory refuses an update: %s", error.details())


def _node_to_proto(node: NodeInfo) -> pb.Node:
    return pb.Node(
        node_id=node.node_id,
        epoch=node.epoch,
        host_id=node.host_id,
        unix_path=node.unix_path,
        host=node.host,
        port=node.port,
        grpc_address=node.grpc_address,
        capacity_bytes=node.capacity_bytes,
    )


def _node_from_proto(node: pb.Node) -> NodeInfo:
    return NodeInfo(
        node_id=node.node_id,
        epoch=node.epoch,
        host_id=node.host_id,
        unix_path=node.unix_path,
        host=node.host,
        port=node.port,
        grpc_address=node.grpc_address,
        capacity_bytes=node.capacity_bytes,
    )


def _events_to_proto(events: Iterable[DirectoryEvent]) -> list[pb.Event]:
    return [pb.Event(key=event.key, tier=_TIER_TO_PROTO[event.tier], size=event.size) for event in events]


def _events_from_proto(events: Iterable[pb.Event]) -> list[DirectoryEvent]:
    """Raises KeyError for an unknown tier."""
    return [DirectoryEvent(ObjectKey(event.key), _TIER_FROM_PROTO[event.tier], event.size) for event in events]


def _update_to_proto(update: Update) -> pb.Update:
    batch = update.batch
    return pb.Update(
        node_id=batch.node_id,
        epoch=batch.epoch,
        seq=batch.seq,
        reset=update.reset,
        events=_events_to_proto(batch.events),
    )


def _update_from_proto(update: pb.Update) -> Update | None:
    """None: a key or tier that cannot be."""
    if any(not 0 < len(event.key) <= MAX_KEY_BYTES or event.tier not in _TIER_FROM_PROTO for event in update.events):
        return None
    events = tuple(_events_from_proto(update.events))
    return Update(EventBatch(update.node_id, update.epoch, update.seq, events), update.reset)


def _reply_to_proto(reply: Reply) -> pb.Reply:
    return pb.Reply(verdict=_VERDICT_TO_PROTO[reply.verdict], seq=reply.seq)


def _reply_from_proto(reply: pb.Reply) -> Reply:
    verdict = _VERDICT_FROM_PROTO.get(reply.verdict)
    return UNREACHABLE if verdict is None else Reply(verdict, reply.seq)
