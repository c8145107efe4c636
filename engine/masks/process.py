"""The processes that compute which tokens may come next, where a grammar can harm nobody: started by `pool.py`.

The library compiles a grammar without a bound on time or stack, computes a mask for seconds where a grammar is made for
it, keeps the GIL while it reads output, and cannot be interrupted. So it runs here. The process that the engine starts
reads the tokenizer, once, and forks one for each socket that it is sent; those share its memory. Each answers requests
one after another, its work bounded in processor time by SIGPROF, which ends it. Imports little: it starts quickly.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections import OrderedDict
from contextlib import suppress

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from tandem.common.constraint_limits import DEAR_S, MAX_LEXER_STATES, MAX_ROW_ITEMS
from tandem.engine.masks.messages import LENGTH_BYTES, MAX_COMPILED, Close, Follow, Open, Ready, Reply, Request, framed

COMPILE_CPU_S = 4.0
"""Time of one grammar: twice what the router allows, whose processor may be a faster one."""
JOB_CPU_S = 1.0
"""Time of one mask, and of reading the output up to it. A mask of good will takes a millisecond."""
REPLAY_CPU_S = 0.001
"""More for each token of output that is read."""
FREE_S = 0.05
"""A process yields to all others of the machine once its masks took so much more than `DEAR_S` each."""
MEMORY_BYTES = 512 << 20
"""Memory of a process, beside what it shares with the others."""
STACK_BYTES = 8 << 20
"""Compiling recurses. The router's check has a quarter of it, so that what passes there is safe here."""
_LIMITS = LLParserLimits(max_items_in_row=MAX_ROW_ITEMS, max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)

_REQUESTS = msgspec.msgpack.Decoder(list[Request])


class Masks:
    """The guides of one process."""

    def __init__(self, tokenizer: LLTokenizer) -> None:
        self._tokenizer = tokenizer
        self._compiled: OrderedDict[tuple[str, str], LLMatcher] = OrderedDict()
        self._guides: dict[int, tuple[LLMatcher, tuple[str, str]]] = {}
        self._left_s = FREE_S
        """Processor time until this process yields."""

    def answer(self, request: Request) -> Reply | None:
        """The reply to one request; None for `Close`. An error of the library is in the reply, except that a signal may
        end the process."""
        match request:
            case Open(guide, kind, text, tokens):
                try:
                    matcher = self._compile(kind, text)
                except Exception as error:  # the library's own, whatever it is, is about this constraint alone
                    return Reply(guide, 0.0, error=f"the {kind} constraint cannot be used: {in_one_line(str(error))}")
                self._guides[guide] = (matcher, (kind, text))
                return self._next(guide, tokens, opening=True)
            case Follow(guide, tokens):
                return self._next(guide, tokens, opening=False)
            case Close(guide):
                self._guides.pop(guide, None)
                return None

    def _compile(self, kind: str, text: str) -> LLMatcher:
        """Raises whatever the library does."""
        pristine = self._compiled.get((kind, text))
        if pristine is None:
            _limit(COMPILE_CPU_S)
            pristine = LLMatcher(self._tokenizer, grammar(kind, text), log_level=0, limits=_LIMITS)
            if pristine.is_error():
                raise ValueError(pristine.get_error())
            self._compiled[kind, text] = pristine
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end((kind, text))
        return pristine.deep_copy()

    def _next(self, guide: int, tokens: list[int], opening: bool) -> Reply:
        _limit(JOB_CPU_S + REPLAY_CPU_S * len(tokens))
        matcher, constraint = self._guides[guide]
        started = time.thread_time()
        matcher.consume_tokens(tokens)
        complete = not opening and not matcher.is_error() and matcher.is_stopped()
        bits = b"" if complete or matcher.is_error() else matcher.compute_bitmask()
        cost_s = time.thread_time() - started
        if matcher.is_error():
            self._compiled.pop(constraint, None)  # copies share the states that may have become too many
            problem = f"the output cannot be held to its constraint: {in_one_line(matcher.get_error())}"
            return Reply(guide, cost_s, error=problem)
        self._left_s = min(self._left_s + DEAR_S + REPLAY_CPU_S * len(tokens) - cost_s, FREE_S)
        if self._left_s < 0:
            with suppress(OSError):
                os.nice(19)
        return Reply(guide, cost_s, bits=bits, complete=complete)


def grammar(kind: str, text: str) -> str:
    """The constraint in the library's form, and without forcing: it would tokenize text that must come as if it were a
    prompt, so that a text equal to a special token became that token, which does not match."""
    match kind:
        case "json_schema":
            lark = f"start: %json {text}"
        case "regex":
            lark = json.loads(LLMatcher.grammar_from_regex(text))["grammars"][0]["lark_grammar"]
        case _:
            lark = text
    return LLMatcher.grammar_from_lark(f'{lark}\n%llguidance {{"no_forcing": true}}')


def in_one_line(text: str) -> str:
    """The library's messages, which show where in the text something is wrong."""
    return " ".join(text.split())[:200] or "no reason is given"


def serve(requests: socket.socket, masks: Masks) -> None:
    """Until the other side closes."""
    with suppress(ConnectionError, EOFError):
        while True:
            length = int.from_bytes(_exactly(requests, LENGTH_BYTES), "big")
            for request in _REQUESTS.decode(_exactly(requests, length)):
                reply = masks.answer(request)
                _limit(0)
                if reply is not None:
                    requests.sendall(framed(reply))


def _exactly(source: socket.socket, size: int) -> bytes:
    """Raises EOFError where there are fewer."""
    data = bytearray()
    while len(data) < size:
        part = source.recv(size - len(data))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def _limit(cpu_s: float) -> None:
    """SIGPROF ends the process after so much more processor time. 0: nothing does."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)


def _serve_forked(requests: socket.socket, tokenizer: LLTokenizer) -> None:
    """The life of a forked process."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    most = _data_bytes() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=serve, args=(requests, Masks(tokenizer)))
    thread.start()
    thread.join()


def _data_bytes() -> int:
    """Private memory of this process that can be written to."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[5]) * resource.getpagesize()


def main(path: str, vocab_size: str, *eos_ids: str) -> None:
    """Standard input is the socket of the engine. When it closes, this process ends with all that it forked."""
    engine = socket.socket(fileno=0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    try:
        if not os.path.isfile(path):
            raise ValueError("the model folder has no tokenizer.json")
        tokenizer = LLTokenizer(path, n_vocab=int(vocab_size), eos_token=[int(each) for each in eos_ids] or None)
    except BaseException as error:  # a panic of the library is no Exception
        engine.sendall(framed(Ready(in_one_line(str(error)))))
        return
    engine.sendall(framed(Ready(eos_ids=tuple(tokenizer.eos_tokens))))
    gc.freeze()
    while True:
        _, descriptors, _, _ = socket.recv_fds(engine, 1, 1)
        if not descriptors:
            os.killpg(0, signal.SIGKILL)
        with socket.socket(fileno=descriptors[0]) as requests, suppress(OSError):  # the engine sees that it is closed
            if os.fork() == 0:
                engine.close()
                _serve_forked(requests, tokenizer)
                os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
