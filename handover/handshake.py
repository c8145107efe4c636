"""From an endpoint to a channel: the handshake of `wire/`, and the choice between shared memory and the byte stream."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.handover.arena import ArenaReceiver, ArenaSender
from tandem.handover.frames import HAND_OVER
from tandem.handover.inline import InlineReceiver, InlineSender
from tandem.handover.interfaces import HandoverSettings
from tandem.handover.payload import PayloadReceiver, PayloadSender
from tandem.wire import handshake
from tandem.wire.header import ProtocolError
from tandem.wire.link import Link
from tandem.wire.peers import Endpoint, PeerIdentity
from tandem.wire.shared_memory import can_share


@dataclass(frozen=True, slots=True)
class SendChannel:
    """The sending end of a connection."""

    link: Link
    payload: PayloadSender
    lease_s: float
    """The receiver's."""
    transport: str
    """How rows go: `shared_memory`, `unix` or `tcp`."""

    def close(self) -> None:
        self.link.close()
        self.payload.close()


@dataclass(frozen=True, slots=True)
class ReceiveChannel:
    """The receiving end of a connection."""

    payload: PayloadReceiver
    sender_id: str
    """Worker id of the sender."""
    transport: str
    """How rows come: `shared_memory`, `unix` or `tcp`."""


def transport_of(link: Link, shares_memory: bool) -> str:
    if shares_memory:
        return "shared_memory"
    return "unix" if link.is_unix else "tcp"


def connect(endpoint: Endpoint, identity: PeerIdentity, settings: HandoverSettings) -> SendChannel:
    """Tries the unix socket on the same host, then TCP. Raises HandshakeRefused when the endpoint's worker refuses,
    ConnectionError when no address leads to that worker."""
    return handshake.connect(
        endpoint, HAND_OVER, settings.patience, lambda link: _open(link, endpoint, identity, settings)
    )


def _open(link: Link, endpoint: Endpoint, identity: PeerIdentity, settings: HandoverSettings) -> SendChannel:
    arena = ArenaSender(settings.arena_bytes) if link.is_unix and can_share() else None
    try:
        greeting = handshake.greet(
            link,
            identity,
            expected=endpoint.worker_id,
            expected_epoch=endpoint.worker_epoch,
            memory=arena.memory if arena else None,
        )
        greeting.drop_memory()
        if not greeting.peer.lease_s:
            raise ProtocolError("a receiver without leases")
    except BaseException:
        if arena:
            arena.close()
        raise
    if arena:
        arena.handed_over()
    return SendChannel(
        link, arena or InlineSender(settings.frame_bytes), greeting.peer.lease_s, transport_of(link, arena is not None)
    )


def welcome(link: Link, identity: PeerIdentity, settings: HandoverSettings) -> ReceiveChannel:
    """The server's half. Raises HandshakeRefused after telling the client, OSError, ProtocolError. Leaves closing
    `link` to the caller."""
    greeting = handshake.admit(link, identity)
    payload = InlineReceiver() if greeting.memory is None else ArenaReceiver(greeting.memory)
    handshake.answer(link, identity, lease_s=settings.lease_s)
    return ReceiveChannel(payload, greeting.peer.name, transport_of(link, payload.acknowledges))
