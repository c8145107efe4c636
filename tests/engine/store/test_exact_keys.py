"""No exact key ever leads to inexact rows: workers that take near KV and one that does not share a store, and requests,
hand-overs, losses, evictions and saves come in any order.

Every KV row of the model used here shows whether all rows before it were exact (`chained_model.py`), so what the engine
believes of its rows is compared with the rows themselves.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tandem.engine.model.loader import LoadedModel, load_model
from tandem.engine.request import RequestKey
from tandem.engine.schedule.sequence import Phase, Sequence
from tandem.handover import Reason
from tandem.kvstore.bundle import parse, transcode
from tandem.kvstore.codecs import Fidelity
from tandem.kvstore.identity import prefix_chain, request_namespace
from tandem.kvstore.interfaces import ObjectKey
from tests.engine.store.chained_model import Exact, Rows, read_rows
from tests.engine.store.scripted_home import ScriptedHome
from tests.engine.store.workers_in_step import Wire, WorkerInStep, without_threads

CHUNK = 32
BLOCK_BYTES = 2 * 3 * 16 * 32 * 4
RNG = random.Random(21)
STEMS = [[RNG.randrange(3, 512) for _ in range(150)] for _ in range(2)]
WORKERS = ("near", "other", "exact")
WORKER = st.sampled_from(WORKERS)
NUMBER = st.integers(0, 20)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_model(folder, dtype="float32", device="cpu", quantization=None)


class Books:
    """What every hash and key stands for, and what rows it promises."""

    def __init__(self, loaded: LoadedModel) -> None:
        model = loaded.config
        self.exact = Exact(model.num_layers, model.num_kv_heads * model.head_dim, model.vocab_size)
        self._root = request_namespace(loaded.namespace, b"")
        self._texts: dict[bytes, tuple[int, ...]] = {}
        self._learned: set[tuple[int, ...]] = set()

    def learn(self, tokens: list[int]) -> None:
        if tuple(tokens) in self._learned:
            return
        self._learned.add(tuple(tokens))
        for size in (16, CHUNK):
            for index, each in enumerate(prefix_chain(self._root, tokens, size)):
                self._texts.setdefault(each + bytes([size]), tuple(tokens[: (index + 1) * size]))

    def promised(self, key: bytes, size: int) -> Rows:
        """The last `size` rows of the text that `key` stands for."""
        return self.exact.rows(self._texts[key + bytes([size])])[:, -size:]


class Play(RuleBasedStateMachine):
    """The attributes are set by the test."""

    folder: Path
    loaded: LoadedModel
    books: Books

    def __init__(self) -> None:
        super().__init__()
        self.home = ScriptedHome()
        self.wire = Wire()
        self.workers = {
            "near": self._worker("near", 24, near=True),
            "other": self._worker("other", 16, near=True, overlap=False, block_size=32),
            "exact": self._worker("exact", 14, near=False),
        }
        self.seen: dict[ObjectKey, bytes] = {}
        self.texts: dict[RequestKey, list[int]] = {}
        """Prompt of each request, and output that it goes on after."""
        self.judged: set[tuple[str, RequestKey]] = set()

    def _worker(
        self, name: str, num_blocks: int, *, near: bool, overlap: bool = True, block_size: int = 16
    ) -> WorkerInStep:
        """`num_blocks` of 16 tokens."""
        return WorkerInStep(
            name,
            self.folder,
            self.home,
            self.wire,
            near=near,
            chunk_tokens=CHUNK,
            overlap=overlap,
            block_size=block_size,
            kv_cache_bytes=num_blocks * BLOCK_BYTES,
            max_model_len=200,
            max_num_seqs=3,
            max_num_batched_tokens=96,
        )

    def _key(self, prompt: list[int], output: list[int]) -> RequestKey:
        key = RequestKey(f"r{len(self.texts)}", 1)
        self.texts[key] = [*prompt, *output]
        return key

    def _spoken(self, worker: WorkerInStep) -> list[list[int]]:
        return [[*self.texts[key], *tokens] for key, tokens in said(worker).items()]

    # What happens

    @initialize(at=WORKER, codec=st.sampled_from(["", "kivi-int8", "kivi-int8"]))
    def earlier(self, at: str, codec: str) -> None:
        self._request(at, 0, 140, 1)
        self._work(1000)
        if codec:
            self.encode(codec, 0, True)

    @rule(
        asked=st.sampled_from(["request", "hand-over", "hand-over", "go on"]),
        workers=st.permutations(WORKERS),
        stem=st.sampled_from([0, 0, 0, 1]),
        length=st.sampled_from([33, 64, 80, 97, 140]),
        count=st.sampled_from([1, 6, 20]),
        rounds=st.sampled_from([0, 3, 8, 40]),
    )
    def ask(self, asked: str, workers: list[str], stem: int, length: int, count: int, rounds: int) -> None:
        """A client asks for something, and the workers work for a while."""
        match asked:
            case "request":
                self._request(workers[0], stem, length, count)
            case "hand-over":
                self._hand_over(workers[0], workers[1], stem, length, count)
            case _:
                self._go_on(workers[0], stem + length, count)
        self._work(rounds)

    def _request(self, at: str, stem: int, length: int, count: int) -> None:
        prompt = STEMS[stem][:length]
        self.workers[at].submit(self._key(prompt, []), prompt, count)

    def _hand_over(self, prefill: str, decode: str, stem: int, length: int, count: int) -> None:
        prompt = STEMS[stem][:length]
        key = self._key(prompt, [])
        self.wire.sender = prefill
        receiver, sender = self.workers[decode], self.workers[prefill]
        receiver.submit(key, prompt, count, expect_from=sender)
        sender.submit(key, prompt, count, send_to=receiver)

    def _go_on(self, at: str, number: int, lost: int) -> None:
        """What a lost worker had answered so far is the beginning of this one's answer; or it is the next turn."""
        spoken = [(key, tokens) for worker in self.workers.values() for key, tokens in said(worker).items() if tokens]
        if not spoken:
            return
        key, tokens = spoken[number % len(spoken)]
        before = self.texts[key]
        output = tokens[: max(len(tokens) - lost, 1)]
        if len(before) + len(output) + 9 < 200:
            self.workers[at].submit(self._key(before, output), before, len(output) + 8, output)

    def _all_work(self) -> bool:
        busy = [worker.work() for worker in self.workers.values()]
        return any(busy)

    def _work(self, rounds: int) -> None:
        for _ in range(rounds):
            if not self._all_work():
                break
        self.home.lost = None

    @rule(at=WORKER, what=st.sampled_from(["message", "job", "step", "give_up"]), times=st.integers(1, 8))
    def one_thing(self, at: str, what: str, times: int) -> None:
        for _ in range(times):
            getattr(self.workers[at], what)()

    @rule(codec=st.sampled_from(["kivi-int8", "kivi-int4", "lossless"]), number=NUMBER, all_of_them=st.booleans())
    def encode(self, codec: str, number: int, all_of_them: bool) -> None:
        """Objects have been to a tier with a codec of its own."""
        for key in list(self.home.objects) if all_of_them else self._some_object(number):
            content = transcode(memoryview(self.home.objects[key][1]), codec)
            assert content is not None
            self.home.change(key, bytes(content))

    @rule(number=NUMBER)
    def drop(self, number: int) -> None:
        for key in self._some_object(number):
            del self.home.objects[key]

    def _some_object(self, number: int) -> list[ObjectKey]:
        keys = list(self.home.objects)
        return [keys[number % len(keys)]] if keys else []

    @rule(number=st.integers(0, 3), layer=st.integers(0, 2))
    def lose_rows(self, number: int, layer: int) -> None:
        """Fetches break off there for a while."""
        self.home.lost = (number, layer)

    @rule(at=WORKER, number=NUMBER, what=st.sampled_from(["hand-over", "request"]))
    def cut(self, at: str, number: int, what: str) -> None:
        streams = [stream for stream in self.wire.streams if not stream.over]
        keys = list(self.workers[at].engine._requests.sequences)
        if what == "request" and keys:
            self.workers[at].engine.cancel(keys[number % len(keys)])
        elif what == "hand-over" and streams:
            streams[number % len(streams)].abort(Reason("lost", "the connection broke"))

    # What must be true, always

    @invariant()
    def cached_blocks_are_exact(self) -> None:
        for worker in self.workers.values():
            engine = worker.engine
            for text in (*(sequence.tokens for sequence in engine._requests.sequences.values()), *self._spoken(worker)):
                self.books.learn(text)
            size = engine.blocks.block_size
            for block_hash, block in engine.blocks._by_hash.items():
                slots = torch.arange(block * size, (block + 1) * size)
                promised = self.books.promised(block_hash, size)
                assert same(engine.pool, slots, promised), f"{worker.name} caches inexact rows under an exact hash"
            engine.check_integrity()

    @invariant()
    def saved_objects_are_exact(self) -> None:
        for key, (_, content) in self.home.objects.items():
            if self.seen.get(key) is content:
                continue
            self.seen[key] = content
            bundle = parse(memoryview(content))
            assert bundle is not None
            if bundle.header.fidelity is Fidelity.EXACT:
                for layer, promised in enumerate(self.books.promised(key, CHUNK)):
                    rows = bundle.layer(layer)
                    assert rows is not None
                    got = np.frombuffer(rows, np.float32).reshape(2, CHUNK, -1).transpose(1, 0, 2)
                    assert np.array_equal(got, promised), "inexact rows were saved as exact"

    @invariant()
    def sequences_know_what_is_exact(self) -> None:
        for worker in self.workers.values():
            engine = worker.engine
            for sequence in engine._requests.sequences.values():
                if sequence.phase not in (Phase.RUNNING, Phase.HOLDING) or sequence.gated:
                    continue
                assert worker.near or sequence.inexact_from is None, "a worker without near KV has some"
                count = sequence.exact_tokens
                promised = self.books.exact.rows(sequence.tokens[:count])
                assert same(engine.pool, slots_of(engine.blocks, sequence)[:count], promised), (
                    f"{worker.name} takes inexact rows for exact ones"
                )

    @invariant()
    def answers_said_to_be_exact_are(self) -> None:
        for worker in self.workers.values():
            for key, outputs in worker.outputs.items():
                last = outputs[-1]
                assert last.error_code != "internal", last.error_message
                if last.finish_reason is None or last.error_code or (worker.name, key) in self.judged:
                    continue
                self.judged.add((worker.name, key))
                report = next((output.prompt for output in outputs if output.prompt is not None), None)
                tokens = said(worker)[key]
                assert worker.near or report is None or report.inexact_from is None
                if report is not None and report.inexact_from is None:
                    assert report.near_tokens == 0
                    assert tokens == self.books.exact.output(self.texts[key], len(tokens)), worker.name

    def teardown(self) -> None:
        self.home.lost = None
        for _ in range(5000):
            if self._all_work():
                continue
            waiting = [stream for stream in self.wire.streams if not stream.over]
            if not waiting:
                break
            for stream in waiting:  # of workers that wait for each other's slots; in a cluster a timer ends that
                stream.abort(Reason("lost", "nothing moved"))
        else:
            raise AssertionError("requests do not end")
        self.cached_blocks_are_exact()
        self.saved_objects_are_exact()
        self.answers_said_to_be_exact_are()
        for worker in self.workers.values():
            left = {key: sequence.phase for key, sequence in worker.engine._requests.sequences.items()}
            assert not left, f"{worker.name} does not end {left}"
            assert worker.engine.blocks.available_blocks == worker.engine.blocks.usable_blocks
            assert worker.engine.stop(1.0)


