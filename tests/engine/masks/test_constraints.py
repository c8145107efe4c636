"""Output with a constraint matches it, on every path, and a constraint that is wrong harms its own request only."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from tandem.common.sampling import Constraint, SamplingParams
from tandem.engine.masks import pool as module
from tandem.engine.masks.guide import Guide
from tandem.engine.masks.pool import MaskPool
from tandem.engine.request import FinishReason, RequestKey
from tandem.engine.step.constraint import TokenMasks, allows_only, unpacked_bits
from tandem.engine.step.sampler import Sampler
from tandem.engine.store.cache import EngineStore
from tandem.proto import worker_pb2
from tandem.worker.wire import request_from_proto
from tests.engine.store.scripted_home import ScriptedHome
from tests.engine.test_engine_handover import hand_over
from tests.engine_harness import TIMEOUT_S, EngineUnderTest, make_sequence, tiny_llama, wait_for
from tests.models import VOCAB_SIZE

CPU = torch.device("cpu")
PROMPT = [(i * 17) % 500 + 3 for i in range(70)]
SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "blue"]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
        "ok": {"type": "boolean"},
    },
    "required": ["colour", "sizes", "ok"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
JSON = Constraint("json_schema", json.dumps(SCHEMA))
REGEX = Constraint("regex", r"[a-f]{4,12}(-[0-9]{2,5}){1,3}")
LARK = Constraint("lark", 'start: greeting " " NAME "."\ngreeting: "Hello" | "Good morning"\nNAME: /[A-Z][a-z]{2,6}/')
CHOICES = ("yes", "yesterday", "no", "never ever", "")
SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.3, "seed": 5},
    {"temperature": 1.0, "top_p": 0.5, "top_k": 3, "seed": 1, "presence_penalty": 1.0, "logprobs": 2},
]


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def ask(engine: EngineUnderTest, name: str, constraint: Constraint, **options: Any) -> RequestKey:
    defaults: dict[str, Any] = {"ignore_eos": False, "max_tokens": 200}
    return engine.submit(name, PROMPT, constraint=constraint, **(defaults | options))


def text_of(engine: EngineUnderTest, key: RequestKey, tokenizer: Tokenizer) -> str:
    text: str = tokenizer.decode(engine.tokens(key), skip_special_tokens=True)
    return text


def check_text(constraint: Constraint, text: str) -> None:
    match constraint.kind:
        case "json_schema":
            value = json.loads(text)
            assert set(value) == {"colour", "sizes", "ok"}
            assert value["colour"] in ("red", "green", "blue")
            assert all(isinstance(size, int) and 0 <= size <= 99 for size in value["sizes"])
            assert len(value["sizes"]) <= 3
            assert isinstance(value["ok"], bool)
        case "regex":
            assert re.fullmatch(constraint.text, text)
        case "lark":
            assert re.fullmatch(r"(Hello|Good morning) [A-Z][a-z]{2,6}\.", text)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "seeded", "everything"])
def test_the_output_matches_and_ends(engine: EngineUnderTest, tokenizer: Tokenizer, sampling: dict[str, Any]) -> None:
    keys = {c: ask(engine, c.kind, c, **sampling) for c in (JSON, REGEX, LARK)}
    for constraint, key in keys.items():
        assert engine.last(key).finish_reason is FinishReason.STOP
        check_text(constraint, text_of(engine, key, tokenizer))


def test_without_end_of_sequence_it_ends_all_the_same(engine: EngineUnderTest, tokenizer: Tokenizer) -> None:
    """With ignore_eos, and where min_tokens asks for more than the grammar has."""
    for name, options in (("ignore", {"ignore_eos": True}), ("min", {"min_tokens": 150})):
        for constraint in (JSON, REGEX, LARK):
            key = ask(engine, f"{name} {constraint.kind}", constraint, **options)
            assert engine.last(key).finish_reason is FinishReason.STOP
            check_text(constraint, text_of(engine, key, tokenizer))


def test_a_tokens_limit_cuts_the_output_short(engine: EngineUnderTest) -> None:
    key = ask(engine, "short", JSON, max_tokens=3)
    assert engine.last(key).finish_reason is FinishReason.LENGTH
    assert len(engine.tokens(key)) == 3


def test_neighbours_in_the_batch_are_left_alone(engine: EngineUnderTest) -> None:
    options: dict[str, Any] = {"max_tokens": 40, "temperature": 0.8, "seed": 3}
    alone = engine.generate("alone", PROMPT, **options)
    guided = [ask(engine, f"g{i}", (JSON, REGEX)[i % 2], temperature=1.0, seed=i) for i in range(4)]
    assert engine.generate("company", PROMPT, **options) == alone
    for index, key in enumerate(guided):
        tokens = engine.tokens(key)
        again = ask(engine, f"again{index}", (JSON, REGEX)[index % 2], temperature=1.0, seed=index)
        assert engine.tokens(again) == tokens, "whatever company it is in"


def test_logprobs_are_the_models_own(engine: EngineUnderTest) -> None:
    key = ask(engine, "a", REGEX, logprobs=1)
    engine.tokens(key)
    entries = [entry for output in engine.outputs[key] for entry in output.logprobs]
    assert any(entry.rank > 1 for entry in entries), "greedy, so only the mask keeps it from the most likely token"


# Paths on which the output does not come from one uninterrupted run


def test_after_preemptions(folder: Path, engine: EngineUnderTest) -> None:
    prompts = [[(i * 37 + j * 11) % 500 + 3 for j in range(40)] for i in range(6)]
    options: dict[str, Any] = {"constraint": REGEX_LONG, "max_tokens": 60, "ignore_eos": False}
    alone = [engine.generate(f"a{i}", prompt, **options) for i, prompt in enumerate(prompts)]
    block_bytes = 2 * 3 * 16 * 32 * 4
    with EngineUnderTest(folder, kv_cache_bytes=21 * block_bytes, max_model_len=300) as small:
        preempted: list[str] = []
        schedule = small.engine.scheduler.schedule

        def counting(now: float):  # type: ignore[no-untyped-def]
            plan = schedule(now)
            preempted.extend(sequence.key.request_id for sequence in plan.preempted)
            return plan

        small.engine.scheduler.schedule = counting  # type: ignore[method-assign]
        keys = [small.submit(f"a{i}", prompt, **options) for i, prompt in enumerate(prompts)]
        assert [small.tokens(key) for key in keys] == alone
        assert preempted


REGEX_LONG = Constraint("regex", r"([a-z]{2,6} ){30,60}")


@pytest.mark.parametrize("fail_at", ["", "layer"])
def test_after_a_hand_over(folder: Path, engine: EngineUnderTest, fail_at: str) -> None:
    with EngineUnderTest(folder) as prefill:
        for constraint in (JSON, REGEX, LARK):
            options: dict[str, Any] = {"constraint": constraint, "max_tokens": 200, "ignore_eos": False}
            expected = engine.generate(f"whole {constraint.kind}", PROMPT, **options)
            key, _, _ = hand_over(prefill, engine, constraint.kind, PROMPT, fail_at, **options)
            assert engine.tokens(key) == expected
            assert engine.last(key).finish_reason is FinishReason.STOP


def test_a_first_token_that_completes_the_output_is_handed_over(folder: Path, engine: EngineUnderTest) -> None:
    with EngineUnderTest(folder) as prefill:
        key, _, _ = hand_over(prefill, engine, "x", PROMPT, constraint=Constraint("regex", "x"), max_tokens=9)
        assert len(engine.tokens(key)) == 1
        assert engine.last(key).finish_reason is FinishReason.STOP


@pytest.mark.parametrize("constraint", [JSON, REGEX, LARK], ids=lambda constraint: constraint.kind)
def test_after_output_that_another_worker_began(engine: EngineUnderTest, constraint: Constraint) -> None:
    options: dict[str, Any] = {"temperature": 0.9, "seed": 4}
    whole = engine.tokens(ask(engine, "whole", constraint, **options))
    for cut in {1, 2, len(whole) // 2, len(whole) - 1}:
        key = ask(engine, f"from {cut}", constraint, output_token_ids=whole[:cut], **options)
        assert engine.tokens(key) == whole[cut:]


# What may follow, against an obvious reference


def test_masks_agree_with_the_obvious_reference(pool: MaskPool, tokenizer: Tokenizer) -> None:
    """One of a few strings: a token may follow if some string begins with the text so far and the token's."""
    constraint = Constraint("regex", "|".join(CHOICES))
    texts = [tokenizer.decode([token], skip_special_tokens=False) for token in range(VOCAB_SIZE)]
    rng, masks = np.random.default_rng(1), TokenMasks(VOCAB_SIZE, CPU)
    for _ in range(40):
        one = opened(pool, constraint)
        output: list[int] = []
        while not one.complete:
            text = tokenizer.decode(output)
            expected = {
                t for t in range(3, VOCAB_SIZE) if texts[t] and any(c.startswith(text + texts[t]) for c in CHOICES)
            }
            if text in CHOICES:
                expected |= {0, 2}
            bits = masks.of([one])
            allowed = np.flatnonzero(masks.unpack(bits)[0].numpy())
            assert set(allowed.tolist()) == expected
            assert allows_only(bits[0], frozenset({0, 2})) == (expected <= {0, 2})
            output.append(int(rng.choice(allowed)))
            follow(pool, one, output)
            assert not one.error
        assert tokenizer.decode([t for t in output if t not in (0, 2)]) in CHOICES


