"""Answers that take long to write: log-probabilities of every token of many prompts. They are written in a thread, in
the turn of their tenant, and count among the memory that it may take."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from tandem.router.calls.generate import Call
from tandem.router.web.body_memory import BodyMemory

MAX_INLINE_ENTRIES = 2000
"""Entries that are still written on the event loop, in a few milliseconds."""
ENTRY_BYTES = 64
IDS_PER_ENTRY = 32

T = TypeVar("T")


async def written(call: Call, memory: BodyMemory, write: Callable[[], T]) -> T:
    """What `write` makes of the call. Raises TandemError `overloaded`."""
    count = entries(call)
    if count <= MAX_INLINE_ENTRIES:
        return write()
    caller = call.choices[0].spec.sequence.caller
    memory.hold(memory.size + count * ENTRY_BYTES, caller.tenant)
    return await call.context.answers.run(caller.line, caller.weight, write)


def entries(call: Call) -> int:
    """How many the answer has, beside its text."""
    count = 0
    for choice in call.choices:
        sampling, prompt_tokens = choice.spec.sequence.sampling, len(choice.spec.sequence.prompt.token_ids)
        if choice.spec.keep_tokens:
            count += prompt_tokens // IDS_PER_ENTRY + choice.num_tokens * (1 + (sampling.logprobs or 0))
        if sampling.prompt_logprobs is not None:
            count += prompt_tokens * (1 + sampling.prompt_logprobs)
    return count
