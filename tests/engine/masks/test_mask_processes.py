"""A grammar that takes long, or takes its process down, harms its own request only; those beside it go on."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from llguidance import LLTokenizer

from tandem.common.errors import TandemError
from tandem.common.sampling import Constraint
from tandem.engine.masks import guide as guide_module
from tandem.engine.masks import pool as pool_module
from tandem.engine.masks import process as process_module
from tandem.engine.masks.guide import Work
from tandem.engine.masks.messages import Frames, Open, Reply, framed
from tandem.engine.masks.pool import MaskPool
from tandem.engine.request import FinishReason
from tandem.engine.step import constraint as waiting
from tandem.worker.process import STALLED_S
from tests.engine.masks.test_constraints import JSON, PROMPT, REGEX, REGEX_LONG, Held, ask, opened, settle
from tests.engine.test_engine_handover import hand_over
from tests.engine_harness import TIMEOUT_S, EngineUnderTest, wait_for
from tests.models import VOCAB_SIZE

RULES = 400
BOMB = Constraint(
    "lark",
    f'start: s\ns: {" | ".join(f"s r{index}" for index in range(RULES))} | "a"\n'
    + "".join(f'r{index}: "a"+ | "b" s | /[a-c]/ s\n' for index in range(RULES)),
)
"""Every rule matches the same text: from the second mask on each takes seconds."""
ALIKE = "".join(f'r{index}: "a" r{index + 1} | "b" r{index + 1}\n' for index in range(8900))
DEEP = Constraint("lark", f'start: r0\n{ALIKE}r8900: "x"')
"""Compiling it overflows the stack of its process."""


@pytest.fixture
def pool(folder: Path) -> Iterator[MaskPool]:
    pool = MaskPool(folder / "tokenizer.json", VOCAB_SIZE, (2, 0))
    yield pool
    pool.stop()


def members(group: int) -> list[int]:
    """The processes of a process group."""
    found = subprocess.run(["ps", "-A", "-o", "pid=,pgid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in found.splitlines()]
    return [int(pid) for pid, of, state in rows if int(of) == group and not state.startswith("Z")]


def group_of(pool: MaskPool) -> int:
    assert pool._origin is not None
    return pool._origin.pid


def forked(pool: MaskPool) -> list[int]:
    return [pid for pid in members(group_of(pool)) if pid != group_of(pool)]


# Beside others


def test_a_mask_that_does_not_come_delays_nobody_else_and_changes_nothing(engine: EngineUnderTest) -> None:
    expected = engine.tokens(ask(engine, "alone", REGEX_LONG))
    free = engine.generate("free alone", PROMPT, max_tokens=200)
    (process,) = forked(engine.engine._requests.guided.masks)
    key = ask(engine, "held", REGEX_LONG)
    engine.wait_tokens(key, 2)
    os.kill(process, signal.SIGSTOP)
    try:
        assert engine.generate("bystander", PROMPT, max_tokens=200) == free
        small = ask(engine, "small", JSON, tenant="another")
        assert engine.last(small).finish_reason is FinishReason.STOP
        assert not engine.ended(key), "its mask is not there"
    finally:
        os.kill(process, signal.SIGCONT)
    assert engine.tokens(key) == expected


def test_answers_are_the_same_where_every_mask_comes_too_late(
    folder: Path, engine: EngineUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("a", "b", "c")
    options = {"temperature": 0.9, "seed": 4}
    expected = [engine.tokens(ask(engine, name, REGEX_LONG, **options)) for name in names]
    monkeypatch.setattr(waiting, "ALONE_WAIT_S", 0.0)
    monkeypatch.setattr(waiting, "SHARE", 0.0)
    monkeypatch.setattr(pool_module, "PROMPT_S", TIMEOUT_S)  # each row is computed before its mask is there
    with EngineUnderTest(folder) as hasty:
        keys = [ask(hasty, name, REGEX_LONG, **options) for name in names]
        beside = hasty.submit("beside", PROMPT, max_tokens=100)
        assert [hasty.tokens(key) for key in keys] == expected
        assert len(hasty.tokens(beside)) == 100


def test_sixteen_of_a_costly_grammar_stop_neither_the_others_nor_the_worker(engine: EngineUnderTest) -> None:
    free = engine.generate("free alone", PROMPT, max_tokens=400)
    small = engine.tokens(ask(engine, "small alone", JSON))
    longest, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            longest.append(engine.engine.stalled_s)

    watchdog = threading.Thread(target=watch)
    watchdog.start()
    bombs = [ask(engine, f"bomb {index}", BOMB, tenant="attacker", temperature=1.0, seed=index) for index in range(16)]
    beside = engine.submit("beside", PROMPT, max_tokens=400, tenant="victim")
    smalls = [ask(engine, f"small {index}", JSON, tenant="victim") for index in range(4)]
    assert engine.tokens(beside) == free
    assert [engine.tokens(key) for key in smalls] == [small] * 4
    refused = [engine.last(key).error_message for key in bombs if engine.last(key).error_code]
    assert {engine.last(key).error_code for key in bombs} <= {"invalid_request", ""}, "some end before they are dear"
    assert refused
    assert all("fewer rules" in message for message in refused)
    done.set()
    watchdog.join()
    assert max(longest) < STALLED_S / 4
    assert engine.tokens(ask(engine, "afterwards", JSON)) == small


def test_a_sequence_has_a_budget_for_its_masks(engine: EngineUnderTest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guide_module, "BUDGET_S", 0.0)
    monkeypatch.setattr(guide_module, "BUDGET_PER_TOKEN_S", 0.0)
    last = engine.last(ask(engine, "a", REGEX))
    assert last.error_code == "invalid_request"
    assert "takes too much work" in last.error_message
    assert "fewer rules" in last.error_message


def test_the_budget_grows_with_the_output() -> None:
    work = Work()
    work.spent_s += guide_module.BUDGET_S
    assert not work.problem
    work.tokens += 100
    work.spent_s += 99 * guide_module.BUDGET_PER_TOKEN_S
    assert not work.problem
    work.spent_s += 2 * guide_module.BUDGET_PER_TOKEN_S
    assert "fewer rules" in work.problem


def test_sequences_of_a_tenant_share_the_budget_of_a_constraint(
    pool: MaskPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = [opened(pool, REGEX) for _ in range(4)]
    other = pool.guide(REGEX, "another", [])
    settle(pool, other)
    for guide in many:
        pool.follow(guide, [70])
    monkeypatch.setattr(guide_module, "BUDGET_S", -1.0)
    settle(pool, many[0])
    assert all(guide.error for guide in many)
    assert "too much work" in many[-1].error
    assert not other.error
    monkeypatch.undo()
    for guide in many:
        pool.close(guide)
    pool.changed.clear()
    del many, guide
    assert opened(pool, REGEX).ready


# Ends of output


@pytest.mark.parametrize("disaggregated", [False, True])
def test_a_complete_output_is_told_from_one_that_is_cut(
    folder: Path, engine: EngineUnderTest, disaggregated: bool
) -> None:
    constraint = Constraint("regex", "abc")
    size = len(engine.tokens(ask(engine, "free", constraint)))
    with EngineUnderTest(folder) as prefill:
        for limit in range(1, size + 1):
            if disaggregated:
                key, _, _ = hand_over(prefill, engine, f"{limit}", PROMPT, constraint=constraint, max_tokens=limit)
            else:
                key = ask(engine, f"{limit}", constraint, max_tokens=limit)
            assert len(engine.tokens(key)) == limit
            wanted = FinishReason.STOP if limit == size else FinishReason.LENGTH
            assert engine.last(key).finish_reason is wanted


def test_without_output_it_ends(engine: EngineUnderTest) -> None:
    assert engine.last(ask(engine, "none", REGEX, max_tokens=0)).finish_reason is FinishReason.LENGTH


# Processes


def test_a_killed_process_costs_nothing_but_time(engine: EngineUnderTest) -> None:
    expected = engine.tokens(ask(engine, "alone", REGEX_LONG))
    keys = [ask(engine, f"{index}", REGEX_LONG) for index in range(3)]
    engine.wait_tokens(keys[0], 3)
    for pid in forked(engine.engine._requests.guided.masks):
        os.kill(pid, signal.SIGKILL)
    assert [engine.tokens(key) for key in keys] == [expected] * 3


def test_the_process_that_makes_the_others_is_made_again(engine: EngineUnderTest) -> None:
    expected = engine.tokens(ask(engine, "first", REGEX))
    os.kill(group_of(engine.engine._requests.guided.masks), signal.SIGKILL)
    assert engine.tokens(ask(engine, "known", REGEX)) == expected
    for index in range(3):
        assert engine.tokens(ask(engine, f"new {index}", Constraint("regex", f"{index}{REGEX.text}")))


def test_what_takes_processes_down_ends_alone_and_is_remembered(pool: MaskPool) -> None:
    good = opened(pool, REGEX)
    os.kill(group_of(pool), signal.SIGSTOP)  # nothing answers for the others before it is let go
    many = [pool.guide(REGEX_LONG, "tenant", []) for _ in range(8)]
    for _ in range(pool_module.MAX_DEATHS):
        pool._homes[many[-1].number].connection.shutdown(socket.SHUT_RDWR)
        pool.send()
    assert {guide.error_code for guide in many if guide.error} == {"invalid_request"}
    assert all("smaller" in guide.error for guide in many), "eight of them cost no more than three processes"
    os.kill(group_of(pool), signal.SIGCONT)
    with pytest.raises(TandemError, match="takes too long"):
        pool.guide(REGEX_LONG, "tenant", [])
    assert opened(pool, REGEX).ready
    assert good.ready
    other = pool.guide(REGEX_LONG, "another", [])
    settle(pool, other)
    assert other.ready


def test_compiling_is_bounded_here_too(engine: EngineUnderTest) -> None:
    beside = engine.submit("beside", PROMPT, max_tokens=100)
    for name in ("first", "again"):
        last = engine.last(ask(engine, name, DEEP))
        assert last.error_code == "invalid_request", last
        assert "nested too deeply" in last.error_message
    assert len(engine.tokens(beside)) == 100
    assert engine.tokens(ask(engine, "well", REGEX))


def test_constraints_of_a_tenant_share_processes_and_leave_room_for_others(
    pool: MaskPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "MAX_OF_TENANT", 2)
    monkeypatch.setattr(pool_module, "MAX_PROCESSES", 3)
    many = [pool.guide(Constraint("regex", f"a{index}"), "many", []) for index in range(6)]
    other = pool.guide(REGEX, "other", [])
    for guide in (*many, other):
        settle(pool, guide)
        assert guide.ready
    homes = [pool._homes[guide.number] for guide in many]
    assert len(set(map(id, homes))) == 2
    assert pool._homes[other.number] not in homes
    for guide in many:
        pool.close(guide)
    settle(pool, pool.guide(JSON, "third", []))
    assert len(pool.processes) == 3, "an idle one made room"


def test_a_process_that_never_answers_is_given_up(pool: MaskPool, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = opened(pool, REGEX)
    os.kill(forked(pool)[0], signal.SIGSTOP)
    pool.follow(guide, [])
    settle(pool, guide)
    again = pool.guide(REGEX, "tenant", [])
    pool.send()
    assert pool.next_due() is not None
    pool.expire(time.monotonic() + pool_module.PATIENCE_S + 1)
    settle(pool, again)
    assert again.ready, "in another process"


@pytest.fixture
def never_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Reading the tokenizer takes for ever, until it is undone: the process lives and says nothing."""
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nexec sleep 1000\n")
    script.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(script))
    return monkeypatch


