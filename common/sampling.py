"""How the next token is chosen: the one definition that router and engine share, its bounds, and its wire form.

The router checks what clients send, and the worker checks it again: nothing that reaches the sampler was believed.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from tandem.common.errors import TandemError
from tandem.proto import worker_pb2

MAX_TEMPERATURE = 2.0
MIN_REPETITION_PENALTY = 0.01
"""Logits are divided by it; close to 0 they would overflow."""
MAX_REPETITION_PENALTY = 10.0
MAX_PENALTY = 2.0
"""Largest presence and frequency penalty; the smallest is its negative."""
MAX_BIAS = 100.0
MAX_TOP_K = 2**31 - 1
MAX_LOGPROBS = 20
MAX_LISTED_TOKENS = 4096
"""Entries of `stop_token_ids` and `logit_bias`, and tokens of all `bad_words` together."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """What the output must match, enforced by token masks on the worker."""

    kind: Literal["json_schema", "regex", "lark"]
    text: str
    """A JSON schema as JSON, a regular expression of the whole output, or a grammar in llguidance's Lark dialect."""

    def to_proto(self) -> worker_pb2.Constraint:
        """The protobuf form, which `from_proto` reads."""
        match self.kind:
            case "json_schema":
                return worker_pb2.Constraint(json_schema=self.text)
            case "regex":
                return worker_pb2.Constraint(regex=self.text)
            case "lark":
                return worker_pb2.Constraint(lark=self.text)

    @classmethod
    def from_proto(cls, message: worker_pb2.Constraint) -> Constraint | None:
        """The constraint in a message; None where none of its kinds is set. The text is not checked here."""
        match message.WhichOneof("kind"):
            case "json_schema":
                return cls("json_schema", message.json_schema)
            case "regex":
                return cls("regex", message.regex)
            case "lark":
                return cls("lark", message.lark)
            case _:
                return None


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Defaults: those of OpenAI's completions, with no filter on. `check` says what is possible."""

    max_tokens: int = 16
    """Output tokens at most."""
    min_tokens: int = 0
    """Until then end-of-sequence and stop tokens cannot be chosen."""
    temperature: float = 1.0
    """0: greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0: off."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Penalty on tokens of prompt and output, as in CTRL and transformers. 1: none."""
    presence_penalty: float = 0.0
    """Penalty on tokens of the output, as OpenAI defines it. 0: none."""
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] = ()
    """Empty: all."""
    seed: int | None = None
    """None: the worker draws one. The same seed gives the same output whatever batch it runs in."""
    logprobs: int | None = None
    """Alternatives per output token; 0: only the chosen token's; None: off. At most 20."""
    prompt_logprobs: int | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Sequences of tokens that the output must not hold: the last of one cannot be chosen after the others."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    constraint: Constraint | None = None

    def check(self, vocab_size: int) -> None:
        """Raises TandemError `invalid_request` naming the first field that is out of range, and for tokens that are
        not in the vocabulary."""
        self.check_ranges()
        for name, ids in (
            ("logit_bias", self.logit_bias),
            ("allowed_token_ids", self.allowed_token_ids),
            ("stop_token_ids", self.stop_token_ids),
            ("bad_words", [token for word in self.bad_words for token in word]),
        ):
            check_ids(name, ids, vocab_size)

    def check_ranges(self) -> None:
        """The part of `check` that needs no vocabulary. Comparisons with NaN are false."""
        ranges: tuple[tuple[str, float, float, float], ...] = (
            ("min_tokens", self.min_tokens, 0, self.max_tokens),
            ("temperature", self.temperature, 0, MAX_TEMPERATURE),
            ("top_k", self.top_k, 0, MAX_TOP_K),
            ("min_p", self.min_p, 0, 1),
            ("repetition_penalty", self.repetition_penalty, MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY),
            ("presence_penalty", self.presence_penalty, -MAX_PENALTY, MAX_PENALTY),
            ("frequency_penalty", self.frequency_penalty, -MAX_PENALTY, MAX_PENALTY),
            ("logprobs", self.logprobs or 0, 0, MAX_LOGPROBS),
            ("prompt_logprobs", self.prompt_logprobs or 0, 0, MAX_LOGPROBS),
            ("seed", self.seed or 0, 0, 2**64 - 1),
        )
        for name, value, low, high in ranges:
            if not low <= value <= high:
                raise _invalid(name, f"must be between {low:g} and {high:g}, got {value:g}")
        if not 0.0 < self.top_p <= 1.0:
            raise _invalid("top_p", f"must be above 0 and at most 1, got {self.top_p:g}")
        if not all(-MAX_BIAS <= value <= MAX_BIAS for value in self.logit_bias.values()):
            raise _invalid("logit_bias", f"must hold values between {-MAX_BIAS:g} and {MAX_BIAS:g}")
        for name, count in (
            ("logit_bias", len(self.logit_bias)),
            ("stop_token_ids", len(self.stop_token_ids)),
            ("bad_words", sum(map(len, self.bad_words))),
        ):
            if count > MAX_LISTED_TOKENS:
                raise _invalid(name, f"may hold at most {MAX_LISTED_TOKENS} tokens, got {count}")
        if not all(self.bad_words):
            raise _invalid("bad_words", "must not hold a word without tokens")

    def check_leaves_a_token(self, stop_ids: Collection[int], vocab_size: int) -> None:
        """Raises TandemError `invalid_request` where the settings forbid every token that could come first. `stop_ids`:
        what ends the output, the model's own tokens included where they are known."""
        forbidden = {word[0] for word in self.bad_words if len(word) == 1}
        if self.min_tokens and not self.only_stops(stop_ids):
            forbidden.update(stop_ids)
        allowed = set(self.allowed_token_ids) if forbidden else set()
        if not allowed <= forbidden if allowed else len(forbidden) < vocab_size:
            return
        stops = self.min_tokens and not forbidden.isdisjoint(stop_ids)
        name = "stop_token_ids" if stops and self.stop_token_ids else "bad_words"
        masking = "bad_words and, until min_tokens is reached, stop tokens" if stops else "bad_words"
        raise _invalid(name, f"cannot be met: {masking} leave no {'allowed ' if allowed else ''}token to choose")

    def only_stops(self, stop_ids: Collection[int]) -> bool:
        """Whether all allowed tokens end the output: `min_tokens` has no effect then."""
        return bool(self.allowed_token_ids) and set(stop_ids).issuperset(self.allowed_token_ids)

    def to_proto(self) -> worker_pb2.SamplingParams:
        """The protobuf form, which `from_proto` reads."""
        return worker_pb2.SamplingParams(
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
            allowed_token_ids=self.allowed_token_ids,
            seed=self.seed,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
            bad_words=[worker_pb2.TokenIds(ids=word) for word in self.bad_words],
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            constraint=None if self.constraint is None else self.constraint.to_proto(),
        )

    @classmethod
    def from_proto(cls, message: worker_pb2.SamplingParams) -> SamplingParams:
        """The parameters in a message. Their ranges are not checked here."""
        return cls(
            max_tokens=message.max_tokens,
            min_tokens=message.min_tokens,
            temperature=message.temperature,
            top_p=message.top_p,
            top_k=message.top_k,
            min_p=message.min_p,
            repetition_penalty=message.repetition_penalty,
            presence_penalty=message.presence_penalty,
            frequency_penalty=message.frequency_penalty,
            logit_bias=dict(message.logit_bias),
            allowed_token_ids=tuple(message.allowed_token_ids),
            seed=message.seed if message.HasField("seed") else None,
            logprobs=message.logprobs if message.HasField("logprobs") else None,
            prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
            bad_words=tuple(tuple(word.ids) for word in message.bad_words),
            stop_token_ids=tuple(message.stop_token_ids),
            ignore_eos=message.ignore_eos,
            constraint=Constraint.from_proto(message.constraint),
        )


def check_ids(name: str, ids: Collection[int], vocab_size: int) -> None:
    """Raises TandemError naming the field `name`."""
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        raise _invalid(name, f"holds a token that is not in the vocabulary: token ids are 0 to {vocab_size - 1}")


def _invalid(name: str, problem: str) -> TandemError:
    return TandemError("invalid_request", f"{name} {problem}", param=name)
