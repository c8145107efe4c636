"""A stream whose worker dies goes on elsewhere: the client sees a pause, and every token once."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.common.errors import TandemError
from tandem.common.sampling import SamplingParams
from tandem.proto import worker_pb2
from tandem.router.calls.choice import CallContext, CallSpec, Choice, ChoiceSpec
from tandem.router.metrics.router_metrics import RouterMetrics
from tandem.router.placing.dispatch import SequenceSpec
from tandem.router.tenants.caller import ANYBODY
from tandem.router.text.served_model import Prompt
from tandem.router.text.tokenizer import ModelText
from tests.router.conftest import TEXT, House, events, until
from tests.router.doors import a_record, a_thread, open_door
from tests.router.fake_worker import FakeWorker, Script, fake_logprobs

BODY: dict[str, Any] = {"prompt": "The river ran past the old mill", "max_tokens": 12, "return_token_ids": True}


async def pool(house: House, *scripts: Script, **options: Any) -> tuple[list[FakeWorker], httpx.AsyncClient]:
    workers = [await house.decode(f"decode-{i}", script) for i, script in enumerate(scripts)]
    return workers, await house.client(await house.router(*workers, **options))


def shown(body: str) -> tuple[str, list[int], list[Any]]:
    """Text, token ids and finish reasons of a stream that ended well."""
    found = events(body)
    assert found[-1] == "[DONE]", found[-1]
    choices = [choice for event in found[:-1] for choice in event["choices"]]
    tokens = [token for choice in choices for token in choice.get("token_ids") or ()]
    reasons = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    return "".join(choice["text"] for choice in choices), tokens, reasons


async def begun(workers: list[FakeWorker], count: int = 1) -> tuple[FakeWorker, FakeWorker]:
    """The worker of two that has the request, once it has sent so many outputs, and the other one."""
    await until(lambda: sum(worker.sent for worker in workers) >= count)
    first, second = sorted(workers, key=lambda worker: -worker.sent)
    return first, second


async def test_a_stream_goes_on_where_its_worker_died(house: House) -> None:
    workers, client = await pool(house, Script(hold_after=5, cached_tokens=7), Script(hold_after=5, cached_tokens=3))
    body = {**BODY, "stream": True, "stream_options": {"include_usage": True}}
    request = asyncio.create_task(client.post("/v1/completions", json=body))
    lost, other = await begun(workers, 5)
    cached = lost.script.cached_tokens
    other.script.hold_after = None
    await lost.kill()
    response = await request
    text, tokens, reasons = shown(response.text)
    (before,), (after,) = lost.submits, other.submits
    prompt = list(before.prompt_token_ids)
    assert tokens == [prompt[i % len(prompt)] for i in range(12)]
    assert text == ModelText(house.model).decode(tokens)
    assert reasons == ["length"]
    assert list(after.output_token_ids) == tokens[:5]
    assert after.key == worker_pb2.RequestKey(request_id=before.key.request_id, epoch=before.key.epoch + 1)
    assert after.sampling == before.sampling, "the seed, too"
    assert before.sampling.HasField("seed")
    usage = events(response.text)[-2]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(prompt), 12)
    assert usage["prompt_tokens_details"]["cached_tokens"] == cached, "counted once"


@pytest.mark.parametrize(
    "options",
    [{"logprobs": 2}, {"logprobs": 1, "echo": True}, {"stop": ["ran past the"]}, {"n": 3, "seed": 4}],
    ids=lambda options: "+".join(options),
)
async def test_the_whole_answer_is_the_one_without_a_loss(house: House, options: dict[str, Any]) -> None:
    workers, client = await pool(house, Script(), Script())
    undisturbed = (await client.post("/v1/completions", json=BODY | options)).json()
    for worker in workers:
        worker.script.hold_after, worker.sent = 3, 0
    request = asyncio.create_task(client.post("/v1/completions", json=BODY | options))
    n = options.get("n", 1)
    await until(lambda: sum(worker.sent for worker in workers) >= 3 * n)
    await workers[0].kill()
    workers[1].resume.set()
    disturbed = (await request).json()
    assert disturbed["choices"] == undisturbed["choices"]
    assert disturbed["usage"] == undisturbed["usage"]
    again = [submit for worker in workers for submit in worker.submits if submit.output_token_ids]
    assert not [submit for submit in again if submit.sampling.HasField("prompt_logprobs")], "they have come already"


async def test_a_worker_that_wakes_up_after_it_was_given_up_is_not_heard(house: House) -> None:
    workers, client = await pool(house, Script(hold_after=4), Script(hold_after=4), silence_s=2.0)
    request = asyncio.create_task(client.post("/v1/completions", json={**BODY, "stream": True}))
    frozen, other = await begun(workers, 4)
    frozen.freeze()
    frozen.resume.set()
    await until(lambda: other.submits)
    frozen._thawed.set()
    other.resume.set()
    _, tokens, _ = shown((await request).text)
    prompt = list(other.submits[0].prompt_token_ids)
    assert tokens == [prompt[i % len(prompt)] for i in range(12)]


async def test_a_worker_that_drains_hands_its_streams_on_and_is_not_blamed(house: House) -> None:
    workers = [await house.decode(f"decode-{i}", Script(hold_after=4)) for i in range(2)]
    router = await house.router(*workers)
    client = await house.client(router)
    left = router.service._context.retries._left
    request = asyncio.create_task(client.post("/v1/completions", json={**BODY, "stream": True}))
    leaving, other = await begun(workers, 4)
    leaving.script.error, leaving.script.error_after = ("unavailable", "the worker is shutting down"), 5
    other.script.hold_after = None
    leaving.resume.set()
    _, tokens, _ = shown((await request).text)
    assert len(tokens) == 12
    assert len(leaving.submits) == len(other.submits) == 1
    assert all(session.health._failures == 0 for session in router.fleet.decode)
    assert router.service._context.retries._left >= left


async def test_a_failed_step_is_done_again_elsewhere(house: House) -> None:
    bad = Script(error=("internal", "computing the request failed"), error_after=2)
    workers, client = await pool(house, bad, Script())
    for _ in range(2):
        response = await client.post("/v1/completions", json={**BODY, "stream": True})
        assert len(shown(response.text)[1]) == 12
    assert len(workers[0].submits) >= 1
    assert any(submit.output_token_ids for submit in workers[1].submits)


async def test_a_failed_step_without_another_worker_is_an_error(house: House) -> None:
    worker, client = await house.pair(Script(error=("internal", "computing the request failed")))
    response = await client.post("/v1/completions", json=BODY)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal")
    assert len(worker.submits) == 1


async def test_a_request_that_kills_workers_is_ended(house: House) -> None:
    worker, client = await house.pair(Script(hold_after=3), worker_wait_s=20.0)
    request = asyncio.create_task(client.post("/v1/completions", json=BODY))
    await until(lambda: worker.sent == 3)
    for attempt in range(1, 4):
        await until(lambda attempt=attempt: len(worker.submits) == attempt, 10)
        await worker.kill()
        if attempt < 3:
            await worker.restart()
    response = await request
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal")
    assert "3 workers failed one after the other at token 3" in response.json()["error"]["message"]
    assert "retry-after" not in response.headers


async def test_a_request_outlives_any_number_of_workers_while_it_makes_progress(house: House) -> None:
    worker, client = await house.pair(Script(hold_after=1))
    request = asyncio.create_task(client.post("/v1/completions", json={**BODY, "stream": True}))
    for tokens in range(1, 6):
        await until(lambda tokens=tokens: worker.sent == tokens, 10)
        worker.script.hold_after = tokens + 1 if tokens < 5 else None
        await worker.kill()
        await worker.restart()
    assert len(shown((await request).text)[1]) == 12
    assert [len(submit.output_token_ids) for submit in worker.submits] == [0, 1, 2, 3, 4, 5]


async def test_a_stream_waits_where_all_that_are_left_are_full(house: House) -> None:
    workers, client = await pool(house, Script(hold_after=4), Script(hold_after=4))
    request = asyncio.create_task(client.post("/v1/completions", json={**BODY, "stream": True}))
    lost, other = await begun(workers, 4)
    other.script.error = ("overloaded", "no blocks")
    await lost.kill()
    await until(lambda: len(other.submits) >= 2)
    other.script.error = other.script.hold_after = None
    assert len(shown((await request).text)[1]) == 12


class Line:
    """Dispatcher and call of one choice: every loss is followed by a new start at once."""

    def __init__(self, text: ModelText, spec: ChoiceSpec) -> None:
        self.spec = CallSpec("r", [spec], a_record())
        self.context = CallContext(self, RouterMetrics(), text, 60, 1, 60, open_door(), a_thread())  # type: ignore[arg-type]
        self.deadline = 1e12
        self.fleet = SimpleNamespace(decode=[])
        self.error: TandemError | None = None
        self.resumed_at: list[int] = []
        self.seeds: set[int | None] = set()
        self.choice = Choice(self, 0, spec)
        self.choice.submit()

    def start(self, key: Any, sequence: Any, listener: Any, *, output_token_ids: Any, **_: Any) -> Any:
        self.resumed_at.append(len(output_token_ids))
        self.seeds.add(sequence.sampling.seed)
        worker = SimpleNamespace(identity=("d", len(self.resumed_at)), name="d", info=worker_pb2.WorkerInfo())
        return SimpleNamespace(cancel=lambda: None, decode=worker, prefill=None, placement=None)

    def prompt_computed(self, choice: Choice) -> None: ...

    def produced(self, tokens: int) -> None: ...

    def choice_ready(self, choice: Choice) -> None: ...

    def retry(self, choice: Choice, reason: str, *, fault: bool) -> None:
        choice.submit()

    def fail(self, error: TandemError) -> None:
        self.error = error


@pytest.fixture(scope="module")
def text(model_folder: Path) -> ModelText:
    return ModelText(model_folder)


@pytest.fixture(scope="module")
def ids(text: ModelText) -> list[int]:
    return asyncio.run(text.encode(TEXT + " é 世界 👩‍👩‍👧 ###END " + TEXT, add_special_tokens=False))


def play(text: ModelText, ids: list[int], cuts: list[tuple[int, int]], **fields: Any) -> tuple[Any, ...]:
    """What a reader gets of `ids`, when its worker is lost after each of `cuts` and the next one says `repeated` tokens
    again (a message of the lost worker that was still under way)."""
    sampling = SamplingParams(max_tokens=len(ids), logprobs=1)
    spec = ChoiceSpec(SequenceSpec(Prompt([5, 6]), sampling, ANYBODY), keep_tokens=True, **fields)
    line = Line(text, spec)
    choice, position = line.choice, 0
    pieces = []
    for cut, repeated in [*cuts, (len(ids), 0)]:
        while position < cut and not choice.finished:
            position += 1
            first = max(position - 1 - repeated, 0)
            finish = worker_pb2.FINISH_REASON_LENGTH if position == len(ids) else 0
            new = ids[first:position]
            choice.on_output(
                worker_pb2.RequestOutput(
                    start_index=first,
                    token_ids=new,
                    logprobs=[fake_logprobs(token, 1) for token in new],
                    finish_reason=finish,  # type: ignore[arg-type]
                )
            )
        pieces.append(choice.take())
        if not choice.finished:
            choice.on_worker_lost("gone")
            assert line.resumed_at[-1] == position
    assert line.error is None
    assert choice.finished
    assert len(line.seeds) == 1
    assert None not in line.seeds
    return (
        "".join(delta.piece.text for delta in pieces),
        [token for delta in pieces for token in delta.piece.token_ids],
        [entry.top_ids[0] for delta in pieces for entry in delta.piece.logprobs],
        pieces[-1].finish_reason,
        pieces[-1].stop_reason,
        choice.num_tokens,
    )


@given(
    cuts=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 4)), max_size=6),
    stop=st.sampled_from([(), ("###END",), ("bridge, where", "世界"), ("user!",)]),
)
@settings(max_examples=60, deadline=None)
def test_losses_change_nothing_of_what_a_reader_gets(
    text: ModelText, ids: list[int], cuts: list[tuple[int, int]], stop: tuple[str, ...]
) -> None:
    places = sorted({cut for cut, _ in cuts if 0 < cut < len(ids)})  # each worker gives a token, so none is poisoned
    ordered = [(place, repeated) for place, (_, repeated) in zip(places, cuts, strict=False)]
    assert play(text, ids, ordered, stop=stop) == play(text, ids, [], stop=stop)


def test_what_needs_no_chance_needs_no_seed(text: ModelText) -> None:
    greedy = ChoiceSpec(SequenceSpec(Prompt([5]), SamplingParams(temperature=0.0), ANYBODY))
    assert Line(text, greedy).seeds == {None}
    given_one = ChoiceSpec(SequenceSpec(Prompt([5]), SamplingParams(seed=9), ANYBODY))
    assert Line(text, given_one).seeds == {9}
