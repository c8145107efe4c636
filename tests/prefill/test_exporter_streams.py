"""What the engine announces goes out as it is in the pool, and blocks are released exactly once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tandem.common.errors import TandemError
from tandem.common.sampling import SamplingParams
from tandem.engine.model.batch import KvPool
from tandem.engine.request import EngineRequest, PromptReport, RequestKey, RequestOutput
from tandem.handover import Reason, local_host_id
from tandem.prefill.exporter import Exporter
from tandem.proto import worker_pb2
from tandem.worker.wire import unpack_first

KEY = RequestKey("r", 3)
SLOTS = [33, 32, 47, 16, 17, 18]
TOKENS = [7] * len(SLOTS)


class Engine:
    def __init__(self) -> None:
        self.pool = KvPool(2, 4, 16, 2, 4, torch.float32, torch.device("cpu"))
        self.pool.storage.copy_(torch.randn(self.pool.storage.shape))
        self.released: list[tuple[RequestKey, str]] = []

    def release(self, key: RequestKey, error: str = "") -> None:
        self.released.append((key, error))


class Stream:
    def __init__(self, listener: Any) -> None:
        self.listener = listener
        self.rows: list[tuple[int, int, int, Callable[[int, int, memoryview], None]]] = []
        self.payload = b""
        self.aborts: list[str] = []

    def send_layer(self, layer: int, start: int, stop: int, fill: Callable[[int, int, memoryview], None]) -> None:
        if start < stop:
            self.rows.append((layer, start, stop, fill))

    def finish(self, payload: bytes) -> None:
        self.payload = payload

    def abort(self, reason: Reason) -> None:
        self.aborts.append(reason.message)


class Transport:
    def __init__(self, problem: Exception | None = None) -> None:
        self.problem = problem
        self.opened: list[tuple[Any, ...]] = []

    def open(self, *arguments: Any) -> Stream:
        if self.problem is not None:
            raise self.problem
        self.opened.append(arguments)
        self.stream = Stream(arguments[-1])
        return self.stream


class Scene:
    def __init__(self, problem: Exception | None = None) -> None:
        self.engine = Engine()
        self.transport = Transport(problem)
        self.exporter = Exporter(self.engine, self.transport, "p0")  # type: ignore[arg-type]
        self.request = EngineRequest(KEY, TOKENS, SamplingParams())

    def attach(self, **handover: Any) -> Stream:
        target = worker_pb2.KvEndpoint(worker_id="d0", worker_epoch=5, host_id="h", unix_path="/x", host="y", port=1)
        self.exporter.attach(self.request, worker_pb2.Submit(**(handover or {"send_kv_to": target})))
        assert self.request.kv_export is not None
        self.export = self.request.kv_export
        return self.transport.stream


def test_the_stream_opens_with_the_request_before_anything_is_computed() -> None:
    scene = Scene()
    scene.attach()
    endpoint, *rest = scene.transport.opened[0]
    assert (endpoint.worker_id, endpoint.worker_epoch, endpoint.unix_path, endpoint.port) == ("d0", 5, "/x", 1)
    assert rest[:-1] == ["r", 3, len(SLOTS), scene.engine.pool.row_bytes, 2]


@pytest.mark.parametrize("near_allowed", [False, True])
def test_what_the_decode_worker_does_not_take_is_not_loaded_for_it(near_allowed: bool) -> None:
    scene = Scene()
    scene.attach(send_kv_to=worker_pb2.KvEndpoint(worker_id="d0", near_allowed=near_allowed))
    assert scene.request.near_allowed == near_allowed


def test_rows_leave_as_they_are_in_the_pool_cached_ones_first() -> None:
    scene = Scene()
    stream, pool = scene.attach(), scene.engine.pool
    scene.export.begin(KEY, TOKENS, SLOTS, 2)
    scene.export.layer_ready(0, 2, 6)
    assert [row[:3] for row in stream.rows] == [(0, 0, 2), (1, 0, 2), (0, 2, 6)]
    out = bytearray(3 * pool.row_bytes)
    stream.rows[2][3](3, 6, memoryview(out))
    sent = torch.frombuffer(out, dtype=torch.float32).view(2, 3, 2, 4)
    flat = pool.storage.view(2, 2, -1, 2, 4)
    assert torch.equal(sent, flat[0][:, SLOTS[3:6]])


def test_the_first_token_travels_with_its_report() -> None:
    scene = Scene()
    stream = scene.attach()
    scene.export.begin(KEY, TOKENS, SLOTS, 0)
    scene.export.finished(RequestOutput(KEY, token_ids=[42], prompt=PromptReport(cached_tokens=3, prefill_s=0.5)))
    first = unpack_first(stream.payload, local_host_id(), float("inf"))
    assert first.token_ids == [42]
    assert first.prompt is not None
    assert (first.prompt.cached_tokens, first.prompt.prefill_s, first.prompt.computed_by) == (3, 0.5, "p0")
    assert scene.engine.released == []


def test_a_confirmed_hand_over_releases_the_blocks_without_an_error() -> None:
    scene = Scene()
    stream = scene.attach()
    stream.listener.on_done()
    assert scene.engine.released == [(KEY, "")]


@pytest.mark.parametrize("end", ["on_refuse", "on_lost"])
def test_a_failed_hand_over_ends_the_request_with_the_reason(end: str) -> None:
    scene = Scene()
    stream = scene.attach()
    getattr(stream.listener, end)(Reason("gone", "nobody waits"))
    assert len(scene.engine.released) == 1
    assert "gone: nobody waits" in scene.engine.released[0][1]


def test_a_stream_that_ends_before_the_engine_knows_the_request_releases_again_as_it_begins() -> None:
    scene = Scene()
    scene.attach().listener.on_refuse(Reason("overloaded", "no room"))
    scene.engine.released.clear()  # it meant nothing to the engine
    scene.export.begin(KEY, TOKENS, SLOTS, 0)
    ((key, error),) = scene.engine.released
    assert key == KEY
    assert "no room" in error


def test_a_cancelled_request_aborts_its_stream() -> None:
    scene = Scene()
    stream = scene.attach()
    scene.export.aborted("cancelled")
    assert stream.aborts == ["cancelled"]
    assert scene.engine.released == []  # only the stream's last callback knows that no row is being read


def test_a_request_the_engine_never_took_closes_its_stream() -> None:
    scene = Scene()
    stream = scene.attach()
    scene.exporter.ended(KEY)
    assert len(stream.aborts) == 1
    stream.listener.on_lost(Reason("aborted", "the request ended"))
    scene.exporter.ended(KEY)
    assert len(stream.aborts) == 1


@pytest.mark.parametrize("handover", [{"expect_kv": worker_pb2.KvSource()}, {"priority": 1}])
def test_a_request_without_a_target_is_an_error(handover: dict[str, Any]) -> None:
    with pytest.raises(TandemError, match="send_kv_to") as caught:
        Scene().attach(**handover)
    assert caught.value.code == "invalid_request"


def test_a_transport_that_is_closing_is_unavailable() -> None:
    scene = Scene(RuntimeError("the client is closed"))
    with pytest.raises(TandemError) as caught:
        scene.attach()
    assert caught.value.code == "unavailable"
    scene.exporter.ended(KEY)


def test_a_hand_over_that_takes_too_long_is_given_up_after_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    scene = Scene()
    stream = scene.attach(send_kv_to=worker_pb2.KvEndpoint(worker_id="d0"), handover_limit_s=2.0)
    scene.export.begin(KEY, TOKENS, SLOTS, 0)
    now += 10.0
    scene.exporter.expire()
    assert stream.aborts == [], "computing may take its time"
    scene.export.finished(RequestOutput(KEY, token_ids=[42]))
    now += 1.9
    scene.exporter.expire()
    assert stream.aborts == []
    now += 0.2
    scene.exporter.expire()
    scene.exporter.expire()
    assert stream.aborts == ["the KV was not there 2.0 s after the first token"]
