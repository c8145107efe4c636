"""What a completions body asks of the workers: prompts, limits, sampling."""

from __future__ import annotations

import asyncio

from tandem.router.asks.bad_words import bad_word_tokens
from tandem.router.asks.constraints import Asking, CheckedConstraint, constraint_of
from tandem.router.calls.choice import ChoiceSpec, with_seeds
from tandem.router.fields.sampling import invalid, output_tokens, sampling_params, stop_strings
from tandem.router.fields.truncation import Truncation, truncation_of
from tandem.router.placing.dispatch import SequenceSpec
from tandem.router.requests.bodies import MAX_CHOICES, CompletionBody
from tandem.router.requests.contexts import recipe
from tandem.router.service import Service
from tandem.router.tenants.caller import Caller
from tandem.router.text.served_model import Prompt

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""


async def completion_choices(body: CompletionBody, service: Service, caller: Caller) -> list[ChoiceSpec]:
    """Prompts x n. Raises TandemError naming the field."""
    service.model.check_name(body.model)
    body.check()
    n = body.n or 1
    prompts = await _prompts_after_context(body, service, caller)
    if len(prompts) * n > MAX_CHOICES:
        raise invalid("prompt", f"x n may make at most {MAX_CHOICES} choices, got {len(prompts) * n}")
    checked = await constraint_of(body, Asking(caller, service.model.text, len(prompts) * n))
    bad_words = await bad_word_tokens(body.bad_words, service.model.text, service.model.vocab_size, caller)
    choices: list[ChoiceSpec] = []
    for prompt in prompts:
        choices += with_seeds(_spec(body, prompt, service, caller, checked, bad_words), n)
    return choices


async def _prompts_after_context(body: CompletionBody, service: Service, caller: Caller) -> list[Prompt]:
    if body.context is None:
        truncation = truncation_of(
            body.truncate_prompt_tokens,
            body.truncation_side,
            output_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
            max_model_len=service.max_model_len,
        )
        special = body.add_special_tokens is not False
        return await _prompts(body.prompt, service, caller, add_special_tokens=special, truncation=truncation)
    before = await recipe(service, caller, body.context)
    prompts = await _prompts(body.prompt, service, caller, add_special_tokens=False)  # the context begins the sequence
    return [Prompt([*before, *prompt.token_ids]) for prompt in prompts]


async def _prompts(
    given: str | list[str | int | list[int]],
    service: Service,
    caller: Caller,
    *,
    add_special_tokens: bool,
    truncation: Truncation | None = None,
) -> list[Prompt]:
    """The four forms: a text, texts, token ids, lists of token ids."""
    model = service.model

    async def of_text(text: str, param: str) -> Prompt:
        return await model.text_prompt(
            text, param=param, caller=caller, add_special_tokens=add_special_tokens, truncation=truncation
        )

    if isinstance(given, str):
        return [await of_text(given, "prompt")]
    if not given:
        raise invalid("prompt", "must not be empty")
    if isinstance(given[0], int):
        kept = given if truncation is None else truncation.cut(given)
        model.check_length(len(kept), "prompt")
        ids = [item for item in kept if isinstance(item, int)]
        if len(ids) == len(kept):
            return [model.token_prompt(ids, param="prompt")]
    if len(given) > MAX_CHOICES:
        raise invalid("prompt", f"may hold at most {MAX_CHOICES} prompts, got {len(given)}")
    texts = [item for item in given if isinstance(item, str)]
    lists = [item for item in given if isinstance(item, list)]
    if len(texts) == len(given):
        prompts: list[Prompt] = []
        for index, text in enumerate(texts):
            prompts.append(await of_text(text, f"prompt[{index}]"))
            await asyncio.sleep(0)  # each may take a millisecond
        return prompts
    if len(lists) == len(given):
        return [model.token_prompt(entry, param=f"prompt[{i}]", truncation=truncation) for i, entry in enumerate(lists)]
    raise invalid("prompt", "must be a string, strings, token ids, or lists of token ids, not a mixture")


def _spec(
    body: CompletionBody,
    prompt: Prompt,
    service: Service,
    caller: Caller,
    checked: CheckedConstraint | None,
    bad_words: tuple[tuple[int, ...], ...],
) -> ChoiceSpec:
    max_tokens = output_tokens(
        body.max_tokens,
        default=min(DEFAULT_MAX_TOKENS, service.model.defaults.max_new_tokens or DEFAULT_MAX_TOKENS),
        prompt_tokens=len(prompt.token_ids),
        max_model_len=service.max_model_len,
        param="max_tokens",
        prompt_param="prompt",
        least=body.fewest_tokens,
    )
    sampling = sampling_params(
        body,
        defaults=service.model.defaults,
        vocab_size=service.model.vocab_size,
        max_tokens=max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=_larger(body.prompt_logprobs, body.logprobs if body.echo else None),
        constraint=checked.constraint if checked else None,
        bad_words=bad_words,
    )
    return ChoiceSpec(
        SequenceSpec(prompt, sampling, caller, body.cache_salt or "", caller.priority(body.priority)),
        stop=stop_strings(body),
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        keep_tokens=bool(body.return_token_ids) or sampling.logprobs is not None,
        no_output=max_tokens == 0,
        ignored=checked.ignored if checked else (),
    )


def _larger(one: int | None, other: int | None) -> int | None:
    given = [value for value in (one, other) if value is not None]
    return max(given) if given else None
