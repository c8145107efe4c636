"""A call without servers: what reaches the reader when it reads rarely, and fencing of outputs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tandem.common.errors import TandemError
from tandem.common.sampling import SamplingParams
from tandem.proto import worker_pb2
from tandem.router.calls.choice import CallContext, CallSpec, ChoiceSpec
from tandem.router.calls.generate import MAX_BUFFERED_BYTES, Call
from tandem.router.metrics.router_metrics import RouterMetrics
from tandem.router.placing.dispatch import SequenceSpec
from tandem.router.tenants.caller import ANYBODY
from tandem.router.text.served_model import Prompt
from tandem.router.text.tokenizer import ModelText
from tests.router.conftest import until
from tests.router.doors import a_record, a_thread, open_door


class FakeDispatcher:
    """Keeps the listeners, so that a test can speak for the workers."""

    def __init__(self) -> None:
        self.listeners: list[Any] = []
        self.resumed: list[list[int]] = []
        """What each start was told of the output."""
        self.cancelled = 0
        self.fleet = SimpleNamespace(decode=[])

    def start(self, key: Any, sequence: Any, listener: Any, *, output_token_ids: Any, **_: Any) -> Any:
        self.listeners.append(listener)
        self.resumed.append(list(output_token_ids))
        worker = SimpleNamespace(identity=("d", 1), name="d", info=worker_pb2.WorkerInfo())
        return SimpleNamespace(cancel=self._cancel, decode=worker, prefill=None, placement=None)

    def cached_tokens(self, sequence: Any) -> int:
        return 0

    def _cancel(self) -> None:
        self.cancelled += 1


@pytest.fixture
def dispatcher() -> FakeDispatcher:
    return FakeDispatcher()


@pytest.fixture
def context(dispatcher: FakeDispatcher, model_folder: Path) -> CallContext:
    text = ModelText(model_folder)
    return CallContext(
        dispatcher,  # type: ignore[arg-type]
        RouterMetrics(),
        text,
        timeout_s=60,
        worker_wait_s=1,
        keepalive_s=60,
        admission=open_door(),
        answers=a_thread(),
    )


def streaming_call(context: CallContext, *, logprobs: int | None = None) -> Call:
    sampling = SamplingParams(max_tokens=10**6, logprobs=logprobs)
    spec = ChoiceSpec(SequenceSpec(Prompt([5, 6]), sampling, ANYBODY), keep_tokens=logprobs is not None)
    call = Call(CallSpec("r", [spec], a_record(), streaming=True), context)
    call.start()
    return call


def output(start: int, ids: list[int], alternatives: int | None = None) -> worker_pb2.RequestOutput:
    logprobs = []
    if alternatives is not None:
        logprobs = [worker_pb2.TokenLogprobs(top_ids=range(alternatives), top_logprobs=[0.0] * alternatives)] * len(ids)
    return worker_pb2.RequestOutput(start_index=start, token_ids=ids, logprobs=logprobs)


async def test_everything_between_two_reads_is_one_delta(context: CallContext, dispatcher: FakeDispatcher) -> None:
    call = streaming_call(context)
    for i in range(50):
        dispatcher.listeners[0].on_output(output(i, [40 + i % 20]))
    (delta,) = await call.next()
    assert delta.piece.text == context.text.decode([40 + i % 20 for i in range(50)])
    call.close()
    assert dispatcher.cancelled == 1


async def test_tokens_seen_before_are_dropped(context: CallContext, dispatcher: FakeDispatcher) -> None:
    call = streaming_call(context)
    on_output = dispatcher.listeners[0].on_output
    on_output(output(0, [40, 41]))
    on_output(output(0, [40, 41, 42]))
    on_output(output(1, [41, 42]))
    (delta,) = await call.next()
    assert delta.piece.text == context.text.decode([40, 41, 42])
    assert call.usage().completion_tokens == 3
    call.close()


async def test_a_gap_in_the_tokens_is_an_error(context: CallContext, dispatcher: FakeDispatcher) -> None:
    call = streaming_call(context)
    dispatcher.listeners[0].on_output(output(1, [41]))
    with pytest.raises(TandemError) as caught:
        await call.next()
    assert caught.value.code == "internal"
    assert dispatcher.cancelled == 1


async def test_a_reader_that_never_reads_is_cut_off(context: CallContext, dispatcher: FakeDispatcher) -> None:
    call = streaming_call(context, logprobs=20)
    sent = 0
    while call.error is None:
        assert sent * 2000 < 2 * MAX_BUFFERED_BYTES, "the buffer must be bounded"
        dispatcher.listeners[0].on_output(output(sent, [40] * 50, alternatives=20))
        sent += 50
    assert call.error.code == "cancelled"
    assert dispatcher.cancelled == 1


async def test_another_worker_goes_on_after_what_was_read(context: CallContext, dispatcher: FakeDispatcher) -> None:
    async def there_is_one(timeout_s: float, avoid: object) -> None:
        return None

    dispatcher.fleet.wait_for_decode = there_is_one
    call = streaming_call(context)
    dispatcher.listeners[0].on_output(output(0, [40, 41]))
    (delta,) = await call.next()
    assert delta.piece.text == context.text.decode([40, 41])
    dispatcher.listeners[0].on_worker_lost("gone")
    task = asyncio.create_task(call.next())
    await until(lambda: len(dispatcher.listeners) == 2)
    assert dispatcher.resumed == [[], [40, 41]]
    dispatcher.listeners[1].on_output(output(2, [50]))
    (delta,) = await task
    assert delta.piece.text == context.text.decode([50])
    assert call.usage().completion_tokens == 3
    call.close()