@pytest.mark.parametrize("kind", ["json_schema", "regex", "lark"])
def test_text_that_equals_a_special_token_is_written_as_text(
    engine: EngineUnderTest, tokenizer: Tokenizer, kind: Any
) -> None:
    """Where it is the only text that can come, too."""
    name = tokenizer.decode([2], skip_special_tokens=False)
    text = f"a{name}b{name}"
    written = {
        "json_schema": json.dumps({"const": text}),
        "regex": re.escape(text),
        "lark": f"start: {json.dumps(text)}",
    }
    key = ask(engine, kind, Constraint(kind, written[kind]))
    assert engine.last(key).finish_reason is FinishReason.STOP
    assert text_of(engine, key, tokenizer) == (json.dumps(text) if kind == "json_schema" else text)


def test_bits_are_unpacked_alike_on_every_device() -> None:
    bits = np.random.default_rng(0).integers(-(2**31), 2**31, size=(3, 7), dtype=np.int32)
    masks = TokenMasks(200, CPU)
    on_gpu = unpacked_bits(torch.from_numpy(bits.view(np.uint8)))[:, :200]
    assert torch.equal(masks.unpack(bits), on_gpu)
    for token in (0, 31, 32, 199):
        assert bool(on_gpu[1, token]) == bool(bits[1, token // 32] >> (token % 32) & 1)


def test_stop_tokens_are_not_masked_where_the_grammar_has_nothing_else(pool: MaskPool) -> None:
    sampler = Sampler(1, VOCAB_SIZE, CPU)
    one = make_sequence("a", [5], temperature=0.0, min_tokens=9, constraint=REGEX, eos=frozenset({0, 2}))
    one.guide = opened(pool, Constraint("regex", ""))
    sampler.admit(one, 0)
    assert sampler.sample(torch.randn(1, VOCAB_SIZE), [one])[0][0] in (0, 2)
    assert not sampler.dead_ends


# What goes wrong


@pytest.mark.parametrize(
    ("constraint", "reason"),
    [
        (Constraint("json_schema", '{"type": "nonsense"}'), "nonsense"),
        (Constraint("json_schema", "{"), "json_schema constraint cannot be used"),
        (Constraint("regex", "[a-"), "unclosed"),
        (Constraint("lark", "start: nobody"), "nobody"),
        (Constraint("lark", ""), "cannot be used"),
        (Constraint("regex", "a" * (module.MAX_CHARACTERS + 1)), "characters"),
        (Constraint("regex", r"[^\s\S]"), "held to its constraint"),
    ],
)
def test_a_constraint_that_cannot_be_used_is_refused(
    engine: EngineUnderTest, constraint: Constraint, reason: str
) -> None:
    for name in ("one", "two"):
        last = engine.last(ask(engine, name, constraint))
        assert (last.finish_reason, last.error_code) == (FinishReason.ERROR, "invalid_request")
        assert reason in last.error_message
    assert len(engine.generate("well", PROMPT, max_tokens=5)) == 5


def test_settings_that_leave_no_token_end_the_request_alone(engine: EngineUnderTest) -> None:
    neighbour = engine.submit("n", PROMPT, max_tokens=60)
    key = ask(engine, "a", REGEX, allowed_token_ids=(1,), temperature=0.7, presence_penalty=1.0)
    last = engine.last(key)
    assert last.error_code == "invalid_request"
    assert "no token" in last.error_message
    assert len(engine.tokens(neighbour)) == 60


def test_a_grammar_that_needs_too_much_at_run_time_ends_its_request_alone(engine: EngineUnderTest) -> None:
    rules = "".join(f'r{i}: /[a-z ]/ r{(i + 1) % 400} | /[a-z ]/ r{(i + 2) % 400} | ""\n' for i in range(400))
    neighbour = engine.submit("n", PROMPT, max_tokens=60)
    start = " | ".join(f"r{index}" for index in range(400))
    last = engine.last(ask(engine, "a", Constraint("lark", f"start: {start}\n{rules}")))
    assert last.error_code == "invalid_request"
    assert "Too many items" in last.error_message
    assert len(engine.tokens(neighbour)) == 60


def test_a_first_token_that_the_grammar_forbids_ends_the_request(engine: EngineUnderTest, tokenizer: Tokenizer) -> None:
    (wrong,) = tokenizer.encode("!").ids
    last = engine.last(ask(engine, "a", REGEX, output_token_ids=[wrong]))
    assert last.error_code == "invalid_request"


def test_a_model_without_a_tokenizer_refuses_constraints_only(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "llama")
    (folder / "tokenizer.json").unlink()
    with EngineUnderTest(folder) as engine:
        last = engine.last(ask(engine, "a", REGEX))
        assert last.error_code == "invalid_request"
        assert "tokenizer.json" in last.error_message
        assert len(engine.generate("b", PROMPT, max_tokens=4)) == 4


# Compiling


@pytest.fixture
def pool(folder: Path) -> Iterator[MaskPool]:
    pool = MaskPool(folder / "tokenizer.json", VOCAB_SIZE, (2, 0))
    yield pool
    pool.stop()


def opened(pool: MaskPool, constraint: Constraint) -> Guide:
    guide = pool.guide(constraint, "tenant", [])
    settle(pool, guide)
    return guide


def follow(pool: MaskPool, guide: Guide, output: list[int]) -> None:
    pool.follow(guide, output)
    settle(pool, guide)


def settle(pool: MaskPool, guide: Guide) -> None:
    pool.send()
    while guide.awaited:
        assert pool.receive(TIMEOUT_S)
        pool.send()


class Held:
    """Holds back the process from which mask processes are made."""

    def __init__(self, engine: EngineUnderTest) -> None:
        engine.engine._requests.guided.masks.start()
        origin = engine.engine._requests.guided.masks._origin
        assert origin is not None
        self._pid = origin.pid
        os.kill(self._pid, signal.SIGSTOP)

    def go(self) -> None:
        os.kill(self._pid, signal.SIGCONT)


def test_others_go_on_while_a_grammar_is_compiled(engine: EngineUnderTest) -> None:
    held = Held(engine)
    keys = [ask(engine, f"g{i}", REGEX) for i in range(3)]
    assert len(engine.generate("other", PROMPT, max_tokens=20)) == 20
    assert not any(engine.ended(key) for key in keys)
    held.go()
    outputs = [engine.tokens(key) for key in keys]
    assert outputs[0] == outputs[1] == outputs[2]
    ask_again = ask(engine, "later", REGEX)
    assert engine.tokens(ask_again) == outputs[0]
    assert len(engine.engine._requests.guided.masks.processes) == 1, "once for all of them"


def test_a_request_may_end_while_its_grammar_is_compiled(engine: EngineUnderTest) -> None:
    held = Held(engine)
    cancelled = ask(engine, "cancelled", REGEX)
    late = ask(engine, "late", REGEX, deadline=time.monotonic() + 0.5)
    assert engine.last(late).error_code == "deadline_exceeded"
    engine.engine.cancel(cancelled)
    assert engine.last(cancelled).finish_reason is FinishReason.CANCELLED
    held.go()
    assert engine.tokens(ask(engine, "a", REGEX))


def test_an_engine_that_stops_ends_those_whose_grammar_is_compiled(folder: Path) -> None:
    with EngineUnderTest(folder) as engine:
        Held(engine)
        keys = [ask(engine, name, Constraint("regex", name)) for name in ("a", "b")]
        wait_for(lambda: len(engine.engine._requests.guided) == 2)
        assert engine.engine.stop(20)
        assert [engine.last(key).error_code for key in keys] == ["unavailable"] * 2


def test_guides_of_one_constraint_do_not_share_their_place(folder: Path, pool: MaskPool) -> None:
    guide, other = (opened(pool, Constraint("regex", "ab")) for _ in range(2))
    follow(pool, guide, Tokenizer.from_file(str(folder / "tokenizer.json")).encode("ab").ids)
    assert guide.complete
    assert other.ready


def test_a_submit_carries_its_constraint() -> None:
    for constraint in (JSON, REGEX, LARK):
        submit = worker_pb2.Submit(prompt_token_ids=[1], sampling=SamplingParams(constraint=constraint).to_proto())
        assert request_from_proto(submit).sampling.constraint == constraint


def test_a_prompt_from_the_kv_store_is_constrained_alike(folder: Path, engine: EngineUnderTest) -> None:
    """The store is asked once the grammar is compiled, and at once where it is known."""
    home, options = ScriptedHome(), {"temperature": 0.9, "seed": 6}
    expected = engine.tokens(ask(engine, "plain", JSON, **options))
    with EngineUnderTest(folder, EngineStore(home, chunk_tokens=32)) as first:
        assert first.tokens(ask(first, "saved", JSON, **options)) == expected
    with EngineUnderTest(folder, EngineStore(home, chunk_tokens=32)) as second:
        for name in ("compiled", "known"):
            key = ask(second, name, JSON, cache_salt=b"", **options)
            assert second.tokens(key) == expected
        report = second.outputs[RequestKey("compiled", 0)][0].prompt
        assert report is not None
        assert report.cached_tokens >= 32
        assert report.load_s > 0
