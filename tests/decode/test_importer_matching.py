"""Submit, reservation and stream of a hand-over meet in any order; whatever is missing or wrong becomes a recompute."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from tandem.common.errors import TandemError
from tandem.common.sampling import SamplingParams
from tandem.decode.importer import MAX_UNCLAIMED, Importer
from tandem.engine.request import EngineRequest, KvImport, PromptReport, RequestKey, RequestOutput
from tandem.handover import Reason
from tandem.proto import worker_pb2
from tandem.worker.wire import pack_first

KEY = RequestKey("r", 1)
TOKENS = 40


@dataclass
class Stream:
    """Stands for a transport's Incoming."""

    request_id: str = KEY.request_id
    epoch: int = KEY.epoch
    num_tokens: int = TOKENS
    row_bytes: int = 64
    num_layers: int = 2
    sender_id: str = "p0"
    transport: str = "tcp"
    codec: str = "raw"
    received_bytes: int = TOKENS * 64 * 2
    answers: list[Any] = field(default_factory=list)

    def accept(self, skip_tokens: int) -> bool:
        self.answers.append(skip_tokens)
        return True

    def refuse(self, reason: Reason) -> bool:
        self.answers.append(reason.code)
        return True


@dataclass
class Reservation:
    skip_tokens: int = 16
    missing: bool = False
    written: list[tuple[int, int, int]] = field(default_factory=list)
    first: RequestOutput | None = None
    failures: list[str] = field(default_factory=list)

    def write(self, layer: int, start: int, stop: int, payload: memoryview) -> bool:
        self.written.append((layer, start, stop))
        return True

    def complete(self, first: RequestOutput) -> None:
        if self.missing:
            raise ValueError("3 rows are missing")
        self.first = first

    def fail(self, reason: str) -> None:
        self.failures.append(reason)


class Server:
    def __init__(self) -> None:
        self.closed: list[RequestKey] = []

    def close_stream(self, request_id: str, epoch: int, reason: Reason) -> bool:
        self.closed.append(RequestKey(request_id, epoch))
        return True


class Scene:
    def __init__(self, near_allowed: bool = False) -> None:
        self.now = 100.0
        self.importer = Importer(
            row_bytes=64, num_layers=2, timeout_s=3.0, near_allowed=near_allowed, clock=lambda: self.now
        )
        self.server = self.importer.server = Server()

    def submit(self, key: RequestKey = KEY) -> KvImport:
        request = EngineRequest(key, [5] * TOKENS, SamplingParams())
        submit = worker_pb2.Submit(expect_kv=worker_pb2.KvSource(worker_id="p0", worker_epoch=7))
        self.importer.attach(request, submit)
        assert request.kv_import is not None
        return request.kv_import

    def finish(self, payload: bytes | None = None) -> bool:
        first = pack_first(RequestOutput(KEY, token_ids=[9]), "here", 1.0)
        return self.importer.finished(*KEY, first if payload is None else payload)

    def later(self, seconds: float) -> None:
        self.now += seconds
        self.importer.expire()


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_the_stream_may_come_before_the_request(scene: Scene) -> None:
    stream, reservation = Stream(), Reservation()
    scene.importer.opened(stream)  # type: ignore[arg-type]
    scene.submit().reserved(reservation)
    assert stream.answers == [16]


@pytest.mark.parametrize("reserve_first", [True, False])
def test_the_stream_is_accepted_once_blocks_are_reserved(scene: Scene, reserve_first: bool) -> None:
    stream, reservation, request = Stream(), Reservation(), scene.submit()
    if reserve_first:
        request.reserved(reservation)
        scene.importer.opened(stream)  # type: ignore[arg-type]
    else:
        scene.importer.opened(stream)  # type: ignore[arg-type]
        assert stream.answers == []
        request.reserved(reservation)
    assert stream.answers == [16]


def test_rows_and_first_token_reach_the_reservation(scene: Scene) -> None:
    stream, reservation = Stream(), Reservation()
    scene.submit().reserved(reservation)
    scene.importer.opened(stream)  # type: ignore[arg-type]
    assert scene.importer.rows(*KEY, 1, 16, 40, memoryview(b""))
    assert scene.finish()
    assert reservation.written == [(1, 16, 40)]
    assert reservation.first is not None
    assert reservation.first.token_ids == [9]
    assert reservation.failures == []


def test_a_stream_that_never_comes_becomes_a_recompute_and_is_refused_when_it_is_late(scene: Scene) -> None:
    reservation, late = Reservation(), Stream()
    scene.submit().reserved(reservation)
    scene.later(2.9)
    assert reservation.failures == []
    scene.later(0.2)
    assert reservation.failures == ["unreachable: nothing came from prefill worker p0"]
    scene.importer.opened(late)  # type: ignore[arg-type]
    assert late.answers == ["gone"]


