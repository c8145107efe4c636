"""Workers without threads or sockets: each message, job and step happens when a test says so. Everything but the model,
the threads and the transport is the product's."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tandem.common.sampling import SamplingParams
from tandem.decode.importer import Importer
from tandem.engine import engine as engine_module
from tandem.engine.engine import Engine
from tandem.engine.model.loader import LoadedModel
from tandem.engine.request import EngineRequest, RequestKey, RequestOutput
from tandem.engine.settings import EngineConfig
from tandem.engine.step import local
from tandem.engine.store import flow, loading, saver
from tandem.engine.store.cache import EngineStore
from tandem.engine.store.threads import Job
from tandem.handover import Reason
from tandem.prefill.exporter import Exporter
from tandem.proto import worker_pb2
from tests.engine.store.chained_model import ChainedDecoder
from tests.engine.store.scripted_home import ScriptedHome


class Jobs:
    """Stands in for `Workers`: jobs are kept until `run_one`."""

    def __init__(self, name: str, count: int, limit: int) -> None:
        self.limit = limit
        self.jobs: deque[Job] = deque()

    def put(self, job: Job) -> bool:
        if len(self.jobs) >= self.limit:
            return False
        self.jobs.append(job)
        return True

    def run_one(self) -> bool:
        if self.jobs:
            self.jobs.popleft().run()
            return True
        return False

    def wait_idle(self, timeout_s: float) -> bool:
        while self.run_one():
            pass
        return True

    def stop(self, timeout_s: float) -> bool:
        while self.jobs:
            self.jobs.popleft().drop()
        return True


def without_threads(patch: pytest.MonkeyPatch, loaded: LoadedModel) -> None:
    """Engines made from now on run `ChainedDecoder`, and nothing of theirs depends on time."""
    chained = replace(loaded, decoder=ChainedDecoder(loaded.config.vocab_size))  # type: ignore[arg-type]
    patch.setattr(local, "load_model", lambda *_, **__: chained)
    patch.setattr(engine_module, "StepMeter", lambda: SimpleNamespace(prefill_tokens_per_s=1.0, add=lambda *_: None))
    patch.setattr(flow, "Workers", Jobs)
    patch.setattr(saver, "Workers", Jobs)
    patch.setattr(saver, "RETAINED_SHARE", 1)
    patch.setattr(loading, "arrives_in_time", lambda *_: True)
    patch.setattr(loading, "GATE_S", 0.0)


class WorkerInStep:
    def __init__(
        self,
        name: str,
        folder: Path,
        home: ScriptedHome,
        wire: Wire,
        *,
        near: bool,
        chunk_tokens: int,
        overlap: bool,
        **settings: Any,
    ) -> None:
        self.name = name
        self.near = near
        self.outputs: dict[RequestKey, list[RequestOutput]] = {}
        store = EngineStore(home, chunk_tokens=chunk_tokens, worker_id=name, near_allowed=near, overlap=overlap)
        config = EngineConfig(model=str(folder), dtype="float32", device="cpu", **settings)
        self.engine = Engine(config, self._collect, store)
        pool = self.engine.pool
        self.exporter = Exporter(self.engine, wire, name)  # type: ignore[arg-type]
        self.importer = Importer(row_bytes=pool.row_bytes, num_layers=pool.num_layers, timeout_s=1e9, near_allowed=near)
        self.importer.server = wire
        wire.importers[name] = self.importer

    @property
    def endpoint(self) -> worker_pb2.KvEndpoint:
        return worker_pb2.KvEndpoint(worker_id=self.name, near_allowed=self.near)

    def _collect(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            self.outputs.setdefault(output.key, []).append(output)

    def submit(
        self,
        key: RequestKey,
        prompt: Sequence[int],
        max_tokens: int,
        output: Sequence[int] = (),
        *,
        send_to: WorkerInStep | None = None,
        expect_from: WorkerInStep | None = None,
    ) -> None:
        sampling = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=max_tokens)
        request = EngineRequest(key, list(prompt), sampling, output_token_ids=list(output))
        if send_to is not None:
            self.exporter.attach(request, worker_pb2.Submit(send_kv_to=send_to.endpoint))
        if expect_from is not None:
            self.importer.attach(request, worker_pb2.Submit(expect_kv=worker_pb2.KvSource(worker_id=expect_from.name)))
        self.engine.submit(request)

    # One thing at a time

    def message(self) -> bool:
        found = self.engine._inbox.run_next()
        self.engine._outputs.flush()
        return found

    def job(self) -> bool:
        store = self.engine._store
        assert store is not None
        return any(jobs.run_one() for jobs in (store._lookups, store._loaders, store._saver._worker))  # type: ignore[attr-defined]

    def step(self) -> bool:
        engine = self.engine
        plan = engine.scheduler.schedule(time.monotonic())
        engine._requests.begin(plan)
        if plan.num_tokens:
            engine._step(plan)
        engine._outputs.flush()
        return bool(plan.num_tokens or plan.admitted or plan.preempted)

    def give_up(self) -> None:
        """The store has been too slow for all that wait for it."""
        assert self.engine._store is not None
        self.engine._store.expire(float("inf"))

    def work(self) -> bool:
        """Whatever there is to do. False: nothing."""
        return any([self.message(), self.job(), self.step()])


class _Stream:
    """Both ends of one hand-over."""

    def __init__(self, wire: Wire, target: Importer, sender_id: str, listener: Any, opened: tuple[Any, ...]) -> None:
        self.request_id, self.epoch, self.num_tokens, self.row_bytes, self.num_layers = opened
        self.sender_id = sender_id
        self.transport, self.codec, self.received_bytes = "shared_memory", "raw", 0
        self.over = False
        self._target = target
        self._listener = listener
        self._skip: int | None = None
        self._waiting: list[Callable[[], None]] = []

    # The importer's end

    def accept(self, skip_tokens: int) -> bool:
        if self.over or self._skip is not None:
            return False
        self._skip = skip_tokens
        self._listener.on_accept(skip_tokens)
        for send in self._waiting:
            send()
        return True

    def refuse(self, reason: Reason) -> bool:
        return self.end(lambda: self._listener.on_refuse(reason))

    # The exporter's end

    def send_layer(self, layer: int, start: int, stop: int, fill: Callable[[int, int, memoryview], None]) -> None:
        self._send(lambda: self._rows(layer, start, stop, fill))

    def finish(self, payload: bytes) -> None:
        self._send(lambda: self._finish(payload))

    def abort(self, reason: Reason) -> None:
        if self.lose(reason):
            self._target.lost(self.request_id, self.epoch, reason)

    def lose(self, reason: Reason) -> bool:
        return self.end(lambda: self._listener.on_lost(reason))

    def end(self, tell: Callable[[], None]) -> bool:
        if self.over:
            return False
        self.over = True
        tell()
        return True

    def _send(self, send: Callable[[], None]) -> None:
        if self._skip is None:
            self._waiting.append(send)
        else:
            send()

    def _rows(self, layer: int, start: int, stop: int, fill: Callable[[int, int, memoryview], None]) -> None:
        start = max(start, self._skip or 0)
        if self.over or start >= stop:
            return
        payload = memoryview(bytearray((stop - start) * self.row_bytes))
        fill(start, stop, payload)
        if not self._target.rows(self.request_id, self.epoch, layer, start, stop, payload):
            self.lose(Reason("gone", "nobody takes the rows"))

    def _finish(self, payload: bytes) -> None:
        if self.over:
            return
        taken = self._target.finished(self.request_id, self.epoch, payload)
        self.end(self._listener.on_done if taken else lambda: self._listener.on_lost(Reason("gone", "not wanted")))


class Wire:
    """Stands in for the transport between all workers: a KvClient, and the servers of all importers."""

    def __init__(self) -> None:
        self.importers: dict[str, Importer] = {}
        self.streams: list[_Stream] = []
        self.sender = ""
        """Who opens the next stream."""

    def open(self, endpoint: Any, *opened: Any) -> _Stream:
        target = self.importers[endpoint.worker_id]
        stream = _Stream(self, target, self.sender, opened[-1], opened[:-1])
        self.streams.append(stream)
        target.opened(stream)  # type: ignore[arg-type]
        return stream

    def close_stream(self, request_id: str, epoch: int, reason: Reason) -> bool:
        found = [each for each in self.streams if (each.request_id, each.epoch) == (request_id, epoch)]
        ended = [each.lose(reason) for each in found]
        return any(ended)
