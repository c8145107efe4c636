"""The sampling part of a request: its fields on the wire, their ranges, and the way to `SamplingParams`.

HTTP bodies derive from `SamplingFields`; the gRPC service fills one. So both front doors share names, limits, defaults
and messages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tandem.common.errors import TandemError
from tandem.common.sampling import (
    MAX_BIAS,
    MAX_LISTED_TOKENS,
    MAX_PENALTY,
    MAX_REPETITION_PENALTY,
    MAX_TEMPERATURE,
    MAX_TOP_K,
    MIN_REPETITION_PENALTY,
    Constraint,
    SamplingParams,
)
from tandem.router.fields.strict import Fields

if TYPE_CHECKING:
    from tandem.router.text.served_model import SamplingDefaults

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1000
MAX_SALT_CHARACTERS = 1024
ECHO_CHARACTERS = 64


class DrawingFields(Fields, kw_only=True):
    """How tokens are chosen, and when the output ends."""

    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None


class SamplingFields(DrawingFields, kw_only=True):
    max_tokens: int | None = None
    n: int | None = None


def invalid(param: str, problem: str) -> TandemError:
    return TandemError("invalid_request", f"{param} {problem}", param=param)


def shown(value: Any) -> str:
    """A value from a request, short enough for an error message."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**ECHO_CHARACTERS else "a huge number"
    return text if len(text) <= ECHO_CHARACTERS else text[: ECHO_CHARACTERS - 3] + "..."


def in_range(param: str, value: Any, low: float, high: float) -> None:
    """Both ends included; None passes."""
    if value is not None and not low <= value <= high:
        raise invalid(param, f"must be between {_plain(low)} and {_plain(high)}, got {shown(value)}")


def _plain(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def stop_strings(fields: SamplingFields) -> tuple[str, ...]:
    """The stop strings of a request. Raises TandemError `invalid_request` where there are too many, or one is empty or
    too long."""
    stops = [fields.stop] if isinstance(fields.stop, str) else fields.stop or []
    if len(stops) > MAX_STOPS:
        raise invalid("stop", f"may hold at most {MAX_STOPS} strings, got {len(stops)}")
    for stop in stops:
        if not stop:
            raise invalid("stop", "must not hold an empty string")
        if len(stop) > MAX_STOP_CHARACTERS:
            raise invalid("stop", f"may hold strings of at most {MAX_STOP_CHARACTERS} characters")
    return tuple(stops)


def output_tokens(
    asked: int | None,
    *,
    default: int | None,
    prompt_tokens: int,
    max_model_len: int,
    param: str,
    prompt_param: str,
    least: int = 1,
) -> int:
    """How many tokens may be generated. `default` None: the rest of the context. `least` 0: none may be, so that the
    prompt can fill the context.

    Raises TandemError `context_length_exceeded` where prompt and asked output do not fit.
    """
    room = max_model_len - prompt_tokens
    if room < (least if asked == least else 1):
        raise TandemError(
            "context_length_exceeded",
            f"This model's maximum context length is {max_model_len} tokens, but the prompt has {prompt_tokens}.",
            param=prompt_param,
        )
    if asked is None:
        return room if default is None else min(default, room)
    if asked < least:
        raise invalid(param, f"must be at least {least}, got {shown(asked)}")
    if asked > room:
        raise TandemError(
            "context_length_exceeded",
            f"This model's maximum context length is {max_model_len} tokens, but {prompt_tokens} of the prompt and "
            f"{shown(asked)} of the output were asked for.",
            param=param,
        )
    return asked


def sampling_params(
    fields: SamplingFields,
    *,
    defaults: SamplingDefaults,
    vocab_size: int,
    max_tokens: int,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    constraint: Constraint | None = None,
    bad_words: tuple[tuple[int, ...], ...] = (),
) -> SamplingParams:
    """`bad_words`: as tokens, see bad_words.py.

    Raises TandemError `invalid_request` naming the first field that is out of range, and where no token is
    left to choose.
    """
    in_range("temperature", fields.temperature, 0, MAX_TEMPERATURE)
    if fields.top_p is not None and not 0 < fields.top_p <= 1:
        raise invalid("top_p", f"must be above 0 and at most 1, got {shown(fields.top_p)}")
    in_range("top_k", fields.top_k, -1, MAX_TOP_K)
    in_range("min_p", fields.min_p, 0, 1)
    in_range("repetition_penalty", fields.repetition_penalty, MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY)
    in_range("presence_penalty", fields.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
    in_range("frequency_penalty", fields.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
    in_range("seed", fields.seed, -(2**63), 2**64 - 1)
    in_range("priority", fields.priority, -(2**31), 2**31 - 1)
    in_range("min_tokens", fields.min_tokens, 0, max_tokens)
    for name, ids in (("stop_token_ids", fields.stop_token_ids), ("allowed_token_ids", fields.allowed_token_ids)):
        _check_ids(name, ids, vocab_size)
    if fields.allowed_token_ids is not None and not fields.allowed_token_ids:
        raise invalid("allowed_token_ids", "must not be empty")
    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=fields.min_tokens or 0,
        temperature=_or(fields.temperature, defaults.temperature),
        top_p=_or(fields.top_p, defaults.top_p),
        top_k=max(0, int(_or(fields.top_k, defaults.top_k))),
        min_p=_or(fields.min_p, defaults.min_p),
        repetition_penalty=_or(fields.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=fields.presence_penalty or 0.0,
        frequency_penalty=fields.frequency_penalty or 0.0,
        logit_bias=_logit_bias(fields.logit_bias, vocab_size),
        allowed_token_ids=tuple(fields.allowed_token_ids or ()),
        seed=None if fields.seed is None else fields.seed % 2**64,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        bad_words=bad_words,
        stop_token_ids=tuple(fields.stop_token_ids or ()),
        ignore_eos=bool(fields.ignore_eos),
        constraint=constraint,
    )
    params.check(vocab_size)
    params.check_leaves_a_token(params.stop_token_ids, vocab_size)
    return params


def check_salt(salt: str | None) -> None:
    """Raises TandemError."""
    if salt is not None and len(salt) > MAX_SALT_CHARACTERS:
        raise invalid("cache_salt", f"may have at most {MAX_SALT_CHARACTERS} characters, got {len(salt)}")


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _check_ids(name: str, ids: list[int] | None, vocab_size: int) -> None:
    limit = MAX_LISTED_TOKENS if name == "stop_token_ids" else vocab_size
    if ids is not None and len(ids) > limit:
        raise invalid(name, f"may hold at most {limit} ids, got {len(ids)}")
    wrong = next((extreme for extreme in (min(ids), max(ids)) if not 0 <= extreme < vocab_size), None) if ids else None
    if wrong is not None:
        raise invalid(name, f"holds {shown(wrong)}, which is not in the vocabulary of {vocab_size} tokens")


def _logit_bias(bias: dict[str, float] | None, vocab_size: int) -> dict[int, float]:
    if not bias:
        return {}
    if len(bias) > MAX_LISTED_TOKENS:
        raise invalid("logit_bias", f"may hold at most {MAX_LISTED_TOKENS} entries, got {len(bias)}")
    result: dict[int, float] = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) < 12 and int(key) < vocab_size):
            raise invalid("logit_bias", f"has the key {shown(key)}, which is not a token id")
        if not -MAX_BIAS <= value <= MAX_BIAS:
            raise invalid("logit_bias", f"must hold values between {-MAX_BIAS:g} and {MAX_BIAS:g}, got {shown(value)}")
        result[int(key)] = value
    return result
