"""How routers on one machine answer for each other: whichever of them a client reaches, it sees them all.

Each router listens on a unix socket in a folder that only this user can enter. A question is one JSON line, the answer
is JSON and ends with the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

log = logging.getLogger(__name__)

ANSWER_S = 2.0
"""A sibling that takes longer is left out: it may just be starting or ending."""
MAX_QUESTION_BYTES = 64 * 1024
MAX_ANSWER_BYTES = 64 * 1024 * 1024

Answer = Callable[[dict[str, Any]], Any]


class Siblings:
    """`start`, `ask`, `close`. With `count` 1 there is nobody to ask and nothing to start."""

    def __init__(self, folder: Path | None = None, index: int = 0, count: int = 1) -> None:
        self.index = index
        self.count = count
        self._folder = folder
        self._answers: dict[str, Answer] = {}
        self._server: asyncio.Server | None = None

    def on(self, topic: str, answer: Answer) -> None:
        """`answer` gets the question's fields and returns a JSON value. Called on the event loop; must not block."""
        self._answers[topic] = answer

    async def start(self) -> None:
        """Listens for questions, if there are other routers. Raises OSError where the socket cannot be bound."""
        if self._folder is not None and self.count > 1:
            path = self._path(self.index)
            path.unlink(missing_ok=True)  # of this router's former life
            self._server = await asyncio.start_unix_server(self._serve, path, limit=MAX_QUESTION_BYTES)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()

    async def ask(self, topic: str, **fields: Any) -> dict[int, Any]:
        """Answers by router; those that do not answer in time are missing."""
        others = [index for index in range(self.count) if index != self.index]
        question = msgspec.json.encode({**fields, "topic": topic}) + b"\n"
        answers = await asyncio.gather(*(self._ask(index, question) for index in others))
        return {index: answer[0] for index, answer in zip(others, answers, strict=True) if answer}

    def _path(self, index: int) -> Path:
        assert self._folder is not None
        return self._folder / f"router-{index}.sock"

    async def _ask(self, index: int, question: bytes) -> tuple[Any] | None:
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(ANSWER_S):
                reader, writer = await asyncio.open_unix_connection(self._path(index), limit=MAX_ANSWER_BYTES)
                writer.write(question)
                await writer.drain()
                return (msgspec.json.decode(await reader.read(MAX_ANSWER_BYTES)),)
        except (OSError, TimeoutError, msgspec.DecodeError) as error:
            log.info("router %d does not answer (%s)", index, type(error).__name__)
            return None
        finally:
            if writer is not None:
                writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(ANSWER_S):
                question = msgspec.json.decode(await reader.readline(), type=dict[str, Any])
                answer = self._answers[question.pop("topic")](question)
                writer.write(msgspec.json.encode(answer))
                await writer.drain()
        except (OSError, TimeoutError, ValueError, KeyError) as error:
            log.warning("a router's question could not be answered (%r)", error)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
