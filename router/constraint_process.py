"""The process that checks constraints: the same library that the workers use, where it can harm nobody.

Its compiler can be made to run long, to fill memory or to overflow its stack, which ends the process that it runs in.
So the router keeps it out of its own (`constraint_check.py` starts this one and reads its answers). Imports little, so
that it starts quickly.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import threading
from typing import BinaryIO

from llguidance import LLMatcher

CPU_S = 2.0
"""Of one check; then the process is ended by SIGPROF. The largest schemas of good will take a tenth."""
MEMORY_BYTES = 2 << 30
"""Of address space; the process itself has about a quarter of it."""
STACK_BYTES = 2 << 20
"""A quarter of what threads have elsewhere, so that what passes here is safe in a worker."""


def problem(kind: str, text: str) -> str:
    """Empty if it can be used. Tokens named by id are left to the worker, which knows the vocabulary."""
    try:
        match kind:
            case "json_schema":
                grammar = LLMatcher.grammar_from_json_schema(text)
            case "regex":
                grammar = LLMatcher.grammar_from_regex(text)
            case _:
                grammar = LLMatcher.grammar_from_lark(text)
        wrong, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    except ValueError as error:
        return str(error)[:200]
    except BaseException as error:  # a panic of the library is no Exception
        return f"the compiler fails on it ({type(error).__name__})"
    return " ".join(messages[0].split())[:200] or "it is malformed" if wrong else ""


def answer(questions: BinaryIO, answers: BinaryIO) -> None:
    """One line of JSON for each, until there are no more."""
    for line in questions:
        kind, text = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, CPU_S)
        found = problem(kind, text)
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(json.dumps(found).encode() + b"\n")
        answers.flush()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=answer, args=(sys.stdin.buffer, sys.stdout.buffer))
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
