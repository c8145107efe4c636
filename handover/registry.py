"""All open streams of a server, by request and attempt: fencing, bounds, and who may end a stream."""

from __future__ import annotations

import threading
from collections import OrderedDict

from tandem.common.counters import Counters
from tandem.handover.incoming import Incoming, State, StreamKey
from tandem.handover.stats import HandoverStats
from tandem.wire.protocol import Reason

MAX_EPOCHS = 1 << 16
"""Request ids whose highest epoch is remembered, the latest used."""


class StreamRegistry:
    """Thread-safe. Calls nobody while it holds its lock."""

    def __init__(self, max_streams: int, counters: Counters[HandoverStats]) -> None:
        self._max_streams = max_streams
        self._counters = counters
        self._lock = threading.Lock()
        self._streams: dict[StreamKey, Incoming] = {}
        self._epochs: OrderedDict[str, int] = OrderedDict()

    def __len__(self) -> int:
        with self._lock:
            return len(self._streams)

    def find(self, request_id: str, epoch: int) -> Incoming | None:
        with self._lock:
            return self._streams.get(StreamKey(request_id, epoch))

    def admit(self, stream: Incoming) -> Reason | Incoming | None:
        """A Reason: refused. A stream: admitted, and that earlier attempt is now superseded; end it."""
        refusal: Reason | None = None
        with self._lock:
            seen = self._epochs.get(stream.request_id)
            if seen is not None and stream.epoch < seen:
                refusal = Reason("superseded", f"epoch {stream.epoch} after epoch {seen}", retriable=False)
            elif seen == stream.epoch:
                refusal = Reason("duplicate", f"epoch {stream.epoch} was opened before", retriable=False)
            elif len(self._streams) >= self._max_streams:
                refusal = Reason("overloaded", f"{self._max_streams} streams are open")
            else:
                self._epochs[stream.request_id] = stream.epoch
                self._epochs.move_to_end(stream.request_id)
                if len(self._epochs) > MAX_EPOCHS:
                    self._epochs.popitem(last=False)
                self._streams[stream.key] = stream
                return None if seen is None else self._streams.get(StreamKey(stream.request_id, seen))
        self._counters.count("outcomes", refusal.code)
        return refusal

    def accept(self, stream: Incoming, skip_tokens: int) -> bool:
        """Marks a stream as accepted. False: it was answered already, or has ended."""
        with self._lock:
            if stream.state is not State.OPENED:
                return False
            stream.state = State.ACCEPTED
            stream.skip_tokens = skip_tokens
            return True

    def end(self, stream: Incoming, outcome: str, *, only_unanswered: bool = False) -> State | None:
        """The state before; None when it had ended already. Who gets the state tells the sender and the sink."""
        with self._lock:
            before = stream.state
            if before is State.ENDED or (only_unanswered and before is not State.OPENED):
                return None
            stream.state = State.ENDED
            del self._streams[stream.key]
        self._counters.count("outcomes", outcome)
        return before
