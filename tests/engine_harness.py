"""What the engine's tests share: sequences without an engine, an engine that collects outputs, and a hand-over between
two engines of one process."""

from __future__ import annotations

import dataclasses
import heapq
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from tandem.common.sampling import SamplingParams
from tandem.engine.engine import Engine
from tandem.engine.request import EngineRequest, FinishReason, KvReservation, RequestKey, RequestOutput
from tandem.engine.schedule.sequence import Sequence
from tandem.engine.settings import EngineConfig
from tandem.engine.store.cache import EngineStore
from tandem.kvstore.identity import Namespace, prefix_chain, request_namespace
from tests.models import tiny_model

ROOT = Namespace(b"n" * 32)
TIMEOUT_S = 300.0
SLOW_STEP_S = 0.005
_NO_TOKENS = (FinishReason.CANCELLED, FinishReason.HANDED_OVER)


def make_sequence(
    name: str,
    tokens: Seq[int],
    *,
    salt: bytes = b"",
    block_size: int = 16,
    max_model_len: int = 1 << 20,
    eos: frozenset[int] = frozenset(),
    priority: int = 0,
    deadline: float | None = None,
    kv_export: Any = None,
    kv_import: Any = None,
    **sampling: Any,
) -> Sequence:
    params = SamplingParams(**sampling)
    request = EngineRequest(
        RequestKey(name, 0), list(tokens), params, priority, deadline, salt, kv_export=kv_export, kv_import=kv_import
    )
    stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos)
    root = request_namespace(ROOT, salt)
    sequence = Sequence(
        request,
        root=root,
        chain=prefix_chain(root, request.token_ids, block_size),
        seed=params.seed or 0,
        stop_ids=stop_ids,
        max_model_len=max_model_len,
        submitted=0.0,
    )
    sequence.pinned = kv_export is not None
    return sequence


def wait_for(condition: Callable[[], Any], timeout_s: float = TIMEOUT_S) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.002)