def give_up_loading(pool: MaskPool) -> None:
    due = pool.next_due()
    assert due is not None
    pool.expire(due - 1)
    assert pool._control is not None, "not yet"
    pool.expire(due + 1)


def test_a_process_that_hangs_while_it_loads_is_started_again_and_nobody_is_blamed(
    pool: MaskPool, never_ready: pytest.MonkeyPatch
) -> None:
    waiting = [pool.guide(constraint, "tenant", []) for constraint in (REGEX, JSON)]
    hung = group_of(pool)
    pool.send()
    never_ready.undo()
    give_up_loading(pool)
    for guide in waiting:
        settle(pool, guide)
        assert guide.ready
        assert not guide.strikes
    assert not members(hung)


def test_where_loading_always_hangs_constraints_are_refused_and_tried_again_later(
    pool: MaskPool, never_ready: pytest.MonkeyPatch
) -> None:
    guide = pool.guide(REGEX, "tenant", [])
    for _ in range(pool_module.MAX_FAILED_STARTS):
        assert guide.awaited
        give_up_loading(pool)
        while guide.awaited and pool._control is None:
            assert pool.receive(TIMEOUT_S)
    assert guide.error_code == "unavailable"
    assert "does not start" in guide.error
    with pytest.raises(TandemError, match="does not start") as refused:
        pool.guide(REGEX, "tenant", [])
    assert refused.value.retry_after_s is not None
    assert pool.next_due() is None
    never_ready.undo()
    never_ready.setattr(pool_module, "FORGIVEN_S", 0.0)
    assert opened(pool, REGEX).ready