def test_an_open_stream_is_not_timed_here(scene: Scene) -> None:
    reservation = Reservation()
    scene.submit().reserved(reservation)
    scene.importer.opened(Stream())  # type: ignore[arg-type]
    scene.later(60)
    assert reservation.failures == []


def test_a_loss_before_the_reservation_fails_it_as_soon_as_it_is_made(scene: Scene) -> None:
    reservation, request = Reservation(), scene.submit()
    scene.importer.opened(Stream())  # type: ignore[arg-type]
    scene.importer.lost(*KEY, Reason("lease", "silent"))
    request.reserved(reservation)
    assert reservation.failures == ["lease: silent"]


def test_the_router_s_word_ends_the_stream_and_starts_the_recompute_once(scene: Scene) -> None:
    reservation = Reservation()
    scene.submit().reserved(reservation)
    scene.importer.opened(Stream())  # type: ignore[arg-type]
    scene.importer.peer_lost(KEY, "p0 is gone")
    scene.importer.peer_lost(KEY, "p0 is gone")
    scene.importer.lost(*KEY, Reason("peer_closed", "bye"))
    assert reservation.failures == ["p0 is gone"]
    assert scene.server.closed == [KEY]


@pytest.mark.parametrize(
    "stream", [Stream(num_tokens=39), Stream(row_bytes=32), Stream(num_layers=3), Stream(sender_id="p1")]
)
def test_a_stream_that_does_not_fit_is_refused(scene: Scene, stream: Stream) -> None:
    reservation = Reservation()
    scene.submit().reserved(reservation)
    scene.importer.opened(stream)  # type: ignore[arg-type]
    assert stream.answers == ["range"]
    assert len(reservation.failures) == 1


@pytest.mark.parametrize("payload", [b"", b"\xff" * 40, None])
def test_an_unusable_end_is_not_acknowledged(scene: Scene, payload: bytes | None) -> None:
    reservation = Reservation(missing=True)
    scene.submit().reserved(reservation)
    scene.importer.opened(Stream())  # type: ignore[arg-type]
    assert not scene.finish(payload)
    assert len(reservation.failures) == 1
    assert reservation.first is None


def test_the_end_of_the_request_stops_the_sender(scene: Scene) -> None:
    request = scene.submit()
    request.reserved(Reservation())
    scene.importer.opened(Stream())  # type: ignore[arg-type]
    request.closed()
    assert scene.server.closed == [KEY]
    assert not scene.importer.rows(*KEY, 0, 0, 1, memoryview(b""))
    assert not scene.finish()


def test_streams_nobody_asked_for_are_bounded_in_number_and_time(scene: Scene) -> None:
    streams = [Stream(request_id=f"x{i}") for i in range(MAX_UNCLAIMED + 1)]
    for stream in streams:
        scene.importer.opened(stream)  # type: ignore[arg-type]
    assert streams[-1].answers == ["overloaded"]
    assert streams[0].answers == []
    scene.later(3.1)
    assert all(stream.answers == ["gone"] for stream in streams[:-1])


def test_another_attempt_is_another_request(scene: Scene) -> None:
    scene.submit().reserved(Reservation())
    stream = Stream(epoch=2)
    scene.importer.opened(stream)  # type: ignore[arg-type]
    assert stream.answers == []
    reservation = Reservation(skip_tokens=0)
    scene.submit(RequestKey("r", 2)).reserved(reservation)
    assert stream.answers == [0]


def test_a_plain_request_needs_no_hand_over_and_a_prefill_message_is_an_error(scene: Scene) -> None:
    request = EngineRequest(KEY, [1], SamplingParams())
    scene.importer.attach(request, worker_pb2.Submit())
    assert request.kv_import is None
    with pytest.raises(TandemError, match="send_kv_to"):
        scene.importer.attach(request, worker_pb2.Submit(send_kv_to=worker_pb2.KvEndpoint()))


@pytest.mark.parametrize("near_allowed", [False, True])
def test_a_first_token_that_depends_on_inexact_kv_is_taken_only_where_that_is_allowed(near_allowed: bool) -> None:
    """Though the rows may all be exact: what the decode worker has itself is not sent."""
    scene, reservation = Scene(near_allowed), Reservation(skip_tokens=TOKENS - 1)
    scene.submit().reserved(reservation)
    scene.importer.opened(Stream())  # type: ignore[arg-type]
    first = RequestOutput(KEY, token_ids=[9], prompt=PromptReport(inexact_from=8))
    assert scene.finish(pack_first(first, "here", 1.0)) == near_allowed
    assert (reservation.first is not None) == near_allowed
    if near_allowed:
        assert reservation.failures == []
    else:
        assert "from token 8 on is not exact" in reservation.failures[0]
