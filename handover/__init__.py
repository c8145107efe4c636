"""Hand-over of KV from a prefill worker to a decode worker: layer by layer, while prefill still computes.

One host: a unix socket carries small frames, the KV itself lies in a memfd arena that both map (one copy in, one copy
out). Two hosts: the KV follows its frame on a TCP connection. Both ends see one interface; frames, states, leases and
the failure table are in `docs/handover-protocol.md`.

Decode worker (receives):

    class Sink:                                              # a KvSink; called on connection threads
        def opened(self, stream: Incoming) -> None:          # stream.request_id, .epoch, .num_tokens, .row_bytes, ...
            stream.accept(skip_tokens=0)                     # or stream.refuse(Reason(...)); any thread, now or later
        def rows(self, request_id, epoch, layer, start, stop, payload: memoryview) -> bool:
            return reservation.write(layer, start, stop, payload)   # payload is valid during this call only
        def finished(self, request_id, epoch, payload: bytes) -> bool: ...   # True: FinishAck, the client's on_done
        def lost(self, request_id, epoch, reason: Reason) -> None: ...       # the KV will not come
    server = KvServer(Path("/run/kv.sock"), ("0.0.0.0", 0), PeerIdentity("decode-0", epoch, compatibility), Sink())
    server.start()
    server.endpoint            # an Endpoint to publish; replace `host` when listening on a wildcard address
    server.close_stream(request_id, epoch, Reason("cancelled", "client went away"))   # the request ended here
    server.stop()

Prefill worker (sends):

    client = KvClient(PeerIdentity("prefill-0", epoch, compatibility))
    stream = client.open(endpoint, request_id, epoch, num_tokens, row_bytes, num_layers, listener)   # never blocks
    stream.send_layer(layer, start, stop, lambda start, stop, out: kv.read_rows(layer, slots[start:stop], out))
    stream.finish(first_output.SerializeToString())          # or stream.abort(Reason("cancelled", "..."))
    client.close()

`listener` is a StreamListener: `on_accept(skip_tokens)`, then exactly one of `on_done()`, `on_refuse(reason)`,
`on_lost(reason)` (also after `abort`). No `fill` runs after that one call, so blocks may be released in it. Callbacks
run on connection threads and must not block. `send_layer`, `finish` and `abort` only enqueue; rows wait until the
receiver accepts, rows below its `skip_tokens` are not sent, and a long range goes out in several frames: `fill(start,
stop, out)` is called for sub-ranges, each in layout [K|V][token][kv_head][dim] of its own.

A Reason has `code`, `message` and `retriable`; `str(reason)` is "code: message".
"""

from tandem.handover.client import KvClient, KvStream
from tandem.handover.frames import HAND_OVER
from tandem.handover.interfaces import Fill, HandoverSettings, KvSink, StreamListener
from tandem.handover.server import Incoming, KvServer
from tandem.handover.stats import HandoverMetrics, HandoverStats
from tandem.wire.peers import Endpoint, PeerIdentity, local_host_id
from tandem.wire.protocol import Reason

__all__ = [
    "HAND_OVER",
    "Endpoint",
    "Fill",
    "HandoverMetrics",
    "HandoverSettings",
    "HandoverStats",
    "Incoming",
    "KvClient",
    "KvServer",
    "KvSink",
    "KvStream",
    "PeerIdentity",
    "Reason",
    "StreamListener",
    "local_host_id",
]