@pytest.mark.usefixtures("never_ready")
def test_requests_without_end_do_not_block_while_it_loads(pool: MaskPool) -> None:
    def ask_without_end() -> None:
        for index in range(10_000):
            pool.close(pool.guide(Constraint("regex", f"{index}"), "tenant", []))

    with pytest.raises(TandemError, match="no process can be started"):
        ask_without_end()


def test_where_no_process_can_be_had_constraints_alone_are_refused(
    engine: EngineUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*arguments: object, **options: object) -> None:
        raise OSError("too many open files")

    beside = engine.submit("beside", PROMPT, max_tokens=100)
    monkeypatch.setattr(socket, "socketpair", none_left)
    assert engine.last(ask(engine, "a", REGEX)).error_code == "unavailable"
    monkeypatch.undo()
    assert len(engine.tokens(beside)) == 100
    assert engine.tokens(ask(engine, "b", REGEX))


def test_work_of_sequences_that_are_gone_is_charged(pool: MaskPool, monkeypatch: pytest.MonkeyPatch) -> None:
    process = pool._homes[opened(pool, REGEX).number]
    for guide in list(process.guides.values()):
        pool.close(guide)
    gone = [pool.guide(REGEX, "tenant", []) for _ in range(5)]
    for guide in gone:
        pool.close(guide)
    monkeypatch.setattr(guide_module, "BUDGET_S", -1.0)
    pool.send()
    assert pool.receive(TIMEOUT_S)
    assert process not in pool.processes, "what they still wait for is not computed"
    assert not any(guide in pool.changed for guide in gone)