class EngineUnderTest:
    """An engine on a tiny random model (float32), with everything it has said so far."""

    def __init__(self, folder: Path, store: EngineStore | None = None, **settings: Any) -> None:
        defaults: dict[str, Any] = {"dtype": "float32", "device": "cpu", "kv_cache_bytes": 4 << 20}
        self.outputs: dict[RequestKey, list[RequestOutput]] = {}
        self.steps: list[list[RequestOutput]] = []
        self._resumed_at: dict[RequestKey, int] = {}
        self._changed = threading.Condition()
        self.engine = Engine(EngineConfig(model=str(folder), **(defaults | settings)), self._collect, store)

    def __enter__(self) -> EngineUnderTest:
        self.engine.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.check_all_free()
        finally:
            assert self.engine.stop(TIMEOUT_S)

    def _collect(self, outputs: list[RequestOutput]) -> None:
        with self._changed:
            self.steps.append(outputs)
            for output in outputs:
                previous = self.outputs.setdefault(output.key, [])
                assert not previous or previous[-1].finish_reason is None, "an output after the last one"
                start = self._resumed_at.get(output.key, 0) + sum(len(o.token_ids) for o in previous)
                assert output.start_index == start or output.error_code or output.finish_reason in _NO_TOKENS
                previous.append(output)
            self._changed.notify_all()

    def submit(self, name: str, prompt: Seq[int], **options: Any) -> RequestKey:
        """`options`: fields of EngineRequest; the others are sampling parameters (greedy, endless unless said)."""
        fields = {field.name for field in dataclasses.fields(EngineRequest)}
        request = {field: options.pop(field) for field in fields & options.keys()}
        sampling = SamplingParams(**({"temperature": 0.0, "ignore_eos": True, "max_tokens": 8} | options))
        key = RequestKey(name, 0)
        self._resumed_at[key] = len(request.get("output_token_ids", ()))
        self.engine.submit(EngineRequest(key, list(prompt), sampling, **request))
        return key

    def slow_down(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """From now on 900 tokens take seconds, on any machine."""
        forward = self.engine.loaded.decoder.forward

        def slow(*arguments: Any) -> Any:
            time.sleep(SLOW_STEP_S)
            return forward(*arguments)

        monkeypatch.setattr(self.engine.loaded.decoder, "forward", slow)

    def last(self, key: RequestKey) -> RequestOutput:
        """Waits for the end of a request."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.ended(key), TIMEOUT_S), f"{key} did not end"
            return self.outputs[key][-1]

    def wait_tokens(self, key: RequestKey, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.tokens_so_far(key)) >= count, TIMEOUT_S)

    def expire(self, key: RequestKey) -> None:
        """The deadline of this request, which must have one, passes now."""

        def passes() -> None:
            queue = self.engine.scheduler._deadlines
            queue[:] = [(0.0 if each.key == key else at, arrival, each) for at, arrival, each in queue]
            heapq.heapify(queue)

        self.engine._inbox.put(passes)

    def ended(self, key: RequestKey) -> bool:
        return key in self.outputs and self.outputs[key][-1].finish_reason is not None

    def tokens_so_far(self, key: RequestKey) -> list[int]:
        return [token for output in self.outputs.get(key, []) for token in output.token_ids]

    def tokens(self, key: RequestKey) -> list[int]:
        """All tokens of a request that ended well."""
        last = self.last(key)
        assert not last.error_code, last.error_message
        return self.tokens_so_far(key)

    def generate(self, name: str, prompt: Seq[int], **options: Any) -> list[int]:
        return self.tokens(self.submit(name, prompt, **options))

    def check_all_free(self) -> None:
        """Nothing runs any more, every block is back, and the books balance."""
        wait_for(lambda: not self.engine._requests.known)
        assert self.engine.wait_saved(TIMEOUT_S)
        self.engine.check_integrity()
        status = self.engine.status()
        assert status.free_blocks == status.total_blocks
        assert status.pending_prefill_tokens == 0


class DirectImport:
    """The decode side of a hand-over without a transport."""

    def __init__(self) -> None:
        self.reservation: KvReservation | None = None
        self.ready = threading.Event()
        self.is_closed = threading.Event()

    def reserved(self, reservation: KvReservation) -> None:
        self.reservation = reservation
        self.ready.set()

    def closed(self) -> None:
        self.is_closed.set()


class DirectExport:
    """The prefill side: copies each layer into the reservation as soon as it is announced, on the engine thread.

    `fail_at` names the point at which the transport breaks: begin, layer, finished.
    """

    def __init__(self, source: Engine, target: DirectImport, fail_at: str = "", fail_layer: int = 1) -> None:
        self.source = source
        self.target = target
        self.fail_at = fail_at
        self.fail_layer = fail_layer
        self.slots: list[int] = []
        self.lost = False
        self.announced: list[tuple[int, int, int]] = []
        self.first: RequestOutput | None = None
        self.aborted_because: str | None = None
        self.key: RequestKey | None = None

    def _copy(self, layer: int, start: int, stop: int) -> None:
        import torch

        if self.lost:
            return
        assert self.target.ready.wait(TIMEOUT_S)
        assert self.target.reservation is not None
        raw = bytearray((stop - start) * self.source.pool.row_bytes)
        self.source.pool.read_rows(layer, torch.tensor(self.slots[start:stop]), memoryview(raw))
        self.target.reservation.write(layer, start, stop, memoryview(raw))

    def _lose(self, point: str) -> None:
        if self.fail_at == point and not self.lost:
            self.lost = True
            assert self.target.ready.wait(TIMEOUT_S)
            assert self.target.reservation is not None
            self.target.reservation.fail(f"lost at {point}")

    def begin(self, key: RequestKey, tokens: Seq[int], slots: Seq[int], cached_tokens: int) -> None:
        self.key, self.slots = key, list(slots)
        self._lose("begin")
        if cached_tokens:
            for layer in range(self.source.pool.num_layers):
                self._copy(layer, 0, cached_tokens)

    def layer_ready(self, layer: int, start: int, stop: int) -> None:
        self.announced.append((layer, start, stop))
        if layer == self.fail_layer:
            self._lose("layer")
        self._copy(layer, start, stop)

    def finished(self, output: RequestOutput) -> None:
        self.first = output
        self._lose("finished")
        if not self.lost:
            assert self.target.reservation is not None
            self.target.reservation.complete(output)
        assert self.key is not None
        self.source.release(self.key)

    def aborted(self, reason: str) -> None:
        self.aborted_because = reason
        if self.target.reservation is not None:
            self.target.reservation.fail(reason)
        if self.key is not None:
            self.source.release(self.key)


def tiny_llama(folder: Path) -> Path:
    return tiny_model("llama", folder)
