"""What two ends of a socket may say to each other: kinds of frames, their bodies, and the limits of both.

A body is a small msgpack array. A payload is bytes of KV, which the wire does not check: whoever sends it says in the
body what its checksum is, or it carries one of its own. Everything malformed raises ProtocolError, and the connection
that brought it is closed.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from tandem.common.secret import derive
from tandem.wire.header import HEADER_BYTES, START, Header, ProtocolError, VersionMismatch, checksum, pack, unpack

HELLO = 1
"""The first frame of both directions, in every protocol."""
REFUSE = 2
"""Instead of the server's Hello: the connection is refused. Body: a Reason."""
_MAX_CODE, _MAX_MESSAGE = 64, 1024


class Body(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What follows a header."""


class Hello(Body, frozen=True):
    """Who is there. Comes with the descriptor of shared memory where `arena_bytes` is not 0."""

    name: Annotated[str, Meta(max_length=512)]
    """Id of the worker or node."""
    epoch: Annotated[int, Meta(ge=0)] = 0
    """Differs for every start of it."""
    compatibility: Annotated[bytes, Meta(max_length=64)] = b""
    """Digest of what both ends must share."""
    lease_s: Annotated[float, Meta(ge=0, le=3600)] = 0.0
    """Seconds that a stream's lease lasts; the client renews it within them. 0: there are no streams."""
    arena_bytes: Annotated[int, Meta(ge=0, le=1 << 52)] = 0


class Reason(Body, frozen=True):
    """Why a connection or a stream of it was refused, or ended without success."""

    code: Annotated[str, Meta(max_length=_MAX_CODE)]
    message: Annotated[str, Meta(max_length=_MAX_MESSAGE)]
    retriable: bool = True
    """False: the same two will fail again."""

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"

    def sendable(self) -> Reason:
        """This reason as it travels: not longer than allowed; a path in an error may hold lone surrogates."""
        message = self.message[:_MAX_MESSAGE].encode(errors="replace").decode()
        return Reason(self.code[:_MAX_CODE], message, self.retriable)


class Nothing(Body, frozen=True):
    """The header says it all."""


_NOTHING = Nothing()
_encode = msgspec.msgpack.Encoder().encode
_Body = TypeVar("_Body", bound=Body)


class Protocol:
    """One protocol in one version; both ends make it of the same tables."""

    def __init__(
        self,
        name: str,
        magic: bytes,
        version: int,
        kinds: type[enum.IntEnum],
        bodies: Mapping[enum.IntEnum, type[Body]],
        *,
        max_body_bytes: int,
        larger_bodies: Mapping[enum.IntEnum, int] | None = None,
        max_payload_bytes: Mapping[enum.IntEnum, int],
    ) -> None:
        """`kinds` has HELLO and REFUSE, whose bodies are known. Kinds that are not in `bodies` have no body, those that
        are not in `max_payload_bytes` no payload. `larger_bodies`: in place of `max_body_bytes`."""
        self.name = name
        self.hello, self.refuse = kinds(HELLO), kinds(REFUSE)
        self._magic, self._version = magic, version
        self._bodies: dict[enum.IntEnum, type[Body]] = {self.hello: Hello, self.refuse: Reason, **bodies}
        self._decoders = {kind: msgspec.msgpack.Decoder(body) for kind, body in self._bodies.items()}
        max_body = dict.fromkeys(self._bodies, max_body_bytes) | dict(larger_bodies or {})
        self._limits = {int(kind): (kind, max_body.get(kind, 0), max_payload_bytes.get(kind, 0)) for kind in kinds}

    def key(self, secret: bytes) -> bytes:
        """Derives what both ends prove that they have; empty without a secret."""
        return derive(secret, self.name) if secret else b""

    def pack(self, header: Header) -> bytes:
        return pack(self._magic, self._version, header)

    def check_start(self, raw: bytes | bytearray | memoryview) -> None:
        """Looks at the first 8 bytes of a frame. Raises ProtocolError, VersionMismatch."""
        magic, version, _ = START.unpack_from(raw)
        if magic != self._magic:
            raise ProtocolError(f"not a {self.name} connection: wrong magic")
        if version != self._version:
            raise VersionMismatch(self.name, version, self._version)

    def parse(self, raw: bytes | bytearray | memoryview) -> Header:
        """The header in 44 bytes. Raises ProtocolError, VersionMismatch, if it is not one or goes beyond a limit."""
        if len(raw) != HEADER_BYTES:
            raise ProtocolError(f"a header has {HEADER_BYTES} bytes, not {len(raw)}")
        magic, version, number, frame_id, sequence, payload_length, body_length, body_checksum, is_sound = unpack(raw)
        if magic != self._magic or version != self._version:
            self.check_start(raw)
        if not is_sound:
            raise ProtocolError("header checksum does not match")
        if number not in self._limits:
            raise ProtocolError(f"unknown frame kind {number}")
        kind, max_body, max_payload = self._limits[number]
        if body_length > max_body:
            raise ProtocolError(f"{kind.name} with a body of {body_length} bytes, the limit is {max_body}")
        if payload_length > max_payload:
            raise ProtocolError(f"{kind.name} with a payload of {payload_length} bytes, the limit is {max_payload}")
        return Header(kind, frame_id, body_length, payload_length, sequence, body_checksum)

    def frame(
        self,
        kind: enum.IntEnum,
        frame_id: int = 0,
        body: Body | None = None,
        payload_length: int = 0,
        sequence: int = 0,
    ) -> bytes:
        """Header and body. Raises ValueError for a body that is not of that kind, or too large."""
        wanted = self._bodies.get(kind, Nothing)
        if body is None:
            if wanted is not Nothing:
                raise ValueError(f"{kind.name} needs a body")
            return self.pack(Header(kind, frame_id, 0, payload_length, sequence))
        if type(body) is not wanted:
            raise ValueError(f"{type(body).__name__} is not the body of {kind.name}")
        raw = _encode(body.sendable() if isinstance(body, Reason) else body)
        max_body = self._limits[kind][1]
        if len(raw) > max_body:
            raise ValueError(f"a {kind.name} of {len(raw)} bytes, the limit is {max_body}")
        return self.pack(Header(kind, frame_id, len(raw), payload_length, sequence, checksum(raw))) + raw

    def decode(self, header: Header, raw: bytes | bytearray | memoryview) -> Body:
        """The body that belongs to `header`; `Nothing` for a kind without one. Raises ProtocolError."""
        decoder = self._decoders.get(header.kind)
        if decoder is None:
            return _NOTHING
        if checksum(raw) != header.body_checksum:
            raise ProtocolError(f"checksum of a {header.kind.name} body does not match")
        try:
            return decoder.decode(raw)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise ProtocolError(f"malformed {header.kind.name}: {error}") from error


def expect(body: Body, wanted: type[_Body]) -> _Body:
    """`body`, which must be of that type. Raises ProtocolError."""
    if not isinstance(body, wanted):
        raise ProtocolError(f"{type(body).__name__} instead of a {wanted.__name__}")
    return body
