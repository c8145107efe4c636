"""The process that prepares and checks constraints: the same library that the workers use, where it can harm nobody.

Its compiler can be made to run long, to fill memory or to overflow its stack, which ends the process that it runs in.
So the router keeps it out of its own (`constraint_check.py` starts this one and reads its answers). Imports little, so
that it starts quickly.
"""

from __future__ import annotations

import json
import random
import re
import resource
import signal
import sys
import threading
import time
from functools import lru_cache
from typing import Any, BinaryIO

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from tandem.common.constraint_limits import MASK_S, MAX_LEXER_STATES, MAX_ROW_ITEMS
from tandem.common.memory import limit_address_space
from tandem.router.structured.lark import endless
from tandem.router.structured.prepare import SchemaOptions, prepare

CPU_S = 2.0
"""Processor time of one check in seconds; then the process is ended by SIGPROF. The largest schemas of good will take a
tenth."""
MEMORY_BYTES = 2 << 30
"""Address space that the process may have, in bytes; it has about a quarter of that to begin with."""
STACK_BYTES = 2 << 20
"""A quarter of what threads have elsewhere, so that what passes here is safe in a worker."""
WALKS = 2
WALK_TOKENS = 48
WALK_S = 0.5
"""Processor time of all walks: after it, they end."""
WARM_UP_S = 0.1
"""What the first masks may take of it; the others `MASK_S` each."""
_PLACE = re.compile(r"^at \d+\(\d+\): (?=failed to compile JSON schema)|\n +\d+ \| start: %json.*", re.DOTALL)
_LIMITS = LLParserLimits(max_items_in_row=MAX_ROW_ITEMS, max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)


def answered(question: dict[str, Any]) -> dict[str, Any]:
    """`problem`: empty if it can be used. Of a schema that can: `expression`, `rules` and `ignored` too."""
    try:
        return _used(question)
    except RecursionError:
        return {"problem": "it is nested too deeply"}
    except ValueError as error:
        return {"problem": _in_one_line(str(error))}
    except BaseException as error:  # a panic of the library is no Exception
        return {"problem": f"the compiler fails on it ({type(error).__name__})"}


def _used(question: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError, RecursionError, and what the library does not catch."""
    kind, text, tokenizer = question["kind"], question["text"], question["tokenizer"]
    if kind != "json_schema":
        _, mask_s = _checked(text if kind == "lark" else _regex_as_lark(text), tokenizer)
        return {"problem": "", "mask_s": mask_s}
    prepared = prepare(text, SchemaOptions(**question["options"]), question["prefix"], _pattern_problem)
    warnings, mask_s = _checked("\n".join([f"start: {prepared.expression}", *prepared.rules]), tokenizer)
    coerced = ["oneOf (taken as anyOf)"] if any("oneOf" in warning for warning in warnings) else []
    ignored = [*prepared.ignored, *coerced]
    return {
        "problem": "",
        "expression": prepared.expression,
        "rules": prepared.rules,
        "ignored": ignored,
        "mask_s": mask_s,
    }


def _regex_as_lark(regex: str) -> str:
    lark: str = json.loads(LLMatcher.grammar_from_regex(regex))["grammars"][0]["lark_grammar"]
    return lark


def _checked(lark: str, tokenizer: str) -> tuple[list[str], float]:
    """What the library says of a grammar that can be used, and what a mask takes (s). Raises ValueError where it
    cannot."""
    if endless(lark):
        raise ValueError("no text that ends can match it: its rules need themselves")
    vocabulary = _vocabulary(tokenizer)
    wrong, messages = LLMatcher.validate_grammar_with_warnings(LLMatcher.grammar_from_lark(lark), vocabulary)
    if wrong:
        raise ValueError(messages[0] or "it is malformed")
    return messages, 0.0 if vocabulary is None else _walk(lark, vocabulary)


def _walk(lark: str, vocabulary: LLTokenizer) -> float:
    """Writes output as a model without sense would. Returns the processor time (s) of a mask. Raises ValueError where
    it cannot go on, or takes too long."""
    matcher = LLMatcher(
        vocabulary,
        LLMatcher.grammar_from_lark(f'{lark}\n%llguidance {{"no_forcing": true}}'),
        log_level=0,
        limits=_LIMITS,
    )
    ends = frozenset(vocabulary.eos_tokens)
    costs: list[float] = []
    for seed in range(WALKS):
        draw, one, token = random.Random(seed), matcher.deep_copy(), -1
        for _ in range(WALK_TOKENS):
            started = time.thread_time()
            if token >= 0:
                one.consume_token(token)
            mask = b"" if one.is_error() or one.is_stopped() else one.compute_bitmask()
            costs.append(time.thread_time() - started)
            token = _any_of(mask, draw, ends) if mask else -1
            if one.is_error():
                reason = one.get_error().splitlines()[0]
                raise ValueError(
                    "no text can match it" if reason == "NoExtensionBias" else f"it takes too much: {reason}"
                )
            if token < 0 or sum(costs) > WALK_S:
                break
    if sum(costs) > WARM_UP_S + MASK_S * len(costs):
        raise ValueError(
            f"to find what may come next takes {1000 * sum(costs) / len(costs):.0f} ms a token, the most is "
            f"{1000 * MASK_S:.0f} ms; use fewer rules that match the same text"
        )
    return sum(costs[1:]) / max(len(costs) - 1, 1)


def _any_of(mask: bytes, draw: random.Random, ends: frozenset[int]) -> int:
    """A token that the mask allows; -1 where there is none but an end."""
    start = draw.randrange(len(mask))
    for place in [*range(start, len(mask)), *range(start)]:
        bits = mask[place]
        allowed = [8 * place + bit for bit in range(8) if bits >> bit & 1] if bits else []
        if allowed := [token for token in allowed if token not in ends]:
            chosen: int = draw.choice(allowed)
            return chosen
    return -1


def _pattern_problem(pattern: str) -> str:
    grammar = LLMatcher.grammar_from_json_schema(json.dumps({"type": "string", "pattern": pattern}))
    wrong, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    return _in_one_line(messages[0]) if wrong else ""


@lru_cache(maxsize=2)
def _vocabulary(path: str) -> LLTokenizer | None:
    """None where it cannot be read: then the worker is the first to know what its tokens make of a grammar."""
    try:
        return LLTokenizer(path) if path else None
    except ValueError:
        return None


def _in_one_line(text: str) -> str:
    """The library's message without the place in a grammar that the client has not written."""
    return " ".join(_PLACE.sub("", text).split())[:200] or "it is malformed"


def answer(questions: BinaryIO, answers: BinaryIO) -> None:
    """Answers each question with an empty line when it begins with it and one of JSON, until there are no more."""
    for line in questions:
        question = json.loads(line)
        _vocabulary(question["tokenizer"])  # takes a second where it is large, which is not the question's fault
        answers.write(b"\n")
        answers.flush()
        signal.setitimer(signal.ITIMER_PROF, CPU_S)
        found = answered(question)
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(json.dumps(found).encode() + b"\n")
        answers.flush()


def main() -> None:
    """Answers questions from standard input until it ends, on a thread with a small stack and with bounded memory."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit_address_space(MEMORY_BYTES)
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=answer, args=(sys.stdin.buffer, sys.stdout.buffer))
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
