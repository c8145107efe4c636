"""Output that has to match a JSON schema, a regular expression or a grammar: masks of the tokens that may come next.

The automaton is llguidance's. A `Constraint` is compiled once on a thread of its own, because a large schema takes
100 ms, and kept; each sequence then has a `Guide`, a cheap copy that follows its output. The guide reads the output
from the sequence before it says what may follow, so it need not be told of preemptions, hand-overs or output that
another worker began.
"""

from __future__ import annotations

import json
import logging
import os
from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par
from torch import Tensor

from tandem.common.constraint_limits import MAX_LEXER_STATES, MAX_ROW_ITEMS
from tandem.common.errors import TandemError
from tandem.common.sampling import Constraint
from tandem.engine.store.threads import Workers

logger = logging.getLogger(__name__)

MAX_CHARACTERS = 256 * 1024
"""Of a schema, expression or grammar."""
MAX_COMPILED = 64
"""Compiled constraints that are kept: those last used."""
MAX_QUEUED = 1024
COMPILE_STOP_S = 2.0
_LIMITS = LLParserLimits(max_items_in_row=MAX_ROW_ITEMS, max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
"""The limits on the work of one step, 20 ms at most, are the library's own."""
_THREADS = min((os.cpu_count() or 1) // 4, 8)

Bits = npt.NDArray[np.int32]


class Guide:
    """What may follow the output of one sequence. Engine thread only."""

    def __init__(self, matcher: LLMatcher, eos_ids: frozenset[int]) -> None:
        self.matcher = matcher
        self.error = ""
        """Why the output cannot go on: the grammar needs too much work or room, or leaves no token."""
        self._eos_ids = eos_ids
        self._followed = 0

    def follow(self, tokens: list[int], num_prompt: int) -> None:
        """Reads what is new in the output, `tokens[num_prompt:]`."""
        new = tokens[num_prompt + self._followed :]
        if new and not self.error:
            self._followed += len(new)
            self.matcher.consume_tokens(new)
            self.check()

    def check(self) -> None:
        if not self.error and self.matcher.is_error():
            self.error = f"the output cannot be held to its constraint: {_in_one_line(self.matcher.get_error())}"

    @property
    def complete(self) -> bool:
        """Nothing but an end can follow."""
        return not self.error and self.matcher.is_stopped()

    def ends_with(self, token: int) -> bool:
        """Whether `token` is the model's way to end, whatever the request says of it."""
        return token in self._eos_ids


class Constraints:
    """The constraints of one engine. Engine thread only, but for the compiling."""

    def __init__(
        self, tokenizer: Path, vocab_size: int, eos_ids: Seq[int], post: Callable[[Callable[[], None]], None]
    ) -> None:
        """Reads `tokenizer` (a tokenizer.json), which takes a second for a large vocabulary. Where it cannot be read,
        constraints are refused. `vocab_size` is that of the logits; `post` hands a call to the engine thread."""
        self._post = post
        self._tokenizer: LLTokenizer | None = None
        self._eos_ids: frozenset[int] = frozenset()
        self._unavailable = ""
        self._compiled: OrderedDict[Constraint, LLMatcher] = OrderedDict()
        self._awaited: dict[Constraint, list[Callable[[Guide | TandemError], None]]] = {}
        self._compiler = Workers("constraints", 1, MAX_QUEUED)
        try:
            if not tokenizer.is_file():
                raise ValueError("the model folder has no tokenizer.json")
            self._tokenizer = LLTokenizer(str(tokenizer), n_vocab=vocab_size, eos_token=list(eos_ids) or None)
            self._eos_ids = frozenset(self._tokenizer.eos_tokens)
        except ValueError as error:
            self._unavailable = _in_one_line(str(error))
            logger.warning("%s: requests with a constraint are refused: %s", tokenizer, error)

    def guide(self, constraint: Constraint) -> Guide | None:
        """None: it has to be compiled first. Raises TandemError `invalid_request` for what cannot be served."""
        if self._tokenizer is None:
            raise TandemError("invalid_request", f"this model cannot be constrained: {self._unavailable}")
        if len(constraint.text) > MAX_CHARACTERS:
            raise TandemError(
                "invalid_request",
                f"the constraint has {len(constraint.text)} characters, the most is {MAX_CHARACTERS}",
            )
        pristine = self._compiled.get(constraint)
        if pristine is None:
            return None
        self._compiled.move_to_end(constraint)
        return Guide(pristine.deep_copy(), self._eos_ids)

    def compile(self, constraint: Constraint, done: Callable[[Guide | TandemError], None]) -> None:
        """`done` is called on the engine thread. The same constraint is compiled once for all who wait for it."""
        if (waiting := self._awaited.get(constraint)) is not None:
            waiting.append(done)
            return
        self._awaited[constraint] = [done]
        if not self._compiler.put(_Compilation(self._compile, constraint)):
            error = TandemError("overloaded", "too many constraints wait to be compiled", retry_after_s=1.0)
            self._post(partial(self._answer, constraint, error))

    def close(self) -> bool:
        """False: a grammar is still being compiled; its thread is left behind."""
        return self._compiler.stop(COMPILE_STOP_S)

    def _compile(self, constraint: Constraint) -> None:
        """On the compiler's thread."""
        result: LLMatcher | TandemError
        try:
            if self._tokenizer is None:
                raise ValueError(self._unavailable)
            result = LLMatcher(self._tokenizer, _grammar(constraint), log_level=0, limits=_LIMITS)
            if result.is_error():
                raise ValueError(result.get_error())
        except Exception as error:  # the library's own, whatever it is, is about this constraint alone
            reason = _in_one_line(str(error))
            result = TandemError("invalid_request", f"the {constraint.kind} constraint cannot be used: {reason}")
        self._post(partial(self._answer, constraint, result))

    def _answer(self, constraint: Constraint, result: LLMatcher | TandemError) -> None:
        if not isinstance(result, TandemError):
            self._compiled[constraint] = result
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        for done in self._awaited.pop(constraint):
            done(result if isinstance(result, TandemError) else Guide(result.deep_copy(), self._eos_ids))


class _Compilation:
    """A job. When the engine stops, those who wait for it are ended by the engine."""

    def __init__(self, compile_it: Callable[[Constraint], None], constraint: Constraint) -> None:
        self._compile = compile_it
        self._constraint = constraint

    def run(self) -> None:
        self._compile(self._constraint)

    def drop(self) -> None: ...


class TokenMasks:
    """Masks for the rows of a step. Engine thread only."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._executor: LLExecutor | None = None

    def compute(self, guides: Seq[Guide]) -> Bits:
        """int32 [len(guides), ceil(vocab_size / 32)]: bit t % 32 of word t // 32 says that token t may follow. A
        millisecond each for a large vocabulary; several are made in parallel where there are processors to spare."""
        bits = np.zeros((len(guides), -(-self._vocab_size // 32)), dtype=np.int32)
        if len(guides) > 1 and _THREADS > 1:
            self._executor = self._executor or LLExecutor(num_threads=_THREADS)
            fill_next_token_bitmask_par(self._executor, [(g.matcher, i) for i, g in enumerate(guides)], bits)
        else:
            for index, guide in enumerate(guides):
                fill_next_token_bitmask(guide.matcher, bits, index)
        for guide in guides:
            guide.check()
        return bits

    def unpack(self, bits: Bits) -> Tensor:
        """bool [rows, vocab_size] on the device."""
        if self._device.type == "cpu":
            rows = np.unpackbits(bits.view(np.uint8), axis=1, count=self._vocab_size, bitorder="little")
            return torch.from_numpy(rows.view(np.bool_))
        packed = torch.from_numpy(bits.view(np.uint8)).to(self._device, non_blocking=True)
        return unpacked_bits(packed)[:, : self._vocab_size]


def unpacked_bits(packed: Tensor) -> Tensor:
    """bool [rows, 8 * bytes] of uint8 [rows, bytes], the lowest bit first."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return packed.unsqueeze(-1).bitwise_right_shift(places).bitwise_and_(1).view(len(packed), -1).bool()


def allows_only(row: Bits, tokens: frozenset[int]) -> bool:
    """Whether the mask [words] has no other token than `tokens`."""
    rest = row.copy().view(np.uint32)
    for token in tokens:
        rest[token // 32] &= ~np.uint32(1 << token % 32)
    return not rest.any()


def _grammar(constraint: Constraint) -> str:
    """In the library's form, and without forcing: it would tokenize text that must come as if it were a prompt, so
    that a text equal to a special token became that token, which does not match."""
    match constraint.kind:
        case "json_schema":
            lark = f"start: %json {constraint.text}"
        case "regex":
            lark = json.loads(LLMatcher.grammar_from_regex(constraint.text))["grammars"][0]["lark_grammar"]
        case "lark":
            lark = constraint.text
    return LLMatcher.grammar_from_lark(f'{lark}\n%llguidance {{"no_forcing": true}}')


def _in_one_line(text: str) -> str:
    """Of the library's messages, which show where in the text something is wrong."""
    return " ".join(text.split())[:200] or "no reason is given"
