"""How the next token is chosen: the one definition that router and engine share, and its wire form."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tandem.proto import worker_pb2


@dataclass(frozen=True, slots=True)
class Constraint:
    """What the output must match, enforced by token masks on the worker."""

    kind: Literal["json_schema", "regex", "lark"]
    text: str
    """A JSON schema as JSON, a regular expression of the whole output, or a grammar in llguidance's Lark dialect."""

    def to_proto(self) -> worker_pb2.Constraint:
        match self.kind:
            case "json_schema":
                return worker_pb2.Constraint(json_schema=self.text)
            case "regex":
                return worker_pb2.Constraint(regex=self.text)
            case "lark":
                return worker_pb2.Constraint(lark=self.text)

    @classmethod
    def from_proto(cls, message: worker_pb2.Constraint) -> Constraint | None:
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
    """Validated by the router; the engine trusts it. Defaults: those of OpenAI's completions, with no filter on."""

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
    """Over prompt and output tokens, as in CTRL and transformers."""
    presence_penalty: float = 0.0
    """Over output tokens, as OpenAI defines it."""
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

    def to_proto(self) -> worker_pb2.SamplingParams:
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
