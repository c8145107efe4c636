"""What an engine and its mask processes say to each other, in frames of msgpack: 4 bytes of length, then the body.

The engine sends a list of requests in one frame; each of them but `Close` is answered by one `Reply`, in order.
"""

from __future__ import annotations

from typing import Literal

import msgspec

LENGTH_BYTES = 4
MAX_FRAME_BYTES = 64 << 20
"""Room for a grammar and an output of the longest context."""
MAX_COMPILED = 16
"""Compiled constraints that a process keeps: those last used."""


class Ready(msgspec.Struct, array_like=True):
    """The first thing that the process says from which the others are made."""

    problem: str = ""
    """Why this model cannot be constrained."""
    eos_ids: tuple[int, ...] = ()


class Open(msgspec.Struct, array_like=True, tag=1):
    """A guide begins, after `tokens` of output. The answer is the mask of the token after them."""

    guide: int
    kind: Literal["json_schema", "regex", "lark"]
    text: str
    tokens: list[int]


class Follow(msgspec.Struct, array_like=True, tag=2):
    """The output went on with `tokens`."""

    guide: int
    tokens: list[int]


class Close(msgspec.Struct, array_like=True, tag=3):
    guide: int


Request = Open | Follow | Close


class Reply(msgspec.Struct, array_like=True):
    """A process's answer to one `Open` or `Follow`."""

    guide: int
    cost_s: float
    """Processor time, without that of compiling."""
    bits: bytes = b""
    """int32 [ceil(vocab_size / 32)]: bit t % 32 of word t // 32 says that token t may follow."""
    complete: bool = False
    """Nothing but an end can follow; there is no mask then."""
    error: str = ""
    """Why the output cannot go on."""


def framed(message: msgspec.Struct | list[Request]) -> bytes:
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


class Frames:
    """Cuts a stream into the bodies of its frames."""

    def __init__(self) -> None:
        self._received = bytearray()

    def add(self, data: bytes) -> list[bytes]:
        """The bodies that are whole now. Raises ValueError for a length that nobody sends."""
        self._received += data
        found: list[bytes] = []
        start = 0
        while len(self._received) >= start + LENGTH_BYTES:
            length = int.from_bytes(self._received[start : start + LENGTH_BYTES], "big")
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {length} bytes")
            end = start + LENGTH_BYTES + length
            if len(self._received) < end:
                break
            found.append(bytes(self._received[start + LENGTH_BYTES : end]))
            start = end
        del self._received[:start]
        return found
