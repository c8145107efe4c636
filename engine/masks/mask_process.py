"""A mask process as the engine thread sees it: what it was asked, and what comes back. Nothing here blocks."""

from __future__ import annotations

import socket
import time
from collections import deque
from contextlib import suppress

import msgspec

from tandem.common.sampling import Constraint
from tandem.engine.masks.guide import Guide
from tandem.engine.masks.messages import MAX_COMPILED, Frames, Reply, Request, framed

RECEIVED_BYTES = 1 << 18
"""What is read from a process at once."""
_REPLIES = msgspec.msgpack.Decoder(Reply)


class MaskProcess:
    """One process, of one tenant."""

    def __init__(self, tenant: str, connection: socket.socket, *, is_made: bool) -> None:
        """`is_made`: the process that it is forked from has read the tokenizer."""
        self.tenant = tenant
        self.connection = connection
        self.is_made = is_made
        self.guides: dict[int, Guide] = {}
        self.constraints: deque[Constraint] = deque(maxlen=MAX_COMPILED)
        """Those that it was sent last."""
        self.awaited: deque[Guide] = deque()
        """Guides that an answer will come for, in its order."""
        self.waits_since = 0.0
        """When (s) the first of them became the first."""
        self._requests: list[Request] = []
        self._unsent = b""
        self._frames = Frames()

    def made(self) -> None:
        """The tokenizer has been read: from now on it is this process that its guides wait for."""
        if not self.is_made:
            self.is_made, self.waits_since = True, time.monotonic()

    def put(self, request: Request, guide: Guide | None = None) -> None:
        """`guide`: whom the answer is for."""
        self._requests.append(request)
        if guide is not None:
            if not self.awaited:
                self.waits_since = time.monotonic()
            self.awaited.append(guide)

    @property
    def backlog_s(self) -> float:
        """Processor time of all that it has not answered yet, as far as known."""
        return sum([guide.last_s for guide in self.awaited])

    def answered(self) -> Guide:
        """The guide that the answer is for."""
        self.waits_since = time.monotonic()
        return self.awaited.popleft()

    def send(self) -> None:
        """What the socket takes. Raises OSError where the process has ended."""
        if self._requests:
            self._unsent += framed(self._requests)
            self._requests = []
        if self._unsent:
            with suppress(BlockingIOError):
                self._unsent = self._unsent[self.connection.send(self._unsent) :]

    @property
    def has_unsent(self) -> bool:
        return bool(self._unsent)

    def receive(self) -> list[Reply]:
        """Raises OSError, ValueError where the process has ended or lost its mind."""
        try:
            data = self.connection.recv(RECEIVED_BYTES)
        except BlockingIOError:
            return []
        if not data:
            raise ConnectionResetError("the process has ended")
        return [_REPLIES.decode(body) for body in self._frames.add(data)]