def said(worker: WorkerInStep) -> dict[RequestKey, list[int]]:
    return {key: [token for output in outputs for token in output.token_ids] for key, outputs in worker.outputs.items()}


def slots_of(blocks: Any, sequence: Sequence) -> torch.Tensor:
    table = torch.tensor(blocks.table(sequence.key))
    return (table[:, None] * blocks.block_size + torch.arange(blocks.block_size)).flatten()


def same(pool: Any, slots: torch.Tensor, promised: Rows) -> bool:
    return all(np.array_equal(read_rows(pool, layer, slots), rows) for layer, rows in enumerate(promised))


def run(loaded: LoadedModel, folder: Path, max_examples: int, steps: int) -> None:
    made = type("PlayHere", (Play,), {"folder": folder, "loaded": loaded, "books": Books(loaded)})
    with pytest.MonkeyPatch.context() as patch:
        without_threads(patch, loaded)
        run_state_machine_as_test(
            made,
            settings=settings(
                max_examples=max_examples,
                stateful_step_count=steps,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )


def test_no_exact_key_leads_to_inexact_rows(loaded: LoadedModel, folder: Path) -> None:
    run(loaded, folder, max_examples=25, steps=60)


@pytest.mark.slow
def test_no_exact_key_leads_to_inexact_rows_in_many_plays(loaded: LoadedModel, folder: Path) -> None:
    run(loaded, folder, max_examples=400, steps=100)