def test_no_process_outlives_its_engine(folder: Path) -> None:
    with EngineUnderTest(folder) as engine:
        assert engine.tokens(ask(engine, "a", REGEX))
        group = group_of(engine.engine._requests.guided.masks)
        assert len(members(group)) == 2
    wait_for(lambda: not members(group))


def test_no_process_outlives_a_worker_that_is_killed(folder: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom tandem.common.sampling import Constraint\n"
        "from tandem.engine.masks.pool import MaskPool\n"
        f"pool = MaskPool(Path({str(folder / 'tokenizer.json')!r}), {VOCAB_SIZE}, (2, 0))\n"
        "guide = pool.guide(Constraint('regex', 'a+'), 'tenant', [])\npool.send()\n"
        "while guide.awaited:\n    pool.receive(9)\nprint(pool._origin.pid, flush=True)\ntime.sleep(600)\n"
    )
    worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    group = int(worker.stdout.readline())
    assert len(members(group)) == 2
    worker.kill()
    worker.wait()
    worker.stdout.close()
    wait_for(lambda: not members(group))


def test_an_answer_that_nobody_waits_for_is_dropped(engine: EngineUnderTest) -> None:
    held = Held(engine)
    keys = [ask(engine, f"{index}", REGEX) for index in range(5)]
    wait_for(lambda: len(engine.engine._requests.guided) == 5)
    for key in keys[:4]:
        engine.engine.cancel(key)
    held.go()
    assert engine.tokens(keys[4])


def test_frames_are_cut_wherever_the_stream_is() -> None:
    bodies = [Reply(index, 0.0, bits=bytes(index)) for index in (0, 1, 300, 70_000)]
    stream = b"".join(framed(body) for body in bodies)
    for size in (1, 3, 4, 1000, len(stream)):
        frames = Frames()
        parts = [stream[start : start + size] for start in range(0, len(stream), size)]
        found = [body for part in parts for body in frames.add(part)]
        assert [framed(each) for each in map(_decoded, found)] == [framed(body) for body in bodies]
    with pytest.raises(ValueError, match="a frame of"):
        Frames().add(b"\xff\xff\xff\xff")


def _decoded(body: bytes) -> Reply:
    return msgspec.msgpack.decode(body, type=Reply)


def test_a_mask_is_not_awaited_within_a_step_where_many_come_before_it(
    pool: MaskPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = [opened(pool, REGEX) for _ in range(6)]
    for guide in many:
        guide.last_s = pool_module.PROMPT_S / 3
    for guide in many:
        pool.follow(guide, [70])
    assert [guide.prompt for guide in many] == [True] * 3 + [False] * 3
    for guide in many:
        settle(pool, guide)
        pool.close(guide)


def test_who_comes_ends_the_wait_for_masks_of_a_step(engine: EngineUnderTest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of nobody but rows without a mask would wait as long as it may."""
    monkeypatch.setattr(waiting, "ALONE_WAIT_S", 10 * TIMEOUT_S)
    monkeypatch.setattr(pool_module, "PROMPT_S", TIMEOUT_S)
    key = ask(engine, "a", REGEX_LONG)
    engine.wait_tokens(key, 1)
    (process,) = forked(engine.engine._requests.guided.masks)
    os.kill(process, signal.SIGSTOP)
    try:
        assert len(engine.tokens(engine.submit("newcomer", PROMPT, max_tokens=3))) == 3
    finally:
        os.kill(process, signal.SIGCONT)
    engine.last(key)


@pytest.mark.parametrize("free_s", [-1.0, float("inf")])
def test_a_process_of_dear_masks_yields(folder: Path, monkeypatch: pytest.MonkeyPatch, free_s: float) -> None:
    monkeypatch.setattr(process_module, "FREE_S", free_s)
    yielded: list[int] = []
    monkeypatch.setattr(process_module.os, "nice", yielded.append)
    monkeypatch.setattr(process_module, "_limit", lambda cpu_s: None)
    masks = process_module.Masks(LLTokenizer(str(folder / "tokenizer.json"), n_vocab=VOCAB_SIZE))
    reply = masks.answer(Open(1, REGEX.kind, REGEX.text, []))
    assert reply is not None
    assert reply.bits
    assert yielded == ([19] if free_s < 0 else [])
