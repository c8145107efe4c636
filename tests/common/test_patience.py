"""A time limit for what others answer, in a loop that may be busy."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest

from tandem.common.patience import Silence, within

LONG_S = 3600.0


async def test_what_comes_in_time_is_returned_and_what_it_raises_is_raised() -> None:
    async def fail() -> None:
        raise KeyError("a")

    assert await within(LONG_S, asyncio.sleep(0, "answer")) == "answer"
    with pytest.raises(KeyError):
        await within(LONG_S, fail())


async def test_what_does_not_come_is_cancelled() -> None:
    ended = asyncio.Event()

    async def wait() -> None:
        try:
            await asyncio.sleep(LONG_S)
        finally:
            ended.set()

    with pytest.raises(TimeoutError):
        await within(0.01, wait())
    assert ended.is_set()


async def test_who_is_cancelled_takes_it_along() -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        begun.set()
        try:
            await asyncio.sleep(LONG_S)
        finally:
            ended.set()

    waiting = asyncio.create_task(within(LONG_S, wait()))
    await begun.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert ended.is_set()


async def test_an_answer_that_came_while_the_loop_was_held_up_is_heard() -> None:
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=ours)

    def hold_up() -> None:
        theirs.sendall(b"answer")
        time.sleep(1.5)  # longer than the limit

    asyncio.get_running_loop().call_soon(hold_up)
    assert await within(1.0, reader.readexactly(6)) == b"answer"
    writer.close()
    theirs.close()


async def test_silence_breaks_what_hears_nothing_for_long_and_once() -> None:
    broken: asyncio.Queue[float] = asyncio.Queue()
    silence = Silence(0.2, lambda: broken.put_nowait(silence.seconds))
    silence.start()
    assert await broken.get() == pytest.approx(0.2)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(broken.get(), 0.1)


async def test_a_word_ends_silence() -> None:
    broken = asyncio.Event()
    silence = Silence(0.2, broken.set)
    silence.start()
    await broken.wait()
    assert silence.seconds
    silence.heard()
    assert silence.seconds == 0.0


async def test_a_loop_that_was_held_up_blames_nobody_else() -> None:
    held_up = asyncio.Event()

    def hold_up() -> None:
        time.sleep(1.5)  # longer than the limit
        held_up.set()

    silence = Silence(1.0, lambda: None)
    silence.start()
    asyncio.get_running_loop().call_soon(hold_up)
    await held_up.wait()
    await asyncio.sleep(0)  # its look, which is late, is over
    assert silence.seconds <= 0.2
    silence.stop()
